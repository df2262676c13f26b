"""Remake the bundled traces, jaxpaged/trace_page/examples: the PagedAttention paper's figures by the real scheduler.

    python scripts/make/traces.py

A scripted device plays the model: it says the words of the figures. The free list is scripted, too, since the figures
name physical pages. jaxpaged never hands out page 0, which Figure 9 uses: there page 1 is labelled 0, and so on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.request_params import RequestParams
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.config import CacheConfig, EngineConfig, PreemptionConfig
from jaxpaged.host.account.trace import TraceRecorder
from jaxpaged.host.beams.beam_state import BeamState
from jaxpaged.host.pages.page_allocator import PageAllocator
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.host.sequence import Sequence, SequenceGroup
from jaxpaged.host.step.step_plan import StepPlan
from jaxpaged.step_io import RowCandidates, StepOutputs, TokenLogprobs

DIRECTORY = Path(__file__).resolve().parents[2] / "jaxpaged" / "trace_page" / "examples"
PAGE_SIZE = 4
IMPOSSIBLE = -1000.0


class Story:
    """A scheduler over a small pool, whose requests and answers are words."""

    def __init__(self, num_pages: int, free: list[int], preemption: PreemptionConfig | None = None):
        """`free`: the pages that are handed out first, in this order."""
        limits = EngineConfig(
            64, 16, 64, watermark=0.0, preemption=preemption or PreemptionConfig(), prefix_caching=False
        )
        self.scheduler = Scheduler(CacheConfig(PAGE_SIZE, num_pages), limits)
        self.recorder = TraceRecorder(self.scheduler.cache)
        self.words: list[str] = []
        self.script_free_list(free)

    def script_free_list(self, first: list[int]) -> None:
        allocator = self.scheduler.allocator
        assert isinstance(allocator, PageAllocator)
        free = allocator._free
        assert set(first) <= set(free), f"pages {set(first) - set(free)} are in use"
        free[:] = [page for page in free if page not in first] + first[::-1]

    def ids(self, text: str) -> list[int]:
        """One token a word."""
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        return [self.words.index(word) for word in text.split()]

    def add(self, prompt: str, params: RequestParams, name: str) -> SequenceGroup:
        ids = self.ids(prompt)
        assert params.max_tokens is not None
        group = SequenceGroup(name, prompt, params, 0, [Sequence(0, ids, len(ids))], len(ids) + params.max_tokens)
        if isinstance(params, BeamSearchParams):
            group.beams = BeamState.of(params, (), params.max_tokens)
        self.scheduler.add(group)
        return group

    def step(self, answer: Callable[[StepPlan], StepOutputs]) -> None:
        plan = self.scheduler.schedule()
        assert plan is not None
        self.recorder.planned(plan, self.scheduler)
        self.scheduler.commit(plan, answer(plan))
        self.recorder.committed(self.scheduler)
        self.scheduler.check_invariants()

    def say(self, texts: dict[tuple[str, int], str]) -> None:
        """Run to the end: the sample of a request (by name and index) says its text, a word a token."""
        ids = {key: self.ids(text) for key, text in texts.items()}

        def answer(plan: StepPlan) -> StepOutputs:
            said = [(s.group.request_id, s.sequence.sample_index, s.sequence.num_generated) for s in plan.samples]
            tokens = np.array([ids[name, index][place] for name, index, place in said], np.int32)
            return StepOutputs(tokens, TokenLogprobs(np.zeros(len(tokens), np.float32)))

        while self.scheduler.has_work:
            self.step(answer)

    def choose(self, *children: tuple[int, str]) -> None:
        """One step of a beam search: its beams go on as these children, best first, of (beam, word)."""
        ids = [self.ids(word)[0] for _, word in children]

        def answer(plan: StepPlan) -> StepOutputs:
            count, width = len(plan.samples), 2 * len(children)
            scores = np.full((count, width), IMPOSSIBLE, np.float32) - np.arange(width, dtype=np.float32)
            tokens = np.full((count, width), -1, np.int32) + np.arange(1000, 1000 + width, dtype=np.int32)
            taken = [0] * count
            for rank, ((beam, _), token) in enumerate(zip(children, ids, strict=True)):
                scores[beam, taken[beam]], tokens[beam, taken[beam]] = -1.0 - rank, token
                taken[beam] += 1
            nothing = TokenLogprobs(np.zeros(count, np.float32))
            return StepOutputs(np.zeros(count, np.int32), nothing, RowCandidates(scores, tokens))

        self.step(answer)

    def trace(self, title: str, note: str, first_label: int = 1) -> dict[str, Any]:
        trace = self.recorder.trace(title, note, self.words.__getitem__)
        trace["first_label"] = first_label
        return trace


FOUR_SCORE = "Four score and seven years ago our"


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens)


def one_request() -> dict[str, Any]:
    story = Story(num_pages=9, free=[7, 1, 3, 5])
    story.add(FOUR_SCORE, greedy(7), "A")
    story.say({("A", 0): "fathers brought forth on this continent ."})
    return story.trace(
        "One request",
        "Figure 6 of the PagedAttention paper: seven prompt tokens fill pages 7 and 1; “fathers” goes to the place "
        "that is left in page 1, and only for the next token is another page taken.",
    )


def two_requests() -> dict[str, Any]:
    story = Story(num_pages=9, free=[7, 1, 5, 2, 3, 6])
    story.add(FOUR_SCORE, greedy(6), "A")
    story.add("It was the best of", greedy(7), "B")
    story.say({("A", 0): "fathers brought forth on this continent", ("B", 0): "times it was the worst of times"})
    return story.trace(
        "Two requests",
        "Figure 7 of the paper: two requests share one pool. Neither has neighbouring pages, and each wastes at most "
        "the rest of its last page.",
    )


def parallel_sampling() -> dict[str, Any]:
    story = Story(num_pages=9, free=[7, 1, 3, 5, 2])
    story.add(FOUR_SCORE, SamplingParams(n=2, max_tokens=6), "A")
    story.say({("A", 0): "fathers brought forth on this continent", ("A", 1): "mothers saw and heard and sang"})
    return story.trace(
        "Parallel sampling",
        "Figure 8 of the paper: two samples of one prompt share its pages. The first to write to the shared page 1 "
        "gets a copy of it, page 3; the second is then alone with page 1 and writes in place.",
    )


def beam_search() -> dict[str, Any]:
    """Before: 0-1-3-5, 0-1-3-6, 0-1-3-7, 0-2-4-8; the next four beams descend from the second and the third."""
    story = Story(num_pages=18, free=[page + 1 for page in (0, 1, 2, 3, 5, 6, 4, 7, 8)])
    story.add("Once there was a", BeamSearchParams(beam_width=4, max_tokens=16), "A")
    pages = [
        ([0, 0, 0, 0], ["king who ruled a", "girl who lived by", "cat that sat on", "boy who had no"]),
        ([0, 0, 0, 1], ["small and distant land", "large and rich city", "land of ice and", "the sea and sang"]),
        (
            [0, 0, 0, 3],
            ["and all was well", "where nobody ever slept", "of rivers and hills", "to the passing ships"],
        ),
    ]
    for parents, texts in pages:
        _choose_page(story, parents, texts)
    story.choose((1, "until"), (1, "because"), (2, "and"), (2, "until"))
    story.script_free_list([page + 1 for page in (9, 10, 11, 12)])
    _finish_page(story, (text.split() for text in ("one day in", "the bells kept", "his name was", "a stranger came")))
    return story.trace(
        "Beam search",
        "Figure 9 of the paper: four beams share what they have in common. When the next four all descend from the "
        "second and the third, the other two end and pages 2, 4, 5 and 8 are free; nothing is copied.",
        first_label=0,
    )


def _choose_page(story: Story, parents: list[int], texts: list[str]) -> None:
    """Beams that fork from these, each then going on alone to the end of its page."""
    first, rest = [text.split()[0] for text in texts], [text.split()[1:] for text in texts]
    story.choose(*zip(parents, first, strict=True))
    _finish_page(story, rest)


def _finish_page(story: Story, rest: Iterable[Iterable[str]]) -> None:
    for words in zip(*rest, strict=True):
        story.choose(*enumerate(words))


def preemption() -> dict[str, Any]:
    story = Story(num_pages=13, free=[], preemption=PreemptionConfig("swap", swap_pages=4))
    story.add("Call me", greedy(15), "A")
    story.add(FOUR_SCORE, SamplingParams(n=2, max_tokens=14), "B")
    story.add("It is a truth universally", greedy(8), "C")
    story.say(
        {
            ("A", 0): "Ishmael . Some years ago - never mind how long precisely - having little or",
            ("B", 0): "fathers brought forth on this continent a new nation , conceived in liberty ,",
            ("B", 1): "mothers saw and heard and sang of all that was to come , and",
            ("C", 0): "acknowledged , that a single man in possession",
        }
    )
    return story.trace(
        "Preemption",
        "The pool is too small for all three requests. The one that came last gives way, all its samples together: its "
        "pages go to host memory or, where that has no room, are dropped and computed again. It comes back as it was.",
    )


EXAMPLES = {
    "one-request": one_request,
    "two-requests": two_requests,
    "parallel-sampling": parallel_sampling,
    "beam-search": beam_search,
    "preemption": preemption,
}


def write(directory: Path) -> None:
    for name, make in EXAMPLES.items():
        text = json.dumps(make(), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        (directory / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def main() -> int:
    write(DIRECTORY)
    return 0


if __name__ == "__main__":
    sys.exit(main())
