"""Everything random that happens to a sample after loading, from its own key.

So noise, timesteps and drops do not depend on ranks, workers, batch size or restarts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from mimicbrush.ops.randomness import generator, mix

# One stream per purpose: adding a draw to one of them must not shift the others. (0 is the dataset's.)
_DECISIONS, _NOISE, _POSTERIORS = 1, 2, 3


@dataclass(frozen=True)
class Draws:
    """What was drawn for a batch.

    Attributes:
        timestep: (B,) int64.
        noise: (B, 4, h, w), what the model must predict.
        posteriors: (3, B, 4, h, w), for sampling the latents of source, masked source and reference.
        keep_reference, keep_depth: (B,) bool, False = dropped.
        reference_rows, depth_rows: (K,) int64, the rows that are kept; known here, so that nobody has to ask a GPU how
            many there are.
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
    ) -> Draws:
        """Draw for a batch, on the CPU: keys on a GPU would make it wait.

        Args:
            keys: (B,) int64, `TrainBatch.key`.
            latent_shape: (4, h, w).
            num_timesteps: of the noise schedule.
            reference_drop_ratio, depth_drop_ratio: probabilities (paper Sec. 4.1: 0.10 and 0.50).
            reference_drop: "random", each sample by itself (paper), or "first_quarter" of the batch, whatever the
                ratio (what the released attention does in training).
        """
        noises, posteriors, timesteps, references, depths = [], [], [], [], []
        for key in keys.tolist():
            decisions = generator(key, _DECISIONS)
            timesteps.append(int(decisions.integers(num_timesteps)))
            references.append(bool(decisions.random() >= reference_drop_ratio))
            depths.append(bool(decisions.random() >= depth_drop_ratio))
            noises.append(_normal((), latent_shape, mix(key, _NOISE)))
            posteriors.append(_normal((3,), latent_shape, mix(key, _POSTERIORS)))
        if reference_drop == "first_quarter":
            references = [number >= len(keys) // 4 for number in range(len(keys))]
        keep_reference, keep_depth = torch.tensor(references), torch.tensor(depths)
        return cls(
            timestep=torch.tensor(timesteps),
            noise=torch.stack(noises),
            posteriors=torch.stack(posteriors, dim=1),
            keep_reference=keep_reference,
            keep_depth=keep_depth,
            reference_rows=keep_reference.nonzero()[:, 0],
            depth_rows=keep_depth.nonzero()[:, 0],
        )

    def to(self, device: torch.device) -> Draws:
        """The same draws on another device; a GPU copies them from pinned memory, without anyone waiting."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        if device.type == "cuda":
            held = {name: tensor.pin_memory() for name, tensor in held.items()}
        return Draws(**{name: tensor.to(device, non_blocking=True) for name, tensor in held.items()})


def _normal(lead: tuple[int, ...], shape: tuple[int, int, int], seed: int) -> torch.Tensor:
    """Standard normal numbers, made on the CPU: the same ones for every kind of device."""
    return torch.randn(*lead, *shape, generator=torch.Generator().manual_seed(seed))
