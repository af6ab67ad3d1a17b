"""What the editing page does, without HTTP: it takes images, checks requests, and edits."""

from __future__ import annotations

import asyncio
import gzip
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from mimicbrush.app.image_reader import ImageReader
from mimicbrush.app.session_files import SessionFiles, VisitorLimits
from mimicbrush.errors import InputError, speak_as
from mimicbrush.io.images import read_image, write_image
from mimicbrush.io.text import parse_json
from mimicbrush.ops.crops import Box, crop_box
from mimicbrush.pipelines.editing.batch import convert_memory_errors
from mimicbrush.pipelines.editing.inputs import EditInputs, read_inputs
from mimicbrush.pipelines.editing.requests import Edit, check_box, check_one_reference, check_seed
from mimicbrush.ranges import MAX_REFERENCES

if TYPE_CHECKING:
    from mimicbrush.ops.correspondence import Correspondence
    from mimicbrush.ops.reference_maps import ReferenceMaps
    from mimicbrush.pipelines import MimicBrushPipeline
    from mimicbrush.pipelines.klein.pipeline import KleinPipeline

_MAX_GUIDANCE = 30
#: Seeds that the page chooses: short enough to be noted.
_MAX_CHOSEN_SEED = 1_000_000
#: Between two previews.
_PREVIEW_S = 0.4


@dataclass(frozen=True)
class Example:
    """Images to begin with: source "RGB", mask "L" of its size, reference "RGB"."""

    title: str
    source: Image.Image
    mask: Image.Image
    reference: Image.Image
    keep_shape: bool = False


@dataclass(frozen=True)
class ReferenceChoice:
    """A reference of an edit: the token of an upload, and the part of it to imitate (None: all of it)."""

    image: str
    box: Box | None = None


@dataclass(frozen=True)
class EditRequest:
    """An edit as the page requests it; `source` and `mask` are tokens of uploads."""

    source: str
    mask: str
    references: tuple[ReferenceChoice, ...]
    steps: int
    guidance: float
    seed: int
    count: int
    keep_shape: bool
    crop: Literal["full", "auto"]
    auto_zoom: bool

    @classmethod
    def read(cls, text: str | bytes, limits: VisitorLimits) -> EditRequest:
        """Read and check a request that the browser sent.

        Args:
            text: JSON of the page; the keys are this class's attributes. A reference is an object with `image` and
                `box`, a seed of null any seed.
            limits: of what may be asked for.

        Raises:
            InputError: it is not what the page sends, or more than is allowed.
        """
        try:
            values = parse_json(text)
            source, mask, crop = (_of_type(values[name], str) for name in ("source", "mask", "crop"))
            given = [(_of_type(each["image"], str), each.get("box")) for each in _of_type(values["references"], list)]
            steps, count = (_of_type(values[name], int) for name in ("steps", "count"))
            guidance = float(_of_type(values["guidance"], (int, float)))
            keep_shape, auto_zoom = (_of_type(values[name], bool) for name in ("keep_shape", "auto_zoom"))
            chosen = values["seed"]
            seed = secrets.randbelow(_MAX_CHOSEN_SEED) if chosen is None else _of_type(chosen, int)
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
            raise InputError(f"the request is not valid ({error}); reload the page") from error
        if crop not in ("full", "auto"):
            raise InputError(f"the request is not valid (crop: {crop!r:.20}); reload the page")
        for token, what in ((source, "an image to edit"), (given and given[0][0], "a reference to imitate")):
            if not token:
                raise InputError(f"choose {what} first")
        most_of = {"steps": limits.steps, "results": limits.images, "references": MAX_REFERENCES}
        for (name, most), value in zip(most_of.items(), (steps, count, len(given)), strict=True):
            if not 1 <= value <= most:
                raise InputError(f"{name} must be in 1..{most}, got {value}")
        if not 0 <= guidance <= _MAX_GUIDANCE:
            raise InputError(f"guidance must be in 0..{_MAX_GUIDANCE}, got {guidance}")
        if auto_zoom:
            check_one_reference(len(given))
        references = tuple(ReferenceChoice(image, None if box is None else check_box(box)) for image, box in given)
        return cls(
            source, mask, references, steps, guidance, check_seed(seed), count, keep_shape,
            "auto" if crop == "auto" else "full", auto_zoom,
        )  # fmt: skip


