"""What constraints cost a step, and how many outputs are illegal without them.

    python scripts/bench/constraints.py                             # a GPU: 1B shapes, beams of width 64 and 512
    python scripts/bench/constraints.py --quick                     # the same, with fewer repeats
    python scripts/bench/constraints.py checkpoints/tiny-python --items 20000 --widths 8 --rows 8

*beams*: one user of the catalogue of catalogue.py (recommend.py is the example), searched in the trie of all items and
without it; the share of illegal outputs is of those that are no item. *step*: a decode step of as many beams alone, on
the device and without what attention reads, with and without rows in a trie, at each depth: the median of launches that
wait for the step, over all depths. *texts*: greedy rows of a JSON schema, whose steps wait for the host, and free ones,
whose steps are launched ahead; of a model with a tokenizer. Ends with the same as JSON on one line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from catalogue import Catalogue
from recommend import HAS_GPU, ROOT, device_of, make_llm

from jaxpaged import BeamSearchParams, SamplingParams
from jaxpaged.constraints import JsonSchema, Trie

SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["name", "tags", "count"],
    "properties": {
        "name": {"type": "string", "maxLength": 40}, "count": {"type": "integer", "minimum": 0},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 2, "maxItems": 8},
    },
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    llm = make_llm(args.model, max(*args.widths, args.rows), 1, 4 * args.history)
    catalogue = Catalogue(args.items, llm.engine.model.vocab_size)
    began = time.perf_counter()
    trie = catalogue.trie()
    print(f"{len(catalogue.items):,} items: the trie took {time.perf_counter() - began:.2f} s", flush=True)
    results: dict[str, Any] = {"beams": [], "steps": [], "texts": []}
    prompt = catalogue.histories(1, args.history)[0]
    for width in args.widths:
        results["beams"].append(show("beams", measure_beams(llm, trie, prompt, width, args.repeats)))
        results["steps"].append(show("step", measure_step(llm, trie, width, args.repeats)))
    if llm.tokenizer is not None:
        results["texts"].append(show("texts", measure_texts(llm, args.rows, args.repeats)))
    print(json.dumps({**results, "items": len(catalogue.items), "model": str(args.model), **device_of(llm)}))
    return 0


def show(what: str, result: dict[str, Any]) -> dict[str, Any]:
    print(what, ", ".join(f"{name} {value}" for name, value in result.items()), flush=True)
    return result


def measure_beams(llm: Any, trie: Trie, prompt: list[int], width: int, repeats: int) -> dict[str, Any]:
    """A whole call in the trie and without, and the share of illegal outputs in both."""
    result: dict[str, Any] = {"width": width}
    for name, constraint in (("free", None), ("in_trie", trie)):
        params = BeamSearchParams(
            beam_width=width, max_tokens=4, ignore_eos=True, constraint=constraint, detokenize=False
        )
        runs, outputs = [], []
        for repeat in range(1 + repeats):
            began = time.perf_counter()
            (output,) = llm.beam_search(prompt, params, progress=False)
            runs += [time.perf_counter() - began] if repeat else []
            outputs = output.outputs
        illegal = sum(trie.find(beam.token_ids) is None for beam in outputs)
        result |= {
            f"{name}_ms": round(1e3 * statistics.median(runs), 3), f"{name}_illegal": illegal / max(1, len(outputs)),
            f"{name}_found": len(outputs),
        }  # fmt: skip
    return result


def measure_step(llm: Any, trie: Trie, width: int, repeats: int) -> dict[str, Any]:
    """A decode step of `width` beams: milliseconds without a trie, and with rows at nodes of each depth."""
    from jaxpaged.host.constraints.trie_set import TrieSet
    from jaxpaged.host.step.batching import StepShape, fit
    from jaxpaged.host.step.features import SamplingFeatures
    from jaxpaged.requests.prompts import Prompt

    runner = llm.engine.runner
    shape = StepShape(fit(width, runner.buckets.decode_rows), runner.buckets.table_widths[0])
    params = BeamSearchParams(beam_width=width, max_tokens=4, ignore_eos=True, detokenize=False)
    group = llm._requests.read(Prompt(None, [0]), params, "", 0, llm.engine)
    features = SamplingFeatures.of([group], llm.engine.model.vocab_size)
    tries = TrieSet((trie,))
    limited = dataclasses.replace(features, tries=tries)
    free_ms = _step_ms(runner, shape, features, None, repeats)
    found = []
    for nodes in _nodes_by_depth(trie, width):
        rows = np.resize(nodes + tries.root(trie), shape.num_rows).astype(np.int32)
        found.append(_step_ms(runner, shape, limited, rows, repeats))
    in_trie = statistics.median(found)
    return {
        "rows": shape.num_rows, "free_ms": round(free_ms, 4), "in_trie_ms": round(in_trie, 4),
        "cost": f"{in_trie / free_ms - 1:+.2%}", "by_depth_ms": [round(ms, 4) for ms in found],
    }  # fmt: skip


def _nodes_by_depth(trie: Trie, width: int) -> list[np.ndarray]:
    rng, nodes = np.random.default_rng(0), np.zeros(1, np.int64)
    levels = []
    while not trie.is_leaf(nodes).any():
        levels.append(nodes)
        first, last = trie.first_edges[nodes], trie.first_edges[nodes + 1]
        picked = rng.integers(0, len(nodes), width)
        nodes = rng.integers(first[picked], last[picked]) + 1
    return levels


def _step_ms(runner: Any, shape: Any, features: Any, nodes: np.ndarray | None, repeats: int) -> float:
    batch = runner._nothing(shape, features)
    sampling = batch.sampling
    if sampling.beam_rows is not None:  # one search of all rows
        beam_rows = np.full_like(sampling.beam_rows, -1)
        width = min(beam_rows.shape[1], shape.num_rows)
        beam_rows[0, :width] = np.arange(width)
        sampling = sampling._replace(beam_rows=beam_rows)
        if getattr(sampling, "beam_counts", None) is not None:
            sampling = sampling._replace(beam_counts=np.full_like(sampling.beam_counts, 2 * width))
    if nodes is not None:
        sampling = sampling._replace(nodes=nodes)
    step = runner.prepare_batch(batch._replace(sampling=sampling), features)
    times = []
    for _ in range(3 + 10 * repeats):
        began = time.perf_counter()
        jax.block_until_ready(runner.launch(step).results.columns)
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[3:])


def measure_texts(llm: Any, rows: int, repeats: int) -> dict[str, Any]:
    """Rows of a schema beside free ones: milliseconds a step."""
    limited = SamplingParams(temperature=0, max_tokens=48, constraint=JsonSchema(SCHEMA))
    free = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    prompts = [[10 + i, 20] for i in range(rows)]
    result: dict[str, Any] = {"rows": rows}
    for name, params in (("free", free), ("schema", limited)):
        runs = []
        for repeat in range(1 + repeats):
            began = time.perf_counter()
            outputs = llm.generate(prompts, params, progress=False)
            runs += [(time.perf_counter() - began) / llm.last_run.steps] if repeat else []
        result[f"{name}_step_ms"] = round(1e3 * statistics.median(runs), 3)
        result[f"{name}_is_json"] = sum(_is_json(output.outputs[0].text) for output in outputs) / rows
    return result


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT / ("scripts/shapes/llama-3.2-1b" if HAS_GPU else "checkpoints/tiny-python")
    parser.add_argument("model", nargs="?", type=Path, default=default, metavar="MODEL")
    parser.add_argument("--items", type=int, default=1_000_000 if HAS_GPU else 100_000)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 512] if HAS_GPU else [16])
    parser.add_argument("--rows", type=int, default=64 if HAS_GPU else 8, help="rows of a schema")
    parser.add_argument("--history", type=int, default=64 if HAS_GPU else 16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_const", dest="repeats", const=2, help="fewer repeats")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
