"""The kernel behind `paged_decode`: two memory warps, one compute warpgroup, and a ring of tiles between them.

It runs over one or two `Phase`s in turn without emptying the ring between them: plain decoding has one, decoding over
shared prefixes reads those first. Here is what lies where, and who does what; what they do is in `decode_load.py` and
`decode_compute.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_compute import compute
from pallas_kernels.decode_load import load_keys, load_values
from pallas_kernels.decode_program import DecodeOptions, DecodeProgram, DecodeSizes, PhaseRefs, Ring, f32, i32
from pallas_kernels.mosaic import row_tiles, swizzle_bytes, swizzled
from pallas_kernels.work_split import WorkSplit

Array = jax.Array


class Phase(NamedTuple):
    """Rows of queries, and the tiles that they read."""

    q: Array  # [B, K / R, N, D] queries of R KV heads each: N columns of a matrix product
    block_tables: Array  # i32[B, P]
    ends: Array  # i32[B] the position behind the last that the row reads; 0: it reads none
    split: WorkSplit


def attend(
    phases: tuple[Phase, ...],
    k_pages: Array,
    v_pages: Array,
    scales: tuple[Array, Array] | None,
    options: DecodeOptions,
) -> tuple[list[Array], list[tuple[Array, Array]]]:
    """Outputs like q of the rows that one share holds whole (none without `out_dtype`); each phase's pieces and sums.

    Pages of another dtype than q's are converted to it tile by tile; `scales` f32[N or 1, K or 1] are their keys' and
    their values'.
    """
    sizes = _sizes(phases[0].q, k_pages, options)
    operands = (
        k_pages,
        v_pages,
        () if sizes.convert_columns is None else scales,
        [(phase.q, phase.block_tables, phase.ends, *phase.split) for phase in phases],
    )
    out_type = _out_type(phases, options)
    num_outs = len(out_type) - 2 * len(phases)
    flat_operands, operands_tree = jax.tree.flatten(operands)
    flat_scratch, scratch_tree = jax.tree.flatten(
        _shared_memory(phases, k_pages, sizes, options), lambda node: not isinstance(node, tuple | list)
    )

    def kernel(*refs):
        inputs, outputs, scratch = _split(refs, len(flat_operands), len(out_type))
        k_ref, v_ref, scale_refs, phase_refs = operands_tree.unflatten(inputs)
        out_refs, pieces = _split(outputs, num_outs)
        phase_scratch, ring, out_tiles, converted = scratch_tree.unflatten(scratch)
        refs_of = zip(phase_refs, zip(pieces[::2], pieces[1::2], strict=True), phase_scratch, strict=True)
        program = DecodeProgram(
            options, sizes, lax.axis_index("share"), lax.axis_index("pack"), Ring._make([*ring, converted]), scale_refs,
            (*out_refs, *out_tiles),
        )  # fmt: skip
        _run(program, [PhaseRefs._make([*arrays, *results, *own]) for arrays, results, own in refs_of], k_ref, v_ref)

    call = plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=flat_scratch,
        grid=(phases[0].split.rows.shape[1], phases[0].q.shape[1]),
        grid_names=("share", "pack"),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_decode",
    )
    outs, pieces = _split(call(*flat_operands), num_outs)
    return outs, list(zip(pieces[::2], pieces[1::2], strict=True))


def _run(program: DecodeProgram, phases: list[PhaseRefs], k_ref, v_ref):
    """Who does what: one warpgroup computes, two warps of the other load."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == 0)
    def _():
        step = i32(0)
        for refs in phases:
            step = compute(program, refs, step)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 1)
    def _():
        @plgpu.warp_map
        def _(warp):
            pl.when(warp == 0)(lambda: load_keys(program, phases, k_ref))
            pl.when(warp == 1)(lambda: load_values(program, phases, v_ref))


def _sizes(q: Array, k_pages: Array, options: DecodeOptions) -> DecodeSizes:
    keys = options.tile.keys
    page_size, kv_heads = k_pages.shape[1:3]
    _, num_packs, _, head_dim = q.shape
    page_keys = min(page_size, keys)
    convert_columns = None
    if k_pages.dtype != q.dtype:  # 128 columns at a time would not fit the registers
        convert_columns = min(swizzle_bytes(head_dim, k_pages.dtype), 64)
    return DecodeSizes(
        keys, options.tile.stages, page_size, page_keys, keys // page_keys, kv_heads // num_packs,
        row_tiles(head_dim), convert_columns,
    )  # fmt: skip


def _out_type(phases: tuple[Phase, ...], options: DecodeOptions) -> list[jax.ShapeDtypeStruct]:
    """The output, if there is one; then of each phase the pieces and their highest scores and sums."""
    out_type = []
    if options.out_dtype is not None:
        out_type.append(jax.ShapeDtypeStruct(phases[0].q.shape, options.out_dtype))
    for phase, max_pieces in zip(phases, options.max_pieces, strict=True):
        _, num_packs, columns, head_dim = phase.q.shape
        out_type.append(jax.ShapeDtypeStruct((num_packs, max_pieces, head_dim, columns), f32))
        out_type.append(jax.ShapeDtypeStruct((num_packs, max_pieces, 2, columns), f32))
    return out_type


def _shared_memory(
    phases: tuple[Phase, ...], k_pages: Array, sizes: DecodeSizes, options: DecodeOptions
) -> tuple[Any, ...]:
    """Each phase's part (the end of `PhaseRefs`), the `Ring`, the tile of the output, and tiles that are converted."""
    q = phases[0].q
    head_dim = q.shape[3]
    swizzle = sizes.convert_columns or swizzle_bytes(head_dim, k_pages.dtype)
    transforms = swizzled(swizzle_bytes(head_dim, q.dtype), q.dtype)

    def tile(*shape, dtype=q.dtype):
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    def of_phase(phase):
        columns = phase.q.shape[2]
        barriers = plgpu.Barrier(num_barriers=2), plgpu.Barrier(num_barriers=2)
        return tile(2, columns, head_dim), tile(columns, sizes.keys), *barriers

    tiles = plgpu.SMEM((sizes.stages, sizes.keys, head_dim), k_pages.dtype, transforms=swizzled(swizzle, k_pages.dtype))
    ready = plgpu.Barrier(num_arrivals=sizes.copies, num_barriers=sizes.stages)
    converted = [tile(sizes.keys, head_dim)] * (0 if sizes.convert_columns is None else 2)
    ring = (tiles, tiles, ready, ready, plgpu.Barrier(num_barriers=sizes.stages))
    outs = [] if options.out_dtype is None else [tile(options.columns, head_dim, dtype=options.out_dtype)]
    return [of_phase(phase) for phase in phases], ring, outs, converted


def _split(items, *sizes):
    """Consecutive parts of the sizes given, and the rest."""
    parts = []
    for size in sizes:
        parts.append(items[:size])
        items = items[size:]
    return (*parts, items)
