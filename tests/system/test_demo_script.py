from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import warm_scripts
from hydra import compose, initialize_config_dir
from PIL import Image

from mimicbrush import assembly
from mimicbrush.cli.dev import demo
from mimicbrush.data.manifest import read_manifest
from mimicbrush.errors import InputError
from mimicbrush.evaluation.heldout.showcase import find_showcase_hole
from mimicbrush.pipelines import small_model as shipped
from mimicbrush.pipelines.editing.inputs import read_inputs
from mimicbrush.pipelines.editing.requests import collect_edits
from mimicbrush.pipelines.find_pipeline import find_pipeline

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "scripts" / "demo.py"


def test_the_demo_never_empties_a_folder_that_is_not_its_own(
    tmp_path: Path, script_environment: Callable[[], dict[str, str]]
) -> None:
    precious = tmp_path / "work" / "precious.txt"
    precious.parent.mkdir()
    precious.write_text("mine")
    for folder, message in ((precious.parent, "not made by this demo"), (precious, "is a file")):
        command = [sys.executable, str(DEMO), "--output", str(folder)]
        done = warm_scripts.run(command, env=script_environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert precious.read_text() == "mine"


def test_without_the_small_model_it_says_so_and_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "is_shipped", lambda: False)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output", str(tmp_path / "demo")])
    with pytest.raises(InputError, match="this installation does not have it"):
        demo.main()
    assert not (tmp_path / "demo").exists()


def test_its_training_fits_the_small_model() -> None:
    """Its prediction type and shapes are those of the weights, whatever weights come with the project."""
    assembly.register_schemas()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("train", ["+experiment=fine_tune", "data.root=x", f"model.path='{shipped.SHIPPED_MODEL}'"])
    filled, differs = assembly.apply_pipeline_conventions(config)
    assert differs == [] and filled.model.size_px == shipped.shipped_size_px()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        named = compose("train", ["+experiment=fine_tune", "data.root=x", "model=shipped"])
    assert find_pipeline(named.model.path) == shipped.SHIPPED_MODEL


def write_scores(folder: Path, when: str, values: np.ndarray) -> None:
    """(clips, pairs) PSNR of both sets."""
    (folder / "evaluation" / when).mkdir(parents=True, exist_ok=True)
    lines = [
        {"set": name, "pair_id": f"{clip}-{pair}", "source_hash": f"{clip}", "rows": {"model": {"psnr": float(psnr)}}}
        for name in ("natural", "warped")
        for (clip, pair), psnr in np.ndenumerate(values)
    ]
    (folder / "evaluation" / when / "per_pair.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("change", "said"),
    [(0.5, "Fine-tuning helped here"), (-0.5, "did harm here"), (0.0, "holds zero: this does not show")],
)
def test_it_claims_nothing_that_the_interval_denies(tmp_path: Path, change: float, said: str) -> None:
    rng = np.random.default_rng(1)
    before = rng.normal(12, 3, (12, 2))
    noise = rng.normal(0, 0.3, (12, 2))
    write_scores(tmp_path, "before", before)
    write_scores(tmp_path, "after", before + change + noise - noise.mean())
    text = demo.compare(tmp_path, "natural", seed=0)
    assert said in text and f"{change:+.2f} dB (95 % interval" in text.replace("-0.00", "+0.00")
    assert "too narrow" not in text


def test_few_clips_are_cautioned_about(tmp_path: Path) -> None:
    for when in ("before", "after"):
        write_scores(tmp_path, when, np.full((4, 2), 12.0))
    assert "Only 4 source videos" in demo.compare(tmp_path, "warped", seed=0)


def test_the_edits_are_pairs_with_holes_that_the_reference_explains(
    mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mimicbrush.evaluation.heldout.showcase._LEAST_AROUND", 4)  # of the few matches of a toy
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "heldout").symlink_to(mined)
    edits = demo.write_edits(tmp_path)
    collected = collect_edits(edits / "edits.jsonl", tmp_path / "before")
    assert len(collected) == demo.EDITS == len({edit.source for edit in collected})
    pairs = {pair.read_a().tobytes(): pair for pair in read_manifest(mined) if pair.kind == "video"}
    for edit, named in zip(collected, demo.read_edits(tmp_path), strict=True):
        inputs = read_inputs(edit)
        with Image.open(edits / named["source"]) as image:
            pair = pairs[image.tobytes()]
        assert inputs.source.size == inputs.mask.size == pair.size_px[::-1]
        hole = find_showcase_hole(pair)
        assert hole is not None and 0.02 < (hole.mask > 0).mean() < 0.5
    assert [edit.output.name for edit in collected] == [edit["output"] for edit in demo.read_edits(tmp_path)]
