"""The side of jax: model, cache, attention, sampling, compiled steps. Imported by the engine and by checkpoints, which
need the shapes of the parameters."""
