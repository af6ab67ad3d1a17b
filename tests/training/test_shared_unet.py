"""One U-Net that reads the reference and paints (`model.reference_encoder=shared`)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import compose_train
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from toy_edit import an_edit, latents_of
from toy_run import everything, forget_accelerate, metrics, train

from mimicbrush import assembly
from mimicbrush.assembly.encoding import collect_view_settings
from mimicbrush.assembly.run_folder import FINISHED_FILE
from mimicbrush.errors import InputError, WeightsError
from mimicbrush.models.components import toy_components
from mimicbrush.models.options import ModelOptions, PretrainedModel, ToyModel
from mimicbrush.models.reference_attention import set_reference_processors
from mimicbrush.models.unets import KeyValueReferenceUNet, SharedUNet
from mimicbrush.pipelines import MimicBrushPipeline
from mimicbrush.pipelines.conversion.export_released import export_released
from mimicbrush.pipelines.editing.auto_zoom import edit_zoomed
from mimicbrush.pipelines.folder import read_conventions
from mimicbrush.pipelines.open_pipeline import load_pipeline
from mimicbrush.training.checkpoints import checkpoint_path
from mimicbrush.training.lora import freeze_and_adapt
from mimicbrush.training.objective import Conditions, MimicBrushModel
from mimicbrush.training.options import TrainOptions
from mimicbrush.training.performance import apply_speedups
from mimicbrush.types import ReferenceStates

SHARED = "model.reference_encoder=shared"
ROWS = 3


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    forget_accelerate()


def shared_model(smallest: ToyModel, **choices: Any) -> MimicBrushModel:
    parts = toy_components(replace(smallest, reference_encoder="shared"))
    assert type(parts.unet) is SharedUNet and parts.reference_unet is None
    torch.nn.init.normal_(parts.unet.conv_in.weight, std=0.1)
    return MimicBrushModel(
        parts.unet, None, parts.image_projector, parts.depth_projector, size_px=smallest.size_px, **choices
    )


def a_batch() -> tuple[torch.Tensor, torch.Tensor, Conditions, torch.Tensor]:
    """Arguments of `MimicBrushModel`; the last reference is dropped."""
    generator = torch.Generator().manual_seed(0)
    noisy, *latents = torch.randn(4, ROWS, 4, 8, 8, generator=generator)
    mask = (torch.rand(ROWS, 1, 8, 8, generator=generator) > 0.5).float()
    tokens = torch.randn(ROWS, 17, 64, generator=generator)
    depth = torch.rand(ROWS, 1, 28, 28, generator=generator)
    keep = torch.tensor([True, True, False])
    return noisy, torch.tensor([3, 500, 900]), Conditions(*latents, mask, tokens, depth), keep


def inputs_written_out(model: MimicBrushModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the pass that paints and the pass that reads see, (B, 13, h, w) each, and the context of both."""
    noisy, _, conditions, _ = a_batch()
    depth = model.depth_projector(conditions.depth_map, model.size_px)
    painted = torch.cat([noisy, conditions.latent_mask, conditions.masked_source_latents, depth], dim=1)
    reference = conditions.reference_latents
    empty_mask, no_depth = torch.zeros(ROWS, 1, 8, 8), torch.zeros(ROWS, 4, 8, 8)
    read = torch.cat([reference, empty_mask, reference, no_depth], dim=1)
    return painted, read, model.image_projector(conditions.image_tokens)


@pytest.mark.parametrize("reference_timestep", [pytest.param("current", marks=pytest.mark.slow), "zero"])
def test_it_is_two_networks_of_the_same_weights_and_their_gradients_add_up(
    smallest: ToyModel, reference_timestep: str
) -> None:
    model = shared_model(smallest, reference_timestep=reference_timestep, reference_blend=0.5)
    stored = model.unet.state_dict()
    painter: Any = UNet2DConditionModel.from_config({**model.unet.config})
    reader: Any = KeyValueReferenceUNet.from_config({**model.unet.config})  # of 13 channels here
    painter.load_state_dict(stored)
    reader.load_state_dict({name: stored[name] for name in reader.state_dict()})
    set_reference_processors(painter, 0.5)

    noisy, timestep, conditions, keep = a_batch()
    painted, read, context = inputs_written_out(model)
    states = {"reference_states": ReferenceStates(keep=keep)}
    read_at = timestep if reference_timestep == "current" else 0 * timestep
    reader(read, read_at, context, cross_attention_kwargs=states)
    expected = painter(painted, timestep, context, cross_attention_kwargs=states).sample
    found = model(noisy, timestep, conditions, keep).sample
    assert torch.equal(found, expected)

    outer = {name: each for name, each in model.named_parameters() if not name.startswith("unet.")}
    expected_outer = torch.autograd.grad(expected.square().sum(), list(outer.values()), retain_graph=True)
    for sample in (expected, found):
        model.zero_grad()
        sample.square().sum().backward()
    for each, before in zip(outer.values(), expected_outer, strict=True):
        torch.testing.assert_close(each.grad, before, rtol=1e-4, atol=1e-5)
    read_gradients = {name: each.grad for name, each in reader.named_parameters()}
    assert all(gradient is not None and gradient.any() for gradient in read_gradients.values())
    for name, each in painter.named_parameters():
        both = each.grad + read_gradients.get(name, 0)
        scale = float(both.abs().max())
        torch.testing.assert_close(model.unet.get_parameter(name).grad, both, rtol=1e-4, atol=1e-5 * scale)


