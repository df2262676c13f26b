"""From measured steps to a figure: step_times.py on a CPU, its replay, verdicts, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest
import rates as paper_rates
import reproduce as reproduce_paper
import step_times
from toy import TOY, save_toy_checkpoint, toy_engine
from validate import replay

from jaxpaged.checkpoint import open_checkpoint
from jaxpaged.device import steps
from jaxpaged.host.scheduler import StepPlan
from jaxpaged.host.step.batching import StepShape, make_batch
from jaxpaged.host.step.features import SamplingFeatures
from jaxpaged.study.step_table import StepTable

SIZES = ["--decode-rows", "1", "8", "--prefill-tokens", "64", "--num-pages", "40", "--steps", "2"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_toy_checkpoint(tmp_path_factory.mktemp("model") / "toy")


@pytest.fixture(scope="module")
def measured(directory, tmp_path_factory):
    """Every part, of a toy model."""
    path = tmp_path_factory.mktemp("times") / "toy.json"
    options = [*SIZES, "--page-sizes", "8", "--workload", "fixed:8:12", "--run-share", "0.1"]
    assert step_times.main([str(directory), "-o", str(path), *options]) == 0
    return path


def write_paper_table(path):
    """Times of OPT-13B's shape that nobody measured: 10 ms a decode step, whatever it does, 50 us a prefilled token."""
    points = [
        {"name": name, "step": "decode", "rows": rows, "tokens": 1000, "seconds": 0.01}
        for name in ("paged-8", "paged-16", "dense", "paged-16-samples", "paged-16-beams")
        for rows in (8, 64)
    ]
    points += [
        {"name": name, "step": "prefill", "rows": 1, "tokens": tokens, "seconds": tokens * 5e-5}
        for name in ("paged-16", "dense")
        for tokens in (64, 2560)
    ]
    shape = open_checkpoint(reproduce_paper.MODEL).config.to_dict()
    values = {"device": "none", "model": "opt-13b", "model_shape": shape, "points": points}
    limits = {"max_num_seqs": 256, "max_num_batched_tokens": 2560}
    path.write_text(json.dumps({**values, **limits, "copies": [[8, 0.0]], "swaps": [[8, 0.0, 0.0]]}))
    return path


@pytest.fixture
def paper_table(tmp_path):
    return write_paper_table(tmp_path / "paper.json")


def figures_of(capsys):
    """Of the file that the last line names."""
    path = Path(capsys.readouterr().out.splitlines()[-1].removeprefix("wrote "))
    figures = json.loads(path.read_text())["figures"]
    path.unlink()
    return figures


def rows_of(capsys, name):
    return {row["what"]: row for row in figures_of(capsys)[name]["rows"]}


def error_of(capfd, arguments) -> str:
    assert reproduce_paper.main(arguments) == 2
    message = capfd.readouterr().err
    assert message.count("\n") == 1 and message.startswith("reproduce.py: "), message
    return message


def test_every_part_was_measured(measured):
    table = StepTable.read(measured)
    assert table.facts["not_measured"] == {}
    assert table.names == ["paged-16", "dense", "paged-16-samples", "paged-16-beams", "paged-8"]
    assert all(0 < point["device_seconds"] and 0 < point["seconds"] for point in table.points)
    for rows in (1, 8):
        read = [p["tokens"] for p in table.points if (p["name"], p["step"], p["rows"]) == ("paged-16", "decode", rows)]
        assert len(set(read)) == 4 and rows < min(read) and max(read) <= rows * table.facts["max_model_len"]
    assert [pages for pages, _ in table.copies] == [8] and [pages for pages, *_ in table.swaps] == [1, 16]


def test_a_measured_run_is_replayed_step_by_step(measured):
    """That the times agree is for a device of one's own; that the steps do is not."""
    table = StepTable.read(measured)
    runs = {run["system"]: run for run in table.facts["runs"]}
    assert list(runs) == ["paged", "contiguous-oracle", "contiguous-max", "dense-static", "dense"]
    as_named_before = {**runs["dense"], "system": "dense-slots"}
    for run in (*runs.values(), as_named_before):
        result = replay(table, run)
        assert result["replayed_steps"] == run["steps"]
        assert 0 < result["replayed"] and run["compilations"] == 0


