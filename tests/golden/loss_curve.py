"""The losses of toy runs: python tests/golden/loss_curve.py NAME.json writes one of the files of `CURVES`.

What a step computes must not change by accident; a commit that changes it on purpose writes these files again and says
why. On every x86-64 CPU the same kernels are asked for; what remains between an Intel Xeon and an AMD EPYC is rounding
of 1e-7, although a hash of what PyTorch computes was the same on both.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Curve:
    """A run at toy size: its steps, and its options beside `OPTIONS`."""

    steps: int
    options: tuple[str, ...] = ()


#: By the file of its losses: the paper's training, and ours that teaches the reference attention where to look.
CURVES = {
    "loss_curve.json": Curve(100),
    "correspondence_curve.json": Curve(
        40,
        (
            "train.batch_size=4",  # of two samples it may be that none has a match
            "train.total_batch_size=4",
            "train.correspondence_weight=0.3",
            "train.correspondence_final=0.1",
            "train.unrelated_reference_ratio=0.2",
            "model.shared_start=true",
        ),
    ),
}
OPTIONS = ("train.log_every=1", "train.checkpoint_every=1000", "data.num_workers=0", "train.learning_rate=1e-3",
           "train.prediction_type=epsilon")  # fmt: skip
#: The oldest instructions that PyTorch, oneDNN, MKL and the C library can be told to keep to.
KERNELS = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2_Usable,-FMA_Usable,-AVX2,-FMA,-AVX512F",
}


def with_kernels() -> dict[str, str]:
    """The environment of a process that measures a curve."""
    return {**os.environ, **KERNELS}


def measure(name: str, *options: str) -> dict[str, list[float]]:
    """Train as one of `CURVES` says, with more options, and return what was logged."""
    sys.path.insert(0, str(HERE.parent / "helpers"))
    from toy_data import write_mined_folder
    from toy_run import metrics, train

    curve = CURVES[name]
    with tempfile.TemporaryDirectory() as folder:
        mined = write_mined_folder(Path(folder) / "pairs")
        train(mined, Path(folder) / "run", *OPTIONS, f"train.max_steps={curve.steps}", *curve.options, *options)
        logged = metrics(Path(folder) / "run")
    more = [key for key in ("loss_correspondence",) if any(key in values for values in logged)]
    # In a step whose samples have no matches, or no reference, there is nothing to tell.
    return {"losses": [values["loss"] for values in logged]} | {
        key: [values.get(key, -1.0) for values in logged] for key in more
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--print"]:
        print(json.dumps({name: measure(name, *sys.argv[2:]) for name in CURVES}))
    elif len(sys.argv) == 2 and sys.argv[1] in CURVES:
        if any(os.environ.get(name) != value for name, value in KERNELS.items()):
            os.execve(sys.executable, [sys.executable, *sys.argv], with_kernels())  # read when a process starts
        (HERE / sys.argv[1]).write_text(json.dumps(measure(sys.argv[1]), indent=1) + "\n")
        print(f"wrote {HERE / sys.argv[1]}")
    else:
        raise SystemExit(f"name one of {', '.join(CURVES)} to write")
