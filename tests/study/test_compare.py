"""`jaxpaged compare`: the same requests on every system, figures that follow from what ran, refusals before work."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from figure_checks import painted
from toy import save_toy_checkpoint

from jaxpaged import LLM
from jaxpaged.cli.compare_plots import pictures, timeline
from jaxpaged.cli.main import main
from jaxpaged.config import KV_CACHES, CacheConfig
from jaxpaged.looks.palette import PARTS, SYSTEMS
from jaxpaged.study.account_file import saturated_steps
from jaxpaged.study.compare import (
    at_rate,
    default_num_pages,
    find_refusals,
    join_reasons,
    make_requests,
    measure,
    num_equal_requests,
)
from jaxpaged.study.workloads import Workload, make_workload

LIMITS = {"max_model_len": 64, "max_num_seqs": 8, "max_num_batched_tokens": 64}
SIZES = ("--max-model-len", 64, "--max-num-seqs", 8, "--max-num-batched-tokens", 64, "--page-size", 4)
CONTIGUOUS = ("contiguous-oracle", "contiguous-pow2", "contiguous-max")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_toy_checkpoint(tmp_path_factory.mktemp("model") / "toy")


@pytest.fixture(scope="module")
def results(directory):
    """12 requests of 16 + 16 tokens, all at once, in a pool of two sequences of the model's length."""
    llm = LLM(directory, page_size=4, num_pages=33, **LIMITS)
    requests = make_requests(make_workload("fixed:16:16", 12), vocab_size=97)
    runs = {}
    for system in ("paged", *CONTIGUOUS):
        llm.rebuild(kv_cache=system)
        runs[system] = measure(llm, requests, system, rate=None)
    return runs


def compare(directory, *arguments) -> int:
    return main(["compare", str(directory), *map(str, arguments)])


def error_line(capfd):
    message = capfd.readouterr().err
    assert message.count("\n") == 1 and message.startswith("jaxpaged: "), message
    return message


def test_the_systems_generate_the_same_tokens_and_differ_in_batch_and_memory(results):
    assert num_equal_requests(list(results.values())) == 12
    summaries = {name: result.summary() for name, result in results.items()}
    # 128 slots hold 2 sequences of 64, 4 of 32, and by pages as many as have written so little.
    assert summaries["contiguous-max"]["mean_running_sequences"] == 2
    assert summaries["contiguous-oracle"]["mean_running_sequences"] == 4
    assert summaries["paged"]["mean_running_sequences"] > 4
    assert summaries["contiguous-max"]["percent_of_pool"]["internal"] == 50
    assert summaries["contiguous-oracle"]["percent_of_pool"]["internal"] == 0
    assert summaries["paged"]["percent_of_pool"]["reserved"] == 0
    for summary in summaries.values():
        parts = ("used", "reserved", "internal", "rounding", "cached", "free")
        assert sum(summary["percent_of_pool"][part] for part in parts) == pytest.approx(100, abs=0.01)


def test_a_reason_that_all_systems_share_is_said_once():
    assert join_reasons({"a": "no memory", "b": "no memory"}) == "no memory"
    assert join_reasons({"a": "no memory", "b": "no room"}) == "a: no memory; b: no room"


def test_figures_follow_from_lengths_and_times(results):
    result = results["contiguous-max"]
    assert (result.num_prompt_tokens, result.num_output_tokens) == (12 * 16, 12 * 16)
    assert result.generated_per_second == 192 / result.seconds
    assert result.processed_per_second == 384 / result.seconds
    assert result.normalized_latency == pytest.approx(result.latencies.mean() / 16)
    assert (result.first_token_latencies <= result.latencies).all()
    assert result.latencies.max() == result.seconds
    assert result.summary()["latency_seconds"]["p99"] <= round(result.seconds, 4)


def test_latency_counts_from_arrival(directory):
    llm = LLM(directory, page_size=4, num_pages=33, **LIMITS)
    requests = make_requests(make_workload("fixed:8:2", 3), vocab_size=97)
    spread = at_rate(requests, rate=20.0)
    assert spread.prompts == requests.prompts and (np.diff(spread.workload.arrivals) > 0).all()
    measure(llm, spread, "paged", 20.0)  # compiles
    result = measure(llm, spread, "paged", 20.0)
    finished = result.latencies + spread.workload.arrivals
    assert result.seconds == finished.max()
    assert (result.latencies < result.seconds).all()


