"""OpenAI batch lines: what is taken, what is refused under which name, and the shape of the answer."""

import json

import pytest
from fake_llm import FakeLLM
from tokenizer_kinds import sentencepiece_model

from jaxpaged.api.outputs import CompletionOutput, KVUsage, RequestMetrics, RequestOutput
from jaxpaged.batch import (
    BatchContext,
    BatchRequest,
    InvalidLine,
    check_requests,
    error_row,
    parse_batch,
    result_row,
    run_batch,
)
from jaxpaged.requests.answer import make_logprobs
from jaxpaged.text.stream import decode_continuation
from jaxpaged.text.tokenizer import load_tokenizer


def line(body, custom_id="a", **changes):
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body, **changes}


def parse(*lines):
    return parse_batch("\n".join(map(json.dumps, lines)).encode(), BatchContext())


def answer(body):
    """The row of one line with this body."""
    (request,) = parse(line(body))
    assert isinstance(request, BatchRequest)
    llm, rows = FakeLLM("model"), []
    accepted, _ = check_requests(llm, [request])
    run_batch(llm, accepted, lambda r, outputs: rows.append(result_row(r, outputs, llm.tokenizer.decode)))
    return rows[0]


def test_a_row_has_the_fields_of_openais_batch_output():
    row = answer({"model": "some-model", "prompt": "hello", "max_tokens": 3, "n": 2, "seed": 1, "user": "u"})
    assert list(row)[:4] == ["id", "custom_id", "response", "error"]
    assert (row["custom_id"], row["error"], row["index"]) == ("a", None, 0)
    assert row["response"]["status_code"] == 200
    body = row["response"]["body"]
    assert (body["object"], body["model"]) == ("text_completion", "some-model")
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert set(body["choices"][0]) == {"index", "text", "logprobs", "finish_reason"}
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}


def test_the_same_line_gives_the_same_row_every_time():
    body = {"prompt": "hello", "temperature": 0.7}
    assert answer(body) == answer(body)


def test_a_list_of_prompts_gives_the_choices_of_each_in_order():
    body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 4, "seed": 3}
    choices = answer(body)["response"]["body"]["choices"]
    single = [answer({**body, "prompt": p})["response"]["body"]["choices"][s]["text"] for p in "ab" for s in (0, 1)]
    assert [choice["text"] for choice in choices] == single
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]


def test_token_ids_are_prompts_alone_and_in_a_list():
    assert parse(line({"prompt": [1, 2]}))[0].prompts == [[1, 2]]
    assert parse(line({"prompt": [[1, 2], [3]]}))[0].prompts == [[1, 2], [3]]


def test_prompts_of_one_line_without_a_seed_get_different_seeds():
    (request,) = parse(line({"prompt": ["a", "a"]}))
    assert request.params[0].seed != request.params[1].seed


def test_echo_puts_the_prompt_before_the_text_and_its_logprobs_before_theirs():
    plain = answer({"prompt": "hey", "max_tokens": 2})["response"]["body"]["choices"][0]
    assert plain["logprobs"] is None
    choice = answer({"prompt": "hey", "max_tokens": 2, "echo": True, "logprobs": 1})["response"]["body"]["choices"][0]
    assert choice["text"] == "hey" + plain["text"]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["token_logprobs"] == [None, -0.25, -0.25, -0.25, -0.25]
    assert logprobs["top_logprobs"][1] == {"e": -0.25, "!": -0.1}
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4]


def test_echo_of_token_ids_is_their_text():
    choice = answer({"prompt": [104, 105], "max_tokens": 1, "echo": True})["response"]["body"]["choices"][0]
    assert choice["text"].startswith("hi")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(sentencepiece_model(vocab_size=420, byte_fallback=True, model_type="bpe"))
    return load_tokenizer(path)


def choice_of(tokenizer, prompt, output_ids, num_text_tokens, **body):
    """The choice of a sample with these tokens, of which so many have a text; five candidates in each place."""
    prompt_ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    (request,) = parse(line({"prompt": prompt, "logprobs": 5, **body}))
    ids = [*prompt_ids, *output_ids]
    # The first bytes of characters complete none, so in a text they are all written alike.
    firsts = [3 + byte for byte in range(0xE1, 0xE6)]
    entries = [{i: (-0.5, 1), **{j: (-float(j), 2) for j in [j for j in firsts if j != i][:4]}} for i in ids]
    filed = make_logprobs(entries[1:], ids[:1], ids[1:], tokenizer)
    text = decode_continuation(tokenizer, prompt_ids, output_ids[:num_text_tokens])
    sample = CompletionOutput(0, text, output_ids, 0.0, filed[len(prompt_ids) - 1 :], "length", None)
    output = RequestOutput(
        "0", prompt if isinstance(prompt, str) else None, prompt_ids,
        [None, *filed[: len(prompt_ids) - 1]] if "echo" in body else None, [sample], True,
        RequestMetrics(0.0, 0.0, 0.0, 0.0), KVUsage(1, 1, 0, 0, 0, 0, 0),
    )  # fmt: skip
    (choice,) = result_row(request, [output], tokenizer.decode)["response"]["body"]["choices"]
    return choice


