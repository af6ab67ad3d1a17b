from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from composed import CONFIGS, compose_anew, compose_train
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from mimicbrush import assembly
from mimicbrush.assembly.config import apply_pipeline_conventions, run_identity
from mimicbrush.assembly.prerequisites import check_prerequisites, compose_training
from mimicbrush.cli.dev.ablations import TABLES
from mimicbrush.errors import InputError
from mimicbrush.evaluation.heldout.options import DuringTrainingOptions
from mimicbrush.models.options import Flux2KleinModel, PretrainedModel, ToyFlux2KleinModel, ToyModel
from mimicbrush.ops.color_jitter import JitterRanges
from mimicbrush.ops.geometry import GeometryRanges
from mimicbrush.training.options import TrainOptions

ROOT = CONFIGS.parent
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
ABLATIONS = sorted(path.stem for path in (CONFIGS / "ablation").glob("*.yaml"))


def composed(*overrides: str) -> assembly.TrainConfig:
    config = compose_train("data.root=somewhere", *overrides)
    options = OmegaConf.to_object(config)
    assert isinstance(options, assembly.TrainConfig)
    return options


def test_rows_of_our_options_change_what_they_name() -> None:
    recipe = composed("+experiment=small_options", "+ablation=ours/recipe")
    assert recipe.train.correspondence_weight == 0.3 and recipe.train.unrelated_reference_ratio == 0.1
    rows = TABLES["options"].rows
    assert sorted(rows) == sorted(path.stem for path in (CONFIGS / "ablation/ours").glob("*.yaml"))
    changes = {}
    for row in rows[1:]:
        options = composed("+experiment=small_options", f"+ablation=ours/{row}")
        assert options.run_name == row
        changes[row] = {
            f"{part}.{name}"
            for part in ("data", "train", "model")
            for name, value in vars(getattr(options, part)).items()
            if value != getattr(getattr(recipe, part), name)
        }
    assert changes == {
        "no_correspondence_loss": {"train.correspondence_weight"},
        "correspondence_weight_1": {"train.correspondence_weight"},
        "all_heads": {"train.correspondence_heads"},
        "few_matches": {"data.num_matches"},
        "no_unrelated_references": {"train.unrelated_reference_ratio"},
        "reference_unet_shared": {"model.reference_encoder"},
        "zero_snr": {"train.rescale_betas_zero_snr"},
        "high_noise_timesteps": {
            "train.timestep_sampling",
            "train.timestep_logit_mean",
            "train.timestep_logit_std",
        },
        "channel_weights": {"train.latent_channel_weights"},
        "identity_probability": {"data.geometry"},
    }


#: Ablations that choose what reads the reference beside a U-Net.
OF_U_NETS = ("reference_clip", "reference_dinov2")
#: The class of the model of an experiment; all others train a toy of the U-Nets.
MODELS = {"default": PretrainedModel, "klein": Flux2KleinModel, "klein_smoke": ToyFlux2KleinModel}


#: `make test` pairs these with every ablation: at least one for each class of model. `make slow` pairs the others.
PAIRED = ("default", "small_ablation", "klein", "klein_smoke")


@pytest.mark.parametrize(
    ("experiment", "ablation"),
    [
        pytest.param(experiment, ablation, marks=[] if ablation is None or experiment in PAIRED else pytest.mark.slow)
        for ablation in (None, *ABLATIONS)
        for experiment in EXPERIMENTS
    ],
)
def test_every_experiment_composes_with_every_ablation(experiment: str, ablation: str | None) -> None:
    # These go on from the weights of a pipeline, which says the size.
    start = ["model=small"] if experiment in ("fine_tune", "distill", "small_distill") else []
    chosen = [f"+experiment={experiment}", *([f"+ablation={ablation}"] if ablation else []), *start]
    if experiment.startswith("klein") and ablation in OF_U_NETS:
        with pytest.raises(InputError, match="reference_encoder"):
            compose_training(["data.root=somewhere", *chosen], CONFIGS)
        return
    options = composed(*chosen)
    assert options.run_name == (ablation or experiment)
    assert isinstance(options.model, MODELS.get(experiment, ToyModel))


@pytest.mark.parametrize(
    "overrides",
    [
        ["+experiment=small_ablation", "+ablation=weak_augmentation", "seed=3", "model.attention_heads=2"],
        ["model=pipeline", "data/augmentation=weak", "run_dir='a b'", "eval=heldout", "eval.every_steps=100", "seed=4"],
        ["seed=5", "+data.sources={a:{root:x,weight:2}}", "+experiment=default", "seed=6"],
    ],
)
def test_the_tests_config_is_the_one_that_hydra_composes(overrides: list[str]) -> None:
    assert OmegaConf.to_yaml(compose_train(*overrides)) == OmegaConf.to_yaml(compose_anew(*overrides))


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


def test_evaluation_while_training_is_on_but_for_the_smoke_run() -> None:
    assert composed("+experiment=default").eval == DuringTrainingOptions()
    assert composed("+experiment=smoke").eval == DuringTrainingOptions(every_steps=0)
    assert composed("+experiment=smoke", "eval=heldout", "eval.every_steps=100").eval.every_steps == 100


def test_an_ablation_changes_only_what_it_names() -> None:
    plain, weak = composed("+experiment=smoke"), composed("+experiment=smoke", "+ablation=weak_augmentation")
    assert weak.data.geometry.projective_intensity == 0 and weak.data.jitter.hue_ratio == 0
    assert weak.data.geometry.rotation_deg == plain.data.geometry.rotation_deg
    assert weak.train == plain.train and weak.model == plain.model


