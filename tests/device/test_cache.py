"""The three caches as pytrees: what is in them, what is static, and which methods each has."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from toy import TOY

from jaxpaged.config import CacheConfig, EngineConfig
from jaxpaged.device.cache import CopiesPages, PagedCache
from jaxpaged.device.dense_cache import DenseCache, OneStepCache, make_cache
from jaxpaged.host.step.batching import Buckets, make_copies

CACHE = CacheConfig(page_size=4, num_pages=9, dtype="float32")
SYSTEMS = {"paged": PagedCache, "dense": DenseCache, "none": OneStepCache}


def cache_of(kv_cache):
    return make_cache(TOY, CACHE, EngineConfig(max_model_len=16, kv_cache=kv_cache))


@pytest.mark.parametrize(
    ("kv_cache", "shapes", "static"),
    [
        ("paged", [(9, 4, 2, 8)] * 4, {}),
        ("dense", [(2, 16, 2, 8)] * 4, {"page_size": 4}),
        ("none", [], {"max_len": 16}),
    ],
)
def test_leaves_are_the_arrays_of_the_layers_and_sizes_are_static(kv_cache, shapes, static):
    cache = cache_of(kv_cache)
    assert type(cache) is SYSTEMS[kv_cache]
    assert [leaf.shape for leaf in jax.tree.leaves(cache)] == shapes
    names = [field.name for field in dataclasses.fields(cache) if field.name not in ("k", "v")]
    assert {name: getattr(cache, name) for name in names} == static
    for name in names:
        other = cache.replace(**{name: getattr(cache, name) + 1})
        assert jax.tree.structure(other) != jax.tree.structure(cache)


@pytest.mark.parametrize("kv_cache", SYSTEMS)
def test_the_parts_of_a_cache_joined_are_the_cache(kv_cache):
    cache = cache_of(kv_cache)
    cache = jax.tree.unflatten(jax.tree.structure(cache), range(len(jax.tree.leaves(cache))))
    assert cache.joined([cache.part(0, 1), cache.part(1, 2)]) == cache


def test_a_cache_is_replaced_and_never_changed():
    cache = cache_of("paged")
    other = cache.replace(k=())
    assert (len(cache.k), len(other.k), other.v) == (2, 0, cache.v)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cache.k = ()


def test_a_cache_has_only_the_page_methods_that_it_can_do():
    def methods(kind):
        return [name for name in ("copy_pages", "gather_pages", "scatter_pages") if hasattr(kind, name)]

    assert methods(PagedCache) == ["copy_pages", "gather_pages", "scatter_pages"]
    assert methods(DenseCache) == ["copy_pages"]  # a fork of a row is a copy of its pages
    assert methods(OneStepCache) == []
    assert [isinstance(cache_of(kv_cache), CopiesPages) for kv_cache in SYSTEMS] == [True, True, False]


def test_no_program_copies_pages_where_nothing_is_kept():
    buckets = Buckets.for_limits(EngineConfig(max_model_len=16, kv_cache="none"), CACHE)
    assert buckets.copies == ()
    assert list(make_copies([], buckets)) == []
    assert Buckets.for_limits(EngineConfig(max_model_len=16), CACHE).copies != ()


def test_gathered_pages_are_scattered_back_to_other_ids():
    cache = cache_of("paged")
    rng = np.random.default_rng(0)
    cache = jax.tree.map(lambda pool: jax.numpy.asarray(rng.normal(size=pool.shape), "float32"), cache)
    moved = cache.scatter_pages(np.array([5, 7]), cache.gather_pages(np.array([1, 2])))
    for old, new in zip(jax.tree.leaves(cache), jax.tree.leaves(moved), strict=True):
        np.testing.assert_array_equal(new[np.array([5, 7])], old[np.array([1, 2])])
        np.testing.assert_array_equal(new[:5], old[:5])