@pytest.mark.parametrize("kind", [{"num_samples": 3}, {"beam_width": 3}])
def test_samples_and_beams_are_copied_by_contiguous_systems_and_shared_by_pages(directory, kind):
    llm = LLM(directory, page_size=4, num_pages=65, **LIMITS)
    requests = make_requests(make_workload("fixed:16:6", 3), vocab_size=97, **kind)
    copied = {}
    for system in ("paged", "contiguous-oracle"):
        llm.rebuild(kv_cache=system)
        result = measure(llm, requests, system, None)
        assert result.num_output_tokens == 3 * 6 * (3 if "num_samples" in kind else 1)
        copied[system] = result.stats.page_copies
    assert copied["contiguous-oracle"] >= copied["paged"] + 3 * 2 * 4  # 2 forks of a prompt of 4 pages, 3 times


def test_a_mean_is_over_steps_with_a_queue_but_for_the_first_tenth():
    assert saturated_steps(np.array([3, 3, 2, 1, 0, 0, 0, 0, 0, 0])).tolist() == [False, *[True] * 3, *[False] * 6]
    assert saturated_steps(np.zeros(5, int)).all()


def test_the_default_pool_is_the_papers_in_proportion():
    assert default_num_pages(16, 2048) == 984
    assert default_num_pages(16, 1024) == 492
    assert default_num_pages(4, 64) == 123


def test_what_cannot_hold_a_request_is_known_from_lengths_alone():
    workload = Workload(np.array([8, 20]), np.array([8, 10]), np.zeros(2))
    reasons = find_refusals(("paged", *CONTIGUOUS), workload, 1, CacheConfig(4, 10), LIMITS)
    assert set(reasons) == {"contiguous-pow2", "contiguous-max"}  # 20 + 16 of the 36 slots are a chunk of 64
    assert "64 tokens each" in reasons["contiguous-max"] and "36 tokens each" in reasons["contiguous-pow2"]
    with pytest.raises(ValueError, match="no system can run this workload: prompt of 8 tokens"):
        find_refusals(["contiguous-max"], workload, 1, CacheConfig(4, 10), LIMITS)
    with pytest.raises(ValueError, match="20 and 10 tokens exceeds max_model_len=29"):
        find_refusals(["paged"], workload, 1, CacheConfig(4, 10), {**LIMITS, "max_model_len": 29})


def test_a_staircase_falls_to_nothing_where_nothing_runs(results):
    class Stats:
        step_times = np.array([[0.0, 1.5, 5.0], [1.0, 2.0, 6.0]])
        steps_after_pauses = np.array([2])

    class Run:
        stats = Stats

    times, lines = timeline(Run, np.array([[3, 4, 5]]), idle=[0])
    assert times.tolist() == [0, 1.5, 1.5, 2, 2, 5, 5, 6, 6]
    assert lines.tolist() == [[3, 3, 4, 4, 0, 0, 5, 5, 0]]


def test_nothing_in_the_pictures_covers_anything_and_paging_has_its_colour(results):
    timed = [dataclasses.replace(one, rate=rate) for one in results.values() for rate in (1.0, 2.0)]
    drawn = {**pictures(list(results.values())), "latency": pictures(timed)["latency"]}
    for name, (size, paint) in drawn.items():
        figure = painted(size, paint)
        if name == "batch":
            assert figure.axes[0].lines[0].get_color() == SYSTEMS["paged"].colour
        if name == "memory":
            words = [text.get_text() for text in figure.legends[0].get_texts()]
            assert words == [look.word for look in PARTS.values()]


def test_the_command_prints_a_table_writes_json_and_draws(directory, tmp_path, capfd):
    arguments = ("--workload", "fixed:16:8", "--requests", 4, "--rates", "50,200", "--num-pages", 33, *SIZES)
    systems = "paged,contiguous-max"
    assert compare(directory, "--systems", systems, *arguments, "--plot", tmp_path / "plots", "--json", "-") == 0
    out = capfd.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert [(one["system"], one["rate"]) for one in document["results"]] == [
        ("paged", 50), ("paged", 200), ("contiguous-max", 50), ("contiguous-max", 200),
    ]  # fmt: skip
    assert document["requests_with_equal_tokens"] == 4 and document["not_run"] == {}
    assert all(one["compilations"] == 0 for one in document["results"])
    assert "50 requests a second" in out and "preemptions" in out and "same in all 4 runs" in out
    names = [f"{kind}-{rate}.png" for kind in ("batch", "memory", "throughput") for rate in (50, 200)]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted([*names, "latency.png"])
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "plots").iterdir())


