"""Write docs/options.md, with all options of mimicbrush train, mine and evaluate.

python scripts/options_page.py           write the page, after a change of options
python scripts/options_page.py --check   exit status 1 if the page is not up to date
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from mimicbrush.assembly.command_line import list_subclasses
from mimicbrush.data.options import DataOptions
from mimicbrush.evaluation.heldout.options import EvaluationOptions
from mimicbrush.ranges import (
    GUIDANCE_RANGE,
    SEED_RANGE,
    STEPS_RANGE,
    Choices,
    CommandParser,
    NumberList,
    NumberRange,
    values_of,
)

#: Dataclasses whose meanings others refer to.
_REFERRED_TO = {each.__name__: each for each in (DataOptions, EvaluationOptions)}
PAGE = Path(__file__).parents[1] / "docs" / "options.md"
HEAD = """# Options

All options of `mimicbrush train`, `mine` and `evaluate`, in the order of the dataclasses that
declare them. The other commands explain their options with `--help`.
`python scripts/options_page.py` makes this page from the code, and a test compares both.

Write an option as `NAME=VALUE`, for example `train.max_steps=500`. If a value is outside its range,
the command stops before it starts any work, and the message says what was expected. If a name is
misspelt, the message suggests the nearest one.
"""
TRAIN_HEAD = """## mimicbrush train

