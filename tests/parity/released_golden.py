"""Golden files made by the released code: where they are, and the pipeline whose weights one holds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from mimicbrush.models.components import toy_components
from mimicbrush.models.options import RELEASED_CONVENTIONS, ToyModel
from mimicbrush.models.projectors import DepthProjector, ImageProjector
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.models.unets import ReferenceUNet
from mimicbrush.pipelines import MimicBrushPipeline

#: Old and present names of the VAE's attention; the released VAE folder has the old ones.
_VAE_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def golden_path(variable: str, name: str) -> Path:
    """The file that an environment variable names, or the copy in this repository. One that is absent fails."""
    path = Path(os.environ.get(variable) or Path(__file__).parents[1] / "golden" / name)
    assert path.is_file(), f"{variable or name}: no golden file at {path}"
    return path


def mask_of(stored: np.ndarray) -> np.ndarray:
    """A mask however it was stored (one or three channels, 0..1 or 0..255, any type) -> (H, W) uint8 in 0..255."""
    mask = stored[..., 0] if stored.ndim == 3 else stored
    scaled = mask.astype(np.float64) * (255 if mask.max() <= 1 else 1)
    return scaled.round().astype(np.uint8)


class GoldenPipeline:
    """A golden pipeline file: tensors by name, and the pipeline that its weights make."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            self.metadata: dict[str, str] = file.metadata()
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        self.steps = int(self.metadata["steps"])
        self.guidance_scale = float(self.metadata["guidance_scale"])
        self.size_px = int(self.metadata["size"])

    def weights(self, part: str) -> dict[str, torch.Tensor]:
        """The state dict of a part, float32."""
        prefix = f"weights/{part}/"
        return {k.removeprefix(prefix): v.float() for k, v in self.tensors.items() if k.startswith(prefix)}

    def pipeline(self, **options: Any) -> MimicBrushPipeline:
        """The pipeline, with the released conventions unless told otherwise."""
        vae_config = self._config("vae_config")
        # The released code takes the size from its images, whatever the U-Net's config says.
        latent_size = self.size_px // 2 ** (len(vae_config["block_out_channels"]) - 1)
        unet_config = {k: v for k, v in self._config("unet_config").items() if v is not None}
        unet_config["sample_size"] = latent_size
        unet = _load(UNet2DConditionModel(**unet_config), self.weights("unet"))
        reference_unet = _load(ReferenceUNet(**{**unet_config, "in_channels": 4}), self.weights("referencenet"))
        vae_weights = self.weights("vae")
        for old, new in _VAE_NAMES.items():
            vae_weights = {key.replace(old, new): value for key, value in vae_weights.items()}
        clip_config = self._config("clip_config")
        # A config of the hub may name the type it was stored in; everything here runs in float32.
        foreign = ("transformers_version", "model_type", "architectures", "torch_dtype", "dtype", "_name_or_path")
        clip_config = {name: value for name, value in clip_config.items() if name not in foreign}
        clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**clip_config)).float()
        clip_weights = self.weights("image_encoder")
        clip_weights.pop("vision_model.embeddings.position_ids", None)  # a buffer that new versions do not keep
        projector = self.weights("image_proj")
        wide, narrow = projector["projector.weight"].shape
        guider = self.weights("depth_guider")
        downs = [guider[f"blocks.{i}.weight"] for i in range(1, sum(k.startswith("blocks.") for k in guider) // 2, 2)]
        channels = (guider["conv_in.weight"].shape[0], *(weight.shape[0] for weight in downs))
        pipe = MimicBrushPipeline(
            vae=_load(AutoencoderKL(**vae_config), vae_weights),
            unet=unet,
            reference_unet=reference_unet,
            image_encoder=_load(clip, clip_weights).eval(),
            image_projector=_load(ImageProjector(narrow, wide), projector),
            depth_estimator=toy_components(ToyModel()).depth_estimator,  # not in the file, and not asked
            depth_projector=_load(DepthProjector(guider["conv_in.weight"].shape[1], block_channels=channels), guider),
            scheduler=noise_scheduler(),
            **{**RELEASED_CONVENTIONS, "posterior": "mean", **options},
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def edit(self) -> dict[str, Any]:
        """The call that made the file."""
        values = self.tensors
        return {
            "source": values["in/source"].numpy(),
            "mask": mask_of(values["in/mask"].numpy()),
            "reference": values["in/reference"].numpy(),
            "depth_map": values["in/depth_map"],
            "latents": values["in/latents"],
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "paste_back": False,
        }

    def _config(self, name: str) -> dict[str, Any]:
        return json.loads(self.metadata[name])


def _load(module: torch.nn.Module, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    module.load_state_dict(weights)  # strict
    return module
