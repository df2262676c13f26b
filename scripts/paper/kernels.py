"""The figures of the vLLM paper that are about kernels and transfers, measured on the GPU at hand: 18a and 19.

Both are other scripts of this directory with OPT-13B's shapes; here is what their figures mean beside the paper's.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from figure import Figure, Row
from verdict import aim, within

from jaxpaged.looks.palette import OTHERS

#: Batches and contexts of the paper, and longer contexts.
SHORT, LONG = (64, 128, 256), (1024, 2048, 4096, 8192)
BATCHES = (8, 32)
PAGE_SIZES = (8, 16, 32, 64, 128, 256)
SCRIPTS = Path(__file__).parent.parent
MODEL = SCRIPTS / "shapes" / "opt-13b"
sys.path.append(str(SCRIPTS / "bench"))  # where the scripts are that measure


def figure_18a(seeds: range, requests: int) -> Figure:
    """The paged kernel over pages of 16 against cuDNN over a dense cache."""
    device = need_gpu("18a")
    import attention as bench_attention

    cases = [f"{rows}x{context}" for rows in BATCHES for context in (*SHORT, *LONG)]
    options = ["--heads", "40/40", "--head-dim", "128", "--page-size", "16", "--implementations", "pallas", "cudnn"]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "attention.json"
        bench_attention.main(["--decode", *cases, *options, "--json", str(path)])
        report = json.loads(path.read_text())
    micros = {(row["case"], row["implementation"]): row.get("us") for row in report["results"]}
    rows, curves = [], {}
    for batch in BATCHES:
        for context in (*SHORT, *LONG):
            case = f"{batch} x {context}"
            paged, dense = micros.get((case, "pallas")), micros.get((case, "cudnn"))
            if paged is None or dense is None:
                continue
            held = within(20.0, 26.0, better="less") if context in SHORT else aim(high=5.0)
            rows.append(Row(f"{case}: % slower", [100 * (paged / dense - 1)], None, held))
            curves.setdefault(batch, []).append((context, paged, dense))
    if not rows:
        raise ValueError("figure 18a has nothing to show: no case ran on both kernels, see the table above")

    def draw(canvas: Any) -> None:
        from jaxpaged.looks.style import grid, legend_below

        axes = canvas.subplots()
        for (batch, points), colour in zip(curves.items(), OTHERS, strict=False):
            contexts, paged, dense = zip(*points, strict=True)
            axes.plot(contexts, paged, "o-", color=colour, label=f"paged, {batch} rows")
            axes.plot(contexts, dense, "s--", color=colour, label=f"dense (cuDNN), {batch} rows")
        axes.set_xscale("log", base=2)
        axes.set_xticks((*SHORT, *LONG), [f"{context:,}" for context in (*SHORT, *LONG)])
        axes.set_yscale("log")
        axes.set(xlabel="tokens of context", ylabel="microseconds of a layer")
        grid(axes)
        legend_below(canvas, axes, most_columns=4)

    method = (
        f"decode attention of one layer on {device}, 40 heads of 128, bfloat16, pages of 16 against cuDNN over dense "
        "rows (the paper: FasterTransformer's on an A100); at 1k tokens and more, 5 % is our own aim"
    )
    return Figure("Figure 18a: what reading by pages costs", method, rows, draw)


def figure_19(seeds: range, requests: int) -> Figure:
    """256 tokens of KV swapped out and back, or computed again."""
    device = need_gpu("19")
    import preemption as bench_preemption

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
        Row("page by page: smallest pages / largest", [singly[0] / singly[-1]], None,
            within(2.0, None, why="many times in the paper")),
        Row("recompute: slowest / quickest page size", [max(computed) / min(computed)], None,
            within(None, 1.2, why="the same at every size in the paper")),
        Row("swap: slowest / quickest page size", [max(swaps) / min(swaps)], None, aim(high=1.25)),
    ]  # fmt: skip

    def draw(canvas: Any) -> None:
        from jaxpaged.looks.style import grid, legend_below

        axes = canvas.subplots()
        lines = {"swap": swaps, "swap page by page": singly, "recompute": computed}
        for (label, values), colour, marker in zip(lines.items(), OTHERS, "osD", strict=False):
            axes.plot(PAGE_SIZES, values, marker=marker, color=colour, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(PAGE_SIZES, sizes)
        axes.set_yscale("log")
        axes.set(xlabel="tokens in a page", ylabel="milliseconds")
        grid(axes)
        legend_below(canvas, axes)

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
