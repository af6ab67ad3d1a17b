"""Mine training pairs from videos and photographs.

mimicbrush mine input=FOLDER output=FOLDER [OPTION=VALUE ...]

If it is interrupted, run the same command again to continue. See docs/data.md
for examples. ??? marks options that must be given.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig, OmegaConf

from mimicbrush.assembly.command_line import TextOption, list_plain_options, resolve_config, run_with_hydra
from mimicbrush.cli.project_files import CONFIGS, explain_options
from mimicbrush.errors import InputError, cli_main

if TYPE_CHECKING:
    from mimicbrush.mining.run import MiningResult

#: Options of `Resources`.
RESOURCES = ("engine", "workers", "timeout_s", "memory_gib", "ray_address")
#: Options that are paths and addresses. The others are numbers and words.
MINE_TEXTS = {
    "input": TextOption(),
    "output": TextOption(),
    "input_root": TextOption(null=True),
    "ray_address": TextOption(empty=True),
}
EXAMPLE = "mimicbrush mine input=videos output=pairs"


def main() -> None:
    """Mine with the options of the command line, or explain them."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{__doc__}\n{explain_options('mine.yaml')}")
        return
    run_with_hydra(mine_composed, list_plain_options(CONFIGS / "mine.yaml", MINE_TEXTS))


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="mine")
def mine_composed(config: DictConfig) -> None:
    """Mine with the config that Hydra composed."""
    cli_main(lambda: run(config))


def run(config: DictConfig) -> None:
    """Mine a folder, and print the result."""
    values = resolve_config(config)
    missing = sorted(str(key) for key in OmegaConf.missing_keys(config))
    if missing:
        raise InputError(f"please give {' and '.join(f'{key}=FOLDER' for key in missing)}, for example:\n  {EXAMPLE}")

    # Slow to import, and not needed for --help and --cfg.
    from mimicbrush.mining.executors import Resources
    from mimicbrush.mining.options import MiningOptions
    from mimicbrush.mining.run import ArrayTask, mine_folder

    inputs, output = (Path(values.pop(key)) for key in ("input", "output"))
    input_root, task, progress = (values.pop(key) for key in ("input_root", "task", "progress"))
    if not isinstance(task, dict):
        raise InputError(f"task={task}: expected two options, such as task.index=0 task.count=4")
    resources = Resources(**{key: values.pop(key) for key in RESOURCES})
    try:
        mined = mine_folder(
            inputs,
            output,
            MiningOptions(**values),
            resources=resources,
            task=ArrayTask(**task),
            input_root=None if input_root is None else Path(input_root),
            progress=progress,
        )
    except KeyboardInterrupt:
        print("stopped. Run the same command again to continue after the last finished shard", file=sys.stderr)
        sys.exit(130)
    print(report(mined, output))


_SIGNALS = {"hdr": "HDR", "interlaced": "interlaced"}


def report(mined: MiningResult, output: Path) -> str:
    """Return the closing message: counts that can be checked, and the next step."""
    summary = mined.summary
    if summary is None:
        done = f"{mined.shards_done} of {mined.shards} shards are done, {mined.shards_mined} of them by this task."
        return f"{done} The last task writes the summary. You can also run this command without task.* to write it."
    lines = list(mined.notes)
    if not mined.shards_mined:
        lines.append("nothing to do: all shards were already mined, and they are intact")
    lines += [
        f"{summary.inputs} inputs = {summary.accepted} accepted + {summary.rejected} rejected "
        f"+ {summary.quarantined} quarantined; {summary.pairs} pairs",
        *(f"  {reason}: {count}" for reason, count in summary.reasons.items()),
    ]
    for word, count in summary.signals.items():
        lines.append(f"{count} videos are {_SIGNALS[word]}: {word}={summary.options.get(word, 'keep')}")
    if summary.reasons.get("failed"):
        lines.append("failed means a bug in mimicbrush: please report it, with the column detail of the manifest")
    if summary.ignored:
        others = ", ".join(f"{count} x {suffix}" for suffix, count in summary.ignored.items())
        lines.append(f"files of other types, which were ignored: {others}")
    if summary.ssim_percentiles:
        spread = ", ".join(f"{name} {value:.2f}" for name, value in summary.ssim_percentiles.items())
        lines.append(f"SSIM of the video pairs: {spread}")
    if mined.warning:
        lines.append(f"warning: {mined.warning}")
    lines.append(f"wrote {output / 'report.html'}: look at the pairs there")
    if summary.pairs:
        lines.append(f"next: mimicbrush train +experiment=smoke {shlex.quote(f'data.root={output}')}")
    else:
        lines.append("there are no pairs to train on: the columns reason and detail of the manifest say why")
    return "\n".join(lines)
