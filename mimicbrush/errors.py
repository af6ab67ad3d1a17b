"""Errors that a user can act on. Commands print them as one message, without a traceback."""

import os
import sys
from collections.abc import Callable


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


def prepare_process() -> None:
    """Let OpenMP's threads sleep while they wait, unless the environment says otherwise.

    OpenMP reads the variable when torch is loaded, so this must come first. By default its threads spin while they wait
    for each other, and on a CPU that anything else is using, small networks then run many times slower.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def cli_main(main: Callable[[], None]) -> None:
    """Run a command's main function in a prepared process (`prepare_process`).

    An error that the user can mend is printed without a traceback; the status is the error's own, mostly 2. Ctrl-C is
    status 130.
    """
    prepare_process()
    try:
        main()
    except MimicBrushError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_status) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
