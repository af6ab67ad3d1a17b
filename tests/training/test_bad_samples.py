from __future__ import annotations

from pathlib import Path

import pytest

from mimicbrush.errors import DataError
from mimicbrush.training.guards import ALWAYS_ALLOWED, BadSamples


def test_a_few_faults_never_stop_a_run(tmp_path: Path) -> None:
    bad = BadSamples(0.0, tmp_path / "f")
    bad.count(["x"] * ALWAYS_ALLOWED, ALWAYS_ALLOWED)
    with pytest.raises(DataError, match=rf"{ALWAYS_ALLOWED + 1} pairs could not be read among {ALWAYS_ALLOWED + 1}"):
        bad.count(["y"], 1)


def test_the_stated_rate_is_allowed_and_no_more(tmp_path: Path) -> None:
    bad = BadSamples(0.01, tmp_path / "f")
    for _ in range(100):
        bad.count(["x"] * 30, 3000)
    with pytest.raises(DataError, match=r"3001 pairs could not be read among 300000 samples(?s:.*)y"):
        bad.count(["y"], 0)


def test_a_disk_that_fails_late_is_noticed_in_its_stretch(tmp_path: Path) -> None:
    bad = BadSamples(0.01, tmp_path / "f")
    bad.count([], 1_000_000)
    with pytest.raises(DataError, match="50 pairs could not be read among 3000 samples"):
        bad.count(["x"] * 50, 3000)


def test_faults_are_written_as_they_come(tmp_path: Path) -> None:
    bad = BadSamples(0.5, tmp_path / "f")
    bad.write([])
    assert not (tmp_path / "f").exists()
    bad.write(["one", "two"])
    bad.write(["three"])
    assert (tmp_path / "f").read_text() == "one\ntwo\nthree\n"
