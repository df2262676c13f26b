"""Prompts that are no list: generators, read as they are needed, datasets, tables, arrays; and their results."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import weakref

import numpy as np
import pytest
from fake_llm import FakeLLM
from toy import few_programs, save_toy_checkpoint

import jaxpaged
from jaxpaged import LLM, BeamSearchParams, Rows, SamplingParams
from jaxpaged.cli.main import main
from jaxpaged.host.arrivals import StreamedGroups
from jaxpaged.host.step.features import SamplingFeatures

GREEDY = SamplingParams(temperature=0, max_tokens=3)
MAX_NUM_SEQS = 4


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    directory = save_toy_checkpoint(tmp_path_factory.mktemp("model") / "toy")
    llm = LLM(
        directory, page_size=4, num_pages=100, max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=64, max_model_len=64
    )
    few_programs(llm.engine)
    return llm


class Text(str):
    """A prompt that says when nobody has it any more."""


def texts(count):
    return (f"prompt {i}" for i in range(count))


def by_id(outputs):
    return {out.request_id: [(s.text, s.token_ids) for s in out.outputs] for out in outputs}


def test_a_generator_gives_what_the_list_of_its_prompts_gives(llm):
    expected = by_id(llm.generate(list(texts(12)), GREEDY))
    assert by_id(llm.generate_iter(texts(12), GREEDY)) == expected
    assert [out.request_id for out in llm.generate(texts(12), GREEDY)] == [str(i) for i in range(12)]


def test_a_shared_prefix_comes_before_every_prompt_of_a_generator(llm):
    prefixed = by_id(llm.generate(list(texts(6)), GREEDY, shared_prefix="all of them "))
    assert by_id(llm.generate_iter(texts(6), GREEDY, shared_prefix="all of them ")) == prefixed


def test_the_steps_of_a_generator_are_those_of_its_list(llm):
    """What is compiled is known from the parameters alone."""

    def penalty(token_ids, num_tokens, logits):
        return logits

    kinds = [
        SamplingParams(n=3, top_p=0.5, logprobs=3), SamplingParams(temperature=0, prompt_logprobs=2, bad_words=["ab"]),
        BeamSearchParams(beam_width=2), SamplingParams(logits_processors=[penalty], presence_penalty=1, min_tokens=2),
    ]  # fmt: skip
    for params in ([kinds[0]] * 2, kinds[:2], kinds[2:], kinds):
        count = len(params)
        read = (list(texts(count)), params, None, llm.engine)
        stream = llm._requests.stream(iter(read[0]), *read[1:])
        of = SamplingFeatures.of
        assert of(stream.examples, 97) == of(llm._requests.read_all(*read), 97)
        assert len(stream.examples) == len(set(map(id, params)))


def test_requests_without_a_seed_get_those_that_a_list_gives_them(llm):
    engine, requests = llm.engine, llm._requests
    before = requests._num_requests
    groups = requests.read_all(list(texts(5)), SamplingParams(), None, engine)
    requests.give_seeds(groups)
    requests._num_requests = before
    streamed = requests.stream(texts(5), SamplingParams(), None, engine).take(9, is_idle=True)
    assert [group.seed for group in streamed] == [group.seed for group in groups] and groups[0].seed
    assert requests._num_requests == before + 5


def test_a_generator_is_read_no_further_ahead_than_twice_what_runs_together(llm):
    read = 0

    def prompts():
        nonlocal read
        for i in itertools.count():
            read += 1
            yield f"prompt {i}"

    ahead = []
    results = llm.generate_iter(prompts(), GREEDY)
    assert read == 0
    for done, _ in zip(range(1, 50), results, strict=False):
        ahead.append(read - done)
    results.close()
    assert max(ahead) <= 2 * MAX_NUM_SEQS and read < 50 + 2 * MAX_NUM_SEQS
    assert llm.generate(["again"], GREEDY)  # the pool is free


def test_agenerate_reads_a_generator_so_too_and_names_what_cannot_run(llm):
    async def run():
        ids = []
        try:
            async for output in llm.agenerate((text for text in [*texts(9), ""]), GREEDY):
                ids.append(int(output.request_id))
        except ValueError as error:
            return sorted(ids), str(error)

    assert asyncio.run(run()) == (list(range(9)), "prompt 9: the prompt is empty")


def test_prompts_do_not_stand_in_memory(llm):
    alive, most, made = 0, 0, 0

    def gone():
        nonlocal alive
        alive -= 1

    def prompts():
        nonlocal alive, most, made
        for i in range(200):
            text = Text(f"prompt {i}")
            weakref.finalize(text, gone)
            alive, made = alive + 1, made + 1
            most = max(most, alive)
            yield text

    for _output in llm.generate_iter(prompts(), dataclasses.replace(GREEDY, max_tokens=1)):
        pass
    assert made == 200 and most <= 3 * MAX_NUM_SEQS  # in the engine, and results on their way out


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_number_of_prompts(llm):
    import tracemalloc

    def peak(count):
        tracemalloc.start()
        long = "x" * 50
        for _ in llm.generate_iter((f"{i} {long}" for i in range(count)), SamplingParams(temperature=0, max_tokens=1)):
            pass
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(50)
    assert peak(1500) - peak(300) < 500_000  # 1,200 prompts of 52 tokens would be many megabytes


def test_a_slow_source_takes_no_more_than_half_of_the_time_while_others_run(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("jaxpaged.host.arrivals.monotonic", lambda: clock[0])

    class Slow:
        error, seconds = None, 0.25

        def read(self):
            clock[0] += self.seconds
            return "group"

    groups = StreamedGroups(Slow(), [])
    assert groups.take(10, is_idle=True) == ["group"]
    assert groups.take(10, is_idle=False) == []
    assert groups.take(10, is_idle=True) == ["group"]  # nothing else is there to do
    clock[0] += 0.2
    assert groups.take(10, is_idle=False) == []
    clock[0] += 0.1
    assert groups.take(10, is_idle=False) == ["group"]
    Slow.seconds = 0.001
    clock[0] += 1
    assert len(groups.take(10, is_idle=False)) == 10


def test_what_comes_before_a_bad_prompt_is_finished_and_then_it_is_named(llm):
    results = llm.generate_iter((p for p in ["a", "b", "", "never"]), GREEDY)
    assert sorted(next(results).request_id for _ in range(2)) == ["0", "1"]
    with pytest.raises(ValueError, match="prompt 2: the prompt is empty"):
        next(results)
    results = llm.generate_iter(("x" * n for n in (3, 64, 3)), GREEDY)
    next(results)
    with pytest.raises(ValueError, match="prompt 1: .* leaves no room to generate"):
        next(results)
    with pytest.raises(ValueError, match="prompt 2: the prompt is empty"):
        llm.generate((p for p in ["a", "b", "", "never"]), GREEDY)
    assert list(llm.generate_iter(iter([]), GREEDY)) == [] == llm.generate(iter([]), GREEDY)


def test_an_error_of_the_generator_comes_out_as_it_is_and_frees_the_pool(llm):
    def prompts():
        yield "a"
        raise KeyError("of the caller's")

    with pytest.raises(KeyError, match="of the caller's"):
        list(llm.generate_iter(prompts(), GREEDY))
    assert llm.generate(["again"], GREEDY)


def test_parameters_and_ids_beside_a_generator_are_checked_as_far_as_they_are_known(llm):
    lengths = [SamplingParams(temperature=0, max_tokens=n) for n in (1, 2, 3)]
    ids = (f"id{i}" for i in itertools.count())
    outputs = {out.request_id: out for out in llm.generate_iter(texts(3), lengths, ids)}
    assert [len(outputs[f"id{i}"].outputs[0].token_ids) for i in range(3)] == [1, 2, 3]
    with pytest.raises(ValueError, match="5 samples of one request exceed max_num_seqs=4"):
        llm.generate_iter(texts(3), SamplingParams(n=5))  # before anything is read
    with pytest.raises(ValueError, match="must be a SamplingParams"):
        llm.generate_iter(texts(3), [GREEDY, 5])
    with pytest.raises(ValueError, match="3 sampling_params, and there are more prompts"):
        list(llm.generate_iter(texts(4), lengths))
    with pytest.raises(ValueError, match="3 sampling_params for 2 prompts"):
        list(llm.generate_iter(texts(2), lengths))
    with pytest.raises(ValueError, match="request_ids: prompt 1 needs a string, got None"):
        list(llm.generate_iter(texts(2), GREEDY, request_ids=["only"]))
    with pytest.raises(ValueError, match="arrival_times are for a list"):
        llm.generate_iter(texts(2), GREEDY, arrival_times=[0, 0])


def test_what_has_no_order_or_is_no_text_is_refused(llm):
    for call in (llm.generate, llm.generate_iter):
        for prompts, words in (
            ({"a", "b"}, "has none: make a list"), (b"ab", "got bytes"), (5, "got int"), (len, "got builtin"),
            ((b for b in [b"ab"]), "prompt 0: a prompt is text or token ids, not bytes"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=words):
                list(call(prompts, GREEDY))


# Arrays, datasets and tables


def test_arrays_of_ids_are_prompts(llm):
    rows = np.array([[5, 6, 7], [8, 9, 10]], np.int32)
    expected = by_id(llm.generate([[5, 6, 7], [8, 9, 10]], GREEDY))
    for prompts in (rows, list(rows), [rows[0], (8, 9, 10)]):
        assert by_id(llm.generate(prompts, GREEDY)) == expected == by_id(llm.generate_iter(prompts, GREEDY))
    assert by_id(llm.generate_iter((row for row in rows), GREEDY)) == expected
    (one,) = llm.generate(rows[0], GREEDY)
    assert one.prompt_token_ids == [5, 6, 7]
    with pytest.raises(ValueError, match="got 5.5"):
        llm.generate(np.array([5.5, 6.0]), GREEDY)


ROWS = [{"question": "one", "label": 1, "index": "x"}, {"question": "two", "label": None, "index": "y"}]


def source(kind):
    if kind == "frame":
        return pytest.importorskip("pandas").DataFrame(ROWS)
    if kind == "arrow":
        return pytest.importorskip("pyarrow").Table.from_pylist(ROWS)
    if kind in ("list", "generator"):
        return ROWS if kind == "list" else (row for row in ROWS)
    dataset = pytest.importorskip("datasets").Dataset.from_list(ROWS)
    return dataset if kind == "dataset" else dataset.to_iterable_dataset()


@pytest.mark.parametrize("kind", ["dataset", "iterable dataset", "frame", "arrow", "list", "generator"])
@pytest.mark.filterwarnings("ignore")  # of others' libraries
def test_a_table_gives_its_column_and_carries_the_others(llm, kind):
    outputs = list(llm.generate_iter(Rows(source(kind), "question"), GREEDY))
    rows = {out.request_id: out.to_dict() for out in outputs}
    assert [rows[i]["prompt"] for i in "01"] == ["one", "two"]
    assert [rows[i]["label"] for i in "01"] == [1, None] and rows["1"]["input_index"] == "y"
    assert outputs[0].carried["label"] in (1, None) or kind == "frame"
    assert len(llm.generate(Rows(source(kind), "question"), GREEDY)) == 2


def test_a_dataset_is_known_by_what_it_has_and_is_read_as_a_generator_is(llm):
    class Stream:
        column_names, features, read = None, None, 0  # as of an IterableDataset, whose columns are not known yet

        def __iter__(self):
            for i in range(40):
                Stream.read += 1
                yield {"text": f"row {i}", "label": i}

    results = llm.generate_iter(Stream(), GREEDY)
    assert Stream.read == 0
    first = next(results)
    assert first.prompt == f"row {first.carried['label']}" and Stream.read <= 3 * MAX_NUM_SEQS
    assert len(list(results)) == 39


@pytest.mark.filterwarnings("ignore")
def test_a_column_is_found_by_its_name_or_named_with_those_that_are(llm):
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    dataset = datasets.Dataset.from_list(ROWS)
    for table in (dataset, dataset.to_iterable_dataset(), pandas.DataFrame(ROWS)):
        with pytest.raises(ValueError, match="say which has the prompts with Rows"):
            llm.generate(table, GREEDY)
        with pytest.raises(ValueError, match="no column 'q'; the columns are question, label, index"):
            llm.generate_iter(Rows(table, "q"), GREEDY)
    chats = [{"messages": [{"role": "user", "content": "hi"}], "chat_template": "{{ messages[0].content }}", "n": 3}]
    (chat,) = llm.generate(datasets.Dataset.from_list(chats), GREEDY)
    assert (chat.prompt, chat.carried) == ("hi", {"n": 3})
    (plain,) = llm.generate(datasets.Dataset.from_list([{"text": "hi", "prompt": None}]), GREEDY)
    assert plain.prompt == "hi"
    with pytest.raises(ValueError, match="the dataset has splits: take one of them, .*'train'"):
        llm.generate(datasets.DatasetDict({"train": dataset}), GREEDY)
    assert [out.prompt for out in llm.generate(dataset["question"], GREEDY)] == ["one", "two"]
    ids = datasets.Dataset.from_list([{"prompt_token_ids": [5, 6]}]).with_format("numpy")
    assert llm.generate(ids, GREEDY)[0].prompt_token_ids == [5, 6]


def test_dicts_of_a_list_are_prompts_and_those_of_rows_may_have_more(llm):
    with pytest.raises(ValueError, match="prompt 0: a prompt dict has the key"):
        llm.generate([{"prompt": "a", "label": 1}, "b"], GREEDY)
    (output,) = llm.generate(Rows([{"prompt": "a", "label": 1}]), GREEDY)
    assert output.carried == {"label": 1}
    for rows, words in (
        (Rows([{"prompt": "a"}], "q"), "prompt 0: it has no 'q'; it has prompt"),
        (Rows(["a"]), "prompt 0: a row is a dict with a column of that name, got 'a'"),
        (Rows({"prompt": "a"}), "this is one dict"),
        (Rows("abc"), "got str"),
        (Rows([], 5), "prompt_column must be the name of a column, got 5"),
    ):
        with pytest.raises(ValueError, match=words):
            llm.generate(rows, GREEDY)


# Results


def test_a_result_as_a_dict_is_what_a_row_of_json_has(llm, tmp_path):
    given = {"prompt": "abc", "logprobs": 2, "prompt_logprobs": 0, "max_tokens": 2, "seed": 7, "n": 2}
    (tmp_path / "in.jsonl").write_text(json.dumps(given))
    (tmp_path / "config.json").write_text("{}")
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert main(["generate", str(tmp_path), *files], make_llm=FakeLLM) == 0
    row = json.loads((tmp_path / "out.jsonl").read_text())
    params = SamplingParams(**{key: value for key, value in given.items() if key != "prompt"})
    (output,) = FakeLLM("model").generate_iter(["abc"], [params], ["0"])
    found = json.loads(json.dumps(output.to_dict(), allow_nan=False))
    assert {**row, **found} == row and set(row) - set(found) == {"index", "seed", "fingerprint", "settings"}
    (ids,) = llm.generate([5, 6], GREEDY)
    assert ids.to_dict()["prompt_token_ids"] == [5, 6]
    failed = dataclasses.replace(output, error="no token is left", outputs=[])
    assert failed.to_dict()["error"] == {"message": "no token is left"}


def test_a_table_of_results_has_a_row_a_sample(llm):
    pytest.importorskip("pandas")
    outputs = llm.generate(Rows([{"q": "a", "text": "t"}, {"q": "b", "k": 1}], "q"), GREEDY)
    outputs = [
        dataclasses.replace(out, outputs=[*out.outputs, dataclasses.replace(out.outputs[0], index=1)])
        for out in outputs
    ]
    frame = jaxpaged.to_dataframe(outputs)
    assert list(frame.prompt) == ["a", "a", "b", "b"] and list(frame["sample"]) == [0, 1, 0, 1]
    assert list(frame.text) == [sample.text for output in outputs for sample in output.outputs]
    assert list(frame.input_text[:2]) == ["t", "t"] and list(frame.k[2:]) == [1, 1]
    assert list(jaxpaged.to_dataframe([]).columns)[:4] == ["id", "prompt", "num_prompt_tokens", "sample"]
    assert len(jaxpaged.to_dataframe(outputs[0])) == 2
    assert len(jaxpaged.to_dataframe(llm.generate_iter(texts(3), GREEDY))) == 3
    with pytest.raises(ValueError, match="takes what generate returns, got str"):
        jaxpaged.to_dataframe("abc")


def test_what_a_table_of_results_needs_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs pandas, which is not installed: pip install 'jaxpaged\[dataframe\]'"):
        jaxpaged.to_dataframe([])
