"""Config -> objects. The only room that knows hydra and omegaconf."""

from mimicbrush.assembly.build import (
    build_evaluation,
    build_parts,
    evaluated_pairs,
    read_sources,
    source_keys,
)
from mimicbrush.assembly.config import (
    TrainConfig,
    check_known,
    register_schemas,
    run_identity,
    with_conventions_of_pipeline,
)
from mimicbrush.assembly.prerequisites import provide_weights
from mimicbrush.assembly.training_run import export_run, train

__all__ = [
    "TrainConfig",
    "build_evaluation",
    "build_parts",
    "check_known",
    "evaluated_pairs",
    "export_run",
    "provide_weights",
    "read_sources",
    "register_schemas",
    "run_identity",
    "source_keys",
    "train",
    "with_conventions_of_pipeline",
]
