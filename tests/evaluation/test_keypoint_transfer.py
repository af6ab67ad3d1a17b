from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from test_homographies import MATRICES, write_scene
from toy_data import photograph
from transformers import Dinov2Config, Dinov2Model

from mimicbrush.data.pair import Pair
from mimicbrush.errors import DataError, InputError
from mimicbrush.evaluation.keypoint_transfer import methods, pck
from mimicbrush.evaluation.keypoint_transfer.attention import ATTENTION_STEPS, AttentionTransfer
from mimicbrush.evaluation.keypoint_transfer.attention_maps import AttentionAtTokens
from mimicbrush.evaluation.keypoint_transfer.tasks import TransferTask, make_warped_tasks, read_spair_tasks
from mimicbrush.evaluation.keypoint_transfer.transfer_plot import RIGHT, WRONG, plot_transfers
from mimicbrush.models.components import toy_components
from mimicbrush.models.options import ToyModel
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.pipelines import MimicBrushPipeline

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pipeline() -> MimicBrushPipeline:
    toy = MimicBrushPipeline(**vars(toy_components(ToyModel(size_px=32), seed=1)), scheduler=noise_scheduler())
    toy.set_progress_bar_config(disable=True)
    return toy


def task_of(points: np.ndarray, found: np.ndarray, extent_px: float = 100) -> TransferTask:
    blank = np.zeros((100, 100, 3), np.uint8)
    return TransferTask(blank, blank, points, found, extent_px, "a")


def test_percentages_are_those_of_a_case_counted_by_hand() -> None:
    truth = np.array([[10.0, 10.0], [50, 50], [90, 90], [20, 80]])
    task = task_of(truth, truth)
    found = truth + np.array([[4.9, 0], [0, 5.1], [9, 9], [30, 0]])  # 4.9, 5.1, 12.7 and 30 px away
    assert [int(pck.find_correct(found, task, alpha).sum()) for alpha in pck.ALPHAS] == [1, 2, 3]
    places = pck.carry_keypoints({"mine": lambda _: found, "oracle": lambda each: each.reference_xy}, [task, task])
    results = pck.measure_pck(places, [task, task], seed=0)
    assert results["mine"]["0.1"]["per_point"] == 50
    assert results["oracle"]["0.05"] == {"per_point": 100, "per_picture": 100, "ci95": [100, 100]}
    assert "| mine | 25.0 [25.0, 25.0] | 50.0" in pck.format_pck(results, {"x": "no weights"})
    with pytest.raises(DataError, match="finite"):
        pck.find_correct(found * np.nan, task, 0.1)


def test_chance_is_what_geometry_says() -> None:
    """A disc of radius alpha about a point in the middle."""
    points = np.full((20_000, 2), 50.0)
    method, task = methods.RandomPlaces(0), task_of(points, points)
    hits = pck.find_correct(method(task), task, 0.2)
    assert 100 * hits.mean() == pytest.approx(100 * np.pi * 0.2**2, abs=1)
    assert not np.array_equal(method(task), method(task))  # other places in every image


def test_warped_keypoints_show_the_same_thing(rendered: list[Pair]) -> None:
    tasks, empty = make_warped_tasks(rendered, 128, max_pairs=4, seed=0)
    assert len(tasks) == 4 and not empty
    alike = []
    for task in tasks:
        assert task.source.shape == task.reference.shape == (128, 128, 3)
        patches = [
            cv2.remap(cv2.GaussianBlur(image, (0, 0), 2), *(xy.astype(np.float32)[None, :, k] for k in (0, 1)), 1)
            for image, xy in ((task.source, task.source_xy), (task.reference, task.reference_xy))
        ]
        greys = [patch.reshape(-1, 3).mean(axis=1) for patch in patches]
        alike.append(np.corrcoef(*greys)[0, 1])
        assert (methods.keep_place(task) == task.source_xy).all()
    assert np.mean(alike) > 0.8  # other colours, but what is bright stays bright


