"""Free clips: a list with licences, fetched over a line that breaks, checked, mined, and credited."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from file_server import FileServer, file_server
from mining_inputs import write_clips

from mimicbrush.cli.dev import fetch_clips as command
from mimicbrush.data.manifest import read_rows
from mimicbrush.errors import InputError, cli_main
from mimicbrush.io import download
from mimicbrush.io.download import DownloadError, check_address, download_file
from mimicbrush.mining.clips import fetch as fetching
from mimicbrush.mining.clips.clip_list import LICENCE_TEXTS, read_clip_list
from mimicbrush.mining.input_list import read_input_list

ROOT = Path(__file__).parents[2]
HEADER = "path,url,licence,attribution,sha256,bytes,start_s,end_s\n"


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return [path.read_bytes() for path in write_clips(tmp_path_factory.mktemp("videos"), 2)]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(download, "_PAUSE_S", 0.0)
    monkeypatch.setattr(download, "_CHUNK_BYTES", 1000)
    with file_server() as serving:
        yield serving


@pytest.fixture
def fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the command, and gives its exit status."""

    def run(*arguments: str) -> int:
        options = [str(tmp_path / "list.csv"), "-o", str(tmp_path / "clips"), "--no-progress", *arguments]
        monkeypatch.setattr(sys, "argv", ["mimicbrush fetch-clips", *options])
        try:
            cli_main(command.main)
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_the_list_that_comes_with_the_project_is_complete_and_free() -> None:
    clips = read_clip_list(command.FREE_CLIPS)
    assert len(clips) >= 10
    for clip in clips:
        assert clip.licence in LICENCE_TEXTS and len(clip.attribution) > 10
        assert clip.url.startswith("https://")
        # An address of GitHub names a commit, so its content cannot change.
        assert "githubusercontent" not in clip.url or re.search(r"/[0-9a-f]{40}/", clip.url)
    unstated = [clip.path for clip in clips if not clip.sha256]
    assert unstated == ["blender/big_buck_bunny_720p_h264.mov"]


def test_its_hashes_are_those_of_the_clips_that_were_used(shared: Path) -> None:
    here = {sha256(path.read_bytes()): path for path in (shared / "data/videos").iterdir()}
    found = [clip for clip in read_clip_list(command.FREE_CLIPS) if clip.sha256 in here]
    assert len(found) == 6
    assert all(clip.num_bytes == here[clip.sha256].stat().st_size for clip in found)


