"""`LLM.chat` and `LLM.stream`, and batch files with messages, on a model with a chat template."""

import json

import pytest
import tokenizers
from toy import char_tokenizer, save_toy_checkpoint

from jaxpaged import LLM, BeamSearchParams, SamplingParams
from jaxpaged.cli.main import main
from jaxpaged.requests.streamed_text import begun_stop

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}|{% endfor %}"
    "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}{% if loud %}!{% endif %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
HELLO = [{"role": "user", "content": "hello"}]
GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Its tokenizer puts <s> before a text, as its template does, too."""
    directory = save_toy_checkpoint(tmp_path_factory.mktemp("model") / "toy")
    tokenizer = char_tokenizer()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": TEMPLATE}))
    return directory


@pytest.fixture(scope="module")
def llm(model):
    return LLM(model, page_size=4, num_pages=200, max_num_seqs=16, max_model_len=64)


def test_a_conversation_is_its_rendered_text_with_one_first_token(llm):
    (output,) = llm.chat(HELLO, GREEDY)
    assert output.prompt == "<s>u:hello|a:"
    assert output.prompt_token_ids == [0, *(ord(c) - 30 for c in "u:hello|a:")]
    (same,) = llm.generate("<s>u:hello|a:", GREEDY, add_special_tokens=False)
    assert output.outputs[0].token_ids == same.outputs[0].token_ids


def test_conversations_are_answered_in_their_order_and_beside_other_prompts(llm):
    other = [*HELLO, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "go"}]
    outputs = llm.chat([other, HELLO], GREEDY)
    assert [output.prompt for output in outputs] == ["<s>u:hello|a:hi|u:go|a:", "<s>u:hello|a:"]
    mixed = llm.generate([[5, 6, 7], {"messages": HELLO}], [SamplingParams(max_tokens=2), GREEDY])
    assert mixed[1].outputs[0].token_ids == outputs[1].outputs[0].token_ids


def test_what_the_template_gets_besides_is_in_the_prompt(llm):
    def prompt(messages=HELLO, **given):
        return llm.chat(messages, SamplingParams(max_tokens=1), **given)[0].prompt

    assert prompt(tools=[{"name": "f"}]) == "<s>u:hello|[f]a:"
    assert prompt(chat_template_kwargs={"loud": True}) == "<s>u:hello|!a:"
    assert prompt(add_generation_prompt=False) == "<s>u:hello|"
    assert prompt(chat_template="{{ messages | length }} {{ eos_token }}") == "1 "
    open_end = [*HELLO, {"role": "assistant", "content": "su"}]
    assert prompt(open_end, continue_final_message=True) == "<s>u:hello|a:su"


def test_what_is_wrong_is_named_before_anything_runs(llm):
    bad = [{"role": "user"}]
    with pytest.raises(ValueError, match="^message 0 has no content"):
        llm.chat(bad, GREEDY)
    with pytest.raises(ValueError, match="^prompt 1: message 0 has no content"):
        llm.chat([HELLO, bad], GREEDY)
    with pytest.raises(ValueError, match="^the chat template says: no$"):
        llm.chat(HELLO, GREEDY, chat_template="{{ raise_exception('no') }}")
    with pytest.raises(ValueError, match="shared_prefix would come before the conversation begins"):
        llm.generate({"messages": HELLO}, GREEDY, shared_prefix="x")
    with pytest.raises(TypeError, match=r"'use_tqdm' \(here it is progress\)"):
        llm.chat(HELLO, GREEDY, use_tqdm=False)
    with llm.tree() as tree, pytest.raises(ValueError, match="messages are a prompt of generate and chat alone"):
        tree.open({"messages": HELLO})


def test_what_was_said_before_is_not_computed_again(llm):
    llm.reset_prefix_cache()
    (first,) = llm.chat(HELLO, GREEDY)
    said = [{"role": "assistant", "content": first.outputs[0].text}, {"role": "user", "content": "go"}]
    (second,) = llm.chat([*HELLO, *said], GREEDY)
    full_pages = (len(first.prompt_token_ids) + len(first.outputs[0].token_ids) - 1) // 4
    assert second.kv.cached_tokens == 4 * full_pages


def test_beams_answer_conversations_too(llm):
    (output,) = llm.chat(HELLO, BeamSearchParams(beam_width=2, max_tokens=4))
    assert output.prompt == "<s>u:hello|a:" and len(output.outputs) == 2


def streamed(llm, prompt, params):
    pieces, stream = [], llm.stream(prompt, params)
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


def test_pieces_of_a_stream_join_to_the_text_of_the_sample(llm):
    params = SamplingParams(temperature=0, max_tokens=12)
    (expected,) = llm.chat(HELLO, params)
    pieces, output = streamed(llm, {"messages": HELLO}, params)
    assert "".join(pieces) == expected.outputs[0].text == output.outputs[0].text
    assert len(pieces) >= 10 and output.outputs[0].finish_reason == "length"


def test_a_stream_gives_nothing_of_a_stop_string(llm):
    (whole,) = llm.chat(HELLO, SamplingParams(temperature=0, max_tokens=12))
    text = whole.outputs[0].text
    stop = text[4:7]
    for params in (
        SamplingParams(temperature=0, max_tokens=12, stop=[stop, "never"]),
        SamplingParams(temperature=0, max_tokens=12, stop=stop + "?"),  # begins and does not come
        SamplingParams(temperature=0, max_tokens=12, stop=stop, include_stop_str_in_output=True),
        SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[ord(text[5]) - 30]),
    ):
        pieces, output = streamed(llm, {"messages": HELLO}, params)
        assert "".join(pieces) == output.outputs[0].text
        assert llm.chat(HELLO, params)[0].outputs[0].text == output.outputs[0].text


@pytest.mark.parametrize(
    "text, stops, length", [("abc", ("cd", "bcd"), 2), ("abc", ("abc",), 3), ("abc", ("x",), 0), ("", ("a",), 0)]
)
def test_what_may_become_a_stop_string_waits(text, stops, length):
    assert begun_stop(text, stops) == length


def test_a_stream_that_is_left_early_gives_the_pool_back(llm):
    for _ in llm.stream("hello", SamplingParams(max_tokens=20)):
        break
    assert llm.generate("hello", GREEDY)[0].outputs[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    "params, said",
    [
        (SamplingParams(n=2), "the request asks for 2 samples"),
        (SamplingParams(detokenize=False), "the request has detokenize=False"),
        (BeamSearchParams(beam_width=2), "stream takes one SamplingParams"),
    ],
)
def test_a_stream_is_of_one_text(llm, params, said):
    with pytest.raises(ValueError, match=said):
        llm.stream("hello", params)


# Files


@pytest.fixture
def batch(model, llm, tmp_path):
    """Exit code and rows of these lines."""

    def batch(*lines, flags=(), output="out.jsonl"):
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        argv = ["generate", str(model), "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / output)]
        code = main([*argv, "--max-tokens", "4", "--temperature", "0", *flags], make_llm=lambda **_: llm)
        rows = [json.loads(row) for row in (tmp_path / output).read_text().splitlines()]
        return code, sorted(rows, key=lambda row: row["index"])

    return batch


def test_a_file_mixes_prompts_and_conversations_and_a_template_that_raises_fails_its_line(llm, batch):
    body = {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions"}
    code, rows = batch(
        {"prompt": "hello"},
        {"messages": HELLO},
        {**body, "body": {"messages": HELLO, "logprobs": True, "top_logprobs": 2}},
        {"messages": HELLO, "chat_template": "{{ raise_exception('not so') }}"},
    )
    (expected,) = llm.chat(HELLO, SamplingParams(temperature=0, max_tokens=4, logprobs=2))
    assert code == 1
    assert rows[1]["prompt"] == "<s>u:hello|a:" and rows[1]["outputs"][0]["text"] == expected.outputs[0].text
    answer = rows[2]["response"]["body"]
    assert answer["choices"][0]["message"]["content"] == expected.outputs[0].text
    content = answer["choices"][0]["logprobs"]["content"]
    assert [token["token"] for token in content] == list(expected.outputs[0].text)
    assert [len(token["top_logprobs"]) for token in content] == [2, 2, 2, 2]
    assert answer["usage"] == {"prompt_tokens": 11, "completion_tokens": 4, "total_tokens": 15}
    assert rows[3]["error"]["message"] == "line 4: the chat template says: not so"


def test_a_template_of_the_command_is_for_lines_without_their_own(batch, tmp_path):
    (tmp_path / "other.jinja").write_text("{{ messages[0].content }}?")
    flags = ("--chat-template", str(tmp_path / "other.jinja"))
    _, rows = batch({"messages": HELLO}, {"messages": HELLO, "chat_template": "own"}, flags=flags)
    assert [row["prompt"] for row in rows] == ["hello?", "own"]


def test_a_run_with_another_template_does_not_take_up_the_rows_of_this_one(model, batch, capfd):
    assert batch({"messages": HELLO})[0] == 0
    assert batch({"messages": HELLO})[0] == 0  # all is done
    (model / "chat_template.jinja").write_text("another")
    try:
        assert batch({"messages": HELLO})[0] == 2
    finally:
        (model / "chat_template.jinja").unlink()
    assert "the model (a digest of its files) was" in capfd.readouterr().err
