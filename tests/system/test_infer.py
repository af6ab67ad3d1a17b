"""scripts/infer.py as a user runs it, on files of all kinds.

What takes seconds, importing everything in a process of its own, is done twice; the rest calls the command's `main`.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm_scripts
from color_profiles import ADOBE_PROFILE
from PIL import Image
from toy_data import photograph

from mimicbrush.cli import edit as cli_edit
from mimicbrush.cli.edit import main
from mimicbrush.errors import InputError, cli_main
from mimicbrush.io.image_formats import ImageEncoding
from mimicbrush.io.images import read_image
from mimicbrush.models.components import toy_components
from mimicbrush.models.options import ToyModel
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.ops.correspondence import Correspondence
from mimicbrush.ops.crops import square_around
from mimicbrush.pipelines import MimicBrushPipeline, MimicBrushPipelineOutput
from mimicbrush.pipelines.editing import editor

ROOT = Path(__file__).parents[2]
PICTURES = ("ref.jpg", "src.jpg", "mask.png")
NAMED = ("--source", "src.jpg", "--mask", "mask.png")


def array(path: Path) -> np.ndarray:
    return np.asarray(read_image(path, "RGB"))


@pytest.fixture(scope="module")
def toy_pipeline(tmp_path_factory: pytest.TempPathFactory, smallest: ToyModel) -> Path:
    folder = tmp_path_factory.mktemp("infer") / "pipeline"
    MimicBrushPipeline(**vars(toy_components(smallest)), scheduler=noise_scheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a reference, an EXIF-rotated source and a mask drawn on it as it is seen."""
    Image.fromarray(photograph("chelsea.png")).save(tmp_path / "ref.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, to be shown upright
    Image.fromarray(photograph("coffee.png")[:60, :90]).save(tmp_path / "src.jpg", exif=exif, quality=95)
    mask = np.zeros((90, 60), np.uint8)
    mask[50:70, 20:40] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def infer(toy_pipeline: Path, folder: Path) -> Callable[..., int]:
    """Runs the script in two steps on a CPU, and gives its exit status."""

    def run(*arguments: str) -> int:
        common = ("--model", str(toy_pipeline), "--steps", "2", "--device", "cpu")
        try:
            cli_main(lambda: main([*common, *arguments]))
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run


@pytest.fixture
def process(
    toy_pipeline: Path, folder: Path, script_environment: Callable[[], dict[str, str]]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "scripts" / "infer.py"), *arguments, "--model", str(toy_pipeline)]
        return warm_scripts.run(
            command, cwd=folder, env=script_environment(), capture_output=True, text=True, check=False
        )

    return run


