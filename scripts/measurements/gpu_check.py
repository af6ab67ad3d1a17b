"""Check the project on a GPU: are the numbers right, and where does the time go?

A piece may fail, run out of time or crash without affecting the others. Each piece is a process of its own, so this
module does not import torch. Each row of results is written to OUT/gpu_check.json at once. After a crash, the rest of
the piece continues in a new process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from measurements.editing import EDIT_VARIANTS
from measurements.training_variants import TRAIN_VARIANTS, check_variants

from mimicbrush.errors import InputError, cli_main
from mimicbrush.io.atomic import write_json
from mimicbrush.io.outputs import check_output_folder
from mimicbrush.ranges import CommandParser, NumberRange

ROOT = Path(__file__).resolve().parents[2]
#: The pieces in their order, and the seconds that each may take: six minutes together.
LIMITS_S = {"parity": 45, "train_step": 115, "edit": 85, "breakdown": 50, "klein": 60}
VARIANTS: Mapping[str, Mapping[str, object]] = {
    "parity": {},
    "train_step": TRAIN_VARIANTS,
    "edit": EDIT_VARIANTS,
    "breakdown": {**TRAIN_VARIANTS, **EDIT_VARIANTS},
    "klein": {},
}
#: What runs a piece; it is given what to run as JSON, see `gpu_pieces`.
COMMAND = (sys.executable, "-m", "measurements.gpu_pieces")
#: What is needed beside PyTorch, transformers and what these two need: the package and its module.
ALWAYS_CARRIED = {
    "diffusers": "diffusers",
    "importlib-metadata": "importlib_metadata",
    "peft": "peft",
    "zipp": "zipp",
}
OFTEN_THERE = {
    "accelerate": "accelerate",
    "numpy": "numpy",
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "psutil": "psutil",
    "pytest": "pytest",
    "requests": "requests",
    "scipy": "scipy",
}
#: What the speed of ours must reach: of training against the peer at its best micro-batch, and in seconds of an edit.
GOALS = {"times_faster": 1.8, "share_of_peak": 0.35, "edit_current_s": 0.6, "edit_zero_s": 0.4}
DEVICES = ("cpu", "cuda")
SECONDS = NumberRange(at_least=1, at_most=10**6, whole=True)


@dataclass(frozen=True)
class Asked:
    """A piece that is to run.

    Attributes:
        name: of the piece.
        variants: its variants; none: those that are not only on request.
        limit_s: seconds that it may take.
    """

    name: str
    variants: tuple[str, ...]
    limit_s: int


def read_piece(text: str, limit_s: int | None) -> Asked:
    """Read PIECE or PIECE:VARIANT,VARIANT.

    Raises:
        MimicBrushError: there is no such piece, or no such variant.
    """
    name, _, listed = text.partition(":")
    if name not in LIMITS_S:
        raise InputError(f"there is no piece {name!r}; expected one of {', '.join(LIMITS_S)}")
    variants = tuple(filter(None, listed.split(",")))
    check_variants(VARIANTS[name], variants)
    return Asked(name, variants, limit_s or LIMITS_S[name])


class Results:
    """All that was found, in one file that is written again after every row.

    Args:
        path: of the file.
        found: what is known at the start.
    """

    def __init__(self, path: Path, found: dict[str, Any]) -> None:
        self.path, self.found = path, found
        self.write()

    def write(self) -> None:
        """Write the file, with the summary of all rows."""
        rows = {name: piece["rows"] for name, piece in self.found["pieces"].items()}
        self.found["summary"] = summarise(rows.get("train_step", ()), rows.get("edit", ()))
        write_json(self.path, self.found)


def run_piece(asked: Asked, settings: Mapping[str, object], results: Results, log: IO[str]) -> None:
    """Run a piece in processes of its own, until it is done, out of time, or gets no further."""
    piece: dict[str, Any] = {"status": "running", "limit_s": asked.limit_s, "rows": []}
    results.found["pieces"][asked.name] = piece
    start = time.monotonic()
    try:
        ending = "restart"
        while ending == "restart":
            known = len(piece["rows"])
            request = {**settings, "piece": asked.name, "variants": asked.variants}
            request["done"] = [row["case"] for row in piece["rows"]]
            ending = _run_process(request, start + asked.limit_s, results, piece, log)
            if ending == "restart" and len(piece["rows"]) == known:
                ending = "failed"
        piece["status"] = ending
    except (KeyboardInterrupt, SystemExit):
        piece["status"] = "interrupted"
        raise
    finally:
        piece["seconds"] = round(time.monotonic() - start, 1)
        for row in piece["rows"]:
            if row["status"] == "running":
                row["status"] = piece["status"]
        failed = [row for row in piece["rows"] if row["status"] == "failed"]
        if failed and piece["status"] == "done":
            piece["status"] = "failed"
        if piece["status"] == "timed out":
            piece["error"] = f"it took longer than {asked.limit_s} s"
        elif failed:
            piece.setdefault("error", f"{failed[0]['case']}: {failed[0].get('error')}")
        results.write()


def _run_process(
    request: Mapping[str, object], deadline: float, results: Results, piece: dict[str, Any], log: IO[str]
) -> str:
    """Run one process of a piece: "done", "timed out", or "restart" after a crash."""
    log.flush()
    begin = log.tell()
    late = threading.Event()
    with subprocess.Popen(
        [*COMMAND, json.dumps(request)],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,
    ) as process:

        def stop() -> None:
            late.set()
            _kill(process)

        timer = threading.Timer(max(0.0, deadline - time.monotonic()), stop)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                _take(json.loads(line, parse_constant=str), results, piece)  # JSON knows no NaN
            status = process.wait()
        finally:
            timer.cancel()
            _kill(process)
    if late.is_set():
        return "timed out"
    if status == 0:
        return "done"
    log.seek(begin)
    last_lines = " | ".join(log.read().strip().splitlines()[-3:])[-1000:]
    log.seek(0, os.SEEK_END)
    error = f"the process ended with status {status}: {last_lines}"
    running = [row for row in piece["rows"] if row["status"] == "running"]
    for row in running:
        row.update(status="failed", error=error)
    if not piece["rows"]:
        piece["error"] = error
    return "restart"


def _kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):  # it has just ended
            os.killpg(process.pid, signal.SIGKILL)


def _take(told: dict[str, Any], results: Results, piece: dict[str, Any]) -> None:
    """Take what a piece tells: the machine, or a row, which replaces the row of the same case."""
    if "machine" in told:
        results.found.update(told)
    else:
        rows = piece["rows"]
        place = next((place for place, row in enumerate(rows) if row["case"] == told["case"]), len(rows))
        rows[place : place + 1] = [told]
    results.write()


def summarise(train_rows: Iterable[Mapping[str, Any]], edit_rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Compare the best row of ours with the best of the peer, and with the goals.

    Returns:
        What can be told by the rows that are there.
    """
    found: dict[str, Any] = {}

    def best(rows: Iterable[Mapping[str, Any]], fits: re.Pattern[str]) -> Mapping[str, Any] | None:
        timed = (row for row in rows if row["status"] == "done" and fits.search(row["case"]))
        return min(timed, key=lambda row: row["ms"], default=None)

    trained, edited = list(train_rows), list(edit_rows)
    own, peer = best(trained, re.compile(r"^(?!peer)")), best(trained, re.compile(r"^peer"))
    if own:
        found["train_step"] = {"best": own["case"], "ms": own["ms"]}
        if "share_of_peak" in own:
            found["train_step"]["share_of_peak"] = own["share_of_peak"]
            found["train_step"]["goal_share_of_peak"] = GOALS["share_of_peak"]
        if peer:
            faster = {"times_faster": peer["ms"] / own["ms"], "goal_times_faster": GOALS["times_faster"]}
            found["train_step"].update(best_peer=peer["case"], best_peer_ms=peer["ms"], **faster)
    peer = best(edited, re.compile(r"^peer"))
    for way in ("current", "zero"):
        if own := best(edited, re.compile(rf"^(?!peer).*, {way}$")):
            found[f"edit_{way}"] = {"best": own["case"], "s": own["ms"] / 1e3, "goal_s": GOALS[f"edit_{way}_s"]}
            if peer:
                faster = {"times_faster": peer["ms"] / own["ms"]}
                found[f"edit_{way}"].update(best_peer=peer["case"], best_peer_s=peer["ms"] / 1e3, **faster)
    return found


