from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from function_editor import FunctionEditor
from PIL import Image
from toy_data import jpeg

from mimicbrush.data.pair import Pair
from mimicbrush.evaluation.heldout.options import EvaluationOptions
from mimicbrush.evaluation.heldout.run import evaluate_heldout
from mimicbrush.evaluation.heldout.samples import SamplePlan, plan_samples
from mimicbrush.evaluation.heldout.scoring import edit_batch, load_sets
from mimicbrush.evaluation.heldout.showcase import (
    SHOWCASE_COLUMNS,
    ShowcaseRow,
    choose_showcase_pairs,
    find_showcase_hole,
    find_showcase_holes,
    make_showcase_sheet,
)
from mimicbrush.ops.contact_sheet import cell_corner, cell_fit
from mimicbrush.ops.correspondence import Correspondence
from mimicbrush.ops.plot import RIM_COLOUR

SIZE = 48


@FunctionEditor
def untouched(
    sources: np.ndarray, masks: np.ndarray, references: np.ndarray | None, seeds: Sequence[int]
) -> np.ndarray:
    return sources


@FunctionEditor
def negative(sources: np.ndarray, masks: np.ndarray, references: np.ndarray | None, seeds: Sequence[int]) -> np.ndarray:
    return 255 - sources


def shifted(
    pair: Pair, folder: Path, shift_px: int = 40, contrast: int = 90, patch_xy: tuple[int, int] = (90, 60)
) -> Pair:
    """A pair of frames in which all moved to the left, grey but for a patch of another grey, with a grid of matches."""
    frame = np.full((120, 240, 3), 128, np.uint8)
    x, y = patch_xy
    frame[y - 8 : y + 8, x - 8 : x + 8] = 128 + contrast
    frames = jpeg(frame[:, :160]), jpeg(np.roll(frame, -shift_px, axis=1)[:, :160])
    file = folder / f"{pair.pair_id}.bin"
    file.write_bytes(b"".join(frames))
    xs, ys = np.meshgrid(np.arange(4, 160, 8), np.arange(4, 120, 8))
    points = np.stack([xs.ravel(), ys.ravel()], axis=1).astype(np.float32)
    points = points[points[:, 0] > shift_px]
    return replace(
        pair, size_px=(120, 160), a_file=file, a_span=(0, len(frames[0])), b_span=(len(frames[0]), len(frames[1])),
        a_sha256="", b_sha256="", a_points=points, b_points=points - np.array([shift_px, 0], np.float32),
    )  # fmt: skip


def test_the_hole_hides_what_only_the_reference_shows(rendered: list[Pair], tmp_path: Path) -> None:
    hole = find_showcase_hole(shifted(rendered[0], tmp_path))
    assert hole is not None
    assert hole.mask.shape == (120, 160) and set(np.unique(hole.mask)) == {0, 255}
    assert (hole.mask[52:68, 82:98] == 255).all()  # the patch
    assert (hole.mask > 0).mean() == pytest.approx(np.pi * (0.12 * 160) ** 2 / (120 * 160), rel=0.05)
    fainter = find_showcase_hole(shifted(rendered[0], tmp_path, contrast=30))
    assert fainter is not None and 0 < fainter.margin < hole.margin / 4


def test_where_copying_in_place_is_right_there_is_no_hole(rendered: list[Pair], tmp_path: Path) -> None:
    hole = find_showcase_hole(shifted(rendered[0], tmp_path, shift_px=0))
    assert hole is None or hole.margin < 10  # noise of the JPEG


def test_what_the_reference_does_not_show_is_not_hidden(rendered: list[Pair], tmp_path: Path) -> None:
    """The patch leaves the frame: it is in no match, and a reference moved by the others does not show it."""
    hole = find_showcase_hole(shifted(rendered[0], tmp_path, shift_px=80, patch_xy=(70, 60)))
    assert hole is None or not (hole.mask[52:68, 62:78] > 0).any() or hole.margin < 10


def test_without_matches_that_move_together_there_is_no_hole(rendered: list[Pair], tmp_path: Path) -> None:
    pair = shifted(rendered[0], tmp_path)
    none = np.zeros((0, 2), np.float32)
    assert find_showcase_hole(replace(pair, a_points=none, b_points=none)) is None
    for count in (1, 2, 9):
        few = replace(pair, a_points=pair.a_points[:count], b_points=pair.b_points[:count])
        assert find_showcase_hole(few) is None
    sparse = np.array([[20 * n, 60] for n in range(1, 8)], np.float32)
    assert find_showcase_hole(replace(pair, a_points=sparse, b_points=sparse)) is None
    one_place = np.full_like(pair.a_points, 60)  # no motion follows from a single place
    assert find_showcase_hole(replace(pair, b_points=one_place)) is None
    rng = np.random.default_rng(0)
    for _ in range(20):  # false matches move anywhere
        points = rng.uniform((0, 0), (160, 120), (2, 60, 2)).astype(np.float32)
        assert find_showcase_hole(replace(pair, a_points=points[0], b_points=points[1])) is None


