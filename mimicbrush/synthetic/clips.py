"""Rendered clips: a moving camera and moving things over photographs or dead leaves.

The photographs are files, or those that the scikit-image wheel contains, so that nothing is fetched. What the clips
show is rendered, but the files are real H.264, and the depth of each pixel is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import skimage
from PIL import Image

from mimicbrush.errors import InputError
from mimicbrush.io.images import read_image
from mimicbrush.ops.counter_rng import generator
from mimicbrush.synthetic.dead_leaves import dead_leaves

#: Photographs in the wheel with enough texture to match. No photograph is on both sides.
TRAIN_PHOTOGRAPHS = (
    "astronaut.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "brick.png",
    "page.png",
)
HELDOUT_PHOTOGRAPHS = ("coffee.png", "chelsea.png", "coins.png", "gravel.png", "camera.png", "retina.jpg")

#: Before the seed of an image of dead leaves, where the name of a photograph may stand.
LEAVES = "leaves:"
_LEAVES_SIZE_PX = (640, 480)
#: Relative inverse depth of the ground at the upper and the lower edge of a frame, and of things: the one rendered last
#: is the nearest. A camera over a plane and things before it have no more depth than that.
_GROUND_DEPTH, _NEAREST_DEPTH = (0.1, 0.4), (0.6, 1.0)

#: The camera sees about this part of a photograph's width at a time; the rest is room to move.
_VIEW_RATIO = 0.5


@dataclass(frozen=True)
class ClipSpec:
    """Everything that a rendered clip is a function of.

    Attributes:
        background: photograph that the camera moves over, see `read_photograph`.
        cutouts: photographs that the moving things are cut from.
        seed: of paths, shapes, light and tone.
        seconds: length.
        fps: frames per second.
        width_px, height_px: of the frames; even, as H.264 with 4:2:0 colour needs.
        thing_sides: smallest and largest side of a thing over the height of a frame.
        tilt: how far things tilt out of the image's plane, each by itself: the largest move of a corner over the
            thing's side.
    """

    background: str
    cutouts: tuple[str, ...] = ()
    seed: int = 0
    seconds: float = 4.5
    fps: int = 24
    width_px: int = 320
    height_px: int = 240
    thing_sides: tuple[float, float] = (0.32, 0.46)
    tilt: float = 0.0

    @property
    def num_frames(self) -> int:
        """How many frames the clip has."""
        return round(self.seconds * self.fps)


def demo_clips(photographs: tuple[str, ...], count: int, seed: int) -> dict[str, ClipSpec]:
    """Describe clips by file name: backgrounds take turns, each with two things cut from the other photographs."""
    specs = {}
    for number in range(count):
        first = number % len(photographs)
        others = photographs[first + 1 :] + photographs[:first]
        cutouts = tuple(others[(number + k) % len(others)] for k in (0, 2))
        name = f"{number:02d}_{Path(photographs[first]).stem}.mp4"
        specs[name] = ClipSpec(photographs[first], cutouts, seed=seed * 1000 + number)
    return specs


def write_clip(path: Path, spec: ClipSpec) -> None:
    """Render a clip and write it as H.264 in an mp4: the same bytes for the same spec and libraries."""
    import av

    with av.open(str(path), "w", format="mp4") as container:  # whatever its name is
        # One thread: with more, x264's decisions depend on how many cores the machine has. AVX2 at most: with
        # AVX-512, on an Intel Xeon, the same frames gave other bytes from run to run.
        options = {"crf": "20", "preset": "veryfast", "threads": "1", "x264-params": "asm=avx2"}
        stream = container.add_stream("libx264", rate=spec.fps, options=options)
        stream.width, stream.height, stream.pix_fmt = spec.width_px, spec.height_px, "yuv420p"
        for frame in render_frames(spec):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def render_frames(spec: ClipSpec) -> Iterator[np.ndarray]:
    """Yield the clip's `num_frames` frames, (height_px, width_px, 3) uint8 RGB."""
    return (frame for frame, _ in render_with_depth(spec))


def render_with_depth(spec: ClipSpec) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the clip's frames, (H, W, 3) uint8 RGB, with their relative inverse depth, (H, W) float32 in 0..1."""
    rng = generator(spec.seed)
    times = np.arange(spec.num_frames) / spec.fps
    canvas = (spec.width_px, spec.height_px)
    background = _fit_photograph(read_photograph(spec.background, rng), spec)
    views = _camera(background, canvas, _hesitate(times, rng), rng)
    things = [_Thing(read_photograph(name, rng), spec, times, rng) for name in spec.cutouts]
    light = 1 + 0.08 * _smooth_path(times, rng)
    for number, view in enumerate(views):
        frame = cv2.warpPerspective(
            background, view, canvas, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
        ).astype(np.float32)
        depth = np.repeat(np.linspace(*_GROUND_DEPTH, spec.height_px, dtype=np.float32)[:, None], spec.width_px, 1)
        for thing, nearness in zip(things, np.linspace(*_NEAREST_DEPTH, len(things)), strict=True):
            thing.render(frame, depth, number, float(nearness))
        yield np.clip(frame * light[number], 0, 255).round().astype(np.uint8), depth