def _of_type(value: Any, kind: Any) -> Any:
    """Return the value if it has this type; a bool is not a number."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{value!r:.20} has the wrong type")
    return value


@dataclass
class EditingService:
    """Service behind the editing page; `page_routes` shows it, and `EditQueue` calls `edit` for one after the other.

    Args:
        pipeline: edits.
        about: of the model, in a sentence or two.
        files: keeps what visitors upload and get.
        reader: reads images.
        examples: to begin with.
    """

    pipeline: MimicBrushPipeline | KleinPipeline
    about: str
    files: SessionFiles
    reader: ImageReader
    examples: Sequence[Example] = ()
    _is_closing: bool = False

    @property
    def limits(self) -> VisitorLimits:
        """Limits of what a visitor may ask for."""
        return self.files.limits

    async def upload(self, visitor: str, data: bytes) -> str:
        """Keep an image or a mask.

        Raises:
            InputError: it is none, damaged, or too large.
        """

        def write(path: Path) -> None:
            path.write_bytes(data)

        token = await asyncio.to_thread(self.files.keep, visitor, "", write)
        try:
            await self.reader.check(self.files.find(visitor, token))
        except BaseException:
            self.files.forget(token)
            raise
        return token

    def read(self, visitor: str, token: str) -> bytes:
        """Read a file's bytes as they were stored.

        Raises:
            InputError: it is not here, or another visitor's.
        """
        try:
            return self.files.find(visitor, token).read_bytes()
        except OSError as error:  # it went meanwhile
            raise self.files.missing_error() from error

    async def show(self, visitor: str, token: str) -> bytes:
        """Convert an image to JPEG, upright and in sRGB (see `ImageReader.convert`).

        Raises:
            InputError: it is not here, or another visitor's.
        """
        return await self.reader.convert(self.files.find(visitor, token))

    def close(self) -> None:
        """Stop all edits at their next step, and stop the processes that read images."""
        self._is_closing = True
        self.reader.close()

    def describe(self) -> dict[str, Any]:
        """Describe the limits, defaults and examples for the page."""
        unets = self._unets
        settings: Any = self.pipeline if unets is None else unets.config
        return {
            "about": self.about,
            "steps": settings.default_num_inference_steps,
            "guidance": settings.default_guidance_scale,
            "max_steps": self.limits.steps,
            "max_guidance": _MAX_GUIDANCE,
            "max_results": self.limits.images,
            "max_references": MAX_REFERENCES,
            "max_upload_bytes": self.limits.upload_bytes,
            "can_zoom": self.pipeline.can_record_attention,
            "can_keep_shape": unets is not None,
            "examples": [
                {"title": each.title, "keep_shape": each.keep_shape and unets is not None} for each in self.examples
            ],
        }

    @property
    def _unets(self) -> MimicBrushPipeline | None:
        """The pipeline if it is of U-Nets. FLUX.2 klein has no depth estimator, and shows no previews."""
        from mimicbrush.pipelines import MimicBrushPipeline

        return self.pipeline if isinstance(self.pipeline, MimicBrushPipeline) else None

    def check_files(self, visitor: str, request: EditRequest) -> None:
        """Check that the server has all images of a request, before the request waits.

        Raises:
            MissingFileError: one is not here, or another visitor's.
        """
        for token in (request.source, request.mask, *(each.image for each in request.references)):
            self.files.find(visitor, token)

    def edit(
        self,
        visitor: str,
        request: EditRequest,
        show: Callable[[dict[str, Any]], object],
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any] | None:
        """Edit the images of a request, one result after the other; the pipeline serves one at a time.

        Args:
            visitor: whose images they are.
            request: for what.
            show: is called with how far it is: steps `done` and `of`, `left_s` (seconds, as far as can be said), and
                sometimes a `preview`.
            is_cancelled: whether nobody wants the edit any more; it ends at its next step then.

        Returns:
            What the page shows: results and where in the references they come from. None: cancelled.

        Raises:
            InputError: images that are not here, or do not fit together; or there is not enough memory.
        """

        def must_end() -> bool:
            return self._is_closing or is_cancelled()

        with speak_as("page"), convert_memory_errors():
            if must_end():
                return None
            inputs, references = self._read(visitor, request)
            watch = self._watch(inputs, references, request, show, must_end)
            results = []
            for seed in range(request.seed, request.seed + request.count):
                image, found, zoomed = self._edit_once(inputs, references, request, seed, watch)
                if must_end():
                    return None
                places = None if found is None else self._convert_correspondence(visitor, found)
                token = self.files.keep(visitor, ".png", partial(write_image, image))
                results.append({"token": token, "seed": seed, "places": places, "zoomed": zoomed})
        return {"results": results, "width": inputs.source.width, "height": inputs.source.height}

    def _read(self, visitor: str, request: EditRequest) -> tuple[EditInputs, list[Image.Image]]:
        """The images, and all references."""
        names = ["reference", *(f"reference {number + 2}" for number in range(len(request.references) - 1))]
        tokens = {"source": request.source, "mask": request.mask}
        tokens |= dict(zip(names, (each.image for each in request.references), strict=True))
        paths = {name: self.files.find(visitor, token) for name, token in tokens.items()}
        first = Edit(
            paths["source"], paths["mask"], paths["reference"], Path("none.png"),
            reference_crop=request.references[0].box,
        )  # fmt: skip
        try:
            inputs = read_inputs(first)
            others = [read_image(paths[name], "RGB") for name in names[1:]]
            for name, image, choice in zip(names[1:], others, request.references[1:], strict=True):
                if choice.box is not None:
                    crop_box(np.asarray(image), choice.box, name)
        except InputError as error:
            message = str(error)
            for name, path in paths.items():
                message = message.replace(str(path), f"the {name}")
            raise InputError(message) from error
        return inputs, [inputs.reference, *others]

    def _watch(
        self,
        inputs: EditInputs,
        references: list[Image.Image],
        request: EditRequest,
        show: Callable[[dict[str, Any]], object],
        must_end: Callable[[], bool],
    ) -> Callable[..., dict[str, Any]]:
        """A callback of the pipeline, for all steps of all results."""
        from mimicbrush.app.previews import Preview

        of = request.steps * request.count * (2 if request.auto_zoom else 1)
        show({"done": 0, "of": of})
        unets, preview = self._unets, None
        if unets is not None:
            preview = Preview(unets, inputs.source, inputs.mask, references[0], request.crop)
        done, first_s, shown_s = 0, 0.0, 0.0

        def on_step(pipeline: Any, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal done, first_s, shown_s
            done, now = done + 1, time.monotonic()
            state: dict[str, Any] = {"done": done, "of": of}
            if done == 1:
                first_s = now  # the first step prepares much, and says little about the others
            else:
                state["left_s"] = (now - first_s) / (done - 1) * (of - done)
            if preview is not None:
                preview.follow(step, timestep, tensors["latents"])
                if now - shown_s >= _PREVIEW_S:
                    shown_s, state["preview"] = now, preview.render()
            show(state)
            if must_end():
                pipeline._interrupt = True
            return {}

        return on_step

    def _edit_once(
        self,
        inputs: EditInputs,
        references: list[Image.Image],
        request: EditRequest,
        seed: int,
        watch: Callable[..., dict[str, Any]],
    ) -> tuple[Image.Image, Correspondence | None, Box | None]:
        """Edit once: the result, where it comes from, and the part of the reference that auto-zoom chose."""
        from mimicbrush.pipelines.editing.auto_zoom import edit_zoomed
        from mimicbrush.pipelines.open_pipeline import seeded_generator

        is_one, boxes = len(references) == 1, [each.box for each in request.references]
        options: dict[str, Any] = {
            "num_inference_steps": request.steps,
            "guidance_scale": request.guidance,
            "keep_shape": request.keep_shape,
            "crop": request.crop,
            "reference_crop": boxes[0] if is_one else boxes,
            "return_correspondence": self.pipeline.can_record_attention,
            "callback_on_step_end": watch,
        }
        given: Any = references[0] if is_one else references
        result: Any
        parts: list[Any] = [None]
        if request.auto_zoom:
            result, parts = edit_zoomed(self.pipeline, inputs.source, inputs.mask, given, [seed], **options)
        else:
            generator = seeded_generator(seed)
            result = self.pipeline(inputs.source, inputs.mask, given, generator=generator, **options)
        found = result.correspondences
        return result.images[0], found[0] if found else None, None if parts[0] is None else parts[0].box

    def _convert_correspondence(self, visitor: str, correspondence: Correspondence) -> dict[str, Any]:
        """For the browser: pixels of source and references, to a tenth, which reference it is, and where maps are."""
        places = {
            "source": correspondence.source_xy.round(1).tolist(),
            "reference": correspondence.reference_xy.round(1).tolist(),
            "of": correspondence.reference_index.tolist(),
            "share": correspondence.share.round(4).tolist(),
            "source_px": float(correspondence.source_token_px),
            "reference_px": float(correspondence.reference_token_px),
        }
        maps = correspondence.maps
        if maps is not None:
            data = gzip.compress(_pack_maps(maps))

            def write(path: Path) -> None:
                path.write_bytes(data)

            places["grid"], places["boxes"] = maps.attention.shape[-1], maps.boxes.round(1).tolist()
            places["maps"] = self.files.keep(visitor, ".gz", write)
        return places


def _pack_maps(maps: ReferenceMaps) -> bytes:
    """Pack both maps as bytes, (M, r, g, g) each: 255 is the most that any cell of a place's attention has.

    Of the heads' peaks, 255 is all that the heads pay to the references.
    """
    shares = maps.head_peaks.sum(axis=(1, 2, 3), keepdims=True)
    tables = (maps.attention, maps.attention.max(axis=(1, 2, 3), keepdims=True)), (maps.head_peaks, shares)
    parts = ((255 * table / np.maximum(most, 1e-12)).round().astype(np.uint8) for table, most in tables)
    return b"".join(part.tobytes() for part in parts)
