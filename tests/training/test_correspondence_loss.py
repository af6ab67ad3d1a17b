"""The correspondence loss, and the matches that it is made of."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.distributed.utils import _apply_to_tensors
from torch.utils._python_dispatch import TorchDispatchMode
from toy_run import forget_accelerate, metrics, train

from mimicbrush.assembly import TrainConfig, register_schemas
from mimicbrush.assembly.build import build_loader, make_accelerator, read_pair_sources
from mimicbrush.data.batch import DecodedBatch, collate_samples
from mimicbrush.data.dataset import PairDataset
from mimicbrush.data.manifest import read_manifest
from mimicbrush.data.options import DataOptions
from mimicbrush.data.pair_sources import split_by_kind
from mimicbrush.errors import DataError, InputError
from mimicbrush.models.components import toy_components
from mimicbrush.models.options import ToyModel
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.ops.color_jitter import JitterRanges
from mimicbrush.training.correspondence_loss import check_reading_layers, correspondence_loss
from mimicbrush.training.noise import NoiseSample
from mimicbrush.training.objective import FrozenEncoders, MimicBrushModel, denoising_loss
from mimicbrush.training.options import TrainOptions
from mimicbrush.types import Matches, TrainBatch

SIZE = 64
SIDE = 16


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    forget_accelerate()


def some_matches(rows: int = 3, count: int = 5, seed: int = 0) -> Matches:
    generator = torch.Generator().manual_seed(seed)
    source, reference = torch.rand(2, rows, count, 2, generator=generator) * (SIZE - 1)
    return Matches(source, reference, torch.rand(rows, count, generator=generator) > 0.3)


def some_attention(rows: int = 3, heads: int = 4, side: int = SIDE) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, rows, side * side, heads, 8, generator=generator, requires_grad=True)
    return query, key


ALL = torch.ones(3, dtype=torch.bool)


def test_it_is_the_cross_entropy_of_pytorch_with_bilinear_targets() -> None:
    """PyTorch takes target maps; each is a tent over the tokens around the place."""
    query, key = some_attention()
    matches = some_matches()
    keep = torch.tensor([True, False, True])
    found = correspondence_loss({"a": (query, key)}, matches, keep, SIZE, heads_ratio=0.5)
    for row in range(3):
        losses = []
        for source, reference, is_match in zip(
            matches.source_xy[row], matches.reference_xy[row], matches.is_match[row], strict=True
        ):
            if not (is_match and keep[row]):
                continue
            column, line = ((source + 0.5) / (SIZE / SIDE)).floor().int().tolist()
            x, y = ((reference + 0.5) / (SIZE / SIDE) - 0.5).tolist()
            target = np.zeros((SIDE, SIDE))
            for i in range(SIDE):
                for j in range(SIDE):
                    target[i, j] = max(0, 1 - abs(min(max(y, 0), SIDE - 1) - i)) * max(
                        0, 1 - abs(min(max(x, 0), SIDE - 1) - j)
                    )
            for head in range(2):
                scores = key[row, :, head] @ query[row, line * SIDE + column, head] / math.sqrt(8)
                losses.append(F.cross_entropy(scores[None], torch.from_numpy(target.ravel()).float()[None]))
        expected = torch.stack(losses).mean() / math.log(SIDE * SIDE) if losses else torch.tensor(0.0)
        torch.testing.assert_close(found.per_sample[row], expected, atol=1e-5, rtol=1e-5)
    assert found.match_counts[1] == (matches.is_match & keep[:, None]).sum()


def test_even_attention_costs_one_and_right_attention_nothing() -> None:
    centres = (torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="xy"), -1) + 0.5) * 4 - 0.5
    places = centres.flatten(0, 1)[None].expand(3, -1, -1)
    turned = places.flip(1)
    matches = Matches(places, turned, torch.ones(3, SIDE * SIDE, dtype=torch.bool))
    flat = torch.zeros(3, SIDE * SIDE, 2, 4)
    even = correspondence_loss({"a": (flat, flat)}, matches, ALL, SIZE, 1.0)
    torch.testing.assert_close(even.per_sample, torch.ones(3))
    codes = torch.eye(SIDE * SIDE)[None, :, None].expand(3, -1, 2, -1)
    right = correspondence_loss({"a": (codes * 1000, codes.flip(1))}, matches, ALL, SIZE, 1.0)
    assert right.per_sample.max() < 1e-4
    assert right.match_counts[0] == right.match_counts[1] == 3 * SIDE * SIDE
    wrong = correspondence_loss({"a": (codes * 1000, codes)}, matches, ALL, SIZE, 1.0)
    assert wrong.per_sample.min() > 1 and wrong.match_counts[0] < 0.1 * wrong.match_counts[1]


def test_only_the_first_heads_of_kept_samples_are_taught() -> None:
    query, key = some_attention()
    keep = torch.tensor([True, False, True])
    loss = correspondence_loss({"a": (query, key)}, some_matches(), keep, SIZE, heads_ratio=0.4).per_sample.sum()
    for gradient in torch.autograd.grad(loss, [query, key]):
        assert gradient[0, :, :2].abs().sum() > 0  # 0.4 of four heads, rounded up
        assert not gradient[:, :, 2:].any() and not gradient[1].any()


def test_padding_counts_for_nothing() -> None:
    query, key = some_attention()
    matches = some_matches()
    expected = correspondence_loss({"a": (query, key)}, matches, ALL, SIZE, 0.5)
    elsewhere = Matches(
        torch.where(matches.is_match[..., None], matches.source_xy, 9.0),
        torch.where(matches.is_match[..., None], matches.reference_xy, 1e6),
        matches.is_match,
    )
    found = correspondence_loss({"a": (query, key)}, elsewhere, ALL, SIZE, 0.5)
    assert torch.equal(found.per_sample, expected.per_sample) and torch.equal(found.match_counts, expected.match_counts)
    none = Matches(matches.source_xy, matches.reference_xy, torch.zeros_like(matches.is_match))
    assert correspondence_loss({"a": (query, key)}, none, ALL, SIZE, 0.5).per_sample.tolist() == [0, 0, 0]


def test_fsdp_leaves_places_as_they_are() -> None:
    """It casts tensors of dataclasses and lists on their way into a network; not those of `Matches`."""
    matches = some_matches()
    (cast_to_half,) = _apply_to_tensors(lambda tensor: tensor.to(torch.bfloat16), (matches,))
    assert cast_to_half is matches and matches.source_xy.dtype == torch.float32


def test_who_cannot_be_taught_is_told_before_anything_else(smallest: ToyModel) -> None:
    with pytest.raises(InputError, match=r"this model has none \(model\.reference_encoder\)"):
        check_reading_layers(None)
    check_reading_layers(toy_components(smallest).unet)
    tiny = ToyModel(**{**vars(smallest), "size_px": 8})
    with pytest.raises(InputError, match=r"the finest has 4 x 4; increase model\.size_px"):
        check_reading_layers(toy_components(tiny).unet)
    for channels in ((16, 16), (16, 16, 16), (16, 32, 32, 32)):
        unet = toy_components(ToyModel(**{**vars(smallest), "size_px": 32, "block_out_channels": channels})).unet
        check_reading_layers(unet)  # as many tokens as latents, at the finest level


def test_coarse_layers_are_left_out_and_one_must_be_fine_enough() -> None:
    fine, coarse = some_attention(), some_attention(side=4)
    alone = correspondence_loss({"a": fine}, some_matches(), ALL, SIZE, 0.5)
    both = correspondence_loss({"a": fine, "b": coarse}, some_matches(), ALL, SIZE, 0.5)
    assert torch.equal(alone.per_sample, both.per_sample)
    with pytest.raises(InputError, match=r"a reading layer of at least 8 x 8 tokens; increase model\.size_px"):
        correspondence_loss({"b": coarse}, some_matches(), ALL, SIZE, 0.5)


# Matches of samples


def dataset(
    mined: Path, num_matches: int = 64, unrelated: float = 0.0, video_ratio: float = 0.5, **options: object
) -> PairDataset:
    chosen = DataOptions(video_ratio=video_ratio, heldout_ratio=0.0, **options)  # type: ignore[arg-type]
    sources = split_by_kind(read_manifest(mined), chosen)
    return PairDataset(sources, SIZE, chosen, seed=3, num_matches=num_matches, unrelated_ratio=unrelated)


@pytest.mark.parametrize("share_flips", [False, True])
@pytest.mark.parametrize("video_ratio", [0.0, 1.0])
@pytest.mark.parametrize("augment_on", ["cpu", "device"])
def test_matched_places_show_the_same(mined: Path, augment_on: str, video_ratio: float, share_flips: bool) -> None:
    """Under strong geometry the two images agree at the matches, and nowhere near as well elsewhere."""
    samples = dataset(
        mined, video_ratio=video_ratio, share_flips=share_flips, augment_on=augment_on, jitter=JitterRanges(0, 0, 0, 0)
    )
    batch = collate_samples([samples[number] for number in range(24)])
    if isinstance(batch, DecodedBatch):
        batch = batch.to(torch.device("cpu"))
    matches = batch.matches
    assert matches is not None and matches.source_xy.shape == (24, 64, 2)
    errors, elsewhere = [], []
    for row in range(24):
        source, reference = ((image[row].permute(1, 2, 0).numpy() + 1) / 2 for image in (batch.source, batch.reference))
        for is_match, at, there in zip(
            matches.is_match[row], matches.source_xy[row], matches.reference_xy[row], strict=True
        ):
            if is_match:
                one, same, other = (
                    cv2.getRectSubPix(
                        cv2.GaussianBlur(image, (0, 0), 1).astype(np.float32), (1, 1), tuple(map(float, xy))
                    )
                    for image, xy in ((source, at), (reference, there), (reference, there.flip(0)))
                )
                errors.append(np.abs(one - same).mean())
                elsewhere.append(np.abs(one - other).mean())
    assert len(errors) > 24 * 6
    assert np.mean(errors) < 0.05 < 0.1 < np.mean(elsewhere)


def test_nothing_else_about_a_sample_depends_on_its_matches(mined: Path) -> None:
    plain, matched = dataset(mined, num_matches=0), dataset(mined, num_matches=8)
    for number in range(10):
        one, other = plain[number], matched[number]
        assert one.matches is None and other.matches is not None
        assert np.array_equal(one.source, other.source) and np.array_equal(one.reference, other.reference)
        assert np.array_equal(one.mask, other.mask)
        again = matched[number].matches
        assert np.array_equal(again.source_xy, other.matches.source_xy)
        assert len(other.matches.source_xy) <= 8
    assert collate_samples([plain[number] for number in range(2)]).matches is None


def test_unrelated_references_come_at_their_rate_from_other_files_and_without_matches(mined: Path) -> None:
    plain, mixed = dataset(mined), dataset(mined, unrelated=0.4)
    changed = 0
    for number in range(80):
        one, other = plain[number], mixed[number]
        assert np.array_equal(one.source, other.source) and np.array_equal(one.mask, other.mask)
        is_other = not np.array_equal(one.reference, other.reference)
        assert is_other == (len(other.matches.source_xy) == 0 and len(one.matches.source_xy) > 0)
        changed += is_other
    assert 0.25 < changed / 80 < 0.55


def test_one_source_file_has_nothing_unrelated_and_says_so_at_once(mined: Path) -> None:
    alone = read_manifest(mined)
    alone = alone.where(alone.column("source_path") == "coffee.png.mp4")
    options = DataOptions(video_ratio=1.0, heldout_ratio=0.0)
    with pytest.raises(DataError, match=r"unrelated_reference_ratio=0\.01 takes references from other source files"):
        PairDataset(split_by_kind(alone, options), SIZE, options, seed=0, unrelated_ratio=0.01)


# In a training step


def parts_and_batch(
    options: ToyModel, rows: int = 4
) -> tuple[MimicBrushModel, FrozenEncoders, TrainBatch, NoiseSample]:
    parts = toy_components(options)
    model = MimicBrushModel(
        parts.unet, parts.reference_unet, parts.image_projector, parts.depth_projector, size_px=options.size_px
    )
    generator = torch.Generator().manual_seed(0)
    source, reference = torch.rand(2, rows, 3, options.size_px, options.size_px, generator=generator) * 2 - 1
    mask = (torch.rand(rows, 1, options.size_px, options.size_px, generator=generator) > 0.5).float()
    xy = torch.rand(2, rows, 6, 2, generator=generator) * (options.size_px - 1)
    matches = Matches(xy[0], xy[1], torch.ones(rows, 6, dtype=torch.bool))
    batch = TrainBatch(source, reference, mask, torch.arange(rows), torch.arange(rows), matches=matches)
    side = options.size_px // 2
    noise_sample = NoiseSample.for_keys(
        batch.key, (4, side, side), num_timesteps=1000, reference_drop_ratio=0.3, depth_drop_ratio=0.5
    )
    return model, FrozenEncoders(parts, options), batch, noise_sample


@pytest.mark.parametrize("sharing", ["hidden_states", "keys_values"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_adds_to_the_loss_and_reaches_both_u_nets(smallest: ToyModel, sharing: str, checkpointing: bool) -> None:
    options = ToyModel(**{**vars(smallest), "reference_sharing": sharing})
    model, encoders, batch, noise_sample = parts_and_batch(options)
    if checkpointing:
        for unet in (model.unet, model.reference_unet):
            unet.enable_gradient_checkpointing()
    model.train()
    conditions, scheduler = encoders.encode(batch, noise_sample), noise_scheduler()
    plain = denoising_loss(model, scheduler, conditions, noise_sample)
    supervised = denoising_loss(model, scheduler, conditions, noise_sample, None, batch.matches, 0.5)
    assert torch.equal(plain.correspondence, torch.zeros(4))
    total, count, _, points = supervised.correspondence
    assert count == noise_sample.keep_reference.sum() < 4 and points == 6 * count  # told of those that were taught
    torch.testing.assert_close(supervised.total, plain.total + 0.5 * total / 4)
    gradients = {}
    for name, loss in (("plain", plain), ("supervised", supervised)):
        model.zero_grad()
        loss.total.backward()
        gradients[name] = {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}
    assert gradients["plain"].keys() == gradients["supervised"].keys()  # DDP waits for nothing that never comes
    for part in ("unet.", "reference_unet."):
        assert any(
            not torch.equal(gradients["plain"][key], gradients["supervised"][key])
            for key in gradients["plain"]
            if key.startswith(part)
        )


class Operations(TorchDispatchMode):
    """Notes what PyTorch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_it_costs_nothing_where_its_weight_is_zero(smallest: ToyModel, mined: Path) -> None:
    model, encoders, batch, noise_sample = parts_and_batch(smallest)
    conditions, scheduler = encoders.encode(batch, noise_sample), noise_scheduler()
    done = []
    for matches in (None, batch.matches):
        model.zero_grad()  # or the second pass would add to the gradients of the first
        with Operations() as operations:
            denoising_loss(model, scheduler, conditions, noise_sample, None, matches, 0.3).total.backward()
        done.append(operations.names)
    plain, supervised = (Counter(names) for names in done)
    assert not plain - supervised and supervised - plain  # what comes on top is the loss alone
    register_schemas()
    with initialize_config_dir(str(Path(__file__).parents[2] / "configs"), version_base="1.3"):
        options = [cast(TrainConfig, OmegaConf.to_object(compose("train", ["+experiment=smoke", f"data.root={mined}",
                   f"train.correspondence_weight={weight}"]))) for weight in (0, 0.3)]  # fmt: skip
    for each, has_matches in zip(options, (False, True), strict=True):
        sources, _ = read_pair_sources(each.data)
        loader = build_loader(sources, each, make_accelerator(each.train, mined))
        (batch,) = (batch for batch in loader(0, 1) if batch is not None)
        assert (batch.matches is not None) == has_matches


