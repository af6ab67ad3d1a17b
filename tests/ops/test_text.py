"""Text of unknown origin: whatever it holds, a table, a file and a terminal can hold what is made of it."""

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from mimicbrush.io.text import make_storable


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
