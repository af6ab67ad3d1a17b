"""Samples all random numbers of a training step from the keys of its samples.

So noise, timesteps and drops do not depend on ranks, workers, batch size or restarts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import torch

from mimicbrush.ops.counter_rng import first_numbers, generator, mix_many
from mimicbrush.training.options import TrainOptions

# One stream per purpose, so that more numbers for one purpose do not change the others. (The dataset uses 0.)
_DECISIONS, _NOISE, _POSTERIORS, _OTHER_POSTERIORS = 1, 2, 3, 4


@dataclass(frozen=True)
class NoiseSample:
    """Random numbers of a batch: timesteps, noise, and which conditions are dropped.

    Attributes:
        timestep: (B,) int64.
        noise: (B, 4, h, w) standard normal, added to the source latents.
        posteriors: (2 + R, B, 4, h, w), for sampling the latents of source, masked source and R references.
        keep_reference, keep_depth: (B,) bool, False = dropped.
        reference_rows, depth_rows: (K,) int64, the rows that are kept. They are computed on the CPU, because reading
            their number from a GPU would make the CPU wait.
        chance: (B,) float32 in [0, 1), for other random choices of a method.
    """

    timestep: torch.Tensor
    noise: torch.Tensor
    posteriors: torch.Tensor
    keep_reference: torch.Tensor
    keep_depth: torch.Tensor
    reference_rows: torch.Tensor
    depth_rows: torch.Tensor
    chance: torch.Tensor

    @classmethod
    def for_keys(
        cls,
        keys: torch.Tensor,
        latent_shape: tuple[int, int, int],
        *,
        num_timesteps: int,
        reference_drop_ratio: float,
        depth_drop_ratio: float,
        reference_drop: str = "random",
        noise_device: torch.device | None = None,
        num_references: int = 1,
        has_posteriors: bool = True,
    ) -> NoiseSample:
        """Sample for a batch. The keys must be on the CPU, because reading them from a GPU would make the CPU wait.

        Args:
            keys: (B,) int64, `TrainBatch.key`.
            latent_shape: (4, h, w).
            num_timesteps: number of timesteps of the noise schedule.
            reference_drop_ratio, depth_drop_ratio: probabilities (paper Sec. 4.1: 0.10 and 0.50).
            reference_drop: "random": each sample is dropped independently (paper); "first_quarter": the first quarter
                of the batch is dropped, whatever the ratio is (as in the released attention in training).
            noise_device: device on which the noise of the whole batch is made in one call, by
                `sample_counter_normals`; None: on the CPU, sample by sample, with PyTorch's generator. These are
                other numbers.
            num_references: number of references of each sample, R. All other random numbers are the same for any R.
            has_posteriors: False: `posteriors` is empty, (0, B, ...), for methods whose latents are modes.
        """
        bits = keys.numpy()
        timestep, (reference_chance, depth_chance, chance) = _decide(bits, num_timesteps)
        images_of = {_NOISE: 1}
        if has_posteriors:
            images_of[_POSTERIORS] = 3
            if num_references > 1:
                images_of[_OTHER_POSTERIORS] = num_references - 1
        shapes = [(images, *latent_shape) for images in images_of.values()]
        seeds = [torch.from_numpy(mix_many(bits, stream).astype(np.int64)) for stream in images_of]
        if noise_device is None:
            normals = [
                torch.stack([_normal(shape, seed) for seed in stream.tolist()])
                for stream, shape in zip(seeds, shapes, strict=True)
            ]
        else:
            seeds_there = copy_to_device(torch.stack(seeds), noise_device)
            flat = sample_counter_normals(seeds_there, tuple(math.prod(shape) for shape in shapes))
            normals = [each.unflatten(1, shape) for each, shape in zip(flat, shapes, strict=True)]
        noise = normals[0][:, 0]  # (B, 4, h, w)
        posteriors = torch.cat(normals[1:], dim=1) if has_posteriors else normals[0][:, :0]  # (B, 2 + R, 4, h, w)
        keep_reference = reference_chance >= reference_drop_ratio
        if reference_drop == "first_quarter":
            keep_reference = torch.arange(len(keys)) >= len(keys) // 4
        keep_depth = depth_chance >= depth_drop_ratio
        return cls(
            timestep=timestep,
            noise=noise,
            posteriors=posteriors.transpose(0, 1),
            keep_reference=keep_reference,
            keep_depth=keep_depth,
            reference_rows=keep_reference.nonzero()[:, 0],
            depth_rows=keep_depth.nonzero()[:, 0],
            chance=chance.float().clamp(max=1 - 2.0**-24),
        )

    def to(self, device: torch.device) -> NoiseSample:
        """Copy to another device; to a GPU from pinned memory, so that the CPU does not wait."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        if device.type == "cuda":
            tensors = {name: tensor if tensor.is_cuda else tensor.pin_memory() for name, tensor in tensors.items()}
        return NoiseSample(**{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


def _decide(keys: np.ndarray, num_timesteps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample the timestep of each key, and three numbers in [0, 1): (B,) int64 -> (B,) int64, (3, B) float64.

    They are the numbers of ``generator(key, _DECISIONS)``: ``integers(num_timesteps)``, then three ``random()``.
    """
    numbers = first_numbers(mix_many(keys, _DECISIONS))  # (B, 4)
    # As NumPy does: 32 bits times the limit (Lemire 2019), sampled again where this would favour some timesteps.
    product = (numbers[:, 0] & np.uint64(0xFFFFFFFF)) * np.uint64(num_timesteps)
    timesteps = (product >> np.uint64(32)).astype(np.int64)
    chances = (numbers[:, 1:] >> np.uint64(11)).astype(np.float64) * 2.0**-53  # as NumPy makes a double
    for row in np.flatnonzero((product & np.uint64(0xFFFFFFFF)) < 2**32 % num_timesteps):  # 1 of 10 million
        decisions = generator(int(keys[row]), _DECISIONS)
        timesteps[row], chances[row] = decisions.integers(num_timesteps), decisions.random(3)
    return torch.from_numpy(timesteps), torch.from_numpy(chances.T)


def choose_timesteps(chance: torch.Tensor, num_timesteps: int, options: TrainOptions) -> torch.Tensor:
    """Choose the timestep of each sample: (B,) numbers in [0, 1) -> (B,) int64, 0 for the least noise.

    Args:
        chance: random numbers of the samples, as in `NoiseSample`. A small number gives much noise, as in diffusers.
        num_timesteps: number of timesteps of the noise schedule.
        options: how timesteps are distributed.
    """
    if options.timestep_sampling == "logit_normal":
        chance = torch.sigmoid(options.timestep_logit_mean + options.timestep_logit_std * torch.special.ndtri(chance))
    return num_timesteps - 1 - (chance * num_timesteps).long().clamp(max=num_timesteps - 1)


#: Constants of splitmix64 (Steele et al. 2014), as int64, which wraps around.
_STEP, _FIRST, _SECOND = (number - (1 << 64) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))

#: A CPU makes at most about this many pairs of numbers at once, so that intermediate results fit into its cache.
_CPU_CHUNK = 1 << 16


def sample_counter_normals(seeds: torch.Tensor, counts: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Sample normal numbers for many seeds at once, on their device: (S, B) int64 -> S times (B, count) float32.

    The numbers are standard normal. Each depends only on its seed and its position: splitmix64 of both, then the
    Box-Muller transform. So a sample has the same noise in any batch and, up to rounding, on any device.

    Args:
        seeds: (S, B) int64.
        counts: S numbers: how many random numbers each seed of a row gives.
    """
    pairs = [(count + 1) // 2 for count in counts]
    rows = max(1, _CPU_CHUNK // sum(pairs))
    if seeds.device.type == "cpu" and rows < seeds.shape[1]:
        parts = [sample_counter_normals(chunk, counts) for chunk in seeds.split(rows, dim=1)]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))
    place = torch.arange(1, max(pairs) + 1, device=seeds.device) * _STEP
    state = torch.cat([row[:, None] + place[:count] for row, count in zip(seeds, pairs, strict=True)], dim=1)
    state.bitwise_xor_(_shift_right(state, 30)).mul_(_FIRST)
    state.bitwise_xor_(_shift_right(state, 27)).mul_(_SECOND)
    state.bitwise_xor_(_shift_right(state, 31))
    # Box-Muller: r = sqrt(-2 ln u), with u in (0, 1); r cos(a) and r sin(a) are independent and normal.
    radius = ((_shift_right(state, 32) + 0.5) / 2.0**32).log_().mul_(-2).sqrt_()
    angle = state.bitwise_and_(0xFFFFFFFF) * (2 * math.pi / 2.0**32)
    both = torch.stack([angle.cos().mul_(radius), angle.sin_().mul_(radius)], dim=-1)  # (B, all pairs, 2)
    parts = both.split(pairs, dim=1)
    return tuple(part.flatten(1)[:, :count] for part, count in zip(parts, counts, strict=True))


def _shift_right(bits: torch.Tensor, by: int) -> torch.Tensor:
    """Shift to the right as for unsigned numbers; PyTorch's own shift repeats the sign bit."""
    return (bits >> by).bitwise_and_((1 << (64 - by)) - 1)


def copy_to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor from the CPU to a device; to a GPU from pinned memory, so that the CPU does not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _normal(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Sample standard normal numbers on the CPU: the same ones for every kind of device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
