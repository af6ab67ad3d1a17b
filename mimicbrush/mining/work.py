"""What a worker process does with one input: read it, choose, and leave JPEGs and rows behind.

The JPEGs go to a spool file on disk, so that an archive of thousands of photographs does not have to travel
through a pipe; the rows, whose offsets then count in the spool file, are the returned value.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import PIL

from mimicbrush.data.manifest import row
from mimicbrush.mining import images
from mimicbrush.mining.options import MiningOptions
from mimicbrush.mining.plan import Item, suffix_of
from mimicbrush.mining.reader import FrameReader
from mimicbrush.mining.reasons import UntrustedFileError
from mimicbrush.mining.select import select_pairs

IMAGE_DECODER = f"pillow {PIL.__version__}"


@dataclass
class Source:
    """One file of the counts: a video, or a photograph with its segments.

    Attributes:
        rows: manifest rows without `shard` and `pair_id`; offsets count in the spool file.
    """

    path: str
    rows: list[dict[str, Any]]

    @property
    def source_hash(self) -> str:
        """SHA-256 of the file, "" where it could not be read."""
        return str(self.rows[0]["source_hash"])


@dataclass
class Outcome:
    """What one input gave: one source, or many where it is an archive.

    Attributes:
        ignored: suffix -> number of an archive's other files.
    """

    sources: list[Source] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)


def refused_source(
    path: str, reason: str, detail: str, *, kind: str = "", source_hash: str = "", status: str = "quarantined"
) -> Source:
    """A source without pairs, as its one manifest row."""
    values = row(status=status, reason=reason, detail=detail, kind=kind, source_path=path, source_hash=source_hash)
    return Source(path, [values])


def start_worker() -> None:
    """Called once in each worker: the pool fills the cores, so the libraries must not."""
    cv2.setNumThreads(1)


def mine_item(root: Path, item: Item, reader: FrameReader, options: MiningOptions, spool_path: Path) -> Outcome:
    """Mine one input.

    Args:
        root: the input folder.
        item: what to read there.
        reader: for videos.
        options: what makes a pair.
        spool_path: the JPEGs are written there, one after the other.
    """
    path = root / item.path
    annotation_path = path.with_suffix(".json")
    outcome = Outcome()
    with spool_path.open("wb") as spool:
        try:
            _check_size([path, annotation_path] if item.kind == "image" else [path], item.size)
            if item.kind == "archive":
                outcome = _mine_archive(path, item.path, options, spool)
            elif item.kind == "image":
                jpeg = _read_small(path, options.max_image_bytes)
                annotation = _read_small(annotation_path, options.max_image_bytes)
                outcome.sources = [_mine_image(item.path, jpeg, annotation, options, spool)]
            else:
                outcome.sources = [_mine_video(path, item.path, reader, options, spool)]
        except UntrustedFileError as error:
            outcome.sources = [refused_source(item.path, error.reason, error.detail, kind=item.row_kind)]
        except MemoryError:
            outcome.sources = [refused_source(item.path, "out_of_memory", "MemoryError", kind=item.row_kind)]
    return outcome


def _check_size(paths: Sequence[Path], planned: int) -> None:
    """A file that still grows would give pairs of a content that nobody finds again."""
    try:
        size = sum(path.stat().st_size for path in paths)
    except OSError as error:
        raise UntrustedFileError("unreadable", error.strerror or str(error)) from error
    if size != planned:
        raise UntrustedFileError("changed", f"{size} bytes, {planned} when the run was planned")


def _mine_video(path: Path, name: str, reader: FrameReader, options: MiningOptions, spool: BinaryIO) -> Source:
    source_hash = _hash_file(path, options.max_file_bytes)
    common = {"kind": "video", "source_path": name, "source_hash": source_hash, "decoder": reader.name}
    try:
        selection = select_pairs(reader.frames(path), options)
    except UntrustedFileError as error:
        values = row(status="quarantined", reason=error.reason, detail=error.detail, **common)
        return Source(name, [values])
    if not selection.pairs:
        values = row(status="rejected", reason=selection.reason, detail=selection.detail, **common)
        return Source(name, [values])
    rows = []
    for pair in selection.pairs:
        a_offset, b_offset = _append(spool, pair.a_jpeg), _append(spool, pair.b_jpeg)
        values = row(
            status="pair",
            width_px=pair.width_px,
            height_px=pair.height_px,
            a_offset=a_offset,
            a_length=len(pair.a_jpeg),
            b_offset=b_offset,
            b_length=len(pair.b_jpeg),
            a_frame=pair.a_frame,
            b_frame=pair.b_frame,
            a_time_s=pair.a_time_s,
            b_time_s=pair.b_time_s,
            ssim=pair.ssim,
            a_points=pair.a_points.ravel().tolist(),
            b_points=pair.b_points.ravel().tolist(),
            **common,
        )
        rows.append(values)
    return Source(name, rows)


def _mine_image(name: str, jpeg: bytes, annotation: bytes, options: MiningOptions, spool: BinaryIO) -> Source:
    source_hash = hashlib.sha256(jpeg).hexdigest()
    try:
        image = images.read_segmented_image(jpeg, annotation, options)
    except UntrustedFileError as error:
        return refused_source(name, error.reason, error.detail, kind="image", source_hash=source_hash)
    if not image.segments:
        return refused_source(
            name, "no_segment", image.detail, kind="image", source_hash=source_hash, status="rejected"
        )
    values = row(
        status="pair",
        kind="image",
        source_path=name,
        source_hash=source_hash,
        width_px=image.width_px,
        height_px=image.height_px,
        a_offset=_append(spool, jpeg),
        a_length=len(jpeg),
        segments=json.dumps(image.segments),
        decoder=IMAGE_DECODER,
    )
    return Source(name, [values])


def _mine_archive(path: Path, name: str, options: MiningOptions, spool: BinaryIO) -> Outcome:
    """All photographs of a tar. A fault of the tar voids all of it, a fault of a photograph only that."""
    outcome = Outcome()
    with images.open_archive(path) as archive:
        members, others = images.list_archive(archive)
        outcome.ignored = Counter(suffix_of(other) for other in others)
        for member in members:
            member_name = f"{name}/{member.name}"
            try:
                member_name.encode("utf-8")
            except UnicodeEncodeError:
                shown = member_name.encode("utf-8", "backslashreplace").decode()
                outcome.sources.append(refused_source(shown, "bad_name", "not valid UTF-8", kind="image"))
                continue
            try:
                jpeg = images.read_member(archive, member.image, options.max_image_bytes)
                annotation = images.read_member(archive, member.annotation, options.max_image_bytes)
            except UntrustedFileError as error:
                if error.reason == "bad_archive":
                    raise
                outcome.sources.append(refused_source(member_name, error.reason, error.detail, kind="image"))
                continue
            outcome.sources.append(_mine_image(member_name, jpeg, annotation, options, spool))
    return outcome


def _append(spool: BinaryIO, data: bytes) -> int:
    offset = spool.tell()
    spool.write(data)
    return offset


def _read_small(path: Path, max_bytes: int) -> bytes:
    try:
        size = path.stat().st_size
        if size == 0:
            raise UntrustedFileError("empty", f"{path.name} has zero bytes")
        if size > max_bytes:
            raise UntrustedFileError("too_large", f"{path.name} has {size} bytes, more than {max_bytes}")
        return path.read_bytes()
    except OSError as error:
        raise UntrustedFileError("unreadable", error.strerror or str(error)) from error


def _hash_file(path: Path, max_bytes: int) -> str:
    try:
        size = path.stat().st_size
        if size == 0:
            raise UntrustedFileError("empty", "zero bytes")
        if size > max_bytes:
            raise UntrustedFileError("too_large", f"{size} bytes, more than {max_bytes}")
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UntrustedFileError("unreadable", error.strerror or str(error)) from error
