"""``configs/train.yaml`` as Hydra composes it, which takes 0.1 s: the files are put together once for each choice."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from mimicbrush import assembly

CONFIGS = Path(__file__).parents[2] / "configs"


@cache
def compose_anew(*overrides: str) -> DictConfig:
    """By Hydra alone; whoever changes the config makes a copy first."""
    assembly.register_schemas()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", list(overrides))


def compose_train(*overrides: str) -> DictConfig:
    """The same config: Hydra, too, chooses the files of all groups first, and then sets values, by the same code."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    keys = [each.get_key_element().lstrip("+~").split("@")[0] for each in parsed]
    chooses = ["/" in key or (CONFIGS / key).is_dir() for key in keys]
    files = [text for text, is_choice in zip(overrides, chooses, strict=True) if is_choice]
    config = copy.deepcopy(compose_anew(*files))
    values = [each for each, is_choice in zip(parsed, chooses, strict=True) if not is_choice]
    ConfigLoaderImpl._apply_overrides_to_config(values, config)
    return config