def test_clips_are_fetched_over_a_line_that_breaks_with_their_licences(
    tmp_path: Path,
    videos: list[bytes],
    server: FileServer,
    fetch: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.files = {"a.mp4": videos[0], "b.mp4": videos[1]}
    server.breaks = {"a.mp4": [5000, 3000]}
    (tmp_path / "list.csv").write_text(
        HEADER
        + f'one/a.mp4,{server.url("a.mp4")},CC BY 4.0,"Ada, of Example",{sha256(videos[0])},{len(videos[0])},0.5,\n'
        f"b.mp4,{server.url('b.mp4')},CC0 1.0,Bob,,,,\n"
    )
    assert fetch() == 0
    assert (tmp_path / "clips/one/a.mp4").read_bytes() == videos[0]
    assert [each for each in server.ranges if each[0] == "a.mp4"] == [
        ("a.mp4", ""), ("a.mp4", "bytes=5000-"), ("a.mp4", "bytes=8000-")]  # fmt: skip
    said = capsys.readouterr().out
    assert f"the list has no hash for b.mp4. From now on, its hash must be {sha256(videos[1])}" in said
    assert re.search(r"2 of 2 clips are in .* \(.* kB\); 2 were downloaded now", said)
    assert f"next: mimicbrush mine input={tmp_path / 'clips/clips.csv'} output=PAIRS" in said
    credits = (tmp_path / "clips/ATTRIBUTION.md").read_text()
    assert "`one/a.mp4`: Ada, of Example. Licence: [CC BY 4.0](https://creativecommons.org/licenses/by/4.0/)" in credits
    items, _ = read_input_list(tmp_path / "clips/clips.csv", tmp_path / "clips")
    assert [(item.path, item.sha256, item.start_s, item.licence, item.url) for item in items] == [
        ("b.mp4", sha256(videos[1]), 0.0, "CC0 1.0", server.url("b.mp4")),
        ("one/a.mp4", sha256(videos[0]), 0.5, "CC BY 4.0", server.url("a.mp4")),
    ]
    assert not list((tmp_path / "clips").rglob("*.part*"))
    # What is here is not fetched again, and what was pinned must stay the same.
    server.ranges.clear()
    assert fetch() == 0 and server.ranges == []
    (tmp_path / "clips/b.mp4").unlink()
    server.files["b.mp4"] = videos[0]
    for _ in range(2):  # a failure does not make it forget
        assert fetch() == 1
        assert f"the list says {sha256(videos[1])}" in capsys.readouterr().err
    assert not (tmp_path / "clips/b.mp4").exists() and (tmp_path / "clips/one/a.mp4").exists()


@pytest.mark.slow
def test_a_fetch_that_is_killed_goes_on_and_its_clips_are_mined(
    tmp_path: Path, videos: list[bytes], server: FileServer
) -> None:
    server.files, server.breaks, server.stalls = {"a.mp4": videos[0]}, {"a.mp4": [6000]}, True
    (tmp_path / "list.csv").write_text(HEADER + f"a.mp4,{server.url('a.mp4')},CC0 1.0,Ada,{sha256(videos[0])},,,\n")
    job = [sys.executable, "scripts/fetch_clips.py", str(tmp_path / "list.csv"), "-o", str(tmp_path / "clips")]
    process = subprocess.Popen(job, cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    part = tmp_path / "clips/.a.mp4.part"
    end = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size == 6000) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "clips/a.mp4").exists()
    server.resumed.set()
    again = subprocess.run(
        [*job, "--pairs", str(tmp_path / "pairs")], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert "1 inputs = 1 accepted" in again.stdout
    assert (tmp_path / "clips/a.mp4").read_bytes() == videos[0]
    rows = read_rows(tmp_path / "pairs").to_pylist()
    assert {(row["status"], row["licence"], row["url"]) for row in rows} == {("pair", "CC0 1.0", server.url("a.mp4"))}
    assert server.ranges == [("a.mp4", ""), ("a.mp4", "bytes=6000-")]


@pytest.mark.parametrize(
    ("headers", "options", "message"),
    [
        ({}, {"sha256": "0" * 64}, "the list says 0000"),
        ({}, {"num_bytes": 7}, "bytes, and the list says 7"),
        ({}, {"max_bytes": 1000}, "more than the limit of 1 kB"),
        ({"Content-Length": ""}, {"max_bytes": 1000}, "sent more than 1 kB"),
        ({"Content-Type": "text/html; charset=utf-8"}, {}, "sent a web page"),
        ({"Content-Encoding": "gzip"}, {}, "sent compressed content"),
    ],
)
def test_another_file_than_was_asked_for_is_not_kept(
    tmp_path: Path,
    videos: list[bytes],
    server: FileServer,
    headers: dict[str, str],
    options: dict[str, object],
    message: str,
) -> None:
    server.files["a.mp4"], server.headers["a.mp4"] = videos[0], headers
    with pytest.raises(DownloadError, match=message):
        download_file(server.url("a.mp4"), tmp_path / "a.mp4", **{"max_bytes": 10**9, **options})  # type: ignore[arg-type]
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize(
    "content", [b"no video at all", b"<!DOCTYPE html><title>Log in</title>", b"\0\0\0\x20ftypisom"]
)
def test_what_is_no_whole_video_is_a_failure_and_the_others_go_on(
    tmp_path: Path,
    videos: list[bytes],
    server: FileServer,
    fetch: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    content: bytes,
) -> None:
    server.files = {"a.mp4": content, "b.mp4": videos[0]}
    lines = [f"{name},{server.url(name)},CC0 1.0,Ada,,,,\n" for name in ("a.mp4", "b.mp4", "c.mp4")]
    (tmp_path / "list.csv").write_text(HEADER + "".join(lines))
    assert fetch() == 1
    said = capsys.readouterr()
    assert re.search(r"failed: a\.mp4: the downloaded file is not an? (intact )?video", said.err)
    assert "failed: c.mp4" in said.err and "the server answered 404" in said.err
    assert "1 of 3 clips are in" in said.out
    with (tmp_path / "clips/clips.csv").open() as file:
        assert [row["path"] for row in csv.DictReader(file)] == ["b.mp4"]


def test_a_part_of_an_older_version_is_not_joined_to_a_newer_one(
    tmp_path: Path, videos: list[bytes], server: FileServer
) -> None:
    server.files["a.mp4"], server.breaks = videos[0], {"a.mp4": [4000, 0, 0, 0, 0]}
    with pytest.raises(
        DownloadError, match=r"the connection ended early; 4 kB are already here. Run the same command again"
    ):
        download_file(server.url("a.mp4"), tmp_path / "a.mp4", max_bytes=10**9)
    assert (tmp_path / ".a.mp4.part").stat().st_size == 4000
    server.files["a.mp4"], server.breaks = videos[1], {}
    assert download_file(server.url("a.mp4"), tmp_path / "a.mp4", max_bytes=10**9) == sha256(videos[1])
    # Killed between the last byte and the name: nothing is left to ask for.
    (tmp_path / "a.mp4").rename(tmp_path / ".b.mp4.part")
    version = {"url": server.url("a.mp4"), "tag": f'"{sha256(videos[1])[:8]}"'}
    (tmp_path / ".b.mp4.part.json").write_text(json.dumps(version))
    assert download_file(server.url("a.mp4"), tmp_path / "b.mp4", max_bytes=10**9) == sha256(videos[1])
    assert server.ranges[-1] == ("a.mp4", f"bytes={len(videos[1])}-")


def test_a_stated_size_tells_that_a_connection_ended_early(
    tmp_path: Path, videos: list[bytes], server: FileServer
) -> None:
    """A server that names no length ends a whole file and a broken one alike."""
    server.files["a.mp4"], server.headers["a.mp4"] = videos[0], {"Content-Length": ""}
    server.breaks = {"a.mp4": [4000]}
    file, size = tmp_path / "a.mp4", len(videos[0])
    assert download_file(server.url("a.mp4"), file, num_bytes=size, max_bytes=10**9) == sha256(videos[0])
    assert server.ranges == [("a.mp4", ""), ("a.mp4", "bytes=4000-")]


def test_a_fetch_that_is_stopped_forgets_no_clip(
    tmp_path: Path,
    videos: list[bytes],
    server: FileServer,
    fetch: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.files = dict(zip(("a.mp4", "b.mp4", "c.mp4"), [*videos, videos[0]], strict=True))
    lines = {name: f"{name},{server.url(name)},CC0 1.0,Ada,,,,\n" for name in server.files}
    (tmp_path / "list.csv").write_text(HEADER + lines["a.mp4"] + lines["c.mp4"])
    assert fetch() == 0

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "list.csv").write_text(HEADER + "".join(lines.values()))
    with monkeypatch.context() as patched:
        patched.setattr(fetching, "download_file", stop)
        assert fetch() == 130
    for expected in (["a.mp4", "c.mp4"], ["a.mp4", "b.mp4", "c.mp4"]):  # in the order of the list
        with (tmp_path / "clips/clips.csv").open() as file:
            assert [row["path"] for row in csv.DictReader(file)] == expected
        assert fetch() == 0


def test_only_https_and_no_way_back_from_it(tmp_path: Path, server: FileServer) -> None:
    for url in (
        "http://example.org/a.mp4",
        "ftp://example.org/a",
        "file:///etc/hostname",
        "a.mp4",
        "https://",
        "https://[",
        "",
    ):
        with pytest.raises(DownloadError, match="starts with https://"):
            check_address(url)
    check_address("https://example.org/a.mp4")
    for target in ("http://example.org/a.mp4", "file:///etc/hostname"):
        server.redirects["a.mp4"] = target
        with pytest.raises((DownloadError, InputError), match=r"is not an https address|answered 302"):
            download_file(server.url("a.mp4"), tmp_path / "a.mp4", max_bytes=10**9)
    handler, request = download._CheckedRedirects(), urllib.request.Request("https://example.org/a.mp4")
    with pytest.raises(DownloadError, match="which is this machine"):
        handler.redirect_request(request, None, 302, "", {}, "https://localhost/a.mp4")
    server.redirects["a.mp4"], server.files["b.mp4"] = server.url("b.mp4"), b"here"
    assert download_file(server.url("a.mp4"), tmp_path / "a.mp4", max_bytes=10**9) == sha256(b"here")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a.mp4,https://example.org/a.mp4,,Ada,,,,", "licence is empty. A clip without"),
        ("../a.mp4,https://example.org/a.mp4,CC0 1.0,Ada,,,,", ": expected the name of a video inside"),
        ("a.exe,https://example.org/a.exe,CC0 1.0,Ada,,,,", ": expected the name of a video inside"),
        ("a.mp4,http://example.org/a.mp4,CC0 1.0,Ada,,,,", "entry 1: .* starts with https://"),
        ("a.mp4,https://example.org/a.mp4,CC0 1.0,Ada,abc,,,", "expected 64 hexadecimal digits"),
        ("a.mp4,https://example.org/a.mp4,CC0 1.0,Ada,,-1,,", "expected a whole number above 0"),
        ("a.mp4,https://example.org/a.mp4,CC0 1.0,Ada,,,9,8", "end_s=8 must be larger than start_s=9"),
        ("a.mp4,https://example.org/a.mp4,CC0 1.0,Ada,,,,,more", "more cells than in the header"),
        (f"a.mp4,https://example.org/a.mp4,CC0 1.0,Ada,,{'9' * 5000},,", "expected a whole number above 0"),
        ("a.mp4,https://example.org:99999/a.mp4,CC0 1.0,Ada,,,,", "entry 1: .* has a host name .*Port out of range"),
        ("a.mp4,https://a..b/a.mp4,CC0 1.0,Ada,,,,", "entry 1: .* has a host name .*label empty"),
        ("a.mp4,https://exa mple/a.mp4,CC0 1.0,Ada,,,,", r"entry 1: .* has a host name .*has spaces"),
        ("clips.csv/a.mp4,https://a/b,CC0 1.0,Ada,,,,", "must not start with a dot, must not be clips.csv"),
        (f"{'a' * 250}.mp4,https://a/b,CC0 1.0,Ada,,,,", "each part can have at most 200 bytes"),
        ("a.mp4,https://a/b,CC0 1.0,Ada,,,,\n./A.mp4,https://a/c,CC0 1.0,Ada,,,,", "'A.mp4' is listed twice"),
        ("a.mp4,https://a/b,CC0 1.0,Ada,,,,\na.mp4/b.mp4,https://a/c,CC0 1.0,Ada,,,,", "the name of another clip"),
    ],
)
def test_a_list_that_cannot_be_used_is_one_message(tmp_path: Path, row: str, message: str) -> None:
    (tmp_path / "list.csv").write_text(f"{HEADER}{row}\n")
    with pytest.raises(InputError, match=message):
        read_clip_list(tmp_path / "list.csv")
    twice = f"path,{HEADER}b.mp4,{row}\n"
    for text, wrong in (
        (HEADER, "lists no clips"),
        (twice, "the column 'path' twice"),
        ("path,url\n", "has no column licence"),
    ):
        (tmp_path / "list.csv").write_text(text)
        with pytest.raises(InputError, match=wrong):
            read_clip_list(tmp_path / "list.csv")