def test_strong_is_pythons_default_and_weak_lacks_what_the_paper_names() -> None:
    plain, weak = composed(), composed("data/augmentation=weak")
    assert plain.data.geometry == GeometryRanges(**{**vars(GeometryRanges()), "scale": [0.8, 1.25]})
    assert plain.data.jitter == JitterRanges()
    assert weak.data.jitter == JitterRanges(0, 0, 0, 0)
    assert weak.data.geometry == dataclasses.replace(plain.data.geometry, scale=[1.0, 1.0], projective_intensity=0)
    ablation = composed("+experiment=default", "+ablation=weak_augmentation")
    assert ablation.data == dataclasses.replace(weak.data, root="somewhere")


def test_small_models_have_milder_views_and_the_ablation_still_takes_them_away() -> None:
    full, weak = (composed("+experiment=small_ablation", f"+ablation={row}") for row in ("full", "weak_augmentation"))
    assert 0 < full.data.geometry.rotation_deg < composed().data.geometry.rotation_deg
    assert 0 < full.data.jitter.brightness < JitterRanges().brightness
    assert weak.data.jitter == JitterRanges(0, 0, 0, 0) and weak.data.geometry.projective_intensity == 0


@pytest.mark.parametrize(
    ("ablation", "changed"),
    [
        ("grid_025", {"strategy": "random_grid", "probability": 0.25}),
        ("grid_050", {"strategy": "random_grid", "probability": 0.50}),
        ("grid_075", {"strategy": "random_grid", "probability": 0.75}),
        ("single_box", {"strategy": "box", "box_area": 0.5}),
        ("orb_grid", {"strategy": "orb_grid"}),
    ],
)
def test_mask_ablations_change_the_mask_alone(ablation: str, changed: dict[str, object]) -> None:
    plain, other = composed("+experiment=default"), composed("+experiment=default", f"+ablation={ablation}")
    expected = dataclasses.replace(plain.data, mask=dataclasses.replace(plain.data.mask, **changed))
    assert other.data == expected and other.train == plain.train and other.model == plain.model


def test_image_data_only_takes_no_videos() -> None:
    assert composed("+experiment=default", "+ablation=image_data_only").data.video_ratio == 0


@pytest.mark.parametrize(
    "override",
    [
        "train.max_step=3",
        "train.max_steps=many",
        "model.unet=x",
        "nothing=1",
        "data/augmentation=medium",
        "+data.sources={a:{rot:x}}",
        "+ablation=nothing",
    ],
)
def test_misspelt_keys_and_wrong_types_are_errors(override: str) -> None:
    with pytest.raises(Exception, match=r"Could not override|not in|Error merging override|Could not find") as caught:
        OmegaConf.to_object(compose_anew("data.root=somewhere", "+experiment=smoke", override))
    assert isinstance(caught.value, ConfigCompositionException) or "Could not find" in str(caught.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("train.mixed_precision=fp8", "train.mixed_precision=fp8: expected one of no, fp16, bf16"),
        ("train.max_steps=0", r"train\.max_steps=0: expected a whole number from 1 to 1000000000"),
        ("train.keep_checkpoints=1", "of at least 2"),
        ("data.mask.strategy=grid", "expected one of sift_grid, random_grid, box, orb_grid, or module:function"),
        ("data.augment_on=gpu", "data.augment_on=gpu: expected one of cpu, device. Did you mean 'cpu'"),
        ("data.video_ratio=70", r"data.video_ratio=70\.0: expected a number from 0 to 1"),
        ("+data.sources={a:{root:x,weight:-1}}", "both given"),
        ("model.reference_blend=1.5", "expected a number from 0 to 1"),
        ("model.reference_timestep=never", "model.reference_timestep=never: expected one of current, zero"),
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
    with pytest.raises(InputError, match=r"64 cannot be divided evenly among 3 processes; .*total_batch_size=63"):
        TrainOptions().split_batch(3)


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_named_with_the_command(mined: Path, tracker: str) -> None:
    config = compose_train("+experiment=smoke", f"data.root={mined}", f"train.tracker={tracker}")
    with pytest.raises(
        InputError, match=rf"train\.tracker={tracker} needs the package {tracker}\. .*pip install {tracker}\)"
    ):
        check_prerequisites(config)


def test_options_forced_in_are_errors_too() -> None:
    config = compose_anew("data.root=somewhere", "+experiment=smoke", "+train.max_step=20", "+sede=1")
    with pytest.raises(InputError, match=r"(?s)train\.max_step\. Did.*max_steps'\?.*sede\. Did you mean 'seed'\?"):
        assembly.check_option_names(config)


@pytest.mark.parametrize(
    ("choices", "name"),
    [
        (
            ["model=shipped", "train.prediction_type=v_prediction", "train.rescale_betas_zero_snr=true"],
            "model.path",
        ),
        (["+experiment=small_options"], "model.encoders"),
    ],
    ids=["path", "encoders"],
)
def test_a_run_stays_the_same_where_its_starting_weights_have_another_name(choices: list[str], name: str) -> None:
    def identity(*more: str) -> dict[str, Any]:
        config, _ = apply_pipeline_conventions(compose_train("data.root=somewhere", "run_dir=run", *choices, *more))
        return run_identity(config, [])

    named = identity()
    # Before the small model had a name, configs gave its folder.
    assert name not in named and identity(f"{name}={ROOT / 'mimicbrush/assets/proof'}") == named
    assert identity("seed=5") != named