def test_features_of_any_network_find_a_image_in_itself(pipeline: MimicBrushPipeline, rendered: list[Pair]) -> None:
    warped = make_warped_tasks(rendered, 32, max_pairs=1, seed=0)[0][0]
    same = TransferTask(warped.source, warped.source, warped.source_xy, warped.source_xy, 32, "a")
    torch.manual_seed(0)
    dinov2 = Dinov2Model(
        Dinov2Config(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
    ).eval()
    for method in (
        methods.FeatureTransfer(pipeline),
        methods.FeatureTransfer(methods.make_untrained(pipeline, 3)),
        methods.FeatureTransfer(pipeline, dinov2=dinov2),
    ):
        assert pck.find_correct(method(same), same, 0.1).mean() > 0.8  # plain areas look alike


def test_attention_gives_a_place_for_every_keypoint(pipeline: MimicBrushPipeline, rendered: list[Pair]) -> None:
    task = make_warped_tasks(rendered, 32, max_pairs=1, seed=0)[0][0]
    found = AttentionTransfer(pipeline)(task)
    for places in (found.inside_mask, found.outside_mask, *found.by_layer.values()):
        assert places.shape == task.source_xy.shape
        assert np.isfinite(places).all()
        assert (places > -8).all() and (places < 40).all()
    assert not np.array_equal(found.inside_mask, found.outside_mask)


def test_in_holes_it_is_what_an_edit_tells_of_its_correspondence(
    pipeline: MimicBrushPipeline, rendered: list[Pair]
) -> None:
    task = make_warped_tasks(rendered, 32, max_pairs=1, seed=0)[0][0]
    found = AttentionTransfer(pipeline)(task)
    field = np.arange(32) // 8
    dark = (field[:, None] + field[None]) % 2
    edited = pipeline(
        task.source, dark > 0, task.reference, num_inference_steps=ATTENTION_STEPS,
        generator=torch.Generator().manual_seed(0), return_correspondence=True,
    ).correspondences[0]  # fmt: skip
    pixel = np.round(task.source_xy).astype(int)
    here = dark[pixel[:, 1], pixel[:, 0]] > 0
    distance = np.linalg.norm(task.source_xy[here, None] + 0.5 - edited.source_xy[None], axis=-1)
    expected = edited.reference_xy[distance.argmin(axis=1)] - 0.5
    np.testing.assert_allclose(found.inside_mask[here], expected, atol=1e-3)


def test_two_records_of_one_edit_are_refused(pipeline: MimicBrushPipeline, rendered: list[Pair]) -> None:
    task = make_warped_tasks(rendered, 32, max_pairs=1, seed=0)[0][0]
    record = AttentionAtTokens(torch.tensor([0]), 8, 1)
    with pytest.raises(InputError, match="attention_record"):
        pipeline(
            task.source, np.ones((32, 32), bool), task.reference, return_correspondence=True, attention_record=record
        )


def test_sets_are_measured_apart() -> None:
    truth = np.array([[10.0, 10.0], [50, 50]])
    tasks = [replace(task_of(truth, truth), set_name=name) for name in ("weak", "strong", "strong")]
    places = {"row": [truth, truth, truth + 60]}
    sets = pck.measure_sets(places, tasks, seed=0)
    assert {name: (each["pictures"], each["points"]) for name, each in sets.items()} == {
        "weak": (1, 2),
        "strong": (2, 4),
    }
    assert sets["strong"]["results"]["row"]["0.1"]["per_picture"] == 50
    assert pck.format_sets(sets).splitlines()[0] == "| PCK@0.1 | weak (1) | strong (2) |"
    assert "| row | 100.0 [100.0, 100.0] | 50.0 " in pck.format_sets(sets)
    assert pck.measure_sets(places, [task_of(truth, truth)] * 3, seed=0) == {}


def test_a_image_shows_what_was_found_and_what_was_not() -> None:
    points = np.stack(np.meshgrid(np.arange(5, 100, 10.0), np.arange(5, 100, 10.0)), axis=-1).reshape(-1, 2)
    task = task_of(points, points)

    def count(found: np.ndarray) -> dict[str, int]:
        pixels = np.asarray(plot_transfers([task] * 9, [found] * 9, "a test", most=2)).reshape(-1, 3)
        return {
            name: int((pixels == colour).all(axis=1).sum()) for name, colour in (("right", RIGHT), ("wrong", WRONG))
        }

    right, wrong = count(points), count(points + 40)
    assert right["right"] > 20 * right["wrong"] > 0  # the legend has a dot of either
    assert wrong["wrong"] > 20 * wrong["right"] > 0
    few, many = (plot_transfers([task] * n, [points] * n, "a test", most=6) for n in (1, 9))
    assert few.width == many.width > 800 and many.height > 5 * (few.height - 60)


def test_without_shared_hidden_states_there_are_no_features() -> None:
    parts = toy_components(ToyModel(size_px=32, reference_sharing="keys_values"))
    with pytest.raises(methods.NoFeaturesError, match="hidden states"):
        methods.FeatureTransfer(MimicBrushPipeline(**vars(parts), scheduler=noise_scheduler()))


def test_untrained_networks_are_others_of_the_same_make(pipeline: MimicBrushPipeline) -> None:
    fresh = methods.make_untrained(pipeline, 5)
    assert {**fresh.unet.config, "_name_or_path": ""} == {**pipeline.unet.config, "_name_or_path": ""}
    assert not torch.equal(fresh.unet.conv_in.weight, pipeline.unet.conv_in.weight)
    assert torch.equal(fresh.unet.conv_in.weight[:, :4], fresh.reference_unet.conv_in.weight)  # they begin alike
    assert fresh.vae is pipeline.vae
    assert fresh.options() == pipeline.options()


def write_spair(root: Path) -> None:
    (root / "JPEGImages" / "cat").mkdir(parents=True)
    (root / "PairAnnotation" / "test").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in (("one.jpg", (200, 100)), ("two.jpg", (80, 160))):
        Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), np.uint8)).save(root / "JPEGImages" / "cat" / name)
    annotation = {
        "category": "cat",
        "src_imname": "one.jpg",
        "trg_imname": "two.jpg",
        "src_kps": [[0, 0], [199, 99]],
        "trg_kps": [[10, 20], [40, 80]],
        "trg_bndbox": [10, 20, 50, 120],
    }
    (root / "PairAnnotation" / "test" / "000-one-two.json").write_text(json.dumps(annotation))


