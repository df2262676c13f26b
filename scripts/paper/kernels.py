"""The figures of the vLLM paper that are about kernels and transfers, measured on the GPU at hand: 18a and 19.

Both are other scripts of this directory with OPT-13B's shapes; here is what their figures mean beside the paper's.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from figure import Figure, Row

#: Batches and contexts of the paper, and longer contexts.
SHORT, LONG = (64, 128, 256), (1024, 2048, 4096, 8192)
BATCHES = (8, 32)
PAGE_SIZES = (8, 16, 32, 64, 128, 256)
MODEL = Path(__file__).parent.parent / "shapes" / "opt-13b"


def figure_18a(seeds: range, requests: int) -> Figure:
    """The paged kernel over pages of 16 against cuDNN over a dense cache."""
    import attention as bench_attention

    device = need_gpu("18a")
    cases = [f"{rows}x{context}" for rows in BATCHES for context in (*SHORT, *LONG)]
    options = ["--heads", "40/40", "--head-dim", "128", "--page-size", "16", "--implementations", "pallas", "cudnn"]
    report = last_line(bench_attention.main, ["--decode", *cases, *options])
    micros = {(row["case"], row["implementation"]): row.get("us") for row in report["results"]}
    rows, curves = [], {}
    for batch in BATCHES:
        for context in (*SHORT, *LONG):
            case = f"{batch} x {context}"
            paged, dense = micros.get((case, "pallas")), micros.get((case, "cudnn"))
            if paged is None or dense is None:
                continue
            low, high = (None, 26.0) if context in SHORT else (None, 5.0)
            rows.append(Row(f"{case}: % slower (paper: 20 to 26)", [100 * (paged / dense - 1)], None, low, high))
            curves.setdefault(batch, []).append((context, paged, dense))
    if not rows:
        raise ValueError("figure 18a has nothing to show: no case ran on both kernels, see the table above")

    def draw(axes: Any) -> None:
        for batch, points in curves.items():
            contexts, paged, dense = zip(*points, strict=True)
            (line,) = axes.plot(contexts, paged, "o-", label=f"paged, {batch} rows")
            axes.plot(contexts, dense, "o--", color=line.get_color(), label=f"dense (cuDNN), {batch} rows")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens of context")
        axes.set_ylabel("microseconds of a layer")
        axes.legend()

    method = (
        f"decode attention of one layer on {device}, 40 heads of 128, bfloat16, pages of 16 against cuDNN over dense "
        "rows (the paper: FasterTransformer's on an A100); at 1k tokens and more, 5 % is our own aim"
    )
    return Figure("Figure 18a: what reading by pages costs", method, rows, draw)


def figure_19(seeds: range, requests: int) -> Figure:
    """256 tokens of KV swapped out and back, or computed again."""
    import preemption as bench_preemption

    device = need_gpu("19")
    sizes = [str(size) for size in PAGE_SIZES]
    options = ["--tokens", "256", "--page-sizes", *sizes, "--page-by-page", "--repeats", "7"]
    results = last_line(bench_preemption.main, [str(MODEL), *options])["results"]
    rows: list[Row] = []
    for one in results:
        size = one["page_size"]
        rows.append(Row(f"pages of {size:3}: swap, ms", [one["swap_ms"]]))
        rows.append(Row(f"pages of {size:3}: swap page by page, as the paper, ms", [one["single_swap_ms"]]))
        rows.append(Row(f"pages of {size:3}: recompute, ms", [one["recompute_ms"]]))
    swaps, singly, computed = ([one[key] for one in results] for key in ("swap_ms", "single_swap_ms", "recompute_ms"))
    rows += [
        Row("page by page: smallest pages / largest (paper: many times)", [singly[0] / singly[-1]], None, 2.0),
        Row("recompute: slowest / quickest page size (paper: 1)", [max(computed) / min(computed)], None, None, 1.2),
        Row("swap: slowest / quickest page size (our aim: flat)", [max(swaps) / min(swaps)], None, None, 1.25),
    ]  # fmt: skip

    def draw(axes: Any) -> None:
        for label, values in (("swap", swaps), ("swap page by page", singly), ("recompute", computed)):
            axes.plot(PAGE_SIZES, values, "o-", label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(PAGE_SIZES, sizes)
        axes.set_yscale("log")
        axes.set_xlabel("tokens in a page")
        axes.set_ylabel("milliseconds")
        axes.legend()

    method = f"256 tokens of OPT-13B's KV on {device}: out and back, or one prefill; pinned host memory"
    return Figure("Figure 19: swap or compute again", method, rows, draw)


def need_gpu(name: str) -> str:
    """The device's name; ValueError where there is no GPU."""
    import jax

    device = jax.devices()[0]
    if device.platform != "gpu":
        raise ValueError(f"figure {name} needs a GPU that jax can use; this is {device.device_kind}")
    return device.device_kind


def last_line(main: Callable[[list[str]], int], argv: list[str]) -> dict[str, Any]:
    """The report of a script, whose output is shown as it comes."""
    shown = _Tee()
    with contextlib.redirect_stdout(shown):
        main(argv)
    return json.loads(shown.getvalue().splitlines()[-1])


class _Tee(io.StringIO):
    def write(self, text: str) -> int:
        sys.__stdout__.write(text)  # type: ignore[union-attr]
        sys.__stdout__.flush()  # type: ignore[union-attr]
        return super().write(text)
