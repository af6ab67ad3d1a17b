"""Train: python scripts/train.py +experiment=default data.root=MINED (see configs/train.yaml)."""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mimicbrush import assembly
from mimicbrush.errors import run_plainly

assembly.register_schemas()


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(config: DictConfig) -> None:
    run_plainly(lambda: assembly.train(config, Path(HydraConfig.get().runtime.output_dir)))


if __name__ == "__main__":
    main()
