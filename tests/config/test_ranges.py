"""Every number of every option has a range, and every choice its words; checked by walking over all of them."""

from __future__ import annotations

import argparse
import importlib
import inspect
import math
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import mimicbrush
from mimicbrush.assembly.config import TrainConfig
from mimicbrush.errors import InputError
from mimicbrush.evaluation.benchmark_builder.options import BuildOptions
from mimicbrush.mining.executors import Resources
from mimicbrush.mining.options import MiningOptions
from mimicbrush.mining.run import ArrayTask
from mimicbrush.models.options import ModelOptions, PipelineModel
from mimicbrush.ops.color_jitter import JitterRanges
from mimicbrush.ops.geometry import GeometryRanges
from mimicbrush.ranges import Choices, CommandParser, NumberList, NumberRange, check_options, one_of, values_of
from mimicbrush.training.options import TrainOptions

ROOT = Path(__file__).parents[2]
STRANGE = (
    math.nan,
    math.inf,
    -math.inf,
    -1,
    -0.5,
    0,
    0.5,
    1,
    10**30,
    1e300,
    "many",
    "",
    True,
    False,
    None,
    [],
    [1],
    {},
)
#: Options classes outside of the modules called options.
ELSEWHERE = (Resources, ArrayTask, JitterRanges, GeometryRanges, TrainConfig)
#: What an options class needs beside its defaults.
NEEDED: dict[str, dict[str, Any]] = {
    "BenchmarkOptions": {"editors": ("blur",)},
    "BuildOptions": {"images": Path("images")},
    "PipelineModel": {each.name: getattr(ModelOptions(), each.name) for each in fields(ModelOptions)},
    "TrainConfig": {"run_name": "a", "run_dir": "b", "model": ModelOptions()},
}


def options_classes() -> list[type[Any]]:
    names = [each.name for each in pkgutil.walk_packages(mimicbrush.__path__, "mimicbrush.")]
    modules = [importlib.import_module(name) for name in names if name.endswith(".options")]
    assert len(modules) >= 7
    found = [
        each
        for module in modules
        for each in vars(module).values()
        if inspect.isclass(each) and is_dataclass(each) and each.__module__ == module.__name__
    ]
    return [each for each in (*found, *ELSEWHERE) if each.__name__ != "ReferenceEncoder"]  # a table of the code


def numeric_types(hint: Any) -> set[type]:
    return {int, float} & {hint, *get_args(hint)}


@pytest.mark.parametrize("options", options_classes(), ids=lambda each: each.__name__)
def test_every_number_has_a_range_that_its_default_is_in(options: type[Any]) -> None:
    hints = get_type_hints(options)
    for each in fields(options):
        if not numeric_types(hints[each.name]):
            continue
        values = values_of(each)
        assert values is not None, f"{options.__name__}.{each.name} has no range: declare it with ranges.number"
        if isinstance(values, Choices):
            continue
        limits = values.each if isinstance(values, NumberList) else values
        assert limits.whole == (float not in numeric_types(hints[each.name])), each.name
        assert (None in get_args(hints[each.name]) or type(None) in get_args(hints[each.name])) == bool(
            isinstance(values, NumberRange) and values.null
        ), each.name
        # Here a default means: what the pipeline was made for.
        assert options is PipelineModel or values.find_fault(each.default) is None, each.name


@pytest.mark.parametrize("options", options_classes(), ids=lambda each: each.__name__)
def test_strange_values_are_in_the_range_or_refused_by_name(options: type[Any]) -> None:
    needed = NEEDED.get(options.__name__, {})
    for each in fields(options):
        values = values_of(each)
        if values is None and each.type != "bool":
            continue
        for value in STRANGE:
            try:
                made = options(**{**needed, each.name: value})
                if options.__name__ == "PairSourceOptions":  # its name is known to `DataOptions` alone
                    check_options(made)
            except InputError as error:
                assert re.search(rf"\b{each.name}\b.*(expected|must be|needs) ", str(error)), error
                continue
            kept = getattr(made, each.name)
            items = kept if isinstance(kept, list | tuple) else [kept]
            assert kept is None or all(
                isinstance(item, bool | str) or (math.isfinite(item) and abs(item) < 2**63) or item == 1e300
                for item in items
            ), (each.name, value)
            assert values is None or values.find_fault(value) is None, (each.name, value)


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The parsers of all commands and scripts, with those of their sub-commands."""
    found: list[argparse.ArgumentParser] = []

    def keep(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        found.append(parser)
        raise StopIteration

    names = [each.name for each in pkgutil.walk_packages(mimicbrush.__path__, "mimicbrush.") if ".cli." in each.name]
    modules = [importlib.import_module(name) for name in names]
    mains: dict[str, Callable[[], None]] = {
        module.__name__: module.main for module in modules if "CommandParser(" in inspect.getsource(module)
    }
    for path in sorted((ROOT / "scripts").glob("*.py")):
        if "CommandParser(" in path.read_text():
            mains[path.stem] = importlib.import_module(path.stem).main
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command"])
        for method in ("parse_args", "parse_known_args"):
            patch.setattr(argparse.ArgumentParser, method, keep)
        for name, main in mains.items():
            with pytest.raises(StopIteration):
                main()
            yield name, found.pop()


def find_parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers of the sub-commands, or the parser itself where it has none."""
    choices = [each for action in parser._actions if isinstance(action, argparse._SubParsersAction)
               for each in action.choices.values()]  # fmt: skip
    for each in choices:
        yield from find_parsers(each)
    if not choices:
        yield parser


