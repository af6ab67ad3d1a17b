"""Config -> objects. The only room that knows hydra and omegaconf."""

from mimicbrush.assembly.build import (
    build_components,
    build_evaluation,
    find_evaluated_pairs,
    list_origin_keys,
    read_pair_sources,
)
from mimicbrush.assembly.config import (
    TrainConfig,
    apply_pipeline_conventions,
    check_option_names,
    register_schemas,
    run_identity,
)
from mimicbrush.assembly.prerequisites import provide_weights
from mimicbrush.assembly.training_run import export_run, train

__all__ = [
    "TrainConfig",
    "apply_pipeline_conventions",
    "build_components",
    "build_evaluation",
    "check_option_names",
    "export_run",
    "find_evaluated_pairs",
    "list_origin_keys",
    "provide_weights",
    "read_pair_sources",
    "register_schemas",
    "run_identity",
    "train",
]
