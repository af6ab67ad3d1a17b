"""Silence what diffusers and transformers print while they load and save."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging


def quiet_libraries() -> None:
    """Turn off the libraries' progress bars for weights; commands show their own for long work."""
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


@contextmanager
def silence_unused_weights() -> Iterator[None]:
    """Silence transformers' report of weights in a file that a network does not use."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


@contextmanager
def silence_diffusers() -> Iterator[None]:
    """Silence the warnings of diffusers in code where they are expected."""
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(level)
