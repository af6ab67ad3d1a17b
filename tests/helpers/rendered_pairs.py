"""A mined folder of landscape frames from rendered clips, without decoding or mining."""

from __future__ import annotations

import hashlib
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from toy_data import jpeg

from mimicbrush.data.schema import SCHEMA, manifest_row, pack_points
from mimicbrush.synthetic.clips import ClipSpec, render_frames

BACKGROUNDS = ("coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png")


def write_rendered_pairs(root: Path, pairs_per_clip: int = 2) -> Path:
    """Pairs of frames that are 0.25 s apart: (120, 160, 3), with made-up matches in the left half of the first."""
    (root / "shards").mkdir(parents=True)
    (root / "manifest").mkdir()
    store, rows = bytearray(), []
    rng = np.random.default_rng(0)
    for number, name in enumerate(BACKGROUNDS):
        spec = ClipSpec(name, seed=number, seconds=pairs_per_clip / 2 + 0.25, width_px=160, height_px=120)
        frames = list(islice(render_frames(spec), 0, None, 6))
        source_hash = hashlib.sha256(name.encode()).hexdigest()
        for index in range(pairs_per_clip):
            values: dict[str, int] = {}
            for which, frame in (("a", frames[2 * index]), ("b", frames[2 * index + 1])):
                data = jpeg(frame)
                values |= {f"{which}_offset": len(store), f"{which}_length": len(data)}
                store.extend(data)
            points = pack_points(rng.uniform((0, 0), (79, 119), (12, 2)))
            pair = {"status": "pair", "kind": "video", "source_path": f"{name}.mp4", "source_hash": source_hash}
            pair |= {
                "pair_id": f"{name}-{index}",
                "store": "mined",
                "file": "shards/one.tar",
                "width_px": 160,
                "height_px": 120,
                "ssim": 0.5,
            }
            rows.append(manifest_row(**pair, **values, a_points=points, b_points=points))
    (root / "shards" / "one.tar").write_bytes(store)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), root / "manifest" / "one.parquet")
    return root
