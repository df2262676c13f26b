"""Random runs for the contract that a request's result depends on the request alone, and what each of its results is.

A run is some requests of a few kinds, an engine to run them on together, and what happens before. `random_runs` draws
them from a seed. Requests of a kind differ in their numbers, not in what they need compiled, since compiling takes most
of the time; so does the engine, which serves a few runs before the next is made.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import tokenizers
from paths import GOLDENS

from jaxpaged import LLM, BeamSearchParams, RequestOutput, SamplingParams
from jaxpaged.config import CacheConfig
from jaxpaged.host.scheduler import Scheduler

MODELS = tuple(sorted(path.parent.name for path in GOLDENS.glob("*/beams.json")))
VOCABULARY, END = 128, 2  # of all of them
MAX_MODEL_LEN, MAX_NUM_SEQS = 40, 16

#: How a request is run alone: with pages to spare.
ALONE = dict(page_size=16, num_pages=100, max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=64)
#: Rows of decode steps, alone and together: few sizes, since each is a program.
ALONE_ROWS, BESIDE_ROWS = (MAX_NUM_SEQS,), (4, MAX_NUM_SEQS)
SYSTEMS = (
    "contiguous-max", "contiguous-pow2", "contiguous-oracle", "dense", "dense-static", "dense-static-global",
    "none",
)  # fmt: skip
PAGE_SIZES = (1, 2, 3, 4, 8, 16, 32, 64)
#: Of each model so many engines, and of each engine so many runs.
ENGINES, RUNS_OF_ENGINE = 5, 4

Params = SamplingParams | BeamSearchParams


def letter_tokenizer() -> tokenizers.Tokenizer:
    """A letter or sign for each token of the goldens' vocabulary, but for "<pad>", "<s>", "</s>", the first three."""
    letters = [*map(chr, range(32, 127)), *map(chr, range(0x3B1, 0x3B1 + VOCABULARY - 98))]
    vocab = {"<pad>": 0, "<s>": 1, "</s>": END, **{letter: 3 + i for i, letter in enumerate(letters)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    return tokenizer


# Logits processors: what two of them make depends on which comes first, and one makes candidates tie.


def halved(token_ids, num_tokens, logits):
    return logits * 0.5


def raised(token_ids, num_tokens, logits):
    return logits + (jnp.arange(VOCABULARY) % 3).astype(logits.dtype)


def tied(token_ids, num_tokens, logits):
    """Out of seven values, by the tokens so far: nearly all continuations have others of the same score."""
    known = jnp.where(jnp.arange(len(token_ids)) < num_tokens, token_ids, 0).sum()
    return -((known + jnp.arange(VOCABULARY) * 5) % 7).astype(logits.dtype)


# Kinds of requests


def _tokens(rng: random.Random, count: int) -> list[int]:
    return rng.sample(range(3, VOCABULARY), count)


def _letters(rng: random.Random, count: int) -> list[str]:
    return [chr(rng.randrange(33, 127)) for _ in range(count)]


def _bias(rng: random.Random) -> dict[int, float]:
    return {token: rng.choice([-100.0, -2.0, 1.5, 4.0, 30.0]) for token in _tokens(rng, 3)}


def _sample(rng: random.Random, **params: Any) -> SamplingParams:
    given = dict(temperature=rng.choice([0.3, 0.8, 1.0, 1.7]), seed=rng.getrandbits(40), max_tokens=rng.randint(4, 12))
    return SamplingParams(**{**given, **params})


def _beams(rng: random.Random, **params: Any) -> BeamSearchParams:
    given = dict(
        beam_width=rng.randint(2, 4), max_tokens=rng.randint(3, 9), early_stopping=rng.choice([False, True, "never"]),
        length_penalty=rng.choice([-1.0, 0.0, 0.7, 1.0, 2.0]), ignore_eos=rng.random() < 0.3,
    )  # fmt: skip
    return BeamSearchParams(**{**given, **params})


def _diverse(rng: random.Random, **params: Any) -> BeamSearchParams:
    width, groups = rng.choice([(4, 2), (6, 3), (6, 6)])  # which need equal programs
    strength = rng.choice([0.3, 0.8, 2.0])
    return _beams(rng, beam_width=width, num_beam_groups=groups, diversity_penalty=strength, **params)


def _drawn(rng: random.Random, **params: Any) -> BeamSearchParams:
    temperature, seed = rng.choice([0.5, 1.0, 1.5]), rng.getrandbits(40)
    return _beams(
        rng, **{"do_sample": True, "temperature": temperature, "seed": seed, "beam_width": rng.randint(3, 4), **params}
    )


def _penalties(rng: random.Random) -> dict[str, float]:
    return dict(
        repetition_penalty=rng.choice([0.8, 1.0, 1.3]), presence_penalty=rng.choice([-0.5, 0.0, 1.0]),
        frequency_penalty=rng.choice([0.2, 0.7]),
    )  # fmt: skip


def _processors(rng: random.Random) -> list[Callable]:
    return rng.choice([[halved, raised], [raised, halved]])


KINDS: dict[str, Callable[[random.Random], Params]] = {
    "greedy": lambda rng: SamplingParams(temperature=0, max_tokens=rng.randint(1, 14)),
    "samples": lambda rng: _sample(rng, n=2, best_of=rng.choice([None, 4])),
    "filtered": lambda rng: _sample(
        rng, top_p=rng.choice([1.0, 0.9, 0.5]), top_k=rng.choice([0, 5, 40]), min_p=rng.choice([0.0, 0.05])
    ),
    "penalised": lambda rng: _sample(rng, **_penalties(rng)),
    "biased": lambda rng: _sample(rng, logit_bias=_bias(rng), min_tokens=4, stop_token_ids=_tokens(rng, 2)),
    "restricted": lambda rng: _sample(rng, n=2, allowed_token_ids=_tokens(rng, 6)),
    "stopped": lambda rng: _sample(
        rng, stop=_letters(rng, 12), bad_words=_letters(rng, 2), stop_token_ids=_tokens(rng, 12),
        include_stop_str_in_output=rng.random() < 0.5,
    ),
    "processed": lambda rng: _sample(rng, logits_processors=_processors(rng)),
    "known": lambda rng: _sample(rng, n=2, logprobs=rng.choice([0, 3])),
    "known whole": lambda rng: _sample(rng, logprobs=-1, prompt_logprobs=rng.randint(0, 5)),
    "beams": _beams,
    "drawn": _drawn,
    "diverse": _diverse,
    "wide": lambda rng: rng.choice([_beams, _drawn])(
        rng, beam_width=8, stop_token_ids=_tokens(rng, 3), max_tokens=rng.randint(2, 6)
    ),
    "known beams": lambda rng: rng.choice([_beams, _drawn, _diverse])(rng, logprobs=2),
    "changed beams": lambda rng: rng.choice([_beams, _drawn, _diverse])(rng, logit_bias=_bias(rng), **_penalties(rng)),
    "few beams": lambda rng: rng.choice([_beams, _drawn])(rng, allowed_token_ids=_tokens(rng, rng.randint(3, 8))),
    "stopped beams": lambda rng: rng.choice([_beams, _drawn, _diverse])(
        rng, stop=_letters(rng, 12), min_tokens=rng.choice([0, 3]), stop_token_ids=_tokens(rng, 2)
    ),
    "processed beams": lambda rng: _beams(rng, logits_processors=_processors(rng)),
    "tied beams": lambda rng: rng.choice([_beams, _drawn, _diverse])(rng, logits_processors=[tied]),
}  # fmt: skip
#: Kinds that every model has, and of the others so many: what one of these needs of a step changes what the others are
#: chosen by.
COMMON, NUM_OTHERS = ("drawn", "diverse"), 6


# Runs


@dataclass(frozen=True)
class Request:
    kind: str
    prompt: list[int]
    params: Params


@dataclass(frozen=True)
class Run:
    """Requests that run together on an engine with these options, behind a prefix or None, after what comes before."""

    seed: int
    model: str
    options: dict[str, Any]
    requests: list[Request]
    prefix: list[int] | None = None
    arrival_times: list[float] | None = None
    before: str = "nothing"  # or "warm_up", "dropped run"

    @property
    def whole_prompts(self) -> list[list[int]]:
        return [(self.prefix or []) + request.prompt for request in self.requests]

    def of(self, places: list[int]) -> Run:
        """The same with these of its requests alone."""
        times = None if self.arrival_times is None else [self.arrival_times[i] for i in places]
        return dataclasses.replace(self, requests=[self.requests[i] for i in places], arrival_times=times)

    def __str__(self) -> str:
        """What does it again."""
        options = {**self.options, "max_model_len": MAX_MODEL_LEN, "dtype": "float32"}
        rest = f", shared_prefix={self.prefix}" if self.prefix else ""
        rest += f", arrival_times={self.arrival_times}" if self.arrival_times else ""
        params = ",\n   ".join(_params_in_words(request.params) for request in self.requests)
        return (
            f"# run {self.seed} of {self.model}, before it: {self.before}\n"
            f'llm = LLM("tests/goldens/{self.model}", tokenizer=letter_tokenizer_file, **{options})\n'
            f"llm.generate(\n  {[request.prompt for request in self.requests]},\n  [{params}]{rest})"
        )


def _params_in_words(params: Params) -> str:
    given = []
    for one in dataclasses.fields(params):
        value = getattr(params, one.name)
        if value != one.default:
            words = [f.__name__ for f in value] if one.name == "logits_processors" else value
            given.append(f"{one.name}={words!r}")
    return f"{type(params).__name__}({', '.join(given)})"


def random_runs(
    model: str, engine_seed: int, llm: LLM, kinds: Sequence[str] = (), options: dict[str, Any] | None = None
) -> list[Run]:
    """Some runs for one engine, by default one whose pool just holds the largest of their requests, or little more."""
    number = MODELS.index(model) * ENGINES + engine_seed
    rng = random.Random(number)
    chosen = list(kinds) or rng.choices(_kinds_of(model), k=rng.randint(3, 7))
    is_given, options = options is not None, options or _random_options(rng, number, llm)
    runs = []
    for i in range(RUNS_OF_ENGINE):
        has_prefix = rng.random() < 0.25
        requests = [_random_request(rng, kind, has_prefix) for kind in rng.sample(chosen, len(chosen))]
        arrivals = [rng.uniform(0, 0.03) for _ in requests] if rng.random() < 0.2 else None
        runs.append(
            Run(
                number * RUNS_OF_ENGINE + i, model, options, requests,
                _prompt(rng, 9) if has_prefix else None, arrivals,
                rng.choices(["nothing", "warm_up", "dropped run"], [4, 1, 1])[0],
            )
        )  # fmt: skip
    if not is_given:
        options["num_pages"] = _smallest_pool(runs, llm) + rng.choice([0, 0, 1, 3, 8])
    return runs


def _kinds_of(model: str) -> list[str]:
    others = [kind for kind in KINDS if kind not in COMMON]
    start = MODELS.index(model) * NUM_OTHERS
    return [*COMMON, *(others[i % len(others)] for i in range(start, start + NUM_OTHERS))]


def _random_request(rng: random.Random, kind: str, has_prefix: bool) -> Request:
    params = KINDS[kind](rng)
    if has_prefix:
        params = dataclasses.replace(params, prompt_logprobs=None)
    return Request(kind, _prompt(rng, 12), params)


def _prompt(rng: random.Random, longest: int) -> list[int]:
    return [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, longest))]


