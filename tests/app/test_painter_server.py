"""What the painter's server takes and what it refuses, asked by hand, without a browser."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_image_reader import tiff_of_pages

from mimicbrush.app import mask_painter
from mimicbrush.app.mask_painter import MaskStore, PainterServer
from mimicbrush.errors import InputError

ROOT = Path(__file__).parents[2]


def png(size: tuple[int, int] = (40, 30), value: int = 255, mode: str = "L") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, value if mode == "L" else (value,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PainterServer]:
    (tmp_path / "pictures/dogs").mkdir(parents=True)
    (tmp_path / "pictures/dogs/01.png").write_bytes(png(mode="RGB"))
    (tmp_path / "secret.png").write_bytes(png(mode="RGB"))
    with PainterServer(MaskStore(tmp_path / "masks", tmp_path / "pictures")) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(
    server: PainterServer, method: str, path: str, body: bytes | None = None, **headers: str | None
) -> tuple[int, dict[str, object] | bytes]:
    """Status and content; headers with None are left out. Those that the page would send are there."""
    host = f"127.0.0.1:{server.server_address[1]}"
    usual: dict[str, str | None] = {"Host": host, "Origin": f"http://{host}", "Content-Type": "image/png"}
    if body is not None:
        usual["Content-Length"] = str(len(body))
    all_headers = usual | {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in all_headers.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        content = answer.read()
    finally:
        connection.close()
    return answer.status, json.loads(content) if answer.headers["Content-Type"] == "application/json" else content


def test_images_are_listed_and_a_mask_is_kept_as_black_and_white(server: PainterServer, tmp_path: Path) -> None:
    values = np.zeros((30, 40), np.uint8)
    values[5:10, 5:10], values[20:25, 20:25] = 200, 100
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    status, answer = ask(server, "POST", "/api/mask?name=dogs/01.png", buffer.getvalue())
    assert (status, answer) == (200, {"saved": "dogs/01.png"})
    with Image.open(tmp_path / "masks/dogs/01.png") as mask:
        np.testing.assert_array_equal(np.asarray(mask), (values > 128) * np.uint8(255))
    _, listed = ask(server, "GET", "/api/pictures")
    assert isinstance(listed, dict) and listed["pictures"] == [{"name": "dogs/01.png", "masked": True}]
    assert not list((tmp_path / "masks").rglob("*.tmp"))


@pytest.mark.parametrize("host", ["evil.example:80", "evil.example", "", None, "127.0.0.1", "127.0.0.1.evil.example"])
@pytest.mark.parametrize("path", ["/", "/api/pictures", "/api/picture?name=dogs/01.png"])
def test_a_request_under_another_name_gets_nothing(server: PainterServer, host: str | None, path: str) -> None:
    status, answer = ask(server, "GET", path, Host=host)
    assert status == 403
    assert isinstance(answer, dict) and server.url in str(answer["error"])


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": None},
        {"Origin": "null"},
        {"Origin": "http://evil.example"},
        {"Origin": "http://localhost:1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Host": "evil.example", "Origin": "http://evil.example"},
    ],
)
def test_only_the_page_itself_may_save(server: PainterServer, headers: dict[str, str | None], tmp_path: Path) -> None:
    status, _ = ask(server, "POST", "/api/mask?name=dogs/01.png", png(), **headers)
    assert status == 403
    assert not list((tmp_path / "masks").iterdir())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=st.sampled_from(["GET", "POST"]),
    path=st.one_of(
        st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=60),
        st.tuples(
            st.sampled_from(["/api/mask?name=", "/api/picture?name=", "/api/upload?name=", "//", "/api/mask?"]),
            st.one_of(
                st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=300),
                st.binary(max_size=40).map(lambda name: "".join(f"%{byte:02x}" for byte in name)),
            ),
        ).map("".join),
    ),
    body=st.binary(max_size=100),
    kind=st.sampled_from(["image/png", "application/octet-stream", ""]),
)
def test_a_hostile_request_is_answered(server: PainterServer, method: str, path: str, body: bytes, kind: str) -> None:
    status, _ = ask(server, method, "/" + path.lstrip("/"), body if method == "POST" else None, Content_Type=kind)
    assert status == 200 or 400 <= status < 500
    for strange in ("//[", "//[x]/api/mask?name=a", path):
        if strange:
            assert ask(server, "GET", strange)[0] < 500


@pytest.mark.parametrize(
    "name", ["../secret.png", "dogs/../../secret.png", "/etc/hostname", "uploads/../../secret.png", "dogs/01.png%00"]
)
@pytest.mark.parametrize(("method", "path"), [("GET", "picture"), ("GET", "mask"), ("POST", "mask")])
def test_no_name_leads_out_of_the_folders(
    server: PainterServer, name: str, method: str, path: str, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    status, answer = ask(server, method, f"/api/{path}?name={name}", png() if method == "POST" else None)
    assert status in (400, 404), answer
    assert sorted(tmp_path.rglob("*")) == before


def test_no_link_leads_out_of_the_folder(server: PainterServer, tmp_path: Path) -> None:
    (tmp_path / "pictures/link.png").symlink_to(tmp_path / "secret.png")
    status, answer = ask(server, "GET", "/api/picture?name=link.png")
    assert status == 400
    assert isinstance(answer, dict) and "leads outside of" in str(answer["error"])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (png((41, 30)), "41 x 30 px, but the image dogs/01.png is 40 x 30 px"),
        (png(value=0), "the mask of dogs/01.png is empty"),
        (png()[:40], "not a valid PNG"),
        (b"GIF89a", "not a valid PNG"),
        (b"", "not a valid PNG"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(server: PainterServer, body: bytes, reason: str, tmp_path: Path) -> None:
    status, answer = ask(server, "POST", "/api/mask?name=dogs/01.png", body)
    assert status == 400
    assert isinstance(answer, dict) and reason in str(answer["error"])
    assert not list((tmp_path / "masks").rglob("*.*"))


def test_requests_that_lie_about_their_size_or_kind_are_refused(server: PainterServer) -> None:
    too_much = str(mask_painter.MAX_UPLOAD_BYTES + 1)
    for headers, expected in (
        ({"Content_Length": too_much}, 413),
        ({"Content_Length": "-1"}, 411),
        ({"Content_Length": None}, 411),
        ({"Content_Length": None, "Transfer_Encoding": "chunked"}, 411),
        ({"Content_Type": "text/plain"}, 415),
    ):
        status, _ = ask(server, "POST", "/api/mask?name=dogs/01.png", b"", **headers)
        assert status == expected, headers
    assert ask(server, "GET", "/api/picture")[0] == 400
    assert ask(server, "GET", "/../mask_painter.py")[0] == 404
    assert ask(server, "POST", "/api/other", b"")[0] == 404


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("../../up.png", "uploads/up.png"),
        ("C:\\images\\a b.jpg", "uploads/a_b.png"),
        (".hidden", "uploads/hidden.png"),
        ("ätsch", "uploads/tsch.png"),
        ("a_mask.png", "uploads/a_mask_picture.png"),
        ("x" * 300, f"uploads/{'x' * 80}.png"),
    ],
)
def test_an_upload_gets_a_plain_name(server: PainterServer, name: str, expected: str, tmp_path: Path) -> None:
    assert server.store.add(name, png(mode="RGB")) == expected
    assert (tmp_path / "masks" / expected).is_file()


def test_uploads_of_one_name_stay_apart_and_the_same_one_is_kept_once(server: PainterServer) -> None:
    names = [server.store.add("a.png", png(value=value, mode="RGB")) for value in (1, 2, 1)]
    assert names == ["uploads/a.png", "uploads/a-2.png", "uploads/a.png"]
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    assert server.store.add("a.jpg", buffer.getvalue()) == "uploads/a-3.jpg", "a.jpg would share its mask with a.png"


def test_an_upload_that_is_too_large_or_damaged_is_refused(
    server: PainterServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mask_painter, "MAX_PAINTED_PIXELS", 1199)
    with pytest.raises(InputError, match="too large"):
        server.store.add("a.png", png(mode="RGB"))
    monkeypatch.setattr(mask_painter, "MAX_PAINTED_PIXELS", 1200)
    with pytest.raises(InputError, match=r"^a\.png: cannot read the image \(image file is truncated"):
        server.store.add("a.png", png(mode="RGB")[:-30])
    assert not [path for path in (tmp_path / "masks").rglob("*") if path.is_file()]
    server.store.add("a.png", png(mode="RGB"))


def test_a_tiff_of_very_many_pages_is_refused_at_once(server: PainterServer) -> None:
    with pytest.raises(InputError, match="more than 100 pages"):
        server.store.add("a.tif", tiff_of_pages(20_000))
    assert server.store.add("b.tif", tiff_of_pages(2)) == "uploads/b.tif"


def test_a_turned_photograph_has_its_mask_as_it_is_seen(server: PainterServer, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (60, 20)).save(tmp_path / "pictures/turned.jpg", exif=exif)
    with pytest.raises(InputError, match=r"but the image turned\.jpg is 20 x 60 px"):
        server.store.save_mask("turned.jpg", png((60, 20)))
    server.store.save_mask("turned.jpg", png((20, 60)))
    status, shown = ask(server, "GET", "/api/picture?name=turned.jpg")
    assert status == 200 and isinstance(shown, bytes)
    with Image.open(io.BytesIO(shown)) as image:
        assert image.size == (20, 60)


def test_folders_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        MaskStore(tmp_path / "masks", tmp_path / "none")
    images = tmp_path / "pictures"
    images.mkdir()
    (images / "a.png").write_bytes(png(mode="RGB"))
    for output in (images, tmp_path):
        with pytest.raises(InputError, match="name another folder"):
            MaskStore(output, images)
    assert MaskStore(images / "masks", images).names() == ["a.png"]
    (images / "a.bmp").write_bytes(b"")
    with pytest.raises(InputError, match=r"a\.bmp and a\.png would have the same mask"):
        MaskStore(tmp_path / "masks", images)


def test_a_port_that_is_taken_is_named(server: PainterServer) -> None:
    with pytest.raises(InputError, match="choose another --port"):
        PainterServer(server.store, server.server_address[1])


def test_the_script_serves_until_it_is_stopped(
    tmp_path: Path, script_environment: Callable[[], dict[str, str]]
) -> None:
    command = [sys.executable, "scripts/paint_masks.py", "--output", str(tmp_path / "masks"), "--port", "0"]
    environment = script_environment() | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        line = process.stdout.readline()
        port = int(line.split("127.0.0.1:")[1].split("/")[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/")
        answer = connection.getresponse()
        assert answer.status == 200 and b"Paint masks" in answer.read()
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        connection.close()
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(20) == 130


def test_a_folder_that_may_not_be_written_is_told(server: PainterServer, tmp_path: Path) -> None:
    (tmp_path / "masks/dogs").write_text("a file where the folder of the mask should be")
    status, answer = ask(server, "POST", "/api/mask?name=dogs/01.png", png())
    assert status == 500
    assert isinstance(answer, dict) and "could not be read or saved" in str(answer["error"])
    assert ask(server, "GET", "/api/pictures")[0] == 200
