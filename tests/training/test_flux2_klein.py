"""FLUX.2 klein in the loop of the U-Nets: its loss is diffusers' own, and its runs resume, share work and export."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from composed import compose_train
from diffusers import Flux2KleinPipeline
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from toy_run import everything, forget_accelerate, metrics, train_with

from mimicbrush import assembly
from mimicbrush.assembly.config import TrainConfig, list_weight_files
from mimicbrush.assembly.families import _choose_taught_layers, build_family, check_family
from mimicbrush.assembly.prerequisites import check_prerequisites
from mimicbrush.data.training_data import TrainingData
from mimicbrush.errors import InputError, WeightsError
from mimicbrush.models.flux2_klein.attention import AttentionTap, klein_attention_paths
from mimicbrush.models.flux2_klein.components import toy_klein
from mimicbrush.models.flux2_klein.files import fingerprint_klein
from mimicbrush.models.flux2_klein.prompt import encode_prompt, write_prompt
from mimicbrush.models.flux2_klein.sequence import TokenLayout, make_text_ids
from mimicbrush.models.options import Flux2KleinModel, ToyFlux2KleinModel
from mimicbrush.ops.canvas import blank_mask
from mimicbrush.pipelines.flux2_klein import open_klein
from mimicbrush.training.checkpoints import checkpoint_path
from mimicbrush.training.correspondence_loss import correspondence_loss
from mimicbrush.training.methods.flux2_klein import Flux2KleinMethod, KleinInputs
from mimicbrush.training.noise import choose_timesteps
from mimicbrush.training.options import TrainOptions
from mimicbrush.types import Matches, TrainBatch

ROOT = Path(__file__).parents[2]
SMALLEST_KLEIN = ["+experiment=klein_smoke", "model.num_single_layers=1", "model.head_width=8", "train.batch_size=2",
                  "train.total_batch_size=2", "train.log_every=1", "train.checkpoint_every=2"]  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    forget_accelerate()


def options_of(*overrides: str) -> TrainConfig:
    return cast(
        TrainConfig, OmegaConf.to_object(compose_train("data.root=x", "run_dir=y", *SMALLEST_KLEIN, *overrides))
    )


def method_of(*overrides: str) -> Flux2KleinMethod:
    torch.manual_seed(0)  # of new adapters
    family = build_family(options_of(*overrides), None, TrainingData(0.0, frozenset()), Accelerator(cpu=True))
    assert isinstance(family.method, Flux2KleinMethod)
    return family.method


def batch_of(references: int = 2, rows: int = 2, size_px: int = 64) -> TrainBatch:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1 + references, rows, 3, size_px, size_px, generator=generator) * 2 - 1
    mask = torch.zeros(rows, 1, size_px, size_px)
    mask[0, :, 8:40, 16:44] = mask[1:, :, 30:, :20] = 1
    places = torch.rand(2, rows, 5, 2, generator=generator) * (size_px - 1)
    is_match = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])[:rows]
    keys = torch.arange(rows) + 7
    return TrainBatch(images[0], images[1], mask, keys, keys, matches=Matches(*places, is_match),
                      other_references=images[2:].transpose(0, 1) if references > 1 else None)  # fmt: skip


def predict(method: Flux2KleinMethod, inputs: KleinInputs, keep: torch.Tensor | None = None) -> torch.Tensor:
    sigma = torch.full((len(inputs.latents),), 0.6)
    return method.model(inputs.latents, sigma, inputs.conditions, keep).sample


@torch.no_grad()
def test_the_loss_is_what_diffusers_pieces_give() -> None:
    """Written again with the pipeline's own functions, sample by sample, for two references."""
    method = method_of("train.hole_weight=4", "train.reference_drop_ratio=0", "train.correspondence_weight=0")
    batch = replace(batch_of(), matches=None)
    inputs = method.encode(batch, torch.device("cpu"))
    loss = method.loss(method.model, inputs, 0, {})

    parts = method.exporter.parts
    pipeline, scheduler = parts.build_pipeline(), parts.scheduler
    totals = []
    for row in range(2):
        images = [batch.source, blank_mask(batch.source, batch.mask), batch.reference, batch.references[:, 1]]
        latents = [pipeline._encode_vae_image(each[row : row + 1], None) for each in images]
        for ours, theirs in zip((inputs.latents, *inputs.conditions), latents, strict=True):
            torch.testing.assert_close(ours[row : row + 1], theirs, rtol=1e-4, atol=2e-5)
        noise = inputs.noise_sample.noise[row : row + 1]
        index = int(inputs.noise_sample.chance[row] * 1000)
        sigma = scheduler.sigmas[index]
        noisy = (1 - sigma) * latents[0] + sigma * noise
        tokens = pipeline.transformer(
            hidden_states=torch.cat([pipeline._pack_latents(each) for each in (noisy, *latents[1:])], dim=1),
            timestep=scheduler.timesteps[index : index + 1] / 1000,
            encoder_hidden_states=method.model.prompt_embeds,
            img_ids=torch.cat([pipeline._prepare_latent_ids(noisy), pipeline._prepare_image_ids(latents[1:])], dim=1),
            txt_ids=pipeline._prepare_text_ids(method.model.prompt_embeds),
        ).sample[:, : noisy.shape[2] * noisy.shape[3]]
        error = (tokens - pipeline._pack_latents(noise - latents[0])).square().mean(dim=2)[0]
        hole = torch.stack([part.mean() for line in batch.mask[row, 0].split(8) for part in line.split(8, dim=1)])
        weight = 4 * hole + (1 - hole)
        totals.append((error * weight).sum() / weight.sum())
    torch.testing.assert_close(loss.total, torch.stack(totals).mean(), rtol=1e-5, atol=1e-6)
    assert loss.parts[1] + loss.parts[3] == 2 * 64 and loss.bins[1].sum() == 2

    plain = method_of("train.hole_weight=1", "train.reference_drop_ratio=0", "train.correspondence_weight=0")
    unweighted = plain.loss(plain.model, inputs, 0, {})
    torch.testing.assert_close(unweighted.total, (unweighted.parts[0] + unweighted.parts[2]) / 128)
    assert torch.equal(unweighted.parts, loss.parts) and unweighted.total != loss.total