def _random_options(rng: random.Random, number: int, llm: LLM) -> dict[str, Any]:
    """An engine's options but for `num_pages`: every system and page size comes, some have swap space for few pages."""
    page_size = PAGE_SIZES[number % len(PAGE_SIZES)]
    kv_cache = SYSTEMS[number // 3 % len(SYSTEMS)] if number % 3 == 2 else "paged"
    swapped_pages = rng.choice([6, 1000])
    page_bytes = page_size * llm.engine.model.kv_bytes_per_token(4)
    return dict(
        page_size=page_size,
        kv_cache=kv_cache,
        preemption="swap" if number % 3 == 0 else rng.choice(["recompute", "auto"]),
        swap_space_gib=swapped_pages * page_bytes / (1 << 30),
        watermark=rng.choice([0.0, 0.01, 0.3]),
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=256 if kv_cache == "none" else rng.choice([4, 16, 64]),  # it takes whole sequences
    )


def _smallest_pool(runs: list[Run], llm: LLM) -> int:
    """Pages of the smallest pool on which each request of the runs can run."""
    options = runs[0].options
    limits = dataclasses.replace(
        llm.engine.limits, kv_cache=options["kv_cache"], max_num_batched_tokens=options["max_num_batched_tokens"]
    )
    needs = [
        (len(prompt), request.params.num_samples, min(len(prompt) + (request.params.max_tokens or 0), MAX_MODEL_LEN),
         len(run.prefix or ()) if options["kv_cache"] == "paged" else 0)
        for run in runs
        for request, prompt in zip(run.requests, run.whole_prompts, strict=True)
    ]  # fmt: skip

    def fits(num_pages: int) -> bool:
        try:
            scheduler = Scheduler(CacheConfig(options["page_size"], num_pages, "float32"), limits)
            for need in needs:
                scheduler.check(*need)
        except ValueError:
            return False
        return True

    return next(count for count in range(2, 2000) if fits(count))


# Results


@dataclass
class Tally:
    """What the runs did, so that a test can tell that they did what it is about."""

    runs: int = 0
    requests: int = 0
    counts: Counter = field(default_factory=Counter)  # of events, systems, kinds, page sizes

    def add(self, run: Run, llm: LLM) -> None:
        stats, options = llm.last_run, run.options
        self.runs += 1
        self.requests += len(run.requests)
        self.counts.update(
            preemptions=stats.preemptions, swaps=stats.swaps_in, recomputations=stats.preemptions - stats.swaps_out,
            copies=stats.page_copies, steps=stats.steps,
        )  # fmt: skip
        self.counts["swap overflows"] += stats.swap_overflows
        self.counts.update([options["kv_cache"], f"page size {options['page_size']}", f"before: {run.before}"])
        self.counts.update(request.kind for request in run.requests)
        self.counts.update(["prefix"] * bool(run.prefix) + ["arrivals"] * bool(run.arrival_times))

    def add_all(self, other: Tally) -> None:
        self.runs += other.runs
        self.requests += other.requests
        self.counts.update(other.counts)

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items()))
        return f"{self.runs} runs of {self.requests} requests: {counts}"


