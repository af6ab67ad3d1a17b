"""Before anything heavy: what is imported, what help says, what an unprepared machine is told."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import mimicbrush

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.py"))


def test_optional_packages_are_absent_here() -> None:
    for name in ("torchvision", "decord", "gradio", "wandb", "ray"):
        with pytest.raises(ImportError):
            __import__(name)


def test_every_module_imports_without_them() -> None:
    for module in pkgutil.walk_packages(mimicbrush.__path__, "mimicbrush."):
        if module.name != "mimicbrush.app.editing_page":  # made of gradio; scripts/app.py asks for it first
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
    for expected in (*absent, "scripts/fetch_weights.py"):
        assert expected in done.stderr
