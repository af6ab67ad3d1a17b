"""The numbers of the report, computed from columns, because there may be millions of rows."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mimicbrush.data.manifest import INDEX_NAME, PairTable
from mimicbrush.data.pair import Pair
from mimicbrush.mining.options import MiningOptions
from mimicbrush.mining.plan import Plan
from mimicbrush.mining.shards import ShardPaths
from mimicbrush.ops.counter_rng import generator, mix
from mimicbrush.ops.geometry import letterbox_matrix, transform_points
from mimicbrush.ops.masks import sift_grid_mask

#: Number of pairs that are read one by one, for masks and motion.
SAMPLED_PAIRS = 2000
#: The grids of the paper's mask; each is used equally often.
_GRIDS = range(3, 11)
_CANVAS_PX = 256
_PERCENTILES = (5, 25, 50, 75, 95)
#: A pair hardly moves if this percentile of its points' motion is below this share of the diagonal. A median would be
#: too low for things that move in front of a still background, because most points are on the background.
_STILL_SHARE, _STILL_PERCENTILE = 0.01, 90
#: Narrower bands that training could use.
_BANDS = ((0.0, 1.0), (0.1, 0.95), (0.2, 0.9), (0.3, 0.9), (0.4, 0.9), (0.4, 0.8), (0.5, 0.8), (0.6, 0.9))


@dataclass(frozen=True)
class Band:
    """Number of video pairs with an SSIM from `low` to `high`."""

    low: float
    high: float
    pairs: int


@dataclass(frozen=True)
class MaskStatistics:
    """Effect of the mask of the paper on sampled video pairs, (N,) values each.

    Attributes:
        hidden: share of the image that the mask hides.
        matched: share of the hidden cells of the image that hold a match.
        motion: how far the matched points moved, median over a pair's points, over the diagonal of the image.
        most_motion: the same, with `_STILL_PERCENTILE` instead of the median.
    """

    hidden: np.ndarray
    matched: np.ndarray
    motion: np.ndarray
    most_motion: np.ndarray


@dataclass(frozen=True)
class Throughput:
    """Time that mining took, summed over all shards and processes.

    Attributes:
        videos: number of videos in the shards with a readable timing file.
        frames: number of decoded frames.
        video_bytes: size of these videos.
        seconds: step -> seconds.
    """

    videos: int
    frames: int
    video_bytes: int
    seconds: dict[str, float]

    @property
    def total_s(self) -> float:
        """Seconds of all steps together."""
        return sum(self.seconds.values())


def hash_rows(origin_keys: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Hash each pair independently, (N,) uint64. The pairs with the lowest hashes are the sample."""
    with np.errstate(over="ignore"):
        mixed = origin_keys.astype(np.uint64) ^ (frames.astype(np.int64).view(np.uint64) + np.uint64(1)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(32))


