"""Make the training and test data of the small model.

mimicbrush data --output small_model_data

Renders clips and still images, adds real clips and photographs if you give
some, and mines all of them. OUTPUT/pairs/train is for training, and
OUTPUT/pairs/heldout is for testing. If it is interrupted, run the same command
again to continue.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from mimicbrush.errors import InputError, MimicBrushError
from mimicbrush.io.atomic import write_aside, write_json
from mimicbrush.io.locks import hold_folder
from mimicbrush.io.outputs import check_output_file, check_output_folder
from mimicbrush.ranges import SEED_RANGE, CommandParser, NumberRange

#: Real clips that are never trained on, chosen before any training.
HELDOUT_CLIPS = ("coffee.mp4", "nasa.mp4", "people.mp4")
#: How `--pack` mines: frames just large enough for a canvas of 128 px.
PACKED = ("max_side_px=192", "jpeg_quality=82")
CLIP_SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = CommandParser(description=__doc__)
    output_help = "folder for clips, still images and mined pairs"
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help=output_help)
    videos_help = f"folder of real clips; {', '.join(HELDOUT_CLIPS)} are used only for testing"
    parser.add_argument("--videos", type=Path, metavar="DIR", help=videos_help)
    parser.add_argument(
        "--photographs", type=Path, nargs="+", action="extend", default=[], metavar="DIR",
        help="folders of photographs for training, in addition to those of scikit-image",
    )  # fmt: skip
    parser.add_argument(
        "--heldout", type=Path, metavar="DIR", help="folder with one folder of photographs per subject, for testing"
    )
    count = NumberRange(at_least=0, at_most=10**6, whole=True).read
    parser.add_argument(
        "--clips", type=count, default=300, metavar="N", help="rendered clips for training (default: 300)"
    )
    parser.add_argument(
        "--leaves", type=count, default=300, metavar="N", help="still images of dead leaves (default: 300)"
    )
    parser.add_argument(
        "--crops", type=count, default=8, metavar="N", help="still images of each photograph (default: 8)"
    )
    parser.add_argument(
        "--pack",
        type=Path,
        metavar="FILE.tar",
        help="also write the video pairs, at a smaller size, into one file to copy to a machine with a GPU",
    )
    parser.add_argument(
        "--seed", type=SEED_RANGE.read, default=0, help="seed of everything that is rendered (default: 0)"
    )
    return parser.parse_args()


def main() -> None:
    """Render clips and stills, copy real clips, and mine pairs of all."""
    arguments = parse_arguments()
    for name in ("videos", "photographs", "heldout"):
        given = getattr(arguments, name)
        for folder in given if isinstance(given, list) else [given]:
            if folder is not None and not folder.is_dir():
                raise InputError(f"--{name} {folder}: no such folder")
    if arguments.pack is not None:
        check_output_file(arguments.pack, "--pack")
    check_output_folder(arguments.output, "--output")
    with hold_folder(arguments.output):
        make_data(arguments)


def make_data(arguments: argparse.Namespace) -> None:
    """Make the files, mine them, and pack them if --pack is given; the output folder is locked."""
    train, heldout = arguments.output / "train", arguments.output / "heldout"

    from tqdm import tqdm

    from mimicbrush.synthetic import small_model_data
    from mimicbrush.synthetic.clips import HELDOUT_PHOTOGRAPHS, demo_clips, write_clip

    # 1. Files. Existing files are kept: each is complete (it is renamed when it is), and depends only on the seed.
    photographs = [name for folder in arguments.photographs for name in small_model_data.list_photographs(folder)]
    small_model_data.check_train_heldout_apart(
        photographs, small_model_data.list_photographs(arguments.heldout) if arguments.heldout else []
    )
    keep_options(arguments)
    rendered = {
        train / "rendered": small_model_data.training_clips(photographs, arguments.clips, arguments.seed),
        heldout / "rendered": (
            small_model_data.heldout_clips(arguments.heldout, arguments.seed)
            if arguments.heldout
            else demo_clips(HELDOUT_PHOTOGRAPHS, 18, arguments.seed)
        ),
    }
    for folder, specs in rendered.items():
        folder.mkdir(parents=True, exist_ok=True)
        for name, spec in tqdm(specs.items(), desc=f"rendering {folder}", unit="clip"):
            if not (folder / name).exists():
                write_aside(folder / name, partial(write_clip, spec=spec))
    if not (train / "stills").exists():
        aside = arguments.output / ".stills"
        shutil.rmtree(aside, ignore_errors=True)
        stills = small_model_data.write_stills(aside, photographs, arguments.leaves, arguments.crops, arguments.seed)
        for _ in tqdm(stills, desc="stills", unit="image"):
            pass
        aside.rename(train / "stills")
    if arguments.videos:
        videos = sorted(path for path in arguments.videos.iterdir() if path.suffix.lower() in CLIP_SUFFIXES)
        for folder, wanted in ((heldout, True), (train, False)):
            copy_clips([path for path in videos if (path.name in HELDOUT_CLIPS) == wanted], folder / "real")

    # 2. Pairs.
    for folder in (train, heldout):
        mine(folder, arguments.output / "pairs" / folder.name)
    if arguments.pack is not None:
        pack(arguments)


def pack(arguments: argparse.Namespace) -> None:
    """Mine the training videos again with smaller frames, and write the pairs into one tar file."""
    videos = sorted(path for path in (arguments.output / "train").rglob("*") if path.suffix.lower() in CLIP_SUFFIXES)
    listed, packed = arguments.output / "packed.csv", arguments.output / "packed"
    lines = ["path", *(str(path.relative_to(arguments.output)) for path in videos)]
    write_aside(listed, lambda aside: aside.write_text("\n".join(lines) + "\n", encoding="utf-8"))
    mine(listed, packed, *PACKED)

    def write(aside: Path) -> None:
        with tarfile.open(aside, "w") as tar:
            for name in ("manifest", "shards"):
                tar.add(packed / name, f"small_model_data/packed/{name}")

    write_aside(arguments.pack, write)
    size_mib = arguments.pack.stat().st_size / 2**20
    print(f"wrote {arguments.pack} ({size_mib:.0f} MiB); unpack it on the machine with the GPU")


def mine(inputs: Path, output: Path, *options: str) -> None:
    """Mine pairs as a user would."""
    command = ["-m", "mimicbrush", "mine", f"input={inputs}", f"output={output}", "pairs_per_clip=64", *options]
    done = subprocess.run([sys.executable, *command], check=False)
    if done.returncode:
        raise MimicBrushError(
            f"mimicbrush mine ended with status {done.returncode}. Run the same command again to continue"
        )


def keep_options(arguments: argparse.Namespace) -> None:
    """Record the options: files made with other options would be mistaken for files of these.

    Raises:
        InputError: the folder was begun with others.
    """
    path = arguments.output / "options.json"
    wanted = {name: str(value) for name, value in vars(arguments).items() if name not in ("output", "pack")}
    if path.is_file():
        begun = json.loads(path.read_text())
        if changed := [f"--{name} {begun.get(name)}" for name in wanted if begun.get(name) != wanted[name]]:
            raise InputError(
                f"{arguments.output} was begun with {', '.join(changed)}; use these options, or another --output"
            )
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_json(path, wanted)


def copy_clips(videos: Iterable[Path], folder: Path) -> None:
    """Copy clips, so that what was mined stays readable when the originals go."""
    folder.mkdir(parents=True, exist_ok=True)
    for video in videos:
        if not (folder / video.name).exists():
            write_aside(folder / video.name, partial(shutil.copyfile, video))