def test_the_same_matches_give_the_same_loss_in_any_split_of_a_batch(smallest: ToyModel) -> None:
    model, encoders, batch, noise_sample = parts_and_batch(smallest)
    batch.matches.is_match[0, 2:] = False
    batch.matches.is_match[1] = False
    scheduler = noise_scheduler()
    whole = denoising_loss(
        model, scheduler, encoders.encode(batch, noise_sample), noise_sample, None, batch.matches, 0.5
    ).total
    halves = []
    for rows in (slice(0, 2), slice(2, 4)):
        part = TrainBatch(*(getattr(batch, name)[rows] for name in ("source", "reference", "mask", "key", "index")))
        matches = Matches(*(tensor[rows] for tensor in vars(batch.matches).values()))
        own = NoiseSample.for_keys(
            part.key, (4, 8, 8), num_timesteps=1000, reference_drop_ratio=0.3, depth_drop_ratio=0.5
        )
        halves.append(denoising_loss(model, scheduler, encoders.encode(part, own), own, None, matches, 0.5).total)
    torch.testing.assert_close(torch.stack(halves).mean(), whole, atol=1e-6, rtol=1e-5)


def test_a_run_learns_to_look_and_tells_of_it(mined: Path, tmp_path: Path) -> None:
    options = ["train.max_steps=40", "train.log_every=10", "train.batch_size=4", "train.total_batch_size=4",
               "train.correspondence_weight=1", "train.learning_rate=3e-3", "train.lr_warmup_steps=5",
               "model.shared_start=true", "train.checkpoint_every=100", "data.share_flips=true"]  # fmt: skip
    train(mined, tmp_path / "taught", *options)
    taught = metrics(tmp_path / "taught")
    assert taught[-1]["loss_correspondence"] < taught[0]["loss_correspondence"] - 0.02
    assert taught[-1]["matches_found_ratio"] > taught[0]["matches_found_ratio"]
    forget_accelerate()
    train(mined, tmp_path / "plain", "train.max_steps=2")
    assert "loss_correspondence" not in metrics(tmp_path / "plain")[-1]


def test_the_weight_goes_in_a_straight_line() -> None:
    options = TrainOptions(max_steps=100, correspondence_weight=0.3, correspondence_final=0.1)
    assert [options.correspondence_weight_at(step) for step in (0, 50, 100, 200)] == pytest.approx([0.3, 0.2, 0.1, 0.1])
    assert TrainOptions(correspondence_weight=0.3).correspondence_weight_at(70) == 0.3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"correspondence_weight": -1.0}, "correspondence_weight=-1.0: expected a number of at least 0"),
        ({"correspondence_weight": math.nan}, "correspondence_weight=nan: expected a number of at least 0"),
        ({"correspondence_final": 0.1}, "needs a train.correspondence_weight above 0"),
        ({"correspondence_heads": 0.0}, "correspondence_heads=0.0: expected a number above 0 and at most 1"),
        ({"unrelated_reference_ratio": 1.5}, "unrelated_reference_ratio=1.5: expected a number from 0 to 1"),
    ],
)
def test_options_out_of_range_are_refused(given: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainOptions(**given)  # type: ignore[arg-type]