def write_table(found: Mapping[str, Any]) -> str:
    """Write the results as a short table for a terminal."""
    size = "toy size (no information about full size)" if found.get("toy") else "full size"
    lines = [f"{found.get('machine', {}).get('name', 'no machine')}, commit {found['commit']}, {size}"]
    for name, piece in found["pieces"].items():
        lines.append(f"{name}: {piece['status']}, {piece.get('seconds', 0):.0f} s")
        if name == "parity":
            passed = sum(row["status"] == "done" for row in piece["rows"])
            lines.append(f"  {passed} of {len(piece['rows'])} tests passed")
        for row in piece["rows"]:
            if row["status"] != "done":
                lines.append(f"  {row['case']}: {row['status']} {row.get('error', '')}"[:200])
            elif name == "breakdown":
                shares = {key[:-3]: row[key] / row["total_ms"] for key in row if key.endswith("_ms")}
                shares.pop("total")
                spent = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items() if share >= 0.005)
                counts = ", ".join(f"{row[key]} {key}" for key in ("launches", "kernels", "host_syncs"))
                lines.append(f"  {row['case']}: {row['total_ms']:.1f} ms, {counts}: {spent}")
            elif name != "parity":
                lines.append(f"  {row['case']:<36}{_figures(row)}")
        if "error" in piece and not piece["rows"]:
            lines.append(f"  {piece['error']}"[:400])
    for name, figures in found["summary"].items():
        shown = (
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items()
        )
        lines.append(f"{name}: {', '.join(shown)}")
    return "\n".join(lines)


