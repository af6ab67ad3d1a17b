"""Train or fine-tune a model.

mimicbrush train +experiment=NAME data.root=MINED [GROUP=NAME] [OPTION=VALUE ...]

For example:
  mimicbrush train +experiment=smoke data.root=MINED       a toy model on a CPU
  mimicbrush train +experiment=fine_tune data.root=MINED   the small model
  mimicbrush train +experiment=default data.root=MINED     as in the paper

Common options:
  run_dir=DIR                folder of the run (default: runs/NAME)
  train.max_steps=N          number of training steps
  train.max_minutes=N        stop and save after this time
  train.resume=latest        continue from the newest checkpoint in run_dir
  train.batch_size=N         samples of one pass on one device
  train.total_batch_size=N   samples of one step
  train.learning_rate=X      learning rate
  eval=none                  no evaluation during training
  seed=N                     seed

docs/options.md explains all options; --cfg job prints them with their values.
-m runs a sweep over several values, such as seed=0,1 or '+ablation=glob(*)'.
--hydra-help explains the other flags. See docs/training.md for one GPU, several
GPUs, and clusters.

Groups and their choices (a plus is part of the name):
"""

from __future__ import annotations

import sys
import textwrap
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
    """Train with the options of the command line, or explain them."""
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
    """Print the help. Hydra's own help takes seconds for this many options."""
    print(__doc__.rstrip())
    for group in CONFIG_GROUPS:
        names = ", ".join(sorted(path.stem for path in (CONFIGS / group).glob("*.yaml")))
        name = f"{'+' if group in ADDED_GROUPS else ''}{group}"
        print(textwrap.fill(names, 78, initial_indent=f"  {name:19} ", subsequent_indent=" " * 22))
