"""Errors that a user can act on. Commands print them as one message, without a traceback."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

#: Error numbers of a disk, or of a user's share of it, that is full.
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
#: PyTorch says it in words: torch.OutOfMemoryError is a RuntimeError, and on a CPU it is a plain one.
_NO_MEMORY = re.compile(r"out of memory|allocate memory|not enough memory", re.IGNORECASE)
#: Other error numbers that say something about the machine, and nothing about our code.
_OF_THE_MACHINE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENAMETOOLONG, errno.ESTALE, errno.EFBIG,
    errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.ELOOP,
)  # fmt: skip
#: The one option that means something where it is empty: no token.
_MAY_BE_EMPTY = "--token"
_REPORT = (
    "error: this is a fault of mimicbrush, not of what was given to it. Please report it to the project's issues, with "
    "the text above and the command."
)
#: Whose words a message is in: of Python calls, of a command line, or of the editing page.
Speaker = Literal["python", "command", "page"]
_speaker: Speaker = "python"


class MimicBrushError(Exception):
    """Base of all errors whose message says what was given, what was expected and what to do.

    Attributes:
        exit_status: of a command that it ends.
    """

    exit_status = 2


class InputError(MimicBrushError, ValueError):
    """An image, mask, folder or option that cannot be used as given."""


class WeightsError(MimicBrushError):
    """Weights that are absent, or that do not fit the model they are meant for."""


class DataError(MimicBrushError):
    """Mined data that is missing, damaged or of another schema version."""


class LoaderError(DataError):
    """A process that reads the data and was killed, or that does not answer; whoever waited for it is well."""

    exit_status = 75  # EX_TEMPFAIL of sysexits.h: it may go well another time


class CheckpointError(MimicBrushError):
    """A checkpoint that is incomplete, or that belongs to another run."""


class UnsavedError(CheckpointError):
    """A last checkpoint, or a pipeline at the end of a run, that the disk refused."""

    exit_status = 74  # EX_IOERR of sysexits.h


class LockedError(InputError):
    """A folder that another process is writing into."""


class OutputError(MimicBrushError):
    """A result that could not be written where it was asked for; the message says where it is instead."""


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


def is_full_disk(error: BaseException | None) -> bool:
    """Tell whether an error, or its cause, is a full disk."""
    return error is not None and (
        (isinstance(error, OSError) and error.errno in FULL_DISK) or is_full_disk(error.__cause__)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error is too little memory, of the machine or of a GPU. Torch is not imported for this."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def describe_os_error(error: OSError) -> str:
    """Describe in plain words what a disk refused, and what to do."""
    named = error.filename2 or error.filename  # of two, the second is the one that was wanted
    name = os.fsdecode(named) if isinstance(named, str | bytes) else ""
    if error.errno in FULL_DISK:
        path = Path(name) if name else None
        where = f"the disk of {path if path.is_dir() else path.parent}" if path else "the disk"
        return f"{where} is full, or the user's share of it; make room there, then give the same command again"
    return f"{name}: {error.strerror}" if name and error.strerror else error.strerror or str(error)


def prepare_process() -> None:
    """Prepare what must be set before anything else: how OpenMP waits, and what a terminal cannot show.

    OpenMP reads its variable when torch is loaded. By default its threads spin while they wait for each other, and on
    a CPU that anything else is using, small networks then run many times slower. A name that the terminal's encoding
    cannot hold is printed with escapes: it must not end work that is done.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            with suppress(OSError, ValueError):  # a stream that has been closed, or that cannot be flushed just now
                stream.reconfigure(errors="backslashreplace")


def _check_arguments(arguments: Sequence[str]) -> None:
    """Refuse an empty argument, mostly a variable of the shell that is not set: as a path it is the current folder."""
    for number, (before, argument) in enumerate(zip(["", *arguments], arguments, strict=False), start=1):
        is_empty = not argument or re.fullmatch(r"--[\w-]+=", argument)
        if is_empty and _MAY_BE_EMPTY not in (before, argument.removesuffix("=")):
            named = argument or f"argument {number}"
            raise InputError(f"{named} is empty; give a value, or leave it out (is a variable of the shell not set?)")


def cli_main(main: Callable[[], None]) -> None:
    """Run a command's main function in a prepared process (`prepare_process`).

    An error that the user can mend, and what the disk refuses, is printed without a traceback; the status is the
    error's own, mostly 2. Ctrl-C is status 130. Any other exception is a fault of ours: its traceback, and what to do
    about it, status 1.
    """
    prepare_process()
    try:
        _check_arguments(sys.argv[1:])
        main()
    except MimicBrushError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_status) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # whoever read has seen enough; Python would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except Exception as error:  # noqa: BLE001 - whatever it is, the user learns what to do about it
        if isinstance(error, OSError) and error.errno in (*FULL_DISK, *_OF_THE_MACHINE):
            print(f"error: {describe_os_error(error)}", file=sys.stderr)
            raise SystemExit(2) from None
        if is_out_of_memory(error):
            print(f"error: there is not enough memory for this. {error}".rstrip(), file=sys.stderr)
            raise SystemExit(2) from None
        traceback.print_exc()
        print(_REPORT, file=sys.stderr)
        raise SystemExit(1) from None
