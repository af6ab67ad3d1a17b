"""What the values of options may be: said once, where an option is defined, and checked before anything is built.

A field of an options dataclass is declared with `number`, `numbers` or `word`, and `check_options` checks all fields of
an object. A `CommandParser` reads a command line; its numbers take ``type=NumberRange(...).read``. A keyword argument
takes ``NumberRange(...).check(name, value)``.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Collection, Iterable
from dataclasses import Field, dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, NoReturn

from mimicbrush.errors import InputError

#: Whole numbers must fit an int64: those of files, tensors and databases do.
_LARGEST = 2**63 - 1


@dataclass(frozen=True)
class NumberRange:
    """Range of a number. What is not finite, a truth value, text and a list are in no range.

    Attributes:
        at_least, above, at_most, below: its limits; None: there is none on this side.
        whole: whole numbers only.
        null: what null means, where it is allowed.
        note: what else a message about it says.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    whole: bool = False
    null: str = ""
    note: str = ""

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if self.at_least is not None and self.at_most is not None:
            limits = [f" in {self.at_least:.15g}..{self.at_most:.15g}"]
        else:
            limits = [
                text.format(f"{limit:.15g}")
                for text, limit in (
                    (", {} or more", self.at_least),
                    (" above {}", self.above),
                    (" and at most {}", self.at_most),
                    (" and below {}", self.below),
                )
                if limit is not None
            ]
        null = f", or null ({self.null})" if self.null else ""
        return kind + "".join(limits) + null + (f" ({self.note})" if self.note else "")

    def find_fault(self, value: object) -> str | None:
        """Say what a value must be; None where it is in the range."""
        if value is None and self.null:
            return None
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return f"must be {self}"
        assert isinstance(value, int | float)
        if not -_LARGEST <= value <= _LARGEST and (self.whole or isinstance(value, int)):
            return f"must be {self}, and smaller than 2**63"
        is_inside = (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )
        return None if is_inside else f"must be {self}"

    def check(self, name: str, value: object) -> None:
        """Check a value.

        Raises:
            InputError: it is not in the range; says the name, the value and the range.
        """
        if fault := self.find_fault(value):
            raise InputError(f"{name}={_show(value)}: {fault}")

    def read(self, text: str) -> int | float:
        """Read the value of an option of argparse, as its ``type``.

        Raises:
            ArgumentTypeError: it is not in the range; argparse says the name of the option.
        """
        try:
            value: int | float | str = int(text) if self.whole else float(text)
        except ValueError:
            value = text
        if fault := replace(self, null="").find_fault(value):
            raise argparse.ArgumentTypeError(f"{fault}, got {text!r}")
        assert not isinstance(value, str)
        return value


@dataclass(frozen=True)
class NumberList:
    """Range of a list of numbers.

    Attributes:
        each: the range of each.
        lengths: the fewest and the most numbers.
        ascending: no number is below the one before it.
    """

    each: NumberRange
    lengths: tuple[int, int] = (2, 2)
    ascending: bool = False

    def __str__(self) -> str:
        fewest, most = self.lengths
        count = "two values" if (fewest, most) == (2, 2) else f"{fewest} to {most} values"
        return f"a list of {count}, each {self.each}" + (", the smaller first" if self.ascending else "")

    def find_fault(self, value: object) -> str | None:
        """Say what a value must be; None where it is in the range."""
        is_inside = (
            isinstance(value, list | tuple)
            and self.lengths[0] <= len(value) <= self.lengths[1]
            and not any(self.each.find_fault(item) for item in value)
            and (not self.ascending or sorted(value) == list(value))
        )
        return None if is_inside else f"must be {self}"


@dataclass(frozen=True)
class Choices:
    """Words, or numbers, of which an option takes one.

    Attributes:
        allowed: all of them, in order. A dictionary counts as its keys, also those that come later.
        many: it takes a list of them, at least one.
    """

    allowed: Collection[Any]
    many: bool = False

    def find_fault(self, value: object) -> str | None:
        """Say what a value must be, and which choice may have been meant; None where it is one."""
        names = ", ".join(map(_show, self.allowed))
        if self.many and not isinstance(value, list | tuple):
            return f"must be a list of {names}, such as [{next(iter(self.allowed))}]"
        items = value if self.many and isinstance(value, list | tuple) else [value]
        # True equals 1, and 1.0 does.
        unknown = [item for item in items if (type(item), item) not in [(type(each), each) for each in self.allowed]]
        if items and not unknown:
            return None
        meant = suggest(str(unknown[0]), map(str, self.allowed)) if unknown else ""
        return f"must be {'a list of some of' if self.many else 'one of'} {names}{meant}"

    def read(self, text: str) -> str:
        """Read the value of an option of argparse, as its ``type``, and name the nearest choice of a misspelt one.

        Raises:
            ArgumentTypeError: it is none of the words.
        """
        if fault := self.find_fault(text):
            raise argparse.ArgumentTypeError(f"{fault}, got {text!r}")
        return text


