"""What a user writes, with the types that he may count on. It is read by a type checker, and never run."""

from collections.abc import Iterator
from typing import assert_type

import numpy as np

from jaxpaged import (
    LLM,
    BeamSearchParams,
    BeamSnapshot,
    CompletionOutput,
    KVUsage,
    Logprob,
    OutOfPagesError,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    ToyLM,
    Tree,
    __version__,
)
from jaxpaged.study import PAPER_POOL, Simulation, Workload, make_workload, paper_limits
from jaxpaged.tree import Appended, Node
from jaxpaged.tree.search import BestOfN, StochasticBeam, best_of_n, stochastic_beam_search


def generate(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=8, stop=["\n"]), BeamSearchParams(beam_width=4, n=2)]
    outputs = llm.generate(["def f(", [1, 2, 3]], params)
    assert_type(outputs, list[RequestOutput])
    sample = outputs[0].outputs[0]
    assert_type(sample, CompletionOutput)
    assert_type(sample.text, str)
    assert_type(sample.token_ids, list[int])
    if sample.logprobs is not None:
        assert_type(sample.logprobs[0][5], Logprob)
    assert_type(outputs[0].kv, KVUsage)
    assert_type(outputs[0].metrics, RequestMetrics)


def watch(llm: LLM) -> None:
    snapshots = llm.watch_beams("x", BeamSearchParams(beam_width=4, early_stopping="never"))
    assert_type(snapshots, Iterator[BeamSnapshot])


def search(tree: Tree) -> None:
    root: Node = tree.open("def f(")
    try:
        assert_type(tree.append(root, [5]), Appended)
    except OutOfPagesError as error:
        print(__version__, error)
    assert_type(stochastic_beam_search(tree, root, k=4, max_tokens=8, seed=0), list[StochasticBeam])
    assert_type(best_of_n(tree, root, n=4, max_tokens=8, seed=0), BestOfN)


def toy() -> None:
    with ToyLM(lambda prefix: np.zeros(3), vocab_size=3).tree() as tree:
        search(tree)


def simulate() -> float:
    workload = make_workload("sharegpt", 100)
    assert_type(workload, Workload)
    run = Simulation(workload, PAPER_POOL, paper_limits("paged")).run()
    return float(run.running.mean())
