from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import warm_scripts
import yaml
from mining_inputs import write_clips

from mimicbrush.data.schema import SCHEMA
from mimicbrush.mining.executors import Resources
from mimicbrush.mining.options import MiningOptions
from mimicbrush.mining.refusals import QUARANTINED, REJECTED
from mimicbrush.mining.run import ArrayTask
from mimicbrush.mining.verify.folder import verify_folder

ROOT = Path(__file__).parents[2]
Mine = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def mine_pairs(tmp_path: Path, script_environment: Callable[[], dict[str, str]]) -> Mine:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "scripts/mine_pairs.py"), *arguments]
        return warm_scripts.run(command, cwd=tmp_path, env=script_environment(), capture_output=True, text=True)

    return call


def test_the_command_mines_says_what_next_and_leaves_nothing_else(tmp_path: Path, mine_pairs: Mine) -> None:
    write_clips(tmp_path / "in", 1)
    (tmp_path / "in/broken.mp4").write_text("text")
    done = mine_pairs("input=in", "output=out", "workers=1", "pairs_per_clip=2")
    assert done.returncode == 0, done.stderr
    assert "2 inputs = 1 accepted + 0 rejected + 1 quarantined; 2 pairs" in done.stdout
    assert "data.root=out" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["inputs"], summary["pairs"]) == (2, 2)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "audit",
        "index.arrow",
        "manifest",
        "markers",
        "plan.json",
        "report.html",
        "shards",
        "summary.json",
        "timing",
    }


def test_nothing_to_mine_and_nothing_given_are_one_plain_message(mine_pairs: Mine) -> None:
    absent = mine_pairs("input=absent", "output=out")
    assert absent.returncode == 2
    assert absent.stderr.count("\n") == 1
    assert "does not exist" in absent.stderr
    nothing = mine_pairs()
    assert nothing.returncode == 2
    assert "input=FOLDER and output=FOLDER" in nothing.stderr
    assert "Traceback" not in absent.stderr + nothing.stderr
    assert mine_pairs("input=a", "output=b", "min_sim=0.3").returncode != 0


@pytest.mark.parametrize("mistake", ["min_ssim=abc", "workers=many"])
def test_a_value_of_a_wrong_type_is_one_plain_message(mistake: str, tmp_path: Path, mine_pairs: Mine) -> None:
    (tmp_path / "in").mkdir()
    done = mine_pairs("input=in", "output=out", mistake)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"{mistake}: expected a" in done.stderr


def test_yaml_and_python_state_the_same_defaults() -> None:
    values = yaml.safe_load((ROOT / "configs/mine.yaml").read_text())
    run_choices = asdict(Resources()) | {"task": asdict(ArrayTask()), "progress": True, "input_root": None}
    assert {key: values[key] for key in run_choices} == run_choices
    other = {"input", "output", "hydra", "defaults", *run_choices}
    assert {key: value for key, value in values.items() if key not in other} == asdict(MiningOptions())


def test_the_schema_document_names_every_column_and_reason() -> None:
    text = (ROOT / "data_manifests/README.md").read_text()
    for word in (*SCHEMA.names, *REJECTED, *QUARANTINED):
        assert f"`{word}`" in text, word
    for line in (ROOT / "data_manifests/example.jsonl").read_text().splitlines():
        assert list(json.loads(line)) == SCHEMA.names


@pytest.mark.slow
def test_the_real_clips(tmp_path: Path, mine_pairs: Mine, shared: Path) -> None:
    done = mine_pairs(f"input={shared / 'data/videos'}", f"output={tmp_path / 'out'}", "pairs_per_clip=2")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["inputs"], summary["accepted"], summary["reasons"]) == (9, 8, {"too_short": 1})
    assert verify_folder(tmp_path / "out", workers=2, progress=False).faults == []


def test_the_broken_clip_gives_a_reason_and_no_pair(tmp_path: Path, mine_pairs: Mine, shared: Path) -> None:
    done = mine_pairs(f"input={shared / 'data/broken'}", f"output={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["quarantined"], summary["pairs"], summary["reasons"]) == (1, 0, {"damaged": 1})
