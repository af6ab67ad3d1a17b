"""Train: python scripts/train.py +experiment=default data.root=MINED (see configs/train.yaml)."""

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from mimicbrush import assembly
from mimicbrush.assembly import sweeps
from mimicbrush.errors import run_plainly

assembly.register_schemas()


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(config: DictConfig) -> None:
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        sweeps.train_job(config)
    else:
        run_plainly(lambda: sys.exit(assembly.train(config, Path(config.run_dir))))


if __name__ == "__main__":
    main()
