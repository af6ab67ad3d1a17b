"""Opens video readers by name. decord and torchcodec decode a file after a strict scan by `PyAVReader`.

Both conceal damage, as FFmpeg does by default, and have no option to report it; decord also opens playlists. So the
file is scanned first. The scan also decodes the frames, because only a decoder notices some kinds of damage. Then the
number, times and sizes of the library's frames must agree with the scan.

Refuses what the scan refuses, and as:

* "no_video": decord cannot open the file.
* "missing_frames", "bad_timestamps", "size_changes": the library's frames differ from those of the scan.
* "damaged": the library reports an error.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np

from mimicbrush.errors import InputError, install_command
from mimicbrush.mining.refusals import UntrustedFileError
from mimicbrush.mining.video.strict_reader import (
    THUMBNAIL_SIZE,
    FrameReader,
    PyAVReader,
    ScanResult,
    VideoFrame,
    stretch_to_square_pixels,
)

#: decord keeps times in float32, which resolves 1 ms at four hours.
_TIME_TOLERANCE_S = 2e-3


@dataclass(frozen=True)
class DecordReader:
    """Reader with decord, after a scan. Its memory use grows with every clip, so its process should be replaced.

    Attributes:
        scanner: scans the file first, with its limits.
    """

    scanner: PyAVReader = field(default_factory=PyAVReader)

    @property
    def name(self) -> str:
        """Versions of decord and of the scanner, as stored in the manifest."""
        return f"decord {importlib.metadata.version('decord')} behind {self.scanner.name}"

    def frames(self, path: Path) -> Iterator[VideoFrame]:
        """Scan the video, then yield its frames as decord decodes them, see `FrameReader.frames`."""
        scan = self.scanner.scan(path)
        if _is_to_convert(scan, self.scanner):
            yield from self.scanner.frames(path)
            return
        decord = _import_package("decord")
        try:
            video = decord.VideoReader(str(path.absolute()), num_threads=1)
        except decord.DECORDError as error:  # its FFmpeg is old and does not know AV1, for example
            raise UntrustedFileError("no_video", f"decord cannot open it: {_first_line(error)}") from error
        try:
            _check_times(scan, video.get_frame_timestamp(range(len(video)))[:, 0])
            for number, time_s in enumerate(scan.times_s):
                yield _build_frame(number, time_s, video.next().asnumpy(), scan)
        except decord.DECORDError as error:
            raise _convert_error("decord", error) from error
        except StopIteration as error:
            raise UntrustedFileError(
                "missing_frames", f"decord returned fewer than {len(scan.times_s)} frames"
            ) from error


@dataclass(frozen=True)
class TorchCodecReader:
    """Reader with torchcodec, after a scan.

    Attributes:
        scanner: scans the file first, with its limits.
    """

    scanner: PyAVReader = field(default_factory=PyAVReader)

    @property
    def name(self) -> str:
        """Versions of torchcodec and of the scanner, as stored in the manifest."""
        return f"torchcodec {importlib.metadata.version('torchcodec')} behind {self.scanner.name}"

    def frames(self, path: Path) -> Iterator[VideoFrame]:
        """Scan the video, then yield its frames as torchcodec decodes them, see `FrameReader.frames`."""
        scan = self.scanner.scan(path)
        if _is_to_convert(scan, self.scanner):
            yield from self.scanner.frames(path)
            return
        decoders = _import_package("torchcodec.decoders")
        try:
            video = decoders.VideoDecoder(
                path.absolute(), stream_index=scan.stream, dimension_order="NHWC", num_ffmpeg_threads=1
            )
            if len(video) != len(scan.times_s):
                raise _number_fault(scan, len(video))
            start_s = video.metadata.begin_stream_seconds
            for number, time_s in enumerate(scan.times_s):
                frame = video.get_frame_at(number)
                if abs(frame.pts_seconds - start_s - time_s) > _TIME_TOLERANCE_S:
                    raise _time_fault(number, frame.pts_seconds - start_s, time_s)
                yield _build_frame(number, time_s, frame.data.numpy(), scan)
        except (RuntimeError, ValueError, IndexError) as error:
            raise _convert_error("torchcodec", error) from error


#: name -> class, for `open_reader`.
_READERS: dict[str, Any] = {"pyav": PyAVReader, "decord": DecordReader, "torchcodec": TorchCodecReader}
_INSTALL = {
    "decord": "pip install decord (wheels exist for x86-64 Linux and Windows only)",
    "torchcodec": f"{install_command('torchcodec')}, and FFmpeg's shared libraries (apt-get install ffmpeg)",
}


def open_reader(
    name: str,
    *,
    max_pixels: int = PyAVReader.max_pixels,
    max_duration_s: float = PyAVReader.max_duration_s,
    tone_map: bool = False,
    deinterlace: bool = False,
) -> FrameReader:
    """Open the video reader of a library.

    Args:
        name: pyav, decord or torchcodec.
        max_pixels: see `PyAVReader`.
        max_duration_s: see `PyAVReader`.
        tone_map, deinterlace: see `PyAVReader`. Videos to convert are always read by it, because the other libraries
            cannot convert them.

    Raises:
        InputError: an unknown name, or a library that cannot be loaded.
    """
    if name not in _READERS:
        raise InputError(f"reader={name}: expected one of {', '.join(_READERS)}")
    scanner = PyAVReader(
        max_pixels=max_pixels, max_duration_s=max_duration_s, tone_map=tone_map, deinterlace=deinterlace
    )
    if name == "pyav":
        return scanner
    _import_package("torchcodec.decoders" if name == "torchcodec" else name)
    reader: FrameReader = _READERS[name](scanner)
    return reader


def _import_package(module: str) -> ModuleType:
    """Import an optional package. This is slow, so it is done only when a reader is opened or used."""
    package = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, OSError) as error:  # torchcodec: RuntimeError without FFmpeg's libraries
        raise InputError(
            f"reader={package} cannot be used: {_first_line(error)}. Use reader=pyav, or install it: "
            f"{_INSTALL[package]}"
        ) from error


def _convert_error(library: str, error: Exception) -> Exception:
    """Convert an error of a library: a MemoryError if its text is about memory, otherwise a damaged file."""
    if "allocate memory" in str(error).lower():
        return MemoryError(str(error))
    return UntrustedFileError("damaged", f"{library}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    """Return the first line of an error's text: the other lines are a stack trace of the library."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _is_to_convert(scan: ScanResult, scanner: PyAVReader) -> bool:
    return bool((scan.transfer and scanner.tone_map) or (scan.is_interlaced and scanner.deinterlace))


