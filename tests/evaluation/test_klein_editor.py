"""FLUX.2 klein among the editors: names, manners, held-out pairs, also without a reference, and keypoints."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_material import view
from PIL import Image
from toy_data import photograph
from toy_klein import OPTIONS, SIZE_PX, build_klein, open_toy, write_toy_klein

from mimicbrush.cli import pck
from mimicbrush.errors import InputError, WeightsError
from mimicbrush.evaluation.benchmark.layout import TRACKS, BenchmarkWriter, Case
from mimicbrush.evaluation.benchmark.options import BenchmarkOptions
from mimicbrush.evaluation.benchmark.run import evaluate_benchmark
from mimicbrush.evaluation.editors.flux2_klein import Flux2KleinEditor
from mimicbrush.evaluation.editors.protocol import CaseInputs, Editor, PairBatch
from mimicbrush.evaluation.editors.registry import check_editor, find_editor_pipeline, open_editor
from mimicbrush.models.flux2_klein.components import toy_klein
from mimicbrush.pipelines import flux2_klein
from mimicbrush.pipelines.folder import IMITATION_FILE
from mimicbrush.pipelines.klein.folder import LORA_FILE

FAST = {"device": "cpu", "num_inference_steps": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_toy_klein(folder / "pipeline")
    return folder


@pytest.fixture(scope="module")
def editor(run: Path) -> Editor:
    return open_editor(f"flux2_klein:{run}", **FAST)


@pytest.fixture
def pairs() -> PairBatch:
    """Two pairs of photographs."""
    sources, references = (
        np.stack([photograph(name)[:SIZE_PX, :SIZE_PX] for name in names])
        for names in (("coffee.png", "chelsea.png"), ("chelsea.png", "coffee.png"))
    )
    masks = np.zeros((2, SIZE_PX, SIZE_PX), np.uint8)
    masks[:, 20:44, 16:40] = 1
    areas = np.ones_like(masks)
    return PairBatch(sources, masks, references, [3, 4], areas, areas)


def test_names_mean_a_run_its_folder_its_lora_or_the_base(run: Path, tmp_path: Path) -> None:
    folder = run / "pipeline"
    for name in (f"flux2_klein:{run}", f"flux2_klein:{folder}", f"flux2_klein:{folder / LORA_FILE}", str(run)):
        check_editor(name, for_pairs=True)
        assert find_editor_pipeline(name) == folder
    with pytest.raises(WeightsError, match=r"hf download black-forest-labs/FLUX\.2-klein-base-4B"):
        check_editor("flux2_klein")
    with pytest.raises(WeightsError, match="does not contain black-forest-labs"):
        check_editor(f"flux2_klein:{tmp_path}")
    (tmp_path / IMITATION_FILE).write_text("{}")
    with pytest.raises(WeightsError, match="expected flux2_klein"):
        check_editor(f"flux2_klein:{tmp_path}")
    with pytest.raises(InputError, match="small or released after auto_zoom:"):
        check_editor(f"auto_zoom:{run}")


@pytest.mark.slow
def test_the_base_edits_without_training(tmp_path: Path, pairs: PairBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flux2_klein, "KLEIN_SIZE_PX", SIZE_PX)
    toy_klein(OPTIONS).build_pipeline().save_pretrained(tmp_path / "FLUX.2-klein-base-4B")
    for name in (f"flux2_klein:{tmp_path}", f"flux2_klein:{tmp_path / 'FLUX.2-klein-base-4B'}"):
        check_editor(name, for_pairs=True)
        assert find_editor_pipeline(name) is None  # it was not trained on our videos
    opened = open_editor(name, **FAST)
    assert opened.about["trained"] == "False" and "InpaintPipeline" in opened.about["editor"]
    assert opened.edit_pairs(pairs).images.shape == (2, SIZE_PX, SIZE_PX, 3)

    # A LoRA of anybody else states no prompt, so the base encodes one.
    lora = write_toy_klein(tmp_path / "run") / LORA_FILE
    lora = lora.rename(tmp_path / "other.safetensors")
    trained = flux2_klein.open_klein(lora, "cpu", base=tmp_path / "FLUX.2-klein-base-4B")
    assert trained.is_trained and trained.prompt.checksum == opened.pipeline.prompt.checksum
    assert find_editor_pipeline(f"flux2_klein:{lora}") == tmp_path


def test_pairs_are_edited_with_and_without_a_reference(editor: Editor, pairs: PairBatch) -> None:
    whole = editor.edit_pairs(pairs, with_correspondences=True)
    assert whole.images.shape == pairs.sources.shape and whole.images.dtype == np.uint8
    assert len(whole.correspondences) == 2
    values = vars(pairs)
    alone = PairBatch(**{name: each if each is None else each[1:] for name, each in values.items()})
    assert (editor.edit_pairs(alone).images == whole.images[1:]).all()  # whatever the batch
    more = editor.edit_pairs(PairBatch(**{**values, "other_references": pairs.sources[:, None]}))
    assert (more.images != whole.images).any()
    without = PairBatch(**{**values, "references": None})
    nothing = editor.edit_pairs(without, with_correspondences=True)
    assert nothing.correspondences is None and (nothing.images != whole.images).any()
    hidden = pairs.sources.copy()
    hidden[:, 20:44, 16:40] = 9
    assert (editor.edit_pairs(PairBatch(**{**values, "sources": hidden})).images == whole.images).all()


def test_a_case_has_its_own_size_and_tells_its_places(editor: Editor) -> None:
    mask = Image.new("L", (60, 40))
    mask.paste(255, (10, 8, 44, 34))
    source, reference = Image.fromarray(view("coffee.png", 0)[:40, :60]), Image.fromarray(view("chelsea.png", 0)[:80])
    case = Case(TRACKS["texture_inner"], "001", *(Path(name) for name in ("source", "mask", "reference")))
    given = CaseInputs(source, mask, reference, keep_shape=True, seed=3)
    result = editor.edit_case(case, given)
    assert result.image.size == source.size and result.correspondence is not None
    assert (np.asarray(result.image) == np.asarray(editor.edit_case(case, given).image)).all()
    assert {"editor", "weights", "steps", "guidance", "prompt", "depth", "versions"} <= editor.about.keys()


@pytest.mark.slow
def test_other_weights_are_another_editor(run: Path, tmp_path: Path, editor: Editor) -> None:
    write_toy_klein(tmp_path, lora=False)
    assert open_editor(str(tmp_path), **FAST).about["weights"] != editor.about["weights"]
    assert open_editor(str(run), **FAST).about["weights"] == editor.about["weights"]


def test_steps_and_guidance_are_its_own_where_none_are_named() -> None:
    own = Flux2KleinEditor(open_toy())
    assert (own.num_inference_steps, own.guidance_scale) == (50, 1.0)
    chosen = Flux2KleinEditor(open_toy(), 3, 2.5)
    assert (chosen.num_inference_steps, chosen.guidance_scale) == (3, 2.5)


@pytest.mark.slow
def test_keypoints_are_carried_by_its_attention(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photographs").mkdir()
    for name in ("chelsea.png", "coffee.png"):
        Image.fromarray(photograph(name)).save(tmp_path / "photographs" / name)
    chosen = ["--photographs", tmp_path / "photographs", "--strength", "weak", "--max-pairs", 1, "--reciprocal"]
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["pck", *map(str, chosen), "--model", str(run), "--output", str(out)])
    pck.main()
    values = json.loads((out / "pck.json").read_text())
    assert [each["path"] for each in values["layers"]] == [
        "transformer_blocks.0.attn",
        "single_transformer_blocks.0.attn",
        None,
    ]
    assert values["layers"][0]["tokens"] == SIZE_PX // 8
    rows = values["results"]
    assert rows["reference attention in holes"] != rows["reference attention in holes, untrained"]
    assert "reference attention at seen tokens" in rows and "features" in values["absent"]
    assert values["card"]["untrained"] == "the base model without the LoRA"
    assert "reference attention in holes" in capsys.readouterr().out


def test_without_a_lora_the_untrained_model_is_a_random_one() -> None:
    from mimicbrush.evaluation.keypoint_transfer.methods import remove_training

    trained = open_toy()
    before, words = remove_training(trained, seed=0)
    assert "random weights" in words
    weight = "transformer_blocks.0.attn.to_q.weight"
    states = [each.pipeline.transformer.state_dict()[weight] for each in (trained, before)]
    assert not torch.equal(*states)
    assert torch.equal(states[0], build_klein().transformer.state_dict()[weight])


@pytest.mark.slow
def test_held_out_pairs_are_measured_over_none(run: Path, mined: Path, tmp_path: Path) -> None:
    from dataclasses import asdict

    from mimicbrush.cli.evaluate import on_pairs
    from mimicbrush.evaluation.heldout.options import EvaluationOptions

    options = EvaluationOptions(split="all", max_pairs=3, num_inference_steps=2, sheet_pairs=1)
    on_pairs(mined, f"flux2_klein:{run}", tmp_path / "out", {**asdict(options), "device": "cpu"})
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["n"] == 3 and metrics["size_px"] == SIZE_PX
    assert {"model", "wrong_reference", "no_reference"} <= set(metrics["natural"]["rows"])
    assert np.isfinite(metrics["gain_over_no_reference_db"]) and np.isfinite(metrics["reference_gain_db"])
    assert (tmp_path / "out" / "showcase.png").is_file()


@pytest.mark.slow
def test_it_runs_in_the_benchmark_beside_others(run: Path, tmp_path: Path) -> None:
    mask = Image.new("L", (60, 40))
    mask.paste(255, (20, 10, 40, 30))
    source, reference = Image.fromarray(view("coffee.png", 0)[:40, :60]), Image.fromarray(view("chelsea.png", 0)[:80])
    with BenchmarkWriter(tmp_path / "bench") as writer:
        for track in ("part_inner", "texture_inner"):
            writer.add(track, source, mask, reference, facts={"group": "cup"})
        writer.finish({"made": "for a test"})
    name = f"flux2_klein:{run}"
    options = BenchmarkOptions(editors=(name, "blur"), num_inference_steps=2, device="cpu")
    found = evaluate_benchmark(tmp_path / "bench", options, tmp_path / "out")
    assert found.troubles == [] and f"{name}: 2 = 2 scored" in found.tally
    scores = found.metrics["editors"][name]["tracks"]["part_inner"]
    assert scores["pasted"]["psnr"]["mean"] > scores["painted"]["psnr"]["mean"]
