"""Attention over a paged KV cache, usable without the rest of the project: imports jax only.

Letters in shapes: B rows, T new tokens, H query heads, K KV heads, D head dim, N pages, S page size, P pages a row.
"""
