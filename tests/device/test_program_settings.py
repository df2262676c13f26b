"""Programs know the settings of JAX that they were made by, as those of `jax.jit` do."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp

from jaxpaged.device.programs import reads_cache


def precision(cache, _):
    """What the step is traced by."""
    values = {None: 0, "highest": 1}
    return cache[0] * 0 + values[jax.config.jax_default_matmul_precision]


STEP = reads_cache(precision)
ARGS = jnp.zeros(2), jnp.zeros(1)


def test_a_step_is_made_anew_where_settings_have_changed():
    before = STEP(*ARGS)
    with jax.default_matmul_precision("highest"):
        within = STEP(*ARGS)
    assert (int(before), int(within), int(STEP(*ARGS))) == (0, 1, 0)


def test_a_thread_without_the_settings_of_who_asked_makes_nothing():
    with jax.default_matmul_precision("highest"):
        to_make = STEP.to_make(jnp.zeros(3), jnp.zeros(1))
        thread = threading.Thread(target=to_make.compile_ahead)
        thread.start()
        thread.join()
        assert not to_make.is_there
        to_make.compile_ahead()
        assert to_make.is_there
        assert int(STEP(jnp.zeros(3), jnp.zeros(1))) == 1
