"""What a worker process does with one input: read it, choose, and leave JPEGs and rows behind.

The JPEGs go to a spool file on disk, so that an archive of thousands of photographs does not have to travel
through a pipe; the rows, whose offsets then count in the spool file, are the returned value.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import PIL

from mimicbrush.data.schema import manifest_row, pack_points
from mimicbrush.io.hashing import hash_file
from mimicbrush.mining import segmented_images
from mimicbrush.mining.options import MiningOptions
from mimicbrush.mining.pair_selection import ChosenPair, select_pairs
from mimicbrush.mining.plan import Item, suffix_of
from mimicbrush.mining.refusals import UntrustedFileError
from mimicbrush.mining.video.signals import SignalNotes, UnwantedSignalError
from mimicbrush.mining.video.strict_reader import FrameReader

IMAGE_DECODER = f"pillow {PIL.__version__}"


@dataclass
class MinedFile:
    """One file as the summary counts it: a video, or a photograph with its segments.

    Attributes:
        rows: manifest rows without `pair_id`; offsets of store "mined" count in the spool file.
        audit: rows of the audit.
    """

    path: str
    rows: list[dict[str, Any]]
    audit: list[dict[str, object]] = field(default_factory=list)


@dataclass
class ItemOutcome:
    """What one input gave: one mined file, or many where it is an archive.

    Attributes:
        ignored: suffix -> number of an archive's other files.
        seconds: step -> seconds, of a video.
        num_frames: decoded.
    """

    files: list[MinedFile] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    num_frames: int = 0


def refuse_file(
    item: Item, reason: str, detail: str, *, path: str = "", kind: str = "", source_hash: str = ""
) -> MinedFile:
    """Describe a file that cannot be trusted by its one manifest row.

    Args:
        item: the input that it is, or lies in.
        reason, detail: why.
        path: where it is a file of an archive.
        kind: "video" or "image"; "" for that of the item.
        source_hash: where it could be read.
    """
    source_path = path or item.path
    values = _common_values(item, source_path, kind or item.row_kind, source_hash)
    return MinedFile(source_path, [manifest_row(status="quarantined", reason=reason, detail=detail, **values)])


def _common_values(item: Item, source_path: str, kind: str, source_hash: str) -> dict[str, Any]:
    return {
        "kind": kind,
        "source_path": source_path,
        "source_hash": source_hash,
        "licence": item.licence,
        "url": item.url,
    }


def mine_item(root: Path, item: Item, reader: FrameReader, options: MiningOptions, spool_path: Path) -> ItemOutcome:
    """Mine one input: the work of a worker process.

    Args:
        root: the input folder.
        item: what to read there.
        reader: for videos.
        options: what makes a pair.
        spool_path: the JPEGs are written there, one after the other.
    """
    path = root / item.path
    with spool_path.open("wb") as spool:
        try:
            _check_size([path, path.with_suffix(".json")] if item.kind == "image" else [path], item.size)
            if item.kind == "archive":
                return _mine_archive(path, item, options, spool)
            if item.kind == "image":
                return ItemOutcome([_mine_loose_image(path, item, options, spool)])
            return _mine_video(path, item, reader, options, spool)
        except UntrustedFileError as error:
            return ItemOutcome([refuse_file(item, error.reason, error.detail)])
        except MemoryError:
            return ItemOutcome([refuse_file(item, "out_of_memory", "MemoryError")])


def _check_size(paths: Sequence[Path], planned: int) -> None:
    """A file that still grows would give pairs of a content that nobody finds again."""
    try:
        size = sum(path.stat().st_size for path in paths)
    except OSError as error:
        raise UntrustedFileError("unreadable", error.strerror or str(error)) from error
    if size != planned:
        raise UntrustedFileError("changed", f"{size} bytes, {planned} when the run was planned")


def _mine_video(path: Path, item: Item, reader: FrameReader, options: MiningOptions, spool: BinaryIO) -> ItemOutcome:
    source_hash = _hash_file(path, options.max_file_bytes)
    _check_hash(source_hash, item)
    common = _common_values(item, item.path, "video", source_hash) | {"decoder": reader.name}
    signals = SignalNotes(options.hdr, options.interlaced)
    try:
        selection = select_pairs(signals.watch(reader.frames(path)), options)
    except UntrustedFileError as error:
        values = manifest_row(status="quarantined", reason=error.reason, detail=error.detail, **common)
        return ItemOutcome([MinedFile(item.path, [values])])
    except UnwantedSignalError as error:
        values = manifest_row(status="rejected", reason=error.reason, detail=error.detail, **common)
        return ItemOutcome([MinedFile(item.path, [values])], num_frames=signals.num_frames)
    if selection.pairs:
        common |= {"detail": signals.describe()}
        rows = [manifest_row(status="pair", **_pair_values(pair, spool), **common) for pair in selection.pairs]
    else:
        detail = signals.describe(selection.detail)
        rows = [manifest_row(status="rejected", reason=selection.reason, detail=detail, **common)]
    audit = [refused.to_row(item.path) for refused in selection.refused]
    return ItemOutcome([MinedFile(item.path, rows, audit)], seconds=selection.seconds, num_frames=selection.num_frames)


def _pair_values(pair: ChosenPair, spool: BinaryIO) -> dict[str, Any]:
    return {
        "store": "mined",
        "width_px": pair.width_px,
        "height_px": pair.height_px,
        "a_offset": _append(spool, pair.a_jpeg),
        "a_length": len(pair.a_jpeg),
        "a_sha256": hashlib.sha256(pair.a_jpeg).hexdigest(),
        "b_offset": _append(spool, pair.b_jpeg),
        "b_length": len(pair.b_jpeg),
        "b_sha256": hashlib.sha256(pair.b_jpeg).hexdigest(),
        "a_frame": pair.a_frame,
        "b_frame": pair.b_frame,
        "a_time_s": pair.a_time_s,
        "b_time_s": pair.b_time_s,
        "ssim": pair.ssim,
        "a_points": pack_points(pair.a_points),
        "b_points": pack_points(pair.b_points),
    }


@dataclass(frozen=True)
class _Photograph:
    """A photograph with its segments, in memory, and where both lie: (file relative to the input, offset)."""

    jpeg: bytes
    annotation: bytes
    jpeg_at: tuple[str, int]
    annotation_at: tuple[str, int]


def _mine_loose_image(path: Path, item: Item, options: MiningOptions, spool: BinaryIO) -> MinedFile:
    photograph = _Photograph(
        _read_small(path, options.max_image_bytes),
        _read_small(path.with_suffix(".json"), options.max_image_bytes),
        (item.path, 0),
        (str(Path(item.path).with_suffix(".json").as_posix()), 0),
    )
    if item.sha256:
        _check_hash(hashlib.sha256(photograph.jpeg).hexdigest(), item)
    return _mine_image(item.path, item, photograph, options, spool)


def _mine_image(name: str, item: Item, photograph: _Photograph, options: MiningOptions, spool: BinaryIO) -> MinedFile:
    source_hash = hashlib.sha256(photograph.jpeg).hexdigest()
    try:
        image = segmented_images.read_segmented_image(photograph.jpeg, photograph.annotation, options)
    except UntrustedFileError as error:
        return refuse_file(item, error.reason, error.detail, path=name, kind="image", source_hash=source_hash)
    common = _common_values(item, name, "image", source_hash) | {"decoder": IMAGE_DECODER}
    if not image.segments:
        return MinedFile(name, [manifest_row(status="rejected", reason="no_segment", detail=image.detail, **common)])
    (file, a_offset), (annotation_file, annotation_offset) = photograph.jpeg_at, photograph.annotation_at
    if options.copy_images:
        a_offset, annotation_offset = _append(spool, photograph.jpeg), _append(spool, photograph.annotation)
    values = manifest_row(
        status="pair",
        store="mined" if options.copy_images else "input",
        file=file,
        width_px=image.width_px,
        height_px=image.height_px,
        a_offset=a_offset,
        a_length=len(photograph.jpeg),
        a_sha256=source_hash,
        annotation_file=annotation_file,
        annotation_offset=annotation_offset,
        annotation_length=len(photograph.annotation),
        segments=image.segments,
        segment_ratios=image.ratios,
        detail=image.detail,
        **common,
    )
    return MinedFile(name, [values])


def _mine_archive(path: Path, item: Item, options: MiningOptions, spool: BinaryIO) -> ItemOutcome:
    """All photographs of a tar. A fault of the tar voids all of it, a fault of a photograph only that."""
    if item.sha256:
        _check_hash(hash_file(path), item)
    outcome = ItemOutcome()
    with segmented_images.open_archive(path) as archive:
        members, others = segmented_images.list_archive(archive)
        outcome.ignored = Counter(suffix_of(other) for other in others)
        for member in members:
            name = f"{item.path}/{member.name}"
            try:
                name.encode("utf-8")
            except UnicodeEncodeError:
                printable = name.encode("utf-8", "backslashreplace").decode()
                outcome.files.append(refuse_file(item, "bad_name", "not valid UTF-8", path=printable, kind="image"))
                continue
            try:
                photograph = _Photograph(
                    segmented_images.read_member(archive, member.image, options.max_image_bytes),
                    segmented_images.read_member(archive, member.annotation, options.max_image_bytes),
                    (item.path, member.image.offset_data),
                    (item.path, member.annotation.offset_data),
                )
            except UntrustedFileError as error:
                if error.reason == "bad_archive":
                    raise
                outcome.files.append(refuse_file(item, error.reason, error.detail, path=name, kind="image"))
                continue
            outcome.files.append(_mine_image(name, item, photograph, options, spool))
    return outcome


def _append(spool: BinaryIO, data: bytes) -> int:
    offset = spool.tell()
    spool.write(data)
    return offset


def _check_hash(sha256: str, item: Item) -> None:
    if item.sha256 and sha256 != item.sha256:
        raise UntrustedFileError("hash_mismatch", f"the file has {sha256}, the list says {item.sha256}")


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
        return hash_file(path)
    except OSError as error:
        raise UntrustedFileError("unreadable", error.strerror or str(error)) from error