class CommandParser(argparse.ArgumentParser):
    """Parser of a command line whose errors are one plain message, with the nearest option of a misspelt one.

    Options cannot be abbreviated: one that is added later would change what an older command means.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Look for misspelt options first: argparse would complain of whatever it misses before it names them."""
        given = sys.argv[1:] if args is None else list(args)
        known = self._option_string_actions
        if self._subparsers is None:  # otherwise the parser of the sub-command looks at them
            for argument in given[: given.index("--")] if "--" in given else given:
                name = argument.partition("=")[0]
                if re.fullmatch(r"--[\w-]+", name) and name not in known:
                    begun = sorted((each for each in known if each.startswith(name)), key=len)[:1]
                    self.error(f"there is no option {name}{suggest(begun[0] if begun else name, known)}")
        return super().parse_known_args(args, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError:
            choices = list(map(str, action.choices or ()))
            what = f"must be one of {', '.join(choices)}{suggest(str(value), choices)}, got {str(value)!r}"
            raise argparse.ArgumentError(action, what) from None

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, and how to see all options; exit status 2."""
        self.exit(2, f"error: {message}\n{self.prog} --help explains all options\n")


#: Ranges that several commands share.
MAX_REFERENCES = 4
REFERENCES_RANGE = NumberRange(at_least=1, at_most=MAX_REFERENCES, whole=True)
SEED_RANGE = NumberRange(at_least=0, whole=True)
#: No noise schedule of this method has more steps than it was trained with.
STEPS_RANGE = NumberRange(at_least=1, at_most=1000, whole=True)
GUIDANCE_RANGE = NumberRange(at_least=0, at_most=100, note="1 or less turns guidance off")
BATCH_RANGE = NumberRange(at_least=1, at_most=2**20, whole=True)
WORKERS_RANGE = NumberRange(at_least=1, at_most=4096, whole=True)
PORT_RANGE = NumberRange(at_least=0, at_most=65535, whole=True)

_VALUES = "values"


def number(default: Any, values: NumberRange | None = None, *, null: str = "", **limits: Any) -> Any:
    """Declare a number as a field of an options dataclass.

    Args:
        default: of the field; a whole number makes the range one of whole numbers.
        values: its range, where that is shared; otherwise `limits` are those of `NumberRange`.
        null: what None means, where it is allowed.
    """
    if values is None:
        values = NumberRange(**{"whole": isinstance(default, int), **limits})
    return field(default=default, metadata={_VALUES: replace(values, null=null)})


def numbers(
    default: tuple[float, ...], *, lengths: tuple[int, int] = (2, 2), ascending: bool = True, **limits: Any
) -> Any:
    """Declare a list of numbers as a field of an options dataclass; see `NumberList` and `NumberRange`."""
    each = NumberRange(**{"whole": isinstance(default[0], int), **limits})
    return field(default=default, metadata={_VALUES: NumberList(each, lengths, ascending)})


def word(default: Any, allowed: Collection[Any], *, many: bool = False) -> Any:
    """Declare a choice as a field of an options dataclass; see `Choices`."""
    return field(default=default, metadata={_VALUES: Choices(allowed, many)})


def values_of(option: Field[Any]) -> NumberRange | NumberList | Choices | None:
    """Return what the values of a field may be; None where nothing was declared."""
    values: NumberRange | NumberList | Choices | None = option.metadata.get(_VALUES)
    return values


def range_of(options: type[Any], name: str) -> NumberRange:
    """Return the range of a field of an options dataclass, for an option of argparse that becomes this field."""
    values = next(values_of(each) for each in fields(options) if each.name == name)
    assert isinstance(values, NumberRange)
    return values


def one_of(*allowed: str) -> dict[str, Any]:
    """Return the arguments that make an option of argparse take one of several words, and name the nearest."""
    return {"choices": allowed, "type": Choices(allowed).read}


def check_options(options: Any, prefix: str = "") -> None:
    """Check all fields of an options dataclass that were declared here, and truth values.

    Args:
        options: the object.
        prefix: what a command line writes before the name of a field, such as "train.".

    Raises:
        InputError: names the first option that is wrong, its value and what it may be.
    """
    for each in fields(options):
        value, values = getattr(options, each.name), values_of(each)
        fault = values.find_fault(value) if values is not None else None
        if each.type in ("bool", bool):
            fault = Choices((True, False)).find_fault(value)
        if fault:
            raise InputError(f"{prefix}{each.name}={_show(value)}: {fault}")


def check_order(options: Any, prefix: str, *pairs: tuple[str, str]) -> None:
    """Check that the first option of each pair is not above the second.

    Raises:
        InputError: names both options and their values.
    """
    for low, high in pairs:
        if getattr(options, low) > getattr(options, high):
            raise InputError(
                f"{prefix}{low}={getattr(options, low)} is above {prefix}{high}={getattr(options, high)}; "
                "the first must not be above the second"
            )


def suggest(name: str, known: Iterable[str]) -> str:
    """Write "; did you mean X?" for the nearest of known names; "" where none is near."""
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _show(value: object) -> str:
    """Write a value as a command line has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_show, value))}]"
    return str(value)[:80]