def _check_times(scan: ScanResult, times_s: np.ndarray) -> None:
    """Raise unless (N,) times agree with those of the scan."""
    if len(times_s) != len(scan.times_s):
        raise _number_fault(scan, len(times_s))
    difference = np.abs(times_s - times_s[0] - scan.times_s)
    worst = int(difference.argmax())
    if not difference[worst] <= _TIME_TOLERANCE_S:
        raise _time_fault(worst, float(times_s[worst] - times_s[0]), scan.times_s[worst])


def _number_fault(scan: ScanResult, number: int) -> UntrustedFileError:
    return UntrustedFileError("missing_frames", f"{number} frames, the scan found {len(scan.times_s)}")


def _time_fault(number: int, time_s: float, expected_s: float) -> UntrustedFileError:
    detail = f"frame {number} is at {time_s:.3f} s, the scan found it at {expected_s:.3f} s"
    return UntrustedFileError("bad_timestamps", detail)


def _build_frame(number: int, time_s: float, rgb: np.ndarray, scan: ScanResult) -> VideoFrame:
    thumbnail = partial(cv2.resize, rgb, THUMBNAIL_SIZE[::-1], interpolation=cv2.INTER_AREA)
    views = partial(_check_and_stretch, rgb, scan), thumbnail
    return VideoFrame(number, time_s, *views, scan.transfer, scan.is_interlaced)


def _check_and_stretch(rgb: np.ndarray, scan: ScanResult) -> np.ndarray:
    """Check the size of an upright image, and stretch it to square pixels, which the libraries do not do."""
    shape = scan.shape
    stored = (shape.width_px, shape.height_px)
    expected = stored[::-1] if shape.quarter_turns % 2 else stored
    if rgb.shape[1::-1] != expected:
        raise UntrustedFileError("size_changes", f"{rgb.shape[1::-1]} px, the scan found {expected}")
    return stretch_to_square_pixels(rgb, shape.shown_size)
