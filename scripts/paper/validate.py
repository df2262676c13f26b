"""Holds the replay against the engine: runs that step_times.py measured, and the same runs by the step times."""

from __future__ import annotations

from typing import Any

from jaxpaged.config import CacheConfig, EngineConfig
from jaxpaged.config.choices import RENAMED_CHOICES
from jaxpaged.study.simulate import Simulation
from jaxpaged.study.step_table import StepTable, padding_from
from jaxpaged.study.workloads import make_workload

#: How far a replay may be off.
TOLERANCE = 0.1


def validate(table: StepTable) -> dict[str, Any]:
    """Print every measured run beside its replay; all figures, and the verdict, which is "agree" within `TOLERANCE`."""
    runs = table.facts.get("runs", [])
    if not runs:
        raise ValueError("the step times have no runs to hold a replay against: measure them with step_times.py")
    facts = table.facts
    print(f"Replays of runs of {facts['model']} on {facts['device']}, without which the step times were measured\n")
    print(f"{'':20} {'':>19} {'seconds':>19} {'':>6} {'s/token, normalized':>21} {'':>6}")
    print(f"{'':20} {'requests':>9} {'steps':>9} {'measured':>9} {'replay':>9} {'':>6} {'measured':>10} {'replay':>10}")
    results = [replay(table, run) for run in runs]
    for one in results:
        steps = "" if one["steps"] == one["replayed_steps"] else f" (replay: {one['replayed_steps']})"
        latency = ""
        if one["latency_off"] is not None:
            latency = f"{one['normalized_latency']:10.5f} {one['replayed_latency']:10.5f} {one['latency_off']:+6.1%}"
        print(
            f"{one['system']:20} {one['requests']:9} {one['steps']:9} {one['seconds']:9.3f} {one['replayed']:9.3f} "
            f"{one['off']:+6.1%} {latency}{steps}"
        )
    worst = max(max(abs(one["off"]), abs(one["latency_off"] or 0.0)) for one in results)
    verdict = "agree" if worst <= TOLERANCE else "do not agree"
    print(f"\nReplays {verdict} with the runs: at most {worst:.1%} off, held to {TOLERANCE:.0%}")
    return {"runs": results, "worst": worst, "tolerance": TOLERANCE, "verdict": verdict}


def replay(table: StepTable, run: dict[str, Any]) -> dict[str, Any]:
    """The run's measured figures, and those of its replay."""
    facts = table.facts
    cache = CacheConfig(16, run["num_pages"])
    system: str = run["system"]
    kv_cache = RENAMED_CHOICES.get(system, system)
    padding = padding_from(run["padding"])
    limits = EngineConfig(
        run["max_model_len"], facts["max_num_seqs"], facts["max_num_batched_tokens"], kv_cache=kv_cache,
        mixed_steps=bool(padding.mixed_rows),
    )  # fmt: skip
    workload = make_workload(run["workload"], run["requests"], run["seed"], max_len=run["max_model_len"])
    clock = table.clock(limits, cache, buckets=padding)
    simulation = Simulation(workload, cache, limits, step_seconds=clock)
    steps = simulation.run().steps
    seconds = float(simulation.finished_times.max())
    latency = float((simulation.finished_times / workload.output_lens).mean())
    kept = ("system", "requests", "steps", "seconds")
    measured = run.get("normalized_latency")  # not in a file whose measurement was cut short
    return {
        **{name: run[name] for name in kept},
        "normalized_latency": measured,
        "replayed_steps": steps,
        "replayed": seconds,
        "off": seconds / run["seconds"] - 1,
        "replayed_latency": latency,
        "latency_off": None if measured is None else latency / measured - 1,
    }
