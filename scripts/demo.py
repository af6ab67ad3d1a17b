"""All of it once, as a toy: render clips, mine pairs, train a minute, edit, evaluate, and lay out the pictures.

Needs nothing beside the installed packages: no data, no weights, no network, no GPU. Each step is one of the
commands that a user would type, and is printed before it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mimicbrush.errors import InputError, MimicBrushError, run_plainly
from mimicbrush.evaluation.shipped import is_shipped

SCRIPTS = Path(__file__).parent
#: Lies in each folder that this script made: only such a folder is emptied for a new run.
MARKER = ".made_by_demo"
TRAIN_CLIPS, HELDOUT_CLIPS, EDITS = 14, 6, 2
EVALUATED_PAIRS, EVALUATION_STEPS = 18, 12


class Story:
    """Tells what happens, and remembers how long it took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def step(self, title: str, action: Callable[[], None]) -> None:
        """Announce a step, do it, and time it."""
        print(f"\n== {len(self.seconds) + 1}. {title}", flush=True)
        start = time.monotonic()
        action()
        self.seconds[title] = time.monotonic() - start
        print(f"   ({self.seconds[title]:.0f} s)", flush=True)

    def timetable(self) -> str:
        """How long each step took."""
        lines = [f"  {seconds:5.0f} s  {title}" for title, seconds in self.seconds.items()]
        return "\n".join([*lines, f"  {sum(self.seconds.values()):5.0f} s  in all"])


