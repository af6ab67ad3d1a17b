"""What the editing page does, without gradio and HTTP: it takes images, checks requests, and edits."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from mimicbrush.app.image_reader import ImageReader
from mimicbrush.app.session_files import SessionFiles, VisitorLimits
from mimicbrush.errors import InputError, speak_as
from mimicbrush.io.images import read_image, write_image
from mimicbrush.io.text import parse_json
from mimicbrush.pipelines.editing.batch import convert_memory_errors
from mimicbrush.pipelines.editing.inputs import EditInputs, read_inputs
from mimicbrush.pipelines.editing.requests import Edit, check_box, check_seed
from mimicbrush.ranges import REFERENCES_RANGE

if TYPE_CHECKING:
    from mimicbrush.ops.correspondence import Correspondence
    from mimicbrush.pipelines import MimicBrushPipeline


#: How the image is repainted, as the page names it.
WHOLE_IMAGE, AROUND_THE_MASK = "whole image", "around the mask"
_MAX_GUIDANCE = 30
#: Seeds that the page chooses: short enough to be noted.
_MAX_CHOSEN_SEED = 1_000_000
_MAX_CANCELLED, _MAX_CANCELLED_OF_ONE, _MAX_JOB = 1000, 10, 80


@dataclass(frozen=True)
class Example:
    """Images to begin with: source "RGB", mask "L" of its size, reference "RGB"."""

    title: str
    source: Image.Image
    mask: Image.Image
    reference: Image.Image
    keep_shape: bool = False


@dataclass(frozen=True)
class EditRequest:
    """An edit as the page asks for it; `other_references` are uploads, too, and `reference_crop` is of the first."""

    job: str
    source: str
    mask: str
    reference: str
    reference_crop: tuple[int, int, int, int] | None
    steps: int
    guidance: float
    seed: int
    count: int
    keep_shape: bool
    crop: Literal["full", "auto"]
    other_references: tuple[str, ...] = ()

    @classmethod
    def read(
        cls, text: str, limits: VisitorLimits, *, steps: float, guidance: float, seed: float | None,
        count: float, keep_shape: bool, crop: str,
    ) -> EditRequest:  # fmt: skip
        """Read and check a request that the browser sent.

        Args:
            text: JSON of the page: names of uploads, the box, the number of the job.
            limits: of what may be asked for.
            steps, guidance, seed, count, keep_shape, crop: of the controls. A seed of None: any.

        Raises:
            InputError: it is not what the page sends, or more than is allowed.
        """
        try:
            values = parse_json(text or "{}")
            trouble, box = str(values.get("trouble") or ""), values.get("reference_crop")
            job, source, mask, reference = (
                str(values.get(name) or "") for name in ("job", "source", "mask", "reference")
            )
            others = tuple(str(each) for each in values.get("other_references") or ())
            seed = secrets.randbelow(_MAX_CHOSEN_SEED) if seed is None else int(seed)
            steps, count, guidance = int(steps), int(count), float(guidance)
        except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
            raise InputError(f"this is not what the page sends ({error}); load it again") from error
        if trouble:
            raise InputError(trouble)
        for token, what in ((source, "an image to edit"), (reference, "a reference to imitate")):
            if not token:
                raise InputError(f"choose {what} first")
        REFERENCES_RANGE.check("references", 1 + len(others))
        for name, value, most in (("steps", steps, limits.steps), ("results", count, limits.images)):
            if not 1 <= value <= most:
                raise InputError(f"{name}: must be in 1..{most}, got {value}")
        if not 0 <= guidance <= _MAX_GUIDANCE:
            raise InputError(f"guidance: must be in 0..{_MAX_GUIDANCE}, got {guidance}")
        return cls(
            job=job[:_MAX_JOB],
            source=source,
            mask=mask,
            reference=reference,
            reference_crop=None if box is None else check_box(box),
            steps=steps,
            guidance=guidance,
            seed=check_seed(seed),
            count=count,
            keep_shape=keep_shape,
            crop="auto" if crop == AROUND_THE_MASK else "full",
            other_references=others,
        )


@dataclass
class EditingService:
    """Service behind the editing page; `editing_page.build_app` shows it.

    Args:
        pipeline: edits.
        about: of the model, in a sentence or two.
        files: keeps what visitors upload and get.
        reader: reads images.
        examples: to begin with.
    """

    pipeline: MimicBrushPipeline
    about: str
    files: SessionFiles
    reader: ImageReader
    examples: Sequence[Example] = ()
    _cancelled: dict[tuple[str, str], None] = field(default_factory=dict)  # visitor and job, oldest first
    _cancelling: threading.Lock = field(default_factory=threading.Lock)
    _editing: threading.Lock = field(default_factory=threading.Lock)
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
        """Convert an image to JPEG as it will be read (see `ImageReader.convert`).

        Raises:
            InputError: it is not here, or another visitor's.
        """
        return await self.reader.convert(self.files.find(visitor, token))

    def close(self) -> None:
        """End all edits at their next step, and the processes that read images."""
        self._is_closing = True
        self.reader.close()

    def cancel(self, visitor: str, job: str) -> None:
        """Cancel a visitor's edit, whether it runs or waits: it ends at its next step."""
        with self._cancelling:
            self._cancelled[visitor, job[:_MAX_JOB]] = None
            mine = [key for key in self._cancelled if key[0] == visitor]
            # Of edits that never came, or were done before.
            for key in {*mine[:-_MAX_CANCELLED_OF_ONE], *list(self._cancelled)[:-_MAX_CANCELLED]}:
                del self._cancelled[key]

    def edit(
        self,
        visitor: str,
        request: EditRequest,
        progress: Callable[[int, int], None],
        has_left: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any] | None:
        """Edit the images of a request, one result after the other.

        Args:
            visitor: whose images they are.
            request: for what.
            progress: is called with the number of steps done, and of all.
            has_left: whether nobody waits for the edit any more; it ends at its next step then.

        Returns:
            What the page shows: results and where in the reference they come from. None: cancelled.

        Raises:
            InputError: images that are not here, or do not fit together; or there is not enough memory.
        """
        key = visitor, request.job

        def is_cancelled() -> bool:
            return key in self._cancelled or self._is_closing or has_left()

        with self._editing, speak_as("page"), convert_memory_errors():  # the pipeline serves one at a time
            if is_cancelled():
                return None
            inputs = self._read(visitor, request)
            others = [read_image(self.files.find(visitor, token), "RGB") for token in request.other_references]
            results = []
            for number in range(request.count):
                image, places = self._edit_once(inputs, others, request, number, progress, is_cancelled)
                if is_cancelled():
                    return None
                token = self.files.keep(visitor, ".png", partial(write_image, image))
                results.append({"token": token, "seed": request.seed + number, "places": places})
        size = {"width": inputs.source.width, "height": inputs.source.height}
        references = [request.reference, *request.other_references]
        return {"results": results, "source": request.source, "references": references, **size}

    def _read(self, visitor: str, request: EditRequest) -> EditInputs:
        paths = {name: self.files.find(visitor, getattr(request, name)) for name in ("source", "mask", "reference")}
        edit = Edit(
            **paths, output=Path("none.png"), seed=request.seed, keep_shape=request.keep_shape,
            reference_crop=request.reference_crop,
        )  # fmt: skip
        try:
            return read_inputs(edit)
        except InputError as error:
            message = str(error)
            for name, path in paths.items():
                message = message.replace(str(path), f"the {name}")
            raise InputError(message) from error

    def _edit_once(
        self,
        inputs: EditInputs,
        others: list[Image.Image],
        request: EditRequest,
        number: int,
        progress: Callable[[int, int], None],
        is_cancelled: Callable[[], bool],
    ) -> tuple[Image.Image, dict[str, Any] | None]:
        from mimicbrush.pipelines.open_pipeline import seeded_generator

        def on_step(pipeline: Any, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
            progress(number * request.steps + step + 1, request.count * request.steps)
            if is_cancelled():
                pipeline._interrupt = True
            return {}

        result: Any = self.pipeline(
            inputs.source,
            inputs.mask,
            [inputs.reference, *others],
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            keep_shape=request.keep_shape,
            crop=request.crop,
            reference_crop=[request.reference_crop, *(None for _ in others)],
            generator=seeded_generator(request.seed + number),
            return_correspondence=self.pipeline.reference_unet is not None,
            callback_on_step_end=on_step,
        )
        return result.images[0], _convert_correspondence(result.correspondences[0]) if result.correspondences else None


def _convert_correspondence(correspondence: Correspondence) -> dict[str, Any]:
    """For the browser: pixels of source and reference, to a tenth, and which reference it is."""
    return {
        "source": correspondence.source_xy.round(1).tolist(),
        "reference": correspondence.reference_xy.round(1).tolist(),
        "index": correspondence.reference_index.tolist(),
        "focus": correspondence.focus.round(2).tolist(),
        "source_px": float(correspondence.source_token_px),
        "reference_px": float(correspondence.reference_token_px),
    }
