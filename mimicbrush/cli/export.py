"""Make a pipeline folder from a checkpoint of a training run.

mimicbrush export runs/NAME
mimicbrush export runs/NAME --half --output my_model

You can then edit with it: mimicbrush edit ... --model runs/NAME/exported. The
training run may still be in progress.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from mimicbrush.ranges import CommandParser


def main() -> None:
    """Make a pipeline folder from a checkpoint."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a training run")
    newest = "RUN/checkpoints/step-... (default: the newest intact checkpoint)"
    parser.add_argument("--checkpoint", default="latest", metavar="DIR", help=newest)
    parser.add_argument(
        "--raw", action="store_true", help="export the weights of the last step instead of the averaged ones (EMA)"
    )
    parser.add_argument("--half", action="store_true", help="export in half precision (float16), to halve the size")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="folder for the pipeline (default: RUN/exported)"
    )
    arguments = parser.parse_args()

    from mimicbrush.assembly import export_run

    output = arguments.output or arguments.run / "exported"
    checkpoint = export_run(arguments.run, arguments.checkpoint, output, average=not arguments.raw, half=arguments.half)
    print(f"{output} has the {'last' if arguments.raw else 'averaged'} weights of {checkpoint}. To edit with it:")
    print(f"  mimicbrush edit REF.jpg SRC.jpg MASK.png --model {shlex.quote(str(output))}")
