"""scripts/bench/generate.py: names of workloads, and what cannot run, in one line before anything is loaded."""

from __future__ import annotations

import generate as bench_generate
import pytest
from generation_workloads import make_workload
from paths import ROOT

MODEL = str(ROOT / "checkpoints" / "tiny-python")


def test_a_name_says_how_many_requests_of_which_lengths():
    workload = make_workload("3x8+5x2", vocab_size=50, seed=0, longest=13)
    assert [len(prompt) for prompt in workload.prompts] == [8, 8, 8] and workload.output_lens == [5, 5, 5]
    assert workload.num_samples == 2 and workload.num_generated == 30
    assert {10 <= token < 50 for prompt in workload.prompts for token in prompt} == {True}


def test_chats_have_many_lengths_and_fit():
    workload = make_workload("chat50", vocab_size=50, seed=0, longest=300)
    lengths = [len(prompt) for prompt in workload.prompts]
    assert len(set(lengths)) > 20 and max(lengths) == max(workload.output_lens) == 150


def test_questions_behind_the_same_examples():
    workload = make_workload("3x8/2+5", vocab_size=50, seed=0, longest=15)
    assert [len(prompt) for prompt in workload.prompts] == [10, 10, 10]
    assert len({tuple(prompt[:8]) for prompt in workload.prompts}) == 1
    assert len({tuple(prompt[8:]) for prompt in workload.prompts}) == 3


def test_a_conversation_goes_on_from_what_was_answered():
    asked = []

    def generate(prompts, lengths):
        asked.append(prompts)
        return [[7] * length for length in lengths]

    workload = make_workload("2x3+4t3", vocab_size=50, seed=0, longest=21)
    workload.run(generate)
    assert [len(prompts[0]) for prompts in asked] == [3, 10, 17] and workload.num_generated == 24
    assert asked[2][1][:14] == [*asked[1][1], *[7] * 4] and asked[1][0][3:7] == [7] * 4
    assert list(workload.lengths()) == [(3, 4), (3, 4), (10, 4), (10, 4), (17, 4), (17, 4)]


def test_several_calls_of_the_same_prompts():
    asked = []
    workload = make_workload("2x3+4x5c3", vocab_size=50, seed=0, longest=7)
    workload.run(lambda prompts, lengths: asked.append((prompts, lengths)) or [])
    assert asked == [(workload.prompts, [4, 4])] * 3 and workload.num_generated == 120


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workloads", "foo"], "foo: no workload; write one as 256x128+512, 48x512+192x8 or chat384"),
        (["--workloads", "chat"], "chat: no workload"),
        (["--workloads", "1x٣+1"], "no workload"),
        (["--workloads", "2x8+8", "0x8+8"], "0x8+8: counts and lengths are numbers from 1 to 1,000,000"),
        (["--workloads", "chat0"], "chat0: counts and lengths are numbers from 1"),
        (["--workloads", "2x8+8x0"], "2x8+8x0: counts and lengths are numbers from 1"),
        (["--workloads", "9" * 30 + "x8+8"], "counts and lengths are numbers from 1"),
        (["--workloads", "1x1000+25"], "a request of 1,025 tokens, but the model or --max-model-len has 1,024"),
        (["--workloads", "1x8+8", "--max-model-len", "15"], "a request of 16 tokens, but the model or"),
        (["--workloads", "1x99+9t10"], "a request of 1,080 tokens, but the model or --max-model-len has 1,024"),
        (["--workloads", "1x8+8t2c2"], "or with common beginnings as 500x2048/128+64, 64x256+128t8, 48x512+192x8c4"),
        (["--workloads", "1x8+8", "--repeats", "0"], "--repeats 0: a run to compile is not timed, so at least 1"),
        (["--workloads", "1x8+8", "--dtype", "int3"], "dtype='int3'; choose one of auto"),
    ],
)
def test_what_cannot_run_is_one_line_and_exit_code_2(capsys, flags, message):
    with pytest.raises(SystemExit) as exit_:
        bench_generate.main([MODEL, *flags])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and message in error and error.count("\n") == 1


def test_a_model_that_is_not_there_is_one_line(capsys):
    with pytest.raises(SystemExit):
        bench_generate.main(["nowhere"])
    assert "nowhere does not exist: give the directory of a checkpoint" in capsys.readouterr().err
