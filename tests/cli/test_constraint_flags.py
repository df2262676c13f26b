"""`--trie`, `--regex`, `--json-schema` and `--grammar`, and the same in batch files."""

from __future__ import annotations

import json

import pytest
from fake_llm import FakeLLM
from toy import save_toy_checkpoint

from jaxpaged.batch.parse import parse_batch
from jaxpaged.batch.requests import BatchContext
from jaxpaged.cli.main import main
from jaxpaged.constraints import JsonSchema, Regex, TrieFile

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_toy_checkpoint(tmp_path_factory.mktemp("model") / "toy"))


@pytest.fixture
def items(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text('"abc"\n"abd"\n"xyz"\n')
    return str(path)


def run(arguments, capfd, make_llm=None):
    code = main(arguments) if make_llm is None else main(arguments, make_llm=make_llm)
    captured = capfd.readouterr()
    return code, captured.out, captured.err


SMALL = ["--page-size=4", "--num-pages=64", "--max-num-seqs=8", "--max-model-len=64", "--max-num-batched-tokens=64"]


def test_beams_in_a_file_of_items_are_shown_and_no_others(model, items, capfd):
    code, out, _ = run(["beams", model, "--prompt=a", "--beam-width=8", f"--trie={items}", *SMALL], capfd)
    assert code == 0
    assert sorted(text for text in ("'abc'", "'abd'", "'xyz'") if text in out) == ["'abc'", "'abd'", "'xyz'"]
    assert out.count(" stop ") == 3 and " length " not in out


@pytest.mark.slow
def test_generate_with_a_pattern(model, capfd):
    options = ["--temperature=0", "--max-tokens=8", "--regex=[ab]{3}"]
    code, out, _ = run(["generate", model, "--prompt=a", *options, *SMALL], capfd)
    row = json.loads(out)
    assert code == 0 and len(row["outputs"][0]["text"]) == 3 and set(row["outputs"][0]["text"]) <= set("ab")


REFUSED = [
    (["--regex=("], "--regex: constraint: llguidance cannot follow this regex"),
    (["--trie=/no/such"], "--trie: /no/such is no file"),
    (["--json-schema=/no/such"], "--json-schema: /no/such: No such file"),
    (["--grammar=/no/such"], "--grammar: /no/such: No such file"),
    (["--regex=a", "--trie=b"], "--trie and --regex both say"),
]


@pytest.mark.parametrize("command", ["generate", "beams", "warm-up"])
@pytest.mark.parametrize("flags, message", REFUSED)
def test_what_cannot_be_is_refused_before_the_model_is_loaded(model, capfd, command, flags, message):
    def no_llm(**options):
        raise AssertionError("the model was loaded")

    prompt = [] if command == "warm-up" else ["--prompt=a"]
    code, _, error = run([command, model, *prompt, *flags], capfd, no_llm)
    assert code == 2 and message in error and error.count("\n") == 1


def test_an_output_that_would_destroy_the_items_is_refused(model, items, capfd):
    code, _, error = run(["generate", model, "--prompt=a", f"--trie={items}", f"--output={items}"], capfd, FakeLLM)
    assert code == 2 and "is also the --trie" in error


def params_of(*lines):
    return [line.params[0] for line in parse_batch("\n".join(map(json.dumps, lines)).encode(), BatchContext())]


def test_lines_say_their_constraint():
    params = params_of(
        {"prompt": "a", "constraint": {"regex": "a+"}}, {"prompt": "a", "constraint": {"json_schema": SCHEMA}},
        {"prompt": "a", "constraint": {"trie": "items.jsonl"}, "beam_width": 2},
    )  # fmt: skip
    assert [one.constraint for one in params] == [Regex("a+"), JsonSchema(SCHEMA), TrieFile("items.jsonl")]


def openai_line(url, **body):
    body = {"messages": [{"role": "user", "content": "a"}], **body} if "chat" in url else {"prompt": "a", **body}
    return {"custom_id": "1", "method": "POST", "url": url, "body": body}


@pytest.mark.parametrize("url", ["/v1/completions", "/v1/chat/completions"])
def test_openai_lines_say_a_response_format(url):
    formats = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}
    (params,) = params_of(openai_line(url, response_format=formats))
    assert params.constraint == JsonSchema(SCHEMA)
    (params,) = params_of(openai_line(url, response_format={"type": "json_object"}))
    assert params.constraint == JsonSchema({"type": "object"})
    (params,) = params_of(openai_line(url, response_format={"type": "text"}))
    assert params.constraint is None


@pytest.mark.parametrize(
    "body, message",
    [
        ({"response_format": {"type": "xml"}}, "type is one of text, json_object, json_schema"),
        ({"response_format": 5}, "response_format must be an object"),
        ({"response_format": {"type": "json_schema"}}, "needs {\"json_schema\""),
        ({"response_format": {"type": "json_object"}, "constraint": {"regex": "a"}}, "both say"),
        ({"constraint": {"regex": 5}}, "regex must be text"),
    ],
)  # fmt: skip
def test_what_is_no_response_format_is_an_error_of_its_line(body, message):
    line = json.dumps(openai_line("/v1/completions", **body)).encode()
    (invalid,) = parse_batch(line, BatchContext())
    assert message in invalid.reason


def test_a_file_of_items_that_changes_makes_another_request(items):
    line = json.dumps({"prompt": "a", "constraint": {"trie": items}}).encode()
    (before,) = parse_batch(line, BatchContext())
    with open(items, "a") as file:
        file.write('"more"\n')
    (after,) = parse_batch(line, BatchContext())
    assert before.fingerprint != after.fingerprint
