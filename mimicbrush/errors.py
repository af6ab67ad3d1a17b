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

#: Error numbers of a full disk, or of a full quota of the user.
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
#: PyTorch has only the message: torch.OutOfMemoryError is a RuntimeError, and on a CPU it is a plain RuntimeError.
_NO_MEMORY = re.compile(r"out of memory|allocate memory|not enough memory", re.IGNORECASE)
#: Other error numbers that are about the machine and not about our code.
_OF_THE_MACHINE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENAMETOOLONG, errno.ESTALE, errno.EFBIG,
    errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.ELOOP,
)  # fmt: skip
#: The only option with a meaning if it is empty: no token.
_MAY_BE_EMPTY = "--token"
_REPORT = (
    "error: this is a bug in mimicbrush, not a mistake in your input. Please report it in the project's issues, with "
    "the text above and the command."
)
#: Who reads a message: a user of Python calls, of a command line, or of the editing page.
Speaker = Literal["python", "command", "page"]
_speaker: Speaker = "python"


class MimicBrushError(Exception):
    """Base class of all errors whose message says what was given, what was expected and what to do.

    Attributes:
        exit_status: exit status of a command that ends with this error.
    """

    exit_status = 2


class InputError(MimicBrushError, ValueError):
    """An image, mask, folder or option that cannot be used as given."""


class WeightsError(MimicBrushError):
    """Weights that are missing, or that do not fit their model."""


class DataError(MimicBrushError):
    """Mined data that is missing, damaged or of another schema version."""


class LoaderError(DataError):
    """A data loader process that was killed or does not answer; the process that waited for it is fine."""

    exit_status = 75  # EX_TEMPFAIL of sysexits.h: another try may succeed


class CheckpointError(MimicBrushError):
    """A checkpoint that is incomplete, or that belongs to another run."""


class UnsavedError(CheckpointError):
    """The last checkpoint or the pipeline of a run that could not be written to disk."""

    exit_status = 74  # EX_IOERR of sysexits.h


class LockedError(InputError):
    """A folder that another process is writing to."""


class OutputError(MimicBrushError):
    """A result that could not be written to its path; the message says where it was saved instead."""


@contextmanager
def speak_as(speaker: Speaker) -> Iterator[None]:
    """Let messages name what the user sees: arguments of Python, options of a command, or controls of the page."""
    global _speaker
    before, _speaker = _speaker, speaker
    try:
        yield
    finally:
        _speaker = before


def choose_words(*, python: str, command: str, page: str) -> str:
    """Choose the words of a message for its reader, see `speak_as`."""
    return {"python": python, "command": command, "page": page}[_speaker]


def install_command(extra: str) -> str:
    """Return the command that installs an extra of this package, from a clone of the project."""
    return f"pip install '.[{extra}]' in a clone of the project"


def is_full_disk(error: BaseException | None) -> bool:
    """Return whether an error, or its cause, is a full disk."""
    return error is not None and (
        (isinstance(error, OSError) and error.errno in FULL_DISK) or is_full_disk(error.__cause__)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the machine or a GPU ran out of memory. This does not import torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def describe_os_error(error: OSError) -> str:
    """Describe an error of the file system in plain words, and what to do."""
    named = error.filename2 or error.filename  # of two names, the second is the target
    name = os.fsdecode(named) if isinstance(named, str | bytes) else ""
    if error.errno in FULL_DISK:
        path = Path(name) if name else None
        where = f"the disk of {path if path.is_dir() else path.parent}" if path else "the disk"
        return f"{where} is full, or your quota on it is used up. Free some space, then run the same command again"
    return f"{name}: {error.strerror}" if name and error.strerror else error.strerror or str(error)


def prepare_process() -> None:
    """Set what must be set before anything else: how OpenMP waits, and how unprintable names are shown.

    OpenMP reads its variable when torch is loaded. By default its threads spin while they wait for each other. On a
    busy CPU, small networks then run many times slower. A name that the terminal's encoding cannot show is printed with
    escapes: it must not make a finished command fail.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            with suppress(OSError, ValueError):  # a stream that is closed, or cannot be flushed now
                stream.reconfigure(errors="backslashreplace")


def _check_arguments(arguments: Sequence[str]) -> None:
    """Refuse an empty argument, often a shell variable that is not set. As a path, it is the current folder."""
    for number, (before, argument) in enumerate(zip(["", *arguments], arguments, strict=False), start=1):
        is_empty = not argument or re.fullmatch(r"--[\w-]+=", argument)
        if is_empty and _MAY_BE_EMPTY not in (before, argument.removesuffix("=")):
            named = argument or f"argument {number}"
            raise InputError(f"{named} is empty. Give a value, or leave it out (is a shell variable not set?)")


def cli_main(main: Callable[[], None]) -> None:
    """Run a command's main function in a prepared process (`prepare_process`).

    Errors that the user can correct, and errors of the file system, are printed without a traceback. The exit status is
    that of the error, usually 2, and 130 for Ctrl-C. Any other exception is a bug of ours: it is printed with its
    traceback and with a request to report it. Its status is 1.
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
    except BrokenPipeError:  # the reader has closed the pipe; Python would report it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except Exception as error:  # noqa: BLE001 - the user must learn what to do about any error
        if isinstance(error, OSError) and error.errno in (*FULL_DISK, *_OF_THE_MACHINE):
            print(f"error: {describe_os_error(error)}", file=sys.stderr)
            raise SystemExit(2) from None
        if is_out_of_memory(error):
            print(f"error: there is not enough memory. {error}".rstrip(), file=sys.stderr)
            raise SystemExit(2) from None
        traceback.print_exc()
        print(_REPORT, file=sys.stderr)
        raise SystemExit(1) from None
