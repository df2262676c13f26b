"""The ways to keep KV memory: paged, contiguous, dense or none, each a policy. Imported by the rest of the host and
studies."""
