"""The real page under 60 visitors, slow clients, bombs and closed tabs: everybody is served, and nothing stays.

No time is asserted tightly, because a machine may be busy; what was measured is printed (pytest -s).
"""

from __future__ import annotations

import asyncio
import io
import json
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from in_thread import in_thread
from PIL import Image
from started_page import StartedPage, started_page
from test_gate import HEADERS, JSON
from test_image_reader import tiff_of_pages, tiff_of_tags

from mimicbrush.models.options import ToyModel

pytestmark = pytest.mark.slow
VISITORS, SLOW, BOMBS, CLOSED = 60, 20, 12, 10
JOIN, LISTEN = "gradio_api/queue/join", "gradio_api/queue/data"


@pytest.fixture(scope="module")
def page(smallest: ToyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartedPage]:
    pytest.importorskip("fastapi", reason="the extra `demo` is not here")
    options = ("--host", "0.0.0.0", "--token", "open sesame", "--max-upload-mib", "8")
    with started_page(smallest, tmp_path_factory.mktemp("loaded"), *options) as page:
        page.address = "http://127.0.0.1:" + page.address.rsplit(":", 1)[1]
        yield page


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


MASK = Image.new("L", (64, 48))
MASK.paste(255, (10, 10, 40, 30))
IMAGES = {"source": Image.new("RGB", (64, 48), "red"), "mask": MASK, "reference": Image.new("RGB", (50, 50), "blue")}
FILES = {name: encoded(image) for name, image in IMAGES.items()}


class Visitor:
    """A browser of one visitor, without the browser."""

    def __init__(self, page: StartedPage) -> None:
        self.client = httpx.AsyncClient(
            base_url=page.address, timeout=120, verify=False
        )  # http: no certificates to load
        self.tokens: dict[str, str] = {}
        self.waits_s: dict[str, list[float]] = defaultdict(list)

    async def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        begin = time.monotonic()
        answer = await self.client.request(method, path, **more)
        self.waits_s[path.split("/")[0] or "page"].append(time.monotonic() - begin)
        return answer

    async def __aenter__(self) -> Visitor:
        assert (await self.ask("GET", "/", params={"token": "open sesame"})).status_code == 200
        assert (await self.ask("GET", "/")).status_code == 200
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.client.aclose()

    async def upload(self, data: bytes) -> httpx.Response:
        return await self.ask("POST", "upload", content=data)

    async def upload_all(self) -> None:
        for name, data in FILES.items():
            answer = await self.upload(data)
            assert answer.status_code == 200, answer.text
            self.tokens[name] = answer.json()["token"]

    async def join(self, session: str, steps: int = 2, count: int = 1) -> httpx.Response:
        asked = json.dumps({"job": session, **self.tokens})
        data = [asked, steps, 2.0, 1, count, False, "whole image"]
        return await self.ask("POST", JOIN, json={"data": data, "session_hash": session, "fn_index": EDIT["index"]})

    async def edit(self, session: str, **more: int) -> dict[str, Any]:
        """Ask until the queue has room, and wait for the result."""
        while (answer := await self.join(session, **more)).status_code == 429:
            assert "try again" in answer.json()["error"] or "wait for" in answer.json()["error"]
            await asyncio.sleep(0.5)
        assert answer.status_code == 200, answer.text
        async with self.client.stream("GET", LISTEN, params={"session_hash": session}) as stream:
            async for line in stream.aiter_lines():
                if '"process_completed"' in line:
                    return dict(json.loads(line.removeprefix("data: "))["output"])
        raise AssertionError("the stream ended without a result")


EDIT = {"index": 0}


def run(work: Callable[[], Awaitable[None]]) -> None:
    in_thread(asyncio.run, asyncio.wait_for(work(), 240))


def find_edit(page: StartedPage) -> None:
    """The queue's number of the edit, as the page has it."""

    async def work() -> None:
        async with Visitor(page) as visitor:
            config = (await visitor.ask("GET", "config")).json()
            EDIT["index"] = next(each["id"] for each in config["dependencies"] if each["backend_fn"])

    run(work)