def test_without_a_reference_it_is_the_plain_unet(smallest: ToyModel) -> None:
    model = shared_model(smallest)
    plain: Any = UNet2DConditionModel.from_config({**model.unet.config})  # with the processors of diffusers
    plain.load_state_dict(model.unet.state_dict())
    noisy, timestep, conditions, keep = a_batch()
    painted, _, context = inputs_written_out(model)
    expected = plain(painted, timestep, context).sample
    states = {"reference_states": ReferenceStates()}
    torch.testing.assert_close(model.unet(painted, timestep, context).sample, expected)
    torch.testing.assert_close(model.unet(painted, timestep, context, cross_attention_kwargs=states).sample, expected)
    sample = model(noisy, timestep, conditions, keep).sample
    torch.testing.assert_close(sample[2], expected[2], rtol=1e-4, atol=1e-5)  # its reference is dropped
    assert (sample[:2] - expected[:2]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing": True},
        {"selective_checkpointing": True},
        {"fused_norms": True, "unet": "lora", "lora_rank": 2, "selective_checkpointing": True},
    ],
    ids=["checkpointing", "selective", "lora"],
)
def test_what_saves_memory_changes_nothing(smallest: ToyModel, options: dict[str, Any]) -> None:
    """Blocks of the pass that paints run again before those of the pass that reads: neither may take the other's."""
    model, chosen = shared_model(smallest), TrainOptions(**options)
    freeze_and_adapt(dict(model.named_children()), chosen)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero, and would give no gradient to its partner
            torch.nn.init.normal_(parameter, std=0.1)

    def gradients() -> list[torch.Tensor]:
        loss = model.train()(*a_batch()).sample.square().sum()
        return [loss.detach(), *torch.autograd.grad(loss, list(model.trained_parameters().values()))]

    expected = gradients()
    apply_speedups(model, chosen, channels_last=False)
    for found, before in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A group of processes that is this one alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"activation_checkpointing": True}, marks=pytest.mark.slow)],
    ids=["plain", "checkpointing"],
)
def test_ddp_sends_each_gradient_once_though_both_passes_make_it(smallest: ToyModel, options: dict[str, Any]) -> None:
    model = shared_model(smallest).train()
    apply_speedups(model, TrainOptions(**options), channels_last=False)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    sent: list[int] = []

    def count(_, bucket):  # DDP refuses annotations that are postponed
        sent.append(bucket.buffer().numel())
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    wrapped.register_comm_hook(None, count)
    loss = model(*a_batch()).sample.square().sum()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for _ in range(2):  # where a gradient is missing or comes twice, the second step fails
        model.zero_grad()
        sent.clear()
        wrapped(*a_batch()).sample.square().sum().backward()
        assert sum(sent) == sum(each.numel() for each in model.parameters())
    for each, before in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(each.grad, before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))


def test_it_needs_no_other_weights_and_has_nothing_to_choose(smallest: ToyModel) -> None:
    one, two = toy_components(replace(smallest, reference_encoder="shared")), toy_components(smallest)
    assert {name: each.shape for name, each in one.unet.state_dict().items()} == {
        name: each.shape for name, each in two.unet.state_dict().items()
    }
    needed = PretrainedModel(reference_encoder="shared").weight_options()
    assert needed == ("unet", "image_encoder", "vae", "depth_estimator")
    with pytest.raises(InputError, match="reference_sharing=keys_values does not work with"):
        ModelOptions(reference_encoder="shared", reference_sharing="keys_values")


def test_views_that_are_encoded_serve_whichever_unet_reads() -> None:
    settings = [
        collect_view_settings(compose_train("data.root=x", "run_dir=y", f"model.reference_encoder={encoder}"), [])
        for encoder in ("unet", "shared", "clip")
    ]
    assert settings[0] == settings[1] != settings[2]


