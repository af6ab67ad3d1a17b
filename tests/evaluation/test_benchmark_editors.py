"""Editors that need no model, and how editors are named."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from benchmark_material import view
from PIL import Image

from mimicbrush.errors import InputError, MimicBrushError, WeightsError
from mimicbrush.evaluation.benchmark.layout import TRACKS, Benchmark, BenchmarkWriter, Case, read_benchmark
from mimicbrush.evaluation.editors.baselines import blur_fill
from mimicbrush.evaluation.editors.protocol import CaseInputs, NotApplicableError
from mimicbrush.evaluation.editors.registry import check_editor, open_editor
from mimicbrush.evaluation.heldout.reference_gain import score_inside_mask
from mimicbrush.io.images import read_image
from mimicbrush.pipelines import small_model


@pytest.fixture
def benchmark_folder(tmp_path: Path) -> Benchmark:
    """One case for each track, sources of 160 x 120 px."""
    with BenchmarkWriter(tmp_path / "benchmark") as writer:
        for number, track in enumerate(TRACKS):
            mask = Image.new("L", (160, 120))
            mask.paste(255, (30, 20, 90, 80))
            source = Image.fromarray(view("coffee.png", number)[:120])
            writer.add(track, source, mask, Image.fromarray(view("chelsea.png", number)[:, :100]))
        writer.finish({})
    return read_benchmark(tmp_path / "benchmark")


def inputs(case: Case, seed: int = 1) -> CaseInputs:
    source, reference = (read_image(path, "RGB") for path in (case.source, case.reference))
    mask = read_image(case.mask, "L")
    return CaseInputs(source, mask, reference, case.track.keep_shape, seed)


def test_the_oracle_is_perfect_where_there_is_a_truth(benchmark_folder: Benchmark) -> None:
    oracle, untouched = open_editor("oracle"), open_editor("source")
    for case in benchmark_folder.cases:
        given = inputs(case)
        able, unable = (oracle, untouched) if case.track.has_truth else (untouched, oracle)
        result = np.asarray(able.edit_case(case, given).image)
        mask = (np.asarray(given.mask) > 128).astype(np.uint8)
        assert score_inside_mask(result, np.asarray(given.source), mask).psnr >= 60  # of equal pixels
        assert np.array_equal(result, np.asarray(given.source))
        with pytest.raises(NotApplicableError, match=case.track.title):
            unable.edit_case(case, given)


@pytest.mark.parametrize("name", ["blur", "copy_in_place", "opencv_inpaint", "sift_homography"])
def test_fills_without_a_model_change_the_hole_alone(benchmark_folder: Benchmark, name: str) -> None:
    editor = open_editor(name)
    assert editor.name == name
    for case in benchmark_folder.cases:
        given = inputs(case)
        source, result = np.asarray(given.source), np.asarray(editor.edit_case(case, given).image)
        hole = np.asarray(given.mask) > 128
        assert np.array_equal(result[~hole], source[~hole])
        changed = source.copy()
        changed[hole] = 7
        again = CaseInputs(Image.fromarray(changed), given.mask, given.reference, given.keep_shape, given.seed)
        assert np.array_equal(np.asarray(editor.edit_case(case, again).image), result)  # it does not look into the hole


def test_blur_of_one_colour_is_that_colour() -> None:
    source, mask = np.full((40, 50, 3), (10, 200, 90), np.uint8), np.zeros((40, 50), np.uint8)
    mask[:39] = 1
    mask[39, :49] = 1  # one corner is all that is known
    assert (blur_fill(source, mask) == (10, 200, 90)).all()
    with pytest.raises(InputError, match="nothing around"):
        blur_fill(source, np.ones_like(mask))


def test_copy_in_place_of_the_source_is_the_source(benchmark_folder: Benchmark) -> None:
    case = benchmark_folder.cases[0]
    given = inputs(case)
    same = CaseInputs(given.source, given.mask, given.source, False, 1)
    assert np.array_equal(
        np.asarray(open_editor("copy_in_place").edit_case(case, same).image), np.asarray(given.source)
    )


def test_results_of_others_round_trip(benchmark_folder: Benchmark, tmp_path: Path) -> None:
    blur, folder = open_editor("blur"), tmp_path / "results"
    for case in benchmark_folder.cases:
        path = folder / case.result_path
        path.parent.mkdir(parents=True)
        blur.edit_case(case, inputs(case)).image.save(path)
    results = open_editor(f"results:{folder}")
    for case in benchmark_folder.cases:
        found = results.edit_case(case, inputs(case)).image
        assert np.array_equal(np.asarray(found), np.asarray(blur.edit_case(case, inputs(case)).image))
    first, second, *_ = benchmark_folder.cases
    (folder / first.result_path).unlink()
    with pytest.raises(InputError, match=r"001_result.png: no such file"):
        results.edit_case(first, inputs(first))
    Image.new("RGB", (16, 12)).save(folder / second.result_path)
    with pytest.raises(InputError, match=r"is 16 x 12 px, but its source is 160 x 120 px"):
        results.edit_case(second, inputs(second))


def test_a_flat_folder_of_results_serves_one_track(benchmark_folder: Benchmark, tmp_path: Path) -> None:
    case, other, *_ = benchmark_folder.cases
    flat = tmp_path / "flat"
    flat.mkdir()
    with pytest.raises(InputError, match="contains neither"):
        open_editor(f"results:{flat}")
    inputs(case).source.save(flat / "001_result.png")
    results = open_editor(f"results:{flat}")
    assert results.edit_case(case, inputs(case)).image.size == (160, 120)
    with pytest.raises(InputError, match="has no subfolders"):
        results.edit_case(other, inputs(other))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("orakel", r"Did you mean 'oracle'\?"),
        ("paint_by_exmple:x", r"Did you mean 'paint_by_example'\?"),
        ("oracle:x", "oracle takes no folder"),
        ("auto_zoom:oracle", "expected a pipeline folder, small or released after auto_zoom:"),
        ("boxed:auto_zoom:proof", "expected a pipeline folder, small or released after boxed:"),
        ("boxed", "expected a pipeline folder, small or released after boxed:"),
        ("boxed:absent", "'absent' is neither a folder"),
        ("results:", "results needs the name of a folder"),
        ("results", "no such folder"),
        ("results:absent", "no such folder"),
        ("runs/absent", "neither a folder nor the name of an editor"),
    ],
)
def test_names_that_are_none(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_editor(text)


@pytest.mark.parametrize("name", ["paint_by_example", "paint_by_example_box", "ip_adapter", "reference_only"])
def test_absent_weights_are_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsError, match=re.escape(str(tmp_path)) + " does not contain"):
        check_editor(f"{name}:{tmp_path}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(WeightsError, match="hf download"):
        check_editor(name)


def test_folders_that_are_no_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="not a pipeline folder"):
        check_editor(str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match=r"a training run without a pipeline.*mimicbrush export"):
        check_editor(str(tmp_path))
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / 'pipeline'} is not a complete MimicBrush pipeline")):
        check_editor(str(tmp_path))
    for name in small_model.SHIPPED_NAMES:
        check_editor(name)
        check_editor(f"boxed:{name}")
    monkeypatch.setattr(small_model, "SHIPPED_MODEL", tmp_path / "absent")
    for name in small_model.SHIPPED_NAMES:
        with pytest.raises(MimicBrushError, match="this installation does not contain the small model"):
            check_editor(name)


def test_names_are_checked_before_anything_heavy_is_imported() -> None:
    code = (
        "import sys; from mimicbrush.evaluation.editors.registry import check_editor; check_editor('oracle')\n"
        "try: check_editor('reference_only')\n"
        "except Exception as error: print(type(error).__name__)\n"
        "print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
