"""Everything random that happens to a sample after loading, made from its own key.

Noise, timesteps and drops therefore do not depend on ranks, workers, batch size or restarts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch

from mimicbrush.ops.counter_rng import generator, mix

# One stream per purpose: one more number in a stream must not shift the others. (0 is the dataset's.)
_DECISIONS, _NOISE, _POSTERIORS = 1, 2, 3


@dataclass(frozen=True)
class NoiseSample:
    """Random numbers of a batch: timesteps, noise, and which conditions are dropped.

    Attributes:
        timestep: (B,) int64.
        noise: (B, 4, h, w) standard normal, added to the source latents.
        posteriors: (3, B, 4, h, w), for sampling the latents of source, masked source and reference.
        keep_reference, keep_depth: (B,) bool, False = dropped.
        reference_rows, depth_rows: (K,) int64, the rows that are kept. They are listed on the CPU, since asking a GPU
            how many there are would make the CPU wait.
    """

    timestep: torch.Tensor
    noise: torch.Tensor
    posteriors: torch.Tensor
    keep_reference: torch.Tensor
    keep_depth: torch.Tensor
    reference_rows: torch.Tensor
    depth_rows: torch.Tensor

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
    ) -> NoiseSample:
        """Sample for a batch. The keys must lie on the CPU: reading them from a GPU would make the CPU wait.

        Args:
            keys: (B,) int64, `TrainBatch.key`.
            latent_shape: (4, h, w).
            num_timesteps: of the noise schedule.
            reference_drop_ratio, depth_drop_ratio: probabilities (paper Sec. 4.1: 0.10 and 0.50).
            reference_drop: "random", each sample by itself (paper), or "first_quarter" of the batch, whatever the
                ratio (what the released attention does in training).
            noise_device: where the noise of the whole batch is made in one call, by `sample_counter_normal`; None
                makes it on the CPU, sample by sample, with PyTorch's generator: other numbers.
        """
        timesteps, references, depths = [], [], []
        for key in keys.tolist():
            decisions = generator(key, _DECISIONS)
            timesteps.append(int(decisions.integers(num_timesteps)))
            references.append(bool(decisions.random() >= reference_drop_ratio))
            depths.append(bool(decisions.random() >= depth_drop_ratio))
        noise_seeds, posterior_seeds = ([mix(key, stream) for key in keys.tolist()] for stream in (_NOISE, _POSTERIORS))
        if noise_device is None:
            noise = torch.stack([_normal((), latent_shape, seed) for seed in noise_seeds])
            posteriors = torch.stack([_normal((3,), latent_shape, seed) for seed in posterior_seeds], dim=1)
        else:
            noise, posteriors = (
                sample_counter_normal(_copy_seeds(seeds, noise_device), math.prod(shape)).unflatten(1, shape)
                for seeds, shape in ((noise_seeds, latent_shape), (posterior_seeds, (3, *latent_shape)))
            )
            posteriors = posteriors.transpose(0, 1)
        if reference_drop == "first_quarter":
            references = [number >= len(keys) // 4 for number in range(len(keys))]
        keep_reference, keep_depth = torch.tensor(references), torch.tensor(depths)
        return cls(
            timestep=torch.tensor(timesteps),
            noise=noise,
            posteriors=posteriors,
            keep_reference=keep_reference,
            keep_depth=keep_depth,
            reference_rows=keep_reference.nonzero()[:, 0],
            depth_rows=keep_depth.nonzero()[:, 0],
        )

    def to(self, device: torch.device) -> NoiseSample:
        """Copy to another device; to a GPU from pinned memory, so that the CPU does not wait."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        if device.type == "cuda":
            tensors = {name: tensor if tensor.is_cuda else tensor.pin_memory() for name, tensor in tensors.items()}
        return NoiseSample(**{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


#: Constants of splitmix64 (Steele et al. 2014), as int64, which wraps around.
_STEP, _FIRST, _SECOND = (number - (1 << 64) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def sample_counter_normal(seeds: torch.Tensor, count: int) -> torch.Tensor:
    """Sample standard normal numbers of many seeds at once, on their device: (B,) int64 -> (B, count) float32.

    Each number is a function of its seed and its place alone: splitmix64 of both, then Box and Muller. A sample
    therefore has the same noise in any batch and, up to rounding, on any device.
    """
    place = torch.arange(1, (count + 1) // 2 + 1, device=seeds.device)
    state = seeds[:, None] + place * _STEP
    state = (state ^ _shift_right(state, 30)) * _FIRST
    state = (state ^ _shift_right(state, 27)) * _SECOND
    state = state ^ _shift_right(state, 31)
    high, low = _shift_right(state, 32), state & 0xFFFFFFFF
    # Box and Muller: r = sqrt(-2 ln u), with u in (0, 1); r cos(a) and r sin(a) are independent and normal.
    radius = (-2 * ((high + 0.5) / 2.0**32).log()).sqrt()
    angle = low * (2 * math.pi / 2.0**32)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)[:, :count]


def _shift_right(bits: torch.Tensor, by: int) -> torch.Tensor:
    """Shift as unsigned numbers do: PyTorch's own shift repeats the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _copy_seeds(seeds: list[int], device: torch.device) -> torch.Tensor:
    tensor = torch.tensor(seeds)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _normal(lead: tuple[int, ...], shape: tuple[int, int, int], seed: int) -> torch.Tensor:
    """Sample standard normal numbers on the CPU: the same ones for every kind of device."""
    return torch.randn(*lead, *shape, generator=torch.Generator().manual_seed(seed))