@torch.no_grad()
def test_a_dropped_reference_is_a_sequence_without_it() -> None:
    method = method_of()
    inputs = method.encode(batch_of(), torch.device("cpu"))
    seen = predict(method, inputs)
    mixed = predict(method, inputs, torch.tensor([False, True]))
    without = predict(method, inputs._replace(conditions=inputs.conditions[:1]))
    torch.testing.assert_close(mixed[0], without[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], seen[1], rtol=1e-4, atol=1e-5)
    assert (mixed[0] - seen[0]).abs().max() > 1e-3

    # Every reference counts, and their order does: each has a place in time of its own.
    source, first, second = inputs.conditions
    for changed in ((source, first), (source, second, first)):
        assert (predict(method, inputs._replace(conditions=changed)) - seen).abs().max() > 1e-4


@torch.no_grad()
def test_drops_follow_the_keys_and_are_told_to_the_model() -> None:
    method, batch, told = method_of(), batch_of(), list[Any]()
    method.model.register_forward_pre_hook(lambda _, given: told.append(given[3]))
    for ratio, expected in ((0.0, None), (1.0, [False, False])):
        method.options.reference_drop_ratio = ratio
        first, again = (method.encode(batch, torch.device("cpu")) for _ in range(2))
        assert torch.equal(first.noise_sample.noise, again.noise_sample.noise)
        method.loss(method.model, first, 0, {})
        assert (told[-1] is None) if expected is None else told[-1].tolist() == expected


