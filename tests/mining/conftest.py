"""Shared by the tests of mining: workers are forks of a server that has imported what they import.

Each is a process of its own all the same. Tests of the scripts start them as users do, which takes 0.6 s a worker.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from mimicbrush.mining import worker_pool


@pytest.fixture(autouse=True, scope="package")
def warm_workers() -> Iterator[None]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([worker_pool.__name__])

    def get_context(kind: str) -> object:
        assert kind == "spawn"
        return context

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(worker_pool, "multiprocessing", SimpleNamespace(get_context=get_context))
        yield


@pytest.fixture
def spawned_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at the workers' processes: workers as users have them."""
    monkeypatch.setattr(worker_pool, "multiprocessing", multiprocessing)
