from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mimicbrush.io.atomic import ASIDE_PATTERN
from mimicbrush.io.jsonl import StepLog, read_steps


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "log.jsonl", 0)
    for step in (1, 2):
        log.append({"step": step, "loss": None})
    assert read_steps(tmp_path / "log.jsonl") == [{"step": 1, "loss": None}, {"step": 2, "loss": None}]
    assert read_steps(tmp_path / "absent.jsonl") == []
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.append({"step": 3, "loss": float("nan")})


@pytest.mark.parametrize(
    "torn",
    [
        '{"step": 1',
        "{}",
        "1",
        '{"step": 2}',
        "\n\n",
        "\0\0",
        "\udcff\udc80",
        '{"step": "x"}',
        '{"step": Infinity}',
        "[" * 9999,
    ],
)
def test_after_a_restart_later_and_torn_lines_are_gone(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(
        '{"step": 1}\n{"step": 2}\n{"step": 3}\n' + torn, errors="surrogateescape"
    )  # without an end of line
    assert [values["step"] for values in read_steps(path)][:3] == [1, 2, 3]
    log = StepLog(path, 2)
    log.append({"step": 3})
    expected = [1, 2, 2, 3] if "2" in torn else [1, 2, 3]
    assert [values["step"] for values in read_steps(path)] == expected
    assert path.read_text().endswith("\n") and not list(tmp_path.glob(ASIDE_PATTERN))


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of the size of files that cuts a line")
def test_a_line_that_the_disk_cuts_short_is_removed(tmp_path: Path) -> None:
    import resource

    log = StepLog(tmp_path / "log.jsonl", 0)
    log.append({"step": 1, "text": "x" * 1_000_000})  # so large that nothing else meets the limit
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 5, before[1]))
    try:
        with pytest.raises(OSError):
            log.append({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.append({"step": 3})
    assert [line["step"] for line in read_steps(log.path)] == [1, 3]
