"""A share of the card is ours, as far as XLA was started with it."""

from __future__ import annotations

import logging
import os

import jax
import pytest

from jaxpaged.device import memory

GIB = 1 << 30


class Card:
    platform, device_kind, local_hardware_id = "gpu", "a card", 0

    def __init__(self, xla_limit):
        self.xla_limit = xla_limit

    def memory_stats(self):
        return {"bytes_limit": self.xla_limit, "bytes_in_use": 7}


@pytest.fixture
def card_of_100_gib(monkeypatch):
    monkeypatch.setattr(memory, "_card_memory", lambda device: 100 * GIB)


@pytest.fixture
def shares_at_start(monkeypatch):
    """What XLA would be started with, each time that a device is asked for."""
    for name in memory.SHARE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(memory, "_first_card", lambda: None)
    seen = []

    def devices():
        seen.append([os.environ.get(name) for name in memory.SHARE_VARIABLES])
        return ["the device"]

    monkeypatch.setattr(jax, "devices", devices)
    return seen


def test_xla_is_started_with_the_share_that_is_asked_for_and_nothing_stays_in_the_environment(shares_at_start):
    assert memory.start_device(0.85) == "the device"
    assert shares_at_start == [["0.8500", None]]
    assert not set(memory.SHARE_VARIABLES) & set(os.environ)


@pytest.mark.parametrize("free, share", [(95, "0.9474"), (100, "0.9000"), (80, "0.9700")])
def test_what_others_hold_of_the_card_is_not_taken_off_our_share(free, share, shares_at_start, monkeypatch):
    monkeypatch.setattr(memory, "_first_card", lambda: (free * GIB, 100 * GIB))
    memory.start_device(0.9)
    assert shares_at_start == [[share, None]]


@pytest.mark.parametrize("name", memory.SHARE_VARIABLES)
def test_a_share_that_the_user_has_named_stays(name, shares_at_start, monkeypatch):
    monkeypatch.setenv(name, "0.5")
    memory.start_device(0.85)
    assert shares_at_start == [["0.5" if each == name else None for each in memory.SHARE_VARIABLES]]


@pytest.mark.usefixtures("card_of_100_gib")
def test_the_share_is_of_the_card():
    assert memory.device_memory(Card(75 * GIB)) == (100 * GIB, "a card")
    assert memory.usable_memory(Card(90 * GIB), 0.9) == 90 * GIB
    assert memory.usable_memory(Card(95 * GIB), 0.9) == 90 * GIB


@pytest.mark.usefixtures("card_of_100_gib")
def test_a_warning_says_what_a_program_that_used_jax_before_loses(caplog):
    with caplog.at_level(logging.WARNING, logger="jaxpaged"):
        assert memory.usable_memory(Card(75 * GIB), 0.9) == 75 * GIB
    (message,) = caplog.messages
    assert "memory_utilization=0.9 is 90.0 GiB" in message and "XLA may allocate 75.0 GiB" in message
    assert "XLA_CLIENT_MEM_FRACTION=0.9" in message


def test_without_a_driver_the_share_is_of_what_xla_may_allocate(monkeypatch):
    def no_library(name):
        raise OSError(name)

    monkeypatch.setattr(memory.ctypes, "CDLL", no_library)
    assert memory._card_memory(Card(0)) is None
    assert memory.usable_memory(Card(50 * GIB), 0.5) == 25 * GIB


def test_on_a_cpu_the_share_is_of_main_memory():
    cpu = jax.devices("cpu")[0]
    total, owner = memory.device_memory(cpu)
    assert owner == "this machine's main memory" and memory.usable_memory(cpu, 0.25) == total // 4
