"""Conversations in batch files: lines with messages, and OpenAI's lines for chat completions."""

import json

import pytest
from fake_llm import FakeLLM

from jaxpaged.batch import (
    BatchContext,
    BatchRequest,
    InvalidLine,
    check_requests,
    parse_batch,
    result_row,
    run_batch,
)

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]


def line(custom_id="a", **body):
    body = {"messages": MESSAGES, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def parse_one(given, context=None):
    (parsed,) = parse_batch(json.dumps(given).encode(), context or BatchContext())
    return parsed


def row_of(given):
    request = parse_one(given)
    assert isinstance(request, BatchRequest), request
    llm, rows = FakeLLM("model"), []
    accepted, refused = check_requests(llm, [request])
    assert not refused
    run_batch(llm, accepted, lambda r, outputs: rows.append(result_row(r, outputs, llm.tokenizer.decode)))
    return rows[0]


def test_a_plain_line_with_messages_gives_the_rendered_prompt_and_its_answer():
    row = row_of({"messages": MESSAGES, "id": "x", "max_tokens": 3, "seed": 5})
    assert list(row) == ["id", "index", "prompt", "num_prompt_tokens", "outputs", "seed", "fingerprint"]
    assert (row["id"], row["prompt"]) == ("x", "system: Be brief.\nuser: hi\n")
    assert len(row["outputs"][0]["token_ids"]) == 3


def test_a_chat_line_gets_openais_chat_completion():
    row = row_of(line(model="m", max_tokens=4, n=2, seed=3, user="u", stream=False, tool_choice="auto"))
    assert (row["custom_id"], row["error"], row["response"]["status_code"]) == ("a", None, 200)
    body = row["response"]["body"]
    assert list(body) == ["id", "object", "created", "model", "choices", "usage"]
    assert body["id"] == f"chatcmpl-{row['fingerprint']}"
    assert (body["object"], body["created"], body["model"]) == ("chat.completion", 0, "m")
    assert body["usage"] == {"prompt_tokens": 27, "completion_tokens": 8, "total_tokens": 35}
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    for choice in body["choices"]:
        assert list(choice) == ["index", "message", "logprobs", "finish_reason"]
        assert choice["message"]["role"] == "assistant" and len(choice["message"]["content"]) == 4
        assert choice["message"]["refusal"] is choice["logprobs"] is None
        assert choice["finish_reason"] == "length"


def test_logprobs_are_an_entry_a_token_with_its_bytes_and_the_likeliest():
    row = row_of(line(max_tokens=40, logprobs=True, top_logprobs=1, seed=2))
    (choice,) = row["response"]["body"]["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == 40 and choice["logprobs"]["refusal"] is None
    assert "".join(token["token"] for token in content) == choice["message"]["content"]
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == choice["message"]["content"]
    top = {"token": "!", "logprob": -0.1, "bytes": [33]}
    assert content[0] == {**content[0], "logprob": -0.25, "top_logprobs": [top]}  # the chosen one is the second


def test_logprobs_without_a_number_are_of_the_chosen_tokens_alone():
    row = row_of(line(max_tokens=2, logprobs=True))
    content = row["response"]["body"]["choices"][0]["logprobs"]["content"]
    assert [token["top_logprobs"] for token in content] == [[], []]


@pytest.mark.parametrize(
    "body, params, expected",
    [
        ({}, {}, None),
        ({}, {"max_tokens": 9}, 9),
        ({"max_tokens": 7}, {"max_tokens": 9}, 7),
        ({"max_completion_tokens": 7}, {"max_tokens": 9}, 7),
        ({"max_completion_tokens": 7, "max_tokens": 7}, {}, 7),
    ],
)
def test_an_answer_is_as_long_as_asked_for_or_as_the_model_allows(body, params, expected):
    request = parse_one(line(**body), BatchContext(params))
    assert request.params[0].max_tokens == expected


@pytest.mark.parametrize(
    "given, named",
    [
        (line(messages=None), "messages must be a list of objects with a role and a content, got None"),
        (line(messages=[{"role": "user"}]), "message 0 has no content"),
        (
            line(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
            "message 0: part 0 of its content is of type 'image_url': only \"text\" is possible",
        ),
        (line(prompt="a"), "unknown body key 'prompt'; known are model, messages"),
        (line(stream=True), "stream=True is not supported: leave it out, or say False"),
        (
            line(tool_choice="required"),
            "tool_choice='required' is not supported: leave it out, or say 'none' or 'auto'",
        ),
        (line(response_format={"type": "xml"}), "type is one of text, json_object, json_schema, got {'type': 'xml'}"),
        (line(modalities=["audio"]), "modalities=['audio'] is not supported"),
        (line(functions=[]), "unknown body key 'functions'"),
        (line(logprobs=3), "logprobs must be true or false, got 3: top_logprobs says how many"),
        (line(top_logprobs=3), "top_logprobs=3 needs logprobs to be true"),
        (line(logprobs=True, top_logprobs=21), "top_logprobs must be an integer from 0 to 20, got 21"),
        (line(max_tokens=3, max_completion_tokens=4), "max_tokens and max_completion_tokens differ"),
        (line(model=3), "model must be a string"),
        (line(temperature="hot"), "temperature must be a number"),
        (line(tools="f"), "tools must be a list, got 'f'"),
        (line(n=2, temperature=0), "temperature=0 gives the same tokens every time"),
        ({"messages": MESSAGES, "prompt": "a"}, "the line has prompt and messages"),
        ({"messages": "hi"}, "messages must be a list of objects"),
        ({"messages": MESSAGES, "add_special_tokens": False}, "the chat template writes those of messages"),
        ({"prompt": "a", "tools": []}, "tools goes with messages, and the line has prompt"),
    ],
)
def test_what_is_wrong_is_an_error_of_its_line(given, named):
    parsed = parse_one(given)
    assert isinstance(parsed, InvalidLine) and named in parsed.reason


def test_a_template_that_raises_is_an_error_of_its_line_alone():
    lines = [line("a", chat_template="none"), line("b", chat_template="fine")]
    requests = parse_batch("\n".join(map(json.dumps, lines)).encode(), BatchContext())
    accepted, refused = check_requests(FakeLLM("model"), requests)
    assert [request.id for request in accepted] == ["b"]
    assert [(request.id, why) for request, why in refused] == [("a", "the chat template says: none")]


def test_messages_tools_and_template_decide_a_result_and_the_template_of_the_command_only_theirs():
    def fingerprint(given, **context):
        return parse_one(given, BatchContext(**context)).fingerprint

    once = fingerprint(line())
    assert once == fingerprint(line())
    others = [
        fingerprint(line(messages=MESSAGES[1:])),
        fingerprint(line(tools=[{"type": "function"}])),
        fingerprint(line(), chat_template="x"),
        fingerprint(line(chat_template="y"), chat_template="x"),
    ]
    assert len({once, *others}) == 5
    assert fingerprint({"prompt": "a"}) == fingerprint({"prompt": "a"}, chat_template="x")