def test_an_edit(folder: Path, process: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = process(*PICTURES, "--steps", "2", "-o", "out.png")
    assert done.returncode == 0, done.stderr
    assert "out.png: 60 x 90 px, repainted at 16 px, seed 1" in done.stdout
    result, source = array(folder / "out.png"), array(folder / "src.jpg")
    assert result.shape == source.shape == (90, 60, 3)
    outside = np.ones((90, 60), bool)
    outside[38:82, 8:52] = False
    assert np.array_equal(result[outside], source[outside])
    assert np.abs(result[55:65, 25:35].astype(int) - source[55:65, 25:35]).mean() > 5


def test_what_the_images_tell_is_told_at_once(
    folder: Path, process: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    Image.new("L", (60, 90)).save(folder / "empty.png")
    start = time.monotonic()
    refused = process("ref.jpg", "src.jpg", "empty.png")
    assert time.monotonic() - start < 4  # importing the models takes ten seconds
    assert refused.returncode == 2 and "empty.png: the mask is empty" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*PICTURES, "--model", "nowhere"], "is not a pipeline folder"),
        (["ref.jpg", "nothing.jpg", "mask.png"], "nothing.jpg: no such file"),
        (["ref.jpg", "ref.jpg", "mask.png"], "mask.png is 60 x 90 px but ref.jpg is 451 x 300"),
        (["ref.jpg", "src.jpg", "full.png"], "--allow-full-mask"),
        ([*PICTURES, "--reference-crop", "0,0,999,10"], "not a box inside the reference"),
        ([*PICTURES, "--reference-crop", "0,0,9"], "expected four whole numbers X0,Y0,X1,Y1"),
        ([*PICTURES, "--reference-crop", "0,0,9,a"], "expected four whole numbers X0,Y0,X1,Y1 (pixels), got '0,0,9,a'"),
        ([*PICTURES, "--steps", "abc"], "argument --steps: expected a whole number from 1 to 1000, got 'abc'"),
        ([*PICTURES, "--num-images", "0"], "argument --num-images: expected a whole number from 1 to 1000, got '0'"),
        ([*PICTURES, "--seed", "-1"], "argument --seed: expected a whole number of at least 0, got '-1'"),
        ([*PICTURES, "--seed", "1.5"], "argument --seed: expected a whole number of at least 0, got '1.5'"),
        (
            [*PICTURES, "--guidance", "much"],
            "argument --guidance: expected a number from 0 to 100 (1 or less turns",
        ),
        (
            [*PICTURES, "--seed", str(2**63 - 1), "--num-images", "2"],
            "the last seed is too large: expected a whole number",
        ),
        ([*PICTURES, "--guidance", "nan"], "expected a number from 0 to 100"),
        ([*PICTURES, "--num", "2"], "there is no option --num. Did you mean '--num-images'?"),
        ([*PICTURES, "-o", "a.xyz"], "unknown image format"),
        ([*PICTURES, "-o", "a.png", "--contact-sheet", "a.png"], "two outputs have the same name"),
        ([*PICTURES, "--output-dir", "out"], "--output-dir needs --batch"),
        ([*PICTURES[:2]], "expected three images"),
        ([*PICTURES, "--gudance", "3"], "there is no option --gudance. Did you mean '--guidance'?"),
        ([*PICTURES, "--source", "src.jpg"], "--source: give the images either by name or in the order REF SRC MASK"),
        (["--source", "src.jpg", "--mask", "mask.png"], "--reference must also be given"),
        (["--reference", "ref.jpg"], "--source and --mask (or --mask-box) must also be given"),
        (["--batch", ".", "--source", "src.jpg"], "not both"),
        (["--batch", ".", "--mask-box", "0,0,9,9", "--output-dir", "out"], "not both"),
        ([*PICTURES, "--mask-box", "0,0,9,9"], "either a mask or --mask-box, not both"),
        ([*PICTURES[:2], "--mask-box", "0,0,9"], "argument --mask-box: expected four whole numbers X0,Y0,X1,Y1"),
        ([*PICTURES[:2], "--mask-box", "9,0,9,9"], "error: 9,0,9,9 is not a box inside the source src.jpg"),
        ([*PICTURES[:2], "--mask-box", "0,0,60,91"], "which is 60 x 90 px"),
        (
            [*PICTURES[:2], "--mask-box", "0,0,60,90"],
            "the box 0,0,60,90 covers all of src.jpg, so nothing of the source is",
        ),
        ([*NAMED, "--reference", *["ref.jpg"] * 5], "--reference: expected 1 to 4 images, got 5"),
        ([*NAMED, "--reference", "ref.jpg", "src.jpg", "--auto-zoom"], "--auto-zoom works with one reference only"),
        (
            [*NAMED, "--reference", "ref.jpg", "src.jpg", "--reference-crop", "0,0,9,9"],
            "--reference-crop works with one reference only",
        ),
        ([*NAMED, "--reference", "ref.jpg", "nothing.jpg"], "nothing.jpg: no such file"),
        (["src.jpg", "ref.jpg", "mask.png"], "mask.png has the size of src.jpg: did you swap source and reference?"),
        (["src.jpg", "ref.jpg", "mask.png"], "the order is REF SRC MASK; --reference, --source and --mask name them"),
        ([*PICTURES, "--batch", "."], "not both"),
        (["--batch", "."], "--batch needs --output-dir"),
        (["--batch", ".", "--output-dir", "out", "-o", "a.png"], "--output is for a single edit"),
        (["--batch", ".", "--output-dir", "out"], "contains no NNN_source.png"),
        (
            ["--batch", ".", "--output-dir", "out", "--batch-size", "2", "--auto-zoom"],
            "--batch-size and --auto-zoom cannot be combined",
        ),
        ([*PICTURES, "--batch-size", "2"], "--batch-size needs --batch"),
        (["--batch", "ref.jpg", "--output-dir", "out"], "cannot be read as a list"),
    ],
)
def test_wrong_usage(
    arguments: list[str],
    message: str,
    folder: Path,
    toy_pipeline: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.new("L", (60, 90), 255).save(folder / "full.png")
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(SystemExit) as end:
        cli_main(lambda: main(["--model", str(toy_pipeline), *arguments]))
    assert end.value.code == 2 and message in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--model", ""], "argument 2"), (["--model="], "--model="), (["", "src.jpg"], "argument 1")],
)
def test_a_variable_of_the_shell_that_is_not_set(
    arguments: list[str], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["infer.py", *arguments])
    with pytest.raises(SystemExit) as end:
        cli_main(main)
    assert end.value.code == 2
    assert f"error: {named} is empty. Give a value, or leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("token", [["--token", ""], ["--token="]])