def test_validate_says_how_far_replays_are_off(measured, tmp_path, capsys):
    values = json.loads(measured.read_text())
    table = StepTable.read(measured)
    for run in values["runs"]:
        result = replay(table, run)
        run["seconds"], run["normalized_latency"] = result["replayed"], result["replayed_latency"]
    path = tmp_path / "exact.json"
    path.write_text(json.dumps(values))
    assert reproduce_paper.main(["validate", "--step-times", str(path)]) == 0
    assert "Replays agree with the runs: at most 0.0% off, held to 10%" in capsys.readouterr().out
    values["runs"][0]["seconds"] *= 2
    path.write_text(json.dumps(values))
    assert reproduce_paper.main(["validate", "--step-times", str(path)]) == 1
    assert figures_of(capsys)["validate"]["worst"] == pytest.approx(0.5)


def test_a_part_that_cannot_run_costs_the_others_nothing(directory, tmp_path, capsys):
    path = tmp_path / "times.json"
    options = [*SIZES, "--decode-rows", "8", "--parts", "paged", "page-sizes", "--page-sizes", "512"]
    assert step_times.main([str(directory), "-o", str(path), *options]) == 0
    assert "page-sizes: not measured: ValueError: 2 pages of 512 have no room for 8 rows" in capsys.readouterr().out
    table = StepTable.read(path)
    assert list(table.facts["not_measured"]) == ["page-sizes"] and table.names == ["paged-16"]


@pytest.mark.parametrize("deep", [16, 2])  # one program a decode step, and two
def test_programs_that_were_compiled_ahead_are_found(deep, monkeypatch, caplog):
    monkeypatch.setattr(steps, "DEEP", deep)
    monkeypatch.setattr(steps, "FIRST_SHARE", 0.5)
    engine, features = toy_engine(num_pages=23, async_scheduling=False), SamplingFeatures()
    params = jax.device_put(engine.params, engine.device)  # as a checkpoint's are
    engine.runner._parts = {False: steps.decode_parts(params, TOY, is_async=False)}
    shape = StepShape(3, engine.runner.buckets.table_widths[-1])  # like no other test's
    programs = engine.programs(shape, features)
    assert len(programs) == (2 if TOY.num_layers >= deep else 1)
    for program in programs:
        program.compile()
    batch = make_batch(StepPlan(is_prefill=False), shape, engine.cache_config, TOY.vocab_size, features)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        engine.runner.compile_step(batch, features)
    assert not [record for record in caplog.records if "XLA compilation of jit(decode" in record.getMessage()]


def test_what_cannot_be_measured_is_refused_before_anything_is(directory, tmp_path, capsys):
    for options, reason in (
        (["-o", str(tmp_path / "no" / "a.json")], "no such directory"),
        (["-o", "a.json", "--prefill-tokens", "1", "8"], "at least 2 tokens"),
    ):
        with pytest.raises(SystemExit) as error:
            step_times.main([str(directory), *options])
        assert error.value.code == 2 and reason in capsys.readouterr().err


def test_with_equal_steps_the_batching_figure_is_arithmetic_of_rows(paper_table, tmp_path, capsys):
    """All steps take the same here, so rates follow from numbers of steps."""
    arguments = ["batching", "--step-times", str(paper_table), "--seeds", "1", "--requests", "800"]
    assert reproduce_paper.main([*arguments, "--plot", str(tmp_path)]) == 0
    figure = figures_of(capsys)["batching"]
    assert (figure["replayed_on"], figure["beside"]) == ("none", "Anyscale")
    rows = {row["what"]: row for row in figure["rows"]}
    assert rows["cap 1536: paged / naive"]["held_to"]["range"] == "23 to 25.3"
    assert rows["cap 1536: static / naive"]["mean"] > 1.5
    assert rows["cap 1536: continuous / naive"]["mean"] > rows["cap 1536: static / naive"]["mean"]
    assert rows["cap 1536: paged / naive"]["mean"] > rows["cap 1536: continuous / naive"]["mean"]
    for cap in (32, 128, 512, 1536):
        assert rows[f"cap {cap}: continuous, share of that bound"]["mean"] < 1
    assert (tmp_path / "figure-batching.png").stat().st_size > 1000


