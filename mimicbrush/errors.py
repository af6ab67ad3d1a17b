"""Errors that a user can act on. Commands print them as one message, without a traceback."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

#: Whose words a message is in: of Python calls, of a command line, or of the editing page.
Speaker = Literal["python", "command", "page"]
_speaker: Speaker = "python"


class MimicBrushError(Exception):
    """Base of all errors whose message says what was given, what was expected and what to do."""


class InputError(MimicBrushError, ValueError):
    """An image, mask, folder or option that cannot be used as given."""


class WeightsError(MimicBrushError):
    """Weights that are absent, or that do not fit the model they are meant for."""


class DataError(MimicBrushError):
    """Mined data that is missing, damaged or of another schema version."""


class CheckpointError(MimicBrushError):
    """A checkpoint that is incomplete, or that belongs to another run."""


@contextmanager
def speak_as(speaker: Speaker) -> Iterator[None]:
    """Let messages name what the user has before them: arguments of Python, of a command, or controls of the page."""
    global _speaker
    before, _speaker = _speaker, speaker
    try:
        yield
    finally:
        _speaker = before


def choose_words(*, python: str, command: str, page: str) -> str:
    """Choose the words of a message for the one who reads it, see `speak_as`."""
    return {"python": python, "command": command, "page": page}[_speaker]


def install_command(extra: str) -> str:
    """Write the command that installs an extra of this package, which comes from a clone and not from an index."""
    return f"pip install '.[{extra}]' in a clone of the project"


def prepare_process() -> None:
    """Let OpenMP's threads sleep while they wait, unless the environment says otherwise.

    OpenMP reads the variable when torch is loaded, so this must come first. By default its threads spin while they wait
    for each other, and on a CPU that anything else is using, small networks then run many times slower.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def cli_main(main: Callable[[], None]) -> None:
    """Run a command's main function in a prepared process (`prepare_process`).

    An error that the user can mend is printed without a traceback, status 2; Ctrl-C is status 130.
    """
    prepare_process()
    try:
        main()
    except MimicBrushError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
