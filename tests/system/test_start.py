"""Before anything heavy: what is imported, what help says, what an unprepared machine is told."""

from __future__ import annotations

import pkgutil
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

import mimicbrush
from mimicbrush import __main__ as command_line
from mimicbrush.errors import InputError

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.py"))


def test_optional_packages_are_absent_here() -> None:
    for name in ("torchvision", "decord", "wandb", "trackio", "ray"):
        with pytest.raises(ImportError):
            __import__(name)


def test_every_module_imports_without_them() -> None:
    for module in pkgutil.walk_packages(mimicbrush.__path__, "mimicbrush."):
        __import__(module.name)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_nothing_heavy(script: str, script_environment: Callable[[], dict[str, str]]) -> None:
    # What makes it quick: none of the libraries that take seconds to import.
    code = (
        "import runpy, sys; sys.argv = [sys.argv[1], '--help']; sys.path[0] = 'scripts'\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'skimage', 'pyarrow', 'accelerate'} & set(sys.modules)\n"
        "sys.exit(f'help imports {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, f"scripts/{script}"],
        cwd=ROOT, env=script_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 100


def test_the_list_of_commands_imports_none_of_them(script_environment: Callable[[], dict[str, str]]) -> None:
    code = (
        "import sys; from mimicbrush.__main__ import main; sys.argv = ['mimicbrush', '--help']; main()\n"
        "slow = {'torch', 'numpy', 'PIL', 'hydra', 'mimicbrush.cli'} & set(sys.modules)\n"
        "sys.exit(f'the list imports {slow}' if slow else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=script_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    usage, _, groups = done.stdout.partition("`mimicbrush COMMAND --help` explains the options of a command.\n")
    assert "\n  mimicbrush edit REFERENCE.jpg SOURCE.jpg MASK.png " in usage
    listed = {line.split()[0]: line.split()[1:] for line in groups.splitlines() if line.startswith("  ")}
    assert listed.keys() == command_line.COMMANDS.keys() and all(listed.values())


def test_every_command_is_a_script_too() -> None:
    commands = {import_module(f"mimicbrush.cli.{module}").main for module, _ in command_line.COMMANDS.values()}
    doors = [ROOT / "scripts" / name for name in SCRIPTS if "mimicbrush.cli" in (ROOT / "scripts" / name).read_text()]
    assert {runpy.run_path(str(door))["main"] for door in doors} == commands
    assert len(doors) == len(commands) == len(command_line.COMMANDS)


def test_the_installed_command_is_the_same() -> None:
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert named == {"mimicbrush": "mimicbrush.__main__:main"}


def test_a_misspelt_command_is_told_of_the_nearest(
    tmp_path: Path, script_environment: Callable[[], dict[str, str]]
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mimicbrush", "trian", "+experiment=smoke"],
        cwd=tmp_path, env=script_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr
        == "error: there is no command 'trian'. Did you mean 'train'? `mimicbrush --help` lists all commands.\n"
    )
    with pytest.raises(InputError, match=r"there is no command '7'\. `mimicbrush --help`"):
        command_line.run_command(["7"])


def test_a_command_takes_what_follows_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mimicbrush", "edit", "ref.jpg", "src.jpg"])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert told.startswith("error: expected three images: REF SRC MASK, or --reference, --source and --mask")
    assert told.endswith("\n`mimicbrush edit --help` explains all options.\n")


def test_training_is_composed_in_any_folder(tmp_path: Path, script_environment: Callable[[], dict[str, str]]) -> None:
    options = ["+experiment=smoke", "seed=7", "--cfg", "job"]
    printed = [
        subprocess.run(
            [sys.executable, *door, *options],
            cwd=tmp_path, env=script_environment(), capture_output=True, text=True, check=True,
        ).stdout
        for door in (["-m", "mimicbrush", "train"], [str(ROOT / "scripts" / "train.py")])
    ]  # fmt: skip
    assert printed[0] == printed[1] and printed[0].startswith("run_name: smoke\n") and "seed: 7\n" in printed[0]


def test_the_papers_setting_names_what_is_missing(
    tmp_path: Path, script_environment: Callable[[], dict[str, str]]
) -> None:
    done = subprocess.run(
        [sys.executable, "scripts/train.py", "+experiment=default", f"run_dir={tmp_path / 'run'}"],
        cwd=ROOT, env={**script_environment(), "HF_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    absent = ("data.root is not set", "model.unet=", "model.depth_estimator=", "no CUDA GPU")
    for expected in (*absent, "mimicbrush fetch"):
        assert expected in done.stderr
