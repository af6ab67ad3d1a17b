from __future__ import annotations

import pytest

from mimicbrush.assembly.sweeps import subdir_for

PLAIN = "${run_name}-seed${seed}"


@pytest.mark.parametrize(
    ("overrides", "added"),
    [
        ([], ""),
        (["+experiment=smoke", "+ablation=glob(*)", "seed=0,1", "data.root=/a"], ""),
        (["+experiment=smoke,default"], ""),
        (["run_name=a,b"], ""),
        # A name that is given hides what the experiment and the ablation would have been called.
        (["+experiment=smoke", "+ablation=glob(*)", "run_name=mine"], "-ablation_${hydra:runtime.choices.ablation}"),
        (["+experiment=smoke,default", "+ablation=full"], "-experiment_${hydra:runtime.choices.experiment}"),
        (["+experiment=smoke,default", "run_name=a"], "-experiment_${hydra:runtime.choices.experiment}"),
        (["train.learning_rate=1e-4,1e-5"], "-train.learning_rate_${train.learning_rate}"),
        (["++train.max_steps=range(1,3)", "seed=1"], "-train.max_steps_${train.max_steps}"),
        (["data/augmentation=weak,strong"], "-data.augmentation_${hydra:runtime.choices.data/augmentation}"),
        (["model=toy,sd15", "train.unet=a,b"], "-model_${hydra:runtime.choices.model}-train.unet_${train.unet}"),
        (["~data", "data.mask.cells=[3,10]"], ""),
    ],
)
def test_a_folder_names_all_that_is_swept(overrides: list[str], added: str) -> None:
    assert subdir_for(overrides) == PLAIN + added