def test_rows_have_the_largest_margins_one_of_each_source(rendered: list[Pair], tmp_path: Path) -> None:
    """Whatever order they come in, and nothing but the pairs is asked for."""
    contrasts = [10, 70, 40, 30, 110, 90, 50, 15]  # two pairs of each of four sources
    pairs = [shifted(pair, tmp_path, contrast=each) for pair, each in zip(rendered, contrasts, strict=True)]
    plans = [SamplePlan(pair, pairs[0]) for pair in pairs]
    expected = [pairs[4].pair_id, pairs[1].pair_id, pairs[6].pair_id]
    for _ in range(3):
        random.Random(0).shuffle(plans)
        assert [plan.pair.pair_id for plan, _ in choose_showcase_pairs(plans)] == expected
    assert len(find_showcase_holes(pairs)) == 4
    pairs[4].a_file.write_bytes(b"")
    assert find_showcase_holes(pairs)[0][0].pair_id == pairs[5].pair_id


def test_what_an_editor_makes_of_them_does_not_choose_the_rows(rendered: list[Pair], tmp_path: Path) -> None:
    pairs = [shifted(pair, tmp_path, contrast=20 + 10 * number) for number, pair in enumerate(rendered)]
    sheets = []
    for name, editor in (("good", untouched), ("bad", negative)):
        evaluate_heldout(editor, pairs, SIZE, EvaluationOptions(sets=("natural",), sheet_pairs=1), tmp_path / name)
        sheets.append(np.asarray(Image.open(tmp_path / name / "showcase.png")))
    width = sheets[0].shape[1] // len(SHOWCASE_COLUMNS)
    difference = np.abs(sheets[0].astype(int) - sheets[1]).max(axis=(0, 2))
    assert difference[: 2 * width].max() == 0  # sources and references
    assert difference[2 * width : 3 * width].max() > 50


@pytest.mark.parametrize("options", [EvaluationOptions(sets=("warped",)), EvaluationOptions(sheet_pairs=0)])
def test_where_no_images_of_the_natural_set_are_asked_for_there_is_none(
    rendered: list[Pair], tmp_path: Path, options: EvaluationOptions
) -> None:
    (tmp_path / "showcase.png").write_bytes(b"of an earlier run")
    evaluate_heldout(untouched, [shifted(pair, tmp_path) for pair in rendered[::2]], SIZE, options, tmp_path)
    assert not (tmp_path / "showcase.png").exists()


def test_mask_and_images_lie_in_their_cells_alike(rendered: list[Pair], tmp_path: Path) -> None:
    """Without the padding of the canvas, which is white around an image and black around a mask."""
    wide, turned = rendered[0], tmp_path / "turned.jpg"
    turned.write_bytes(jpeg(rendered[2].read_a().swapaxes(0, 1)))
    span = (0, turned.stat().st_size)
    tall = replace(rendered[2], size_px=(160, 120), a_file=turned, a_span=span, b_span=span, a_sha256="", b_sha256="")
    plan = replace(plan_samples(rendered, 1, 0)[0], pair=wide, wrong_pair=tall)
    batch = [load_sets(plan, ("natural", "warped"), SIZE, 0)]
    for edited in edit_batch(untouched, batch):
        cells = edited.make_cells()
        for name in ("source", "mask", "model", "target", "copy_in_place", "opencv_inpaint"):
            assert cells[name].shape[:2] == (36, 48), name
        hole = cells["mask"] > 0
        assert np.array_equal(cells["source"][~hole], cells["target"][~hole])
        assert (cells["source"][hole] != cells["target"][hole]).any(axis=1).mean() > 0.9
        natural = edited.set_name == "natural"
        assert cells["reference"].shape[:2] == ((36, 48) if natural else (48, 48))
        assert cells["wrong"].shape[:2] == ((48, 36) if natural else (48, 48))


def test_a_line_joins_the_places_in_both_cells() -> None:
    source, reference = np.full((60, 80, 3), 200, np.uint8), np.full((80, 40, 3), 30, np.uint8)
    mask = np.zeros((60, 80), np.uint8)
    mask[20:40, 20:60] = 1
    one = np.ones(1, np.float32)
    found = Correspondence(np.array([[40.0, 30.0]]), np.array([[20.0, 60.0]]), one, one, 5.0, 5.0)
    rows = [ShowcaseRow("", source, mask, reference, [source, source], each) for each in (None, found)]
    plain, joined = (make_showcase_sheet("title", SHOWCASE_COLUMNS, [row], 200) for row in rows)
    assert (plain == RIM_COLOUR).all(axis=2).sum() > 400
    changed = (plain != joined).any(axis=2)
    for column, (shape, point) in enumerate([((60, 80), (40, 30)), ((80, 40), (20, 60))]):
        left, top = cell_corner("title", SHOWCASE_COLUMNS, 0, column, 200)
        x, y, width, _ = cell_fit(shape, 200)
        at = np.round(np.array(point) * width / shape[1] + (left + x, top + y)).astype(int)
        assert changed[at[1] - 8 : at[1] + 9, at[0] - 8 : at[0] + 9].mean() > 0.7
    assert changed.any(axis=0)[110:300].all() and not changed[:, 420:].any()