def _figures(row: Mapping[str, Any]) -> str:
    texts = {
        "ms": "{:9.1f} ms",
        "time_ratio": "{:5.2f}x",
        "share_of_peak": "{:6.1%} of peak",
        "peak_gib": "{:6.1f} GiB",
        "max_abs_diff": "  off by {:.1e}",
    }
    return "  ".join(text.format(row[key]) for key, text in texts.items() if key in row)


def describe_wheels() -> str:
    """Say how to collect the wheels that a machine without a network needs, in the versions of constraints.txt."""
    pins = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))

    def names(packages: Iterable[str]) -> str:
        return " ".join(f"{name}=={pins[name]}" if name in pins else name for name in packages)

    platforms = " ".join(f"--platform {tag}" for tag in ("manylinux_2_28_x86_64", "manylinux2014_x86_64"))
    return (
        "# Run this on a machine with a network, with the Python version of the GPU machine.\n"
        f"python -m pip download --no-deps --only-binary=:all: --python-version 3.12 {platforms} --dest WHEELS \\\n"
        f"  {names(ALWAYS_CARRIED)}\n"
        "# The same for each of these packages that the GPU machine lacks, with its dependencies:\n"
        f"#   {names(OFTEN_THERE)}\n"
        "# Then, on the GPU machine: WHEELS=WHEELS bash scripts/gpu_check.sh OUT"
    )


def check_packages() -> None:
    """Check that everything is there before anything starts.

    Raises:
        InputError: a package is absent.
    """
    modules = {"torch": "torch", "transformers": "transformers", **ALWAYS_CARRIED, **OFTEN_THERE}
    absent = [name for name, module in modules.items() if importlib.util.find_spec(module) is None]
    if absent:
        raise InputError(
            f"these packages are missing: {', '.join(absent)}. `bash scripts/gpu_check.sh --wheels` says how to "
            "collect them; with WHEELS=FOLDER before the command, they are installed for this run"
        )


def find_commit() -> str:
    """Name the commit of the code, by $COMMIT where git knows none."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return os.environ.get("COMMIT") or done.stdout.strip() or "unknown"


def main() -> None:
    parser = CommandParser(prog="scripts/gpu_check.sh", description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="folder for gpu_check.json and gpu_check.log")
    parser.add_argument(
        "pieces", nargs="*", metavar="PIECE", help=f"{', '.join(LIMITS_S)} (default: all), or PIECE:VARIANT,VARIANT"
    )
    parser.add_argument("--toy", action="store_true", help="run at toy size on $DEVICE (default: CPU)")
    parser.add_argument(
        "--limit", type=SECONDS.read, metavar="SECONDS", help="time limit of each piece, instead of its default"
    )
    parser.add_argument(
        "--wheels", action="store_true", help="print how to collect the packages for a machine without a network"
    )
    arguments = parser.parse_args()
    if arguments.wheels:
        print(describe_wheels())
        return
    if arguments.out is None:
        parser.error("OUT is needed")
    device = os.environ.get("DEVICE") or ("cpu" if arguments.toy else "cuda")
    if device not in DEVICES:
        raise InputError(f"DEVICE={device}: expected {' or '.join(DEVICES)}")
    pieces = [read_piece(text, arguments.limit) for text in arguments.pieces or LIMITS_S]
    check_packages()
    check_output_folder(arguments.out, "OUT")
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = {"device": device, "toy": arguments.toy or device == "cpu"}
    found = {"commit": find_commit(), **settings, "pieces": {}}
    results = Results(arguments.out / "gpu_check.json", found)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with (arguments.out / "gpu_check.log").open("w+", errors="replace") as log:
            for asked in pieces:
                print(f"{asked.name}: at most {asked.limit_s} s", flush=True)
                run_piece(asked, settings, results, log)
    finally:
        print(write_table(found), flush=True)
    if any(piece["status"] != "done" for piece in found["pieces"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    cli_main(main)
