"""Paint-by-Example, and SD inpainting with an IP-Adapter: pipelines of diffusers as editors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    PaintByExamplePipeline,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder
from PIL import Image
from transformers import CLIPImageProcessor

from mimicbrush.errors import InputError, WeightsError
from mimicbrush.evaluation.benchmark.layout import Case
from mimicbrush.evaluation.editors.mimicbrush import describe_editor, reference_box, resize_to_source
from mimicbrush.evaluation.editors.protocol import CaseInputs, CaseOnlyEditor, CaseResult, EditorOptions
from mimicbrush.evaluation.editors.weights import IP_ADAPTER_FILE, IP_ADAPTER_FOLDER
from mimicbrush.models.library_logs import quiet_libraries
from mimicbrush.models.pretrained.files import read_object
from mimicbrush.ops.canvas import IMAGE_FILL, letterbox, letterbox_mask
from mimicbrush.pipelines.open_pipeline import default_dtype, move_to_device, seeded_generator

DIFFUSERS_STEPS = 50
#: What the authors of each run it with.
PAINT_BY_EXAMPLE_GUIDANCE, IP_ADAPTER_GUIDANCE = 5.0, 7.5
#: How much the adapter's attention counts; 1.0 is what its authors take where there is no prompt beside the image.
IP_ADAPTER_SCALE = 1.0
_PREPARED = "letterboxed onto a white square (their authors stretch), result cropped back; no safety checker"


class DiffusersEditor(CaseOnlyEditor):
    """A pipeline of diffusers that inpaints a square with an example; see `Editor`.

    Args:
        name: of the editor.
        pipeline: on its device.
        paint: called with source and mask on its canvas, the example and the generator; returns the image.
        example: called with a case and its reference; the image to imitate.
        about: for the metric card.
    """

    def __init__(
        self,
        name: str,
        pipeline: DiffusionPipeline,
        paint: Callable[[Image.Image, Image.Image, Image.Image, torch.Generator], Image.Image],
        example: Callable[[Case, Image.Image], Image.Image],
        about: dict[str, str],
    ) -> None:
        self.name, self.about, self.pipeline = name, about, pipeline
        self._paint, self._example = paint, example

    @property
    def size_px(self) -> int:
        """Side of its square canvas."""
        return int(self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor)

    def edit_case(self, case: Case, inputs: CaseInputs) -> CaseResult:
        """Edit one benchmark case, see `Editor`.

        Raises:
            InputError: nothing of the mask is left on the canvas, or the reference has no usable box.
        """
        source = letterbox(np.asarray(inputs.source), self.size_px, IMAGE_FILL)
        mask = letterbox_mask(np.asarray(inputs.mask), self.size_px)
        if not mask.any():
            raise InputError(f"the mask is too thin: nothing of it is left at {self.size_px} px")
        example = self._example(case, inputs.reference)
        square = self._paint(
            Image.fromarray(source), Image.fromarray(mask * np.uint8(255)), example, seeded_generator(inputs.seed)
        )
        return CaseResult(resize_to_source(square, inputs.source))


def use_whole_reference(case: Case, reference: Image.Image) -> Image.Image:
    """Return the reference as it is."""
    return reference


def crop_to_reference_box(case: Case, reference: Image.Image) -> Image.Image:
    """Cut out the box around the reference's mask; raises as `reference_box` does."""
    return reference.crop(reference_box(case, reference.size))


