from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from mimicbrush.app.session_files import SessionFiles, VisitorLimits, make_server_folder
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
        with pytest.raises(InputError, match="not on the server"):
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
    with pytest.raises(InputError, match="it keeps 3 files per visitor"):
        visits.find("ann", unused)


def test_what_has_no_room_or_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    visits = SessionFiles(tmp_path / "visits", VisitorLimits(total_bytes=10))
    kept = visits.keep("ann", ".png", written(b"12345678"))

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="no space for an image"):
        visits.keep("bob", ".png", written(b"12345678901"))
    with pytest.raises(InputError, match=r"could not save this image \(No space left on device\)"):
        visits.keep("ann", ".png", fail)
    assert [path.name for path in visits.folder.iterdir()] == [f"{kept}.png"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 12)), max_size=30))
def test_whoever_holds_most_makes_room(asked: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        visits = SessionFiles(Path(folder) / "visits", VisitorLimits(total_bytes=30, files=100))
        for visitor, size in asked:
            before = Counter[str]()
            for file in visits._stored.values():
                before[file.visitor] += file.size_bytes
            token = visits.keep(visitor, "", written(b"x" * size))
            assert visits.find(visitor, token).stat().st_size == size
            after = Counter[str]()
            for file in visits._stored.values():
                after[file.visitor] += file.size_bytes
            assert after.total() <= 30 and after.total() == sum(path.stat().st_size for path in visits.folder.iterdir())
            for other, held in before.items():
                if after[other] < held:  # held no less than the newcomer, who has given up what he could
                    assert other == visitor or held >= after[visitor] or after[visitor] == size


def test_the_folder_of_a_server_goes_with_it_and_a_dead_ones_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead, alive = (tmp_path / f"mimicbrush-page-{name}" for name in ("dead", "alive"))
    for folder in (dead, alive):
        (folder / "visits").mkdir(parents=True)
        (folder / "visits/image").write_bytes(b"private")
        (folder / "server.lock").touch()
    others = tmp_path / "others"
    others.mkdir()
    (others / "image").touch()
    (tmp_path / "mimicbrush-page-link").symlink_to(others)
    (tmp_path / "mimicbrush-page-file").touch()
    (tmp_path / "mimicbrush-pages").mkdir()
    with FileLock(alive / "server.lock"), make_server_folder() as first:
        assert first.is_relative_to(tmp_path) and first.stat().st_mode & 0o077 == 0
        (first / "image").touch()
        assert not dead.exists() and (alive / "visits/image").exists() and (others / "image").exists()
        with make_server_folder() as second:
            assert first != second and (first / "image").exists()
        assert not second.exists() and (first / "image").exists()
    assert not first.exists()
    left = {"mimicbrush-page-alive", "mimicbrush-page-link", "mimicbrush-page-file", "mimicbrush-pages", "others"}
    assert {path.name for path in tmp_path.iterdir()} == left
