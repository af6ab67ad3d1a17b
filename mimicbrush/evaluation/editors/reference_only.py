"""Reference-only attention: imitation without any training, from the weights of a U-Net that inpaints.

As in "reference_only" of Mikubill's sd-webui-controlnet and in the community pipeline stable_diffusion_reference of
diffusers, a U-Net reads the reference, noised to the current timestep with new noise at each step. The hidden states
that enter its self-attention are attended to beside the own ones.

Differs from those in four points. References are read in the mid and up blocks alone, where this project's method reads
them, not in every block. The unconditional half sees no reference ("style fidelity" 1, theirs is 0.5), so guidance
strengthens the reference; there is no prompt. The group-norm statistics of the reference are not taken over (their
"adain"). And the U-Net that reads the reference is a plain one, while the one that paints inpaints.

The sampler is the pipeline's: `ReferenceOnlyPipeline` changes what is read of a reference, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from mimicbrush.errors import WeightsError
from mimicbrush.evaluation.benchmark.layout import Case
from mimicbrush.evaluation.editors.mimicbrush import describe_editor, load_for_editor, resize_to_source
from mimicbrush.evaluation.editors.protocol import CaseInputs, CaseOnlyEditor, CaseResult, EditorOptions
from mimicbrush.models.encoders import encode_latents
from mimicbrush.models.library_logs import quiet_libraries
from mimicbrush.models.options import ModelOptions
from mimicbrush.models.reference_attention import project_references
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.models.unets import LATENT_CHANNELS, ReferenceUNet
from mimicbrush.ops.counter_rng import mix
from mimicbrush.ops.crops import Placement
from mimicbrush.pipelines import MimicBrushPipeline
from mimicbrush.pipelines.open_pipeline import default_dtype, move_to_device, seeded_generator
from mimicbrush.pipelines.prepared import KeysValuesByPath, PreparedReference
from mimicbrush.types import ReferenceStates

#: As for the method itself (paper Sec. 4.1).
REFERENCE_ONLY_STEPS, GUIDANCE = 50, 5.0
#: The options of a pipeline that reference-only attention takes over.
_KEPT_OPTIONS = ("reference_blend", "depth_convention", "no_depth_convention", "letterbox_order", "posterior")


@dataclass(frozen=True)
class NoisedReference(PreparedReference):
    """A reference whose clean latents get new noise at each step.

    Attributes:
        noise_seed: of that noise.
    """

    noise_seed: int = 0


class ReferenceOnlyPipeline(MimicBrushPipeline):
    """The pipeline with another reading of the reference: noised to the current timestep, without image tokens.

    Whoever makes one sets `empty_context`.

    Attributes:
        empty_context: (1, N, D), the context that says nothing, for both U-Nets.
    """

    empty_context: torch.Tensor

    def no_reference_context(self) -> torch.Tensor:
        """Return the context of "no reference", (1, N, D); a reference has the same."""
        return self.empty_context

    def encode_references(self, pixels: torch.Tensor, placements: list[Placement], generator: Any) -> NoisedReference:
        """Encode references (R, 3, S, S) in [-1, 1] as the posterior's mean; nothing is random here."""
        latents = encode_latents(self.vae, pixels, None).to(self.unet.dtype)  # (R, 4, h, w)
        context = self.empty_context.expand(len(latents), -1, -1)  # (R, N, D)
        return NoisedReference(latents, context, placements, self._settings(pixels.device))

    def compute_reference_kv(
        self, prepared: PreparedReference | None, timesteps: torch.Tensor, batch_size: int
    ) -> Iterator[KeysValuesByPath]:
        """Yield keys and values of the references at each timestep, see the base class; one timestep in a pass."""
        if not isinstance(prepared, NoisedReference):
            yield from super().compute_reference_kv(None, timesteps, batch_size)
            return
        clean = prepared.latents
        generator = seeded_generator(prepared.noise_seed)  # on the CPU: the same on every device
        for timestep in timesteps:
            noise = torch.randn(clean.shape, generator=generator).to(clean)
            noisy = self.scheduler.add_noise(clean, noise, timestep[None])  # (R, 4, h, w)
            states = ReferenceStates()
            self.reference_unet(noisy, timestep, prepared.context, cross_attention_kwargs={"reference_states": states})
            yield project_references(self.unet, states.features)


class StableDiffusionReferenceOnlyPipeline(ReferenceOnlyPipeline):
    """Reference-only attention of SD-1.5 inpainting: nine channels, and no image encoder and no depth."""

    def options(self) -> ModelOptions:
        """Return what an image encoder and a depth projector would tell, if there were any: the defaults."""
        return ModelOptions(size_px=self.size_px, letterbox_order=self.config.letterbox_order)

    def prepare_cond_latents(
        self, source: torch.Tensor, mask: torch.Tensor, keep_shape: bool, depth_map: Any, generator: Any
    ) -> torch.Tensor:
        """Encode the five channels beside the noisy latent: mask 1, masked source 4 -> (B, 5, h, w).

        Masked pixels are grey (0), as in SD inpainting. There is no depth: the shape cannot be kept.
        """
        latents = encode_latents(self.vae, source * (1 - mask), None)  # (B, 4, h, w)
        latent_mask = F.interpolate(mask, size=latents.shape[-2:])
        return torch.cat([latent_mask.to(latents), latents], dim=1).to(self.unet.dtype)


