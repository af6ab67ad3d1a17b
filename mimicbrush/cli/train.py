"""Train: mimicbrush train +experiment=NAME data.root=MINED [+ablation=NAME] [GROUP=NAME] [OPTION=VALUE ...]

--cfg job prints every option and its value. options.py in mimicbrush/data, models, training and evaluation/heldout
explains each. -m sweeps over several values, such as '+ablation=glob(*)' or seed=0,1. --hydra-help explains the other
flags. docs/training.md has the commands for one GPU, eight, and clusters.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from mimicbrush import assembly
from mimicbrush.assembly import sweeps
from mimicbrush.assembly.command_line import (
    ADDED_GROUPS,
    CONFIG_GROUPS,
    list_training_options,
    resolve_config,
    run_with_hydra,
)
from mimicbrush.cli.project_files import CONFIGS
from mimicbrush.errors import cli_main


def main() -> None:
    """Train with the options of the command line, or show what there is to choose."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        show_help()
        return
    assembly.register_schemas()
    run_with_hydra(train_composed, list_training_options(CONFIGS))


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def train_composed(config: DictConfig) -> None:
    """Train one run, or one job of a sweep, with the config that Hydra composed."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        sweeps.train_job(config)
    else:
        cli_main(lambda: _train_once(config))


def _train_once(config: DictConfig) -> None:
    resolve_config(config)
    sys.exit(assembly.train(config, Path(config.run_dir)))


def show_help() -> None:
    """Print what there is to choose; Hydra's own help takes seconds for this many options."""
    print(__doc__)
    for group in CONFIG_GROUPS:
        names = ", ".join(sorted(path.stem for path in (CONFIGS / group).glob("*.yaml")))
        print(f"  {'+' if group in ADDED_GROUPS else ''}{group:18}  {names}")
