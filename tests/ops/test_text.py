"""Text of unknown origin: whatever it holds, a table, a file and a terminal can hold what is made of it."""

import errno
import os

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimicbrush.errors import InputError, is_full_disk, is_out_of_memory
from mimicbrush.io.text import describe_error, make_storable, parse_json


@given(st.text(st.characters(codec=None, categories=None), max_size=40), st.integers(1, 60), st.integers(3, 200))
def test_any_text_is_storable_and_bounded(text, times, limit):
    stored = make_storable(text * times, limit)
    assert len(stored) <= limit
    assert stored.isprintable()
    assert pa.array([stored]).to_pylist() == [stored]  # Arrow encodes as UTF-8, which has no lone surrogates


def test_readable_text_stays_and_long_text_keeps_both_ends():
    assert make_storable("動画 no. 3: größer") == "動画 no. 3: größer"
    assert make_storable("bad name a\x00b\udcff.mp4\n") == r"bad name a\x00b\udcff.mp4\n"
    long = make_storable("start" + "x" * 10_000_000 + "end")
    assert (long[:5], long[-3:], len(long)) == ("start", "end", 500)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, b"\xff", "", "{"])
def test_json_that_cannot_be_read_is_one_kind_of_error(text):
    with pytest.raises(ValueError):
        parse_json(text)
    assert parse_json('{"a": [1]}') == {"a": [1]}


def test_errors_are_described_by_their_type_unless_they_are_ours():
    assert describe_error(InputError("name a file")) == "name a file"
    assert describe_error(ValueError("a\nb\udcff")) == r"ValueError: a\nb\udcff"
    assert describe_error(KeyError()) == "KeyError"
    assert len(describe_error(OSError("x" * 10_000), 100)) == len("OSError: ") + 100


def test_too_little_memory_and_a_full_disk_are_known_by_every_name():
    memory = (MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 1 GB"))
    assert all(map(is_out_of_memory, memory))
    assert not any(map(is_out_of_memory, (RuntimeError("shapes differ"), ValueError("out of memory"), OSError())))
    full = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    wrapped = InputError("it cannot be written")
    wrapped.__cause__ = full
    assert is_full_disk(full) and is_full_disk(wrapped)
    assert not is_full_disk(OSError(errno.EACCES, "")) and not is_full_disk(None)