@pytest.mark.slow
def test_adapters_learn_resume_and_are_merged(mined: Path, tmp_path: Path) -> None:
    options = [SHARED, "train.unet=lora", "train.lora_rank=2", "train.correspondence_weight=1"]
    for stop in (3, 4):
        train(mined, tmp_path / "run", *options, f"train.max_steps={stop}", "train.resume=latest")
        forget_accelerate()
    train(mined, tmp_path / "straight", *options, "train.max_steps=4")
    one, other = (everything(checkpoint_path(tmp_path / name / "checkpoints", 4)) for name in ("run", "straight"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert any("lora" in name for name in one)
    pipe = quiet(tmp_path / "run" / "pipeline")
    assert not any("lora" in name for name in pipe.unet.state_dict())
    assert [path.name for path in (tmp_path / "run" / "pipeline" / "adapters").iterdir()] == ["unet"]


@pytest.fixture(scope="module")
def run_dir(mined: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps."""
    folder = tmp_path_factory.mktemp("shared") / "run"
    train(mined, folder, SHARED, "train.max_steps=4")
    forget_accelerate()
    return folder


def quiet(folder: Path) -> MimicBrushPipeline:
    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_run_resumes_to_the_same_bits(mined: Path, tmp_path: Path, run_dir: Path) -> None:
    resumed = shutil.copytree(run_dir, tmp_path / "run")
    shutil.rmtree(checkpoint_path(resumed / "checkpoints", 4))
    (resumed / FINISHED_FILE).unlink()
    train(mined, resumed, SHARED, "train.max_steps=4", "train.resume=latest")
    one, other = (everything(checkpoint_path(folder / "checkpoints", 4)) for folder in (run_dir, resumed))
    assert one.keys() == other.keys() and [name for name in one if not torch.equal(one[name], other[name])] == []
    assert not any("reference_unet" in name for name in one)
    logged = metrics(run_dir)[-1]
    assert logged["gradient_norm_unet"] > 0 and "gradient_norm_reference_unet" not in logged


def test_its_pipeline_predicts_what_the_trainer_does(run_dir: Path, tmp_path: Path) -> None:
    folder = run_dir / "pipeline"
    assert not (folder / "reference_unet").exists()
    pipe = quiet(folder)
    assert type(pipe.unet) is SharedUNet and pipe.reference_network is pipe.unet
    assert pipe.options().reference_encoder == "shared" and vars(pipe.options()) == read_conventions(folder).options
    assert "| `reference_encoder` | `shared` |" in (folder / "README.md").read_text()
    model = MimicBrushModel(pipe.unet, None, pipe.image_projector, pipe.depth_projector, size_px=pipe.size_px)
    noisy, timestep, conditions, _ = a_batch()
    painted, _, context = inputs_written_out(model)
    one = slice(1, 2)
    with torch.no_grad():
        expected = model(noisy, timestep, conditions, torch.ones(ROWS, dtype=torch.bool)).sample[one]
        reference_kv = pipe._read_timesteps(conditions.reference_latents[one], context[one], {}, timestep[one])
        states = ReferenceStates(keys_values=reference_kv)
        found = pipe.predict_noise(noisy[one], painted[one, 4:], timestep[one], context[one], states, None)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    again = tmp_path / "again"
    assembly.export_run(run_dir, "latest", again)
    exported = quiet(again).unet.state_dict()
    assert all(torch.equal(exported[name], value) for name, value in pipe.unet.state_dict().items())
    with pytest.raises(WeightsError, match="no reference U-Net"):
        export_released(folder, tmp_path / "x.bin")


@pytest.mark.parametrize("reference_timestep", ["current", pytest.param("zero", marks=pytest.mark.slow)])
def test_it_edits_as_any_other(run_dir: Path, reference_timestep: str) -> None:
    pipe = quiet(run_dir / "pipeline")
    pipe.register_to_config(reference_timestep=reference_timestep)
    torch.nn.init.normal_(pipe.unet.conv_in.weight, std=0.1)
    seen: list[list[float]] = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(args[1].flatten().tolist()))
    guided = {"guidance_scale": 3.0}
    expected = latents_of(pipe, **guided)
    steps = pipe.scheduler.timesteps.tolist()
    assert seen == [steps if reference_timestep == "current" else [0.0], *([each] for each in steps)]
    hook.remove()

    other = {**an_edit(), "reference": an_edit(1)["source"]}
    for edit in (other, {**an_edit(), "reference": None}):
        assert not torch.allclose(latents_of(pipe, edit, **guided), expected, atol=1e-3)
    one_by_one = latents_of(pipe, **guided, reference_batch_size=1)
    torch.testing.assert_close(one_by_one, expected, rtol=1e-4, atol=1e-5)
    drawn = torch.Generator().manual_seed(0)
    prepared = pipe.prepare_reference(an_edit()["reference"], num_inference_steps=2, generator=drawn)
    assert list(prepared.features) == (steps if reference_timestep == "current" else [0.0])
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    from_image, from_prepared = (
        latents_of(pipe, {**an_edit(), "reference": each}, latents=noise, **guided)
        for each in (an_edit()["reference"], prepared)
    )
    torch.testing.assert_close(from_prepared, from_image, rtol=1e-4, atol=1e-5)
    output, _ = edit_zoomed(pipe, **an_edit(), seeds=[1], num_inference_steps=1, return_correspondence=True)
    assert len(output.correspondences[0].source_xy) > 0

    pipe.unet.set_attn_processor(AttnProcessor2_0())
    with pytest.raises(WeightsError, match="does not use a reference"):
        latents_of(pipe)
