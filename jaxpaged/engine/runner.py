"""Single steps on the device, and what they need there: the parameters, the page pool, the pages that are swapped out.

A step is prepared (its arrays are made and packed), pages move, it is launched, and later its results are fetched. What
a step is for, which rows and which tokens, is the plan's; who may ask for one is the engine's business. The device does
one thing after the other, in the order of the launches: what a step writes, all that is launched behind it can read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpaged.config import CacheConfig, EngineConfig, ModelConfig
from jaxpaged.config.choices import FP8
from jaxpaged.device import steps, swap
from jaxpaged.device.attention import AttentionKernels
from jaxpaged.device.beam_tables import CarriedBeams
from jaxpaged.device.cache import PagedCache
from jaxpaged.device.dense_cache import make_cache
from jaxpaged.device.mesh import POOL, Placement
from jaxpaged.device.param_nodes import Params
from jaxpaged.device.programs import ProgramToMake
from jaxpaged.engine.lowering import static_arguments
from jaxpaged.engine.warm_up import Ahead, Progress, compile_together, no_progress
from jaxpaged.host.constraints.trie_set import TrieSet
from jaxpaged.host.pages.block_table import PageCopy
from jaxpaged.host.pages.swap import Swap
from jaxpaged.host.sequence import SequenceGroup
from jaxpaged.host.step.batching import Buckets, StepShape, make_batch, make_copies, split, with_copies
from jaxpaged.host.step.cascade import Cascade, empty_cascade, measured_rule, plan_cascade
from jaxpaged.host.step.features import SamplingFeatures
from jaxpaged.host.step.id_check import check_copies, check_ids, check_pages
from jaxpaged.host.step.sampling_batch import has_kept_history, with_carried_beams, without_history
from jaxpaged.host.step.standing_batch import BatchMaker
from jaxpaged.host.step.step_plan import SearchRows, StepPlan
from jaxpaged.step_io import (
    NULL_PAGE,
    CascadeGroups,
    DecodeBatch,
    Layout,
    MixedBatch,
    PrefillBatch,
    StepBatch,
    StepOutputs,
    TrieTables,
    num_merged_groups,
    pack,
    unpack_logprobs,
    unpack_outputs,
)

#: Beams of a search that read their prompt once for all, whether or not `cascade_attention` is asked for.
WIDE = 128

#: Of batches with prompts: one program each, of all parameters.
_STEPS = {PrefillBatch: steps.prefill_step, MixedBatch: steps.mixed_step}


class PreparedStep(NamedTuple):
    """A step as the device takes it, with the features that its arrays were made for."""

    packed: np.ndarray
    layout: Layout
    features: SamplingFeatures
    copies_before: list[PageCopy]  # those that are not part of the step
    # Its rows are those of the step before, of which it takes over the history, and what beams go on from.
    goes_on: bool = False
    keeps_beams: bool = False


class _Form(NamedTuple):
    """An empty step, for its programs, and the sizes of the history and of the tables that it takes over from the step
    before."""

    step: PreparedStep
    history_shape: tuple[int, int] | None = None
    tables_shape: tuple[int, int] | None = None


class LaunchedStep(NamedTuple):
    """A step on its way, and what its columns mean."""

    results: steps.StepResults
    layout: Layout
    features: SamplingFeatures


class StepRunner:
    """Runs steps. State: the pool and what steps carry over, which every step replaces, and the swapped pages."""

    def __init__(
        self,
        params: Params,
        model: ModelConfig,
        cache: CacheConfig,
        limits: EngineConfig,
        kernels: AttentionKernels,
        where: Placement | jax.Device,
    ):
        self.params = params
        self.placement = Placement.of(where)
        self.device = self.placement.device
        self._parts = {is_async: steps.decode_parts(params, model, is_async) for is_async in (True, False)}
        self.model = model
        self._shard = self.placement.shard(model)  # what each device computes: on one, the model
        window = model.window if limits.kv_cache == "paged" else None
        self.cache_config = cache = dataclasses.replace(cache, window=window)
        self.limits = limits
        self.kernels = kernels
        self.buckets = Buckets.for_limits(limits, cache, kernels.min_rows)
        self.remake_pool()
        self.page_bytes = cache.page_size * model.kv_bytes_per_token(jax.numpy.dtype(cache.dtype).itemsize)
        self._batches = BatchMaker(cache, model.vocab_size)
        self.cascade = self._find_cascade() if limits.cascade_attention else None
        # Without being asked: of many beams the reads that a shared prompt spares are many times those of the rule.
        can_share = kernels.max_members is not None and limits.kv_cache == "paged" and cache.dtype != FP8
        self.wide_cascade = self._find_cascade() if can_share else None
        self._beams_share: CascadeGroups | None = None  # what the rows of the latest batch of beams read once
        self._swapped: dict[SequenceGroup, list[jax.Array]] = {}
        self._ahead: Ahead | None = None
        self._to_make: list[ProgramToMake] = []  # ahead, once a step has been launched
        self._foreseen: set[tuple[StepShape, SamplingFeatures]] = set()  # what has been compiled ahead, once
        self._tries: tuple[TrieSet, TrieTables] | None = None

    def _find_cascade(self) -> Cascade:
        assert self.kernels.max_members is not None, f"{self.kernels.name} has no cascade attention"
        shard = self._shard
        most = self.kernels.max_members(shard.num_heads, shard.num_kv_heads, shard.head_dim)
        num_slots = self.cache_config.num_pages * self.cache_config.page_size * self.placement.size
        token_bytes = self.pool.k[0].nbytes * 2 // num_slots
        return Cascade(most, measured_rule(token_bytes))

    # A step

    def prepare(self, plan: StepPlan, features: SamplingFeatures) -> PreparedStep:
        """The step of a plan, in a run whose requests ask for these features."""
        batch = self._ready(self._batches.make(plan, self.buckets, features), features, plan.searches)
        if isinstance(batch, DecodeBatch) and batch.inputs.fresh_pages is not None:
            return self._prepared(batch, features)
        copies = plan.copies + [PageCopy(src, dst) for src, dst in plan.search_copies.T.tolist()]
        batch, copies_before = self._with_copies(batch, copies, features)
        return self._prepared(batch, features, copies_before)

    def prepare_batch(self, batch: StepBatch, features: SamplingFeatures) -> PreparedStep:
        """The step of arrays that were made elsewhere, without copies."""
        return PreparedStep(*pack(self._ready(batch, features)), features, [])

    @staticmethod
    def _prepared(batch: StepBatch, features: SamplingFeatures, copies_before: Sequence[PageCopy] = ()) -> PreparedStep:
        keeps_beams = isinstance(batch, DecodeBatch) and batch.inputs.fresh_pages is not None
        return PreparedStep(*pack(batch), features, list(copies_before), has_kept_history(batch), keeps_beams)

    def launch(self, step: PreparedStep) -> LaunchedStep:
        """Send the step, behind whatever is on its way already, and do not wait for it."""
        static = static_arguments(self._shard, self.kernels, step.layout, step.features)
        carried = self._with_tries(self._carried, step.features)
        carried = carried if step.goes_on else carried._replace(history=None)
        carried = carried if step.keeps_beams else carried._replace(beams=None)
        arrays = self.pool, carried, step.packed
        if step.layout[0] is DecodeBatch:
            results, self.pool = steps.decode_step(self._parts_for(step.features), *arrays, **static)
        else:
            results, self.pool = _STEPS[step.layout[0]](self.params, *arrays, **static)
        self._carried = results.carried
        if self._to_make:
            self._begin_ahead()
        return LaunchedStep(results, step.layout, step.features)

    @staticmethod
    def fetch(launched: LaunchedStep) -> StepOutputs:
        """Wait for what the host must learn of a step."""
        results, layout, features = launched
        outputs = unpack_outputs(np.asarray(results.columns), features.wanted, num_merged_groups(layout))
        if results.prompt_columns is None:
            return outputs
        prompt = unpack_logprobs(np.asarray(results.prompt_columns), features.num_prompt_logprobs)
        return outputs._replace(prompt_logprobs=prompt)

    def _with_tries(self, carried: steps.Carried, features: SamplingFeatures) -> steps.Carried:
        """With the tries of a run, which are on the device from the first one that needs them until another needs
        others, and with a node for every row, whether or not the step before has left some."""
        if features.tries is None:
            return carried._replace(nodes=None)
        if self._tries is None or self._tries[0] != features.tries:
            tables = features.tries.tables(self.model.vocab_size)
            self._tries = features.tries, self.placement.put(tables)
        nodes = carried.tokens if carried.nodes is None else carried.nodes
        return carried._replace(nodes=nodes, tries=self._tries[1])

    def run(self, step: PreparedStep) -> StepOutputs:
        return self.fetch(self.launch(step))

    def _ready(self, batch: StepBatch, features: SamplingFeatures, searches: Sequence[SearchRows] = ()) -> StepBatch:
        """The batch, its ids checked, with the prefixes that it is to read once."""
        check_ids(batch.inputs, self.cache_config)
        if not isinstance(batch, DecodeBatch) or (cascade := self._cascade_of(features)) is None:
            return batch
        if batch.inputs.fresh_pages is not None:
            return batch._replace(inputs=batch.inputs._replace(cascade_groups=self._beams_share))
        batch = plan_cascade(batch, self.cache_config.page_size, cascade, searches)
        self._beams_share = batch.inputs.cascade_groups
        return batch

    def _with_copies(
        self, batch: StepBatch, copies: list[PageCopy], features: SamplingFeatures
    ) -> tuple[StepBatch, list[PageCopy]]:
        """The batch with these copies in its step, which spares their launch, where it takes such a list; and those
        that are to be made before it.

        In a run whose requests have samples every decode step takes one, so that there is one program, not two.
        """
        takes_list = features.has_samples and self.kernels.copies_in_steps
        if not (takes_list and isinstance(batch, DecodeBatch)):
            return batch, copies
        if len(copies) > len(batch.inputs.tokens):  # forks between chunks copy whole sequences
            return with_copies(batch, []), copies
        batch = with_copies(batch, copies)
        check_copies(batch.inputs.copies, self.cache_config)
        return batch, []

    def _cascade_of(self, features: SamplingFeatures) -> Cascade | None:
        """How decode steps share prefixes: not at all where no samples or beams could, nor requests of one prefix."""
        if features.merged_widths is not None and features.merged_widths[1] >= WIDE:
            return self.cascade or self.wide_cascade
        return self.cascade if features.has_samples or features.has_prefix else None

    def _parts_for(self, features: SamplingFeatures) -> tuple[steps.DecodePart, ...]:
        return self._parts[self.limits.async_scheduling and features.can_run_ahead]

    # Pages that move

    @property
    def pages(self) -> PagedCache:
        """The pool of a system whose pages can leave it."""
        assert isinstance(self.pool, PagedCache), f"a {type(self.pool).__name__} has no pages to swap"
        return self.pool

    @property
    def has_lost_pool(self) -> bool:
        """Whether a step that was interrupted had taken the pool by donation and never gave it back, or one that failed
        left an error in its place. Waits for the last step that was launched."""
        if any(pool.is_deleted() for pool in self.pool.k):
            return True
        try:
            jax.block_until_ready(self._carried)
        except jax.errors.JaxRuntimeError:
            return True
        return False

    def remake_pool(self) -> None:
        self.pool = make_cache(self._shard, self.cache_config, self.limits, self.placement.lay(POOL))
        self._carried = steps.Carried(self.placement.put(np.zeros(self.buckets.decode_rows[-1], np.int32)))

    def free(self) -> None:
        """Give back the device's memory, weights included; whoever still has the arrays has nothing. For the end."""
        self.stop_ahead()
        held = self.pool, self._carried, list(self._swapped.values()), self.params, self._parts, self._tries
        for array in jax.tree.leaves(held):
            if isinstance(array, jax.Array) and not array.is_deleted():
                array.delete()
        self.forget_swapped()

    def copy_pages(self, copies: list[PageCopy]) -> None:
        for part in make_copies(copies, self.buckets):
            self.copy_arrays(part)

    def copy_arrays(self, copies: np.ndarray) -> None:
        """copies i32[2, C] as `make_copies` pads them: source and destination pages."""
        check_copies(copies, self.cache_config)
        self.pool = steps.copy_pages(self.pool, copies, kernels=self.kernels)

    def swap(self, one: Swap) -> None:
        """Carry out one swap, and wait for it."""
        page_ids = np.array(one.page_ids, np.int32)
        check_pages(page_ids, self.cache_config)
        if one.is_out:
            self._swapped[one.group] = self._fetch(page_ids)
        else:
            self.pool = swap.restore_pages(self.pages, page_ids, self._swapped.pop(one.group), self.placement)

    def forget_swapped(self) -> None:
        self._swapped.clear()

    def _fetch(self, page_ids: np.ndarray) -> list[jax.Array]:
        sizes = split(len(page_ids), self.buckets.swaps)
        return swap.fetch_pages(self.pages, page_ids, sizes, swap.host_memory(self.placement), self.placement)

    # Programs ahead of need

    def compile_steps(self, features: SamplingFeatures, progress: Progress = no_progress) -> None:
        """Compile every step that a run of these features can need, narrow tables first, and run each once, empty; and
        every copy and swap."""
        mixed = self.buckets.mixed_shapes() if features.draws_tokens else []
        shapes = sorted(self.buckets.shapes() + mixed, key=lambda shape: shape.table_width)
        forms = [form for shape in shapes for form in self._forms(shape, features)]
        compile_together([program for form in forms for program in self._programs(form)], progress)
        for form in forms:
            self.run(form.step)
        self.compile_copies()
        for size in self.buckets.swaps:
            nothing = np.full(size, NULL_PAGE, np.int32)
            self.pool = swap.restore_pages(self.pages, nothing, self._fetch(nothing), self.placement)

    def compile_ahead(self, shapes: list[StepShape], features: SamplingFeatures, behind_first: bool = False) -> None:
        """Compile the programs of steps of these shapes while the caller goes on, until he says `stop_ahead`.

        `behind_first`: not before the next step has been launched, whose program has the compiler to itself until then.
        """
        new = [shape for shape in shapes if (shape, features) not in self._foreseen]
        self._foreseen.update((shape, features) for shape in new)
        programs = [one for shape in new for form in self._forms(shape, features) for one in self._programs(form)]
        missing = [one for one in programs if not one.is_there]
        self._to_make = missing
        if not behind_first:
            self._begin_ahead()

    def _begin_ahead(self) -> None:
        self._ahead, self._to_make = Ahead(self._to_make) if self._to_make else None, []

    def stop_ahead(self) -> None:
        """What has not been begun is not compiled, but may be foreseen again."""
        is_cut_off = bool(self._to_make) or (self._ahead is not None and self._ahead.stop())
        self._to_make, self._ahead = [], None
        if is_cut_off:
            self._foreseen.clear()

    def compile_step(self, batch: StepBatch, features: SamplingFeatures) -> None:
        """Run an empty batch in all its forms, so that the programs for such batches are there."""
        for form in self._forms_of(batch, features):
            self.run(form.step)

    def compile_copies(self) -> None:
        for size in self.buckets.copies:
            self.copy_arrays(np.full((2, size), NULL_PAGE, np.int32))

    def programs(self, shape: StepShape, features: SamplingFeatures) -> list[ProgramToMake]:
        """The programs of a step of this shape: its steps find them once they are compiled, which threads may do."""
        batch = self._with_copies(self._ready(self._nothing(shape, features), features), [], features)[0]
        return self._programs(_Form(PreparedStep(*pack(batch), features, [])))

    def _forms(self, shape: StepShape, features: SamplingFeatures) -> Iterator[_Form]:
        return self._forms_of(self._with_copies(self._nothing(shape, features), [], features)[0], features)

    def _forms_of(self, batch: StepBatch, features: SamplingFeatures) -> Iterator[_Form]:
        """A batch with and without a cascade, with its history and with the one that the device has."""
        batches = [batch]
        if isinstance(batch, DecodeBatch) and (cascade := self._cascade_of(features)) is not None:
            batches += [shared] if (shared := empty_cascade(batch, cascade)) is not None else []
        for one in batches:
            yield _Form(PreparedStep(*pack(one), features, []))
            if not isinstance(one, DecodeBatch):
                continue
            if features.needs_history and features.draws_tokens:
                yield _Form(self._prepared(without_history(one), features), one.sampling.history.shape)
            if features.merged_widths is not None and self.limits.kv_cache == "paged":
                yield from self._forms_of_beams(one, features)

    def _forms_of_beams(self, batch: DecodeBatch, features: SamplingFeatures) -> Iterator[_Form]:
        """Going on from tables that the device has, as wide as these or as the next narrower ones were."""
        shape = batch.inputs.block_tables.shape
        history = batch.sampling.history.shape if features.needs_history else None
        widths = self.buckets.table_widths
        for width in widths[widths.index(shape[1]) :][:2]:
            yield _Form(self._prepared(with_carried_beams(batch, width), features), history, shape)

    def _programs(self, form: _Form) -> list[ProgramToMake]:
        step = form.step
        carried = self._with_tries(self._carried_as(form), step.features)
        arguments = self.pool, carried, step.packed
        static = static_arguments(self._shard, self.kernels, step.layout, step.features)
        if step.layout[0] is DecodeBatch:
            return steps.decode_programs(self._parts_for(step.features), *arguments, **static)
        return [_STEPS[step.layout[0]].to_make(self.params, *arguments, **static)]

    def _carried_as(self, form: _Form) -> steps.Carried:
        """What the step takes over from the one before, empty."""
        shape: Any = self.placement.struct
        history = None if form.history_shape is None else shape(form.history_shape, np.int32)
        beams = None
        if form.tables_shape is not None:
            rows = form.tables_shape[:1]
            tables = shape(form.tables_shape, np.int32)
            beams = CarriedBeams(tables, shape(rows, np.int32), shape(rows, np.float32))
        return self._carried._replace(history=history, beams=beams)

    def _nothing(self, shape: StepShape, features: SamplingFeatures) -> StepBatch:
        nothing = StepPlan(is_prefill=shape.num_tokens is not None)
        return make_batch(nothing, shape, self.cache_config, self.model.vocab_size, features)
