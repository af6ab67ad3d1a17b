"""Reference-only attention: imitation without any training, from the weights of a U-Net that inpaints.

As in "reference_only" of Mikubill's sd-webui-controlnet and in the community pipeline stable_diffusion_reference of
diffusers, a U-Net reads the reference, noised to the timestep at hand with new noise at each step, and the hidden
states that enter its self-attention are attended to beside the own ones.

Differs from those in four points. References are read in the mid and up blocks alone, where this project's method reads
them, not in every block. The unconditional half sees no reference ("style fidelity" 1, theirs is 0.5), so guidance
strengthens the reference; there is no prompt. The group-norm statistics of the reference are not taken over (their
"adain"). And the U-Net that reads the reference is a plain one, while the one that paints inpaints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from mimicbrush.errors import InputError, WeightsError
from mimicbrush.evaluation.benchmark.layout import Case
from mimicbrush.evaluation.editors.mimicbrush import describe_editor, resize_to_source
from mimicbrush.evaluation.editors.protocol import CaseEditor, CaseInputs, CaseResult
from mimicbrush.models.attention_recorder import CorrespondenceRecorder
from mimicbrush.models.encoders import decode_latents, encode_latents
from mimicbrush.models.library_logs import quiet_libraries
from mimicbrush.models.options import vae_scale_factor
from mimicbrush.models.reference_attention import set_reference_processors
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.models.unets import LATENT_CHANNELS, ReferenceUNet
from mimicbrush.ops.canvas import IMAGE_FILL, letterbox, letterbox_mask, to_tensor, to_uint8
from mimicbrush.ops.correspondence import Correspondence
from mimicbrush.ops.counter_rng import mix
from mimicbrush.ops.crops import Placement
from mimicbrush.pipelines.loading import default_dtype, open_pipeline, seeded_generator
from mimicbrush.types import ReferenceStates

#: As for the method itself (paper Sec. 4.1).
REFERENCE_ONLY_STEPS, GUIDANCE = 50, 5.0

#: (1, 3, S, S) source in [-1, 1], (1, 1, S, S) mask, whether to keep the shape, seed -> (1, n, h, w) beside the latent.
MakeStem = Callable[[torch.Tensor, torch.Tensor, bool, int], torch.Tensor]


@dataclass(frozen=True)
class ReferenceOnlyNetworks:
    """What reference-only attention is made of.

    Attributes:
        vae, unet, reference_unet, scheduler: on one device; the U-Net reads references.
        context: (1, N, D) that says nothing, for both U-Nets.
        make_stem: the channels beside the noisy latent.
        order: see `letterbox`.
    """

    vae: Any
    unet: UNet2DConditionModel
    reference_unet: ReferenceUNet
    scheduler: DDIMScheduler
    context: torch.Tensor
    make_stem: MakeStem
    order: str = "resize_then_pad"

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent, along a side."""
        return vae_scale_factor(self.vae.config)

    @property
    def size_px(self) -> int:
        """Side of the canvas."""
        return int(self.unet.config.sample_size) * self.vae_scale_factor