def spread_rows(groups: np.ndarray, keys: np.ndarray, count: int) -> np.ndarray:
    """Choose at most `count` rows: the lowest key of each group, then the second lowest of each, and so on.

    Args:
        groups: (N,) group of each row.
        keys: (N,) key of each row, see `hash_rows`.
        count: largest number of rows.
    """
    if len(groups) == 0:
        return np.zeros(0, np.int64)
    order = np.lexsort((keys, groups))
    ordered = groups[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    turn = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    rows: np.ndarray = order[np.lexsort((keys[order], turn))][:count]
    return rows


def find_percentiles(values: np.ndarray) -> dict[int, float]:
    """Compute percentile -> value of (N,) numbers; empty if there are none."""
    if not len(values):
        return {}
    return dict(zip(_PERCENTILES, np.percentile(values.astype(np.float64), _PERCENTILES).tolist(), strict=True))


def list_ssim_bands(ssims: np.ndarray, mined: tuple[float, float]) -> list[Band]:
    """Count the video pairs in the mined band of SSIM, then in narrower ones."""
    narrower = [band for band in _BANDS if mined[0] <= band[0] and band[1] <= mined[1]]
    return [Band(low, high, int(((ssims >= low) & (ssims <= high)).sum())) for low, high in (mined, *narrower)]


def sample_pairs(pairs: PairTable) -> list[Pair]:
    """Take at most `SAMPLED_PAIRS` pairs, always the same ones."""
    keys = hash_rows(pairs.column("source_key"), pairs.column("a_frame"))
    return [pairs[int(number)] for number in np.argsort(keys, kind="stable")[:SAMPLED_PAIRS]]


def measure_masks(pairs: PairTable) -> MaskStatistics:
    """Measure what the mask of the paper hides in sampled video pairs; each pair has a fixed seed and grid."""
    sample = sample_pairs(pairs)
    shares = [measure_mask_shares(pair) for pair in sample]
    motion = [[measure_motion(pair, percentile) for pair in sample] for percentile in (50, _STILL_PERCENTILE)]
    table = np.array(shares, np.float64).reshape(-1, 2)
    return MaskStatistics(table[:, 0], table[:, 1], *np.array(motion, np.float64))


def build_grid_mask(pair: Pair) -> tuple[np.ndarray, int]:
    """Sample the paper's mask for the first image, letterboxed to `_CANVAS_PX`: (S, S) uint8, and its grid N."""
    seed = mix(int(pair.source_hash[:15] or "0", 16), int(pair.pair_id.rpartition("-")[2] or 0))
    n = _GRIDS[seed % len(_GRIDS)]
    height, width = pair.size_px
    points = transform_points(pair.a_points, letterbox_matrix(width, height, _CANVAS_PX))
    return sift_grid_mask(points, _CANVAS_PX, generator(seed), cells=(n, n)), n


def find_image_box(size_px: tuple[int, int]) -> tuple[slice, slice]:
    """Find the rows and columns that an image of (height, width) fills on the canvas of `build_grid_mask`."""
    scale = _CANVAS_PX / max(size_px)
    starts = [round((_CANVAS_PX - side * scale) / 2) for side in size_px]
    return slice(starts[0], _CANVAS_PX - starts[0]), slice(starts[1], _CANVAS_PX - starts[1])


def measure_mask_shares(pair: Pair) -> tuple[float, float]:
    """Measure the hidden share of the image, and the share of its hidden cells with a match (0 if none is hidden)."""
    mask, n = build_grid_mask(pair)
    rows, columns = find_image_box(pair.size_px)
    height, width = pair.size_px
    points = transform_points(pair.a_points, letterbox_matrix(width, height, _CANVAS_PX))
    has_match = np.zeros((n, n), bool)
    cells = np.floor((points + 0.5) * n / _CANVAS_PX).astype(int).clip(0, n - 1)
    has_match[cells[:, 1], cells[:, 0]] = True
    centres = ((np.arange(n) + 0.5) * _CANVAS_PX / n).astype(int)
    inside_rows = (centres >= rows.start) & (centres < rows.stop)
    inside_columns = (centres >= columns.start) & (centres < columns.stop)
    hidden = (mask[np.ix_(centres, centres)] > 0) & inside_rows[:, None] & inside_columns[None]
    matched = float((hidden & has_match).sum() / hidden.sum()) if hidden.any() else 0.0
    return float(mask[rows, columns].mean()), matched


def measure_motion(pair: Pair, percentile: float = 50) -> float:
    """Measure how far matched points moved: a percentile, divided by the diagonal of the image; 0 without points."""
    if not len(pair.a_points):
        return 0.0
    distances = np.linalg.norm(pair.b_points.astype(np.float64) - pair.a_points, axis=1)
    return float(np.percentile(distances, percentile) / np.hypot(*pair.size_px))


def warn_of_still_pairs(masks: MaskStatistics) -> str | None:
    """Warn if most video pairs hardly move, because a model learns from them to copy in place.

    Args:
        masks: statistics of a sample of these pairs.

    Returns:
        What was found and what to do, or None.
    """
    is_still = masks.most_motion < _STILL_SHARE
    if 2 * is_still.sum() <= len(is_still):
        return None
    return (
        f"{is_still.mean():.0%} of the video pairs hardly move: 90% of their matched points move less than "
        f"{_STILL_SHARE:.0%} of the diagonal. A model learns from such pairs to copy in place. Mine videos with more "
        "motion, or use frames that are farther apart: increase min_gap_s, or decrease max_ssim."
    )


def list_changed_options(plan: Plan | None) -> list[tuple[str, object, object]]:
    """List (name, value, default) of the options that were changed."""
    defaults = asdict(MiningOptions())
    options = plan.options if plan is not None else {}
    return [(name, value, defaults.get(name)) for name, value in options.items() if value != defaults.get(name)]


def measure_disk_bytes(root: Path) -> dict[str, int]:
    """Measure the bytes of each part of a mined folder, without the report."""
    sizes = {
        name: sum(path.stat().st_size for path in sorted((root / name).glob("*")) if path.is_file())
        for name in ("shards", "manifest", "audit")
    }
    index = root / INDEX_NAME
    return sizes | {INDEX_NAME: index.stat().st_size if index.is_file() else 0}


def read_throughput(root: Path, plan: Plan | None) -> Throughput:
    """Sum the times in timing/*.json; files that cannot be read are ignored."""
    seconds: dict[str, float] = defaultdict(float)
    videos = frames = video_bytes = 0
    for number, items in enumerate(plan.shards if plan is not None else []):
        try:
            timing = json.loads(ShardPaths.for_shard(root, number).timing.read_text(encoding="utf-8"))
            steps = {str(step): float(duration) for step, duration in timing["seconds"].items()}
            frames += int(timing["num_frames"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        for step, duration in steps.items():
            seconds[step] += duration
        videos += sum(item.kind == "video" for item in items)
        video_bytes += sum(max(item.size, 0) for item in items if item.kind == "video")
    return Throughput(videos, frames, video_bytes, dict(seconds))


def count_licences(rows: pa.Table) -> list[tuple[str, int, int]]:
    """Count (licence, files, pairs) from the columns licence, source_path and status; most files first."""
    files = Counter[str]()
    for entry in rows.group_by(["licence", "source_path"]).aggregate([])["licence"].value_counts().to_pylist():
        files[entry["values"]] = entry["counts"]
    of_pairs = rows.filter(pc.equal(rows["status"], "pair"))["licence"].value_counts().to_pylist()
    pairs = {entry["values"]: entry["counts"] for entry in of_pairs}
    return sorted(
        ((name, count, pairs.get(name, 0)) for name, count in files.items()), key=lambda entry: (-entry[1], entry[0])
    )
