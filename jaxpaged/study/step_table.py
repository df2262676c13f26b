"""How long the steps of one model took on one device, so that a run can be replayed without either.

    table = StepTable.read("opt-13b-h100.json")
    Simulation(workload, cache, limits, step_seconds=table.clock(limits, cache)).run()

scripts/bench/step_times.py measures the engine's own steps, from the scheduler's decision until tokens are learnt.
A decode step is known by its rows, as padded, and by the tokens of KV that these read in all; a prefill step by its new
tokens, as padded. In between, and beyond, times lie on straight lines.

A mixed step takes what a prefill of all its tokens takes, those of rows that decode included, and what these read of KV
adds to a decode step of as many rows: the weights, which are read once, are in the first of the two.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxpaged.config import DENSE_CACHES, CacheConfig, EngineConfig, ModelConfig
from jaxpaged.host.scheduler import StepPlan
from jaxpaged.host.step.batching import Buckets
from jaxpaged.host.step.features import SamplingFeatures
from jaxpaged.study.simulate import Clock

#: What is sampled: one greedy token, one of several samples at random, or the beams of a search.
KINDS = ("greedy", "samples", "beams")
_POINT = {"name": str, "step": str, "rows": int, "tokens": int, "seconds": float}


@dataclass(frozen=True)
class Line:
    """Straight lines through points, the first and the last of them continued; one point is a constant."""

    xs: np.ndarray  # ascending
    ys: np.ndarray

    @classmethod
    def through(cls, points: list[tuple[float, float]]) -> Line:
        """Points of one x are averaged."""
        xs, index = np.unique([x for x, _ in points], return_inverse=True)
        return cls(xs.astype(np.float64), np.bincount(index, [y for _, y in points]) / np.bincount(index))

    def at(self, x: np.ndarray) -> np.ndarray:
        if len(self.xs) == 1:
            return np.full(x.shape, self.ys[0])
        i = np.clip(np.searchsorted(self.xs, x) - 1, 0, len(self.xs) - 2)
        slope = (self.ys[i + 1] - self.ys[i]) / (self.xs[i + 1] - self.xs[i])
        return self.ys[i] + (x - self.xs[i]) * slope


@dataclass(frozen=True)
class StepTable:
    """Measured times, in seconds.

    `points`: dicts with `name` ("paged-16": pages of 16 tokens, greedy; "paged-16-samples", "paged-16-beams"; "dense"),
    `step` ("decode" or "prefill"), `rows`, `tokens` and `seconds`. `facts`: the rest of the file.
    """

    points: tuple[dict[str, Any], ...]
    copies: tuple[tuple[int, float], ...]  # pages that a step copies, seconds
    swaps: tuple[tuple[int, float, float], ...]  # pages of a swap, seconds out, seconds back
    facts: dict[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> StepTable:
        """Raises ValueError for a file that is no such table, with what is wrong."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(values, dict) or not isinstance(values.get("points"), list):
            raise ValueError(f"{path} has no step times: make it with scripts/bench/step_times.py")
        for i, point in enumerate(values["points"]):
            for key, kind in _POINT.items():
                if not isinstance(point.get(key), kind):
                    raise ValueError(f"{path}, point {i}: {key} must be of type {kind.__name__}: {point.get(key)!r}")
        return cls(
            tuple(values.pop("points")),
            tuple((pages, seconds) for pages, seconds in values.pop("copies", [])),
            tuple((pages, out, back) for pages, out, back in values.pop("swaps", [])),
            values,
        )

    def check_model(self, model: ModelConfig) -> None:
        """ValueError unless the times are those of this model's shape."""
        measured, asked = self.facts.get("model_shape", {}), json.loads(json.dumps(model.to_dict()))
        if differing := [name for name, value in asked.items() if measured.get(name) != value]:
            name = differing[0]
            raise ValueError(
                f"the step times are of {self.facts.get('model')}, another model: its {name} is {measured.get(name)}, "
                f"not {asked[name]}"
            )

    def with_stand_ins(self) -> StepTable:
        """A table of what no measurement reached, too: steps of dense caches, of samples and of beams, where they are
        missing, take what greedy steps over pages of 16 take. `facts["stand_ins"]` names them."""
        known = [point for point in self.points if point["name"] == "paged-16"]
        missing = [name for name in ("dense", "paged-16-samples", "paged-16-beams") if name not in self.names]
        points = [{**point, "name": name} for name in missing for point in known]
        return dataclasses.replace(self, points=(*self.points, *points), facts={**self.facts, "stand_ins": missing})

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(point["name"] for point in self.points))

    def clock(
        self,
        limits: EngineConfig,
        cache: CacheConfig,
        kind: str = "greedy",
        buckets: Buckets | None = None,
        least_rows: int = 1,
    ) -> Clock:
        """What `Simulation` takes as `step_seconds`, for an engine with these limits.

        `buckets`: the sizes to which its steps are padded, by default the engine's. `least_rows`: decode steps of fewer
        rows count as of so many, to hold tables against each other that start there.

        Raises ValueError where the system was not measured.
        """
        name = name_of(limits.kv_cache, cache.page_size, kind)
        decode = self._decode_lines(name, least_rows)
        prefill = self._prefill_line(name_of(limits.kv_cache, cache.page_size))
        rows_measured = np.array(sorted(decode))
        padded = buckets or Buckets.for_limits(limits, cache)
        copying = Line.through([(0, 0.0), *self.copies])
        swapping = [Line.through([(0, 0.0), *((s[0], s[way]) for s in self.swaps)]) for way in (1, 2)]
        features = SamplingFeatures()

        def seconds(plan: StepPlan, num_steps: int) -> np.ndarray:
            shape = padded.shape_of(plan, features)
            if shape.num_prompts is not None and shape.num_tokens is not None:
                decoding = plan.rows[: plan.num_decoding]
                read = np.array([0.0, sum([row.start + 1.0 for row in decoding])])
                alone, reading = _between(decode, rows_measured, shape.num_rows, read)
                times = prefill.at(np.array([float(shape.num_rows + shape.num_tokens)])) + (reading - alone)
            elif shape.num_tokens is not None:
                times = prefill.at(np.array([float(shape.num_tokens)]))
            else:
                read = sum([row.start for row in plan.rows]) + len(plan.rows) * (1.0 + np.arange(num_steps))
                times = _between(decode, rows_measured, shape.num_rows, read)
            if plan.copies:
                times[0] += copying.at(np.array([float(len(plan.copies))]))[0]
            for swap in plan.swaps:
                times[0] += swapping[0 if swap.is_out else 1].at(np.array([float(len(swap.page_ids))]))[0]
            return times

        return seconds

    def _decode_lines(self, name: str, least_rows: int) -> dict[int, Line]:
        points: dict[int, list[tuple[float, float]]] = {}
        for point in self.points:
            if point["name"] == name and point["step"] == "decode" and point["rows"] >= least_rows:
                points.setdefault(point["rows"], []).append((point["tokens"], point["seconds"]))
        if not points:
            raise ValueError(f"the step times have no decode steps of {name!r}; they have {', '.join(self.names)}")
        return {rows: Line.through(measured) for rows, measured in points.items()}

    def _prefill_line(self, name: str) -> Line:
        """Pages of other sizes prefill as those of 16 do."""
        for known in (name, "paged-16"):
            found = [p for p in self.points if p["name"] == known and p["step"] == "prefill"]
            if found:
                return Line.through([(point["tokens"], point["seconds"]) for point in found])
        raise ValueError(f"the step times have no prefill steps of {name!r}; they have {', '.join(self.names)}")