def read_photograph(name: str, rng: np.random.Generator) -> np.ndarray:
    """Read a photograph: (H, W, 3) uint8 RGB.

    Args:
        name: of a file; without a folder, of one that the scikit-image wheel contains, of which a grey one is toned at
            random; or "leaves:SEED", see `dead_leaves.dead_leaves`.
        rng: of the tone.

    Raises:
        InputError: this version of scikit-image does not contain it, or the file cannot be read.
    """
    if name.startswith(LEAVES):
        return dead_leaves(*_LEAVES_SIZE_PX, generator(int(name.removeprefix(LEAVES))))[0]
    if Path(name).name != name:
        return np.asarray(read_image(Path(name), "RGB"))
    path = bundled_photograph(name)
    # Sampled for every photograph, so that the rest of a clip does not depend on whether this one is grey.
    dark, tint = rng.uniform(0, 70, 3), rng.uniform(150, 255, 3)
    with Image.open(path) as image:
        if image.mode != "L":
            return np.asarray(image.convert("RGB"))
        grey = np.asarray(image, np.float64)[..., None] / 255
    return (dark + (tint - dark) * grey).round().astype(np.uint8)


def bundled_photograph(name: str) -> Path:
    """Find the file of a photograph that the scikit-image wheel contains.

    Raises:
        InputError: this version does not.
    """
    path = Path(skimage.__file__).parent / "data" / name
    if not path.is_file():
        raise InputError(f"the installed scikit-image has no photograph {name} ({path})")
    return path


def _smooth_path(times: np.ndarray, rng: np.random.Generator, period_s: tuple[float, float] = (5, 11)) -> np.ndarray:
    """A value that wanders smoothly within -1..1, one per time: two sine waves of random period and phase."""
    path = np.zeros_like(times)
    for weight in (0.75, 0.25):
        period, phase = rng.uniform(*period_s), rng.uniform(0, 2 * np.pi)
        path += weight * np.sin(2 * np.pi * times / period + phase)
    return path


def _hesitate(times: np.ndarray, rng: np.random.Generator, period_s: float = 2.25) -> np.ndarray:
    """Times that stand still for a moment in every period, as people hold a camera on what they film.

    Without it hardly two frames of a finely textured scene would be alike by SSIM.
    """
    phase = 2 * np.pi * (times / period_s + rng.random())
    return times - period_s / (2 * np.pi) * np.sin(phase)


