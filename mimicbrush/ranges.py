"""Ranges of options: declared once, where an option is defined, and checked before anything is built.

Declare a field of an options dataclass with `number`, `numbers` or `word`; `check_options` then checks all fields of an
object. A number on the command line of a `CommandParser` takes ``type=NumberRange(...).read``. Check a keyword argument
with ``NumberRange(...).check(name, value)``.
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
    """Range of a number. Infinity, NaN, truth values, text and lists are in no range.

    Attributes:
        at_least, above, at_most, below: limits of the range; None: no limit.
        whole: whole numbers only.
        null: what null means; "" if null is not allowed.
        note: added to a description of the range.
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
            limits = [f" from {self.at_least:.15g} to {self.at_most:.15g}"]
        else:
            named = (
                ("of at least", self.at_least),
                ("above", self.above),
                ("of at most", self.at_most),
                ("below", self.below),
            )
            both = " and".join(f" {name} {limit:.15g}" for name, limit in named if limit is not None)
            limits = [both.replace(" and of ", " and ")]
        null = f", or null ({self.null})" if self.null else ""
        return kind + "".join(limits) + (f" ({self.note})" if self.note else "") + null

    def find_fault(self, value: object) -> str | None:
        """Say what was expected instead of a value; None if the value is in the range."""
        if value is None and self.null:
            return None
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return f"expected {self}"
        assert isinstance(value, int | float)
        if not -_LARGEST <= value <= _LARGEST and (self.whole or isinstance(value, int)):
            return f"expected {self}" + (" and below 2**63" if self.at_most is None else "")
        is_inside = (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )
        return None if is_inside else f"expected {self}"

    def check(self, name: str, value: object) -> None:
        """Check a value.

        Raises:
            InputError: the value is outside the range; the message has the name, the value and the range.
        """
        if fault := self.find_fault(value):
            raise InputError(f"{name}={_show(value)}: {fault}")

    def read(self, text: str) -> int | float:
        """Read the value of an option of argparse, as its ``type``.

        Raises:
            ArgumentTypeError: the value is outside the range; argparse adds the name of the option.
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
        each: range of each number.
        lengths: smallest and largest length of the list.
        ascending: no number may be smaller than the one before it.
    """

    each: NumberRange
    lengths: tuple[int, int] = (2, 2)
    ascending: bool = False

    def __str__(self) -> str:
        fewest, most = self.lengths
        count = f"{fewest} values" if fewest == most else f"{fewest} to {most} values"
        return f"a list of {count}, each {self.each}" + (", in ascending order" if self.ascending else "")

    def find_fault(self, value: object) -> str | None:
        """Say what was expected instead of a value; None if the value is in the range."""
        is_inside = (
            isinstance(value, list | tuple)
            and self.lengths[0] <= len(value) <= self.lengths[1]
            and not any(self.each.find_fault(item) for item in value)
            and (not self.ascending or sorted(value) == list(value))
        )
        return None if is_inside else f"expected {self}"


@dataclass(frozen=True)
class Choices:
    """Choices of an option: words or numbers.

    Attributes:
        allowed: all choices, in order. Of a dictionary, the keys count, also those that are added later.
        many: the option takes a list of at least one of them.
    """

    allowed: Collection[Any]
    many: bool = False

    def find_fault(self, value: object) -> str | None:
        """Say what was expected instead of a value, and which choice is nearest; None if the value is a choice."""
        names = ", ".join(map(_show, self.allowed))
        if self.many and not isinstance(value, list | tuple):
            return f"expected a list of one or more of {names}, such as [{next(iter(self.allowed))}]"
        items = value if self.many and isinstance(value, list | tuple) else [value]
        # True equals 1, and 1.0 does.
        unknown = [item for item in items if (type(item), item) not in [(type(each), each) for each in self.allowed]]
        if items and not unknown:
            return None
        meant = suggest(str(unknown[0]), map(str, self.allowed)) if unknown else ""
        return f"expected {'a list of one or more of' if self.many else 'one of'} {names}{meant}"

    def read(self, text: str) -> str:
        """Read the value of an option of argparse, as its ``type``. An error names the nearest choice.

        Raises:
            ArgumentTypeError: the value is not one of the choices.
        """
        if self.find_fault(text):
            raise argparse.ArgumentTypeError(_describe_choice(text, self.allowed))
        return text


