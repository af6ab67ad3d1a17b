"""The work of a worker process on one input: read it, choose pairs, and write JPEGs and rows.

The JPEGs are written to a spool file on disk, so that thousands of photographs of an archive need not go through a
pipe. Only the rows are returned; their offsets are positions in the spool file.

Any error while a file is read becomes a reason to refuse that file (`_attempt`). The exception is a spool file that
cannot be written, for example because the disk is full: this ends the run.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, TypeVar

import av
import PIL

from mimicbrush.data.schema import manifest_row, pack_points
from mimicbrush.io.hashing import hash_file
from mimicbrush.io.text import describe_error, make_storable
from mimicbrush.mining import segmented_images
from mimicbrush.mining.options import MiningOptions
from mimicbrush.mining.pair_selection import ChosenPair, Selection, select_pairs
from mimicbrush.mining.plan import Item, suffix_of
from mimicbrush.mining.refusals import UntrustedFileError
from mimicbrush.mining.video.signals import SignalNotes, UnwantedSignalError
from mimicbrush.mining.video.strict_reader import FrameReader

IMAGE_DECODER = f"pillow {PIL.__version__}"
_Result = TypeVar("_Result")


@dataclass
class MinedFile:
    """One file as the summary counts it: a video, or a photograph with its segments.

    Attributes:
        path: relative to the input folder.
        rows: manifest rows without `pair_id`; offsets of store "mined" are positions in the spool file.
        audit: refused examples, for the report.
    """

    path: str
    rows: list[dict[str, Any]]
    audit: list[dict[str, object]] = field(default_factory=list)


@dataclass
class ItemOutcome:
    """Result of an input: one mined file, or many if it is an archive.

    Attributes:
        files: the mined files, with their rows.
        ignored: suffix -> number of files of an archive that are no photographs or annotations.
        seconds: for a video: step -> seconds.
        num_frames: number of decoded frames.
    """

    files: list[MinedFile] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    num_frames: int = 0


class _SpoolError(OSError):
    """The spool file cannot be written. The file that is read did not cause this."""


def refuse_file(
    item: Item, reason: str, detail: str, *, path: str = "", kind: str = "", source_hash: str = "", decoder: str = ""
) -> MinedFile:
    """Make the only manifest row of a file that is quarantined.

    Args:
        item: the file itself, or the archive that holds it.
        reason, detail: why it is refused: a key of `refusals.QUARANTINED`, and any text.
        path: path of the file, if it is in an archive.
        kind: "video" or "image"; "" for that of the item.
        source_hash: SHA-256 of the file, if it could be read.
        decoder: name of the decoder, if decoding began.
    """
    source_path = path or item.path
    values = _common_values(item, source_path, kind or item.row_kind, source_hash) | {"decoder": decoder}
    detail = make_storable(detail)
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
        item: the input file to read, relative to `root`.
        reader: decodes videos.
        options: which frames and pairs are admissible.
        spool_path: the JPEGs are written to this file, one after the other.

    Raises:
        OSError: the spool file cannot be written. After any other error, the file is refused.
    """
    with spool_path.open("wb") as spool:
        outcome = _attempt(partial(_mine_and_check_unchanged, root / item.path, item, reader, options, spool))
    if isinstance(outcome, UntrustedFileError):
        return ItemOutcome([refuse_file(item, outcome.reason, outcome.detail)])
    return outcome


def _attempt(work: Callable[[], _Result]) -> _Result | UntrustedFileError:
    """Return the result of `work`, or the reason to refuse the file that it reads."""
    try:
        return work()
    except UntrustedFileError as error:
        return error
    except MemoryError:
        return UntrustedFileError("out_of_memory", "MemoryError")
    except _SpoolError:
        raise
    except Exception as error:  # noqa: BLE001 - any error of a library refuses only this file
        return UntrustedFileError("failed", describe_failure(error))


def describe_failure(error: BaseException) -> str:
    """Describe an unexpected error, in the same words on every machine and in every run."""
    if isinstance(error, OSError) and error.strerror:
        return f"{type(error).__name__}: {make_storable(error.strerror)}"  # without the path of a file
    return re.sub("0x[0-9a-f]{6,}", "0x...", describe_error(error))  # an address in memory


def _mine_and_check_unchanged(
    path: Path, item: Item, reader: FrameReader, options: MiningOptions, spool: BinaryIO
) -> ItemOutcome:
    """Mine an input, and check that its file has the planned size and does not change in the meantime."""
    files = [path, segmented_images.find_annotation(path)] if item.kind == "image" else [path]
    before = _identify(files)
    size = sum(state.size for state in before)
    if size != item.size:  # a file that is still being written would give pairs that cannot be reproduced
        raise UntrustedFileError("changed", f"{size} bytes, {item.size} when the run was planned")
    if item.kind == "archive":
        outcome = _mine_archive(path, item, options, spool)
    elif item.kind == "image":
        outcome = ItemOutcome([_mine_loose_image(files[0], files[1], item, options, spool)])
    else:
        outcome = _mine_video(path, item, reader, options, spool)
    if _identify(files) != before:  # hash and pairs may come from different versions of the file
        raise UntrustedFileError("changed", "it was replaced or written to while it was read")
    return outcome


class _FileState(NamedTuple):
    """Identity of a file: it differs if the file was replaced or written to. The content is not read."""

    device: int
    inode: int
    size: int
    changed_ns: int


