"""Recommend items: beams over a trie of semantic ids, from what a user has seen, timed part by part.

    python scripts/bench/recommend.py                                       # a CPU: 100,000 items, 2 users, 32 beams
    python scripts/bench/recommend.py scripts/shapes/llama-3.2-1b           # a GPU: 1,000,000 items, 16 users, 64 beams
    python scripts/bench/recommend.py MODEL --items 1000000 --users 1 --width 512

The catalogue and the users are synthetic (catalogue.py). The model knows nothing of them, so neither do the
recommendations: what they show is that every beam is an item of the catalogue, and what that costs. A recommender that
was trained on such tokens is used in the same way. Weights are random where the model is a directory of shapes. Ends
with the same as JSON on one line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from catalogue import Catalogue

ROOT = Path(__file__).resolve().parents[2]
HAS_GPU = any(Path("/dev").glob("nvidia[0-9]*"))
SHOWN = 5


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    llm = make_llm(args.model, args.width, args.users, 4 * args.history)
    began = time.perf_counter()
    catalogue = Catalogue(args.items, llm.engine.model.vocab_size)
    made = time.perf_counter()
    trie = catalogue.trie()
    built = time.perf_counter()
    print(f"{len(catalogue.items):,} items, {len(trie.items):,} nodes: the trie took {built - made:.2f} s")

    histories = catalogue.histories(args.users, args.history)
    recommend(llm, trie, histories, args.width)  # compiles, and brings the trie to the device
    runs = []
    for _ in range(args.repeats):
        began = time.perf_counter()
        found = recommend(llm, trie, histories, args.width)
        runs.append(time.perf_counter() - began)
    seconds = statistics.median(runs)
    print(f"{args.users} users, {args.width} beams each: {1e3 * seconds:.1f} ms, {args.users / seconds:,.1f} users/s")
    for item, score in found[0][:SHOWN]:
        print(f"  item {item:>9,}  log-probability {score:8.3f}  tokens {catalogue.items[item].tolist()}")
    print(
        json.dumps(
            {
                "items": len(catalogue.items), "nodes": len(trie.items), "trie_seconds": round(built - made, 3),
                "users": args.users, "width": args.width, "history": args.history, "ms": round(1e3 * seconds, 2),
                "fewest_found": min(map(len, found)), "model": str(args.model), **device_of(llm),
            }
        )
    )  # fmt: skip
    return 0


def recommend(llm: Any, trie: Any, histories: list[list[int]], width: int) -> list[list[tuple[int, float]]]:
    """For each user items by their number in the catalogue, the likeliest first, with their log-probabilities."""
    from jaxpaged import BeamSearchParams

    params = BeamSearchParams(beam_width=width, max_tokens=4, length_penalty=0.0, constraint=trie, detokenize=False)
    outputs = llm.beam_search(histories, params, progress=False)
    return [[(trie.find(beam.token_ids), beam.score) for beam in output.outputs] for output in outputs]


def make_llm(model: Path, width: int, users: int, prompt_len: int) -> Any:
    from jaxpaged import LLM

    return LLM(
        model, load_format="dummy" if model.parent.name == "shapes" else "auto", prefix_caching=False,
        max_num_seqs=width * users, max_model_len=prompt_len + 8, num_pages=2 + users * (prompt_len // 16 + 3 * width),
    )  # fmt: skip


def device_of(llm: Any) -> dict[str, str]:
    import jax

    return {"device": jax.devices()[0].device_kind, "dtype": llm.engine.dtype, "jax": jax.__version__}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT / ("scripts/shapes/llama-3.2-1b" if HAS_GPU else "checkpoints/tiny-python")
    parser.add_argument("model", nargs="?", type=Path, default=default, metavar="MODEL")
    parser.add_argument("--items", type=int, default=1_000_000 if HAS_GPU else 100_000)
    parser.add_argument("--users", type=int, default=16 if HAS_GPU else 2)
    parser.add_argument("--width", type=int, default=64 if HAS_GPU else 32)
    parser.add_argument("--history", type=int, default=64 if HAS_GPU else 16, help="items that a user has seen")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
