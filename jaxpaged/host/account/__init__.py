"""What a run did: its times, where every token slot was, its trace. Imported by the engine, `LLM`, studies and
commands."""
