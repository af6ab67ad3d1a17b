from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from mimicbrush import assembly
from mimicbrush.errors import InputError
from mimicbrush.models.options import PretrainedModel, ToyModel
from mimicbrush.training.options import TrainOptions

CONFIGS = Path(__file__).parents[2] / "configs"
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
ABLATIONS = sorted(path.stem for path in (CONFIGS / "ablation").glob("*.yaml"))


def composed(*overrides: str) -> assembly.TrainConfig:
    assembly.register_schemas()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", ["data.root=somewhere", *overrides])
    options = OmegaConf.to_object(config)
    assert isinstance(options, assembly.TrainConfig)
    return options


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("ablation", [None, *ABLATIONS])
def test_every_experiment_composes_with_every_ablation(experiment: str, ablation: str | None) -> None:
    options = composed(f"+experiment={experiment}", *([f"+ablation={ablation}"] if ablation else []))
    assert options.run_name == (ablation or experiment)
    assert isinstance(options.model, ToyModel if experiment == "smoke" else PretrainedModel)


def test_default_is_the_papers_setting() -> None:
    options = composed("+experiment=default")
    assert options.model.size_px == 512
    assert options.train.learning_rate == 1e-5
    assert (options.train.batch_size, options.train.total_batch_size) == (8, 64)
    assert (options.train.reference_drop_ratio, options.train.depth_drop_ratio) == (0.10, 0.50)
    assert options.data.video_ratio == 0.7
    assert (list(options.data.mask.cells), options.data.mask.matched, options.data.mask.unmatched) == (
        [3, 10],
        0.75,
        0.5,
    )


def test_an_ablation_changes_only_what_it_names() -> None:
    plain, weak = composed("+experiment=smoke"), composed("+experiment=smoke", "+ablation=weak_augmentation")
    assert weak.data.geometry.projective_intensity == 0 and weak.data.jitter.hue_ratio == 0
    assert weak.data.geometry.rotation_deg == plain.data.geometry.rotation_deg
    assert weak.train == plain.train and weak.model == plain.model


@pytest.mark.parametrize(
    "override", ["train.max_step=3", "train.max_steps=many", "model.unet=x", "nothing=1", "+ablation=nothing"]
)
def test_misspelt_keys_and_wrong_types_are_errors(override: str) -> None:
    with pytest.raises(Exception, match=r"Could not override|not in|Error merging override|Could not find") as caught:
        composed("+experiment=smoke", override)
    assert isinstance(caught.value, ConfigCompositionException) or "Could not find" in str(caught.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("train.mixed_precision=fp8", "train.mixed_precision must be one of"),
        ("train.max_steps=0", "train.max_steps must be 1 or more, got 0"),
        ("train.keep_checkpoints=1", "2 or more"),
        ("model.reference_blend=1.5", r"in 0\.\.1"),
        ("model.reference_timestep=never", "model.reference_timestep must be one of"),
    ],
)
def test_values_that_make_no_sense_are_errors(option: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        composed("+experiment=smoke", option)


def test_total_batch_must_divide() -> None:
    assert TrainOptions().split_batch(8) == (8, 1)
    assert TrainOptions().split_batch(1) == (8, 8)
    assert TrainOptions(batch_size=8, total_batch_size=8).split_batch(2) == (4, 1)
    assert TrainOptions(batch_size=5, total_batch_size=12).split_batch(1) == (4, 3)
    with pytest.raises(InputError, match=r"64 cannot be shared evenly by 3 processes; .*total_batch_size=63"):
        TrainOptions().split_batch(3)


def test_options_forced_in_are_errors_too() -> None:
    assembly.register_schemas()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", ["data.root=somewhere", "+experiment=smoke", "+train.max_step=20", "+sede=1"])
    with pytest.raises(InputError, match=r"(?s)train\.max_step \(did.*max_steps\?\).*sede \(did you mean seed\?\)"):
        assembly.check_known(config)
