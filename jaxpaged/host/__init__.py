"""The side without jax: which sequences run, and on which pages. Imported by the engine, and by what needs no engine:
requests, trees, studies."""
