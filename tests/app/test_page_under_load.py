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
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
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
from test_gate import ASKED, HEADERS, JSON
from test_image_reader import tiff_of_pages, tiff_of_tags

from mimicbrush.models.options import ToyModel

pytestmark = pytest.mark.slow
VISITORS, SLOW, BOMBS, CLOSED = 60, 20, 12, 10


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

    async def ask_for_edit(self, steps: int = 2, count: int = 1) -> httpx.Response:
        asked = {
            "source": self.tokens["source"], "mask": self.tokens["mask"], "steps": steps, "guidance": 2.0, "seed": 1,
            "references": [{"image": self.tokens["reference"], "box": None}], "count": count, "keep_shape": False,
            "crop": "full", "auto_zoom": False,
        }  # fmt: skip
        return await self.ask("POST", "edit", json=asked)

    async def edit(self, **more: int) -> list[dict[str, Any]]:
        """Ask until the queue has room, and wait for the results."""
        while (answer := await self.ask_for_edit(**more)).status_code == 429:
            assert "try again" in answer.json()["error"] or "wait until" in answer.json()["error"]
            await asyncio.sleep(0.5)
        assert answer.status_code == 200, answer.text
        async for state in self.listen(answer.json()["job"]):
            if "result" in state:
                return list(state["result"]["results"])
        raise AssertionError("the stream ended without a result")

    async def listen(self, job: str) -> AsyncIterator[dict[str, Any]]:
        async with self.client.stream("GET", f"edit/{job}") as stream:
            async for line in stream.aiter_lines():
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))


def run(work: Callable[[], Awaitable[None]]) -> None:
    in_thread(asyncio.run, asyncio.wait_for(work(), 240))


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
    bombs = [tiff_of_pages(20_000), tiff_of_tags(2000, 1), encoded(Image.new("L", (7500, 7500)))]
    waits: dict[str, list[float]] = defaultdict(list)
    refused: list[str] = []
    done: list[str] = []

    async def visit() -> None:
        async with Visitor(page) as visitor:
            await visitor.upload_all()
            assert (await visitor.ask("GET", f"shown/{visitor.tokens['source']}")).status_code == 200
            results = await visitor.edit()
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

    async def close_tab() -> None:
        """Ask for the longest edit there is, listen, and go."""
        async with Visitor(page) as visitor:
            await visitor.upload_all()
            answer = await visitor.ask_for_edit(steps=100, count=4)
            if answer.status_code == 200:
                async with visitor.client.stream("GET", f"edit/{answer.json()['job']}"):
                    await asyncio.sleep(0.2)

    async def work() -> None:
        slow = [asyncio.create_task(trickle(page)) for _ in range(SLOW)]
        others = [asyncio.create_task(close_tab()) for _ in range(CLOSED)]
        others += [asyncio.create_task(bomb(number)) for number in range(BOMBS)]
        await asyncio.gather(*(visit() for _ in range(VISITORS)), *others)
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
        await visitor.edit()


@pytest.fixture(scope="module")
def insider(page: StartedPage) -> Iterator[httpx.Client]:
    """One who has logged in."""
    with httpx.Client(base_url=page.address, timeout=60) as client:
        client.get("/", params={"token": "open sesame"})
        client.get("/")
        yield client


@settings(suppress_health_check=list(HealthCheck), max_examples=60)
@given(
    method=st.sampled_from(["GET", "POST", "HEAD"]),
    path=st.one_of(
        st.sampled_from(["/", "/options", "/upload", "/edit", "/edit/1", "/files/1", "/shown/1", "/cancel/1"]),
        st.tuples(
            st.sampled_from(["edit/", "shown/", "page/", "examples/", "files/", "cancel/"]),
            st.text(st.characters(codec="utf-8", exclude_characters="?#\\"), max_size=30),
        ).map("".join),
        st.integers(200, 5000).map(lambda length: "page/" + "a" * length),
        st.sampled_from(["page/../../../etc/passwd", "page/..%2f..%2fetc/passwd", "files//etc/passwd", "page/"]),
    ),
    headers=HEADERS,
    data=st.one_of(
        JSON,
        st.tuples(st.sampled_from(sorted(ASKED)), JSON).map(lambda pair: {**ASKED, pair[0]: pair[1]}),
    ),
)
def test_the_page_answers_hostile_requests_without_a_fault(
    insider: httpx.Client, method: str, path: str, headers: dict[str, str], data: Any
) -> None:
    given_headers = {name: value for name, value in headers.items() if name not in ("Cookie", "Content-Length")}
    body = json.dumps(data) if method == "POST" else None
    with suppress(httpx.RemoteProtocolError, httpx.LocalProtocolError, httpx.InvalidURL):
        answer = insider.request(method, path, headers=given_headers, content=body)
        assert answer.status_code < 500
        assert b"root:" not in answer.content


def test_a_signal_ends_the_page_soon_while_an_edit_runs(page: StartedPage) -> None:
    """The last test here: it ends the page."""

    async def work() -> None:
        async with Visitor(page) as visitor:
            await visitor.upload_all()
            answer = await visitor.ask_for_edit(steps=100, count=4)
            assert answer.status_code == 200
            async for state in visitor.listen(answer.json()["job"]):
                if state.get("done"):
                    print(f"\nended {page.end():.1f} s after SIGTERM")
                    break

    run(work)