def open_paint_by_example(name: str, folder: Path, with_box: bool, options: EditorOptions) -> DiffusersEditor:
    """Load Paint-by-Example (Yang et al. 2023), see `registry.open_editor`."""
    dtype = options.dtype or default_dtype(options.device)
    pipeline = _load(lambda: _load_paint_by_example(folder, dtype), folder, options.device)
    steps = options.num_inference_steps or DIFFUSERS_STEPS
    guidance = PAINT_BY_EXAMPLE_GUIDANCE if options.guidance_scale is None else options.guidance_scale
    side = pipeline.image_encoder.config.image_size

    def paint(source: Image.Image, mask: Image.Image, example: Image.Image, generator: torch.Generator) -> Image.Image:
        # Stretched to a square, as its authors do: the processor itself would cut off what is beyond a square.
        result: Image.Image = pipeline(
            example_image=example.resize((side, side), Image.Resampling.BICUBIC),
            image=source,
            mask_image=mask,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generator,
        ).images[0]
        return result

    about = describe_editor(
        editor="Paint-by-Example (diffusers PaintByExamplePipeline)",
        weights=folder,
        example="the box around the reference's mask" if with_box else "the whole reference",
        example_px=f"stretched to {side} x {side}",
        images=_PREPARED,
        steps=steps,
        guidance=guidance,
        scheduler=type(pipeline.scheduler).__name__,
        dtype=pipeline.unet.dtype,
    )
    return DiffusersEditor(name, pipeline, paint, crop_to_reference_box if with_box else use_whole_reference, about)


def _load_paint_by_example(folder: Path, dtype: torch.dtype) -> PaintByExamplePipeline:
    """Load it part by part: its index names a module that diffusers has moved since, and would not find."""
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "dtype": dtype}
    scheduler = read_object(folder / "model_index.json").get("scheduler")
    if not (isinstance(scheduler, list) and hasattr(diffusers, str(scheduler[-1]))):
        raise WeightsError(
            f"{folder / 'model_index.json'} has the scheduler {scheduler}, which diffusers does not have"
        )
    return PaintByExamplePipeline(
        vae=AutoencoderKL.from_pretrained(folder, subfolder="vae", **options),
        image_encoder=PaintByExampleImageEncoder.from_pretrained(folder / "image_encoder", **options).eval(),
        unet=UNet2DConditionModel.from_pretrained(folder, subfolder="unet", **options),
        scheduler=getattr(diffusers, scheduler[-1]).from_pretrained(folder, subfolder="scheduler"),
        safety_checker=None,
        feature_extractor=CLIPImageProcessor.from_pretrained(folder / "feature_extractor", local_files_only=True),
    )


def open_ip_adapter(
    name: str,
    inpainting: Path,
    adapter: Path,
    options: EditorOptions,
    scale: float = IP_ADAPTER_SCALE,
) -> DiffusersEditor:
    """Load SD-1.5 inpainting with an IP-Adapter (Ye et al. 2023), see `registry.open_editor`."""

    def load() -> Any:
        pipeline = StableDiffusionInpaintPipeline.from_pretrained(
            inpainting,
            safety_checker=None,
            requires_safety_checker=False,
            local_files_only=True,
            use_safetensors=True,
            dtype=options.dtype or default_dtype(options.device),
        )
        pipeline.load_ip_adapter(
            str(adapter), subfolder=IP_ADAPTER_FOLDER, weight_name=IP_ADAPTER_FILE, local_files_only=True
        )
        pipeline.set_ip_adapter_scale(scale)
        return pipeline

    pipeline = _load(load, inpainting, options.device)
    steps = options.num_inference_steps or DIFFUSERS_STEPS
    guidance = IP_ADAPTER_GUIDANCE if options.guidance_scale is None else options.guidance_scale

    def paint(source: Image.Image, mask: Image.Image, example: Image.Image, generator: torch.Generator) -> Image.Image:
        result: Image.Image = pipeline(
            prompt="",
            image=source,
            mask_image=mask,
            ip_adapter_image=example,
            height=source.height,
            width=source.width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generator,
        ).images[0]
        return result

    about = describe_editor(
        editor="SD-1.5 inpainting with an IP-Adapter (diffusers)",
        weights=inpainting,
        adapter=adapter / IP_ADAPTER_FOLDER / IP_ADAPTER_FILE,
        adapter_scale=scale,
        prompt="empty",
        images=_PREPARED,
        steps=steps,
        guidance=guidance,
        scheduler=type(pipeline.scheduler).__name__,
        dtype=pipeline.unet.dtype,
    )
    return DiffusersEditor(name, pipeline, paint, use_whole_reference, about)


def _load(load: Callable[[], Any], folder: Path, device: str) -> Any:
    quiet_libraries()
    try:
        pipeline = load()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise WeightsError(f"{folder} cannot be loaded (only .safetensors are read): {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return move_to_device(pipeline, device)
