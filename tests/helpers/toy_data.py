"""A small mined folder, written by hand from photographs that scikit-image bundles, with known geometry."""

from __future__ import annotations

import hashlib
import io
import json
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import skimage
from PIL import Image
from pycocotools import mask as coco_mask

from mimicbrush.data.schema import SCHEMA, manifest_row, pack_points

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")


@cache
def photograph(name: str) -> np.ndarray:
    """A bundled photograph, (H, W, 3) uint8, not to be written to; read by path, so nothing is fetched."""
    pixels = np.asarray(Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB"))
    pixels.flags.writeable = False
    return pixels


def jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_mined_folder(root: Path, pairs_per_photo: int = 3, with_images: bool = True, size_px: int = 160) -> Path:
    """Video pairs are two crops of one photograph, shifted by a known number of pixels; images have a disc."""
    (root / "shards").mkdir(parents=True)
    (root / "manifest").mkdir()
    rng = np.random.default_rng(0)
    store, rows = bytearray(), []

    def keep(data: bytes) -> tuple[int, int]:
        store.extend(data)
        return len(store) - len(data), len(data)

    for name in PHOTOGRAPHS:
        photo = photograph(name)
        scale = 1.6 * size_px / min(photo.shape[:2])
        photo = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        source_hash = hashlib.sha256(name.encode()).hexdigest()
        for number in range(pairs_per_photo):
            (ax, ay), (bx, by) = rng.integers(0, size_px // 2, (2, 2))
            a_points = rng.uniform(size_px * 0.3, size_px * 0.7, (20, 2))
            b_points = a_points + np.array([ax - bx, ay - by])
            seen = ((b_points > 0) & (b_points < size_px - 1)).all(axis=1)
            a_points, b_points = a_points[seen], b_points[seen]
            a_offset, a_length = keep(jpeg(photo[ay : ay + size_px, ax : ax + size_px]))
            b_offset, b_length = keep(jpeg(photo[by : by + size_px, bx : bx + size_px]))
            rows.append(
                manifest_row(
                    status="pair",
                    kind="video",
                    source_path=f"{name}.mp4",
                    source_hash=source_hash,
                    pair_id=f"{source_hash[:8]}-{number}",
                    store="mined",
                    file="shards/shard-000000.tar",
                    width_px=size_px,
                    height_px=size_px,
                    a_offset=a_offset,
                    a_length=a_length,
                    b_offset=b_offset,
                    b_length=b_length,
                    a_frame=2 * number,
                    b_frame=2 * number + 3,  # beyond the next pair's first: all are of one shot
                    ssim=0.5,
                    a_points=pack_points(a_points),
                    b_points=pack_points(b_points),
                )
            )
        if with_images:
            disc = cv2.circle(np.zeros((size_px, size_px), np.uint8), (size_px // 2, size_px // 2), size_px // 4, 1, -1)
            rle = coco_mask.encode(np.asfortranarray(disc))
            segment = {"size": list(map(int, rle["size"])), "counts": rle["counts"].decode()}
            a_offset, a_length = keep(jpeg(photo[:size_px, :size_px]))
            annotation_offset, annotation_length = keep(
                json.dumps({"annotations": [{"segmentation": segment}]}).encode()
            )
            rows.append(
                manifest_row(
                    status="pair",
                    kind="image",
                    source_path=name,
                    source_hash=hashlib.sha256(b"image" + name.encode()).hexdigest(),
                    pair_id=f"image-{name}",
                    store="mined",
                    file="shards/shard-000000.tar",
                    width_px=size_px,
                    height_px=size_px,
                    a_offset=a_offset,
                    a_length=a_length,
                    annotation_file="shards/shard-000000.tar",
                    annotation_offset=annotation_offset,
                    annotation_length=annotation_length,
                    segments=[0],
                    segment_ratios=[float(disc.mean())],
                )
            )
    (root / "shards" / "shard-000000.tar").write_bytes(store)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), root / "manifest" / "part-000000.parquet")
    return root
