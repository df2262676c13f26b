"""Where the two sides meet: a checkpoint loaded, a pool as large as fits, and steps that are scheduled, run and
committed. Imported by `LLM`, requests and trees."""