class Checker:
    """One model twice: `alone` runs each request by itself and waits for every step, `beside` runs it in its run."""

    def __init__(self, model: str, tokenizer_file: Path):
        self.model = model
        fixed: dict[str, Any] = dict(tokenizer=tokenizer_file, dtype="float32", max_model_len=MAX_MODEL_LEN)
        self.alone = LLM(GOLDENS / model, **fixed, **ALONE, async_scheduling=False)
        self.beside = LLM(GOLDENS / model, **fixed, **ALONE)
        self.tally = Tally()
        _set_rows(self.alone, ALONE_ROWS)

    def check(self, runs: list[Run]) -> Iterator[str]:
        """Runs of one engine: for each request whose result is another, in words which and how to see it."""
        self.beside.rebuild(**runs[0].options)
        _set_rows(self.beside, BESIDE_ROWS)
        for run in runs:
            expected = [self._alone(run, i) for i in range(len(run.requests))]
            found = self._beside(run)
            self.tally.add(run, self.beside)
            for i, (one, other) in enumerate(zip(expected, found, strict=True)):
                if difference := difference_of(one, other):
                    smallest, place = self._smallest(run, i)
                    yield f"request {place} alone and beside the others: {difference}\n{smallest}"

    def _alone(self, run: Run, place: int) -> RequestOutput:
        return self.alone.generate([run.whole_prompts[place]], run.requests[place].params, progress=False)[0]

    def _beside(self, run: Run) -> list[RequestOutput]:
        llm, params = self.beside, [request.params for request in run.requests]
        prompts = [request.prompt for request in run.requests]
        if run.before == "warm_up":
            llm.warm_up(params)
        elif run.before == "dropped run":
            with closing(llm.generate_iter(prompts, params, shared_prefix=run.prefix)) as results:
                next(results)
        results = llm.generate_iter(prompts, params, None, run.arrival_times, run.prefix)
        return sorted(results, key=lambda output: int(output.request_id))

    def _smallest(self, run: Run, place: int) -> tuple[Run, int]:
        """The run without the requests that need not be there for this one to differ, and its place in it."""
        expected, kept = self._alone(run, place), list(range(len(run.requests)))
        for other in range(len(run.requests)):
            fewer = [i for i in kept if i != other]
            if other != place and difference_of(expected, self._beside(run.of(fewer))[fewer.index(place)]):
                kept = fewer
        return run.of(kept), kept.index(place)