class ReferenceOnlyEditor:
    """See the module, and `CaseEditor`.

    Args:
        name: of the editor.
        networks: what it is made of.
        about: for the metric card.
        num_inference_steps: of the sampler.
        guidance_scale: how far to go from "no reference" to the reference and beyond; 1 or less: just the reference.
    """

    def __init__(
        self,
        name: str,
        networks: ReferenceOnlyNetworks,
        about: dict[str, str],
        num_inference_steps: int = REFERENCE_ONLY_STEPS,
        guidance_scale: float = GUIDANCE,
    ) -> None:
        self.name, self.networks = name, networks
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale
        self.about = (
            describe_editor(
                editor="reference-only attention, nothing trained",
                steps=num_inference_steps,
                guidance=guidance_scale,
                size_px=networks.size_px,
                reference="noised to the timestep at hand; read in the mid and up blocks",
                dtype=networks.unet.dtype,
            )
            | about
        )

    @torch.no_grad()
    def __call__(self, case: Case, inputs: CaseInputs) -> CaseResult:
        """See `CaseEditor`."""
        net, device = self.networks, self.networks.unet.device
        pixels, reference_px = (self._canvas(image) for image in (inputs.source, inputs.reference))
        mask = letterbox_mask(np.asarray(inputs.mask), net.size_px, net.order)
        step = net.vae_scale_factor
        if not mask[::step, ::step].any():  # all that the latents' mask sees
            raise InputError(f"the mask is too thin: nothing is left of it at {net.size_px} px, {step} px to a latent")
        mask_px = torch.from_numpy(mask)[None, None].float().to(device)  # (1, 1, S, S)
        stem = net.make_stem(pixels, mask_px, inputs.keep_shape, inputs.seed)  # (1, 5 or 9, h, w)
        clean = encode_latents(net.vae, reference_px, None).to(net.unet.dtype)  # (1, 4, h, w)
        record = CorrespondenceRecorder(F.interpolate(mask_px, size=stem.shape[-2:]))
        latents = self._denoise(stem, clean, record, inputs.seed)
        square = Image.fromarray(to_uint8(decode_latents(net.vae, latents))[0])
        found = record.attention()
        placements = [Placement((0, 0, *image.size), net.size_px) for image in (inputs.source, inputs.reference)]
        tokens, attention = (value.cpu().numpy() for value in found[0])
        return CaseResult(
            resize_to_source(square, inputs.source), Correspondence.from_attention(tokens, attention, *placements)
        )

    def _denoise(
        self, stem: torch.Tensor, clean: torch.Tensor, record: CorrespondenceRecorder, seed: int
    ) -> torch.Tensor:
        net, guided = self.networks, self.guidance_scale > 1
        rows = 2 if guided else 1  # [without reference, with it]
        net.scheduler.set_timesteps(self.num_inference_steps, device=clean.device)
        start, renoise = seeded_generator(seed), seeded_generator(mix(seed, 1))  # on the CPU: the same on every device
        latents = torch.randn(clean.shape, generator=start).to(clean) * net.scheduler.init_noise_sigma
        context, stems = net.context.expand(rows, -1, -1), stem.expand(rows, -1, -1, -1)
        for timestep in net.scheduler.timesteps:
            noise = torch.randn(clean.shape, generator=renoise).to(clean)
            noisy = net.scheduler.add_noise(clean, noise, timestep[None])  # (1, 4, h, w)
            states = ReferenceStates()
            net.reference_unet(noisy, timestep, net.context, cross_attention_kwargs={"reference_states": states})
            states.record = record
            sample = torch.cat([latents.expand(rows, -1, -1, -1), stems], dim=1)
            predicted = net.unet(
                sample, timestep, context, cross_attention_kwargs={"reference_states": states}, return_dict=False
            )[0]
            if guided:
                without, with_reference = predicted.chunk(2)
                predicted = without + self.guidance_scale * (with_reference - without)
            latents = net.scheduler.step(predicted, timestep, latents, return_dict=False)[0]
        if not latents.isfinite().all():
            raise WeightsError(f"{self.name}: the result is not finite; these weights are no good in {clean.dtype}")
        return latents

    def _canvas(self, image: Image.Image) -> torch.Tensor:
        square = letterbox(np.asarray(image), self.networks.size_px, IMAGE_FILL, self.networks.order)
        return to_tensor(square[None]).to(self.networks.unet.device)


