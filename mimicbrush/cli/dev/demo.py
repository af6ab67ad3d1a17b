"""All of it once: render clips, mine pairs, fine-tune the small model on them, edit before and after, evaluate.

Starts from the small model that comes with the project, and needs only the installed packages: no data, no network, no
GPU. Each step is a command that you can type yourself. It is printed before it runs.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mimicbrush.errors import InputError, MimicBrushError
from mimicbrush.io.locks import LOCK_NAME, hold_folder
from mimicbrush.io.outputs import check_output_folder
from mimicbrush.pipelines.small_model import SHIPPED_MODEL, SHIPPED_NAME, is_shipped
from mimicbrush.ranges import SEED_RANGE, CommandParser, NumberRange

#: Lies in each folder that this script made: only such a folder is emptied for a new run.
MARKER = ".made_by_demo"
TRAIN_CLIPS, DEMO_HELDOUT_CLIPS, EDITS = 14, 12, 4
EVALUATED_PAIRS = 24


class Story:
    """Log of the steps, which prints each and keeps how long it took."""

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
        """List how long each step took, and all of them."""
        lines = [f"  {seconds:5.0f} s  {title}" for title, seconds in self.seconds.items()]
        return "\n".join([*lines, f"  {sum(self.seconds.values()):5.0f} s  in all"])


def main() -> None:
    """Run all steps, and say what came out and how long each took."""
    arguments = parse_arguments()
    if not is_shipped():
        raise InputError(
            "the demo starts from the small model that comes with the project, and this installation does not have it. "
            "Use a full clone, or train from random weights: mimicbrush train +experiment=smoke data.root=MINED"
        )
    check_output_folder(arguments.output, "--output")
    with hold_folder(arguments.output):
        run_steps(arguments, fresh_folder(arguments.output))


def run_steps(arguments: argparse.Namespace, folder: Path) -> None:
    """Run all steps in the demo's folder, which is held and empty."""
    story = Story()
    story.step(
        f"Render {TRAIN_CLIPS} clips to train on and {DEMO_HELDOUT_CLIPS} to test with (H.264, other photographs)",
        lambda: render(folder / "clips", arguments.seed),
    )
    story.step("Mine pairs of frames from both", lambda: mine_clips(folder))
    story.step("Before: edit and evaluate with the small model as it comes", lambda: before(folder, arguments.seed))
    story.step(
        f"Fine-tune it on the training clips, at most {arguments.minutes:g} minutes",
        lambda: fine_tune(folder, arguments.seed, arguments.minutes),
    )
    story.step("After: the same edits and the same pairs again", lambda: after(folder, arguments.seed))
    story.step("Lay out the images", lambda: lay_out(folder))
    print(f"\n{tell(folder, arguments.seed)}\n\nTime:\n{story.timetable()}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = CommandParser(description=__doc__)
    output_help = "folder of the demo; an older demo is replaced (default: demo)"
    parser.add_argument("--output", type=Path, default=Path("demo"), metavar="DIR", help=output_help)
    parser.add_argument(
        "--seed", type=SEED_RANGE.read, default=0, help="seed of clips, training and evaluation (default: 0)"
    )
    minutes = NumberRange(above=0, at_most=10**7)
    parser.add_argument(
        "--minutes", type=minutes.read, default=1.0, metavar="N", help="fine-tune for at most N minutes (default: 1)"
    )
    return parser.parse_args()


def fresh_folder(folder: Path) -> Path:
    """Make the demo's folder; an older one is removed, but only if it is the demo's own."""
    older = [path for path in folder.iterdir() if not path.name.startswith(LOCK_NAME)]
    if older and not (folder / MARKER).is_file():
        raise InputError(f"{folder} was not made by this demo, so it is not emptied; choose another --output")
    for path in older:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (folder / MARKER).write_text("Made by mimicbrush demo, which empties this folder when it runs again.\n")
    return folder


def override(key: str, path: Path) -> str:
    """Write an override for Hydra; a path with other than plain characters is quoted for Hydra's grammar."""
    text = str(path)
    if re.fullmatch(r"[\w./-]+", text):
        return f"{key}={text}"
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{escaped}'"


def command(name: str, *arguments: str) -> None:
    """Run a command as a user would, after printing it."""
    print(f"$ {shlex.join(['mimicbrush', name, *arguments])}", flush=True)
    done = subprocess.run([sys.executable, "-m", "mimicbrush", name, *arguments], check=False)
    if done.returncode:
        raise MimicBrushError(f"mimicbrush {name} ended with status {done.returncode}; see its message above")


def render(folder: Path, seed: int) -> None:
    """Write the clips: another camera path, other things and another tone in each."""
    from mimicbrush.synthetic import clips

    train = clips.demo_clips(clips.TRAIN_PHOTOGRAPHS, TRAIN_CLIPS, seed=2 * seed)
    heldout = clips.demo_clips(clips.HELDOUT_PHOTOGRAPHS, DEMO_HELDOUT_CLIPS, seed=2 * seed + 1)
    for name, specs in (("train", train), ("heldout", heldout)):
        written = list(clips.write_clips(folder / name, specs))
        size = sum(path.stat().st_size for path in written) / 1e6
        print(f"{folder / name}: {len(written)} clips, {size:.1f} MB")


def mine_clips(folder: Path) -> None:
    """Mine the clips to train on and those to test with."""
    for name in ("train", "heldout"):
        arguments = override("input", folder / "clips" / name), override("output", folder / "pairs" / name)
        command("mine", *arguments)


def before(folder: Path, seed: int) -> None:
    """Write the images to edit, and see what the small model makes of them as it comes."""
    edits = write_edits(folder)
    batch = str(edits / "edits.jsonl"), "--output-dir", str(folder / "before")
    command("edit", "--batch", *batch, "--model", SHIPPED_NAME)
    evaluate(SHIPPED_NAME, folder, "before", seed)


def after(folder: Path, seed: int) -> None:
    """Edit and evaluate as before with the fine-tuned model, one image at a time, for a map of each edit."""
    pipeline = folder / "run" / "pipeline"
    (folder / "after").mkdir()
    for edit in read_edits(folder):
        name = Path(edit["output"]).stem
        images = (str(folder / "edits" / edit[part]) for part in ("reference", "source", "mask"))
        results = folder / "after" / edit["output"], folder / "after" / f"{name}_map.png"
        written = "-o", str(results[0]), "--save-correspondence", str(results[1])
        command("edit", *images, "--model", str(pipeline), *written)
    evaluate(override("editor", pipeline).partition("=")[2], folder, "after", seed)


def evaluate(editor: str, folder: Path, when: str, seed: int) -> None:
    """Evaluate an editor on the pairs to test with."""
    command(
        "evaluate",
        f"editor={editor}",
        override("pairs", folder / "pairs" / "heldout"),
        override("output", folder / "evaluation" / when),
        f"seed={seed}",
        f"max_pairs={EVALUATED_PAIRS}",
    )


def fine_tune(folder: Path, seed: int, minutes: float) -> None:
    """Go on training from the shipped weights; what is exported edits with as many steps and as much guidance."""
    index = json.loads((SHIPPED_MODEL / "model_index.json").read_text())
    kept = ("default_num_inference_steps", "default_guidance_scale")
    spacing = json.loads((SHIPPED_MODEL / "scheduler" / "scheduler_config.json").read_text())["timestep_spacing"]
    command(
        "train",
        "+experiment=fine_tune",
        override("data.root", folder / "pairs" / "train"),
        override("run_dir", folder / "run"),
        f"seed={seed}",
        f"train.max_minutes={minutes}",
        f"train.default_timestep_spacing={spacing}",
        *(f"train.{name}={index[name]}" for name in kept if index.get(name) is not None),
    )


def write_edits(folder: Path) -> Path:
    """Write the edits: the held-out pairs whose hole only the reference explains, each of another clip.

    Returns:
        The folder, with the list that mimicbrush edit --batch takes.
    """
    from PIL import Image

    from mimicbrush.data.manifest import read_manifest
    from mimicbrush.evaluation.heldout.showcase import find_showcase_holes
    from mimicbrush.io.images import write_image

    chosen = find_showcase_holes(read_manifest(folder / "pairs" / "heldout"))[:EDITS]
    if not chosen:
        raise MimicBrushError("no pair of these clips has a part that only the reference shows; use another --seed")
    edits, lines = folder / "edits", []
    edits.mkdir()
    for number, (pair, hole) in enumerate(chosen, start=1):
        stem = f"edit_{number}"
        images = {"source": pair.read_a(), "mask": hole.mask, "reference": pair.read_b()}
        for part, pixels in images.items():
            write_image(Image.fromarray(pixels), edits / f"{stem}_{part}.png")
        lines.append({part: f"{stem}_{part}.png" for part in images} | {"output": f"{stem}.png"})
    (edits / "edits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return edits


def read_edits(folder: Path) -> list[dict[str, str]]:
    """Read the list of edits that `write_edits` wrote."""
    return [json.loads(line) for line in (folder / "edits" / "edits.jsonl").read_text().splitlines()]


def lay_out(folder: Path) -> None:
    """Write the two sheets: what was mined, and what was painted."""
    import numpy as np
    from PIL import Image

    from mimicbrush.data.manifest import read_manifest
    from mimicbrush.evaluation.heldout.pairs_sheet import make_pairs_sheet
    from mimicbrush.evaluation.heldout.showcase import ShowcaseRow, make_showcase_sheet
    from mimicbrush.io.images import write_image
    from mimicbrush.ops.correspondence import LEGEND, Correspondence

    def read(path: Path) -> np.ndarray:
        with Image.open(path) as image:
            return np.asarray(image)

    pairs = read_manifest(folder / "pairs" / "train")
    write_image(Image.fromarray(make_pairs_sheet(pairs)), folder / "mined_pairs.png")
    rows = []
    for edit in read_edits(folder):
        source, mask, reference = (read(folder / "edits" / edit[part]) for part in ("source", "mask", "reference"))
        results = [read(folder / when / edit["output"]) for when in ("before", "after")]
        found = Correspondence.load(folder / "after" / f"{Path(edit['output']).stem}_map.npz")
        rows.append(ShowcaseRow(edit["source"], source, mask, reference, [*results, source], found))
    columns = ["source\n(mask in stripes)", "reference", "before:\nthe small model", "after:\nfine-tuned", "target"]
    legend = f"{LEGEND} The lines are those of the fine-tuned model.".replace(". ", ".\n")
    title = (
        "Frames of clips over photographs that neither model ever saw.\n"
        "The surroundings do not show what these masks hide. The reference does, at another place.\n"
        "They were chosen for this, not for their results. The model works at "
        f"{canvas_px(folder)} x {canvas_px(folder)} pixels, so its results are blurred.\n"
        f"{legend}"
    )
    write_image(Image.fromarray(make_showcase_sheet(title, columns, rows)), folder / "contact_sheet.png")


def canvas_px(folder: Path) -> int:
    """Read the side of the model's canvas from the evaluation, in pixels."""
    return int(read_metrics(folder, "before")["size_px"])


def read_metrics(folder: Path, when: str) -> dict[str, Any]:
    """Read the numbers of the evaluation before or after fine-tuning."""
    metrics: dict[str, Any] = json.loads((folder / "evaluation" / when / "metrics.json").read_text())
    return metrics


def compare(folder: Path, set_name: str, seed: int) -> str:
    """Say what fine-tuning changed, pair by pair, with an interval over clips and no claim that it denies."""
    import numpy as np

    from mimicbrush.evaluation.heldout.reference_gain import describe_few_sources
    from mimicbrush.evaluation.statistics import bootstrap_by_cluster

    psnr: list[dict[str, float]] = []
    source_of: dict[str, str] = {}
    for when in ("before", "after"):
        lines = (folder / "evaluation" / when / "per_pair.jsonl").read_text().splitlines()
        records = [record for record in map(json.loads, lines) if record["set"] == set_name]
        psnr.append({record["pair_id"]: record["rows"]["model"]["psnr"] for record in records})
        source_of |= {record["pair_id"]: record["source_hash"] for record in records}
    old, new = (np.array([values[pair] for pair in psnr[0]]) for values in psnr)
    sources = [source_of[pair] for pair in psnr[0]]
    low, high = bootstrap_by_cluster(new - old, sources, seed)
    note = describe_few_sources(len(set(sources)))
    return (
        f"{old.mean():.2f} dB before, {new.mean():.2f} after: {(new - old).mean():+.2f} dB (95 % interval {low:+.2f} "
        f"to {high:+.2f})\n{verdict(low, high)}" + (f"\n{note}" if note else "")
    )


def verdict(low: float, high: float) -> str:
    """Judge whether fine-tuning helped, by the interval of what it changed."""
    if low > 0:
        return "Fine-tuning helped here: the interval is clear of zero."
    if high < 0:
        return "Fine-tuning did harm here: the interval is clear of zero, on the wrong side."
    return "The interval holds zero: this does not show that fine-tuning helped, nor that it did harm."


def tell(folder: Path, seed: int) -> str:
    """Say what happened, in plain words, and where to look."""
    from mimicbrush.evaluation.heldout.report import describe_gains

    metrics = read_metrics(folder, "after")
    log = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = max((record["step"] for record in log), default=0)
    mined = {name: json.loads((folder / "pairs" / name / "summary.json").read_text()) for name in ("train", "heldout")}
    rows = metrics["natural"]["rows"]
    return f"""What happened
  A camera moved over photographs with things moving across them: {mined["train"]["inputs"]} clips to train on,
  {mined["heldout"]["inputs"]} over other photographs to test with. From these, {mined["train"]["pairs"]} and \
{mined["heldout"]["pairs"]} pairs of frames were mined.
  The small model that comes with the project edited frames of the clips to test with. Then it was trained for {steps}
  more steps on the pairs of the others: it saw one frame with holes, and the other frame whole, had to restore the
  first, and was taught to look where the miner had found matches. Then it edited the same frames again.

Did fine-tuning help? (PSNR in the hole with the true reference, {metrics["natural"]["n"]} pairs of \
{metrics["natural"]["n_sources"]} clips)
  as mined: {_indented(compare(folder, "natural", seed))}
  warped:   {_indented(compare(folder, "warped", seed))}

Does it imitate? (the model that was fine-tuned: with the true reference, less that with one from another clip)
  as mined: {_indented(describe_gains(metrics["natural"]))}
  warped:   {_indented(describe_gains(metrics["warped"]))}

What to expect
  A minute is short, and a model of {metrics["size_px"]} px paints blurred: this shows that all parts work together.
  As mined, without any model: copying the reference in place reaches {rows["copy_in_place"]["psnr"]:.1f} dB,
  and filling the hole from around it with OpenCV {rows["opencv_inpaint"]["psnr"]:.1f} dB.

Where to look
  {folder / "contact_sheet.png"}      source, reference, before, after, target
  {folder / "mined_pairs.png"}        pairs of frames, with their matches
  {folder / "after"}/            results, and maps of where each hole looked; {folder / "before"}/: before fine-tuning
  {folder / "evaluation"}/       all numbers (metrics.json), and sheets with wrong references and baselines
  {folder / "run" / "pipeline"}/     the model that was fine-tuned, for mimicbrush edit --model
  {folder / "clips"}/, {folder / "pairs"}/   what it was made from"""


def _indented(text: str) -> str:
    return text.replace("\n", "\n            ")
