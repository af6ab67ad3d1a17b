"""Read the images of visitors in separate processes, so that a harmful file cannot affect others."""

from __future__ import annotations

import asyncio
import io
import logging
import multiprocessing
import os
import resource
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pebble import ProcessExpired, ProcessPool

from mimicbrush.app.mask_painter import check_kind
from mimicbrush.app.session_files import VisitorLimits
from mimicbrush.errors import InputError
from mimicbrush.io.images import read_image
from mimicbrush.io.text import make_storable

_PROCESSES = min(4, max(2, os.cpu_count() or 2))
#: Of the images that are sent to be painted over.
_JPEG_QUALITY = 92
#: Of memory for what a file says of itself: some say more than they hold.
_HEADER_BYTES = 256 * 2**20
_limits_bytes: tuple[int, int] | None = None  # in a process that reads


class BusyError(InputError):
    """The server is busy with other requests; try again later."""


class ImageReader:
    """Reads images with a limit of time and memory; no thread waits meanwhile.

    Args:
        limits: of pixels, seconds, memory, and images that wait.
    """

    def __init__(self, limits: VisitorLimits) -> None:
        self._limits = limits
        self._pool = self._new_pool()
        self._pending = 0

    def _new_pool(self) -> ProcessPool:
        return ProcessPool(
            max_workers=_PROCESSES,
            context=multiprocessing.get_context("spawn"),  # a fork would have the pipeline's threads and locks
            initializer=_start_reader,
            initargs=(self._limits.decode_gib,),
        )

    async def check(self, path: Path) -> None:
        """Check that a file is an image that can be read whole.

        Raises:
            InputError: it is none, damaged, too large, or takes too long.
            BusyError: too many images wait.
        """
        await self._run(_check, path)

    async def convert(self, path: Path) -> bytes:
        """Convert an image to JPEG for the page: browsers know neither all formats nor all EXIF rotations.

        Raises:
            InputError, BusyError: see `check`.
        """
        return bytes(await self._run(_convert, path))

    async def _run(self, work: Callable[[Path], Any], path: Path) -> Any:
        if self._pending >= self._limits.decoding:
            raise BusyError("the server is reading many images of other visitors at the moment; try again in a minute")
        self._pending += 1
        try:
            if not self._pool.active:  # workers that died before they had any file
                self.close()
                self._pool = self._new_pool()
            arguments = (work, path, self._limits.pixels)
            return await asyncio.wrap_future(self._pool.schedule(_read, args=arguments, timeout=self._limits.decode_s))
        except TimeoutError as error:
            message = (
                f"reading this image takes more than {self._limits.decode_s:g} s; make it smaller, or save it as a JPEG"
            )
            raise InputError(message) from error
        except ProcessExpired as error:
            raise InputError("this file cannot be read: the image reader crashed; save it as a JPEG or PNG") from error
        finally:
            self._pending -= 1

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        self._pool.stop()
        self._pool.join()


def _start_reader(gib: float) -> None:
    """Called once in each process: set how much memory it may use to check a file, and to read it."""
    global _limits_bytes
    logging.disable()  # strangers' files must not fill the log, and what matters of them is said on the page
    warnings.simplefilter("ignore")
    if sys.platform == "linux":  # private memory only: libraries reserve address space that they never touch
        status = Path("/proc/self/status").read_text()
        own = int(status.split("VmData:")[1].split()[0]) * 1024
        _limits_bytes = (own + _HEADER_BYTES, own + int(gib * 2**30))


def _allow_memory(number: int) -> None:
    if _limits_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (_limits_bytes[number], _limits_bytes[1]))


def _read(work: Callable[[Path], Any], path: Path, max_pixels: int) -> Any:
    """Run in the process: check the header of the file, then read it."""
    try:
        _allow_memory(0)
        check_kind(path, "this file", max_pixels)
        _allow_memory(1)
        return work(path)
    except InputError as error:
        raise InputError(str(error).replace(str(path), "this file")) from None
    except MemoryError:
        raise InputError("reading this file takes too much memory; make the image smaller") from None
    except Exception as error:  # noqa: BLE001 - whatever a decoder makes of a hostile file is a reason to refuse it
        raise InputError(f"this file cannot be read ({make_storable(str(error))})") from None


def _check(path: Path) -> None:
    read_image(path, "RGB")


def _convert(path: Path) -> bytes:
    buffer = io.BytesIO()
    read_image(path, "RGB").save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()
