"""Studies of KV memory and time without a model: the engine's scheduler and policies over lengths alone.

A `Workload` is lengths and arrivals (`make_workload`, `read_workload`); a `Simulation` takes it through the engine's
steps, with a pool (`PAPER_POOL`) and limits (`paper_limits`) such as those of the vLLM paper, and in the time of a
device whose steps were measured, where it has a clock of a `StepTable`. Imported by commands; compare.py and
account_file.py are theirs alone. Needs no jax.
"""

from jaxpaged.study.simulate import PAPER_POOL, Simulation, paper_limits
from jaxpaged.study.step_table import StepTable
from jaxpaged.study.workloads import Workload, make_workload, read_workload

__all__ = [
    "PAPER_POOL",
    "Simulation",
    "StepTable",
    "Workload",
    "make_workload",
    "paper_limits",
    "read_workload",
]
