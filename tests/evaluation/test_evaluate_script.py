from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from mimicbrush.evaluation.options import EvaluationOptions

ROOT = Path(__file__).parents[2]


def test_the_config_says_what_the_dataclass_says() -> None:
    config = yaml.safe_load((ROOT / "configs" / "evaluate.yaml").read_text())
    for key in ("editor", "pairs", "output", "device", "hydra", "defaults"):
        config.pop(key)
    assert config | {"sets": tuple(config["sets"])} == asdict(EvaluationOptions())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "editor="),
        (["editor=nowhere", "pairs=nowhere", "output=out"], "no such folder"),
        (["editor=nowhere", "pairs=nowhere", "output=out", "split=test"], "heldout, all"),
        (["editor=.", "pairs=nowhere", "output=out"], "model_index.json"),
        (["editor=.", "pairs=nowhere", "output=out", "batch_size=abc"], "batch_size=abc: must be a whole number"),
        (["editor=.", "pairs=nowhere", "output=out", "sets=3"], "sets=3: must be a list"),
    ],
)
def test_mistakes_get_one_plain_message(
    arguments: list[str], message: str, tmp_path: Path, script_environment: Callable[[], dict[str, str]]
) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=script_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())  # nothing is littered
