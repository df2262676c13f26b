"""Tensors are read by their places in the file: all of them, in order, and of the file whose header was checked."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxpaged.checkpoint.safetensors_files import read_ahead, read_headers, read_tensor

TENSORS = {
    "matrix": np.arange(60, dtype=np.float32).reshape(12, 5),
    "scalar": np.array(7.5, np.float32),
    "nothing": np.zeros((0, 4), np.float16),
    "halves": np.arange(9, dtype=np.float16),
}


@pytest.fixture
def file(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_reading_ahead_gives_every_tensor_in_the_order_asked_for(file):
    stored = read_headers([file])
    names = ["halves", "matrix", "nothing", "scalar", "halves"]
    for name, array in zip(names, read_ahead([stored[name] for name in names]), strict=True):
        assert array.dtype == TENSORS[name].dtype
        np.testing.assert_array_equal(array, TENSORS[name])


@pytest.mark.parametrize("rows", [slice(0, 12), slice(3, 7), slice(10, 99), slice(5, 5)])
def test_rows_of_a_tensor_are_read_alone(file, rows):
    np.testing.assert_array_equal(read_tensor(read_headers([file])["matrix"], rows), TENSORS["matrix"][rows])


def test_a_file_that_changed_since_its_header_was_checked_is_refused(file):
    stored = read_headers([file])
    save_file({**TENSORS, "halves": TENSORS["halves"] + 1}, file)
    with pytest.raises(ValueError, match=r"model.safetensors changed while it was read"):
        list(read_ahead([stored["halves"]]))


def test_who_stops_in_between_leaves_no_thread(file):
    stored = read_headers([file])
    reading = read_ahead([stored["matrix"]] * 50)
    next(reading)
    reading.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read")]
