"""Constrained requests: every output is one that the constraint has, and those that a slow reference finds, which
leaves of the model's log-probabilities what a set of Python has."""

from __future__ import annotations

import json
import re

import jax
import numpy as np
import pytest
from beam_reference import beam_search
from helpers import logprobs_after
from toy import char_tokenizer, few_programs, save_toy_checkpoint

from jaxpaged import LLM, BeamSearchParams, SamplingParams
from jaxpaged.constraints import Grammar, JsonSchema, Regex, Trie, TrieFile
from jaxpaged.device.sampling import sample_tokens
from jaxpaged.step_io import SamplingInputs

PROMPT = [40, 41, 42, 40, 43]
END, STOP = 1, 0


def random_items(seed: int, count=60, longest=5) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.choice(np.arange(2, 97), rng.integers(1, longest + 1)).tolist() for _ in range(count)]


ITEMS = random_items(0, count=300)
TRIE = Trie.from_sequences(ITEMS)
PAIRED = np.random.default_rng(1).integers(2, 97, (200, 2)).tolist()
PAIRS = Trie.from_sequences(PAIRED)
#: What a regular expression can say as well.
WORDS = ["ab", "abc", "abcd", "b", "cab", "cabb", "cad"]
WORDS_PATTERN = "abc?|abcd|b|cabb?|cad"


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    directory = save_toy_checkpoint(tmp_path_factory.mktemp("model") / "toy")
    llm = LLM(directory, page_size=4, num_pages=400, max_num_seqs=16, max_num_batched_tokens=64, max_model_len=64)
    few_programs(llm.engine)
    return llm


def generate(llm, params):
    """Outputs of the prompt with each of these parameters."""
    return llm.generate([PROMPT] * len(params), params, progress=False)


def tokens_of(output):
    return [sample.token_ids for sample in output.outputs]


def item_of(token_ids: list[int]) -> list[int]:
    return token_ids[:-1] if token_ids[-1] in (END, STOP) else token_ids


def followers(items: list[list[int]], beginning: list[int]) -> set[int]:
    """What may come behind the beginning of an item; the end where one ends and another goes on."""
    longer = [item for item in items if item[: len(beginning)] == beginning and len(item) > len(beginning)]
    ends = {END} if beginning in items and longer else set()
    return {item[len(beginning)] for item in longer} | ends


SAMPLES = [
    dict(n=3, logprobs=3), dict(n=3, temperature=5.0), dict(temperature=0), dict(n=2, top_p=0.5),
    dict(n=2, top_k=2, min_p=0.1), dict(temperature=0, repetition_penalty=3.0, presence_penalty=1.0),
    dict(temperature=0, min_tokens=2), dict(temperature=0, logit_bias={token: 100.0 for token in range(2, 10)}),
    dict(temperature=0, stop_token_ids=[STOP]), dict(n=2, logits_processors=[lambda ids, count, logits: logits * 0]),
    dict(seed=11), dict(seed=12), dict(seed=13),
]  # fmt: skip
BEAMS = [
    dict(beam_width=1), dict(beam_width=4), dict(beam_width=7, length_penalty=0.0), dict(beam_width=8, max_tokens=20),
    dict(beam_width=5, early_stopping=True), dict(beam_width=3, length_penalty=2.0, early_stopping="never"),
]  # fmt: skip
FEW = [[5], [5, 6], [7, 8, 9], [7, 8, 10], [11]]
CODED = [[ord(character) - 30 for character in word] for word in WORDS]
PATTERN = "(ab|cd)+!{3}"
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 22]}}, "required": ["a"], "additionalProperties": False}


def all_requests() -> dict[str, list]:
    """By what they show. One run of all is one set of programs."""
    return {
        "samples": [
            SamplingParams(**{"seed": i, "constraint": (TRIE, PAIRS)[i % 2], **each}) for i, each in enumerate(SAMPLES)
        ],
        "free": [SamplingParams(seed=3, n=2, max_tokens=8)],
        "beams": [BeamSearchParams(constraint=TRIE, **each) for each in BEAMS],
        "beams by a pattern": [BeamSearchParams(constraint=Regex(WORDS_PATTERN), **each) for each in BEAMS],
        "few": [
            BeamSearchParams(beam_width=width, constraint=Trie.from_sequences(FEW), length_penalty=0.0, logprobs=3)
            for width in (5, 8, 16)
        ],
        "words": [
            SamplingParams(n=4, seed=4, constraint=one)
            for one in (Trie.from_sequences(CODED), Regex(WORDS_PATTERN))
        ],
        "patterns": [
            SamplingParams(n=4, seed=1, max_tokens=40, constraint=Regex(PATTERN)),
            SamplingParams(n=4, seed=2, max_tokens=3, constraint={"regex": PATTERN}),
            BeamSearchParams(beam_width=4, max_tokens=9, constraint=Regex(PATTERN)),
        ],
        "schema": [SamplingParams(n=2, seed=1, max_tokens=20, constraint=JsonSchema(SCHEMA))],
        "grammar": [SamplingParams(n=2, seed=2, max_tokens=20, constraint=Grammar('start: "x" | "(" start ")"'))],
        "stops": [
            SamplingParams(temperature=0, constraint=Trie.from_sequences(STOPPED), stop="="),
            BeamSearchParams(beam_width=3, constraint=Trie.from_sequences(STOPPED), stop=["="]),
        ],
    }  # fmt: skip