class CommandParser(argparse.ArgumentParser):
    """Parser of a command line. An error is one plain message, which names the nearest option or choice.

    Options cannot be abbreviated: a new option would change what an older command means.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Look for misspelt options first: argparse would report missing arguments before them."""
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
            raise argparse.ArgumentError(action, _describe_choice(str(value), action.choices or ())) from None

    def error(self, message: str) -> NoReturn:
        """Print the error and how to see all options, and exit with status 2."""
        self.exit(2, f"error: {message}\n`{self.prog} --help` explains all options.\n")


#: Ranges that several commands share.
MAX_REFERENCES = 4
REFERENCES_RANGE = NumberRange(at_least=1, at_most=MAX_REFERENCES, whole=True)
SEED_RANGE = NumberRange(at_least=0, whole=True)
#: The noise schedules of this method are trained with 1000 steps; a sampler cannot take more.
STEPS_RANGE = NumberRange(at_least=1, at_most=1000, whole=True)
GUIDANCE_RANGE = NumberRange(at_least=0, at_most=100, note="1 or less turns guidance off")
BATCH_RANGE = NumberRange(at_least=1, at_most=2**20, whole=True)
WORKERS_RANGE = NumberRange(at_least=1, at_most=4096, whole=True)
PORT_RANGE = NumberRange(at_least=0, at_most=65535, whole=True)

_VALUES = "values"


def number(default: Any, values: NumberRange | None = None, *, null: str = "", **limits: Any) -> Any:
    """Declare a number as a field of an options dataclass.

    Args:
        default: default of the field. If it is an int, only whole numbers are allowed.
        values: a range that several options share; otherwise, give the `limits` of `NumberRange`.
        null: what None means; "" if None is not allowed.
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
    """Return the declared range or choices of a field; None if nothing was declared."""
    values: NumberRange | NumberList | Choices | None = option.metadata.get(_VALUES)
    return values


def range_of(options: type[Any], name: str) -> NumberRange:
    """Return the range of a field of an options dataclass, for an option of argparse that becomes this field."""
    values = next(values_of(each) for each in fields(options) if each.name == name)
    assert isinstance(values, NumberRange)
    return values


def one_of(*allowed: str) -> dict[str, Any]:
    """Return arguments of ``add_argument`` for an option that takes one of several words."""
    return {"choices": allowed, "type": Choices(allowed).read}


def check_options(options: Any, prefix: str = "") -> None:
    """Check all fields of an options dataclass that have a range or choices, and truth values.

    Args:
        options: the object.
        prefix: prefix of the field names on the command line, such as "train.".

    Raises:
        InputError: an option is wrong; the message has the name, the value and what was expected.
    """
    for each in fields(options):
        value, values = getattr(options, each.name), values_of(each)
        fault = values.find_fault(value) if values is not None else None
        if each.type in ("bool", bool):
            fault = Choices((True, False)).find_fault(value)
        if fault:
            raise InputError(f"{prefix}{each.name}={_show(value)}: {fault}")


def check_order(options: Any, prefix: str, *pairs: tuple[str, str]) -> None:
    """Check that the first option of each pair is not larger than the second.

    Raises:
        InputError: it is; the message has both names and values.
    """
    for low, high in pairs:
        if getattr(options, low) > getattr(options, high):
            raise InputError(
                f"{prefix}{low}={getattr(options, low)} is larger than {prefix}{high}={getattr(options, high)}; "
                f"{low} must be at most {high}"
            )


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ". Did you mean 'X'?" for the nearest of the known names; "" if none is near."""
    close = get_close_matches(name, list(known), n=1)
    return f". Did you mean {close[0]!r}?" if close else ""


def _describe_choice(given: str, allowed: Iterable[Any]) -> str:
    """Describe a choice that does not exist, in the words of argparse."""
    names = list(map(str, allowed))
    return f"invalid choice {given!r} (choose from {', '.join(names)}){suggest(given, names)}"


def _show(value: object) -> str:
    """Write a value as on a command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_show, value))}]"
    return str(value)[:80]
