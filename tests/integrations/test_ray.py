"""`Generate` on batches of columns, and in a real local Ray: rows come once, whatever becomes of a worker."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT

from jaxpaged import LLM, BeamSearchParams, SamplingParams
from jaxpaged.integrations.ray import Generate
from jaxpaged.integrations.ray.generate import COLUMNS

MODEL = str(ROOT / "checkpoints" / "tiny-python")
GREEDY = dict(temperature=0, max_tokens=6)
OPTIONS = dict(num_pages=64, max_model_len=64, max_num_seqs=4)


@pytest.fixture(scope="module")
def greedy():
    return Generate(MODEL, params=GREEDY, **OPTIONS)


def column(values) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array


@pytest.mark.slow
def test_rows_keep_their_order_and_columns_and_equal_a_plain_run(greedy):
    prompts = ["def f(", "import ", "class A"]
    out = greedy({"prompt": np.array(prompts), "id": np.arange(3)})
    assert list(out) == ["prompt", "id", *COLUMNS]
    expected = LLM(MODEL, **OPTIONS).generate(prompts, SamplingParams(**GREEDY), progress=False)
    assert out["generated_text"] == [each.outputs[0].text for each in expected]
    assert out["generated_token_ids"] == [list(each.outputs[0].token_ids) for each in expected]
    assert out["num_prompt_tokens"] == [len(each.prompt_token_ids) for each in expected]
    assert out["finish_reason"] == ["length"] * 3 and out["error"] == [None] * 3


@pytest.mark.slow
def test_a_bad_row_is_that_rows_error(greedy):
    out = greedy({"prompt": column(["def f(", None, "x" * 999, [5, -1], np.array([5, 6])])})
    assert [error is None for error in out["error"]] == [True, False, False, False, True]
    assert out["error"][1] == "prompt is None" and "64" in out["error"][2]
    assert [text is None for text in out["generated_text"]] == [False, True, True, True, False]


@pytest.mark.slow
def test_parameters_may_be_of_the_row(greedy):
    rows = Generate(MODEL, params=GREEDY, param_columns=["max_tokens"], **OPTIONS)
    rows._llm = greedy._llm
    out = rows({"prompt": np.array(["a", "a", "a"]), "max_tokens": np.array([1, np.nan, -3])})
    assert [None if ids is None else len(ids) for ids in out["generated_token_ids"]] == [1, 6, None]
    assert "max_tokens" in out["error"][2]


@pytest.mark.slow
def test_a_drawn_sample_depends_on_its_id_alone(greedy):
    drawn = Generate(MODEL, params=dict(temperature=1, max_tokens=6), id_column="id", **OPTIONS)
    drawn._llm = greedy._llm
    batch = {"prompt": np.array(["def f("] * 4), "id": np.array(["a", "b", "a", "c"])}
    first = drawn(batch)["generated_token_ids"]
    assert first[0] == first[2] and first[0] != first[1]
    turned = drawn({name: values[::-1] for name, values in batch.items()})["generated_token_ids"]
    assert turned == first[::-1]


@pytest.mark.slow
def test_beams_have_a_column_of_all(greedy):
    beams = Generate(MODEL, params=BeamSearchParams(beam_width=2, max_tokens=3), **OPTIONS)
    beams._llm = greedy._llm
    (outputs,) = beams({"prompt": np.array(["def f("])})["outputs"]
    assert len(outputs) == 2 and outputs[0]["cumulative_logprob"] > outputs[1]["cumulative_logprob"]


def test_what_is_wrong_with_all_rows_is_said_before_weights_are_read():
    stage = Generate("no such model", prompt_column="question", param_columns=["top_k"])
    with pytest.raises(ValueError, match="no column 'question'; there are 'prompt'"):
        stage({"prompt": np.array(["a"])})
    with pytest.raises(ValueError, match="'error' is there already"):
        stage({"question": np.array(["a"]), "top_k": np.array([1]), "error": np.array(["b"])})
    with pytest.raises(ValueError, match="param_columns names 'top_q'"):
        Generate("no such model", param_columns=["top_q"])
    with pytest.raises(TypeError, match="max_token"):
        Generate("no such model", params=dict(max_token=3))


class DiesOnce(Generate):
    """The first worker to come so far ends in mid-run, as one whose machine is taken away."""

    def __init__(self, marker: str, **options):
        super().__init__(**options)
        self._marker, self._calls = Path(marker), 0

    def __call__(self, batch):
        self._calls += 1
        if self._calls == 2:
            try:
                self._marker.touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os._exit(1)
        return super().__call__(batch)


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    pytest.importorskip("pyarrow")
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent), str(ROOT / "tests")])
    env = {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "JAXPAGED_CACHE_DIR": ""}
    ray.init(num_cpus=6, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": env})
    yield ray
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray leaves files and processes to the garbage collector
def test_every_row_comes_once_though_a_worker_dies_and_a_second_run_goes_on(ray, tmp_path, greedy):
    import pyarrow
    import ray.data as data
    from pyarrow import parquet
    from ray.data.checkpoint import CheckpointConfig

    prompts = [f"def f{i}(" for i in range(24)]
    prompts[5] = "x" * 999
    expected = greedy({"prompt": np.array(prompts)})["generated_text"]
    context = data.DataContext.get_current()
    context.checkpoint_config = CheckpointConfig(
        id_column="id", checkpoint_path=str(tmp_path / "done"), delete_checkpoint_on_success=False
    )

    def run(count: int) -> None:
        ids = [f"{i:03}" for i in range(count)]
        parquet.write_table(pyarrow.table({"id": ids, "prompt": prompts[:count]}), tmp_path / "in.parquet")
        rows = data.read_parquet(str(tmp_path / "in.parquet"))  # a checkpoint is of what is read
        kwargs = dict(marker=str(tmp_path / "died"), model=MODEL, params=GREEDY, id_column="id", **OPTIONS)
        stage = rows.repartition(6).map_batches(
            DiesOnce, fn_constructor_kwargs=kwargs, concurrency=2, batch_size=4, num_cpus=1
        )
        stage.write_parquet(str(tmp_path / "out"))

    try:
        run(16)
        assert (tmp_path / "died").exists()
        run(24)
    finally:
        context.checkpoint_config = None
    rows = data.read_parquet(str(tmp_path / "out")).take_all()
    assert sorted(row["id"] for row in rows) == [f"{i:03}" for i in range(24)]
    by_id = {int(row["id"]): row for row in rows}
    assert [by_id[i]["generated_text"] for i in range(24)] == expected
    assert [i for i in range(24) if by_id[i]["error"]] == [5]
