"""Ways to carry keypoints from a source to a reference that see both; the attention's is in `attention`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import Flux2KleinPipeline
from transformers import Dinov2Model

from mimicbrush.errors import InputError
from mimicbrush.evaluation.keypoint_transfer.tasks import TransferTask
from mimicbrush.models.encoders import encode_image_tokens, encode_latents
from mimicbrush.models.unets import KeyValueReferenceUNet, init_reference_from_unet
from mimicbrush.ops.canvas import to_tensor
from mimicbrush.pipelines import MimicBrushPipeline
from mimicbrush.pipelines.klein.pipeline import KleinPipeline
from mimicbrush.types import ReferenceStates

#: A task -> (K, 2) float64, where its keypoints are expected in the reference.
Method = Callable[[TransferTask], np.ndarray]
#: Of 1000: how much noise features see. DIFT takes 261 for Stable Diffusion 2.1, at 768 px.
FEATURE_TIMESTEP = 261
_SEED = 0


def keep_place(task: TransferTask) -> np.ndarray:
    """Leave the keypoints at the place that they have in the source."""
    return task.source_xy


class NoFeaturesError(InputError):
    """A pipeline that has no reference U-Net to take features from."""


class RandomPlaces:
    """A method that puts each keypoint at a random place of the canvas."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def __call__(self, task: TransferTask) -> np.ndarray:
        """Carry the keypoints of a task, see `Method`."""
        return self._rng.uniform(-0.5, len(task.reference) - 0.5, task.source_xy.shape)


class FeatureTransfer:
    """A method of nearest neighbours in the reference U-Net's noised features (DIFT, Tang et al. 2023).

    Differs from DIFT in the network: it is ours that was trained to be read, instead of one that denoises; and in the
    layer: what enters the last self-attention that is shared, which is the finest.

    Args:
        pipeline: has a reference U-Net.
        timestep: of the noise.
        dinov2: their patch tokens are put beside, each normalised (Zhang et al. 2023, "A tale of two features").
    """

    def __init__(
        self,
        pipeline: MimicBrushPipeline | KleinPipeline,
        timestep: int = FEATURE_TIMESTEP,
        dinov2: Dinov2Model | None = None,
    ) -> None:
        if (
            not isinstance(pipeline, MimicBrushPipeline)
            or pipeline.reference_unet is None
            or isinstance(pipeline.reference_unet, KeyValueReferenceUNet)
        ):
            raise NoFeaturesError("this pipeline has no reference U-Net that shares hidden states")
        self.pipeline, self.timestep, self.dinov2 = pipeline, timestep, dinov2

    def __call__(self, task: TransferTask) -> np.ndarray:
        """Carry the keypoints of a task, see `Method`."""
        features = self._features(np.stack([task.source, task.reference]))  # (2, C, n, n)
        size, n = len(task.source), features.shape[-1]
        grid = torch.from_numpy((task.source_xy + 0.5) / size * 2 - 1).float()[None, None]  # (1, 1, K, 2)
        query = F.normalize(F.grid_sample(features[:1], grid, align_corners=False)[0, :, 0], dim=0)  # (C, K)
        keys = F.normalize(features[1].flatten(1), dim=0)  # (C, n * n)
        row, column = np.divmod((query.T @ keys).argmax(dim=1).numpy(), n)
        return (np.stack([column, row], axis=1) + 0.5) * size / n - 0.5

    @torch.no_grad()
    def _features(self, images: np.ndarray) -> torch.Tensor:
        pipeline = self.pipeline
        pixels = to_tensor(images)
        latents = encode_latents(pipeline.vae, pixels, None)
        noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(_SEED)).expand_as(latents)
        timestep = torch.full((len(latents),), self.timestep)
        noisy = pipeline.scheduler.add_noise(latents, noise, timestep)
        context = pipeline.image_projector(encode_image_tokens(pipeline.image_encoder, pixels))
        states = ReferenceStates()
        pipeline.reference_unet(noisy, timestep, context, cross_attention_kwargs={"reference_states": states})
        last = list(states.features.values())[-1]  # (2, n * n, C), in the order of the layers
        features = _to_grid(last)
        if self.dinov2 is None:
            return features
        tokens = _to_grid(encode_image_tokens(self.dinov2, pixels, patches_only=True))
        resized = F.interpolate(tokens, features.shape[-2:], mode="bilinear")
        return torch.cat([F.normalize(features, dim=1), F.normalize(resized, dim=1)], dim=1)


def _to_grid(tokens: torch.Tensor) -> torch.Tensor:
    """(B, n * n, C) -> (B, C, n, n)."""
    side = round(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, side)).float()


def remove_training(
    pipeline: MimicBrushPipeline | KleinPipeline, seed: int
) -> tuple[MimicBrushPipeline | KleinPipeline, str]:
    """Make the same pipeline as it was before training, and say in words what that is.

    Args:
        pipeline: the trained one.
        seed: of random weights.
    """
    if isinstance(pipeline, MimicBrushPipeline):
        return make_untrained(pipeline, seed), "one set of random weights; the interval covers only the sources"
    parts = pipeline.imitation, pipeline.prompt, pipeline.is_trained
    if getattr(pipeline.pipeline.transformer, "peft_config", None):
        return KleinPipeline(pipeline.pipeline, *parts, lora_scale=0), "the base model without the LoRA"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = pipeline.pipeline.transformer
        fresh = type(transformer).from_config(transformer.config).eval()
    components = {**pipeline.pipeline.components, "transformer": fresh}
    before = Flux2KleinPipeline(**components, is_distilled=pipeline.pipeline.config.is_distilled)
    return KleinPipeline(before, *parts), "one set of random weights; the interval covers only the sources"


def make_untrained(pipeline: MimicBrushPipeline, seed: int) -> MimicBrushPipeline:
    """Make the same pipeline before training from scratch: random projectors, and random U-Nets that begin alike."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = {
            name: type(part).from_config(part.config).eval()
            for name in ("unet", "reference_unet", "image_projector", "depth_projector")
            if (part := getattr(pipeline, name)) is not None
        }
    if "reference_unet" in fresh:
        init_reference_from_unet(fresh["reference_unet"], fresh["unet"])
    parts = pipeline.components
    choices = {name: value for name, value in pipeline.config.items() if name not in parts and name[0] != "_"}
    return type(pipeline)(**{**parts, **fresh}, **choices)