def main() -> None:
    arguments = parse_arguments()
    folder = fresh_folder(arguments.output)
    story = Story()

    story.step(
        f"Render {TRAIN_CLIPS} clips to train on and {HELDOUT_CLIPS} to test with (H.264, other photographs)",
        lambda: render(folder / "clips", arguments.seed),
    )
    story.step("Mine pairs of frames from both", lambda: mine(folder))
    story.step(
        f"Train a toy from random weights, at most {arguments.minutes:g} minutes",
        lambda: command(
            "train.py",
            "+experiment=smoke",
            override("data.root", folder / "pairs" / "train"),
            override("run_dir", folder / "run"),
            f"seed={arguments.seed}",
            f"train.max_minutes={arguments.minutes}",
        ),
    )
    story.step(
        f"Edit {EDITS} frames of clips that it has never seen" + (", with the shipped model" if is_shipped() else ""),
        lambda: edit(folder),
    )
    story.step(
        "Evaluate: does it imitate?",
        lambda: command(
            "evaluate.py",
            override("editor", folder / "run" / "pipeline"),
            override("pairs", folder / "pairs" / "heldout"),
            override("output", folder / "evaluation"),
            f"seed={arguments.seed}",
            f"max_pairs={EVALUATED_PAIRS}",
            f"num_inference_steps={EVALUATION_STEPS}",
        ),
    )
    story.step("Lay out the pictures", lambda: lay_out(folder))
    print(f"\n{tell(folder)}\n\nTime:\n{story.timetable()}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="made anew (default: demo)")
    parser.add_argument("--seed", type=int, default=0, help="of clips, weights, training and evaluation (default: 0)")
    parser.add_argument("--minutes", type=float, default=1.5, help="of training, at most (default: 1.5)")
    return parser.parse_args()


def fresh_folder(folder: Path) -> Path:
    """Make the demo's folder; an older one is removed, but only if it is the demo's own."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder with --output")
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).is_file():
            raise InputError(f"{folder} was not made by this demo and will not be emptied; name another with --output")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text("Made by scripts/demo.py, which empties this folder when it runs again.\n")
    return folder


def override(key: str, path: Path) -> str:
    """A Hydra override; a path with other than plain characters is quoted for Hydra's grammar."""
    text = str(path)
    if re.fullmatch(r"[\w./-]+", text):
        return f"{key}={text}"
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{escaped}'"


def command(script: str, *arguments: str) -> None:
    """Run one of the scripts as a user would, after printing the command."""
    path = os.path.relpath(SCRIPTS / script)
    print(f"$ {shlex.join(['python', path, *arguments])}", flush=True)
    done = subprocess.run([sys.executable, path, *arguments], check=False)
    if done.returncode:
        raise MimicBrushError(f"{script} ended with status {done.returncode}; its message stands above")


def render(folder: Path, seed: int) -> None:
    """Write the clips: another camera path, other things and another tone in each."""
    from mimicbrush.evaluation import clips

    train = clips.demo_clips(clips.TRAIN_PHOTOGRAPHS, TRAIN_CLIPS, seed=2 * seed)
    heldout = clips.demo_clips(clips.HELDOUT_PHOTOGRAPHS, HELDOUT_CLIPS, seed=2 * seed + 1)
    for name, specs in (("train", train), ("heldout", heldout)):
        written = list(clips.write_clips(folder / name, specs))
        size = sum(path.stat().st_size for path in written) / 1e6
        print(f"{folder / name}: {len(written)} clips, {size:.1f} MB")


def mine(folder: Path) -> None:
    for name in ("train", "heldout"):
        arguments = override("input", folder / "clips" / name), override("output", folder / "pairs" / name)
        command("mine_pairs.py", *arguments)


def edit(folder: Path) -> None:
    """Write a few held-out pairs as picture files, with an oval mask on what was matched, and edit them."""
    import cv2
    import numpy as np
    from PIL import Image

    from mimicbrush.data.manifest import read_manifest
    from mimicbrush.ops.files import write_picture

    pairs = read_manifest(folder / "pairs" / "heldout")
    first_of_clip = {pair.source_path: pair for pair in reversed(pairs)}
    edits = folder / "edits"
    edits.mkdir()
    for name, pair in sorted(first_of_clip.items())[:EDITS]:
        source, reference = pair.read_a(), pair.read_b()
        height, width = source.shape[:2]
        centre = np.median(pair.a_points, axis=0).round().astype(int).tolist()
        mask = np.zeros((height, width), np.uint8)
        cv2.ellipse(mask, centre, (width // 5, height // 4), 0, 0, 360, 255, -1)
        stem = edits / Path(name).stem
        parts = {"source": source, "mask": mask, "reference": reference}
        files = {part: f"{stem}_{part}.png" for part in parts}
        for part, picture in parts.items():
            write_picture(Image.fromarray(picture), Path(files[part]))
        pictures = files["reference"], files["source"], files["mask"]
        command("infer.py", *pictures, "--model", str(folder / "run" / "pipeline"), "-o", f"{stem}_result.png")
        if is_shipped():
            command("infer.py", *pictures, "-o", f"{stem}_shipped.png", "--save-correspondence", f"{stem}_map.png")


def lay_out(folder: Path) -> None:
    """The two sheets: what was mined, and what was painted."""
    import numpy as np
    from PIL import Image

    from mimicbrush.data.manifest import read_manifest
    from mimicbrush.evaluation.sheets import SheetRow, contact_sheet, pairs_sheet, show_hole
    from mimicbrush.ops.files import write_picture

    def read(path: str | Path) -> np.ndarray:
        with Image.open(path) as picture:
            return np.asarray(picture)

    pairs = read_manifest(folder / "pairs" / "train")
    write_picture(Image.fromarray(pairs_sheet(pairs)), folder / "mined_pairs.png")
    rows = []
    for result in sorted((folder / "edits").glob("*_result.png")):
        stem = str(result).removesuffix("_result.png")  # demo/edits/CLIP
        source, mask, reference = (read(f"{stem}_{part}.png") for part in ("source", "mask", "reference"))
        size = f"{source.shape[1]} x {source.shape[0]} px"
        for name, what in (("shipped", "the shipped model"), ("result", "the toy of this demo")):
            if Path(f"{stem}_{name}.png").is_file():
                cells = [show_hole(source, mask), mask, reference, read(f"{stem}_{name}.png"), source]
                text = f"infer.py on {Path(stem).name}: {what}, {size}, pasted back into the source"
                rows.append(SheetRow(text, cells))
    records = (folder / "evaluation" / "pictures" / "natural").glob("*_model.png")
    for result in sorted(records):
        stem = str(result).removesuffix("_model.png")  # demo/evaluation/pictures/natural/NUMBER_CLIP
        cells = [read(f"{stem}_{part}.png") for part in ("source", "mask", "reference", "model", "target")]
        size = f"{cells[0].shape[1]} x {cells[0].shape[0]} px"
        rows.append(SheetRow(f"evaluate.py on {Path(stem).name[3:]}: the toy, {size}, nothing pasted back", cells))
    columns = ["source (the hole in black)", "mask (white = repaint)", "reference", "result", "target"]
    title = "Held-out clips, edited by a toy trained for about a minute"
    sheet = contact_sheet(title, columns, rows, cell_px=200)
    write_picture(Image.fromarray(sheet), folder / "contact_sheet.png")


def tell(folder: Path) -> str:
    """What happened, in plain words, and where to look."""
    from mimicbrush.evaluation.report import gain_sentences

    metrics = json.loads((folder / "evaluation" / "metrics.json").read_text())
    log = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in log if "loss" in record]
    steps = max((record["step"] for record in log), default=0)
    mined = {name: json.loads((folder / "pairs" / name / "summary.json").read_text()) for name in ("train", "heldout")}
    rows = metrics["natural"]["rows"]
    learnt = f"its loss went from {losses[0]:.2f} to {losses[-1]:.2f}" if losses else "too few to log a loss"
    return f"""What happened
  A camera moved over photographs with things moving across them: {mined["train"]["inputs"]} clips to train on,
  {mined["heldout"]["inputs"]} over other photographs to test with. From these, {mined["train"]["pairs"]} and \
{mined["heldout"]["pairs"]} pairs of frames were mined.
  A toy of the model was trained from random weights for {steps} steps on pairs of the first kind; {learnt}.
  In each step it saw one frame with holes, and the other frame whole, and had to restore the first.
  Then it edited frames of clips that it had never seen.

What to expect
  A toy of {metrics["size_px"]} px that was trained for a minute does not paint well, and this is no result: it shows
  that every part works together. In the holes it reaches {rows["model"]["psnr"]:.1f} dB; copying the reference in \
place {rows["copy_in_place"]["psnr"]:.1f} dB,
  and filling the hole from around it with OpenCV {rows["opencv_inpaint"]["psnr"]:.1f} dB, without any model.

Does it imitate? (PSNR in the hole with the true reference, less that with one from another clip)
  as mined: {_indented(gain_sentences(metrics["natural"]))}
  warped:   {_indented(gain_sentences(metrics["warped"]))}

Where to look
  {folder / "contact_sheet.png"}      source, mask, reference, result, target
  {folder / "mined_pairs.png"}        pairs of frames, with their matches
  {folder / "evaluation"}/            all numbers (metrics.json), and sheets with wrong references and baselines
  {folder / "run" / "pipeline"}/      the trained toy, for scripts/infer.py --model
  {folder / "clips"}/, {folder / "pairs"}/   what it was made from"""


def _indented(text: str) -> str:
    return text.replace("\n", "\n            ")


if __name__ == "__main__":
    run_plainly(main)