STOPPED = [[30, 31, 32, 33], [30, 31, 40, 33]]  # 31 is "="


@pytest.fixture(scope="module")
def ran(llm):
    """(parameters, output) of each request, by what it shows."""
    asked = all_requests()
    outputs = iter(generate(llm, [params for each in asked.values() for params in each]))
    return {name: [(params, next(outputs)) for params in each] for name, each in asked.items()}


@pytest.fixture(scope="module")
def samples_alone(llm):
    """Of the samples in tries and the free ones: without texts and beams their steps are launched ahead."""
    asked = all_requests()
    return generate(llm, asked["samples"] + asked["free"])


def test_whatever_a_request_asks_its_outputs_are_items(ran):
    for params, output in ran["samples"]:
        for sample in output.outputs:
            item = item_of(sample.token_ids)
            assert params.constraint.find(item) is not None and sample.finish_reason == "stop"
            assert len(item) >= params.min_tokens
            assert sample.text == "".join(char_tokenizer().id_to_token(token) for token in item)


def test_samples_do_not_depend_on_what_runs_beside_them_and_steps_that_run_ahead(ran, samples_alone):
    expected = [tokens_of(output) for _, output in ran["samples"] + ran["free"]]
    assert [tokens_of(output) for output in samples_alone] == expected


@pytest.mark.slow
def test_without_a_constraint_of_its_own_a_request_is_not_limited(llm, ran):
    ((params, output),) = ran["free"]
    assert tokens_of(output) == tokens_of(generate(llm, [params])[0])


def test_seeded_samples_are_drawn_from_what_a_set_leaves(ran):
    draw = jax.jit(sample_tokens)
    for params, output in ran["samples"][-3:]:
        items, found = PAIRED if params.constraint is PAIRS else ITEMS, []
        while allowed := followers(items, found):
            logits = np.full((1, 97), -np.inf, np.float32)
            logits[0, sorted(allowed)] = logprobs_after((*PROMPT, *found))[sorted(allowed)]
            seeds, position = np.array([[0, params.seed]], np.int32), np.array([len(PROMPT) + len(found)], np.int32)
            inputs = SamplingInputs(seeds, np.zeros(1, np.int32), position, temperatures=np.ones(1, np.float32))
            found.append(int(draw(logits, inputs)[0]))
        assert tokens_of(output) == [found]


def masked(items: list[list[int]]):
    """The model's log-probabilities, -inf for what no item goes on with."""

    def row(tokens: list[int]) -> np.ndarray:
        logprobs = np.full(97, -np.inf, np.float32)
        allowed = sorted(followers(items, tokens[len(PROMPT) :]))
        logprobs[allowed] = logprobs_after(tuple(tokens))[allowed]
        return logprobs

    return lambda sequences: np.stack([row(tokens) for tokens in sequences])


def expected_beams(items, beam_width, max_tokens=16, length_penalty=1.0, early_stopping=False):
    def is_over(tokens):
        item = tokens[len(PROMPT) :]
        return item in items and not followers(items, item)

    found = beam_search(
        masked(items), PROMPT, beam_width, max_tokens, {END}, length_penalty, early_stopping, stops=is_over
    )
    return [(tokens[len(PROMPT) :], score) for tokens, score, is_finished in found if is_finished]


@pytest.mark.parametrize("name, items", [("beams", ITEMS), ("beams by a pattern", CODED)])
def test_beams_are_those_of_the_reference(ran, name, items):
    for each, (_, output) in zip(BEAMS, ran[name], strict=True):
        expected = expected_beams(items, **each)
        assert tokens_of(output) == [tokens for tokens, _ in expected]
        np.testing.assert_allclose([o.score for o in output.outputs], [score for _, score in expected], rtol=1e-4)
        assert {o.finish_reason for o in output.outputs} == {"stop"}