def _set_rows(llm: LLM, decode_rows: tuple[int, ...]) -> None:
    llm.engine.runner.buckets = dataclasses.replace(llm.engine.runner.buckets, decode_rows=decode_rows)


#: Between programs sums go in another order. Of a whole search it is its scores' difference, of some tens of terms.
TOLERANCE = 2e-5


def difference_of(one: RequestOutput, other: RequestOutput) -> str | None:
    """What differs, in words: anything but log-probabilities at all, and those by more than rounding."""
    if one.prompt_token_ids != other.prompt_token_ids:
        return f"prompts {one.prompt_token_ids} and {other.prompt_token_ids}"
    if len(one.outputs) != len(other.outputs):
        return f"{len(one.outputs)} and {len(other.outputs)} outputs"
    for a, b in zip(one.outputs, other.outputs, strict=True):
        for name in ("token_ids", "finish_reason", "stop_reason", "text", "index"):
            if getattr(a, name) != getattr(b, name):
                return f"{name} of output {a.index}: {getattr(a, name)!r} and {getattr(b, name)!r}"
        for name in ("cumulative_logprob", "score"):
            if not _is_close(getattr(a, name), getattr(b, name)):
                return f"{name} of output {a.index}: {getattr(a, name)} and {getattr(b, name)}"
        if not _are_alike(a.logprobs, b.logprobs):
            return f"logprobs of output {a.index}: {a.logprobs} and {b.logprobs}"
    if not _are_alike(one.prompt_logprobs, other.prompt_logprobs):
        return f"prompt_logprobs: {one.prompt_logprobs} and {other.prompt_logprobs}"
    return None


def _is_close(a: float | None, b: float | None) -> bool:
    return a == b or (a is not None and b is not None and abs(a - b) <= TOLERANCE * max(1.0, abs(a)))


def _are_alike(one: list | None, other: list | None) -> bool:
    """Whether two lists of entries say the same, where tokens that are as likely may change places."""
    if one is None or other is None:
        return one is other
    return len(one) == len(other) and all(_is_alike(a or {}, b or {}) for a, b in zip(one, other, strict=True))


def _is_alike(one: dict, other: dict) -> bool:
    in_order = [sorted((entry.logprob for entry in entries.values()), reverse=True) for entries in (one, other)]
    return (
        len(one) == len(other)
        and all(map(_is_close, *in_order))
        and all(_is_close(one[token].logprob, other[token].logprob) for token in one.keys() & other.keys())
        and all(abs(one[token].rank - other[token].rank) <= 1 for token in one.keys() & other.keys())
    )
