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
KeysValuesByPath = dict[str, "KeysValues"]


def repeat_rows(keys_values: KeysValuesByPath, rows: int) -> KeysValuesByPath:
    """Repeat each row of keys and values equally often, up to this number of rows."""
    return {path: (_repeated(key, rows), _repeated(value, rows)) for path, (key, value) in keys_values.items()}


def _repeated(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    return tensor if len(tensor) == rows else tensor.repeat_interleave(rows // len(tensor), 0)


@dataclass(frozen=True)
class PreparedReference:
    """Encoded references, with everything that an edit needs from them, for any source, mask and guidance scale.

    `MimicBrushPipeline.prepare_reference` creates it. An edit with it gives exactly the same numbers as an edit with
    the image, for any source, mask, seed, guidance, number of steps and scheduler, as long as the weights, options,
    device and dtype of the pipeline do not change. Two details matter:

    * The VAE's posterior of the reference is sampled only once, in `prepare_reference`. So an edit with a generator of
      seed s gives the same result as with the image only if the same generator was passed to `prepare_reference`
      just before (or if the pipeline uses the mean of the posterior).
    * `features` has the features for some timesteps. With ``reference_timestep="zero"`` there is only one timestep,
      which every edit can use. With "current" there are those of the given number of steps. An edit at other
      timesteps computes its own features: the result is exact, too, but no time is saved.

    Attributes:
        latents: (R, 4, h, w), clean.
        context: (R, N, D), projected image tokens.
        placements: the place of each reference on its canvas.
        settings: options of the pipeline that created it; the pipeline that uses it must have the same.
        features: timestep that the reference U-Net saw -> keys and values by module path, R rows.
        num_references: number of consecutive references that belong to one source.
    """

    latents: torch.Tensor
    context: torch.Tensor
    placements: list[Placement]
    settings: tuple[object, ...]
    features: Mapping[float, KeysValuesByPath] = field(default_factory=dict)
    num_references: int = 1

    def __len__(self) -> int:
        return len(self.latents) // self.num_references

    def join_context(self) -> torch.Tensor:
        """Join the contexts of all references of each source: (len, n N, D)."""
        return join_tokens(self.context, len(self))

    def join_tokens(self, keys_values: KeysValuesByPath) -> KeysValuesByPath:
        """Join the keys and values of all references of each source: R rows -> `len` rows."""
        return {path: (join_tokens(k, len(self)), join_tokens(v, len(self))) for path, (k, v) in keys_values.items()}

    def check_serves(self, settings: tuple[object, ...], sources: int) -> None:
        """Check that an edit can use this prepared reference.

        Args:
            settings: of the pipeline.
            sources: number of images to edit.

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
