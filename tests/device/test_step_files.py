"""Names of steps in files: what another process may compute otherwise under the same words has none."""

from __future__ import annotations

import dataclasses
import functools
import os
from enum import Enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from toy import TOY

from jaxpaged.device import model, program_files, steps
from jaxpaged.device.attention import REFERENCE
from jaxpaged.device.step_files import made_by, step_name


@dataclasses.dataclass(frozen=True)
class Boost:
    token: int

    def __call__(self, token_ids, num_tokens, logits):
        return logits.at[self.token].add(1.0)


class BoostByName(NamedTuple):
    token: int

    def __call__(self, token_ids, num_tokens, logits):
        return logits.at[self.token].add(1.0)


class Kind(Enum):
    ONE = 1

    def __call__(self, token_ids, num_tokens, logits):
        return logits


class Number(int):
    def __call__(self, token_ids, num_tokens, logits):
        return logits


@functools.wraps(jnp.where)
def looks_like_jax(token_ids, num_tokens, logits):
    return logits


def name_with(processors):
    return step_name(steps.decode_layers.function, {"config": TOY, "kernels": REFERENCE, "processors": processors})


def test_a_step_without_a_users_functions_has_a_name():
    assert name_with(()) is not None


@pytest.mark.parametrize("processor", [Boost(3), BoostByName(3), Kind.ONE, Number(3), looks_like_jax])
def test_a_step_with_a_users_object_has_none_however_it_is_made(processor):
    assert name_with((processor,)) is None


def test_a_step_of_patched_code_has_no_name(monkeypatch):
    monkeypatch.setattr(model, "project", lambda *args: None, raising=False)
    assert name_with(()) is None


def test_code_that_was_changed_when_it_had_been_read_is_nobody_elses(monkeypatch):
    digests = program_files.code_digest.__wrapped__(), program_files.code_digest.__wrapped__()
    assert digests[0] == digests[1]
    monkeypatch.setattr(program_files, "IMPORTED", os.stat(program_files.__file__).st_ctime - 1)
    digests = program_files.code_digest.__wrapped__(), program_files.code_digest.__wrapped__()
    assert digests[0] != digests[1]


def test_a_setting_that_changes_what_is_computed_has_log_in_its_name():
    before, setting = made_by(), jax.config.values["jax_use_hlo_logistic_lowering"]
    jax.config.update("jax_use_hlo_logistic_lowering", not setting)
    try:
        assert made_by() != before
    finally:
        jax.config.update("jax_use_hlo_logistic_lowering", setting)
