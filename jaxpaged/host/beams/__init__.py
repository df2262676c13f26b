"""Which beams go on: a search over its steps, its forks and frees, its log-probabilities. Imported by the rest of the
host, requests, studies and `LLM`."""
