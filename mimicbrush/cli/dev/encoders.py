"""Train the frozen networks of the small model from scratch.

mimicbrush encoders SMALL_MODEL_DATA --output DIR

SMALL_MODEL_DATA is the output of `mimicbrush data`. This takes about ten
minutes on one CPU core. Networks that already exist in DIR are kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimicbrush.errors import InputError, OutputError
from mimicbrush.io.atomic import replace_folder
from mimicbrush.io.locks import hold_folder
from mimicbrush.io.outputs import check_output_folder, write_or_keep
from mimicbrush.ranges import SEED_RANGE, WORKERS_RANGE, CommandParser, NumberRange, one_of

if TYPE_CHECKING:
    import torch

NETWORKS = ("vae", "image_encoder", "depth_estimator")
SIZE_PX = 64
#: Of which the depth estimator learns, at three frames a second.
RENDERED_CLIPS = 90


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("data", type=Path, metavar="SMALL_MODEL_DATA", help="folder made by `mimicbrush data`")
    output_help = "folder for vae, image_encoder and depth_estimator"
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help=output_help)
    parser.add_argument("--only", **one_of(*NETWORKS), help="train only this network")
    steps = NumberRange(at_least=1, at_most=10**9, whole=True)
    parser.add_argument(
        "--steps", type=steps.read, default=2500, metavar="N", help="training steps of each network (default: 2500)"
    )
    parser.add_argument("--seed", type=SEED_RANGE.read, default=0, help="seed of weights and samples (default: 0)")
    parser.add_argument(
        "--threads", type=WORKERS_RANGE.read, default=1, metavar="N", help="threads of PyTorch (default: 1)"
    )
    return parser.parse_args()


def main() -> None:
    """Train the networks that are not there yet, one after the other."""
    arguments = parse_arguments()
    check_output_folder(arguments.output, "--output")
    if not (arguments.data / "pairs" / "train").is_dir():
        raise InputError(f"{arguments.data} has no pairs/train; make the folder with `mimicbrush data`")

    with hold_folder(arguments.output):
        train_encoders(arguments)


def train_encoders(arguments: argparse.Namespace) -> None:
    """Train the networks that are not there yet into the output folder, which is held.

    Raises:
        OutputError: one could not be written there; it is kept elsewhere.
    """
    import torch

    from mimicbrush.training.methods import small_encoders
    from mimicbrush.training.methods.small_encoders import Schedule

    torch.set_num_threads(arguments.threads)
    schedule = Schedule(arguments.steps)
    lost = False
    for number, name in enumerate(NETWORKS):
        folder = arguments.output / name
        if arguments.only not in (None, name):
            continue
        if folder.exists():
            print(f"{folder} already exists and is kept")
            continue
        seed = 3 * arguments.seed + number
        network: Any
        if name == "vae":
            network = small_encoders.train_autoencoder(pairs(arguments.data, 8, seed), schedule, seed)
        elif name == "image_encoder":
            network = small_encoders.train_image_encoder(pairs(arguments.data, 48, seed), schedule, seed)
        else:
            network = small_encoders.train_depth_estimator(depths(seed, 16), schedule, seed)
        lost |= write_or_keep(folder, partial(_save, network)) != folder
    if lost:
        raise OutputError("some networks were saved to other folders (see above)")


def _save(network: Any, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    replace_folder(folder, network.save_pretrained)


def pairs(data: Path, batch_size: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of the two views of training samples without end, with the strong augmentation."""
    from mimicbrush.data.batch import collate_samples
    from mimicbrush.data.dataset import PairDataset
    from mimicbrush.data.options import DataOptions
    from mimicbrush.data.pair_sources import load_pair_sources

    options = DataOptions(root=str(data / "pairs" / "train"), heldout_ratio=0.0)
    dataset = PairDataset(load_pair_sources(options), SIZE_PX, options, seed=seed)
    first = 0
    while True:
        batch = collate_samples([dataset[number] for number in range(first, first + batch_size)])  # type: ignore[arg-type]
        yield batch.source, batch.reference  # type: ignore[union-attr]
        first += batch_size


def depths(seed: int, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of rendered frames with their depth without end; each clip has other leaves and photographs."""
    import numpy as np
    import torch
    from tqdm import tqdm

    from mimicbrush.ops.canvas import IMAGE_FILL, to_tensor
    from mimicbrush.ops.color_jitter import JitterRanges, apply_jitter, random_jitter
    from mimicbrush.ops.counter_rng import generator
    from mimicbrush.ops.geometry import GeometryRanges, letterbox_matrix, random_matrix, warp_to_canvas
    from mimicbrush.synthetic.clips import render_with_depth
    from mimicbrush.synthetic.small_model_data import training_clips

    rng = generator(seed)
    frames: list[tuple[np.ndarray, np.ndarray]] = []
    for spec in tqdm(training_clips([], RENDERED_CLIPS, seed=1000 + seed).values(), desc="rendering", unit="clip"):
        frames += render_with_depth(replace(spec, fps=3))
    while True:
        images, maps = [], []
        for number in rng.integers(len(frames), size=batch_size):
            frame, depth = frames[int(number)]
            fit = letterbox_matrix(frame.shape[1], frame.shape[0], SIZE_PX)
            matrix = random_matrix(GeometryRanges(projective_intensity=0.0), SIZE_PX, rng) @ fit
            jittered = apply_jitter(frame, random_jitter(JitterRanges(), rng).matrix(frame.mean(axis=(0, 1))))
            images.append(warp_to_canvas(jittered, matrix, SIZE_PX, IMAGE_FILL))
            maps.append(warp_to_canvas((depth * 255).round().astype(np.uint8), matrix, SIZE_PX, 0))
        yield to_tensor(np.stack(images)), torch.from_numpy(np.stack(maps))[:, None].float() / 255