def name_of(kv_cache: str, page_size: int, kind: str = "greedy") -> str:
    """Whose times are those of a system: what reserves pages beforehand reads them with the same kernels."""
    if kv_cache == "none":
        raise ValueError("kv_cache='none' has no step times: its steps grow with all tokens of all requests")
    base = "dense" if kv_cache in DENSE_CACHES else f"paged-{page_size}"
    return base if kind == "greedy" else f"{base}-{kind}"


def padding_of(buckets: Buckets) -> dict[str, list[int]]:
    """JSON-ready; `padding_from` reads it back."""
    return {name: list(sizes) for name, sizes in dataclasses.asdict(buckets).items()}


def padding_from(values: dict[str, list[int]]) -> Buckets:
    return Buckets(**{name: tuple(sizes) for name, sizes in values.items()})


def _between(lines: dict[int, Line], rows_measured: np.ndarray, rows: int, read: np.ndarray) -> np.ndarray:
    """Seconds f64[n] of decode steps of `rows` rows that read so many tokens f64[n]."""
    i = int(np.searchsorted(rows_measured, rows))
    if i == len(rows_measured) or i == 0 or rows_measured[i] == rows:
        return lines[int(rows_measured[min(i, len(rows_measured) - 1)])].at(read)
    low, high = int(rows_measured[i - 1]), int(rows_measured[i])
    share = (rows - low) / (high - low)
    return (1 - share) * lines[low].at(read) + share * lines[high].at(read)
