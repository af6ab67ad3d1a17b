"""The losses of a hundred steps at toy size: python tests/golden/loss_curve.py writes them into loss_curve.json.

What a step computes must not change by accident; a commit that changes it on purpose writes this file again and says
why. On every x86-64 CPU the same kernels are asked for; what remains between an Intel Xeon and an AMD EPYC is rounding
of 1e-7, although a hash of what PyTorch computes was the same on both.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
FILE = HERE / "loss_curve.json"
STEPS = 100
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


def curve() -> dict[str, object]:
    """Train, and tell what was logged."""
    sys.path[:0] = [str(HERE.parent), str(HERE.parent / "training")]
    from toy_data import write_mined_folder
    from toy_run import metrics, train

    with tempfile.TemporaryDirectory() as folder:
        mined = write_mined_folder(Path(folder) / "pairs")
        options = ["train.log_every=1", f"train.max_steps={STEPS}", "train.checkpoint_every=1000", "data.num_workers=0",
                   "train.learning_rate=1e-3", "train.prediction_type=epsilon"]  # fmt: skip
        train(mined, Path(folder) / "run", *options)
        losses = [values["loss"] for values in metrics(Path(folder) / "run")]
    return {"losses": losses}


if __name__ == "__main__":
    if "--print" in sys.argv:
        print(json.dumps(curve()))
    elif any(os.environ.get(name) != value for name, value in KERNELS.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], with_kernels())  # they are read when a process starts
    else:
        FILE.write_text(json.dumps(curve(), indent=1) + "\n")
        print(f"wrote {FILE}")
