"""Make a pipeline folder, to edit with, from a checkpoint of a training run. The run may still be going on.

mimicbrush export runs/NAME [--output DIR] [--half]
"""

from __future__ import annotations

import shlex
from pathlib import Path

from mimicbrush.ranges import CommandParser


def main() -> None:
    """Make a pipeline folder of a checkpoint."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a run")
    newest = "RUN/checkpoints/step-... (default: the newest that verifies)"
    parser.add_argument("--checkpoint", default="latest", metavar="DIR", help=newest)
    parser.add_argument("--raw", action="store_true", help="the weights of the last step, not their average (EMA)")
    parser.add_argument("--half", action="store_true", help="in half precision: half the size, to pass on")
    parser.add_argument("-o", "--output", type=Path, help="pipeline folder (default: RUN/exported)")
    arguments = parser.parse_args()

    from mimicbrush.assembly import export_run

    output = arguments.output or arguments.run / "exported"
    checkpoint = export_run(arguments.run, arguments.checkpoint, output, average=not arguments.raw, half=arguments.half)
    print(f"{output} holds the {'last' if arguments.raw else 'averaged'} weights of {checkpoint}. Edit with it:")
    print(f"  mimicbrush edit REF.jpg SRC.jpg MASK.png --model {shlex.quote(str(output))}")
