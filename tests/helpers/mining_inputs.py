"""Small real inputs: H.264 clips of a camera moving over a bundled photograph, and photographs with segments."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from pycocotools import mask as coco_mask
from toy_data import jpeg, photograph


def moving_camera(num_frames: int = 48, size_px: tuple[int, int] = (96, 64), seed: int = 0) -> list[np.ndarray]:
    """Frames of a slow, smooth move over a photograph; each seed begins elsewhere."""
    width, height = size_px
    image = cv2.resize(photograph("astronaut.png"), None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA)
    left, top = 10 + 11 * (seed % 8), 20 + 7 * seed
    matrices = [np.float32([[1, 0, -left - 0.6 * n], [0, 1, -top - 0.25 * n]]) for n in range(num_frames)]
    return [cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR) for matrix in matrices]


def write_clip(
    path: Path, frames: list[np.ndarray], fps: int = 24, rotation: int = 0, muxer: dict[str, str] | None = None
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "18", "preset": "ultrafast", "g": "24"}
        stream.codec_context.thread_count = 1
        if rotation:
            stream.set_display_rotation(rotation)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_clips(folder: Path, count: int) -> list[Path]:
    return [write_clip(folder / f"clip{n}.mp4", moving_camera(seed=n)) for n in range(count)]


def annotation(masks: list[np.ndarray]) -> dict[str, Any]:
    """(H, W) 0/1 masks as the JSON of SA-1B."""
    entries = []
    for mask in masks:
        rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        segmentation = {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}
        entries.append({"segmentation": segmentation, "area": int(mask.sum())})
    height, width = masks[0].shape
    return {"image": {"width": width, "height": height}, "annotations": entries}


def photograph_with_segments(seed: int = 0) -> tuple[bytes, dict[str, Any]]:
    """A JPEG of 96 x 80 px, a box, a speck and a segment that is all of it."""
    image = photograph("chelsea.png")[seed : seed + 80, 100:196]
    masks = np.zeros((3, 80, 96), np.uint8)
    masks[0, 10:50, 20:60] = 1
    masks[1, 0, 0] = 1
    masks[2] = 1
    return jpeg(image), annotation(list(masks))


def write_photograph(folder: Path, name: str, seed: int = 0, content: dict[str, Any] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    data, segments = photograph_with_segments(seed)
    (folder / f"{name}.jpg").write_bytes(data)
    (folder / f"{name}.json").write_text(json.dumps(segments if content is None else content))


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """All files of a mined folder that the same inputs must give again: not how long it took."""
    files = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    plan = {key: value for key, value in json.loads((folder / "plan.json").read_text()).items() if key != "input_root"}
    contents = {str(name): path.read_bytes() for name, path in files.items()}
    contents["plan.json"] = json.dumps(plan).encode()
    return {name: data for name, data in contents.items() if not name.startswith(("timing", "report.html"))}
