"""Workloads: the published moments, the limits, and the user's own file."""

from __future__ import annotations

import numpy as np
import pytest

from jaxpaged.study.workloads import WORKLOADS, make_workload, read_workload


@pytest.mark.parametrize(
    ("name", "max_len", "prompt_mean", "output_mean"),
    [
        ("sharegpt", 2048, 152, 337),
        ("alpaca", 2048, 19.31, 58.95),  # rounded up: half a token more
        ("alpaca-lognormal", 2048, 19.31, 58.45),
        ("azure-chat", None, 1234, 219),  # of the log-normal; the trace's own are 1,155 and 211
        ("exponential:512:128:512", 2048, 512, 119.1),
        ("fixed:20:30", 2048, 20, 30),
    ],
)
def test_a_workload_has_the_means_that_it_is_fitted_to(name, max_len, prompt_mean, output_mean):
    workload = make_workload(name, 100_000, seed=3, max_len=max_len)
    assert workload.prompt_lens.mean() == pytest.approx(prompt_mean, rel=0.02)
    assert workload.output_lens.mean() == pytest.approx(output_mean, rel=0.02)
    assert workload.prompt_lens.min() >= 1 and workload.output_lens.min() >= 1


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_seed_decides_and_no_request_reaches_the_limit(name):
    workload, again = make_workload(name, 500, seed=1), make_workload(name, 500, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(workload, again, strict=True))
    assert not np.array_equal(workload.output_lens, make_workload(name, 500, seed=2).output_lens)
    assert workload.max_len < 2048


def test_exponential_outputs_are_redrawn_not_cut_at_the_cap():
    outputs = make_workload("exponential:512:128:128", 50_000).output_lens
    assert outputs.max() == 128 and (outputs == 128).mean() < 0.01


def test_arrivals_are_a_burst_or_a_poisson_process_on_the_same_lengths():
    burst, spread = make_workload("alpaca", 20_000), make_workload("alpaca", 20_000, rate=20.0)
    assert not burst.arrivals.any()
    assert np.array_equal(burst.output_lens, spread.output_lens)
    gaps = np.diff(spread.arrivals)
    assert gaps.mean() == pytest.approx(0.05, rel=0.03) and gaps.std() == pytest.approx(0.05, rel=0.03)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("shakespeare", {}, "unknown workload 'shakespeare'; choose one of sharegpt, alpaca"),
        ("fixed:20", {}, "unknown workload 'fixed:20'"),
        ("exponential:a:b:c", {}, "unknown workload"),
        ("fixed:100:100", dict(max_len=200), "shorter than max_len=200: raise max_len"),
        ("sharegpt", dict(rate=0), "rate must be above 0"),
        ("sharegpt", dict(seed=-1), "seed must be at least 0, got -1"),
    ],
)
def test_what_cannot_be_made_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_workload(name, 10, **options)


def test_a_file_of_lengths_or_prompts_is_read_in_order_of_arrival(tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text(
        '{"prompt_len": 5, "output_len": 7, "arrival": 2.5}\n\n'
        '{"prompt_token_ids": [1, 2, 3], "max_tokens": 4, "arrival": 1}\n{"prompt": "a b", "output_len": 1}\n'
    )
    workload = read_workload(path, num_tokens=lambda text: len(text.split()))
    assert workload.prompt_lens.tolist() == [2, 3, 5]
    assert workload.output_lens.tolist() == [1, 4, 7]
    assert workload.arrivals.tolist() == [0.0, 1.0, 2.5]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt_len": 0, "output_len": 7}', "line 1: prompt_len must be an integer of at least 1, got 0"),
        ('{"prompt_len": 3}', "line 1: output_len must be an integer of at least 1, got None"),
        ('{"prompt": "a", "output_len": 7}', "needs a tokenizer"),
        ('{"prompt_len": 3, "output_len": 7, "arrival": -1}', "arrival must be seconds from 0 on"),
        ("[1]", "expected a JSON object"),
        ("", "has no requests"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, line, message):
    path = tmp_path / "requests.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=message):
        read_workload(path)