def test_with_equal_steps_a_shared_prefix_is_worth_the_requests_that_fit_and_its_prefill(paper_table, capsys):
    arguments = ["16", "--step-times", str(paper_table), "--seeds", "1", "--requests", "450"]
    assert reproduce_paper.main(arguments) == 0
    rows = {what: row["mean"] for what, row in rows_of(capsys, "16").items()}
    for prefix_len in (80, 341):
        rates = [rows[f"prefix of {prefix_len}: {name}, requests/s"] for name in ("paged, shared", "Oracle")]
        assert rows[f"paged, shared / Oracle, prefix of {prefix_len}"] == pytest.approx(rates[0] / rates[1])
        assert rows[f"paged, shared / not shared, prefix of {prefix_len}"] > 1.2
    # Steps take the same whatever they read here, so how long the prefix is hardly matters to who shares it.
    short, long = (rows[f"prefix of {prefix_len}: paged, shared, requests/s"] for prefix_len in (80, 341))
    assert 0.9 < long / short < 1


def test_rates_rise_as_reservations_shrink(paper_table):
    table = StepTable.read(paper_table)
    systems = ("dense-static", "contiguous-max", "contiguous-pow2", "contiguous-oracle", "paged")
    rates = [paper_rates.capacity(table, system, "sharegpt", 300, seed=0) for system in systems]
    assert rates == sorted(rates)


@pytest.mark.slow
def test_latency_rises_with_the_rate_until_the_sweep_ends(paper_table):
    table = StepTable.read(paper_table)
    diverging = paper_rates.capacity(table, "contiguous-max", "sharegpt", 600, seed=0)
    curve = paper_rates.sweep(table, "contiguous-max", "sharegpt", 600, 0, diverging)
    latencies = [latency for _, latency in curve]
    assert latencies == sorted(latencies) and latencies[-2] <= 0.5 < latencies[-1]
    assert 0.01 < latencies[0] < 0.05  # steps of 10 ms, and prefill
    assert diverging / 2 < paper_rates.rate_at(curve, 0.2) < paper_rates.rate_at(curve, 0.5) < 2 * diverging


def test_a_rate_is_read_off_between_two_of_a_sweep():
    curve = [(1.0, 0.01), (2.0, 0.1), (3.0, 1.0)]
    assert paper_rates.rate_at(curve, 0.1) == pytest.approx(2.0)
    assert paper_rates.rate_at(curve, 10**-0.5) == pytest.approx(2.5)
    assert str(paper_rates.rate_at(curve, 0.001)) == "nan"


def test_what_is_missing_is_said_in_one_line(paper_table, measured, directory, tmp_path, capfd):
    assert "12 replays a device's step times: give --step-times" in error_of(capfd, ["12"])
    assert "No such file" in error_of(capfd, ["12", "--step-times", str(tmp_path / "none.json")])
    assert "another model: its family is" in error_of(capfd, ["batching", "--step-times", str(measured)])
    assert "have no runs" in error_of(capfd, ["validate", "--step-times", str(paper_table)])
    values = json.loads(paper_table.read_text())
    paper_table.write_text(json.dumps({**values, "swaps": []}))
    assert "step_times.py --parts moves" in error_of(capfd, ["14", "--step-times", str(paper_table)])
    paper_table.write_text(json.dumps({**values, "copies": []}))
    assert "figure 16 copies pages" in error_of(capfd, ["16", "--step-times", str(paper_table)])
    for arguments, reason in (
        (["1"], "invalid choice: '1'"),
        (["2", "--json", str(tmp_path)], "is a directory: name a file in it"),
        (["2", "--json", str(tmp_path / "no" / "a.json")], "no is not a directory"),
    ):
        with pytest.raises(SystemExit):
            reproduce_paper.main(arguments)
        assert reason in capfd.readouterr().err


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there it is measured")
@pytest.mark.parametrize("name", ["18a", "19"])
def test_what_needs_a_gpu_says_so(name, capfd):
    assert f"figure {name} needs a GPU that jax can use; this is cpu" in error_of(capfd, [name])