The defaults are those of the dataclasses. The groups of `configs/` set some options to other values
(by default `data/mined`, `model/sd15`, `train/paper` and `eval/heldout`), and so do the
experiments. `mimicbrush train --cfg job` prints the values of a run. Options marked *ours* are not
in the paper. Tables of `model.*` with the name of a class are only for this kind of model.
"""
#: Options of configs that no dataclass has: they name what a command works on.
MINE_PATHS = {
    "input": ("path", "must be given", "folder of videos and photographs, or a list of them (`.csv`, `.parquet`)"),
    "output": ("path", "must be given", "folder for the mined pairs; with an existing one, mining continues"),
    "input_root": (
        "path or null",
        "`null`",
        "folder that the paths in a list are relative to; null: the folder of the list",
    ),
    "progress": ("true or false", "`true`", "show a progress bar"),
}
EVALUATE_PATHS = {
    "editor": ("name, path, or a list", "must be given", "a pipeline folder, or a name such as `small` or `oracle`"),
    "output": ("path", "must be given", "folder for metrics, tables and images"),
    "pairs": ("path or null", "`null`", "folder of mined pairs: measures how much a reference helps on held-out pairs"),
    "benchmark": ("path or null", "`null`", "or a benchmark folder: computes the metrics of the paper"),
    "seed": (
        str(replace(SEED_RANGE, null="0 with pairs, 1 on a benchmark")),
        "`null`",
        "seed of masks, noise, warps, wrong references and the bootstrap",
    ),
    "num_inference_steps": (
        str(replace(STEPS_RANGE, null="the default of the editor")),
        "`null`",
        "sampler steps",
    ),
    "guidance_scale": (
        str(replace(GUIDANCE_RANGE, null="the default of the editor")),
        "`null`",
        "guidance scale (classifier-free guidance)",
    ),
    "device": ("one of `auto`, `cpu`, `cuda`", "`auto`", "device to run on"),
}


@dataclass(frozen=True)
class Section:
    """A table of the page.

    Attributes:
        title: its heading, with the prefix of its options.
        about: the first sentence of the dataclass.
        rows: option -> type and range, default, meaning.
    """

    title: str
    about: str
    rows: Mapping[str, tuple[str, str, str]]


def describe_fields(options: type[Any]) -> dict[str, str]:
    """Field -> its meaning, from the section Attributes of the docstring; one entry may name several fields."""
    text = inspect.getdoc(options) or ""
    _, _, attributes = text.partition("Attributes:\n")
    attributes = re.split(r"\n(?=\w[^\n]*:\n)|\n\n(?=\S)", attributes)[0]
    meanings = {}
    for entry in re.split(r"\n(?=    \S)", f"\n{attributes}"):
        names, _, meaning = entry.strip().partition(": ")
        meaning = " ".join(meaning.split())
        for name in names.split(", "):
            meanings[name] = _for_users(meaning, name)
    return meanings


def _for_users(meaning: str, name: str) -> str:
    """Write a meaning for who reads the page, and not the code: with what it refers to, and null for None."""
    if (other := re.match(r"(?:see|as in) `(\w+)`[.;]? *", meaning)) and other[1] in _REFERRED_TO:
        rest = meaning[other.end() :]
        meaning = describe_fields(_REFERRED_TO[other[1]])[name] + (f". {rest}" if rest else "")
    meaning = re.sub(r"[,;] one of `[A-Z_]+`|^one of `[A-Z_]+`[.;] *", "", meaning)
    return re.sub(r"\bNone\b", "null", meaning).removesuffix(".")


def describe_values(hint: Any, option: Field[Any]) -> str:
    """Describe the type and the range of an option."""
    values = values_of(option)
    if isinstance(values, Choices):
        words = ", ".join(f"`{each}`" for each in values.allowed)
        return f"{'a list of one or more of' if values.many else 'one of'} {words}"
    if isinstance(values, NumberRange | NumberList):
        return str(values)
    kinds = [each for each in (get_args(hint) or (hint,)) if each is not Ellipsis]
    names = {bool: "true or false", str: "a string", NoneType: "null"}
    if hint is not None and getattr(hint, "__origin__", None) is tuple:
        return "a list of strings"
    return " or ".join(names[each] for each in kinds)


def show_default(option: Field[Any]) -> str:
    """Write the default of an option as a command line has it."""
    if option.default is MISSING or option.default == "???":
        return "chosen in `configs/`"
    return f"`{_show(option.default)}`"


def _show(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_show, value))}]"
    return '""' if value == "" else str(value)


def list_sections(options: type[Any], prefix: str = "", base: type[Any] | None = None) -> Iterator[Section]:
    """List the table of a dataclass, and those of the dataclasses in it.

    Args:
        options: the dataclass.
        prefix: what a command line writes before its fields.
        base: its base, whose table is there already: then only the fields that it describes itself are listed.
    """
    hints, meanings = get_type_hints(options), describe_fields(options)
    rows, inner = {}, []
    for each in fields(options):
        hint, name = hints[each.name], f"{prefix}{each.name}"
        of_dict = get_args(hint)[1] if getattr(hint, "__origin__", None) is dict else None
        if base is not None and each.name not in meanings:
            continue
        if is_dataclass(hint):
            inner.append((hint, f"{name}."))
        elif of_dict is not None:
            inner.append((of_dict, f"{name}.NAME."))
        else:
            rows[name] = (describe_values(hint, each), show_default(each), meanings[each.name])
    about = (inspect.getdoc(options) or "").split("\n\n")[0].replace("\n", " ")
    title = f"{prefix}*" if base is None else f"{prefix}* of {options.__name__}"
    if rows:
        yield Section(title, about, rows)
    for hint, name in inner:
        yield from list_sections(hint, name)  # type: ignore[arg-type]
        for kind in list_subclasses(hint):
            yield from list_sections(kind, name, base=hint)  # type: ignore[arg-type]


def build_page() -> str:
    """Build the text of the page."""
    from mimicbrush.assembly.config import TrainConfig
    from mimicbrush.evaluation.benchmark.options import BackboneOptions, BenchmarkOptions
    from mimicbrush.mining.executors import Resources
    from mimicbrush.mining.options import MiningOptions
    from mimicbrush.mining.run import ArrayTask

    lines = [HEAD, TRAIN_HEAD]
    for section in list_sections(TrainConfig):
        lines += _write_table(section)
    lines.append("## mimicbrush mine\n")
    lines += _write_table(Section("Input and output", "Input and output.", MINE_PATHS))
    for options, prefix in ((Resources, ""), (ArrayTask, "task."), (MiningOptions, "")):
        for section in list_sections(options, prefix):
            lines += _write_table(Section(options.__name__, section.about, section.rows))
    lines.append("## mimicbrush evaluate\n")
    lines += _write_table(Section("Input and output", "Editor, data, output, and how the editor runs.", EVALUATE_PATHS))
    for options, title in (
        (EvaluationOptions, "With pairs="),
        (BenchmarkOptions, "With benchmark="),
        (BackboneOptions, "With benchmark=: networks of the metrics"),
    ):
        (section, *_) = list_sections(options)
        rows = {name: row for name, row in section.rows.items() if name not in (*EVALUATE_PATHS, "editors")}
        lines += _write_table(Section(title, section.about, rows))
    return "\n".join(lines).rstrip() + "\n"


def _write_table(section: Section) -> list[str]:
    title = f"`{section.title}`" if "*" in section.title else section.title
    about = textwrap.fill(_as_markdown(section.about), 100, break_long_words=False, break_on_hyphens=False)
    lines = [f"### {title}", "", about, "", "| option | type and range | default | meaning |"]
    lines.append("|---|---|---|---|")
    for name, cells in section.rows.items():
        lines.append(
            "| " + " | ".join([f"`{name}`", *(_as_markdown(cell).replace("|", "\\|") for cell in cells)]) + " |"
        )
    return [*lines, ""]


def _as_markdown(text: str) -> str:
    return re.sub(r"\bNone\b", "null", text.replace("``", "`"))


def main() -> None:
    """Write the page, or check it."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only check whether the page is up to date")
    arguments = parser.parse_args()
    page = build_page()
    if not arguments.check:
        PAGE.write_text(page, encoding="utf-8")
        print(f"wrote {PAGE}")
    elif page != PAGE.read_text(encoding="utf-8"):
        sys.exit(f"{PAGE} is not up to date; write it with: python scripts/options_page.py")


if __name__ == "__main__":
    main()
