"""Between text and token ids: tokenizers, text as it comes token by token, stop strings in it. Imported by requests,
trees, checkpoints, batches and commands."""