def test_a_search_wider_than_the_trie_finds_all_items_and_nothing_else(ran):
    for _, output in ran["few"]:
        assert sorted(item_of(tokens) for tokens in tokens_of(output)) == FEW


def test_log_probabilities_and_sums_are_the_models_own(ran):
    for _, output in [ran["samples"][0], *ran["few"]]:
        for sample in output.outputs:
            total = 0.0
            for i, (token, entry) in enumerate(zip(sample.token_ids, sample.logprobs, strict=True)):
                row = logprobs_after((*PROMPT, *sample.token_ids[:i]))
                assert abs(entry[token].logprob - row[token]) < 1e-3
                assert entry[token].rank == 1 + int((row > row[token]).sum())
                assert set(entry) >= set(np.argsort(-row, kind="stable")[:3].tolist())
                total += row[token]
            assert abs(sample.cumulative_logprob - total) < 1e-3


def test_a_pattern_gives_what_the_trie_of_its_words_gives(ran):
    (_, by_trie), (_, by_text) = ran["words"]
    assert tokens_of(by_trie) == tokens_of(by_text)
    assert all(sample.text in WORDS for sample in by_text.outputs)


def test_texts_match_or_are_the_beginning_of_what_matches(ran):
    rests = ["", "b", "d", "!", "!!", "!!!", "b!!!", "d!!!"]
    for _, output in ran["patterns"]:
        for sample in output.outputs:
            possible = [""] if sample.finish_reason == "stop" else rests
            assert any(re.fullmatch(PATTERN, sample.text + rest) for rest in possible)


def test_texts_of_a_schema_and_of_a_grammar(ran):
    ((_, texts),), ((_, sentences),) = ran["schema"], ran["grammar"]
    assert all(json.loads(sample.text) in ({"a": 1}, {"a": 22}) for sample in texts.outputs)
    assert all(re.fullmatch(r"\(*x\)*", o.text) for o in sentences.outputs if o.finish_reason == "stop")


def test_a_stop_string_ends_an_output_sooner(ran):
    (_, sample), (_, beams) = ran["stops"]
    assert tokens_of(sample) == tokens_of(beams) == [[30, 31]]
    assert [(o.finish_reason, o.stop_reason) for o in (*sample.outputs, *beams.outputs)] == [("stop", "=")] * 2


REFUSED = {
    "a token that there is not": (Trie.from_sequences([[1, 2], [97]]), {}, "item 1 .*token id 97"),
    "an item beyond max_tokens": (Trie.from_sequences([[2], [2, 3, 4]]), dict(max_tokens=2), "item 1 .*3 tokens"),
    "an item beyond max_model_len": (Trie.from_sequences([[2] * 60]), dict(max_tokens=None), "item 0 .*most 59"),
    "no way to end": (Trie.from_sequences([[2], [2, 3]]), dict(ignore_eos=True), "item 0 .*beginning of another"),
    "an end inside": (Trie.from_sequences([[2, 1, 3]]), {}, "item 0 .*goes on behind token id 1"),
    "nothing left": (Trie.from_sequences([[2]]), dict(allowed_token_ids=[3]), "no token can be chosen: the constraint"),
    "a pattern": (Regex("("), {}, "llguidance cannot follow this regex"),
    "a pattern that no token is of": (Regex("漢"), {}, "no token can be chosen: the constraint begins with"),
    "a schema": (JsonSchema({"type": "nothing"}), {}, "llguidance cannot follow this json_schema"),
    "a file that there is not": (TrieFile("/no/such/file"), {}, "/no/such/file is no file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_before_the_run_with_the_prompts_number(llm, name):
    constraint, others, message = REFUSED[name]
    for kind, needed in ((SamplingParams, {}), (BeamSearchParams, {"beam_width": 2})):
        with pytest.raises(ValueError, match=f"prompt 1: .*{message}"):
            generate(llm, [SamplingParams(), kind(constraint=constraint, **needed, **others)])


def test_without_the_library_the_message_names_the_extra(llm, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'jaxpaged\[guided\]'"):
        llm.check_request(PROMPT, SamplingParams(constraint=Regex("a")))
    llm.check_request(PROMPT, SamplingParams(constraint=TRIE))


@pytest.mark.parametrize(
    "value", [5, "a", {}, {"regex": "a", "grammar": "b"}, {"words": []}, {"regex": 5}, {"json_schema": []}, ["a"]]
)
def test_what_is_no_constraint_is_refused_when_the_parameters_are_made(value):
    with pytest.raises(ValueError, match="constraint|regex|json_schema"):
        SamplingParams(constraint=value)