@pytest.mark.parametrize(
    ("headers", "message"),
    [({"Content-Length": ""}, "sent .* bytes, and the list says"), ({"Content-Length": "9" * 5000}, "sent .* bytes")],
)
def test_a_server_that_names_no_size_must_send_that_of_the_list(
    tmp_path: Path, server: FileServer, headers: dict[str, str], message: str
) -> None:
    server.files["a.mp4"], server.headers["a.mp4"] = b"half", headers
    with pytest.raises(DownloadError, match=message):
        download_file(server.url("a.mp4"), tmp_path / "a.mp4", num_bytes=8, max_bytes=10**9)
    assert not list(tmp_path.iterdir())


def test_a_column_of_any_name_is_no_cell_too_many(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(f"None,{HEADER}more,a.mp4,https://example.org/a.mp4,CC0 1.0,Ada,,,,\n")
    (clip,) = read_clip_list(tmp_path / "list.csv")
    assert clip.path == "a.mp4" and clip.attribution == "Ada"


def test_answers_that_nobody_can_read_are_failures_and_other_versions_are_not_joined(
    tmp_path: Path, videos: list[bytes], server: FileServer
) -> None:
    server.redirects["x"] = "https://["
    with pytest.raises(DownloadError, match="cannot read the answer of the server"):
        download_file(server.url("x"), tmp_path / "x", max_bytes=10**9)
    url = server.url("a \u706b.mp4?b=\u00fc")
    server.files["a%20%E7%81%AB.mp4?b=%C3%BC"] = videos[0]
    assert download_file(url, tmp_path / "a.mp4", max_bytes=10**9) == sha256(videos[0])
    # A server that does not look at If-Range sends the rest of what it has now.
    server.files["b.mp4"], server.breaks = videos[0], {"b.mp4": [4000]}
    server.headers["b.mp4"] = {"ETag": '"one"'}
    version = {"url": server.url("b.mp4"), "tag": f'"{sha256(videos[0])[:8]}"'}
    (tmp_path / ".b.mp4.part").write_bytes(bytes(3000))
    (tmp_path / ".b.mp4.part.json").write_text(json.dumps(version))
    assert download_file(server.url("b.mp4"), tmp_path / "b.mp4", max_bytes=10**9) == sha256(videos[0])
    (tmp_path / ".b.mp4.part.json").write_text(json.dumps(version | {"tag": "\u706b\n"}))
    assert download_file(server.url("b.mp4"), tmp_path / "b.mp4", max_bytes=10**9) == sha256(videos[0])


def test_what_lies_there_already_is_checked_and_stops_no_other_clip(
    tmp_path: Path,
    videos: list[bytes],
    server: FileServer,
    fetch: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.files = dict.fromkeys(("a.mp4", "b.mp4", "c.mp4", "d.mp4"), videos[0])
    makers = dict.fromkeys(server.files, '"Ada\n* Bob"')
    lines = [f"{name},{server.url(name)},CC0 1.0,{makers[name]},,{len(videos[0])},,\n" for name in server.files]
    (tmp_path / "list.csv").write_text(HEADER + "".join(lines))
    (tmp_path / "clips" / "b.mp4").mkdir(parents=True)
    (tmp_path / "clips" / "a.mp4").write_bytes(b"<html>")
    (tmp_path / "clips" / "c.mp4").write_bytes(bytes(len(videos[0])))
    assert fetch() == 1
    said = capsys.readouterr().err
    assert re.search(r"a\.mp4 already exists and does not have the \d+ bytes of the list\. Move it away", said)
    assert "b.mp4 already exists and is not a file. Move it away" in said
    assert re.search(r"c\.mp4 already exists and is not an? (intact )?video.*Move it away", said)
    assert "d.mp4`: Ada * Bob. Licence" in (tmp_path / "clips" / "ATTRIBUTION.md").read_text()


def test_a_list_that_is_not_there_is_named_with_what_it_should_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no list .*absent\.csv; give a CSV file with the columns path, url"):
        read_clip_list(tmp_path / "absent.csv")