def test_an_empty_token_is_meant(token: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["app.py", "--host", "0.0.0.0", *token])
    started: list[str] = []
    cli_main(lambda: started.append("the page"))
    assert started


def test_without_a_model_the_choices_are_named(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(editor, "is_shipped", lambda: False)  # as in an installation without it
    with pytest.raises(SystemExit):
        cli_main(lambda: main(PICTURES))
    message = capsys.readouterr().err
    assert "runs/smoke/pipeline" in message and "released" in message


def test_without_a_model_the_shipped_one_edits_and_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli_main(lambda: main([*PICTURES, "--steps", "2", "-o", "result.png"]))
    message = capsys.readouterr().err
    assert "no model was given" in message and "64 px" in message and "released" in message
    source, result = array(folder / "src.jpg"), array(folder / "result.png")
    mask = np.asarray(read_image(folder / "mask.png", "L")) > 128
    assert result.shape == source.shape
    assert np.abs(result[mask].astype(int) - source[mask]).mean() > 3
    cli_main(lambda: main([*PICTURES, "--steps", "2", "--model", "proof", "-o", "named.png"]))
    assert "no model was given" not in capsys.readouterr().err
    assert np.array_equal(array(folder / "named.png"), result)


def test_more_steps_than_the_model_knows(infer: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert infer(*PICTURES, "--steps", "1001") == 2
    assert "--steps: expected a whole number from 1 to 1000, got '1001'" in capsys.readouterr().err


def test_several_images_are_those_of_single_runs_and_nothing_is_overwritten(
    folder: Path, infer: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert infer(*PICTURES, "--num-images", "2", "--seed", "5", "-o", "both.png") == 0
    for seed in (5, 6):
        assert infer(*PICTURES, "--seed", str(seed), "-o", f"{seed}.png") == 0
        single, one_of_both = array(folder / f"{seed}.png"), array(folder / f"both_{seed - 5}.png")
        assert np.abs(single.astype(int) - one_of_both).max() <= 1
    assert np.abs(array(folder / "5.png").astype(int) - array(folder / "6.png")).max() > 20
    before = (folder / "both_1.png").read_bytes()
    (folder / "both_0.png").unlink()
    capsys.readouterr()
    again = (*PICTURES, "--num-images", "2", "-o", "both.png")
    assert infer(*again) == 2
    assert "both_1.png exists; choose another name, or overwrite with --force" in capsys.readouterr().err
    assert (folder / "both_1.png").read_bytes() == before and not (folder / "both_0.png").exists()
    assert infer(*again, "--force") == 0
    assert (folder / "both_1.png").read_bytes() != before


def test_what_else_can_be_written(folder: Path, infer: Callable[..., int]) -> None:
    extras = ("--save-correspondence", "map.png", "--contact-sheet", "sheet.png", "--reference-crop", "50,50,250,200")
    assert infer(*PICTURES, "-o", "out.png", *extras, "--keep-shape") == 0
    found = Correspondence.load(folder / "map.npz")
    assert len(found.source_xy) and (found.source_xy > [15, 40]).all() and (found.source_xy < [45, 80]).all()
    assert array(folder / "map.png").std() > 0 and array(folder / "sheet.png").std() > 0
    assert infer(*PICTURES, "-o", "other.png", "--save-correspondence", "map.jpg") == 2  # map.npz is there


def test_a_result_that_cannot_be_written_in_the_end_is_kept_elsewhere(
    folder: Path, infer: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "sub"))
    (folder / "sub").mkdir()
    write = cli_edit.write_image

    def refuse_some(image: Image.Image, path: Path, like: ImageEncoding | None = None) -> None:
        if path.name in ("out_0.jpg", "map_1.png"):  # the map cannot be kept elsewhere either
            raise InputError(f"{path}: cannot be written (the disk is gone)")
        write(image, path, like)

    monkeypatch.setattr(cli_edit, "write_image", refuse_some)
    several = ("--num-images", "2", "-o", "out.jpg", "--save-correspondence", "map.png")
    assert infer(*PICTURES, *several) == 2
    message = capsys.readouterr().err
    (kept,) = (folder / "sub").rglob("out_0.png")
    assert f"the disk is gone). The result was saved as {kept}" in message
    assert "out_0.jpg, map_1.png could not be written (see above)" in message
    assert array(kept).shape == array(folder / "out_1.jpg").shape
    assert {path.name for path in folder.glob("map*")} == {"map_0.png", "map_0.npz", "map_1.npz"}


def test_a_name_that_the_terminal_cannot_show_ends_no_edit(
    folder: Path, infer: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(arrived, encoding="ascii", write_through=True))
    assert infer(*PICTURES, "-o", "動画\udcff.png") == 0
    assert b"\\u52d5\\u753b\\udcff.png: " in arrived.getvalue() and (folder / "動画\udcff.png").is_file()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the pipeline is asked for; it gives back the sources."""
    asked: list[dict[str, Any]] = []

    class Echo:
        size_px = 16

        def __call__(self, source: Any, mask: Any, reference: Any, **options: Any) -> MimicBrushPipelineOutput:
            asked.append({"source": source, "mask": mask, "reference": reference, **options})
            return MimicBrushPipelineOutput(images=source if isinstance(source, list) else [source])

    monkeypatch.setattr(editor.LazyEditor, "pipeline", Echo())
    return asked


def test_images_by_name_and_a_box_for_a_mask_are_the_same_edit(
    folder: Path, infer: Callable[..., int], asked: list[dict[str, Any]]
) -> None:
    box = ("--mask-box", "20,50,40,70")  # as the mask has it
    assert infer(*PICTURES, "-o", "a.png") == 0
    assert infer(*NAMED, "--reference", "ref.jpg", "-o", "b.png") == 0
    assert infer("ref.jpg", "src.jpg", *box, "-o", "c.png", "--contact-sheet", "sheet.png") == 0
    line = {"source": "src.jpg", "mask_box": [20, 50, 40, 70], "reference": "ref.jpg", "output": "d.png"}
    (folder / "list.jsonl").write_text(json.dumps(line))
    assert infer("--batch", "list.jsonl", "--output-dir", ".") == 0
    first, *others = asked
    assert len(others) == 3
    for other in others:
        for name in ("source", "mask", "reference"):
            assert other[name].mode == first[name].mode and np.array_equal(other[name], first[name]), name


def test_several_references_go_to_the_pipeline_as_a_list(
    folder: Path, infer: Callable[..., int], asked: list[dict[str, Any]]
) -> None:
    twice = ("--reference", "ref.jpg", "--reference", "src.jpg")  # as good as one option with both
    assert infer(*NAMED, *twice, "-o", "a.png", "--contact-sheet", "sheet.png") == 0
    line = {"source": "src.jpg", "mask": "mask.png", "reference": ["ref.jpg", "src.jpg"]}
    lines = [line | {"output": "b.png"}, line | {"output": "c.png", "reference": "ref.jpg"}, line | {"output": "d.png"}]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert infer("--batch", "list.jsonl", "--output-dir", ".", "--batch-size", "2") == 0
    alone, together, one = asked
    assert [image.size for image in alone["reference"]] == [(451, 300), (60, 90)] and alone["reference_crop"] is None
    assert [[image.size for image in each] for each in together["reference"]] == [[(451, 300), (60, 90)]] * 2
    assert together["reference_crop"] == [(0, 0, 451, 300), (0, 0, 60, 90)] * 2
    assert one["reference"].size == (451, 300)  # as it was before there were several
    assert array(folder / "sheet.png").shape[1] > 5 * 256  # source, mask, two references, result


def test_auto_zoom_leaves_no_reference_of_a_list_out(
    folder: Path, infer: Callable[..., int], asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    line = {"source": "src.jpg", "mask": "mask.png", "reference": ["ref.jpg", "src.jpg"]}
    (folder / "list.jsonl").write_text(json.dumps(line))
    assert infer("--batch", "list.jsonl", "--output-dir", "out", "--auto-zoom") == 1
    assert "auto-zoom takes one reference, got 2: edit without --auto-zoom" in capsys.readouterr().err
    assert not asked and not list((folder / "out").glob("*.png"))


def test_auto_zoom_says_what_it_did(
    folder: Path, infer: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert infer(*PICTURES, "-o", "zoomed.png", "--auto-zoom", "--num-images", "2") == 0
    said = capsys.readouterr().out
    boxes = re.findall(r"zoomed_\d.png: auto-zoom used only the box ([\d,]+) of the reference, ", said)
    assert len(boxes) == 2
    for number, box in enumerate(boxes):
        assert infer(*PICTURES, "-o", f"again_{number}.png", "--reference-crop", box, "--seed", str(1 + number)) == 0
        assert np.array_equal(array(folder / f"again_{number}.png"), array(folder / f"zoomed_{number}.png"))


def test_a_crop_around_the_mask_leaves_the_rest_as_it_is(folder: Path, infer: Callable[..., int]) -> None:
    """30 megapixels, of which a square is edited; the rest comes back to the bit."""
    source = np.random.default_rng(0).integers(0, 256, (500, 600, 3)).astype(np.uint8)
    Image.fromarray(source).resize((6000, 5000), Image.Resampling.NEAREST).save(folder / "large.bmp")
    mask = np.zeros((5000, 6000), np.uint8)
    mask[1000:1300, 4000:4200] = 255
    Image.fromarray(mask).save(folder / "large_mask.bmp")
    assert infer("ref.jpg", "large.bmp", "large_mask.bmp", "--crop", "auto", "-o", "large_out.bmp") == 0
    before, after = array(folder / "large.bmp"), array(folder / "large_out.bmp")
    x0, y0, x1, y1 = square_around(mask, 16)
    assert (y1 - y0, x1 - x0) == (450, 450)
    assert not np.array_equal(before[1100:1200, 4050:4150], after[1100:1200, 4050:4150])
    before, after = before.copy(), after.copy()
    before[y0:y1, x0:x1] = after[y0:y1, x0:x1] = 0
    assert np.array_equal(before, after)


def test_unusual_images_and_masks(folder: Path, infer: Callable[..., int]) -> None:
    """A 16-bit source, a palette reference with transparency, and a mask whose shape is in its alpha channel."""
    deep = photograph("coffee.png")[:90, :60, 0].astype(np.uint16) * 257
    Image.fromarray(deep).save(folder / "deep.png")
    Image.fromarray(photograph("chelsea.png")).quantize(16).save(folder / "palette.png", transparency=3)
    alpha = Image.open(folder / "mask.png")
    Image.merge("LA", (Image.new("L", alpha.size, 0), alpha)).save(folder / "alpha.png")
    assert infer("palette.png", "deep.png", "alpha.png", "-o", "out.png") == 0
    result = array(folder / "out.png")
    assert np.array_equal(result[:38], np.repeat((deep[:38] >> 8).astype(np.uint8)[..., None], 3, 2))
    assert infer("palette.png", "deep.png", "mask.png", "-o", "same.png") == 0
    assert np.array_equal(result, array(folder / "same.png"))


def test_a_jpeg_keeps_its_quality_and_its_colours(folder: Path, infer: Callable[..., int]) -> None:
    with Image.open("src.jpg") as before:
        before.save("own.jpg", quality="keep", exif=before.getexif(), icc_profile=ADOBE_PROFILE)
    assert infer("ref.jpg", "own.jpg", "mask.png", "-o", "result.jpg") == 0
    with Image.open("own.jpg") as before, Image.open("result.jpg") as after:
        assert after.info["icc_profile"] == ADOBE_PROFILE
        turned = [np.reshape(before.quantization[number], (8, 8)).T.ravel().tolist() for number in (0, 1)]
        assert [after.quantization[number] for number in (0, 1)] == turned


def test_a_mask_may_be_resized_and_a_full_one_allowed(folder: Path, infer: Callable[..., int]) -> None:
    Image.open(folder / "mask.png").resize((30, 45), Image.Resampling.NEAREST).save(folder / "small.png")
    for mask, output in (("small.png", "a.png"), ("mask.png", "b.png")):
        assert infer("ref.jpg", "src.jpg", mask, "--resize-mask", "-o", output) == 0
    assert np.array_equal(array(folder / "a.png"), array(folder / "b.png"))
    Image.new("L", (60, 90), 255).save(folder / "full.png")
    assert infer("ref.jpg", "src.jpg", "full.png", "--allow-full-mask", "--no-paste-back", "-o", "c.png") == 0
    assert array(folder / "c.png").shape == (16, 16, 3)


@pytest.fixture
def benchmark(folder: Path) -> Path:
    """Three edits in the released layout, one of them with a broken reference."""
    track = folder / "bench" / "TextureTrans"
    track.mkdir(parents=True)
    source, reference = read_image(folder / "src.jpg", "RGB"), read_image(folder / "ref.jpg", "RGB")
    for number in ("001", "002", "003"):
        source.save(track / f"{number}_source.png")
        Image.open(folder / "mask.png").save(track / f"{number}_source_mask.png")
        reference.save(track / f"{number}_reference.png")
    (track / "002_reference.png").write_text("no image")
    return folder / "bench"


def test_a_batch_of_a_folder(
    folder: Path, benchmark: Path, infer: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    batch = ("--batch", "bench", "--output-dir", "out")
    assert infer(*batch, "--contact-sheet", "sheet.png") == 1
    told = capsys.readouterr()
    assert "3 of 3 edits are texture transfers" in told.out
    assert "3 edits = 2 done + 0 skipped + 1 failed" in told.out
    assert "002_reference.png: cannot read the image (no known image format)" in told.err
    results = folder / "out" / "TextureTrans"
    assert sorted(path.name for path in results.iterdir()) == ["001_result.png", "003_result.png"]
    assert array(folder / "sheet.png").shape[0] > 3 * 256

    # The same edit alone, with the shape kept and seed 1.
    assert infer(*PICTURES, "--keep-shape", "-o", "alone.png") == 0
    assert np.array_equal(array(folder / "alone.png"), array(results / "003_result.png"))

    # Again: what is finished is skipped; a model that is not needed is not loaded.
    before = (results / "001_result.png").stat().st_mtime_ns
    capsys.readouterr()
    assert infer(*batch) == 1
    assert "3 edits = 0 done + 2 skipped + 1 failed" in capsys.readouterr().out
    assert (results / "001_result.png").stat().st_mtime_ns == before

    # Mended, and everything again.
    Image.open(folder / "ref.jpg").save(benchmark / "TextureTrans" / "002_reference.png")
    assert infer(*batch, "--force", "--no-keep-shape") == 0
    told = capsys.readouterr()
    assert "3 edits = 3 done + 0 skipped + 0 failed" in told.out and "texture" not in told.out
    assert (results / "001_result.png").stat().st_mtime_ns > before


def test_a_batch_of_a_list(folder: Path, infer: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    line = {"source": "src.jpg", "mask": "mask.png", "reference": "ref.jpg"}
    lines = [
        line,
        line | {"output": "sub/b.png", "seed": 4, "reference_crop": [0, 0, 999, 5]},
        line | {"output": "c.png"},
    ]
    (folder / "list.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    batch = ("--batch", "list.jsonl", "--output-dir", "out", "--num-images", "2")
    assert infer(*batch) == 1
    assert "3 edits = 2 done + 0 skipped + 1 failed" in capsys.readouterr().out
    names = ["c_0.png", "c_1.png", "src_edited_0.png", "src_edited_1.png"]
    assert sorted(path.name for path in (folder / "out").glob("*.png")) == names
    # Of an edit that was cut short only what is missing is made, and it is what it would have been.
    lost = array(folder / "out" / "c_1.png")
    (folder / "out" / "c_1.png").unlink()
    assert infer(*batch) == 1
    assert "3 edits = 1 done + 1 skipped + 1 failed" in capsys.readouterr().out
    assert np.abs(array(folder / "out" / "c_1.png").astype(int) - lost).max() <= 1


def test_a_batch_in_groups_gives_the_same_images(
    folder: Path, infer: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    thin = np.zeros((90, 60), np.uint8)
    thin[51, 21] = 255  # at 16 px nothing is left of it, which the pipeline finds out
    Image.fromarray(thin).save(folder / "thin.png")
    line = {"source": "src.jpg", "mask": "mask.png", "reference": "ref.jpg"}
    lines = [
        line | {"output": "a.png"},
        line | {"output": "b.png", "seed": 4, "reference_crop": [0, 0, 200, 90], "source": "src.jpg"},
        line | {"output": "thin.png", "mask": "thin.png"},
        line | {"output": "shape.png", "keep_shape": True},
        line | {"output": "c.png", "reference": "src.jpg"},
    ]
    (folder / "list.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    batch = ("--batch", "list.jsonl", "--num-images", "2")
    for size, *graphs in (("1",), ("2", "--cuda-graphs")):
        assert infer(*batch, "--output-dir", f"out{size}", "--batch-size", size, *graphs) == 1
        told = capsys.readouterr()
        assert "5 edits = 4 done + 0 skipped + 1 failed" in told.out and "the mask is too thin" in told.err
    names = sorted(path.name for path in (folder / "out1").iterdir())
    assert names == [f"{name}_{n}.png" for name in ("a", "b", "c", "shape") for n in (0, 1)]
    for name in names:
        one, grouped = array(folder / "out1" / name), array(folder / "out2" / name)
        assert np.abs(one.astype(int) - grouped).max() <= 1, name


def test_a_model_that_cannot_be_loaded_stops_the_batch(
    folder: Path, benchmark: Path, infer: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "model_index.json").write_text("{}")
    assert infer("--batch", "bench", "--output-dir", "out", "--model", "model") == 2
    told = capsys.readouterr()
    assert "is not a complete MimicBrush pipeline" in told.err and "failed" not in told.out


def test_an_interrupted_batch_keeps_what_is_done(
    folder: Path,
    benchmark: Path,
    infer: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls: list[int] = []
    call = MimicBrushPipeline.__call__

    def interrupted(pipeline: MimicBrushPipeline, *arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return call(pipeline, *arguments, **options)

    monkeypatch.setattr(MimicBrushPipeline, "__call__", interrupted)
    assert infer("--batch", "bench", "--output-dir", "out") == 130
    message = capsys.readouterr().err
    assert "2 edits = 1 done + 0 skipped + 1 failed" in message and "Run the same command again to continue" in message
    assert [path.name for path in (folder / "out" / "TextureTrans").iterdir()] == ["001_result.png"]


def test_a_batch_without_memory_for_one_edit_goes_on(
    folder: Path,
    benchmark: Path,
    infer: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (benchmark / "TextureTrans" / "002_reference.png").unlink()
    Image.open(folder / "ref.jpg").save(benchmark / "TextureTrans" / "002_reference.png")
    on_cpu = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    errors = iter([torch.OutOfMemoryError("CUDA out of memory."), None, on_cpu, MemoryError(), ValueError("a bug")])
    call = MimicBrushPipeline.__call__

    def short(pipeline: MimicBrushPipeline, *arguments: object, **options: object) -> object:
        if error := next(errors):
            raise error
        return call(pipeline, *arguments, **options)

    monkeypatch.setattr(MimicBrushPipeline, "__call__", short)
    batch = ("--batch", "bench", "--output-dir", "out")
    assert infer(*batch) == 1
    told = capsys.readouterr()
    assert "3 edits = 1 done + 0 skipped + 2 failed" in told.out
    assert told.err.count("_source.png: not enough memory for this edit: try --crop auto") == 2
    # An error that is nobody's fault but ours ends the batch; what was there before is told all the same.
    assert infer(*batch) == 1
    message = capsys.readouterr().err
    assert "ValueError: a bug" in message and "this is a bug in mimicbrush" in message
    assert "ended early; of 3 edits so far: 2 edits = 0 done + 1 skipped + 1 failed" in message
    assert "failed: bench/TextureTrans/001_source.png: not enough memory" in message


def test_one_edit_without_memory_says_what_to_do(
    infer: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def short(*_: object, **__: object) -> object:
        raise MemoryError

    monkeypatch.setattr(MimicBrushPipeline, "__call__", short)
    assert infer(*PICTURES) == 2
    assert "not enough memory for this edit: try --crop auto" in capsys.readouterr().err


def test_the_contact_sheet_of_a_batch_is_made_anew(
    folder: Path, benchmark: Path, infer: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    batch = ("--batch", "bench", "--output-dir", "out", "--contact-sheet", "sheet.png")
    assert infer(*batch) == 1
    before = array(folder / "sheet.png")
    assert infer(*batch) == 1
    assert np.array_equal(array(folder / "sheet.png"), before)
    # A result that is damaged leaves its cell empty.
    (folder / "out" / "TextureTrans" / "001_result.png").write_text("no image")
    assert infer(*batch) == 1
    assert "sheet.png: contact sheet" in capsys.readouterr().out
    changed = np.argwhere((array(folder / "sheet.png") != before).any(axis=2))
    assert len(changed) and changed[:, 1].min() > 3 * 256  # in the column of the results
    # But no image of the batch is replaced by it, and a single edit replaces nothing.
    for own in ("out/TextureTrans/003_result.png", "bench/TextureTrans/001_source.png"):
        stored = (folder / own).read_bytes()
        assert infer(*batch[:4], "--contact-sheet", own) == 2
        assert "is also an image of the batch" in capsys.readouterr().err
        assert (folder / own).read_bytes() == stored
    assert infer(*PICTURES, "--contact-sheet", "sheet.png") == 2
    assert "sheet.png exists" in capsys.readouterr().err
