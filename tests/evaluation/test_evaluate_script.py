from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import warm_scripts
import yaml

from mimicbrush.evaluation.benchmark.options import BenchmarkOptions
from mimicbrush.evaluation.heldout.options import EvaluationOptions

ROOT = Path(__file__).parents[2]


def test_the_config_says_what_the_dataclass_says() -> None:
    config = yaml.safe_load((ROOT / "configs" / "evaluate.yaml").read_text())
    for key in ("editor", "pairs", "benchmark", "output", "device", "hydra", "defaults"):
        config.pop(key)
    on_benchmark = {key: config.pop(key) for key in ("dino", "dinov2", "clip", "lpips", "shown_cases")}
    assert config.pop("seed") is None
    assert config | {"sets": tuple(config["sets"]), "seed": 0} == asdict(EvaluationOptions())
    defaults = asdict(BenchmarkOptions(editors=("proof",)))
    assert on_benchmark == defaults["backbones"] | {"shown_cases": defaults["shown_cases"]}
    assert defaults["seed"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "editor="),
        (["editor=nowhere", "pairs=nowhere", "output=out"], "neither a folder nor the name of an editor"),
        (["editor=source", "pairs=nowhere", "output=out"], "can edit only benchmark cases"),
        (["editor=oracle", "pairs=nowhere", "output=out"], "nowhere"),
        (["editor=nowhere", "pairs=nowhere", "output=out", "split=test"], "heldout, all"),
        (["editor=.", "pairs=nowhere", "output=out"], "model_index.json"),
        (["editor=.", "pairs=nowhere", "output=out", "batch_size=abc"], "batch_size=abc: expected a whole number"),
        (["editor=.", "pairs=nowhere", "output=out", "sets=3"], "sets=3: expected a list"),
        (["editor=.", "output=out"], "either pairs="),
        (["editor=.", "output=out", "pairs=a", "benchmark=b"], "or benchmark="),
        (["editor=[a,b]", "output=out", "pairs=a"], "expected one editor with pairs="),
        (["editor=orcale", "output=out", "benchmark=b"], "Did you mean 'oracle'?"),
        (["editor=oracle", "output=out", "benchmark=b", "sets=[warped]"], "this option has no effect with bench"),
        (["editor=.", "output=out", "pairs=a", "clip=b"], "this option has no effect with pairs="),
    ],
)
def test_mistakes_get_one_plain_message(
    arguments: list[str], message: str, tmp_path: Path, script_environment: Callable[[], dict[str, str]]
) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), *arguments]
    done = warm_scripts.run(
        command, cwd=tmp_path, env=script_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())  # nothing is littered