def test_spair_is_read_onto_the_canvas(tmp_path: Path) -> None:
    write_spair(tmp_path)
    (task,) = read_spair_tasks(tmp_path, 64, None)
    assert task.extent_px == pytest.approx(100 * 64 / 160)
    # 200 x 100 px on 64: scaled by 0.32, 16 px of white above; pixel centres at whole numbers.
    assert task.source_xy == pytest.approx(np.array([[-0.34, 15.66], [63.34, 47.34]]), abs=1e-3)
    assert task.reference_xy[0] == pytest.approx([16 + 10.5 * 0.4 - 0.5, 20.5 * 0.4 - 0.5])
    assert task.group == "cat"
    annotation = next((tmp_path / "PairAnnotation" / "test").glob("*.json"))
    values = json.loads(annotation.read_text())
    annotation.write_text(json.dumps(values | {"trg_kps": [[1, 2]]}))
    with pytest.raises(DataError, match="keypoints of the two images have the shapes"):
        read_spair_tasks(tmp_path, 64, None)
    for outside in ({"src_imname": "../../../secret.jpg"}, {"category": "../../secret"}):
        annotation.write_text(json.dumps(values | outside))
        with pytest.raises(InputError, match="leads outside of"):
            read_spair_tasks(tmp_path, 64, None)
    with pytest.raises(InputError, match="PairAnnotation/val"):
        read_spair_tasks(tmp_path, 64, None, split="val")


def run_script(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["pck.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "scripts" / "pck.py"), run_name="__main__")


def test_the_script_measures_a_pipeline_and_draws(
    tmp_path: Path, pipeline: MimicBrushPipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.save_pretrained(tmp_path / "pipeline")
    write_spair(tmp_path / "spair")
    out = tmp_path / "out"
    run_script(monkeypatch, "--spair", tmp_path / "spair", "--model", tmp_path / "pipeline", "--output", out)
    values = json.loads((out / "pck.json").read_text())
    assert values["card"]["points"] == 2
    assert not values["card"]["logits"] and not values["card"]["reciprocal"]
    assert list(values["results"])[:4] == [
        "reference attention in holes",
        "reference attention in holes, untrained",
        "reference attention at seen tokens",
        "reference attention at seen tokens, untrained",
    ]
    assert {"features (DIFT) at seen tokens", "same place", "chance"} <= set(values["results"])
    assert values["layers"][-1]["all"] == values["results"]["reference attention in holes"]["0.1"]
    assert values["layers"][0]["path"] == "mid_block.attentions.0.transformer_blocks.0.attn1"
    printed = capsys.readouterr().out
    assert "n/a" in printed and (out / "table.md").read_text() in printed
    with Image.open(out / "transfers.png") as image:
        assert image.width > 800


@pytest.mark.slow
def test_the_script_measures_photographs_and_homographies(
    tmp_path: Path, smallest: ToyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = MimicBrushPipeline(**vars(toy_components(smallest)), scheduler=noise_scheduler())
    small.save_pretrained(tmp_path / "pipeline")
    (tmp_path / "photographs").mkdir()
    for name in ("chelsea.png", "coffee.png"):
        Image.fromarray(photograph(name)).save(tmp_path / "photographs" / name)
    common = ["--model", tmp_path / "pipeline", "--output", tmp_path / "out"]
    chosen = ["--strength", "strong", "weak", "--logits", "--max-pairs", 2]
    run_script(monkeypatch, "--photographs", tmp_path / "photographs", *chosen, *common)
    values = json.loads((tmp_path / "out" / "pck.json").read_text())
    assert list(values["sets"]) == ["weak", "strong"] and values["card"]["sources"] == 1
    assert values["card"]["logits"] and "before the softmax" in values["card"]["attention"]
    assert "| PCK@0.1 | weak (1) | strong (1) |" in (tmp_path / "out" / "table.md").read_text()

    write_scene(tmp_path / "homographies" / "cups", "{}.ppm", "H_1_{}", MATRICES)
    run_script(monkeypatch, "--homographies", tmp_path / "homographies", "--reciprocal", "--max-pairs", 1, *common)
    values = json.loads((tmp_path / "out" / "pck.json").read_text())
    assert list(values["sets"]) == ["1 to 4"]
    assert values["card"]["reciprocal"] and "transposed" in values["card"]["attention"]


def test_the_script_refuses_what_does_not_go_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong, message in (
        ([], "required"),
        (["--spair", "a", "--pairs", "b"], "not allowed"),
        (["--spair", "a", "--strength", "weak"], "--strength can only be used with --photographs"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            run_script(monkeypatch, *wrong, "--output", tmp_path / "out")
        assert message in capsys.readouterr().err
