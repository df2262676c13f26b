"""The command: what it prints where, its exit codes, and one line for every kind of bad usage."""

import json
import os
import subprocess
import sys

import pytest
from fake_llm import FakeLLM
from paths import GOLDENS, ROOT

import jaxpaged
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.cli import main as cli
from jaxpaged.cli.flags import MODEL_FLAGS, SAMPLING_FLAGS
from jaxpaged.cli.main import main
from jaxpaged.config.options import engine_options

FAKE_COMMAND = [sys.executable, str(ROOT / "tests" / "fake_llm.py")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def run(*arguments):
    return main([str(argument) for argument in arguments], make_llm=FakeLLM)


def rows_of(text):
    return [json.loads(line) for line in text.splitlines()]


def error_line(capfd):
    """Standard error, which must be one line."""
    message = capfd.readouterr().err
    assert message.count("\n") == 1 and message.startswith("jaxpaged: ")
    return message


def test_prompts_give_json_lines_on_standard_output(model, capfd):
    assert run("generate", model, "--prompt", "a", "--prompt", "b", "--n", 2, "--max-tokens", 3) == 0
    rows = {row["index"]: row for row in rows_of(capfd.readouterr().out)}
    assert (rows[0]["prompt"], rows[1]["prompt"]) == ("a", "b")
    assert [sample["index"] for sample in rows[0]["outputs"]] == [0, 1]
    assert set(rows[0]) == {"id", "index", "prompt", "num_prompt_tokens", "outputs", "seed", "fingerprint"}
    assert set(rows[0]["outputs"][0]) == {"index", "text", "token_ids", "finish_reason", "stop_reason"}


def test_log_probabilities_come_where_they_are_asked_for(model, capfd):
    assert run("generate", model, "--prompt", "ab", "--logprobs", 1, "--prompt-logprobs", 1, "--max-tokens", 1) == 0
    (row,) = rows_of(capfd.readouterr().out)
    (sample,) = row["outputs"]
    assert sample["cumulative_logprob"] == -0.5
    assert sample["logprobs"][0][1] == {"token_id": 33, "token": "!", "logprob": -0.1, "rank": 1}
    assert row["prompt_logprobs"][0] is None and len(row["prompt_logprobs"]) == 2


def test_a_prompt_on_a_terminal_is_answered_in_plain_text(model, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert run("generate", model, "--prompt", "a", "--n", 2, "--max-tokens", 3) == 0
    lines = capsys.readouterr().out.split("\n")
    assert lines[0] == "> a" and lines[1].startswith("[1] ")


def test_standard_input_is_an_input(model):
    done = subprocess.run(
        [*FAKE_COMMAND, "generate", model, "--input", "-"],
        input=b"a\nb\n",
        capture_output=True,
        env=ENVIRONMENT,
        check=True,
    )
    assert sorted(row["prompt"] for row in rows_of(done.stdout)) == ["a", "b"]
    assert done.stderr.startswith(b"jaxpaged: 2 rows, 0 failed; ")  # no bar in a pipe, but a line at the end
    assert done.stderr.count(b"\n") == 1


def test_an_empty_input_is_a_finished_run(model, tmp_path, capfd):
    (tmp_path / "in").write_text("\n")
    assert run("generate", model, "--input", tmp_path / "in", "--output", tmp_path / "out") == 0
    assert (tmp_path / "out").read_bytes() == b""
    assert "has no prompts" in error_line(capfd)


def test_a_bad_line_is_reported_with_its_number_and_the_others_run(model, tmp_path, capfd):
    (tmp_path / "in").write_text('{"prompt": "a"}\n{"prompt": 5}\n{"prompt": "b"}\n')
    assert run("generate", model, "--input", tmp_path / "in") == 1
    captured = capfd.readouterr()
    rows = {row["index"]: row for row in rows_of(captured.out)}
    assert len(rows) == 3 and "outputs" in rows[0] and "outputs" in rows[2]
    assert rows[1]["line"] == 2
    assert rows[1]["error"]["message"] == "line 2: prompt must be a string or a list of token ids, got 5"
    summary, failed = captured.err.splitlines()
    assert summary.startswith("jaxpaged: 3 rows, 1 failed; ")
    assert failed == "jaxpaged: 1 of 3 lines failed: 2; the reasons are on standard output"


def test_a_shared_prefix_comes_before_every_line_and_decides_its_result(model, tmp_path, capfd):
    (tmp_path / "in").write_text("b\nc\n" + "x" * 199 + "\n")
    arguments = ["generate", model, "--input", tmp_path / "in", "--output", tmp_path / "out"]
    assert run(*arguments, "--shared-prefix", "a ") == 1  # 2 + 199 tokens are too many
    rows = {row["index"]: row for row in rows_of((tmp_path / "out").read_text())}
    assert (rows[0]["prompt"], rows[1]["prompt"], rows[1]["num_prompt_tokens"]) == ("a b", "a c", 3)
    assert "201 tokens" in rows[2]["error"]["message"]
    assert run("generate", model, "--prompt", "a b") == 0
    (whole,) = rows_of(capfd.readouterr().out)
    assert whole["outputs"][0]["token_ids"] == rows[0]["outputs"][0]["token_ids"]
    before = (tmp_path / "out").read_bytes()
    assert run(*arguments, "--shared-prefix", "a ") == 1
    assert (tmp_path / "out").read_bytes() == before  # an earlier run's results are known again
    capfd.readouterr()
    assert run(*arguments, "--shared-prefix", "another ") == 2
    assert "--overwrite" in error_line(capfd)


@pytest.mark.parametrize(
    "arguments, named",
    [
        ([], "COMMAND"),
        (["serve"], "'serve'"),
        (["generate"], "MODEL"),
        (["generate", "MODEL"], "--prompt --input"),
        (["generate", "MODEL", "--prompt", "a", "--input", "b"], "--input"),
        (["generate", "MODEL", "--prompt", "a", "--shared-prefix", ""], "--shared-prefix: the text is empty"),
        (["generate", "MODEL", "--prompt", "a", "--tempature", "1"], "--tempature"),
        (["generate", "MODEL", "--prompt", "a", "--temp", "1"], "--temp"),
        (["generate", "MODEL", "--prompt", "a", "--n", "x"], "--n"),
        (["generate", "MODEL", "--prompt", "a", "--n", "0"], "n must be at least 1"),
        (["generate", "MODEL", "--prompt", "a", "--n", "2", "--temperature", "0"], "set temperature above 0"),
        (["generate", "MODEL", "--prompt", "a", "--logit-bias", "5"], "token=number"),
        (["generate", "MODEL", "--prompt", "a", "--stop-token-ids", "1,x"], "1,2,3"),
        (["generate", "MODEL", "--prompt", "x" * 500], "prompt 1: prompt of 500 tokens"),
        (["generate", "MODEL", "--prompt", "a\udcff"], "not Unicode text"),
        (["generate", "missing", "--prompt", "a"], "missing does not exist: give the directory of a checkpoint"),
        (["generate", "MODEL", "--prompt", "a", "--tokenizer", "missing"], "missing does not exist"),
        (["generate", "MODEL", "--input", "missing"], "cannot read the input: missing: No such file"),
        (["generate", "MODEL", "--input", "MODEL"], "Is a directory"),
        (["generate", "MODEL", "--input", "UTF16"], "save it as UTF-8"),
        (["generate", "MODEL", "--prompt", "a", "--output", "MODEL"], "is a directory: name a file in it"),
        (["generate", "MODEL", "--prompt", "a", "--output", "missing/out"], "missing is not a directory: create it"),
        (["generate", "MODEL", "--input", "LINES", "--output", "LINES"], "is also the input"),
        (["generate", "MODEL", "--prompt", "a", "--no-such"], "--no-such"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(arguments, named, model, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "LINES").write_text("a\n")
    (tmp_path / "UTF16").write_text("a\n", encoding="utf-16")
    assert run(*[model if argument == "MODEL" else argument for argument in arguments]) == 2
    assert named in error_line(capfd)
    assert (tmp_path / "LINES").read_text() == "a\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_without_permission_is_bad_usage(model, tmp_path, capfd):
    (tmp_path / "out").touch(mode=0o400)
    assert run("generate", model, "--prompt", "a", "--output", tmp_path / "out") == 2
    assert "Permission denied" in error_line(capfd)


@pytest.mark.parametrize(
    "error", [ValueError("num_pages=1:\nraise it"), FileNotFoundError("no config.json"), RuntimeError("no memory")]
)
def test_a_model_that_cannot_load_is_one_line(error, model, capfd):
    def make_llm(**_options):
        raise error

    assert main(["generate", model, "--prompt", "a"], make_llm=make_llm) == 2
    assert error_line(capfd) == f"jaxpaged: {str(error).replace(chr(10), ' ')}\n"


def test_a_full_disk_ends_the_run_with_one_line(model, capfd):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    assert run("generate", model, "--prompt", "a", "--output", "/dev/full") == 1
    assert "cannot write the output: No space left on device" in error_line(capfd)


def test_a_reader_that_goes_away_ends_the_run_quietly(model, tmp_path):
    (tmp_path / "in").write_text("prompt\n" * 2000)
    command = subprocess.Popen(
        [*FAKE_COMMAND, "generate", model, "--input", str(tmp_path / "in")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT,
    )  # fmt: skip
    assert command.stdout.readline().startswith(b'{"id": ')
    command.stdout.close()
    assert command.stderr.read() == b""
    command.stderr.close()
    assert command.wait() == cli.READER_GONE


def test_info_for_a_reader_that_went_away_is_no_error_of_its_input():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "jaxpaged", "info", str(ROOT / "checkpoints" / "tiny-python")]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (cli.READER_GONE, b"")


def test_every_sampling_parameter_and_llm_argument_is_a_flag():
    from inspect import signature

    fields = set(signature(SamplingParams).parameters)
    assert {flag.name for flag in SAMPLING_FLAGS} == fields - {"seed", "logits_processors", "constraint"}
    arguments = set(signature(jaxpaged.LLM).parameters)
    assert {flag.name for flag in MODEL_FLAGS} == arguments - {"model", "seed", "mesh"}


def test_the_flags_of_the_model_have_the_types_choices_and_defaults_of_the_options():
    flags = {flag.name: flag for flag in MODEL_FLAGS}
    for option in (option for option in engine_options() if option.name != "seed"):
        flag = flags[option.name]
        assert flag.read == (not option.default if option.kind is bool else option.kind)
        helps = {True: option.help, False: f"do not {option.help}"}
        assert (flag.choices, flag.help) == (option.choices, helps.get(flag.read, option.help_text))
    assert (flags["page_size"].read, flags["watermark"].read, flags["num_pages"].read) == (int, float, int)


def test_an_unknown_choice_is_refused_before_the_model_is_loaded(model, capfd):
    assert main(["generate", model, "--prompt", "a", "--kv-cache", "buddy"], make_llm=None) == 2
    error = capfd.readouterr().err
    assert "--kv-cache: invalid choice: 'buddy' (choose from" in error and "contiguous-max" in error
    assert main(["generate", model, "--prompt", "a", "--kv-cache", "dense-slots"], make_llm=None) == 2
    assert "--kv-cache: 'dense-slots' is called 'dense' now" in capfd.readouterr().err


@pytest.mark.parametrize("flag", ["--shared-prefixes", "--shared-prefixes=1"])
def test_a_flag_of_before_is_answered_with_its_name_of_today(model, capfd, flag):
    assert main(["generate", model, "--prompt", "a", flag], make_llm=None) == 2
    said = "jaxpaged: --shared-prefixes is called --cascade-attention now (see jaxpaged generate --help)\n"
    assert capfd.readouterr().err == said


def test_flags_reach_the_parameters_and_the_model(model, capfd):
    seen = {}

    class Recording(FakeLLM):
        def __init__(self, **options):
            seen["options"] = options
            super().__init__(**options)

        def generate_iter(self, prompts, sampling_params, request_ids=None, shared_prefix=None):
            seen["params"] = sampling_params[0]
            return super().generate_iter(prompts, sampling_params, request_ids, shared_prefix)

    flags = "--stop x --stop y --stop-token-ids 1,2 --logit-bias 5=-2.5 --logit-bias 6=1 --ignore-eos --no-detokenize"
    arguments = [
        "generate",
        model,
        "--prompt",
        "a",
        *flags.split(),
        "--max-tokens",
        "7",
        "--page-size",
        "8",
        "--seed",
        "3",
    ]
    assert main(arguments, make_llm=Recording) == 2  # stop strings need the text
    arguments.remove("--no-detokenize")
    assert main([*arguments, "--keep-special-tokens"], make_llm=Recording) == 0
    params = seen["params"]
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (["x", "y"], [1, 2], {5: -2.5, 6: 1.0})
    assert (params.ignore_eos, params.skip_special_tokens, params.max_tokens) == (True, False, 7)
    assert seen["options"] == {"model": model, "seed": 3, "page_size": 8}


def test_max_tokens_none_is_up_to_the_models_length(model):
    seen = []

    class Recording(FakeLLM):
        def check_request(self, prompt, params, shared_prefix=None):
            seen.append(params.max_tokens)
            raise ValueError("seen enough")

    assert main(["generate", model, "--prompt", "a", "--max-tokens", "none"], make_llm=Recording) == 2
    assert seen == [None]


@pytest.fixture
def tiny():
    """A real checkpoint, without a tokenizer."""
    return GOLDENS / "llama_tied"


def test_the_real_model_fills_up_a_batch_that_was_cut_off(tiny, tmp_path, capfd):
    lines = [
        '{"prompt": [5, 6, 7], "n": 2}',
        '{"prompt": "text"}',
        '{"prompt": [9, 128]}',
        '{"prompt": [3], "max_tokens": 4}',
    ]
    (tmp_path / "in").write_text("\n".join(lines))
    arguments = ["generate", str(tiny), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert main(arguments) == 1
    rows = (tmp_path / "out").read_bytes().splitlines(keepends=True)
    errors = {row["line"]: row["error"]["message"] for row in map(json.loads, rows) if "error" in row}
    assert set(errors) == {2, 3}
    assert "tokenizer" in errors[2] and "token id 128" in errors[3]
    (tmp_path / "out").write_bytes(b"".join(rows[:-1]) + rows[-1][:20])
    assert main(arguments) == 1
    assert sorted((tmp_path / "out").read_bytes().splitlines(keepends=True)) == sorted(rows)


def test_an_empty_model_directory_is_bad_usage(tmp_path, capfd):
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert "no config.json" in error_line(capfd)


def test_a_checkpoint_is_described_and_converted(tiny, tmp_path, capfd):
    assert main(["info", str(tiny)]) == 0
    assert "huggingface" in capfd.readouterr().out
    assert main(["convert", str(tiny), str(tmp_path / "native")]) == 0
    assert main(["info", str(tmp_path / "native")]) == 0
    assert "native" in capfd.readouterr().out


@pytest.mark.parametrize("command", [["info", "missing"], ["convert", "missing", "new"], ["convert", "TINY", "."]])
def test_what_cannot_be_described_or_converted_is_one_line(command, tiny, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main([str(tiny) if argument == "TINY" else argument for argument in command]) == 2
    assert ("missing does not exist" if "missing" in command else "not an empty directory") in error_line(capfd)


def test_version_and_help(capsys):
    for arguments, expected in (
        (["--version"], f"jaxpaged {jaxpaged.__version__}"),
        (["generate", "--help"], "custom_id"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            main(arguments)
        assert exit_info.value.code == 0 and expected in capsys.readouterr().out


@pytest.mark.parametrize("argument", ["--help", "--version", "--nonsense"])
def test_what_needs_no_command_imports_none(argument):
    script = (
        f"import sys; sys.argv = ['jaxpaged', {argument!r}]\n"
        "from jaxpaged.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'jax', 'numpy', 'rich', 'matplotlib', 'logging'} & set(sys.modules)\n"
        "rooms = {name for name in sys.modules if name.startswith('jaxpaged.')}\n"
        "print(*heavy, *sorted(rooms))"
    )
    ran = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    own = "jaxpaged.__main__ jaxpaged.cli jaxpaged.cli.errors jaxpaged.cli.interrupts jaxpaged.cli.main"
    assert ran.stdout.splitlines()[-1] == own


def test_help_and_bad_usage_import_no_jax():
    script = "import sys; from jaxpaged.cli.main import main; main(['generate']); sys.exit('jax' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, check=False).returncode
        == 0
    )


def test_beams_come_with_their_scores(model, capfd):
    options = ("--beam-width", 3, "--n", 2, "--length-penalty", 0.5, "--early-stopping", "never", "--max-tokens", 4)
    assert run("generate", model, "--prompt", "a", *options) == 0
    (row,) = rows_of(capfd.readouterr().out)
    assert [(beam["score"], beam["cumulative_logprob"]) for beam in row["outputs"]] == [(-0.25, -0.5), (-1.25, -0.5)]


def test_a_file_may_mix_beams_and_samples_and_is_resumed(model, tmp_path, capfd):
    lines, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines.write_text('{"prompt": "a", "beam_width": 2}\n{"prompt": "b", "n": 3}\n{"prompt": "c", "top_p": 0.5}\n')
    options = ("--input", lines, "--output", output, "--length-penalty", 2, "--temperature", 0.5)
    assert run("generate", model, *options) == 0
    rows = {row["index"]: row for row in rows_of(output.read_text())}
    assert ["score" in rows[i]["outputs"][0] for i in range(3)] == [True, False, False]
    kept = output.read_text().splitlines()[0]
    output.write_text(kept + "\n" + '{"id": "torn')
    assert run("generate", model, *options) == 0
    assert {row["index"]: row for row in rows_of(output.read_text())} == rows
    capfd.readouterr()
    lines.write_text(lines.read_text().replace('"beam_width": 2', '"beam_width": 4'))
    assert run("generate", model, *options) == 2
    assert "the result of input line 1 does not stand: beam_width was 2, is 4" in error_line(capfd)


@pytest.mark.parametrize(
    "options, words",
    [
        (("--length-penalty", "2"), "--length-penalty is for beam search, and no prompt asks for one"),
        (("--beam-width", "2", "--top-p", "0.5"), "top_p is of no use to a beam search"),
        (("--beam-width", "2", "--temperature", "0.5"), "set do_sample=True"),
        (("--beam-width", "2", "--early-stopping", "maybe"), "invalid 'true', 'false' or 'never' value: 'maybe'"),
        (("--beam-width", "3", "--num-beam-groups", "2"), "make it a multiple"),
    ],
)
def test_beam_flags_that_cannot_be_meant_are_refused(model, capfd, options, words):
    assert run("generate", model, "--prompt", "a", *options) == 2
    assert words in error_line(capfd)


def test_warm_up_compiles_what_runs_with_these_flags_need_and_says_what_it_did(model, capfd):
    assert run("warm-up", model, "--top-p", 0.9, "--n", 2, "--page-size", 32) == 0
    assert FakeLLM.warmed_up == SamplingParams(top_p=0.9, n=2)
    assert capfd.readouterr().out == "9 programs in 1.5 s: 7 compiled, 2 read; 3.0 MB are kept in folder\n"
    assert run("warm-up", model, "--top-p", 9) == 2
    assert "top_p" in error_line(capfd)
