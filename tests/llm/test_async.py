"""`async for` over `agenerate`: results as they finish, the loop not blocked, the pool free however a run ends."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing, closing

import pytest
from helpers import small_llm
from toy import save_toy_checkpoint

from jaxpaged import SamplingParams

PROMPTS = ["ab", "the cat", "x y z", "0123456789"]
PARAMS = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (20, 3, 12, 7)]
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    directory = save_toy_checkpoint(tmp_path_factory.mktemp("async") / "toy")
    return small_llm(directory)


@pytest.fixture
def expected(llm):
    return tokens_of(llm.generate(PROMPTS, PARAMS))


def tokens_of(outputs):
    return {output.request_id: output.outputs[0].token_ids for output in outputs}


def check_free(llm):
    """No page is held, nobody has the pool, and no thread of a run is left."""
    engine = llm.engine
    assert engine.scheduler.allocator.num_used == 0 and not engine.scheduler.has_work
    engine.scheduler.check_invariants()
    with llm._owner.held("test"):
        pass
    check_no_thread()


def check_no_thread():
    threads = [thread for thread in threading.enumerate() if thread.name == "agenerate"]
    for thread in threads:
        thread.join(5)
    assert not any(thread.is_alive() for thread in threads)


async def collect(outputs):
    return [output async for output in outputs]


def test_results_come_as_they_finish_and_are_those_of_generate(llm, expected):
    outputs = asyncio.run(collect(llm.agenerate(PROMPTS, PARAMS)))
    assert [output.request_id for output in outputs] == ["1", "3", "2", "0"]
    assert tokens_of(outputs) == expected
    check_free(llm)


def test_the_loop_goes_on_while_steps_run(llm):
    async def main():
        ticks, task = 0, asyncio.create_task(collect(llm.agenerate(PROMPTS, LONG)))
        while not task.done():
            await asyncio.sleep(0.001)
            ticks += 1
        assert len(await task) == 4
        return ticks, llm.last_run.seconds["total"]

    ticks, seconds = asyncio.run(main())
    assert ticks > 20 * seconds


def test_a_result_is_there_before_the_run_has_ended(llm):
    async def main():
        outputs = llm.agenerate(["ab", "cd"], [PARAMS[1], LONG])
        first = await anext(outputs)
        with pytest.raises(RuntimeError, match=r"another run is in progress \(agenerate\) and owns the page pool"):
            llm.generate("x")
        return first, [output async for output in outputs]

    first, rest = asyncio.run(main())
    assert first.request_id == "0" and [output.request_id for output in rest] == ["1"]


def test_several_run_one_after_the_other_and_none_is_refused(llm, expected):
    async def main():
        return await asyncio.gather(*(collect(llm.agenerate(PROMPTS, PARAMS)) for _ in range(3)))

    assert [tokens_of(outputs) for outputs in asyncio.run(main())] == [expected] * 3
    check_free(llm)


def test_one_within_another_waits_for_no_reader(llm, expected):
    async def main():
        seen = []
        async for _ in llm.agenerate(PROMPTS, PARAMS):
            seen.append(tokens_of(await collect(llm.agenerate(PROMPTS, PARAMS))))
        return seen

    assert asyncio.run(main()) == [expected] * 4


def test_break_leaves_the_pool_to_whatever_comes_next(llm, expected):
    async def main():
        async for _ in llm.agenerate(["ab", "cd"], [PARAMS[1], LONG]):
            break
        assert tokens_of(llm.generate(PROMPTS, PARAMS)) == expected  # without a turn of the loop
        async for _ in llm.agenerate(["ab", "cd"], [PARAMS[1], LONG]):
            break
        assert tokens_of(await collect(llm.agenerate(PROMPTS, PARAMS))) == expected
        iterator = llm.generate_iter(PROMPTS, PARAMS)
        async for _ in llm.agenerate(["ab", "cd"], [PARAMS[1], LONG]):
            break
        assert tokens_of(iterator) == expected
        check_free(llm)

    asyncio.run(main())


def test_an_exception_in_the_loop_leaves_the_pool_free(llm, expected):
    async def main():
        async for _ in llm.agenerate(["ab", "cd"], [PARAMS[1], LONG]):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(main())
    check_free(llm)
    assert tokens_of(llm.generate(PROMPTS, PARAMS)) == expected


def test_a_task_that_is_cancelled_leaves_the_pool_free(llm, expected):
    async def main():
        iterator = llm.agenerate(["ab", "cd"], LONG)  # held on to
        task = asyncio.create_task(collect(iterator))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert tokens_of(llm.generate(PROMPTS, PARAMS)) == expected
        assert [output async for output in iterator] == []

    asyncio.run(main())
    check_free(llm)


def test_a_time_limit_on_a_result_ends_the_run(llm):
    async def main():
        iterator = llm.agenerate("ab", LONG)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(iterator), 0.01)
        await iterator.aclose()
        check_free(llm)

    asyncio.run(main())


def test_one_that_waits_for_its_turn_can_be_cancelled(llm, expected):
    async def main():
        first = llm.agenerate("ab", LONG)
        task = asyncio.create_task(collect(first))
        await asyncio.sleep(0.02)
        waiting = asyncio.create_task(collect(llm.agenerate("cd", LONG)))
        third = asyncio.create_task(collect(llm.agenerate(PROMPTS, PARAMS)))
        await asyncio.sleep(0.02)
        waiting.cancel()
        assert len((await task)[0].outputs[0].token_ids) == 200
        assert tokens_of(await third) == expected

    asyncio.run(main())
    check_free(llm)


def test_aclose_returns_when_the_pages_are_free(llm):
    async def main():
        async with aclosing(llm.agenerate(["ab", "cd"], [PARAMS[1], LONG])) as outputs:
            async for output in outputs:
                assert output.request_id == "0"
                break
        assert llm._engine.scheduler.allocator.num_used == 0
        await outputs.aclose()
        assert [output async for output in outputs] == []
        unbegun = llm.agenerate("ab")
        await unbegun.aclose()
        assert [output async for output in unbegun] == []

    asyncio.run(main())
    check_free(llm)


def test_a_loop_that_ends_ends_its_runs(llm, expected):
    async def main():
        iterators.append(llm.agenerate(["ab", "cd"], [PARAMS[1], LONG]))
        await anext(iterators[0])

    iterators = []  # held on to
    asyncio.run(main())
    assert tokens_of(llm.generate(PROMPTS, PARAMS)) == expected
    check_free(llm)


def test_what_is_wrong_with_a_request_is_raised_with_the_first_result(llm):
    async def main():
        outputs = llm.agenerate(["ab", "x" * 999])
        with pytest.raises(ValueError, match="prompt 1: prompt of 999 tokens"):
            await anext(outputs)
        assert [output async for output in outputs] == []
        with pytest.raises(TypeError, match="'use_tqdm'"):
            llm.agenerate("ab", use_tqdm=False)

    asyncio.run(main())
    check_free(llm)


def test_it_is_refused_while_another_kind_of_run_has_the_pool(llm):
    async def main():
        with closing(llm.generate_iter(["ab", "cd"], PARAMS[1])) as outputs:
            next(outputs)
            with pytest.raises(RuntimeError, match=r"another run is in progress \(generate_iter\)"):
                await anext(llm.agenerate("ab"))
        assert len(await collect(llm.agenerate("ab", PARAMS[1]))) == 1

    asyncio.run(main())


def test_close_ends_a_run_and_says_so_to_who_waits(tmp_path):
    directory = save_toy_checkpoint(tmp_path / "toy")
    llm = small_llm(directory)

    async def main():
        task = asyncio.create_task(collect(llm.agenerate(["ab", "cd"], LONG)))
        await asyncio.sleep(0.1)
        await asyncio.to_thread(llm.close)
        with pytest.raises(RuntimeError, match="this LLM was closed"):
            await task

    asyncio.run(main())
    check_no_thread()
