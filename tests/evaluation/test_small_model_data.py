from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image

from mimicbrush.errors import InputError
from mimicbrush.mining.options import MiningOptions
from mimicbrush.mining.segmented_images import read_segmented_image
from mimicbrush.ops.counter_rng import generator
from mimicbrush.synthetic import small_model_data
from mimicbrush.synthetic.clips import HELDOUT_PHOTOGRAPHS, ClipSpec, render_with_depth
from mimicbrush.synthetic.dead_leaves import dead_leaves

ROOT = Path(__file__).parents[2]


def test_leaves_are_a_function_of_their_seed_and_their_labels_tell_them_apart() -> None:
    image, labels = dead_leaves(160, 120, generator(3))
    again, _ = dead_leaves(160, 120, generator(3))
    other, _ = dead_leaves(160, 120, generator(4))
    assert image.shape == (120, 160, 3)
    assert image.dtype == np.uint8
    assert labels.shape == (120, 160)
    assert np.array_equal(image, again)
    assert not np.array_equal(image, other)
    # A label says more of a pixel's colour than the whole image does.
    within = sum(image[labels == leaf].astype(float).var(axis=0).sum() * (labels == leaf).mean()
                 for leaf in np.unique(labels))  # fmt: skip
    assert within < 0.6 * image.reshape(-1, 3).astype(float).var(axis=0).sum()


def test_depth_of_rendered_frames_has_things_before_the_ground() -> None:
    alone = ClipSpec("leaves:1", seed=5, seconds=0.2, width_px=160, height_px=120)
    frames = list(render_with_depth(alone))
    assert len(frames) == alone.num_frames
    image, depth = frames[0]
    assert image.shape[:2] == depth.shape == (120, 160)
    assert depth[0].max() < depth[-1].min() <= 0.4  # the ground comes nearer towards the lower edge
    with_thing = ClipSpec(**vars(alone) | {"cutouts": ("leaves:2",)})
    changed, nearer = next(render_with_depth(with_thing))
    covered = nearer > 0.55
    assert 0.02 < covered.mean() < 0.5
    assert np.abs(changed[covered].astype(int) - image[covered]).mean() > 10


def test_stills_are_what_the_miner_reads(tmp_path: Path) -> None:
    stills = list(small_model_data.write_stills(tmp_path / "stills", [], num_leaves=1, crops=1, seed=0))
    assert len(stills) == 1 + len(small_model_data.TRAIN_PHOTOGRAPHS)
    with_segments = 0
    for path in stills:
        found = read_segmented_image(path.read_bytes(), path.with_suffix(".json").read_bytes(), MiningOptions())
        assert (found.width_px, found.height_px) == (320, 320)
        with_segments += len(found.segments) > 0
    assert with_segments >= len(stills) - 2


def test_training_and_heldout_clips_share_no_photograph(tmp_path: Path) -> None:
    for subject in ("cat", "vase"):
        (tmp_path / subject).mkdir()
        for number in range(3):
            Image.new("RGB", (8, 8)).save(tmp_path / subject / f"{number}.jpg")
    heldout = small_model_data.heldout_clips(tmp_path, seed=0)
    assert sorted(heldout) == ["cat.mp4", "vase.mp4"]
    used = {spec.background for spec in heldout.values()} | {name for spec in heldout.values() for name in spec.cutouts}
    assert len(used) == 6
    train = small_model_data.training_clips([], 60, seed=0)
    shown = {spec.background for spec in train.values()} | {name for spec in train.values() for name in spec.cutouts}
    assert not shown & (used | set(HELDOUT_PHOTOGRAPHS))
    assert len({(spec.background, spec.seed) for spec in train.values()}) == 60


def test_a_photograph_on_both_sides_and_namesakes_are_refused(tmp_path: Path) -> None:
    for folder, colour in (("mine", 0), ("theirs", 9), ("others", 5)):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8), (colour,) * 3).save(tmp_path / folder / "00.png")
    mine, theirs, others = (str(tmp_path / folder / "00.png") for folder in ("mine", "theirs", "others"))
    small_model_data.check_train_heldout_apart([mine], [theirs, others])
    copied = tmp_path / "theirs" / "01.png"
    copied.write_bytes(Path(mine).read_bytes())
    with pytest.raises(InputError, match="is also held out for testing"):
        small_model_data.check_train_heldout_apart([mine], [theirs, str(copied)])
    coffee = tmp_path / "mine" / "morning.png"
    coffee.write_bytes((Path(skimage.__file__).parent / "data" / "coffee.png").read_bytes())
    small_model_data.check_train_heldout_apart([str(coffee)], [theirs])
    with pytest.raises(InputError, match="is also held out for testing"):
        small_model_data.check_train_heldout_apart([str(coffee)], [])
    with pytest.raises(InputError, match="would give stills of the same name; rename one of the photographs"):
        small_model_data.check_train_heldout_apart([mine, others], [])


def test_a_folder_that_was_begun_with_other_options_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "small_model_data.py"), "--output", str(tmp_path / "data")]
    (tmp_path / "data").mkdir()
    options = {"videos": "None", "photographs": "[]", "heldout": "None"}
    options |= {"clips": "300", "leaves": "300", "crops": "8", "seed": "0"}
    (tmp_path / "data" / "options.json").write_text(json.dumps(options))
    done = subprocess.run([*command, "--seed", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "was begun with --seed 0" in done.stderr
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["options.json"]


@pytest.mark.parametrize("name", ["leaves:7", "coffee.png"])
def test_a_clip_can_be_made_of_leaves_or_photographs(name: str) -> None:
    frame, _ = next(render_with_depth(ClipSpec(name, seconds=0.1, width_px=80, height_px=60)))
    assert frame.std() > 5
