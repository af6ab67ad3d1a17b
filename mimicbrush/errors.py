"""Errors that a user can act on. Scripts print them as one message, without a traceback."""

import sys
from collections.abc import Callable


class MimicBrushError(Exception):
    """Base of all errors whose message says what was given, what was expected and what to do."""


class InputError(MimicBrushError, ValueError):
    """A image, mask, folder or option that cannot be used as given."""


class WeightsError(MimicBrushError):
    """Weights that are absent, or that do not fit the model they are meant for."""


class DataError(MimicBrushError):
    """Mined data that is missing, damaged or of another schema version."""


class CheckpointError(MimicBrushError):
    """A checkpoint that is incomplete, or that belongs to another run."""


def cli_main(main: Callable[[], None]) -> None:
    """Run a script's main function: an error that the user can mend is printed plainly, status 2; Ctrl-C is 130."""
    try:
        main()
    except MimicBrushError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