def walk(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from walk(each)
        else:
            yield action


def test_every_command_names_the_option_that_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    plain = [path for room in ("mimicbrush", "scripts") for path in (ROOT / room).rglob("*.py")
             if "argparse.ArgumentParser(" in path.read_text() and path.name != "ranges.py"]  # fmt: skip
    assert plain == []  # they would say "unrecognized arguments"
    checked = 0
    for _, parser in list(parsers()):
        assert isinstance(parser, CommandParser)
        for each in find_parsers(parser):
            longest = max(each._option_string_actions, key=len)
            for typed in (longest[:-2] + longest[-1], longest[:-1]) if longest.startswith("--") else ():
                if typed in each._option_string_actions:
                    continue
                with pytest.raises(SystemExit) as end:
                    each.parse_args([typed, "1"])
                said = capsys.readouterr().err
                assert end.value.code == 2 and said.startswith(f"error: there is no option {typed}. Did you mean '--")
                assert said.endswith(f"`{each.prog} --help` explains all options.\n")
                checked += longest in said
    assert checked > 30


def test_a_misspelt_sub_command_and_an_option_behind_it(capsys: pytest.CaptureFixture[str]) -> None:
    parser = CommandParser(prog="tool")
    parser.add_subparsers(dest="command").add_parser("verify").add_argument("--workers")
    for arguments, message in (
        (["verfy"], "argument command: invalid choice 'verfy' (choose from verify). Did you mean 'verify'?"),
        (["verify", "--worker", "2"], "there is no option --worker. Did you mean '--workers'?"),
        (["verify", "--nothing-like-it=2"], "there is no option --nothing-like-it\n"),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(arguments)
        assert message in capsys.readouterr().err
    assert parser.parse_args(["verify", "--workers", "3"]).workers == "3"


def test_numbers_of_argparse_have_ranges_too() -> None:
    checked = 0
    for command, parser in parsers():
        for action in walk(parser):
            where = f"{command} {'/'.join(action.option_strings) or action.dest}"
            assert action.type not in (int, float), f"{where} has no range: type=NumberRange(...).read"
            assert not (action.choices and action.type is None), f"{where}: **one_of(...) names the nearest choice"
            if not callable(action.type) or action.type is Path or action.choices:
                continue
            checked += 1
            for text in ("nan", "inf", "-inf", "-1", "-0.5", "1e400", str(10**30), "many", "", "true", "null", "[1]"):
                with pytest.raises(argparse.ArgumentTypeError, match=r"expected|invalid choice"):
                    action.type(text)
            for text in ("0", "0.5", "1", "1000"):
                try:
                    value = action.type(text)
                except argparse.ArgumentTypeError as error:
                    assert "expected" in str(error) or "invalid choice" in str(error)
                else:
                    assert value is None or math.isfinite(value), where
    assert checked > 25


@pytest.mark.parametrize(
    ("options", "values", "message"),
    [
        (MiningOptions, {"min_gap_s": 5.0}, r"min_gap_s=5\.0 is larger than max_gap_s=4\.0"),
        (MiningOptions, {"min_segment_ratio": 0.9}, "min_segment_ratio=0.9 is larger than max_segment_ratio=0.8"),
        (ArrayTask, {"index": 3, "count": 2}, r"task\.index=3 task\.count=2: expected an index from 0 to 1"),
        (BuildOptions, {"images": Path("a"), "long_side_px": 5}, "long_side_px=5: expected a whole number from 64"),
    ],
)
def test_options_must_fit_each_other(options: type[Any], values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        options(**values)


def test_a_misspelt_word_names_the_nearest_and_all_others() -> None:
    with pytest.raises(InputError, match=r"engine=locl: expected one of local, ray\. Did you mean 'local'\?"):
        Resources(engine="locl")
    with pytest.raises(
        argparse.ArgumentTypeError, match=r"invalid choice 'aut' \(choose from full, auto\)\. Did you mean 'auto'\?"
    ):
        one_of("full", "auto")["type"]("aut")


def test_no_clipping_and_a_warm_up_that_leaves_nothing() -> None:
    assert TrainOptions(max_grad_norm=0).max_grad_norm == 0
    with pytest.raises(
        InputError, match=r"train\.max_grad_norm=-1: expected a number of at least 0 \(0: no clipping\)"
    ):
        TrainOptions(max_grad_norm=-1)
    with pytest.raises(InputError, match=r"train\.lr_warmup_steps=500 leaves no steps of train\.max_steps=100"):
        TrainOptions(lr_scheduler="cosine", max_steps=100)
    assert TrainOptions(max_steps=100).never_warms_up()  # noted, for the run may go on
    assert not TrainOptions(lr_scheduler="constant", max_steps=100).never_warms_up()
