"""One queue for several engines: every request goes to one of them, and none has more than it can begin with."""

from __future__ import annotations

import threading

from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.config import CacheConfig, EngineConfig
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.host.sequence import Sequence, SequenceGroup
from jaxpaged.host.shared_queue import LONGEST_PAUSE, SharedArrivals, SharedQueue

LIMITS = EngineConfig(max_model_len=64, max_num_seqs=4, max_num_batched_tokens=10)


def group(request_id: str, prompt_len: int = 2, n: int = 1, arrival_time: float = 0.0) -> SequenceGroup:
    prompt = [1] * prompt_len
    made = SequenceGroup(
        request_id, None, SamplingParams(n=n), 0, [Sequence(0, prompt, prompt_len)], max_len=prompt_len + 4,
        eos_ids=frozenset(),
    )  # fmt: skip
    made.arrival_time = arrival_time
    return made


def ids(groups: list[SequenceGroup]) -> list[str]:
    return [one.request_id for one in groups]


def test_few_requests_are_dealt_out_evenly_before_any_engine_runs():
    queue = SharedQueue([group(str(i)) for i in range(5)], 3, LIMITS)
    assert [ids(queue.first_of(i)) for i in range(3)] == [["0", "1"], ["2", "3"], ["4"]]
    assert len(queue) == 0


def test_nobody_takes_more_than_may_run_or_than_a_step_computes():
    queue = SharedQueue([group(str(i)) for i in range(20)], 2, LIMITS)
    assert [len(queue.first_of(i)) for i in range(2)] == [4, 4]  # sequences
    assert ids(queue.take(0.0, num_running=3)) == ["8"]
    assert queue.take(0.0, num_running=4) == []
    long = SharedQueue([group(str(i), prompt_len=6) for i in range(6)], 1, LIMITS)
    assert ids(long.first_of(0)) == ["0"]  # tokens
    wide = SharedQueue([group("0", n=4), group("1")], 1, LIMITS)
    assert ids(wide.first_of(0)) == ["0"]


def test_a_request_larger_than_a_step_is_taken_by_who_has_nothing_else():
    queue = SharedQueue([group("0", prompt_len=30)], 2, LIMITS)
    assert ids(queue.first_of(0)) == ["0"]


def test_an_engine_in_which_someone_waits_takes_no_more():
    queue = SharedQueue([group(str(i)) for i in range(20)], 2, LIMITS)
    scheduler = Scheduler(CacheConfig(4, 16), LIMITS)
    arrivals = SharedArrivals(queue, 0, scheduler)
    assert arrivals.known == []  # more will come
    for one in arrivals.take(0.0):
        scheduler.add(one)
    assert arrivals.take(0.0) == [] and arrivals
    scheduler.waiting.clear()
    assert ids(arrivals.take(0.0)) == ["8", "9", "10", "11"]


def test_who_comes_later_is_waited_for_a_moment_at_a_time():
    queue = SharedQueue([group("0", arrival_time=9.0)], 2, LIMITS)
    assert queue.first_of(0) == [] and queue.take(8.0, 0) == []
    assert queue.seconds_to_next(1.0) == LONGEST_PAUSE and queue.seconds_to_next(9.5) == 0.0
    assert ids(queue.take(9.0, 0)) == ["0"]


def test_threads_share_out_every_request_once():
    queue, taken = SharedQueue([group(str(i)) for i in range(500)], 4, LIMITS), [[] for _ in range(4)]

    def take_all(engine: int) -> None:
        taken[engine] += queue.first_of(engine)
        while len(queue):
            taken[engine] += queue.take(0.0, 0)

    threads = [threading.Thread(target=take_all, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted((one for some in taken for one in ids(some)), key=int) == [str(i) for i in range(500)]
