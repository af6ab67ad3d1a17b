"""What a user types in a shell is what train, mine and evaluate read: any text, and no traceback of Hydra's."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import warm_scripts
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from mining_inputs import write_clips
from omegaconf import DictConfig, OmegaConf
from toy_run import SMALLEST

from mimicbrush import assembly
from mimicbrush.assembly.command_line import (
    CommandOptions,
    format_config,
    list_plain_options,
    list_training_options,
    resolve_config,
    translate_arguments,
)
from mimicbrush.cli import evaluate, mine
from mimicbrush.errors import InputError
from mimicbrush.evaluation.benchmark.options import BackboneOptions, BenchmarkOptions
from mimicbrush.evaluation.heldout.options import EvaluationOptions
from mimicbrush.mining.executors import Resources
from mimicbrush.mining.options import MiningOptions
from mimicbrush.ranges import values_of

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
TRAIN = list_training_options(CONFIGS)
MINE = list_plain_options(CONFIGS / "mine.yaml", mine.MINE_TEXTS)
EVALUATE = list_plain_options(CONFIGS / "evaluate.yaml", evaluate.EVALUATE_TEXTS)
#: All that a shell can pass: no NUL. Many of the characters that mean something to Hydra, YAML or OmegaConf.
TEXT = st.text(st.one_of(st.sampled_from("\\'\"${}[]()=,:#~ .-_é動0123456789e\n\t?!&%@*"), st.characters(codec=None)),
               min_size=1, max_size=12).filter(lambda text: "\0" not in text)  # fmt: skip
NASTY = "a b=(1),#${run_name}'\"{[é動~$\\"


def read_typed(argument: str, options: CommandOptions, sweep: bool = False) -> DictConfig:
    """The config that an argument leads to, as Hydra and OmegaConf read it."""
    (translated,) = [x for x in translate_arguments(["-m"] * sweep + [argument], options) if x != "-m"]
    override = OverridesParser.create().parse_override(translated)
    return OmegaConf.create({override.key_or_group.replace(".", "_"): override.value()})


EVERY_TEXT = [(options, name) for options in (TRAIN, MINE, EVALUATE) for name in options.texts]


@example((TRAIN, "run_dir"), "2024_11_29")
@example((MINE, "output"), "3.10")
@example((MINE, "input"), "1e3")
@example((MINE, "input"), "null")
@example((EVALUATE, "pairs"), "true")
@example((EVALUATE, "editor"), "???")
@example((TRAIN, "data.sources.*.root"), "${run_name}")
@example((TRAIN, "model.path"), "\\${a}'\\")
@given(st.sampled_from(EVERY_TEXT), TEXT)
def test_any_text_is_read_as_it_was_typed(option: tuple[CommandOptions, str], text: str) -> None:
    options, name = option
    if (text == "null" and options.texts[name].null) or (text[0] == "[" and text[-1] == "]"):
        text = f"./{text}"  # nothing, and a list of editors, otherwise
    found = read_typed(f"{name.replace('*', 'mine')}={text}", options)
    # What is missing is called "???" in a config.
    assert list(found.values()) == ["./???" if text == "???" else text]


@given(TEXT, TEXT)
def test_in_a_sweep_a_comma_separates_two_texts(one: str, other: str) -> None:
    one, other = (each.replace("\\", "/").replace("???", "x") for each in (one, other))  # \, is a comma
    typed = ",".join(each.replace(",", "\\,") for each in (one, other))
    (translated,) = translate_arguments(["-m", f"data.root={typed}"], TRAIN)[1:]
    override = OverridesParser.create().parse_override(translated)
    found = [OmegaConf.create({"a": eval_text(each)}).a for each in override.sweep_string_iterator()]
    assert found == [one, other]


def eval_text(element: str) -> str:
    """A value as the job of a sweep reads it."""
    return str(OverridesParser.create().parse_override(f"a={element}").value())


@example("a\x85b\u2028c\u2029 動 1e3")
@given(TEXT)
def test_text_in_a_stored_config_is_read_again_as_it_was(text: str) -> None:
    if text == "???":
        return
    stored = format_config({"a": {"b": [text], "c": text}, "run": "x"})
    again = OmegaConf.create(yaml.safe_load(stored))
    assert again.a.c == text and again.a.b[0] == text
    assert yaml.safe_load(stored.encode("utf-8", "strict"))  # a file holds it


def test_interpolations_in_yaml_work_as_before() -> None:
    assembly.register_schemas()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", translate_arguments(["+experiment=smoke", f"run_name={NASTY}"], TRAIN))
    assert (config.run_name, config.run_dir) == (NASTY, f"runs/{NASTY}")


def test_each_option_that_is_text_is_known_as_text() -> None:
    """A new option that is text, and not one of a few words, must be read as it is typed."""
    for options, *schemas in (
        (MINE, MiningOptions, Resources),
        (EVALUATE, EvaluationOptions, BenchmarkOptions, BackboneOptions),
    ):
        texts = {"input", "output", "input_root"} if options is MINE else {"editor", "output", "pairs", "benchmark"}
        for schema in schemas:
            hints = get_type_hints(schema)
            texts |= {
                each.name
                for each in fields(schema)
                if str in (hints[each.name], *get_args(hints[each.name])) and values_of(each) is None
            }
        assert set(options.texts) == texts - {"editors"}
        assert texts - {"editors"} <= options.names
    assert {"run_dir", "run_name", "data.root", "data.sources.*.root", "model.path", "model.unet", "model.encoders",
            "eval.pairs", "train.resume", "data.mask.strategy"} <= set(TRAIN.texts)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        (MINE, ["input="], "input= is empty"),
        (MINE, ["inptu=a"], r"there is no option inptu\. Did you mean 'input'\?"),
        (MINE, ["--input", "a"], "--input: options of this command have no dashes. Write input=a"),
        (MINE, ["videos"], "videos: expected NAME=VALUE, such as input=PATH"),
        (EVALUATE, ["editro=x"], "Did you mean 'editor'"),
        (TRAIN, ["run_dir="], "run_dir= is empty"),
        (TRAIN, ["train.lerning_rate=1"], r"no option train\.lerning_rate\. Did you mean 'train\.learning_rate'\?"),
        (TRAIN, ["+experiment=smok"], r"\+experiment=smok: expected one of default, .*\. Did you mean 'smoke'\?"),
        (TRAIN, ["experiment=smoke"], r"this group needs a plus\. Write \+experiment=smoke"),
        (TRAIN, ["--experiment", "smoke"], r"--experiment: .* Write \+experiment=smoke"),
        (TRAIN, ["--learning-rate=1"], r"Write train\.learning_rate=1"),
        (TRAIN, ["--lerning-rate", "1"], r"Write train\.learning_rate=1"),
        (TRAIN, ["--multirn"], r"there is no flag --multirn\. Did you mean '--multirun'\?"),
        (EVALUATE, ["--benchmrk=BENCH"], "Write benchmark=BENCH"),
        (TRAIN, ["model=tyo"], r"model=tyo: expected one of .*\. Did you mean 'toy'\?"),
        (TRAIN, ["train.max_steps=many"], r"train\.max_steps=many: expected a whole number"),
        (TRAIN, ["train.max_steps=1.5"], r"train\.max_steps=1\.5: expected a whole number"),
        (TRAIN, ["train.max_steps=true"], r"train\.max_steps=true: expected a whole number"),
        (TRAIN, ["train.learning_rate=nan"], r"train\.learning_rate=nan: expected a number from 0 to 1"),
        (TRAIN, ["train.adam_betas=[0.9]"], r"train\.adam_betas=\[0\.9\]: expected a list of 2 values"),
        (TRAIN, [f"seed={2**64}"], "seed=18446744073709551616: expected a whole number"),
        (TRAIN, ["train.compile=3"], r"train\.compile=3: expected one of true, false"),
        (
            TRAIN,
            ["train.tracker=wandd"],
            r"train\.tracker=wandd: expected one of none, wandb, tensorboard, trackio. Did you",
        ),
        (TRAIN, ["=3"], "=3: expected NAME=VALUE"),
        (TRAIN, ["+"], r"\+: expected NAME=VALUE"),
        (TRAIN, ["--", "run_dir=a"], "--: expected NAME=VALUE"),
        (TRAIN, ["+data.sources.a.weight=0"], r"data\.sources\.a\.weight=0: expected a number above 0"),
    ],
)
def test_what_cannot_be_meant_is_one_plain_message(options: CommandOptions, arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        translate_arguments(arguments, options)


def test_what_is_hydras_own_stays() -> None:
    arguments = ["--cfg", "job", "-m", "+experiment=smoke", "+ablation=glob(*)", "seed=0,1", "~data",
                 "hydra.verbose=true", "train.lora_target_modules=[to_q,to_k]", "train.learning_rate=1e-4,1e-5",
                 "data/augmentation=weak"]  # fmt: skip
    assert translate_arguments(arguments, TRAIN) == arguments


Script = Callable[..., str]


def test_a_flag_may_stand_anywhere() -> None:
    arguments = ["+experiment=smoke", "-m", "seed=0,1", "--cfg", "job", "run_name=a"]
    assert translate_arguments(arguments, TRAIN) == [
        "-m",
        "--cfg",
        "job",
        "+experiment=smoke",
        "seed=0,1",
        "run_name='a'",
    ]


def test_an_empty_list_of_texts_is_empty() -> None:
    assert translate_arguments(["editor=[]"], EVALUATE) == ["editor=[]"]
    assert translate_arguments(["editor=[a, b,]"], EVALUATE) == ["editor=['a','b']"]


@pytest.mark.parametrize("value", ["${train.nothing}", "${seed}"])
def test_an_interpolation_that_leads_nowhere_is_one_plain_message(value: str) -> None:
    config = OmegaConf.create({"seed": value, "train": {}})
    with pytest.raises(InputError, match=r"^seed: .*; check the interpolation \$\{ \}$"):
        resolve_config(config)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("mine_pairs.py", ["input=a", "output=b", "workers=${nothing}"], "error: workers: "),
        ("mine_pairs.py", ["input=.", "output=b", "task=3"], "error: task=3: expected two options"),
        ("mine_pairs.py", ["input=.", "output=b", "task=null"], "error: task=None: expected two options"),
        ("evaluate.py", ["editor=small", "output=b", "pairs=c", "seed=${nothing}"], "error: seed: "),
        ("train.py", ["+experiment=smoke", "data.root=a", "seed=${nothing}"], "error: seed: "),
        ("train.py", ["+experiment=smoke", "data.root=a", "-m", "seed=${nothing}"], "'nothing' not found"),
        (
            "train.py",
            ["hydra.run.dir=/proc/x", "+experiment=smoke"],
            "error: cannot write to the working folder of Hydra",
        ),
    ],
)
def test_what_hydra_finds_out_late_is_no_fault_of_ours(
    name: str, arguments: list[str], message: str, script: Script
) -> None:
    assert message in script(name, *arguments, status=2)


@pytest.fixture
def script(tmp_path: Path, script_environment: Callable[[], dict[str, str]]) -> Script:
    def call(name: str, *arguments: str, status: int = 0) -> str:
        command = [sys.executable, str(ROOT / "scripts" / name), *arguments]
        done = warm_scripts.run(command, cwd=tmp_path, env=script_environment(), capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        return str(done.stdout + done.stderr)

    return call


def find_line(printed: str, words: str) -> str:
    return next(line for line in printed.splitlines() if words in line)


@pytest.mark.slow
def test_nasty_names_go_through_mining_training_exporting_and_evaluating(tmp_path: Path, script: Script) -> None:
    write_clips(tmp_path / NASTY / "in", 3)
    pairs, run = f"{NASTY}/2024_11_29", f"{NASTY}/3.10"
    told = script("mine_pairs.py", f"input={NASTY}/in", f"output={pairs}", "workers=1", "pairs_per_clip=2",
                  "progress=false")  # fmt: skip
    # The command that is named next can be pasted into a shell.
    assert shlex.split(find_line(told, "next: "))[-1] == f"data.root={pairs}"
    told = script("train.py", *SMALLEST, f"data.root={pairs}", f"run_dir={run}", f"run_name={NASTY}",
                  "train.max_steps=1")  # fmt: skip
    assert shlex.split(find_line(told, "mimicbrush edit"))[-1] == f"{run}/pipeline"
    assert sorted(path.name for path in (tmp_path / NASTY).iterdir()) == ["2024_11_29", "3.10", "in"]
    stored = OmegaConf.load(tmp_path / run / "config.yaml")
    assert (stored.data.root, stored.run_dir, stored.run_name) == (pairs, run, NASTY)
    script("export_run.py", run, "-o", f"{NASTY}/1e3")
    told = script("evaluate.py", f"editor={NASTY}/1e3", f"pairs={pairs}", f"output={NASTY}/true", "split=all",
                  "max_pairs=2", "num_inference_steps=1", "sets=[natural]")  # fmt: skip
    assert json.loads((tmp_path / NASTY / "true/metrics.json").read_text())["about"]["pairs"] == pairs, told


@pytest.mark.slow
def test_nasty_names_go_through_a_sweep_that_is_started_again(tmp_path: Path, mined: Path, script: Script) -> None:
    (tmp_path / NASTY).mkdir()
    (tmp_path / NASTY / "pairs").symlink_to(mined)
    typed = f"{NASTY}/pairs".replace(",", "\\,")
    command = ("-m", *SMALLEST, f"data.root={typed}", "seed=0,1", "train.max_steps=1", f"hydra.sweep.dir={NASTY}/sweep")
    script("train.py", *command)
    jobs = ["smoke-seed0", "smoke-seed1"]
    folder = tmp_path / NASTY / "sweep"
    assert [name for name in jobs if (folder / name / "finished.json").is_file()] == jobs
    assert [OmegaConf.load(folder / name / "config.yaml").data.root for name in jobs] == [f"{NASTY}/pairs"] * 2
    assert script("train.py", *command).count("is complete (1 steps): skipped") == 2
