"""Shared by the tests of pipelines: pickles are opened by forks of a process that has imported PyTorch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import warm_scripts

from mimicbrush.pipelines.conversion import untrusted_files


@pytest.fixture(autouse=True, scope="package")
def warm_unpickling(script_environment: Callable[[], dict[str, str]]) -> Any:
    """The same program with the same arguments, but for -I; tests that need the real process put subprocess back."""

    def run(command: Sequence[str], *, env: Mapping[str, str], timeout: float, **_: object) -> Any:
        executable, isolated, *arguments = command
        assert (executable, isolated) == (sys.executable, "-I")
        variables = {**script_environment(), **env, "PYTHONPATH": script_environment()["PYTHONPATH"]}
        return warm_scripts.run(
            [executable, *arguments], env=variables, capture_output=True, text=True, timeout=timeout
        )

    with pytest.MonkeyPatch.context() as monkeypatch:
        stand_in = SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired)
        monkeypatch.setattr(untrusted_files, "subprocess", stand_in)
        yield
