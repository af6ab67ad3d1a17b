"""Command lines for Hydra: text is read as it was typed, and a wrong option gives one plain message.

In Hydra's grammar 3.10 is a number, and a space, "=" or "(" in a file's name is an error. So the values of options
that are text are quoted here before Hydra sees them. In a sweep (``-m``) a comma still separates two values, and
``\\,`` is a comma.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_omega_conf_dumper  # it quotes text that OmegaConf would read as a number
from omegaconf.errors import OmegaConfBaseException

from mimicbrush.assembly.config import TrainConfig
from mimicbrush.errors import InputError, describe_os_error
from mimicbrush.ranges import Choices, NumberList, NumberRange, suggest, values_of

#: Groups of configs for training. The first two are in no list of defaults, so they are added with a plus.
CONFIG_GROUPS = ("experiment", "ablation", "model", "data", "data/augmentation", "train", "eval")
ADDED_GROUPS = CONFIG_GROUPS[:2]
#: Hydra's own flags, and whether a value follows.
_FLAGS = {
    **dict.fromkeys(("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r"), False),
    **dict.fromkeys(("--multirun", "-m", "--shell-completion", "-sc", "--info", "-i"), False),
    **dict.fromkeys(("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"), True),
    **dict.fromkeys(("--config-dir", "-cd", "--experimental-rerun"), True),
}
_SWEEP_FLAGS = {"--multirun", "-m"}
#: Flags with which configs of other folders may add options and choices that are not known here.
_OTHER_CONFIGS = {"--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--experimental-rerun"}
#: Characters beside the newline that end a line in YAML.
_LINE_ENDS = re.compile("[\x85\u2028\u2029]")
#: What Hydra's own options take as text.
_HYDRA_TEXT = ("hydra.run.dir", "hydra.sweep.dir")


@dataclass(frozen=True)
class TextOption:
    """An option whose value is text: a path, or a name.

    Attributes:
        null: whether `null` means that there is none; otherwise it is text.
        empty: whether it may be empty.
        listed: whether ``[a,b]`` is a list of texts.
    """

    null: bool = False
    empty: bool = False
    listed: bool = False


@dataclass(frozen=True)
class CommandOptions:
    """Options of a command whose line Hydra reads.

    Attributes:
        names: of all options; "*" stands for a name of the user's own.
        texts: those whose values are text.
        values: what the values of others may be, where that is declared.
        groups: folder of configs -> the names in it.
        added: groups that must be written with a plus.
    """

    names: frozenset[str]
    texts: Mapping[str, TextOption] = field(default_factory=dict)
    values: Mapping[str, NumberRange | NumberList | Choices] = field(default_factory=dict)
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    added: Sequence[str] = ()


def list_training_options(configs: Path) -> CommandOptions:
    """List the options of ``configs/train.yaml``. Their types say which are text, and what the others may be.

    Args:
        configs: the folder of that.
    """
    found = dict(_walk(TrainConfig))
    texts: dict[str, TextOption] = {}
    values: dict[str, NumberRange | NumberList | Choices] = {}
    for name, (hint, each) in found.items():
        declared = values_of(each)
        if declared is not None:
            values[name] = declared
        elif hint is bool:
            values[name] = Choices((True, False))
        elif hint is str or set(get_args(hint)) == {str, NoneType}:
            texts[name] = TextOption(null=NoneType in get_args(hint), empty=each.default == "")
    groups = {name: sorted(path.stem for path in (configs / name).glob("*.yaml")) for name in CONFIG_GROUPS}
    return CommandOptions(frozenset(found), texts, values, groups, added=ADDED_GROUPS)


def list_plain_options(config: Path, texts: Mapping[str, TextOption]) -> CommandOptions:
    """List the options of a config that has no schema.

    Args:
        config: its file.
        texts: the options in it that are text.
    """
    values = OmegaConf.to_container(OmegaConf.load(config))
    assert isinstance(values, dict)
    names = {str(key) for key in values} | {
        f"{key!s}.{inner!s}" for key, value in values.items() if isinstance(value, dict) for inner in value
    }
    return CommandOptions(frozenset(names - {"defaults"}), texts)


def list_subclasses(schema: type[Any]) -> Iterable[type[Any]]:
    """Yield all subclasses of a dataclass of options, also those of subclasses."""
    for each in schema.__subclasses__():
        yield each
        yield from list_subclasses(each)


def _walk(schema: type[Any], prefix: str = "") -> Iterable[tuple[str, tuple[Any, Field[Any]]]]:
    """Yield name, type and field of every option, including those of all subclasses (kinds of models)."""
    for each_class in (schema, *list_subclasses(schema)):
        hints = get_type_hints(each_class)
        for each in fields(each_class):
            hint = hints[each.name]
            yield f"{prefix}{each.name}", (hint, each)
            if is_dataclass(hint):
                yield from _walk(hint, f"{prefix}{each.name}.")  # type: ignore[arg-type]
            elif len(get_args(hint)) == 2 and is_dataclass(get_args(hint)[1]):  # dict[str, Options]
                yield f"{prefix}{each.name}.*", (get_args(hint)[1], each)
                yield from _walk(get_args(hint)[1], f"{prefix}{each.name}.*.")


def run_with_hydra(command: Callable[[], None], options: CommandOptions) -> None:
    """Run a function of ``hydra.main`` with the command line of this process.

    Raises:
        InputError: an option is unknown, or cannot have its value; the message is one for users.
    """
    sys.argv[1:] = translate_arguments(sys.argv[1:], options)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints its own words and ends the process
    try:
        command()
    except (HydraException, OmegaConfBaseException) as error:
        raise describe_hydra_error(error) from error
    except OSError as error:  # of Hydra's own folders; what happens in the command has ended the process by now
        raise InputError(f"cannot write to the working folder of Hydra: {describe_os_error(error)}") from error


def resolve_config(config: DictConfig) -> dict[str, Any]:
    """Fill in the interpolations of a config, and return its values.

    Raises:
        InputError: an interpolation leads nowhere, or in a circle.
    """
    try:
        values: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise InputError(
            f"{f'{key}: ' if key else ''}{str(error).splitlines()[0]}; check the interpolation ${{ }}"
        ) from error
    return values


def describe_hydra_error(error: Exception) -> InputError:
    """Describe an error of Hydra or OmegaConf in one message, without its advice for programmers."""
    if absent := re.match(r"Could not override '(.+?)'", str(error)):
        return InputError(f"{absent[1]}: the chosen configs have no such option")
    lines = [line.strip() for line in str(error).splitlines()]
    advice = ("full_key", "object_type", "reference_type", "To append")
    return InputError("these options are not valid: " + "; ".join(x for x in lines if x and not x.startswith(advice)))


def translate_arguments(arguments: Sequence[str], options: CommandOptions) -> list[str]:
    """Write a command line as Hydra must read it.

    Args:
        arguments: as they were typed, without the name of the program.
        options: of the command.

    Raises:
        InputError: names the argument, and says how it is written.
    """
    sweeps = bool(_SWEEP_FLAGS & set(arguments))
    knows_all = not _OTHER_CONFIGS & {argument.partition("=")[0] for argument in arguments}
    # Hydra ignores options after a flag that is between options, so all flags come first.
    flags: list[str] = []
    translated = []
    rest = iter(arguments)
    for argument in rest:
        key, equals, value = argument.partition("=")
        if key in _FLAGS:
            flags.append(argument)
            if _FLAGS[key] and not equals:
                flags += [each for each in [next(rest, None)] if each is not None]
        elif argument.startswith("-") and key.strip("-"):
            if flag := get_close_matches(key, [name for name in _FLAGS if name.startswith("--")], n=1, cutoff=0.8):
                raise InputError(f"there is no flag {key}. Did you mean {flag[0]!r}?")
            written = _write_option(key.lstrip("-").replace("-", "_"), value or next(rest, "VALUE"), options)
            raise InputError(f"{key}: options of this command have no dashes. Write {written}")
        elif not key.strip("+~-") or not (equals or argument.startswith("~")):
            raise InputError(f"{argument}: expected NAME=VALUE, such as {_example(options)}")
        else:
            translated.append(_translate(key, value, options, sweeps, knows_all) if equals else argument)
    return [*flags, *translated]


def _example(options: CommandOptions) -> str:
    return next((f"{name}=PATH" for name in options.texts), "NAME=VALUE")


def _write_option(name: str, value: str, options: CommandOptions) -> str:
    """Write an option that was typed as a flag, by the last part of its name, or the nearest."""
    if name in options.added:
        return f"+{name}={value}"
    by_end = {each.rpartition(".")[2]: each for each in sorted(options.names, key=lambda each: (-len(each), each))}
    nearest = get_close_matches(name, by_end, n=1)
    return f"{by_end[nearest[0]] if nearest else name}={value}"


def _translate(key: str, value: str, options: CommandOptions, sweeps: bool, knows_all: bool) -> str:
    """Write one ``key=value`` as Hydra must read it."""
    plus = key[: len(key) - len(key.lstrip("+"))]
    name = key.lstrip("+~").partition("@")[0]
    if key.startswith("~"):
        return f"{key}={value}"
    if name in options.groups:
        _check_choice(plus, name, value, options, knows_all)
        return f"{key}={value}"
    text = TextOption() if name in _HYDRA_TEXT else _find(options.texts, name)
    if text is not None:
        if not value and not text.empty:
            raise InputError(f"{name}= is empty. Give a value, such as {name}=PATH, or leave it out")
        if sweeps and name not in _HYDRA_TEXT:
            parts = [part.replace("\\,", ",") for part in re.split(r"(?<!\\),", value)]
            return f"{key}={','.join(_quote(part, text) for part in parts)}"
        return f"{key}={_quote(value, text)}"
    if not name.startswith("hydra") and knows_all:
        _check_name(name, options)
    declared = _find(options.values, name)
    if declared is not None and not sweeps:
        _check_value(name, value, declared)
    return f"{key}={value}"


def _find(patterns: Mapping[str, Any], name: str) -> Any:
    return next((found for pattern, found in patterns.items() if fnmatchcase(name, pattern)), None)


def _check_name(name: str, options: CommandOptions) -> None:
    if not any(fnmatchcase(name, known) for known in options.names):
        raise InputError(f"there is no option {name}{suggest(name, (*options.names, *options.groups))}")


def _check_choice(plus: str, group: str, value: str, options: CommandOptions, knows_all: bool) -> None:
    """Check that there is a config of this name. Anything else, such as glob(*), is left to Hydra."""
    names = options.groups[group]
    if group in options.added and not plus:
        raise InputError(f"{group}={value}: this group needs a plus. Write +{group}={value}")
    for each in value.split(","):
        if knows_all and re.fullmatch(r"[\w-]+", each) and each not in (*names, "null"):
            raise InputError(f"{plus}{group}={each}: expected one of {', '.join(names)}{suggest(each, names)}")


def _check_value(name: str, value: str, declared: NumberRange | NumberList | Choices) -> None:
    """Check a value against its declared range or choices, unless it is an interpolation."""
    if "${" in value:
        return
    try:
        parsed = OverridesParser.create().parse_override(f"{name}={value}").value()
    except HydraException:
        parsed = value
    if fault := declared.find_fault(getattr(parsed, "text", parsed)):
        raise InputError(f"{name}={value[:80]}: {fault}")


def _quote(value: str, text: TextOption) -> str:
    """Quote text in the grammar of Hydra, except for a null or a list that the option accepts."""
    if value == "null" and text.null:
        return value
    if text.listed and value.startswith("[") and value.endswith("]"):
        return f"[{','.join(_quote(part.strip(), TextOption()) for part in value[1:-1].split(',') if part.strip())}]"
    if value == "???":  # OmegaConf's word for what is missing
        value = "./???"
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", escape_text(value))
    return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"


def escape_text(text: str) -> str:
    """Escape interpolations of OmegaConf, so that text in a config is read literally."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def format_config(values: Any) -> str:
    """Write the values of a config as YAML that gives the same values when it is read, whatever their text is."""
    escaped = escape_texts(values)
    text = OmegaConf.to_yaml(escaped)
    if _LINE_ENDS.search(text):  # YAML takes these as ends of lines, and PyYAML writes them as they are
        text = yaml.dump(escaped, Dumper=get_omega_conf_dumper(), sort_keys=False, allow_unicode=False)
    return text


def escape_texts(values: Any) -> Any:
    """Escape all text in the values of a config, see `escape_text`."""
    if isinstance(values, dict):
        return {key: escape_texts(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [escape_texts(value) for value in values]
    return escape_text(values) if isinstance(values, str) else values
