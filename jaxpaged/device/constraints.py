"""What constraints leave of a step's logits: the tokens that a row's node in a trie, or the host, allows.

A node's tokens become the bits of a vocabulary, 4 bytes for 32 tokens, whether the node lists its children or has their
bits already. So a step moves a thirty-second of what its logits are, and one pass over these, which they get anyway,
puts the others to -inf. Rows of different tries, and of none, are in one batch: all tries are one table.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxpaged.device.mesh import first_replaced
from jaxpaged.step_io import DEAD_NODE, FREE_NODE, SamplingInputs, TrieTables, of_row

Array = jax.Array


def with_masks(sampling: SamplingInputs, tries: TrieTables | None, nodes: Array | None) -> SamplingInputs:
    """The inputs with the node of every row, known now, and the masks i32[R, V / 32] of what all limits allow.

    `nodes` i32[M] are those that the rows of the step before have come to.
    """
    if sampling.nodes is None:
        return sampling
    assert tries is not None and nodes is not None, "rows in a trie, and no tables of it"
    before = nodes.at[jnp.maximum(of_row(sampling.nodes), 0)].get(mode="promise_in_bounds")
    known = jnp.where(sampling.nodes < 0, before, sampling.nodes)
    masks = allowed_bits(tries, known)
    return sampling._replace(nodes=known, masks=masks if sampling.masks is None else masks & sampling.masks)


def limit(logits: Array, masks: Array) -> Array:
    """logits f32[R, V] of the tokens whose bits i32[R, V / 32] are set; -inf for the others."""
    places = jnp.arange(32, dtype=jnp.int32)
    bits = (masks[:, :, None] >> places & 1).reshape(len(masks), -1)
    return jnp.where(bits[:, : logits.shape[1]] == 1, logits, -jnp.inf)


def allowed_bits(tries: TrieTables, nodes: Array) -> Array:
    """i32[R, V / 32]: the tokens that lead on from each of nodes i32[R]."""
    with jax.named_scope("trie"):
        rows = tries.bit_rows[nodes]
        bits = tries.bits[rows]
        counts = jnp.where(rows == DEAD_NODE, tries.counts[nodes], 0)
        children = tries.first[nodes][:, None] + tries.places  # [R, C]
        tokens = tries.tokens.at[children].get(mode="clip")
        words = jnp.where(tries.places < counts[:, None], tokens >> 5, bits.shape[1])  # out of range: dropped
        # The children's tokens differ, so a sum of their bits is all of them.
        return bits.at[jnp.arange(len(nodes))[:, None], words].add(jnp.left_shift(1, tokens & 31), mode="drop")


def advance(tries: TrieTables, nodes: Array, tokens: Array) -> Array:
    """i32[R]: the nodes behind tokens i32[R]; DEAD_NODE where none is."""
    count = tries.counts[nodes]
    place = jnp.zeros_like(nodes)  # children whose token is less
    step = 1 << (32 * tries.bits.shape[1]).bit_length()
    while step := step >> 1:
        child = jnp.minimum(tries.first[nodes] + place + step - 1, len(tries.tokens) - 1)
        is_less = (place + step <= count) & (tries.tokens[child] < tokens)
        place = jnp.where(is_less, place + step, place)
    child = jnp.minimum(tries.first[nodes] + place, len(tries.tokens) - 1)
    is_there = (place < count) & (tries.tokens[child] == tokens)
    return jnp.where(nodes == FREE_NODE, FREE_NODE, jnp.where(is_there, child, DEAD_NODE))


def are_leaves(tries: TrieTables, nodes: Array) -> Array:
    """bool[R]: whether an item ends at each of nodes i32[R], and none goes on."""
    return (tries.counts[nodes] == 0) & (nodes != FREE_NODE) & (nodes != DEAD_NODE)


def next_nodes(
    sampling: SamplingInputs, tries: TrieTables | None, drawn: Array, parents: Array | None = None
) -> Array | None:
    """i32[M]: where the rows have come to by the tokens i32[M] that they drew; None where no row is in a trie.

    `parents` i32[R]: the row that each has gone on from, where that is not always its own.
    """
    if sampling.nodes is None or tries is None:
        return None
    before = sampling.nodes if parents is None else sampling.nodes[parents]
    behind = advance(tries, before, drawn[: len(sampling.nodes)])
    return first_replaced(jnp.zeros_like(drawn), behind)