def check_logprobs(choice, num_tokens):
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert len(logprobs["tokens"]) == num_tokens
    starts = [sum(map(len, logprobs["tokens"][:i])) for i in range(num_tokens)]
    assert logprobs["text_offset"] == starts
    for token, value, top in zip(*(logprobs[k] for k in ("tokens", "token_logprobs", "top_logprobs")), strict=True):
        assert top is None or (len(top) == 5 and top[token] == value == -0.5)


def test_tokens_keep_their_spaces_and_join_to_the_text(tokenizer):
    ids = tokenizer.encode("the quick brown fox")
    choice = choice_of(tokenizer, "the quick", ids[len(tokenizer.encode("the quick")) :], None)
    assert choice["text"] == " brown fox" and choice["logprobs"]["tokens"][0].startswith(" ")
    check_logprobs(choice, len(choice["logprobs"]["tokens"]))
    echo = choice_of(tokenizer, "the quick", ids[len(tokenizer.encode("the quick")) :], None, echo=True)
    assert echo["text"] == "the quick brown fox" and echo["logprobs"]["tokens"][0] == ""  # <s>
    check_logprobs(echo, len(ids))


def test_candidates_whose_texts_are_equal_have_keys_of_their_own(tokenizer):
    ids = tokenizer.encode("the 😀က", add_special_tokens=False)
    choice = choice_of(tokenizer, "the", ids[1:], None)
    check_logprobs(choice, len(ids) - 1)
    first, *_, last = choice["logprobs"]["top_logprobs"][-3:]
    assert last == {"က": -0.5, **{f"token_id:{i}": -float(i) for i in range(228, 232)}}
    # The letter's first token, <0xE1>, is written as the others are: the key without a text is its own.
    assert first == {"": -0.5, **{f"token_id:{i}": -float(i) for i in range(229, 233)}}


def test_what_is_not_in_the_text_adds_nothing_to_it(tokenizer):
    ids = tokenizer.encode("the quick brown", add_special_tokens=False)
    choice = choice_of(tokenizer, "the", [*ids[1:], 2], -1)
    assert choice["text"] == " quick brown" and choice["logprobs"]["tokens"][-1] == ""
    assert choice["logprobs"]["text_offset"][-1] == len(" quick brown")
    check_logprobs(choice, len(ids))
    cut = choice_of(tokenizer, "the", ids[1:], -1)
    check_logprobs(cut, len(ids) - 1)


def test_an_echo_of_token_ids_has_no_half_characters(tokenizer):
    the, emoji = tokenizer.encode("the"), [3 + byte for byte in "😀".encode()]
    choice = choice_of(tokenizer, [*the, *emoji[:2]], emoji[2:], None, echo=True)
    assert choice["text"] == "the😀"
    check_logprobs(choice, len(the) + 4)


def test_null_means_the_default():
    (request,) = parse(line({"prompt": "a", "n": None, "temperature": None, "suffix": None, "stream": False}))
    assert (request.params[0].n, request.params[0].temperature) == (1, 1.0)


@pytest.mark.parametrize(
    "bad, named",
    [
        (line({"prompt": "a"}, url="/v1/embeddings"), "'/v1/embeddings' is not supported"),
        (line({"prompt": "a"}, url=["/v1/completions"]), "url ['/v1/completions'] is not supported"),
        (line({"prompt": "a"}, method="GET"), "method must be 'POST'"),
        (line({"prompt": "a"}, extra=1), "unknown key 'extra'"),
        (line("a"), "body must be an object"),
        (line({"prompt": "a"}, custom_id=3), "custom_id must be a string"),
        ({"custom_id": "a"}, "method must be"),
        (line({}), "prompt must be"),
        (line({"prompt": []}), "prompt is an empty list"),
        (line({"prompt": ["a", 1]}), "prompt must be"),
        (line({"prompt": "a", "stream": True}), "stream=True is not supported"),
        (line({"prompt": "a", "suffix": "b"}), "suffix='b' is not supported"),
        (line({"prompt": "a", "echo": "yes"}), "echo must be true or false"),
        (line({"prompt": "a", "messages": []}), "unknown body key 'messages'"),
        (line({"prompt": "a", "n": 3, "best_of": 2}), "raise best_of"),
        (line({"prompt": "a", "temperature": "hot"}), "temperature must be a number"),
        (line({"prompt": "a", "logprobs": True}), "logprobs must be an integer"),
    ],
)
def test_what_is_wrong_is_named(bad, named):
    (entry,) = parse(bad)
    assert isinstance(entry, InvalidLine) and named in entry.reason
    row = error_row(entry, entry.reason)
    assert row["response"] is None and named in row["error"]["message"] and row["line"] == 1


def test_the_later_of_two_equal_custom_ids_is_an_error_even_if_the_first_is_invalid_itself():
    first, second, third = parse(line({"prompt": "a"}), line({"prompt": "b"}), line({"prompt": "c"}, custom_id="c"))
    assert isinstance(first, BatchRequest) and isinstance(third, BatchRequest)
    assert isinstance(second, InvalidLine) and second.reason == "custom_id 'a' is already that of line 1"
    assert all(isinstance(entry, InvalidLine) for entry in parse(line({}), line({"prompt": "b"})))


def test_a_broken_line_is_reported_in_openais_form():
    (entry,) = parse_batch(b'{"custom_id": "a", "method": "POST", "body', BatchContext(), "jsonl")
    assert isinstance(entry, InvalidLine)
    row = error_row(entry, entry.reason)
    assert (row["custom_id"], row["response"], row["error"]["code"]) == (None, None, "invalid_request")