def open_reference_only_of_pipeline(
    name: str, folder: Path, device: str, num_inference_steps: int | None, guidance_scale: float | None
) -> CaseEditor:
    """Reference-only attention on the imitative U-Net of a pipeline, see `editors.open_editor`.

    Its own reference U-Net and its image tokens are left out; depth is used as in the pipeline.
    """
    pipeline: Any = open_pipeline(folder, device)
    with torch.no_grad():
        context = pipeline.no_reference_context()

    def make_stem(source: torch.Tensor, mask: torch.Tensor, keep_shape: bool, seed: int) -> torch.Tensor:
        stem: torch.Tensor = pipeline.prepare_cond_latents(
            source, mask, keep_shape, None, [seeded_generator(mix(seed, 2))]
        )
        return stem

    networks = ReferenceOnlyNetworks(
        vae=pipeline.vae,
        unet=pipeline.unet,
        reference_unet=ReferenceUNet.from_unet(pipeline.unet).eval(),
        scheduler=pipeline.scheduler,
        context=context,
        make_stem=make_stem,
        order=pipeline.config.letterbox_order,
    )
    about = {
        "weights": f"{folder}: its imitative U-Net, which also reads the reference; its reference U-Net is not used",
        "depth": "as the pipeline has it",
        "blend": str(pipeline.config.reference_blend),
        "context": "that of no reference",
    }
    steps = num_inference_steps or pipeline.config.default_num_inference_steps
    guidance = pipeline.config.default_guidance_scale if guidance_scale is None else guidance_scale
    return ReferenceOnlyEditor(name, networks, about, steps, guidance)


def open_reference_only_of_sd(
    name: str,
    inpainting: Path,
    stable_diffusion: Path,
    device: str,
    num_inference_steps: int | None,
    guidance_scale: float | None,
) -> CaseEditor:
    """Reference-only attention of SD-1.5 inpainting to SD-1.5, both as they are, see `editors.open_editor`."""
    quiet_libraries()
    target, half = _device(device), default_dtype(device)
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "dtype": half}
    try:
        unet = UNet2DConditionModel.from_pretrained(inpainting, subfolder="unet", **options)
        stock = UNet2DConditionModel.from_pretrained(stable_diffusion, subfolder="unet", **options)
        vae = AutoencoderKL.from_pretrained(inpainting, subfolder="vae", **options)
        text_encoder = CLIPTextModel.from_pretrained(inpainting, subfolder="text_encoder", **options)
        tokenizer = CLIPTokenizer.from_pretrained(inpainting, subfolder="tokenizer", local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(
            f"{inpainting} and {stable_diffusion} cannot be loaded; only .safetensors are read: {error}"
        ) from error
    if (unet.config.in_channels, stock.config.in_channels) != (2 * LATENT_CHANNELS + 1, LATENT_CHANNELS):
        raise WeightsError(
            f"the U-Nets of {inpainting} and {stable_diffusion} take {unet.config.in_channels} and "
            f"{stock.config.in_channels} channels, expected 9 and 4"
        )
    reference_unet = ReferenceUNet.from_unet(stock).to(target).eval()
    unet, vae, text_encoder = unet.to(target), vae.to(target), text_encoder.to(target)
    set_reference_processors(unet, 1.0)
    tokens = tokenizer("", padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
    with torch.no_grad():
        context = text_encoder(tokens.to(target)).last_hidden_state  # (1, 77, D)

    def make_stem(source: torch.Tensor, mask: torch.Tensor, keep_shape: bool, seed: int) -> torch.Tensor:
        # The hole is grey (0), as in SD inpainting. There is no depth: the shape cannot be kept.
        hole = encode_latents(vae, source * (1 - mask), None)
        return torch.cat([F.interpolate(mask, size=hole.shape[-2:]).to(hole), hole], dim=1).to(half)

    networks = ReferenceOnlyNetworks(vae, unet, reference_unet, noise_scheduler(), context, make_stem)
    about = {
        "weights": f"{inpainting}, read by {stable_diffusion}",
        "depth": "none: the shape is not kept",
        "blend": "1.0",
        "context": "the empty prompt",
    }
    guidance = GUIDANCE if guidance_scale is None else guidance_scale
    return ReferenceOnlyEditor(name, networks, about, num_inference_steps or REFERENCE_ONLY_STEPS, guidance)


def _device(device: str) -> torch.device:
    available = torch.cuda.is_available()
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not available):
        raise InputError(f"the device must be auto or cpu, or cuda where PyTorch sees one; got {device!r}")
    return torch.device("cuda" if device != "cpu" and available else "cpu")