@torch.no_grad()
def test_the_correspondence_loss_reads_the_chosen_layers_and_the_first_reference() -> None:
    chosen = "single_transformer_blocks.*"
    method = method_of(f"train.correspondence_layers=['{chosen}']", "train.correspondence_weight=0.5",
                       "train.reference_drop_ratio=0")  # fmt: skip
    batch = batch_of()
    inputs = method.encode(batch, torch.device("cpu"))
    loss = method.loss(method.model, inputs, 0, {})
    alone = method.loss(method.model, inputs._replace(matches=None), 0, {})

    layout = TokenLayout(method.model.prompt_embeds.shape[1], 64, 2)
    tap = AttentionTap(layout)
    sigmas = method.scheduler.sigmas[(inputs.noise_sample.chance * 1000).long()]
    level = sigmas.view(-1, 1, 1, 1)
    noisy = (1 - level) * inputs.latents + level * inputs.noise_sample.noise
    parts = method.exporter.parts
    pipeline = parts.build_pipeline()
    tokens = [pipeline._pack_latents(each) for each in (noisy, *inputs.conditions)]
    ids = [pipeline._prepare_latent_ids(noisy), pipeline._prepare_image_ids([each[:1] for each in inputs.conditions])]
    method.model.transformer(
        torch.cat(tokens, dim=1), method.model.prompt_embeds.expand(2, -1, -1), sigmas,
        torch.cat([each[:1] for each in ids], dim=1), make_text_ids(layout.num_text),
        joint_attention_kwargs={"tap": tap},
    )  # fmt: skip
    query, key = tap.queries_and_keys["single_transformer_blocks.0.attn"]
    assert batch.matches is not None
    expected = correspondence_loss({"": (query, key[:, :64])}, batch.matches, torch.tensor([True, True]), 64, 0.5)
    torch.testing.assert_close(loss.correspondence[0], expected.per_sample.sum(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.total, alone.total + 0.5 * expected.per_sample.mean(), rtol=1e-4, atol=1e-5)
    assert loss.correspondence[1] == 2 and loss.correspondence[3] == 8


def test_layers_to_teach_must_exist_and_have_small_tokens(smallest_klein: ToyFlux2KleinModel) -> None:
    parts = toy_klein(smallest_klein)
    paths = klein_attention_paths(parts.transformer)
    assert _choose_taught_layers(parts, 64, TrainOptions(correspondence_weight=0.1)) == tuple(paths)
    with pytest.raises(
        InputError, match=r"\['middle'\]: no such layer; expected layers from transformer_blocks\.0\.attn to"
    ):
        _choose_taught_layers(parts, 64, TrainOptions(correspondence_layers=("middle", "single*")))
    with pytest.raises(InputError, match=r"needs at least 8 x 8 tokens, and model\.size_px=32 gives 4 x 4"):
        _choose_taught_layers(parts, 32, TrainOptions(correspondence_weight=0.1))


def test_timesteps_are_chosen_as_diffusers_chooses_them() -> None:
    chance = (torch.arange(1000) + 0.5) / 1000
    assert choose_timesteps(chance, 1000, TrainOptions()).tolist() == list(range(999, -1, -1))
    options = TrainOptions(timestep_sampling="logit_normal", timestep_logit_mean=0.5, timestep_logit_std=0.7)
    normal = statistics.NormalDist(0.5, 0.7)
    by_hand = [999 - int(1000 * torch.sigmoid(torch.tensor(normal.inv_cdf(float(each))))) for each in chance]
    assert max(abs(a - b) for a, b in zip(choose_timesteps(chance, 1000, options).tolist(), by_hand, strict=True)) <= 1
    ends = choose_timesteps(torch.tensor([0.0, 1 - 2.0**-24]), 1000, options)
    assert ends.min() >= 0 and ends.max() <= 999


@pytest.fixture(scope="module")
def straight(mined: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with two references."""
    run_dir = tmp_path_factory.mktemp("klein") / "straight"
    assert train_with(mined, run_dir, *SMALLEST_KLEIN, "train.max_steps=3", "data.num_references=2") == 0
    forget_accelerate()
    return run_dir


def test_a_resumed_run_has_the_same_bits(straight: Path, mined: Path, tmp_path: Path) -> None:
    for steps in (2, 3):
        train_with(mined, tmp_path / "run", *SMALLEST_KLEIN, f"train.max_steps={steps}", "data.num_references=2",
                   "train.resume=latest")  # fmt: skip
        forget_accelerate()
    one, other = (everything(checkpoint_path(each / "checkpoints", 3)) for each in (straight, tmp_path / "run"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    lora = "pipeline/pytorch_lora_weights.safetensors"
    assert (straight / lora).read_bytes() == (tmp_path / "run" / lora).read_bytes()
    assert [line["loss"] for line in metrics(straight)] == [line["loss"] for line in metrics(tmp_path / "run")]
    assembly.export_run(straight, "latest", tmp_path / "again")
    assert (straight / lora).read_bytes() == (tmp_path / "again" / lora.split("/")[1]).read_bytes()
    assert (tmp_path / "again" / "imitation.json").read_bytes() == (straight / "pipeline/imitation.json").read_bytes()


def test_adapters_alone_are_trained_and_work_in_diffusers(straight: Path) -> None:
    trained = load_file(checkpoint_path(straight / "checkpoints", 3) / "weights.safetensors")
    assert trained and all(".lora_" in name for name in trained)
    assert all(value.abs().max() > 0 for name, value in trained.items() if ".lora_B." in name)

    pipeline = Flux2KleinPipeline.from_pretrained(straight / "pipeline" / "base", text_encoder=None, tokenizer=None)
    base = toy_klein(cast(ToyFlux2KleinModel, options_of().model), seed=0).transformer
    stored = pipeline.transformer.state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in base.state_dict().items())
    pipeline.set_progress_bar_config(disable=True)
    klein = open_klein(straight / "pipeline", "cpu")
    assert klein.imitation.num_references == 2

    def edit() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline(prompt_embeds=klein.prompt.embeds, height=64, width=64, num_inference_steps=2,
                        guidance_scale=1.0, generator=generator, output_type="pt").images  # fmt: skip

    before = edit()
    pipeline.load_lora_weights(straight / "pipeline")
    assert (edit() - before).abs().max() > 1e-4


@pytest.mark.slow
def test_full_training_leaves_a_whole_base(mined: Path, tmp_path: Path) -> None:
    train_with(mined, tmp_path, *SMALLEST_KLEIN, "train.max_steps=1", "train.transformer=trained",
               "train.activation_checkpointing=true")  # fmt: skip
    assert not (tmp_path / "pipeline" / "pytorch_lora_weights.safetensors").exists()
    averaged = load_file(checkpoint_path(tmp_path / "checkpoints", 1) / "ema.safetensors")
    base = load_file(tmp_path / "pipeline/base/transformer/diffusion_pytorch_model.safetensors")
    assert averaged.keys() == {f"transformer.{name}" for name in base}
    assert all(torch.equal(averaged[f"transformer.{name}"], base[name]) for name in base)
    assert open_klein(tmp_path, "cpu").imitation.base == "base"


def test_a_run_from_stored_weights_needs_no_text_encoder(
    mined: Path, tmp_path: Path, smallest_klein: ToyFlux2KleinModel
) -> None:
    parts = toy_klein(smallest_klein, seed=5)
    assert parts.text_encoder is not None and parts.tokenizer is not None
    parts.build_pipeline().save_pretrained(tmp_path / "base")
    chosen = ["+experiment=klein_smoke", "model=flux2_klein", "model.size_px=64", f"model.base={tmp_path / 'base'}",
              f"model.prompt_embeddings={tmp_path / 'prompt.safetensors'}"]  # fmt: skip
    config = compose_train(f"data.root={mined}", "run_dir=x", *chosen)
    with pytest.raises(InputError, match=r"model\.prompt_embeddings=.* does not exist; `mimicbrush fetch`"):
        check_prerequisites(config)
    prompt = Flux2KleinModel().prompt
    embeddings = encode_prompt(prompt, parts.text_encoder, parts.tokenizer, encoder="toy", max_tokens=4)
    write_prompt(tmp_path / "prompt.safetensors", embeddings)
    (tmp_path / "base" / "text_encoder" / "model.safetensors").unlink()
    check_prerequisites(config)
    assert [file.name for file in list_weight_files(cast(TrainConfig, OmegaConf.to_object(config)).model)] == [
        "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors", "prompt.safetensors",
    ]  # fmt: skip
    short = ["train.batch_size=2", "train.total_batch_size=2", "train.max_steps=1", "train.lr_warmup_steps=0"]
    assert train_with(mined, tmp_path / "run", *chosen, *short) == 0
    left = tmp_path / "run" / "pipeline"
    assert not (left / "base").exists()  # it lies where it lay
    klein = open_klein(left, "cpu")
    assert klein.imitation.base == str(tmp_path / "base") and klein.prompt.checksum == embeddings.checksum
    assert klein.imitation.base_fingerprint == fingerprint_klein(tmp_path / "base")

    # Diffusers would train from random numbers where a weight is missing.
    file = tmp_path / "base/transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({name: value for name, value in weights.items() if name != "proj_out.weight"}, file)
    with pytest.raises(WeightsError, match=r"transformer does not fit:\s+proj_out\.weight is missing"):
        train_with(mined, tmp_path / "damaged", *chosen, *short)

    absent = compose_train(f"data.root={mined}", "run_dir=x", *chosen[:3], "model.base=nobody/nothing")
    with pytest.raises(InputError, match=r"model\.base=nobody/nothing is neither a folder nor in the local"):
        check_prerequisites(absent)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+experiment=klein_smoke", "train.distill=lcm", "train.depth_drop_ratio=0.1"],
         r"train\.depth_drop_ratio, train\.distill are only for the U-Nets, and this model uses FLUX\.2 klein"),
        (["+experiment=klein_smoke", "data.fixed_views=1", "data.encoded_views=x"], r"data\.encoded_views is only for"),
        (["+experiment=smoke", "train.hole_weight=2"], r"train\.hole_weight is only for FLUX\.2 klein"),
    ],
    ids=["u_nets", "encoded_views", "klein"],
)  # fmt: skip
def test_options_of_the_other_family_are_refused(overrides: list[str], message: str) -> None:
    config = OmegaConf.merge(compose_train("data.root=x", "run_dir=y", *overrides[:1]),
                             OmegaConf.from_dotlist(overrides[1:]))  # fmt: skip
    options = compose_options(config)
    with pytest.raises(InputError, match=message):
        check_family(options)


def compose_options(config: Any) -> TrainConfig:
    """Without what `TrainOptions` itself refuses about distillation."""
    distill, config.train.distill = config.train.distill, "none"
    options = cast(TrainConfig, OmegaConf.to_object(config))
    options.train.distill = distill
    return options


def test_sharded_weights_are_refused() -> None:
    sharded = cast(Accelerator, SimpleNamespace(distributed_type=DistributedType.FSDP))
    with pytest.raises(InputError, match=r"with sharded weights \(FSDP\) is not tested"):
        build_family(options_of(), None, TrainingData(0.0, frozenset()), sharded)


@pytest.mark.slow
def test_in_half_precision_adapters_stay_whole(mined: Path, tmp_path: Path) -> None:
    """Frozen weights are bfloat16, adapters and latents float32; losses are near those of float32."""
    losses = []
    for number, more in enumerate(([], ["train.mixed_precision=bf16", "train.activation_checkpointing=true"])):
        run_dir = tmp_path / str(number)
        train_with(mined, run_dir, *SMALLEST_KLEIN, "train.max_steps=2", *more)
        forget_accelerate()
        losses.append(torch.tensor([line["loss"] for line in metrics(run_dir)]))
    assert torch.allclose(*losses, rtol=0.02) and not torch.equal(*losses)
    lora = load_file(tmp_path / "1/pipeline/pytorch_lora_weights.safetensors")
    base = load_file(tmp_path / "1/pipeline/base/transformer/diffusion_pytorch_model.safetensors")
    assert {each.dtype for each in lora.values()} == {torch.float32}
    assert {each.dtype for each in base.values()} == {torch.bfloat16}
    assembly.export_run(tmp_path / "0", "latest", tmp_path / "half", half=True)
    half = load_file(tmp_path / "half/pytorch_lora_weights.safetensors")
    whole = load_file(tmp_path / "0/pipeline/pytorch_lora_weights.safetensors")
    assert all(torch.equal(half[name], value.bfloat16()) for name, value in whole.items())


@pytest.mark.slow
def test_a_run_evaluates_what_it_learns(mined: Path, tmp_path: Path) -> None:
    evaluated = ["eval=heldout", "eval.every_steps=2", "eval.max_pairs=2", "eval.num_inference_steps=1",
                 "data.heldout_ratio=0.5"]  # fmt: skip
    train_with(mined, tmp_path, *SMALLEST_KLEIN, "train.max_steps=2", *evaluated)
    (line,) = [json.loads(line) for line in (tmp_path / "heldout" / "heldout.jsonl").read_text().splitlines()]
    assert line["step"] == 2 and line["heldout/reference_gain_db"] != 0
    assert open_klein(tmp_path / "best", "cpu").size_px == 64


@pytest.mark.slow
def test_the_experiment_learns(mined: Path, tmp_path: Path) -> None:
    assert train_with(mined, tmp_path, "+experiment=klein_smoke", "train.max_steps=100") == 0
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert statistics.mean(losses[-3:]) < 0.85 * losses[0], losses


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(
    mined: Path, tmp_path: Path, script_environment: Callable[[], dict[str, str]]
) -> None:
    options = ["train.max_steps=4", "train.total_batch_size=4", "train.reference_drop_ratio=0.5",
               "train.learning_rate=1e-4", "data.num_references=2"]  # fmt: skip
    for name, launcher in (("one", []), ("two", ["-m", "torch.distributed.run", "--nproc_per_node", "2"])):
        own = [f"data.root={mined}", f"run_dir={tmp_path / name}"]
        command = [sys.executable, *launcher, "scripts/train.py", *SMALLEST_KLEIN, *options, *own]
        subprocess.run(command, cwd=ROOT, env=script_environment(), check=True)
    one, two = (metrics(tmp_path / name) for name in ("one", "two"))
    assert len(one) == 4
    for a, b in zip(one, two, strict=True):
        for name in (key for key in a if key.startswith(("loss", "gradient_norm"))):
            assert (a[name] is None) == (b[name] is None)
            assert a[name] is None or abs(a[name] - b[name]) < 1e-4 * max(1.0, a[name]), (name, a, b)
