"""Which attention runs: "auto" takes what the device, the model and the cache allow; "pallas" runs or says why not."""

from __future__ import annotations

import logging

import jax
import pytest

from jaxpaged.device.attention import REFERENCE, resolve_attention

HAS_NEW_JAX = jax.__version_info__ >= (0, 11)
needs_new_jax = pytest.mark.skipif(not HAS_NEW_JAX, reason="the kernels need JAX 0.11")
CACHE = {"head_dim": 128, "page_size": 16, "dtype": "bfloat16"}


class FakeDevice:
    def __init__(self, device_kind="NVIDIA H200", compute_capability="9.0", platform="gpu"):
        self.device_kind = device_kind
        self.compute_capability = compute_capability
        self.platform = platform


@needs_new_jax
@pytest.mark.parametrize("requested", ["auto", "pallas"])
def test_a_hopper_gpu_runs_the_kernels(requested):
    kernels = resolve_attention(requested, FakeDevice(), **CACHE)
    assert kernels.name == "pallas"
    assert hash(kernels) == hash(resolve_attention(requested, FakeDevice(), **CACHE))  # one program for both
    assert resolve_attention("reference", FakeDevice(), **CACHE) is REFERENCE
    assert resolve_attention(requested, FakeDevice(), **CACHE, kv_dtype="float8_e4m3fn") is kernels


@needs_new_jax
def test_batch_invariant_kernels_are_another_decode_and_one_object_for_all():
    plain = resolve_attention("pallas", FakeDevice(), **CACHE)
    invariant = resolve_attention("auto", FakeDevice(), **CACHE, batch_invariant=True)
    assert invariant is resolve_attention("pallas", FakeDevice(), **CACHE, batch_invariant=True)
    assert invariant.is_batch_invariant and not plain.is_batch_invariant and not REFERENCE.is_batch_invariant
    assert invariant.paged_decode.func is plain.paged_decode
    assert invariant.paged_decode.keywords == {"batch_invariant": True}
    assert invariant.cascade_decode is None and invariant.copies_in_steps


CPU = FakeDevice("cpu", platform="cpu")
OBSTACLES = [
    pytest.param(FakeDevice("NVIDIA A100", "8.0"), {}, "NVIDIA A100: they need a Hopper GPU .* has 8.0", id="ampere"),
    pytest.param(FakeDevice("NVIDIA B200", "10.0"), {}, "NVIDIA B200: they need .* has 10.0", id="blackwell"),
    pytest.param(CPU, {}, "on cpu: they need a Hopper GPU .*, this is cpu", id="cpu"),
    pytest.param(FakeDevice(), {"head_dim": 8}, "they run head_dim 64, 80, 96, 128, 256, this is 8", id="head_dim"),
    pytest.param(FakeDevice(), {"page_size": 4}, "they run page_size 8, 16, .*, this is 4", id="page_size"),
    pytest.param(
        FakeDevice(),
        {"head_dim": 80, "kv_dtype": "float8_e4m3fn"},
        "they run float8_e4m3fn pages with a head_dim that is a multiple of 32, this is 80",
        id="fp8-head_dim",
    ),
    pytest.param(FakeDevice(), {"dtype": "float32"}, "they run dtype bfloat16, float16, this is float32", id="dtype"),
]


@needs_new_jax
@pytest.mark.parametrize(("device", "change", "message"), OBSTACLES)
def test_where_the_kernels_cannot_run_auto_says_why_and_pallas_refuses(device, change, message, caplog):
    with pytest.raises(ValueError, match=f"attention='pallas' .*{message}; or choose attention='reference'"):
        resolve_attention("pallas", device, **{**CACHE, **change})
    with caplog.at_level(logging.INFO, "jaxpaged"):
        assert resolve_attention("auto", device, **{**CACHE, **change}) is REFERENCE
    assert caplog.text.count("'auto' is 'reference'") == 1


@pytest.mark.skipif(HAS_NEW_JAX, reason="what an older JAX is told")
def test_an_old_jax_is_named_as_the_obstacle():
    with pytest.raises(ValueError, match="they need JAX 0.11 or newer, this is 0.10"):
        resolve_attention("pallas", FakeDevice(), **CACHE)
    assert resolve_attention("auto", FakeDevice(), **CACHE) is REFERENCE


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="attention='flash'; choose one of auto, pallas, reference"):
        resolve_attention("flash", CPU, **CACHE)