class ReferenceOnlyEditor(CaseOnlyEditor):
    """Reference-only attention as an editor, see the module and `Editor`.

    Args:
        name: of the editor.
        pipeline: on its device.
        about: for the metric card.
        num_inference_steps: of the sampler.
        guidance_scale: how far to go from "no reference" to the reference and beyond; 1 or less: just the reference.
    """

    def __init__(
        self,
        name: str,
        pipeline: ReferenceOnlyPipeline,
        about: dict[str, str],
        num_inference_steps: int = REFERENCE_ONLY_STEPS,
        guidance_scale: float = GUIDANCE,
    ) -> None:
        self.name, self.pipeline = name, pipeline
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale
        self.about = (
            describe_editor(
                editor="reference-only attention, nothing trained",
                steps=num_inference_steps,
                guidance=guidance_scale,
                size_px=pipeline.size_px,
                reference="noised to the current timestep; read in the mid and up blocks",
                dtype=pipeline.unet.dtype,
            )
            | about
        )

    @property
    def size_px(self) -> int:
        """Side of its square canvas."""
        return self.pipeline.size_px

    def edit_case(self, case: Case, inputs: CaseInputs) -> CaseResult:
        """Edit one benchmark case, see `Editor`.

        Raises:
            InputError: nothing of the mask is left on the canvas.
            MimicBrushError: the result is not finite.
        """
        reference = self.pipeline.prepare_reference(inputs.reference)
        assert isinstance(reference, NoisedReference)
        side = self.pipeline.unet.config.sample_size
        output: Any = self.pipeline(
            inputs.source,
            inputs.mask,
            replace(reference, noise_seed=mix(inputs.seed, 1)),
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            keep_shape=inputs.keep_shape,
            generator=seeded_generator(mix(inputs.seed, 2)),  # of the source's posterior
            latents=torch.randn((1, LATENT_CHANNELS, side, side), generator=seeded_generator(inputs.seed)),
            paste_back=False,
            return_correspondence=True,
        )
        return CaseResult(resize_to_source(output.images[0], inputs.source), output.correspondences[0])


def open_reference_only_of_pipeline(name: str, folder: Path, options: EditorOptions) -> ReferenceOnlyEditor:
    """Open reference-only attention on the imitative U-Net of a pipeline, see `registry.open_editor`.

    Its own reference U-Net and its image tokens are left out; depth is used as in the pipeline.
    """
    trained = load_for_editor(folder, options)
    networks = {**trained.components, "reference_unet": ReferenceUNet.from_unet(trained.unet).eval()}
    pipeline = ReferenceOnlyPipeline(**networks, **{option: trained.config[option] for option in _KEPT_OPTIONS})
    with torch.no_grad():
        pipeline.empty_context = trained.no_reference_context()
    pipeline.set_progress_bar_config(disable=True)
    about = {
        "weights": f"{folder}: its imitative U-Net, which also reads the reference; its reference U-Net is not used",
        "depth": "as the pipeline has it",
        "blend": str(trained.config.reference_blend),
        "context": "that of no reference",
    }
    steps = options.num_inference_steps or trained.config.default_num_inference_steps
    guidance = trained.config.default_guidance_scale if options.guidance_scale is None else options.guidance_scale
    return ReferenceOnlyEditor(name, pipeline, about, steps, guidance)


def open_reference_only_of_sd(
    name: str, inpainting: Path, stable_diffusion: Path, options: EditorOptions
) -> ReferenceOnlyEditor:
    """Open reference-only attention of SD-1.5 inpainting to SD-1.5, both as they are, see `registry.open_editor`."""
    quiet_libraries()
    dtype = options.dtype or default_dtype(options.device)
    loading: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "dtype": dtype}
    try:
        unet = UNet2DConditionModel.from_pretrained(inpainting, subfolder="unet", **loading)
        stock = UNet2DConditionModel.from_pretrained(stable_diffusion, subfolder="unet", **loading)
        vae = AutoencoderKL.from_pretrained(inpainting, subfolder="vae", **loading)
        text_encoder = CLIPTextModel.from_pretrained(inpainting, subfolder="text_encoder", **loading)
        tokenizer = CLIPTokenizer.from_pretrained(inpainting, subfolder="tokenizer", local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(
            f"{inpainting} and {stable_diffusion} cannot be loaded (only .safetensors are read): {error}"
        ) from error
    if (unet.config.in_channels, stock.config.in_channels) != (2 * LATENT_CHANNELS + 1, LATENT_CHANNELS):
        raise WeightsError(
            f"the U-Nets of {inpainting} and {stable_diffusion} take {unet.config.in_channels} and "
            f"{stock.config.in_channels} channels, expected 9 and 4"
        )
    absent: dict[str, Any] = dict.fromkeys(("image_encoder", "image_projector", "depth_estimator", "depth_projector"))
    reference_unet, scheduler = ReferenceUNet.from_unet(stock).eval(), noise_scheduler()
    pipeline = StableDiffusionReferenceOnlyPipeline(vae, unet, reference_unet, scheduler=scheduler, **absent)
    pipeline = move_to_device(pipeline, options.device)
    pipeline.set_progress_bar_config(disable=True)
    tokens = tokenizer("", padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
    with torch.no_grad():
        states = text_encoder.to(pipeline.device)(tokens.to(pipeline.device)).last_hidden_state  # (1, 77, D)
    pipeline.empty_context = states
    about = {
        "weights": f"{inpainting}, read by {stable_diffusion}",
        "depth": "none: the shape is not kept",
        "blend": "1.0",
        "context": "the empty prompt",
    }
    steps = options.num_inference_steps or REFERENCE_ONLY_STEPS
    guidance = GUIDANCE if options.guidance_scale is None else options.guidance_scale
    return ReferenceOnlyEditor(name, pipeline, about, steps, guidance)
