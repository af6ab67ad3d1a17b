"""Images that are made to cost time, memory or the process that reads them: each is refused, and the next is read."""

from __future__ import annotations

import asyncio
import io
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from in_thread import in_thread
from PIL import Image

from mimicbrush.app.editing_service import EditingService
from mimicbrush.app.image_reader import BusyError, ImageReader
from mimicbrush.app.session_files import SessionFiles, VisitorLimits
from mimicbrush.errors import InputError

SMALL = VisitorLimits(decode_s=2.0, decode_gib=0.5, pixels=10_000_000, decoding=3)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EditingService]:
    folder = tmp_path_factory.mktemp("read") / "visits"
    service = EditingService(None, "", SessionFiles(folder, SMALL), ImageReader(SMALL))  # type: ignore[arg-type]  # nothing is edited
    yield service
    service.close()


def upload(service: EditingService, data: bytes) -> str:
    return in_thread(asyncio.run, service.upload("ann", data))


def encoded(kind: str, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind)
    return buffer.getvalue()


def directory(entries: list[tuple[int, int, int, int]], then: int) -> bytes:
    """A directory of a TIFF: (tag, type, count, value), and where the next one is."""
    return struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *each) for each in entries) + struct.pack(
        "<I", then
    )  # fmt: skip


PIXEL = [(256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8), (279, 4, 1, 1)]


def tiff_of_pages(count: int, loops: bool = False) -> bytes:
    """A TIFF of very many pages of one pixel, all the same one."""
    size = len(directory(PIXEL, 0))
    pages = [directory(PIXEL, 16 + (number + 1) * size) for number in range(count - 1)]
    return struct.pack("<2sHI8x", b"II", 42, 16) + b"".join(pages) + directory(PIXEL, 16 if loops else 0)


def tiff_of_tags(count: int, mib: int) -> bytes:
    """A TIFF whose tags all name the same large block: each of them is read."""
    block = mib * 2**20
    entries = [*PIXEL, *((30_000 + number, 7, block, 16) for number in range(count))]
    return struct.pack("<2sHI8x", b"II", 42, 16 + block) + bytes(block) + directory(entries, 0)


@pytest.mark.parametrize(
    ("bomb", "reason"),
    [
        (tiff_of_pages(20_000), "more than 100 pages"),
        (tiff_of_pages(101), "more than 100 pages"),
        (tiff_of_tags(2000, 1), "memory|cannot be read"),
        (encoded("PNG", "L", (4000, 4000)), "16 megapixels; the limit is 10"),
        (encoded("BMP", "1", (30_000, 1000))[:100], "too large"),
        (encoded("GIF"), "not an image in a supported format"),
        (b"P6\n1 1\n255\n   ", "not an image in a supported format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "not an image in a supported format"),
        (encoded("JPEG")[:200], "cannot be read|can be read whole|not an image in a supported format"),
        (b"", "not an image in a supported format|empty"),
    ],
)  # fmt: skip
def test_a_bomb_is_refused_and_leaves_nothing(service: EditingService, bomb: bytes, reason: str) -> None:
    before = len(list(service.files.folder.iterdir()))
    with pytest.raises(InputError, match=reason) as refused:
        upload(service, bomb)
    assert str(service.files.folder) not in str(refused.value)
    assert len(list(service.files.folder.iterdir())) == before
    assert upload(service, encoded("PNG"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_images_are_taken_and_shown(service: EditingService, kind: str) -> None:
    token = upload(service, encoded(kind))
    with Image.open(io.BytesIO(in_thread(asyncio.run, service.show("ann", token)))) as shown:
        assert (shown.format, shown.size) == ("JPEG", (40, 30))
    with pytest.raises(InputError, match="not on the server"):
        in_thread(asyncio.run, service.show("bob", token))


def test_pages_and_previews_are_taken_within_reason(service: EditingService) -> None:
    assert upload(service, tiff_of_pages(100))
    assert upload(service, tiff_of_pages(3, loops=True))
    buffer = io.BytesIO()
    image = Image.new("RGB", (40, 30))
    image.save(buffer, "MPO", save_all=True, append_images=[image])  # as cameras write a JPEG with its preview
    assert upload(service, buffer.getvalue())


def slow(path: Path) -> None:
    time.sleep(60)


def die(path: Path) -> None:
    import os

    os.abort()


def eat(path: Path) -> None:
    bytearray(2**30)


def test_what_takes_too_long_or_breaks_the_reader_costs_nobody_else(service: EditingService) -> None:
    path = service.files.find("ann", upload(service, encoded("PNG")))

    async def run() -> None:
        hung = asyncio.gather(*(service.reader._run(work, path) for work in (slow, die, eat)), return_exceptions=True)
        await asyncio.sleep(0)
        with pytest.raises(BusyError, match="try again"):
            await service.reader.check(path)
        answers = await hung
        assert all(type(each) is InputError for each in answers), answers
        assert "takes more than 2 s" in str(answers[0])
        assert "crashed" in str(answers[1])
        assert "too much memory" in str(answers[2])
        await service.reader.check(path)

    in_thread(asyncio.run, run())
    assert service.reader._pending == 0


WHOLE = [encoded(kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF")]


@given(
    st.sampled_from(WHOLE),
    st.lists(st.tuples(st.integers(0, 10_000), st.binary(min_size=1, max_size=4)), max_size=6),
    st.integers(0, 10_000),
)
def test_a_damaged_image_is_taken_or_refused_and_nothing_else(
    service: EditingService, whole: bytes, changes: list[tuple[int, bytes]], end: int
) -> None:
    data = bytearray(whole)
    for place, new in changes:
        data[place % len(data) : place % len(data) + len(new)] = new
    if end < len(data):
        del data[end:]
    try:
        token = upload(service, bytes(data))
    except InputError as error:
        assert type(error) is InputError and str(error).startswith(("this file", "this image"))
    else:
        service.files.forget(token)
