from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mimicbrush.app.session_files import SessionFiles, VisitorLimits
from mimicbrush.errors import InputError


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def written(data: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(data)

    return write


def test_a_file_is_for_its_visitor_alone(tmp_path: Path) -> None:
    visits = SessionFiles(tmp_path / "visits", VisitorLimits())
    token = visits.keep("ann", ".png", written(b"a"))
    assert visits.find("ann", token).read_bytes() == b"a"
    for visitor, asked in (("bob", token), ("ann", token[:-1]), ("ann", "../" + token), ("", token)):
        with pytest.raises(InputError, match="not here"):
            visits.find(visitor, asked)
    visits.close()
    assert not (tmp_path / "visits").exists()


def test_files_go_when_they_are_old_or_too_many(tmp_path: Path) -> None:
    clock = Clock()
    visits = SessionFiles(tmp_path / "visits", VisitorLimits(files=2, age_s=10), clock)
    first, second, third = (visits.keep("ann", ".png", written(b"a")) for _ in range(3))
    with pytest.raises(InputError):
        visits.find("ann", first)
    assert visits.find("ann", second) and len(list(visits.folder.iterdir())) == 2
    clock.now_s = 11
    with pytest.raises(InputError):
        visits.find("ann", third)
    kept = visits.keep("bob", ".png", written(b"b"))
    assert [path.name for path in visits.folder.iterdir()] == [f"{kept}.png"]


def test_what_is_used_outlasts_what_is_not(tmp_path: Path) -> None:
    visits = SessionFiles(tmp_path / "visits", VisitorLimits(files=3))
    source, unused = (visits.keep("ann", ".png", written(b"a")) for _ in range(2))
    for _ in range(5):
        visits.find("ann", source)
        visits.keep("ann", ".png", written(b"mask"))
    assert visits.find("ann", source)
    with pytest.raises(InputError, match="3 of a visitor are kept"):
        visits.find("ann", unused)


def test_what_has_no_room_or_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    visits = SessionFiles(tmp_path / "visits", VisitorLimits(total_bytes=10))
    visits.keep("ann", ".png", written(b"12345678"))

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("full")

    with pytest.raises(InputError, match="no room"):
        visits.keep("bob", ".png", written(b"123"))
    with pytest.raises(OSError, match="full"):
        visits.keep("ann", ".png", fail)
    assert len(list(visits.folder.iterdir())) == 1
