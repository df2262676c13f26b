"""Special tokens around prompts: who adds them, who leaves them out, and what comes twice."""

from __future__ import annotations

import json
import logging

import pytest
from fake_llm import FakeLLM
from toy import char_tokenizer, save_toy_checkpoint

from jaxpaged import LLM, BeamSearchParams, SamplingParams
from jaxpaged.batch import BatchContext, BatchRequest, parse_batch
from jaxpaged.cli.main import main
from jaxpaged.requests.prompts import Prompt, PromptEncoder

GREEDY = SamplingParams(temperature=0, max_tokens=2)
SEARCH = BeamSearchParams(beam_width=2, max_tokens=2)


class Surrounding:
    """Puts <s> before a text and </s> behind it; both can be spelt in a text."""

    def encode(self, text, add_special_tokens=True):
        ids = char_tokenizer().encode(text).ids
        return [0, *ids, 1] if add_special_tokens else ids

    def decode(self, token_ids, skip_special_tokens=True):
        return char_tokenizer().decode(list(token_ids), skip_special_tokens)


def ids(text):
    return char_tokenizer().encode(text).ids


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    directory = save_toy_checkpoint(tmp_path_factory.mktemp("model") / "toy")
    return LLM(directory, tokenizer=Surrounding(), page_size=4, num_pages=40, max_num_seqs=4, max_model_len=32)


@pytest.mark.slow
def test_every_call_leaves_them_out_where_it_is_told_to(llm):
    for call in (llm.generate, llm.generate_iter, lambda prompts, **keys: llm.beam_search(prompts, SEARCH, **keys)):
        (added,), (plain,) = call(["ab"]), call(["ab"], add_special_tokens=False)
        assert (added.prompt_token_ids, plain.prompt_token_ids) == ([0, *ids("ab"), 1], ids("ab"))
    *_, last = llm.watch_beams("ab", SEARCH, add_special_tokens=False)
    assert last.output.prompt_token_ids == ids("ab")
    mixed = llm.generate([{"prompt": "ab", "add_special_tokens": False}, "ab"], GREEDY)
    assert [out.prompt_token_ids for out in mixed] == [ids("ab"), [0, *ids("ab"), 1]]
    with llm.tree() as tree:
        assert tree.open({"prompt": "ab", "add_special_tokens": False}).tokens == ids("ab")


def test_a_shared_prefix_has_the_first_of_them_and_each_prompt_the_last(llm):
    (out,) = llm.generate(["cd"], GREEDY, shared_prefix="ab")
    assert out.prompt_token_ids == [0, *ids("abcd"), 1]
    (out,) = llm.generate(["cd"], GREEDY, shared_prefix="ab", add_special_tokens=False)
    assert out.prompt_token_ids == ids("abcd")


def test_anything_but_a_bool_is_refused(llm):
    for call in (lambda: llm.generate("ab", GREEDY, add_special_tokens="no"),
                 lambda: llm.generate({"prompt": "ab", "add_special_tokens": 0}, GREEDY)):  # fmt: skip
        with pytest.raises(ValueError, match="add_special_tokens must be True or False, got"):
            call()


def test_a_start_that_comes_twice_is_said_once(caplog):
    encoder = PromptEncoder(Surrounding(), "")
    with caplog.at_level(logging.WARNING, "jaxpaged"):
        assert encoder.encode(Prompt("ab", None)) == [0, *ids("ab"), 1]
        assert encoder.encode(Prompt("<s>ab", None), add_special_tokens=False) == [0, *ids("ab")]
        assert not caplog.records
        for _ in range(2):
            assert encoder.encode(Prompt("<s>ab", None)) == [0, 0, *ids("ab"), 1]
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "a prompt begins with '<s>', which the tokenizer puts before every prompt, too"
    )


def requests(*lines, **context):
    return parse_batch("\n".join(map(json.dumps, lines)).encode(), BatchContext(**context))


def test_lines_say_it_for_themselves_and_it_is_part_of_what_decides_their_rows():
    body = {"custom_id": "a", "method": "POST", "url": "/v1/completions"}
    for make in (lambda **keys: {"prompt": "a", **keys}, lambda **keys: {**body, "body": {"prompt": "a", **keys}}):
        (added,), (plain,) = requests(make()), requests(make(add_special_tokens=False))
        assert isinstance(added, BatchRequest) and isinstance(plain, BatchRequest)
        assert plain.given_prompts == [{"prompt": "a", "add_special_tokens": False}]
        assert added.given_prompts == ["a"] and added.fingerprint != plain.fingerprint
        assert requests(make(add_special_tokens=True))[0].fingerprint == added.fingerprint
        (flagged,) = requests(make(), add_special_tokens=False)
        assert flagged.fingerprint == plain.fingerprint
        (wrong,) = requests(make(add_special_tokens="no"))
        assert wrong.reason == "add_special_tokens must be true or false, got 'no'"


def test_the_flag_leaves_them_out_and_another_run_does_not_go_on_without_it(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "in.txt").write_text("abc\n")
    output = tmp_path / "out.jsonl"
    command = ["generate", str(tmp_path / "model"), "--input", str(tmp_path / "in.txt"), "--output", str(output)]
    assert main([*command, "--no-special-tokens", "--shared-prefix", "xyz"], FakeLLM) == 0
    assert json.loads(output.read_text())["prompt"] == "~yz~bc"  # how the stand-in marks them
    assert main([*command, "--shared-prefix", "xyz"], FakeLLM) == 2
    assert "--no-special-tokens was true, is the default" in capsys.readouterr().err