def _fit_photograph(photograph: np.ndarray, spec: ClipSpec) -> np.ndarray:
    """Scale a photograph so that the camera's mean view is about as large as the frame."""
    scale = max(spec.width_px / photograph.shape[1], spec.height_px / photograph.shape[0]) / _VIEW_RATIO
    size = (round(photograph.shape[1] * scale), round(photograph.shape[0] * scale))
    return cv2.resize(photograph, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def _camera(
    background: np.ndarray, canvas: tuple[int, int], times: np.ndarray, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Yield per time the (3, 3) matrix from background to frame: pan, zoom, roll and a slight tilt."""
    size = np.array(canvas, np.float64)
    room = (np.array(background.shape[1::-1]) - size) / 2
    unit = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], np.float64)
    corners = ((unit + 1) / 2 * (size - 1)).astype(np.float32)
    pan_x, pan_y, zoom, roll, tilt_x, tilt_y = (_smooth_path(times, rng) for _ in range(6))
    for t in range(len(times)):
        # The far side of a tilted view shows more of the background.
        quad = unit * (1 + 0.06 * np.stack([tilt_y[t] * unit[:, 1], tilt_x[t] * unit[:, 0]], axis=1))
        quad *= size / 2 * np.exp(0.15 * zoom[t])
        cos, sin = np.cos(0.1 * roll[t]), np.sin(0.1 * roll[t])
        centre = np.array(background.shape[1::-1]) / 2 + 0.5 * room * [pan_x[t], pan_y[t]]
        view = quad @ np.array([[cos, sin], [-sin, cos]]) + centre
        yield cv2.getPerspectiveTransform(view.astype(np.float32), corners)


class _Thing:
    """A cut-out with a soft irregular outline that moves, turns and casts a shadow."""

    def __init__(self, photograph: np.ndarray, spec: ClipSpec, times: np.ndarray, rng: np.random.Generator) -> None:
        canvas = (spec.width_px, spec.height_px)
        side = round(rng.uniform(*spec.thing_sides) * canvas[1])
        patch = _rich_crop(photograph, round(rng.uniform(0.35, 0.6) * min(photograph.shape[:2])), rng)
        self.patch = cv2.resize(patch, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32)
        self.alpha = _blob(side, rng)
        self.canvas = canvas
        self.centre = np.array(canvas) * rng.uniform(0.3, 0.7, 2)
        self.reach = np.array(canvas) * rng.uniform(0.15, 0.3, 2)
        x, y, self.turn, self.scale, self.shade = (_smooth_path(times, rng) for _ in range(5))
        self.path = np.stack([x, y], axis=1)
        tilts = spec.tilt * np.stack([_smooth_path(times, rng) for _ in range(2)]) if spec.tilt else np.zeros((2, 1))
        self.tilt_x, self.tilt_y = np.broadcast_to(tilts, (2, len(times)))

    def render(self, frame: np.ndarray, depth: np.ndarray, number: int, nearness: float) -> None:
        """Render the shadow and the thing into the frame, (H, W, 3) float32 in 0..255, and into its depth (H, W)."""
        side = len(self.alpha)
        x, y = self.centre + self.reach * self.path[number]
        # Only its surroundings are touched: a blob is at most 1.16 sides wide, its shadow reaches 20 px.
        margin = round(0.6 * side) + 20
        left, right = np.clip([round(x) - margin, round(x) + margin], 0, self.canvas[0])
        top, bottom = np.clip([round(y) - margin, round(y) + margin], 0, self.canvas[1])
        if left >= right or top >= bottom:
            return
        size = (int(right - left), int(bottom - top))
        middle = ((side - 1) / 2, (side - 1) / 2)
        place = cv2.getRotationMatrix2D(middle, 35 * self.turn[number], float(np.exp(0.15 * self.scale[number])))
        place[:, 2] += np.array([x - left, y - top]) - middle
        warp = self._build_warp(place, number, size)
        alpha = warp(self.alpha, (0, 0))[..., None]
        pixels = warp(self.patch, (0, 0), borderMode=cv2.BORDER_REPLICATE)
        shadow = cv2.GaussianBlur(warp(self.alpha, (5, 7)), (0, 0), 4)[..., None]
        region = frame[top:bottom, left:right]
        region *= (1 - 0.45 * shadow) * (1 - alpha)
        region += pixels * (1 + 0.12 * self.shade[number]) * alpha
        depth[top:bottom, left:right] += (nearness - depth[top:bottom, left:right]) * alpha[..., 0]

    def _build_warp(self, place: np.ndarray, number: int, size: tuple[int, int]) -> Callable[..., np.ndarray]:
        """Build the warp of an image of the thing's size through (2, 3) `place` and the tilt, moved by some pixels."""
        tilt_x, tilt_y = self.tilt_x[number], self.tilt_y[number]
        if not (tilt_x or tilt_y):
            return lambda image, move, **how: cv2.warpAffine(image, place + [[0, 0, m] for m in move], size, **how)
        last = len(self.alpha) - 1
        unit = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], np.float64)
        corners = ((unit + 1) / 2 * last).astype(np.float32)
        tilted = unit * (1 + 2 * np.stack([tilt_y * unit[:, 1], tilt_x * unit[:, 0]], axis=1))
        tilt = cv2.getPerspectiveTransform(corners, ((tilted + 1) / 2 * last).astype(np.float32))

        def warp(image: np.ndarray, move: tuple[int, int], **how: int) -> np.ndarray:
            shifted = np.vstack([place + [[0, 0, m] for m in move], [0, 0, 1]])
            return cv2.warpPerspective(image, shifted @ tilt, size, **how)

        return warp


def _rich_crop(photograph: np.ndarray, side_px: int, rng: np.random.Generator) -> np.ndarray:
    """Of a few random square crops the one with the strongest contrast: flat ones give nothing to match."""
    crops = []
    for _ in range(6):
        top, left = (int(rng.integers(length - side_px + 1)) for length in photograph.shape[:2])
        crops.append(photograph[top : top + side_px, left : left + side_px])
    return max(crops, key=lambda crop: float(crop.std()))


def _blob(side: int, rng: np.random.Generator) -> np.ndarray:
    """An outline that waves around a circle, with a soft edge: (side, side) float32 in 0..1."""
    y, x = (np.mgrid[:side, :side] - (side - 1) / 2) / (side / 2)
    angle, radius = np.arctan2(y, x), np.hypot(x, y)
    outline = np.full_like(angle, 0.75)
    for waves in (2, 3, 5):
        outline += rng.uniform(0.02, 0.08) * np.cos(waves * angle + rng.uniform(0, 2 * np.pi))
    return np.clip((outline - radius) * side / 4 + 0.5, 0, 1).astype(np.float32)


def write_clips(folder: Path, specs: dict[str, ClipSpec]) -> Iterable[Path]:
    """Write clips into a folder, which is made, yielding each path when it is done."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, spec in specs.items():
        write_clip(folder / name, spec)
        yield folder / name
