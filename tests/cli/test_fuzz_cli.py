"""Whatever a flag is given, the command runs or says in one line why it cannot."""

from __future__ import annotations

import pytest
from fake_llm import FakeLLM

from jaxpaged.cli.flags import BEAM_FLAGS, MODEL_FLAGS, SAMPLING_FLAGS
from jaxpaged.cli.main import main
from jaxpaged.config import EngineOptions

HOSTILE = (
    "", " ", "x", "-1", "0", "1.5", "nan", "inf", "-inf", "1e400", "1e-400", "9" * 30, "9" * 5000, "none", "1,2,x",
    "1=x",
    "5=nan", "5=inf", "-1=1", "a\nb", "\udcff", "😀", "[1]", "true", "2147483648", "18446744073709551616",
)  # fmt: skip


#: The others are for test-slow.
QUICK = ("", "x", "-1", "nan", "1e400", "9" * 30, "a\nb", "\udcff")
values_of_a_flag = pytest.mark.parametrize(
    "values", [pytest.param(QUICK, id="quick"), pytest.param(HOSTILE, id="all", marks=pytest.mark.slow)]
)


class CheckedLLM(FakeLLM):
    """Takes only the options that the real one takes."""

    def __init__(self, model, seed=0, tokenizer=None, **options):
        EngineOptions(seed=seed, **options)
        super().__init__(model)

    def check_request(self, prompt, params, shared_prefix=None):
        if params.num_samples > 8 or params.max_tokens is None:
            raise ValueError(f"{params.num_samples} samples of {params.max_tokens} tokens are too many")
        super().check_request(prompt, params, shared_prefix)


WITH_VALUE = [f for f in (*SAMPLING_FLAGS, *BEAM_FLAGS, *MODEL_FLAGS) if not isinstance(f.read, bool)]
COMPARE = ("systems", "workload", "requests", "rate", "rates", "n", "beam-width", "seed", "json")
PICTURES = ("delay", "seed", "beam-width", "plot", "html", "json", "max-tokens", "example", "prompt")


def outcome(arguments, capfd) -> tuple[int, str]:
    code = main(arguments, make_llm=CheckedLLM)
    error = capfd.readouterr().err
    if code == 2:
        assert error.startswith("jaxpaged: ") and error.count("\n") == 1, (arguments, error)
    return code, error


@values_of_a_flag
@pytest.mark.parametrize(
    "flag", [f for f in (*SAMPLING_FLAGS, *BEAM_FLAGS, *MODEL_FLAGS) if not isinstance(f.read, bool)],
    ids=lambda flag: flag.name,
)  # fmt: skip
def test_any_value_of_a_flag_runs_or_is_one_line(flag, values, model, capfd):
    option = "--" + flag.name.replace("_", "-")
    codes = set()
    for value in values:
        codes.add(outcome(["generate", model, "--prompt", "a", f"{option}={value}"], capfd)[0])
    assert codes <= {0, 2} and (2 in codes or flag.read is str)


@pytest.mark.parametrize(
    "option", ["--seed", "--shared-prefix", "--format", "--output", "--account", "--input", "--prompt", "--overwrite"]
)
def test_any_value_of_the_other_options_runs_or_is_one_line(option, model, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").write_text("a\n")
    source = [] if option in ("--input", "--prompt") else ["--input", "in"]
    values = [v for v in (*HOSTILE, "a\0b", "x" * 5000, "missing/x", ".") if option != "--account" or ".csv" in v]
    codes = {outcome(["generate", model, *source, f"{option}={value}"], capfd)[0] for value in values}
    assert codes <= {0, 1, 2}  # 1: behind a long prefix a prompt is too long


@pytest.mark.parametrize("value", ["-1", str(2**64), "9" * 4000])
def test_a_seed_beyond_64_bits_is_refused_before_the_model_is_loaded(value, model, capfd):
    arguments = ["generate", model, "--prompt", "a", f"--seed={value}"]
    assert main(arguments, make_llm=None) == 2
    assert "seed must be at least 0 and below 2**64, got" in capfd.readouterr().err


def test_a_token_that_is_biased_twice_is_refused(model, capfd):
    code, error = outcome(["generate", model, "--prompt", "a", "--logit-bias=5=1", "--logit-bias=5=2"], capfd)
    assert code == 2 and "--logit-bias names a token id twice" in error


SIMULATE = ("workload", "requests", "seed", "rate", "step-ms", "n", "beam-width", "kv-cache", "num-pages", "page-size",
            "max-model-len", "max-num-seqs", "max-num-batched-tokens", "watermark", "preemption")  # fmt: skip


@values_of_a_flag
@pytest.mark.parametrize("option", SIMULATE)
def test_any_value_of_a_simulation_runs_or_is_one_line(option, values, capfd):
    small = ["simulate", "--workload=fixed:4:4", "--requests=2", "--kv-cache=paged"]
    codes = {outcome([*small, f"--{option}={value}"], capfd)[0] for value in values}
    assert codes <= {0, 2} and 2 in codes


@values_of_a_flag
@pytest.mark.parametrize(
    "option", ["systems", "workload", "requests", "rate", "rates", "n", "beam-width", "seed", "json"]
)
def test_any_value_of_a_comparison_is_one_line(option, values, model, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in values:
        assert outcome(["compare", model, f"--{option}={value}"], capfd)[0] == 2  # the directory holds no model


@values_of_a_flag
@pytest.mark.parametrize("command", ["beams", "trace"])
@pytest.mark.parametrize(
    "option", ["delay", "seed", "beam-width", "plot", "html", "json", "max-tokens", "example", "prompt"]
)
def test_any_value_of_a_picture_is_one_line(command, option, values, model, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def no_model(**_options):
        raise ValueError("no model")

    for value in values:
        outputs = ["--html=x.html"] if command == "trace" and option != "html" else []
        code = main([command, model, "--prompt=a", *outputs, f"--{option}={value}"], make_llm=no_model)
        error = capfd.readouterr().err
        assert code == 2 and error.count("\n") == 1, (value, error)


@pytest.mark.parametrize("command", ["info", "convert"])
def test_any_path_is_one_line(command, model, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in (*(v for v in HOSTILE if not v.startswith("-")), "a\0b", "x" * 5000):
        assert outcome([command, value, *(["out"] if command == "convert" else [])], capfd)[0] == 2
