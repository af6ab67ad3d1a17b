"""Compare the speed of our code with a peer. Both run in turns in one process, and their results must be equal.

python scripts/speed.py NAME [--json FILE]

Ratios are the figure of the peer divided by ours: larger is better. FLOP counts do not depend on the machine (a
multiply-add counts as two). "full size" is SD-1.5 at 512 px, which is counted without running it.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path

from measurements.breakdown import breakdown_gpu
from measurements.editing import edit, edit_gpu, edit_launches, read_block
from measurements.encoded_views import encoded_views
from measurements.harness import Counted, Measurement, compare
from measurements.klein import klein
from measurements.memory import memory
from measurements.mining import mining
from measurements.mining_choice import mining_choice
from measurements.mining_cluster import mining_cluster
from measurements.samples import samples
from measurements.training import dropped_references, launches, noise
from measurements.training_step import encoders, optimizer, train_step
from measurements.training_variants import train_step_gpu

from mimicbrush.errors import cli_main
from mimicbrush.io.outputs import check_output_file
from mimicbrush.ranges import CommandParser, NumberRange, one_of

ROUNDS = NumberRange(at_least=1, at_most=10**6, whole=True)
MEASUREMENTS: Mapping[str, Measurement] = {
    "breakdown_gpu": breakdown_gpu,
    "dropped_references": dropped_references,
    "edit": edit,
    "edit_gpu": edit_gpu,
    "edit_launches": edit_launches,
    "encoded_views": encoded_views,
    "encoders": encoders,
    "klein": klein,
    "launches": launches,
    "memory": memory,
    "mining": mining,
    "mining_choice": mining_choice,
    "mining_cluster": mining_cluster,
    "noise": noise,
    "optimizer": optimizer,
    "read_block": read_block,
    "samples": samples,
    "train_step": train_step,
    "train_step_gpu": train_step_gpu,
}


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "name", **one_of(*sorted(MEASUREMENTS)), help="; ".join(f"{n}: {m.__doc__}" for n, m in MEASUREMENTS.items())
    )
    parser.add_argument(
        "--rounds", type=ROUNDS.read, help="number of runs of each side (default: depends on the measurement)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    arguments = parser.parse_args()
    if arguments.json:
        check_output_file(arguments.json, "--json")

    import torch

    cases = []
    for case in MEASUREMENTS[arguments.name]():
        if isinstance(case, Counted):
            cases.append({"case": case.case, **case.figures()})
        else:
            cases.append(compare(case, arguments.rounds or case.rounds))
        print(f"{arguments.name}, {case.case}")
        for name, value in list(cases[-1].items())[1:]:
            print(f"{name:>22}  {value:.4g}" if isinstance(value, float) else f"{name:>22}  {value}", flush=True)
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps({"name": arguments.name, "cases": cases, **machine}, indent=1))


if __name__ == "__main__":
    cli_main(main)
