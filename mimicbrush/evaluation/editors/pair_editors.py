"""What can be evaluated: anything that repaints the masked part of a source, with or without a reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from mimicbrush.errors import InputError, WeightsError
from mimicbrush.ops.counter_rng import mix

if TYPE_CHECKING:
    import torch

    from mimicbrush.ops.correspondence import Correspondence
    from mimicbrush.pipelines import MimicBrushPipeline


class Editor(Protocol):
    """Edits a batch of n images on square canvases of side S."""

    def __call__(
        self, sources: np.ndarray, masks: np.ndarray, references: np.ndarray | None, seeds: Sequence[int]
    ) -> np.ndarray:
        """Repaint.

        Args:
            sources: (n, S, S, 3) uint8 RGB, unmasked: the editor itself must not look into the hole.
            masks: (n, S, S) uint8, 1 = repaint.
            references: (n, S, S, 3) uint8 RGB; None: edit without a reference.
            seeds: n seeds of the noise, below 2**63.

        Returns:
            (n, S, S, 3) uint8 RGB, the editor's own output also outside the masks (nothing pasted back).
        """
        ...


@runtime_checkable
class CorrespondenceEditor(Protocol):
    """An `Editor` that can also tell which place of the reference filled which place of the hole."""

    def edit_with_correspondences(
        self, sources: np.ndarray, masks: np.ndarray, references: np.ndarray, seeds: Sequence[int]
    ) -> tuple[np.ndarray, Sequence[Correspondence] | None]:
        """Repaint as the editor itself does, (n, S, S, 3) uint8, and tell for each of the n; None: it cannot."""
        ...


class PipelineEditor:
    """A `MimicBrushPipeline` as an editor."""

    def __init__(
        self,
        pipeline: MimicBrushPipeline,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> None:
        """Keep the pipeline; None leaves a choice to its own default."""
        self.pipeline = pipeline
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = guidance_scale

    def __call__(
        self, sources: np.ndarray, masks: np.ndarray, references: np.ndarray | None, seeds: Sequence[int]
    ) -> np.ndarray:
        """Edit a batch, see `Editor`.

        Raises:
            WeightsError: the pipeline returned values that are not finite.
        """
        return self._edit(sources, masks, references, seeds, return_correspondence=False)[0]

    def edit_with_correspondences(
        self, sources: np.ndarray, masks: np.ndarray, references: np.ndarray, seeds: Sequence[int]
    ) -> tuple[np.ndarray, Sequence[Correspondence] | None]:
        """Edit a batch to the same pixels, see `CorrespondenceEditor`; without a reference U-Net nothing is told."""
        can_tell = self.pipeline.reference_unet is not None
        return self._edit(sources, masks, references, seeds, return_correspondence=can_tell)

    def _edit(
        self,
        sources: np.ndarray,
        masks: np.ndarray,
        references: np.ndarray | None,
        seeds: Sequence[int],
        return_correspondence: bool,
    ) -> tuple[np.ndarray, Sequence[Correspondence] | None]:
        import torch

        output: Any = self.pipeline(
            source=[Image.fromarray(source) for source in sources],
            mask=[Image.fromarray(mask * np.uint8(255)) for mask in masks],
            reference=None if references is None else [Image.fromarray(image) for image in references],
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            latents=self._noise(seeds),
            paste_back=False,
            output_type="np",
            return_correspondence=return_correspondence,
        )
        pixels = np.asarray(output.images, np.float32)
        if not np.isfinite(pixels).all():
            raise WeightsError("the pipeline returned values that are not finite; its weights are no good")
        return (pixels.clip(0, 1) * 255).round().astype(np.uint8), output.correspondences

    def _noise(self, seeds: Sequence[int]) -> torch.Tensor:
        """The start of the sampler, (n, 4, h, w), the same with and without a reference.

        The pipeline itself draws it after the reference's posterior, of which there is none without one.
        """
        import torch

        side = self.pipeline.unet.config.sample_size
        shape = (self.pipeline.vae.config.latent_channels, side, side)
        keys = [mix(seed, 1) for seed in seeds]
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(key)) for key in keys])


def check_pipeline_folder(folder: Path) -> None:
    """Tell at once, before anything slow is imported, that a folder holds no pipeline.

    Raises:
        InputError: it is not there, or is something else.
    """
    if not folder.is_dir():
        raise InputError(f"editor={folder}: no such folder; name the pipeline folder of a training run")
    if not (folder / "model_index.json").is_file():
        inner = folder / "pipeline"
        hint = f"; did you mean {inner}?" if (inner / "model_index.json").is_file() else ""
        raise InputError(f"editor={folder}: no pipeline folder (it has no model_index.json){hint}")