@pytest.mark.slow
def test_a_system_that_cannot_run_is_named_beside_those_that_ran(directory, tmp_path, capfd):
    (tmp_path / "lengths.jsonl").write_text('{"prompt_len": 8, "output_len": 4, "arrival": 0.01}\n' * 3)
    arguments = ("--workload", tmp_path / "lengths.jsonl", "--requests", 2, "--num-pages", 10, *SIZES)
    path = tmp_path / "figures.json"
    assert compare(directory, "--systems", "paged,contiguous-max", *arguments, "--json", path) == 0
    out = capfd.readouterr().out
    assert "arrivals of the file" in out and "contiguous-max did not run: prompt of 8 tokens" in out
    document = json.loads(path.read_text())
    assert document["requests"] == 2 and set(document["not_run"]) == {"contiguous-max"}
    assert [one["system"] for one in document["results"]] == ["paged"]


def test_a_system_that_fails_while_it_starts_is_named_and_the_others_run(directory, capfd):
    """The engine of the last one cannot be made; no lengths could have told."""

    class Failing(LLM):
        def rebuild(self, **options):
            super().rebuild(**options)
            if options["kv_cache"] == "contiguous-max":
                self._engines = []
                raise RuntimeError("RESOURCE_EXHAUSTED: out\nof memory")

    arguments = [str(directory), "--systems", "paged,contiguous-max", "--workload", "fixed:8:4", "--requests", "2"]
    sizes = [str(value) for value in (*SIZES, "--num-pages", 33)]
    assert main(["compare", *arguments, *sizes], make_llm=Failing) == 0
    assert "contiguous-max did not run: RESOURCE_EXHAUSTED: out of memory" in capfd.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--systems", "paged,contigous-max"], "unknown system 'contigous-max'; choose one of paged, "),
        (["--systems", "paged,paged"], "named once each"),
        (["--workload", "sharegp"], "unknown workload 'sharegp'"),
        (["--workload", "missing.jsonl"], "missing.jsonl: No such file"),
        (["--num-pages", "1"], "num_pages=1"),
        (["--num-pages", "3", "--workload", "fixed:40:20"], "no system can run this workload: paged: "),
        (["--max-model-len", "9999"], "exceeds the 256 positions"),
        (["--rate", "0"], "above 0 requests a second"),
        (["--rates", "1,x"], "rates (1,2,4)"),
        (["--rate", "1", "--rates", "1,2"], "not allowed with"),
        (["--requests", "0"], "at least 1"),
        (["--n", "2", "--beam-width", "2"], "--n"),
        (["--json", "missing/file.json"], "cannot be written"),
        (["--kv-cache", "paged"], "--kv-cache"),
        (["--plot", "lengths"], "lengths is not a directory"),
        (["--max-num-seqs", "0"], "max_num_seqs"),
    ],
)  # fmt: skip
def test_what_is_known_to_be_impossible_is_one_line_before_any_work(
    directory, arguments, message, capfd, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lengths").touch()

    def load(**options):
        raise AssertionError("the model was loaded")

    assert main(["compare", str(directory), *arguments], make_llm=load) == 2
    assert message in error_line(capfd)


def test_pictures_without_matplotlib_are_refused_before_any_work(directory, capfd, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["compare", str(directory), "--plot", "plots"], make_llm=lambda **_: pytest.fail("loaded")) == 2
    assert "pip install 'jaxpaged[plots]'" in error_line(capfd)


def test_a_mistyped_system_waits_for_neither_jax_nor_matplotlib(directory):
    script = (
        "import sys; from jaxpaged.cli.main import main; "
        f"code = main(['compare', {str(directory)!r}, '--systems', 'x']); "
        "sys.exit(code != 2 or bool({'jax', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0


def test_every_system_that_llm_knows_is_listed(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    assert ", ".join(KV_CACHES) in " ".join(capsys.readouterr().out.split())