def _identify(files: Sequence[Path]) -> list[_FileState]:
    try:
        states = [path.stat() for path in files]
    except OSError as error:
        raise UntrustedFileError("unreadable", error.strerror or str(error)) from error
    return [_FileState(state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns) for state in states]


def _mine_video(path: Path, item: Item, reader: FrameReader, options: MiningOptions, spool: BinaryIO) -> ItemOutcome:
    source_hash = _hash_file(path, options.max_file_bytes)
    _check_hash(source_hash, item)
    signals = SignalNotes(options.hdr, options.interlaced)
    selection = _attempt(partial(_select_pairs, path, item, reader, options, signals))
    if isinstance(selection, UntrustedFileError):
        reason, detail = selection.reason, selection.detail
        return ItemOutcome([refuse_file(item, reason, detail, source_hash=source_hash, decoder=reader.name)])
    common = _common_values(item, item.path, "video", source_hash) | {"decoder": reader.name}
    if isinstance(selection, UnwantedSignalError):
        values = manifest_row(status="rejected", reason=selection.reason, detail=selection.detail, **common)
        return ItemOutcome([MinedFile(item.path, [values])], num_frames=signals.num_frames)
    if selection.pairs:
        common |= {"detail": signals.describe()}
        rows = [manifest_row(status="pair", **_pair_values(pair, spool), **common) for pair in selection.pairs]
    else:
        detail = signals.describe(selection.detail)
        rows = [manifest_row(status="rejected", reason=selection.reason, detail=detail, **common)]
    audit = [refused.to_row(item.path) for refused in selection.refused]
    return ItemOutcome([MinedFile(item.path, rows, audit)], seconds=selection.seconds, num_frames=selection.num_frames)


def _select_pairs(
    path: Path, item: Item, reader: FrameReader, options: MiningOptions, signals: SignalNotes
) -> Selection | UnwantedSignalError:
    try:
        return select_pairs(signals.watch(reader.frames(path)), options, item.span_s)
    except UnwantedSignalError as error:
        return error
    except MemoryError:
        raise  # PyAV's MemoryError is also an FFmpegError; the file did not cause it
    except av.error.FFmpegError as error:  # from the conversion to RGB; the reader handles its own errors
        raise UntrustedFileError("damaged", f"FFmpeg: {error.strerror or error}") from error


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
    """A photograph with its segments, in memory, and where both are stored: (file relative to the input, offset)."""

    jpeg: bytes
    annotation: bytes
    jpeg_at: tuple[str, int]
    annotation_at: tuple[str, int]


def _mine_loose_image(path: Path, annotation: Path, item: Item, options: MiningOptions, spool: BinaryIO) -> MinedFile:
    photograph = _Photograph(
        _read_small(path, options.max_image_bytes),
        _read_small(annotation, options.max_image_bytes),
        (item.path, 0),
        (PurePosixPath(item.path).with_suffix(annotation.suffix).as_posix(), 0),
    )
    if item.sha256:
        _check_hash(hashlib.sha256(photograph.jpeg).hexdigest(), item)
    return _mine_image(item.path, item, photograph, options, spool)


def _mine_image(name: str, item: Item, photograph: _Photograph, options: MiningOptions, spool: BinaryIO) -> MinedFile:
    source_hash = hashlib.sha256(photograph.jpeg).hexdigest()
    jpeg, annotation = photograph.jpeg, photograph.annotation
    image = _attempt(partial(segmented_images.read_segmented_image, jpeg, annotation, options))
    if isinstance(image, UntrustedFileError):
        return refuse_file(item, image.reason, image.detail, path=name, kind="image", source_hash=source_hash)
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
    """Mine all photographs of a tar. An error of the tar refuses all of it, one of a photograph only this one."""
    if item.sha256:
        _check_hash(hash_file(path), item)
    outcome = ItemOutcome()
    with segmented_images.open_archive(path) as archive:
        listing = segmented_images.list_archive(archive)
        outcome.ignored = Counter(suffix_of(other) for other in listing.others)
        for name, fault in listing.refused:
            outcome.files.append(
                refuse_file(item, fault.reason, fault.detail, path=f"{item.path}/{name}", kind="image")
            )
        for member in listing.photographs:
            photograph = _attempt(partial(_read_photograph, archive, member, item, options))
            name = f"{item.path}/{member.name}"
            if not isinstance(photograph, UntrustedFileError):
                outcome.files.append(_mine_image(name, item, photograph, options, spool))
            elif photograph.reason == "bad_archive":
                raise photograph
            else:
                outcome.files.append(refuse_file(item, photograph.reason, photograph.detail, path=name, kind="image"))
    if not outcome.files:  # every input needs a row
        values = _common_values(item, item.path, "image", "")
        detail = f"{sum(outcome.ignored.values())} other files"
        row = manifest_row(status="rejected", reason="no_photograph", detail=detail, **values)
        outcome.files.append(MinedFile(item.path, [row]))
    return outcome


def _read_photograph(
    archive: tarfile.TarFile, member: segmented_images.ArchiveMember, item: Item, options: MiningOptions
) -> _Photograph:
    return _Photograph(
        segmented_images.read_member(archive, member.image, options.max_image_bytes),
        segmented_images.read_member(archive, member.annotation, options.max_image_bytes),
        (item.path, member.image.offset_data),
        (item.path, member.annotation.offset_data),
    )


def _append(spool: BinaryIO, data: bytes) -> int:
    try:
        offset = spool.tell()
        spool.write(data)
    except OSError as error:
        raise _SpoolError(*error.args) from error
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
