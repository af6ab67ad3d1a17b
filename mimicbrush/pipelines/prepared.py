"""References that are encoded once for many edits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from mimicbrush.errors import InputError
from mimicbrush.models.reference_attention import join_tokens
from mimicbrush.ops.crops import Placement

if TYPE_CHECKING:
    from mimicbrush.types import KeysValues

#: Keys and values of the reference by module path, for one timestep.
Projected = dict[str, "KeysValues"]


def repeat_rows(projected: Projected, rows: int) -> Projected:
    """Repeat each row of keys and values equally often, so that there are this many rows."""
    return {path: (_repeated(key, rows), _repeated(value, rows)) for path, (key, value) in projected.items()}


def _repeated(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    return tensor if len(tensor) == rows else tensor.repeat_interleave(rows // len(tensor), 0)


@dataclass(frozen=True)
class PreparedReference:
    """Encoded references: all that an edit needs of them, for any source, mask and guidance scale.

    Made by `MimicBrushPipeline.prepare_reference`. Reusing it is exact: an edit computes the same numbers as if it
    had read the reference itself, for any source, mask, seed, guidance, number of steps and scheduler, as long as
    the pipeline's weights, options, device and type stay what they were. Two things to know:

    * The VAE's posterior of the reference was sampled once, when it was prepared. So an edit with a generator of seed
      s equals one with the image itself only if that same generator was handed to `prepare_reference` just
      before (or if the pipeline takes the posterior's mean).
    * Features are held for the timesteps in `features`. With ``reference_timestep="zero"`` there is just one, and it
      serves every edit. With "current" those of the number of steps that was named are held; an edit at other
      timesteps computes its own, which is exact, too, but saves nothing.

    Attributes:
        latents: (R, 4, h, w), clean.
        context: (R, N, D), projected image tokens.
        placements: how each of the references lies on the canvas.
        settings: the options of the pipeline that made it, which must be those of one that uses it.
        features: timestep that the reference U-Net saw -> keys and values by module path, R rows.
        num_references: how many of the R, which follow each other, belong to one source.
    """

    latents: torch.Tensor
    context: torch.Tensor
    placements: list[Placement]
    settings: tuple[object, ...]
    features: Mapping[float, Projected] = field(default_factory=dict)
    num_references: int = 1

    def __len__(self) -> int:
        return len(self.latents) // self.num_references

    def join_context(self) -> torch.Tensor:
        """Join the context of all references of a source: (len, n N, D)."""
        return join_tokens(self.context, len(self))

    def join_tokens(self, projected: Projected) -> Projected:
        """Join what was read of all references of a source: R rows of keys and values -> as many as `len` says."""
        return {path: (join_tokens(k, len(self)), join_tokens(v, len(self))) for path, (k, v) in projected.items()}

    def check_serves(self, settings: tuple[object, ...], sources: int) -> None:
        """Check that this can be used for an edit.

        Args:
            settings: of the pipeline.
            sources: how many images are edited.

        Raises:
            InputError: it was prepared by a pipeline with other options, or for another number of images.
        """
        if settings != self.settings:
            raise InputError(
                f"this reference was prepared with {self.settings}, but the pipeline now has {settings}; prepare it "
                "again"
            )
        count = len(self.placements) // self.num_references
        if count not in (1, sources):
            raise InputError(f"expected one reference, or one (or a list) for each of {sources} sources, got {count}")
