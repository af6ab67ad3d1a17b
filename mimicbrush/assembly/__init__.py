"""Assembly: from a configuration to a training run. Only this package imports hydra and omegaconf.

In reading order:

* `training_run`: a run in three steps: plan it, build it, run it; and the export of its checkpoints.
* `command_line`: what users type becomes what Hydra reads.
* `config`: schemas of all options, unknown names, the identity of a run.
* `prerequisites`: data, weights, packages and GPUs that a run needs, checked within seconds.
* `build`: networks, loader, evaluation and accelerator from options.
* `families`: each family of models as a method for the trainer, side by side.
* `encoding`: encodes fixed views once, and checks them before a run trains from them.
* `run_folder`: the mark of a complete run.
* `sweeps`: the jobs of ``train.py -m``.
* `sweep_table`: their results, beside the paper's.
"""

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
