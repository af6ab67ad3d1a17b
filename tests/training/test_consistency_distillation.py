"""Distillation to few steps: its loss against diffusers' schedulers and our pipeline, and whole runs of it."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composed import compose_train
from diffusers import DDIMScheduler, LCMScheduler
from safetensors.torch import load_file
from toy_data import photograph
from toy_run import SHORTEST, everything, forget_accelerate, metrics, train, train_with, weights

from mimicbrush import assembly
from mimicbrush.cli import edit as cli_edit
from mimicbrush.errors import InputError
from mimicbrush.models.components import Components, toy_components
from mimicbrush.models.options import ToyModel
from mimicbrush.models.reference_attention import join_references
from mimicbrush.models.schedule import few_step_scheduler, noise_scheduler
from mimicbrush.models.unets import find_reference_network, make_reference_input
from mimicbrush.pipelines import MimicBrushPipeline
from mimicbrush.pipelines.checksums import CHECKSUMS_FILE
from mimicbrush.pipelines.open_pipeline import load_pipeline, seeded_generator
from mimicbrush.training.checkpoints import checkpoint_path
from mimicbrush.training.lora import freeze_and_adapt
from mimicbrush.training.method import EncodedBatch
from mimicbrush.training.methods.consistency_distillation import ConsistencyDistillation, Level
from mimicbrush.training.noise import NoiseSample
from mimicbrush.training.objective import Conditions, FrozenEncoders, MimicBrushModel
from mimicbrush.training.options import TrainOptions
from mimicbrush.types import ReferenceStates

ROOT = Path(__file__).parents[2]
FROZEN: dict[str, Any] = {
    "distill": "lcm",
    "reference_unet": "frozen",
    "image_projector": "frozen",
    "depth_projector": "frozen",
    "default_guidance_scale": 1.0,
}


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    forget_accelerate()


def components(**choices: Any) -> tuple[Components, ToyModel]:
    options = ToyModel(size_px=16, block_out_channels=(16, 32), context_width=16, **choices)
    parts = toy_components(options, seed=1)
    torch.nn.init.normal_(parts.unet.conv_in.weight[:, 4:], std=0.1)
    return parts, options


def method_of(parts: Components, model_options: ToyModel, options: TrainOptions) -> ConsistencyDistillation:
    model = MimicBrushModel(
        parts.unet, parts.reference_unet, parts.image_projector, parts.depth_projector,
        size_px=model_options.size_px, reference_timestep=model_options.reference_timestep,
        reference_blend=model_options.reference_blend,
    )  # fmt: skip
    freeze_and_adapt(dict(model.named_children()), options)
    encoders = FrozenEncoders(parts, model_options)
    scheduler = noise_scheduler(options.prediction_type)
    exporter: Any = None  # nothing is exported
    return ConsistencyDistillation(model, encoders, scheduler, exporter, options)


def encoded_batch(rows: int = 5, side: int = 8, references: int = 1) -> EncodedBatch:
    generator = torch.Generator().manual_seed(1)
    latents = [torch.randn(count * rows, 4, side, side, generator=generator) for count in (1, 1, references)]
    mask = (torch.rand(rows, 1, side, side, generator=generator) > 0.5).float()
    tokens = torch.randn(references * rows, 17, 64, generator=generator)
    depth = torch.rand(rows, 1, 28, 28, generator=generator)
    noise_sample = NoiseSample.for_keys(
        torch.arange(rows) + 3, (4, side, side), num_timesteps=1000, reference_drop_ratio=0.3, depth_drop_ratio=0.5
    )
    noise_sample.timestep[0] = 4  # its next place is the image itself
    assert 0 < noise_sample.keep_reference.sum() < rows
    return EncodedBatch(Conditions(*latents, mask, tokens, depth), noise_sample, None)


def trailing_ddim(prediction_type: str, rescaled: bool = False) -> DDIMScheduler:
    """That of diffusers, at the timesteps which LCM takes of 50."""
    config = noise_scheduler(prediction_type, rescale_betas_zero_snr=rescaled).config
    ddim = DDIMScheduler.from_config({**config, "steps_offset": 0, "timestep_spacing": "trailing"})
    ddim.set_timesteps(50)
    return ddim


@pytest.mark.parametrize(
    ("prediction_type", "rescaled"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
def test_steps_and_images_are_those_of_the_schedulers_of_diffusers(prediction_type: str, rescaled: bool) -> None:
    schedule = noise_scheduler(prediction_type, rescale_betas_zero_snr=rescaled)
    few = few_step_scheduler(prediction_type, rescale_betas_zero_snr=rescaled)
    ddim = trailing_ddim(prediction_type, rescaled)
    assert bool(schedule.alphas_cumprod[-1] == 0) == rescaled
    few.set_timesteps(50)
    assert torch.equal(few.timesteps, ddim.timesteps)
    noisy, output = torch.randn(2, 50, 4, 2, 2, generator=torch.Generator().manual_seed(0)).unbind(0)
    predicts_noise = prediction_type == "epsilon"
    at_start, at_end = (
        Level.at(timestep, schedule.alphas_cumprod, predicts_noise)
        for timestep in (few.timesteps, (few.timesteps - 20).clamp(min=0))
    )
    stepped = at_end.mix(at_start.image(noisy, output), at_start.noise(noisy, output))
    images = at_start.consistent_image(noisy, output)
    for row, timestep in enumerate(few.timesteps):
        few.set_timesteps(50)
        one = slice(row, row + 1)
        expected = ddim.step(output[one], timestep, noisy[one]).prev_sample
        assert torch.allclose(stepped[one], expected, rtol=1e-4, atol=1e-4)
        expected = few.step(output[one], timestep, noisy[one]).denoised
        assert torch.allclose(images[one], expected, rtol=1e-4, atol=1e-4)
    clean = Level.at(torch.zeros(50, dtype=torch.int64), schedule.alphas_cumprod, predicts_noise)
    assert torch.equal(clean.consistent_image(noisy, output), noisy)


@pytest.mark.parametrize(
    ("choices", "prediction_type", "references"),
    [
        ({"reference_timestep": "current", "reference_blend": 0.5}, "epsilon", 1),
        ({"reference_timestep": "zero", "reference_sharing": "keys_values"}, "v_prediction", 1),
        ({"reference_encoder": "clip"}, "v_prediction", 1),
        pytest.param({"reference_encoder": "shared"}, "v_prediction", 1, marks=pytest.mark.slow),
        pytest.param({"reference_timestep": "current"}, "v_prediction", 2, marks=pytest.mark.slow),
        pytest.param({"reference_encoder": "shared"}, "epsilon", 2, marks=pytest.mark.slow),
        pytest.param({"reference_encoder": "clip"}, "epsilon", 2, marks=pytest.mark.slow),
    ],
    ids=["current", "zero", "clip", "shared", "two_references", "shared_two_references", "clip_two_references"],
)
def test_the_loss_is_what_a_pipeline_and_schedulers_make_of_its_formula(
    choices: dict[str, Any], prediction_type: str, references: int
) -> None:
    parts, model_options = components(**choices)
    options = TrainOptions(**FROZEN, prediction_type=prediction_type, distill_guidance=(2.0, 4.0))
    method = method_of(parts, model_options, options)
    batch = encoded_batch(references=references)
    if model_options.reference_encoder == "clip":  # patches without the token of the class
        batch.conditions.__dict__["image_tokens"] = batch.conditions.image_tokens[:, 1:]
    conditions, sampled = batch.conditions, batch.noise_sample
    pipeline = MimicBrushPipeline(**copy.deepcopy(vars(parts)), scheduler=noise_scheduler(prediction_type),
                                  reference_blend=model_options.reference_blend)  # fmt: skip
    # Teacher, target and student differ, as they do in the middle of a run.
    generator = torch.Generator().manual_seed(7)
    trained = method.trained_parameters()
    average = {
        name: each.detach() + 0.02 * torch.randn(each.shape, generator=generator) for name, each in trained.items()
    }
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    loss = method.loss(method.model, batch, 0, average)

    target_unet = copy.deepcopy(parts.unet)
    target_unet.load_state_dict({name.removeprefix("unet."): each for name, each in average.items()})
    few = few_step_scheduler(prediction_type)
    few.set_timesteps(50)
    ddim = trailing_ddim(prediction_type)
    depth = parts.depth_projector(conditions.depth_map, 16)
    cond_latents = torch.cat([conditions.latent_mask, conditions.masked_source_latents, depth], dim=1)
    errors, chosen = [], []
    for row in range(len(depth)):
        one = slice(row, row + 1)
        timestep = few.timesteps[49 - int(sampled.timestep[row]) // 20]
        is_kept = bool(sampled.keep_reference[row])
        of_row = slice(references * row, references * (row + 1))
        context = parts.image_projector(conditions.image_tokens[of_row])

        def predict(unet: Any, noisy: Any, at: torch.Tensor, guidance: float | None) -> torch.Tensor:
            states = ReferenceStates()
            # A shared U-Net reads with the weights that it paints with.
            reader = find_reference_network(unet, parts.reference_unet)
            if reader is not None and is_kept:  # noqa: B023
                at_reference = torch.zeros(1) if model_options.reference_timestep == "zero" else at[None]
                reader(
                    make_reference_input(reader, conditions.reference_latents[of_row]), at_reference, context,  # noqa: B023
                    cross_attention_kwargs={"reference_states": states.for_writing()},
                )  # fmt: skip
                states = join_references(states, 1)
            pipeline.unet, times = unet, 1 if guidance is None else 2
            no_reference = [] if guidance is None else [pipeline.no_reference_context().repeat(1, references, 1)]
            both = torch.cat([*no_reference, context.flatten(0, 1)[None]])  # noqa: B023
            return pipeline.predict_noise(noisy, cond_latents[one].repeat(times, 1, 1, 1), at, both, states, guidance)  # noqa: B023

        with torch.no_grad():
            noisy = few.add_noise(conditions.source_latents[one], sampled.noise[one], timestep[None])
            guidance = 2.0 + 2.0 * float(sampled.chance[row])
            teacher_unet = copy.deepcopy(parts.unet)
            teacher_unet.load_state_dict(
                {name.removeprefix("unet."): each for name, each in method.teacher_weights.items()}
            )
            guided = predict(teacher_unet, noisy, timestep, guidance)
            nearer = ddim.step(guided, timestep, noisy).prev_sample
            target = nearer
            if timestep > 20:
                few.set_timesteps(50)
                end = timestep - 20
                target = few.step(predict(target_unet, nearer, end, None), end, nearer).denoised
            few.set_timesteps(50)
            image = few.step(predict(parts.unet, noisy, timestep, None), timestep, noisy).denoised
        errors.append(image - target)
        chosen.append(int(timestep))
    assert chosen[0] == 19 and len(set(chosen)) > 3
    error = torch.cat(errors)
    expected = ((error.square() + 1e-6).sqrt() - 1e-3).mean()
    assert float(expected) > 1e-3 and torch.allclose(loss.total, expected, rtol=2e-3)
    inside, cells_inside, outside, cells_outside = loss.parts
    assert torch.allclose((inside + outside) / (cells_inside + cells_outside), error.square().mean(), rtol=2e-3)


@pytest.mark.parametrize("unet", ["trained", "lora"])
def test_the_student_alone_learns_and_the_teacher_stays(unet: str) -> None:
    parts, model_options = components()
    method = method_of(parts, model_options, TrainOptions(**FROZEN, unet=unet, lora_rank=2))
    batch = encoded_batch()
    noisy, timestep = batch.noise_sample.noise, batch.noise_sample.timestep

    def ask_teacher() -> torch.Tensor:
        with torch.no_grad():
            states = method._run_reference_network_at(batch.conditions, timestep, batch.noise_sample.keep_reference)
            return method._predict_with_guidance(noisy, timestep, batch, states)

    before = ask_teacher()
    method.loss(method.model, batch, 0, {}).total.backward()
    names = {name for name, each in method.model.named_parameters() if each.grad is not None}
    assert names == set(method.trained_parameters()) and all(name.startswith("unet.") for name in names)
    with torch.no_grad():
        for parameter in method.trained_parameters().values():
            parameter.add_(torch.randn_like(parameter))
    assert torch.equal(ask_teacher(), before)
    # Without an average the student itself is the target, and its weights get no gradient that way.
    own = {name: each.detach().clone() for name, each in method.trained_parameters().items()}
    assert torch.equal(*(method.loss(method.model, batch, 0, average).total for average in ({}, own)))


@pytest.mark.slow
def test_one_step_comes_closer_to_many() -> None:
    parts, model_options = components()
    options = TrainOptions(**FROZEN, prediction_type="v_prediction", distill_guidance=(2.0, 2.0), distill_ddim_steps=4,
                           default_num_inference_steps=1)  # fmt: skip
    method = method_of(parts, model_options, options)
    batch = encoded_batch(rows=8)
    conditions, sampled = batch.conditions, batch.noise_sample
    levels = method.noise_scheduler.alphas_cumprod

    def latents_of_teacher(noisy: torch.Tensor) -> torch.Tensor:
        for start in (999, 749, 499, 249):
            timestep = torch.full((8,), start)
            states = method._run_reference_network_at(conditions, timestep, sampled.keep_reference)
            output = method._predict_with_guidance(noisy, timestep, batch, states)
            at_start, at_end = (Level.at(each, levels, False) for each in (timestep, (timestep - 250).clamp(min=0)))
            noisy = at_end.mix(at_start.image(noisy, output), at_start.noise(noisy, output))
        return noisy

    with torch.no_grad():
        start = sampled.noise.clone()
        expected = latents_of_teacher(start)

    def distance() -> float:
        with torch.no_grad():
            timestep = torch.full((8,), 999)
            output = method.model(start, timestep, conditions, sampled.keep_reference).sample
            image = Level.at(timestep, levels, False).consistent_image(start, output)
            return float((image - expected).square().mean())

    before = distance()
    adam = torch.optim.Adam(method.trained_parameters().values(), 1e-3)
    for number in range(80):
        sampled.timestep.copy_((torch.arange(8) + number) % 4 * 250 + 100)
        sampled.noise.copy_(torch.randn(sampled.noise.shape, generator=torch.Generator().manual_seed(number)))
        adam.zero_grad()
        method.loss(method.model, batch, number, {}).total.backward()
        adam.step()
    assert distance() < 0.6 * before


# --- Whole runs -----------------------------------------------------------------------------------------------------

DISTILL = [
    "train.distill=lcm",
    "train.reference_unet=frozen",
    "train.image_projector=frozen",
    "train.depth_projector=frozen",
    "train.default_guidance_scale=1",
    "train.default_num_inference_steps=4",
    "train.prediction_type=epsilon",
    "train.ema_decay=0.9",
    "train.log_every=1",
]


@pytest.fixture(scope="module")
def teacher(mined: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("teacher") / "run"
    train(mined, run_dir, "train.max_steps=1", "train.prediction_type=epsilon")
    forget_accelerate()
    return run_dir / "pipeline"


def distill(mined: Path, run_dir: Path, teacher: Path, *more: str) -> None:
    train_with(mined, run_dir, *SHORTEST, "model=pipeline", f"model.path={teacher}", *DISTILL, *more)


ADAPTERS = ["train.unet=lora", "train.lora_rank=2", "train.mixed_precision=bf16", "train.low_precision_norms=true"]


@pytest.mark.parametrize(
    "more", [[], pytest.param(ADAPTERS, marks=pytest.mark.slow)], ids=["whole", "adapters in bf16"]
)
def test_a_run_resumes_to_the_same_bits_and_exports_a_model_of_few_steps(
    mined: Path, tmp_path: Path, teacher: Path, more: list[str]
) -> None:
    distill(mined, tmp_path / "straight", teacher, "train.max_steps=3", *more)
    for stop in (2, 3):
        resume = ["train.resume=latest", f"train.max_steps={stop}", "train.activation_checkpointing=true"]
        distill(mined, tmp_path / "resumed", teacher, *resume, *more)
    one, other = (everything(checkpoint_path(tmp_path / run / "checkpoints", 3)) for run in ("straight", "resumed"))
    assert one.keys() == other.keys() and [name for name in one if not torch.equal(one[name], other[name])] == []
    losses = [[line["loss"] for line in metrics(tmp_path / run)] for run in ("straight", "resumed")]
    assert losses[0] == losses[1] and len(losses[0]) == 3

    before, after = weights(teacher.parent), weights(tmp_path / "straight")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"unet"}
    pipeline = load_pipeline(tmp_path / "straight" / "pipeline")
    assert type(pipeline.scheduler) is LCMScheduler and pipeline.scheduler.config.prediction_type == "epsilon"
    assert (pipeline.config.default_num_inference_steps, pipeline.config.default_guidance_scale) == (4, 1)
    exported = assembly.export_run(tmp_path / "straight", "latest", tmp_path / "again")
    assert exported == checkpoint_path(tmp_path / "straight" / "checkpoints", 3)
    again = load_file(tmp_path / "again" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(again[name], after[f"unet.{name}"]) for name in again)


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(
    mined: Path, tmp_path: Path, teacher: Path, script_environment: Callable[[], dict[str, str]]
) -> None:
    options = ["train.max_steps=5", "train.total_batch_size=4", "train.batch_size=4", "train.learning_rate=1e-4",
               "train.distill_guidance=[2,4]"]  # fmt: skip
    for name, launcher in (("one", []), ("two", ["-m", "torch.distributed.run", "--nproc_per_node", "2"])):
        own = [f"data.root={mined}", f"run_dir={tmp_path / name}", "model=pipeline", f"model.path={teacher}"]
        command = [sys.executable, *launcher, "scripts/train.py", *SHORTEST, *own, *DISTILL, *options]
        subprocess.run(command, cwd=ROOT, env=script_environment(), check=True)
    one, two = (torch.tensor([line["loss"] for line in metrics(tmp_path / name)]) for name in ("one", "two"))
    assert len(one) == 5 and torch.allclose(one, two, rtol=1e-4)


def test_a_pipeline_of_few_steps_edits_in_its_default_and_each_seed_by_itself(
    mined: Path, tmp_path: Path, teacher: Path
) -> None:
    distill(mined, tmp_path / "run", teacher, "train.max_steps=1")
    pipeline = load_pipeline(tmp_path / "run" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    source, mask = photograph("coffee.png"), np.zeros((400, 600), bool)
    mask[100:300, 200:400] = True
    seen: list[int] = []
    pipeline.reference_unet.register_forward_hook(lambda *_: seen.append(1))

    def edit(*seeds: int, **options: Any) -> np.ndarray:
        generators = [seeded_generator(seed) for seed in seeds]
        result = pipeline(source, mask, photograph("chelsea.png"), num_images_per_prompt=len(seeds),
                          generator=generators, output_type="np", **options)  # fmt: skip
        return np.asarray(result.images)

    calls: list[int] = []
    pipeline.unet.register_forward_hook(lambda module, given, result: calls.append(len(given[0])))
    together = edit(3, 4)
    assert calls == [2, 2, 2, 2] and seen  # four steps of two rows, without guidance
    alone = edit(4)
    assert np.abs(together[1] - alone[0]).max() < 1e-5
    assert np.isfinite(edit(3, num_inference_steps=1)).all()
    with pytest.raises(InputError, match="num_inference_steps=51: this model was distilled for at most 50"):
        edit(3, num_inference_steps=51)
    config = tmp_path / "run" / "pipeline" / "scheduler" / "scheduler_config.json"
    original = config.read_text()
    (config.parents[1] / CHECKSUMS_FILE).unlink()  # older folders have none
    for steps in (None, 0, 2.5, "x", 1001, [1]):
        config.write_text(json.dumps({**json.loads(original), "original_inference_steps": steps}))
        with pytest.raises(InputError, match=r"original_inference_steps: expected a whole number from 1 to 1000"):
            load_pipeline(config.parents[1])
    config.write_text(original)
    with pytest.raises(InputError, match="was distilled to a few steps, and more training would undo that"):
        distill(mined, tmp_path / "again", tmp_path / "run" / "pipeline")
    arguments = ["r.png", "s.png", "m.png", "--model", str(tmp_path / "run" / "pipeline"), "--steps", "51"]
    with pytest.raises(InputError, match=r"--steps 51: this model was distilled for at most 50 steps"):
        _ = cli_edit.prepare_editor(cli_edit.parse_arguments(arguments)).pipeline


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"reference_unet": "trained"}, r"needs train\.reference_unet=frozen"),
        ({"image_projector": "trained"}, r"needs train\.image_projector=frozen"),
        ({"correspondence_weight": 0.3}, r"needs train\.correspondence_weight=0"),
        ({"min_snr_gamma": 5.0}, r"needs train\.min_snr_gamma=null"),
        ({"compile": True}, r"needs train\.compile=false"),
        ({"timestep_sampling": "logit_normal"}, r"needs train\.timestep_sampling=uniform"),
        ({"latent_channel_weights": [2.0, 1.0, 1.0, 1.0]}, r"needs train\.latent_channel_weights=\[1,1,1,1\]"),
        ({"default_guidance_scale": 5.0}, r"needs train\.default_guidance_scale=1"),
        ({"distill_ddim_steps": 3}, r"needs train\.default_num_inference_steps=3 or less"),
        ({"distill_guidance": (3.0, 2.0)}, r"distill_guidance=.*in ascending order"),
    ],
)
def test_what_distillation_leaves_no_choice_in_is_said(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainOptions(**{**FROZEN, **changed})


def test_evaluations_take_no_more_steps_than_are_learnt(mined: Path, tmp_path: Path, teacher: Path) -> None:
    few = ["train.distill_ddim_steps=10", "eval.every_steps=1"]
    with pytest.raises(InputError, match=r"eval\.num_inference_steps=20 is more than train\.distill_ddim_steps=10"):
        distill(mined, tmp_path / "run", teacher, *few, "eval.num_inference_steps=20")
    assert not (tmp_path / "run").exists()
    # The experiment evaluates what it teaches.
    assert compose_train("+experiment=distill").eval.num_inference_steps is None


def test_there_must_be_something_to_learn_from(mined: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"needs a pipeline to learn from: model=pipeline model\.path=FOLDER"):
        train(mined, tmp_path / "run", *DISTILL)
