"""A call in a thread of its own, for event loops: in the main thread a browser that tests drive has one running."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


def in_thread(function: Callable[..., Result], *arguments: Any) -> Result:
    """What a function returns, or raises, in a new thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()
