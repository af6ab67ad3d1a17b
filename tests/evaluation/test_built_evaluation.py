"""The evaluation while training, as assembly builds it of a configuration."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from composed import compose_train
from function_editor import FunctionEditor
from omegaconf import OmegaConf

from mimicbrush import assembly
from mimicbrush.cli import evaluate as evaluate_command
from mimicbrush.data.manifest import read_manifest, split_pairs
from mimicbrush.errors import DataError
from mimicbrush.evaluation.editors.protocol import PairBatch, PairResults
from mimicbrush.evaluation.heldout.reference_gain import GAINS
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.pipelines import MimicBrushPipeline

ROOT = Path(__file__).parents[2]
DEFAULTS = {
    key: value
    for key, value in yaml.safe_load((ROOT / "configs" / "evaluate.yaml").read_text()).items()
    if key not in ("hydra", "defaults")
}
SMALL = ["model.size_px=16", "model.block_out_channels=[16,32]", "model.attention_heads=2", "model.context_width=16"]
FAST = ["eval=heldout", "eval.num_inference_steps=2", "eval.guidance_scale=2", "eval.batch_size=1"]


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state()
    PartialState._reset_state()


def options(*overrides: str) -> assembly.TrainConfig:
    config = compose_train("+experiment=smoke", *SMALL, *FAST, *overrides)
    return cast(assembly.TrainConfig, OmegaConf.to_object(config))


def copied(mined: Path, root: Path, change: Callable[[pa.Table], pa.Table]) -> Path:
    """The folder with another manifest."""
    shutil.copytree(mined, root)
    (part,) = (root / "manifest").glob("*.parquet")
    pq.write_table(change(pq.read_table(part)), part)
    return root


def pairs_and_notes(chosen: assembly.TrainConfig) -> tuple[set[str], list[str]]:
    sources, _ = assembly.read_pair_sources(chosen.data)
    pairs, notes = assembly.find_evaluated_pairs(chosen, sources)
    trained_on = {pair.source_hash for source in sources for pair in source.pairs}
    assert not trained_on & {pair.source_hash for pair in pairs}
    assert all(pair.kind == "video" for pair in pairs)
    return {pair.pair_id for pair in pairs}, notes


def pipeline_of(chosen: assembly.TrainConfig) -> MimicBrushPipeline:
    return MimicBrushPipeline(**vars(assembly.build_components(chosen.model, 0)), scheduler=noise_scheduler())


def test_the_figures_are_those_that_the_script_finds(mined: Path, tmp_path: Path) -> None:
    chosen = options(f"data.root={mined}", "eval.seed=3", "eval.max_pairs=4", "eval.sheet_pairs=2")
    sources, _ = assembly.read_pair_sources(chosen.data)
    evaluate = assembly.build_evaluation(chosen, sources, tmp_path / "run", Accelerator(cpu=True))
    assert evaluate is not None
    pipeline = pipeline_of(chosen)
    found = evaluate(pipeline, 7)
    assert found.figures["heldout/n"] == 4
    names = sorted(path.name for path in (tmp_path / "run" / "heldout").iterdir())
    assert names == ["heldout.jsonl", "step-00000007.png"]

    pipeline.save_pretrained(tmp_path / "pipeline")
    seen = [f"{key:016x}" for key in assembly.list_origin_keys(sources)]
    training_data = {"heldout_ratio": chosen.data.heldout_ratio, "source_hashes": seen}
    (tmp_path / "pipeline" / "training_data.json").write_text(json.dumps(training_data))
    arguments = {"editor": str(tmp_path / "pipeline"), "pairs": str(mined), "output": str(tmp_path / "out"), "seed": 3,
                 "max_pairs": 4, "num_inference_steps": 2, "guidance_scale": 2, "batch_size": 1, "sets": ["natural"],
                 "device": "cpu"}  # fmt: skip
    evaluate_command.run(OmegaConf.create({**DEFAULTS, **arguments}))
    expected = json.loads((tmp_path / "out" / "metrics.json").read_text())
    for name in ("psnr", "ssim", "n", "n_sources", *GAINS):
        assert found.figures[f"heldout/{name}"] == expected[name], name
    for gain in GAINS:
        bounds = [found.figures[f"heldout/{gain}_ci95_{end}"] for end in ("low", "high")]
        assert bounds == expected[f"{gain}_ci95"]


def test_frozen_networks_in_half_precision_are_evaluated_too(mined: Path, tmp_path: Path) -> None:
    chosen = options(f"data.root={mined}", "eval.max_pairs=2")
    sources, _ = assembly.read_pair_sources(chosen.data)
    evaluate = assembly.build_evaluation(chosen, sources, tmp_path, Accelerator(cpu=True))
    assert evaluate is not None
    pipeline = pipeline_of(chosen)
    for part in (pipeline.vae, pipeline.image_encoder, pipeline.depth_estimator):
        part.to(torch.bfloat16)
    assert evaluate(pipeline, 1).figures["heldout/n"] == 2


def test_without_a_reference_unet_the_correspondence_is_left_out(mined: Path, tmp_path: Path) -> None:
    chosen = options(f"data.root={mined}", "eval.max_pairs=2", "+ablation=reference_clip")
    sources, _ = assembly.read_pair_sources(chosen.data)
    evaluate = assembly.build_evaluation(chosen, sources, tmp_path, Accelerator(cpu=True))
    assert evaluate is not None
    table = evaluate(pipeline_of(chosen), 1).table
    assert len(table) == 2 and "model" in table[0].images and "correspondence" not in table[0].images


def test_it_has_as_many_references_as_the_training(
    mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []

    class Editor(FunctionEditor):
        most_references = 4

        def edit_pairs(self, batch: PairBatch, *, with_correspondences: bool = False) -> PairResults:
            if batch.references is not None:
                seen.append(1 if batch.other_references is None else 1 + batch.other_references.shape[1])
            return PairResults(batch.sources)

    monkeypatch.setattr("mimicbrush.assembly.build._make_editor", lambda *_: Editor(lambda sources, *_: sources))

    def number_frames(table: pa.Table, first: int, step: int) -> pa.Table:
        for place, name in enumerate(("a_frame", "b_frame")):
            column = table.schema.get_field_index(name)
            frames = pa.array([first * place + step * row for row in range(len(table))], table.schema.field(name).type)
            table = table.set_column(column, name, frames)
        return table

    # Stretches of frames that overlap are one shot; of pairs far apart, each is a shot of two frames.
    for name, first, step, expected in (("long", 1000, 1, 2), ("short", 5, 100, 1)):
        root = copied(mined, tmp_path / name, partial(number_frames, first=first, step=step))
        chosen = options(f"data.root={root}", "data.num_references=2", "eval.max_pairs=2")
        sources, _ = assembly.read_pair_sources(chosen.data)
        evaluate = assembly.build_evaluation(chosen, sources, tmp_path / name / "run", Accelerator(cpu=True))
        assert evaluate is not None
        seen.clear()
        evaluate(SimpleNamespace(set_progress_bar_config=lambda **_: None), 1)
        assert set(seen) == {expected}, name
        assert ("note: pairs are evaluated with one reference" in capsys.readouterr().out) == (expected == 1)


def test_of_several_folders_what_each_holds_out_and_nothing_that_another_trains_on(mined: Path, tmp_path: Path) -> None:
    alone, notes = pairs_and_notes(options(f"data.root={mined}"))
    assert alone == {pair.pair_id for pair in split_pairs(read_manifest(mined), "heldout") if pair.kind == "video"}
    assert len(alone) == 6 and not notes
    other = tmp_path / "other"
    shutil.copytree(mined, other)
    named = "+data.sources={{a:{{root:'{}',kind:video}},b:{{root:'{}',kind:image}}}}"
    assert pairs_and_notes(options(named.format(mined, other)))[0] == alone
    # Photographs alone are trained on: the videos of that folder are evaluated on all the same.
    assert pairs_and_notes(options(f"data.root={mined}", "data.video_ratio=0"))[0] == alone
    # Three of the four videos, of which too few are left to hold one out: all are trained on.
    kept = read_manifest(mined)
    videos = sorted({pair.source_hash for pair in kept if pair.kind == "video"})
    fewer = tmp_path / "fewer"
    copied(mined, fewer, lambda table: table.filter(pc.is_in(table["source_hash"], pa.array(videos[:3]))))
    found, notes = pairs_and_notes(options(named.format(mined, fewer).replace("image", "video")))
    assert found == set() and "2 sources are held out in one folder but trained on in another" in notes[0]
    assert "there will be no evaluation during training" in notes[1] and len(notes) == 2


def test_with_too_few_sources_nothing_is_evaluated_and_that_is_said(
    mined: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for chosen in (options(f"data.root={mined}", "data.heldout_ratio=0"), options(f"data.root={mined}", "eval=none")):
        sources, _ = assembly.read_pair_sources(chosen.data)
        assert assembly.build_evaluation(chosen, sources, tmp_path / "run", Accelerator(cpu=True)) is None
    assert capsys.readouterr().out.count("there will be no evaluation during training") == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_of_its_own_is_used_whole_unless_it_was_trained_on(mined: Path, tmp_path: Path) -> None:
    def renamed(which: set[str]) -> Callable[[pa.Table], pa.Table]:
        def change(table: pa.Table) -> pa.Table:
            hashes = ["ffff" + text[4:] if text in which else text for text in table["source_hash"].to_pylist()]
            return table.set_column(table.column_names.index("source_hash"), "source_hash", pa.array(hashes))

        return change

    pairs = read_manifest(mined)
    own = copied(mined, tmp_path / "own", renamed({pair.source_hash for pair in pairs}))
    found, notes = pairs_and_notes(options(f"data.root={mined}", f"eval.pairs={own}"))
    assert len(found) == 12 and "all of its pairs are used" in notes[0]
    # Of this folder the trainer would hold out the two videos that it trains on in the other one.
    heldout = {pair.source_hash for pair in split_pairs(pairs, "heldout")}
    mixed = copied(mined, tmp_path / "mixed", renamed(heldout))
    with pytest.raises(DataError, match=r"eval\.pairs=.* were trained on"):
        pairs_and_notes(options(f"data.root={mined}", f"eval.pairs={mixed}"))
    # With one of the two it would have no other video to take a wrong reference from.
    video = next(pair.source_hash for pair in split_pairs(pairs, "heldout") if pair.kind == "video")
    alone = copied(mined, tmp_path / "alone", renamed({video}))
    with pytest.raises(DataError, match=r"eval\.pairs=.* has one video that was not trained on; at least two"):
        pairs_and_notes(options(f"data.root={mined}", f"eval.pairs={alone}"))
    with pytest.raises(DataError, match=r"eval\.pairs=.* none of the 4 sources is held out"):
        pairs_and_notes(options(f"data.root={mined}", f"eval.pairs={mined}", "data.heldout_ratio=0"))