def memory_mib(page: StartedPage) -> float:
    status = Path(f"/proc/{page.process.pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1024


async def trickle(page: StartedPage) -> str:
    """Send a byte a second, until the server has enough of it; its answer."""
    async with Visitor(page) as visitor:
        cookie = "; ".join(f"{name}={value}" for name, value in visitor.client.cookies.items())
    host, port = page.address.removeprefix("http://").strip("/").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /upload HTTP/1.1\r\nHost: {host}:{port}\r\nCookie: {cookie}\r\nContent-Length: 1000000\r\n\r\n"
    writer.write(head.encode())
    answer = asyncio.create_task(reader.read())
    while not answer.done():
        with suppress(ConnectionError):
            writer.write(b"x")
            await writer.drain()
        await asyncio.wait({answer}, timeout=1)
    writer.close()
    try:
        return (await answer).decode()
    except ConnectionError:  # a byte that was on its way when the server closed costs the answer
        return "reset"


def test_sixty_visitors_are_served_among_slow_clients_bombs_and_closed_tabs(page: StartedPage) -> None:
    find_edit(page)
    bombs = [tiff_of_pages(20_000), tiff_of_tags(2000, 1), encoded(Image.new("L", (7500, 7500)))]
    waits: dict[str, list[float]] = defaultdict(list)
    refused: list[str] = []
    done: list[str] = []

    async def visit(number: int) -> None:
        async with Visitor(page) as visitor:
            await visitor.upload_all()
            assert (await visitor.ask("GET", f"shown/{visitor.tokens['source']}")).status_code == 200
            output = await visitor.edit(f"visitor-{number}")
            results = output["data"][0]["results"]
            image = await visitor.ask("GET", f"files/{results[0]['token']}")
            with Image.open(io.BytesIO(image.content)) as opened:
                assert opened.size == (64, 48)
            done.append(visitor.tokens["source"])
            for what, seconds in visitor.waits_s.items():
                waits[what].extend(seconds)

    async def bomb(number: int) -> None:
        async with Visitor(page) as visitor:
            answer = await visitor.upload(bombs[number % len(bombs)])
            assert answer.status_code == 400, answer.text
            refused.append(answer.json()["error"])

    async def close_tab(number: int) -> None:
        """Ask for the longest edit there is, listen, and go."""
        async with Visitor(page) as visitor:
            await visitor.upload_all()
            if (await visitor.join(f"closed-{number}", steps=100, count=4)).status_code == 200:
                async with visitor.client.stream("GET", LISTEN, params={"session_hash": f"closed-{number}"}):
                    await asyncio.sleep(0.2)

    async def work() -> None:
        slow = [asyncio.create_task(trickle(page)) for _ in range(SLOW)]
        others = [asyncio.create_task(close_tab(number)) for number in range(CLOSED)]
        others += [asyncio.create_task(bomb(number)) for number in range(BOMBS)]
        await asyncio.gather(*(visit(number) for number in range(VISITORS)), *others)
        answers = await asyncio.gather(*slow)
        assert all(each == "reset" or each.startswith("HTTP/1.1 408 ") for each in answers), answers

    before = memory_mib(page)
    begin = time.monotonic()
    run(work)
    assert len(done) == len(set(done)) == VISITORS and len(refused) == BOMBS
    took_s, after = time.monotonic() - begin, memory_mib(page)
    print(f"\n{VISITORS} visitors in {took_s:.1f} s; memory {before:.0f} -> {after:.0f} MiB")
    for what, seconds in waits.items():
        late = statistics.quantiles(seconds, n=20)[-1]
        print(f"{what:10s} median {statistics.median(seconds):.2f} s, 95 % {late:.2f} s, longest {max(seconds):.2f} s")
    assert after < before + 400
    run(lambda: checked_alone(page))


async def checked_alone(page: StartedPage) -> None:
    """After all of that, one visitor alone has everything to himself."""
    async with Visitor(page) as visitor:
        await visitor.upload_all()
        await visitor.edit("alone")


@pytest.fixture(scope="module")
def insider(page: StartedPage) -> Iterator[httpx.Client]:
    """One who has logged in."""
    find_edit(page)
    with httpx.Client(base_url=page.address, timeout=60) as client:
        client.get("/", params={"token": "open sesame"})
        client.get("/")
        yield client


@settings(suppress_health_check=list(HealthCheck), max_examples=60)
@given(
    method=st.sampled_from(["GET", "POST", "HEAD"]),
    path=st.one_of(
        st.sampled_from(["/", "/config", "/theme.css", "/manifest.json", "/favicon.ico", JOIN, LISTEN]),
        st.tuples(
            st.sampled_from(["assets/", "static/", "page/", "examples/", "files/", "gradio_api/"]),
            st.text(st.characters(codec="utf-8", exclude_characters="?#\\"), max_size=30),
        ).map("".join),
        st.integers(200, 5000).map(lambda length: "assets/" + "a" * length),
        st.sampled_from(["assets/../../../etc/passwd", "static/..%2f..%2fetc/passwd", "assets//etc/passwd", "static/"]),
    ),
    headers=HEADERS,
    data=st.lists(JSON, min_size=7, max_size=7),
)
def test_gradio_behind_the_gate_answers_hostile_requests_without_a_fault_of_its_own(
    insider: httpx.Client, method: str, path: str, headers: dict[str, str], data: list[Any]
) -> None:
    given_headers = {name: value for name, value in headers.items() if name not in ("Cookie", "Content-Length")}
    body = (
        json.dumps({"data": data, "session_hash": "hostile", "fn_index": EDIT["index"]}) if method == "POST" else None
    )
    with suppress(httpx.RemoteProtocolError, httpx.LocalProtocolError, httpx.InvalidURL):
        answer = insider.request(method, path, headers=given_headers, content=body)
        assert answer.status_code < 500
        assert b"root:" not in answer.content


def test_a_signal_ends_the_page_soon_while_an_edit_runs(page: StartedPage) -> None:
    """The last test here: it ends the page."""
    find_edit(page)

    async def work() -> None:
        async with Visitor(page) as visitor:
            await visitor.upload_all()
            assert (await visitor.join("last", steps=100, count=4)).status_code == 200
            async with visitor.client.stream("GET", LISTEN, params={"session_hash": "last"}) as stream:
                async for line in stream.aiter_lines():
                    if '"progress"' in line:
                        break
                print(f"\nended {page.end():.1f} s after SIGTERM")

    run(work)
