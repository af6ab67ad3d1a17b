"""Who may ask the editing page for what: hostile requests, names, origins, tokens, the queue, slow clients."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from in_thread import in_thread
from PIL import Image
from starlette.responses import StreamingResponse

from mimicbrush.app import bodies
from mimicbrush.app.access import Access, choose_access
from mimicbrush.app.bodies import BodyReader, RefusedRequestError
from mimicbrush.app.edit_queue import EditQueue, Job
from mimicbrush.app.editing_service import EditingService, EditRequest, ReferenceChoice
from mimicbrush.app.gate import Gate
from mimicbrush.app.image_reader import ImageReader
from mimicbrush.app.page_routes import add_routes
from mimicbrush.app.session_files import SessionFiles, VisitorLimits
from mimicbrush.errors import InputError

ANN, BOB = "a" * 24, "b" * 24
ASKED = {
    "source": "s", "mask": "m", "references": [{"image": "r", "box": None}], "steps": 3, "guidance": 2.0, "seed": 1,
    "count": 1, "keep_shape": False, "crop": "full", "auto_zoom": False,
}  # fmt: skip


def png(size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "white").save(buffer, "PNG")
    return buffer.getvalue()


class NotingService(EditingService):
    """A service that notes what reaches it, and edits when it is allowed to."""

    asked: list[EditRequest]
    may_end: threading.Event

    def check_files(self, visitor: str, request: EditRequest) -> None:
        pass

    def edit(self, visitor: str, request: EditRequest, show: Any, is_cancelled: Any = lambda: False) -> Any:
        self.asked.append(request)
        show({"done": 1, "of": request.steps})
        while not self.may_end.wait(0.01):
            if is_cancelled() or self._is_closing:
                return None
        return {"results": []}


class Page:
    """The page with edits that are only noted, and everything else real."""

    def __init__(self, folder: Path, access: Access = Access()) -> None:  # noqa: B008
        limits = VisitorLimits(upload_bytes=2**20)
        self.reader = ImageReader(limits)
        self.service = NotingService(None, "", SessionFiles(folder / "visits", limits), self.reader)  # type: ignore[arg-type]  # nothing is edited
        self.service.asked, self.service.may_end = [], threading.Event()
        self.service.may_end.set()
        app = FastAPI(openapi_url=None, redirect_slashes=False)
        self.loop = asyncio.new_event_loop()
        self.queue = EditQueue(self.service)
        add_routes(app, self.service, self.queue)
        self.gate = Gate(app, access, limits)
        transport = httpx.ASGITransport(self.gate)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:7860")

    @property
    def asked(self) -> list[EditRequest]:
        """The edits that were asked for; waits until none is left in the queue."""
        in_thread(self.loop.run_until_complete, asyncio.wait_for(self._drained(), 30))
        return self.service.asked

    async def _drained(self) -> None:
        while any(job.phase != "ended" for job in self.queue._jobs.values()):
            await asyncio.sleep(0.005)

    def ask(self, method: str, path: str, *, visitor: str | None = ANN, **more: Any) -> httpx.Response:
        """Ask, and get an answer soon: a request that hangs fails."""
        headers = dict(more.pop("headers", {}))
        if visitor is not None and "Cookie" not in headers:
            headers["Cookie"] = f"mimicbrush_visitor={visitor}"

        self.client.cookies.clear()
        answer = asyncio.wait_for(self.client.request(method, path, headers=headers, **more), 60)
        return in_thread(self.loop.run_until_complete, answer)

    def close(self) -> None:
        self.service.close()
        in_thread(self.loop.run_until_complete, self.client.aclose())
        in_thread(self.loop.run_until_complete, self.loop.shutdown_default_executor())
        self.loop.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    page = Page(tmp_path_factory.mktemp("page"))
    yield page
    page.close()


PATHS = st.one_of(
    st.sampled_from(
        ["/", "/upload", "/edit", "/edit/1", "/login", "/cancel/1", "/files/1", "/shown/1", "/examples/0/source"]
    ),
    st.text(st.characters(codec="ascii", min_codepoint=33), max_size=40).map(lambda text: "/" + text),
    st.sampled_from(["/edit/", "/files/", "/maps/", "/page/", "/examples/", "/cancel/"]).flatmap(
        lambda start: st.text(st.characters(codec="utf-8"), max_size=20).map(lambda rest: start + rest)
    ),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
BODIES = st.one_of(
    st.binary(max_size=200),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.tuples(st.sampled_from(sorted(ASKED)), JSON).map(lambda pair: json.dumps({**ASKED, pair[0]: pair[1]}).encode()),
    st.fixed_dictionaries(dict.fromkeys(ASKED, JSON)).map(lambda value: json.dumps(value).encode()),
    st.integers(1, 200_000).map(lambda size: b"x" * size),
    st.integers(1000, 20_000).map(lambda depth: b"[" * depth),
    st.binary(max_size=100).map(lambda noise: png()[: 60 + len(noise)] + noise),
)
HEADERS = st.dictionaries(
    st.sampled_from(
        ["Cookie", "Origin", "Host", "Content-Type", "Content-Length", "Sec-Fetch-Site", "Range", "X-Forwarded-Host",
         "Transfer-Encoding", "Accept", "Authorization"]
    ),
    st.one_of(
        st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60),
        st.sampled_from(["http://127.0.0.1:7860", "127.0.0.1", f"mimicbrush_visitor={ANN}", "null", "same-origin"]),
    ),
    max_size=4,
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    method=st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW"]),
    path=PATHS,
    headers=HEADERS,
    body=BODIES,
    has_cookie=st.booleans(),
)
def test_a_hostile_request_gets_an_answer_that_is_no_fault_of_the_server(
    page: Page, method: str, path: str, headers: dict[str, str], body: bytes, has_cookie: bool
) -> None:
    try:
        url = httpx.URL("http://127.0.0.1:7860").join(path.replace("%", "%25"))
    except httpx.InvalidURL:
        return
    page.service.asked.clear()
    answer = page.ask(
        method, str(url) if url.host == "127.0.0.1" else "/", visitor=ANN if has_cookie else None, content=body,
        headers=headers,
    )  # fmt: skip
    assert answer.status_code < 500, answer.text
    if method not in ("GET", "HEAD", "POST"):
        assert answer.status_code == 405
    if answer.status_code >= 400 and method != "HEAD":
        assert answer.json()
    for asked in page.asked:  # whatever passes is what the page may ask
        assert 1 <= asked.steps <= 100 and 1 <= asked.count <= 4 and 0 <= asked.guidance <= 30
        assert 1 <= len(asked.references) <= 4 and asked.crop in ("full", "auto")


@pytest.mark.parametrize(
    "path",
    [
        "/edit/",
        "//edit",
        "/EDIT",
        "/edit/1",
        "/run/predict",
        "/api/run",
        "/docs",
        "/openapi.json",
        "/redoc",
        "/queue/join",
    ],
)
def test_nothing_goes_around_the_queue(page: Page, path: str) -> None:
    page.service.asked.clear()
    for method in ("POST", "GET"):
        assert page.ask(method, f"http://127.0.0.1:7860{path}", json=ASKED).status_code in (404, 405)
    assert page.asked == []


def test_the_queue_gets_what_the_page_asks_and_nothing_else(page: Page) -> None:
    page.service.asked.clear()
    assert page.ask("POST", "/edit", json={**ASKED, "event_id": "x", "job": "y"}).status_code == 200
    expected = EditRequest("s", "m", (ReferenceChoice("r"),), 3, 2.0, 1, 1, False, "full", False)
    assert page.asked == [expected]
    for changed in (
        {"source": None}, {"source": 1}, {"mask": ["m"]}, {"references": "r"}, {"references": [1]},
        {"references": [{"image": 1}]}, {"references": [{}]}, {"steps": "3"}, {"steps": 2.5}, {"steps": True},
        {"count": None}, {"guidance": "2"}, {"keep_shape": "yes"}, {"auto_zoom": 1}, {"crop": "none"}, {"crop": 1},
        {"seed": "1"}, {"seed": 1.5},
    ):  # fmt: skip
        answer = page.ask("POST", "/edit", json={**ASKED, **changed})
        assert answer.status_code == 400 and "reload the page" in answer.json()["error"], changed
    for text in ("NaN", "Infinity", "1e999", "9" * 30):
        body = json.dumps({**ASKED, "seed": "SEED"}).replace('"SEED"', text)
        assert page.ask("POST", "/edit", content=body).status_code == 400, text
    for missing in ASKED:
        less = {name: value for name, value in ASKED.items() if name != missing}
        assert page.ask("POST", "/edit", json=less).status_code == 400, missing
    assert page.asked == [expected]


def test_the_queue_is_bounded_for_all_and_for_each(page: Page) -> None:
    names: list[tuple[str, str]] = []

    def ask(visitor: str, status: int) -> dict[str, str]:
        answer = page.ask("POST", "/edit", json=ASKED, visitor=visitor)
        assert answer.status_code == status, answer.text
        if status == 200:
            names.append((visitor, answer.json()["job"]))
        return dict(answer.json())

    page.service.may_end.clear()
    try:
        for _ in range(3):  # one runs, two wait
            ask(ANN, 200)
        assert "2 of your edits are already waiting" in ask(ANN, 429)["error"]
        for number in range(3):
            for _ in range(2):
                ask(str(number) * 24, 200)
        assert "8 edits are already waiting; try again" in ask(BOB, 429)["error"]
        states = [page.queue._jobs[name].state for _, name in names]
        assert states == [{"done": 1, "of": 3}, *({"waiting": before} for before in range(1, 9))]
        assert page.ask("POST", f"/cancel/{names[1][1]}", visitor=BOB).status_code == 200
        assert page.queue._jobs[names[1][1]].phase == "waiting"  # it is not Bob's
        assert page.ask("POST", f"/cancel/{names[1][1]}").status_code == 200
        in_thread(page.loop.run_until_complete, asyncio.sleep(0))
        assert page.queue._jobs[names[1][1]].state == {"cancelled": True}
        assert page.queue._jobs[names[2][1]].state == {"waiting": 1}  # who stood behind it has moved up
    finally:
        page.service.may_end.set()
    assert len(page.asked) >= 8


def test_an_edit_is_its_visitors_alone(page: Page) -> None:
    name = page.ask("POST", "/edit", json=ASKED).json()["job"]
    told = page.ask("GET", f"/edit/{name}")
    assert told.status_code == 200 and told.headers["Content-Type"].startswith("text/event-stream")
    assert told.text.endswith('data: {"result": {"results": []}}\n\n')
    assert page.ask("GET", f"/edit/{name}").text == 'data: {"result": {"results": []}}\n\n'  # also after a reload
    for visitor, asked in ((BOB, name), (ANN, name[:-1]), (ANN, "unknown")):
        answer = page.ask("GET", f"/edit/{asked}", visitor=visitor)
        assert answer.status_code == 404 and "this edit does not exist" in answer.json()["error"]


def test_an_error_ends_one_edit_and_not_the_queue(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, told in (
        (InputError("the mask is empty"), "the mask is empty"),
        (RuntimeError("x"), "an unexpected error occurred"),
    ):

        def fail(*given: Any, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(page.service, "edit", fail)
        name = page.ask("POST", "/edit", json=ASKED).json()["job"]
        assert told in page.ask("GET", f"/edit/{name}").text
    monkeypatch.undo()
    name = page.ask("POST", "/edit", json=ASKED).json()["job"]
    assert '"result"' in page.ask("GET", f"/edit/{name}").text


def test_a_running_edit_ends_when_it_is_cancelled_or_its_tab_has_left(page: Page) -> None:
    page.service.may_end.clear()
    try:
        name = page.ask("POST", "/edit", json=ASKED).json()["job"]
        assert page.ask("POST", f"/cancel/{name}").status_code == 200
        assert page.ask("GET", f"/edit/{name}").text.endswith('data: {"cancelled": true}\n\n')
        page.queue.grace_s = 0.05
        page.ask("POST", "/edit", json=ASKED)
        assert len(page.asked) >= 2  # nobody listens: it ends by itself
    finally:
        page.queue.grace_s = EditQueue.grace_s
        page.service.may_end.set()


def test_a_flood_of_edits_and_cancels_leaves_those_of_others(page: Page) -> None:
    mine = page.ask("POST", "/edit", json=ASKED).json()["job"]
    assert '"result"' in page.ask("GET", f"/edit/{mine}").text
    for number in range(40):
        assert page.ask("POST", f"/cancel/{number}", visitor=BOB).status_code == 200
        name = page.ask("POST", "/edit", json=ASKED, visitor=BOB).json()["job"]
        page.ask("GET", f"/edit/{name}", visitor=BOB)
    assert '"result"' in page.ask("GET", f"/edit/{mine}").text
    assert sum(job.visitor == BOB for job in page.queue._jobs.values()) <= 3


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_tab_has_left_when_nobody_has_listened_for_a_while() -> None:
    clock = Clock()

    async def run() -> None:
        queue = EditQueue(None, clock)  # type: ignore[arg-type]  # nothing is edited
        job = Job(ANN, clock())
        clock.now_s = queue.grace_s - 1
        assert not queue.has_left(job)  # it listens soon
        streams = [queue.listen(job), queue.listen(job)]
        for stream in streams:
            await anext(stream)
        clock.now_s = 1000.0
        assert not queue.has_left(job)
        await streams[0].aclose()
        clock.now_s = 2000.0
        assert not queue.has_left(job)  # the other stream is there
        await streams[1].aclose()
        assert not queue.has_left(job)
        clock.now_s += queue.grace_s + 1
        assert queue.has_left(job)
        await anext(queue.listen(job))
        assert not queue.has_left(job)

    in_thread(asyncio.run, run())


@pytest.mark.parametrize(
    "path", ["/page/" + "a" * 300, "/page/" + "%C3%A4" * 150, "/files/" + "a/" * 1000, "/page/" + "x" * 5000]
)
def test_no_name_is_longer_than_a_file_may_have(page: Page, path: str) -> None:
    assert page.ask("GET", path).status_code == 404


@pytest.mark.parametrize("host", ["javascript:x", "\x7f", "[", "a b", "http://a", "", "a,", "a:99999999"])
def test_a_forwarded_host_is_a_host(page: Page, host: str) -> None:
    assert page.ask("GET", "/", headers={"X-Forwarded-Host": host}).status_code == 400
    assert page.ask("GET", "/", headers={"X-Forwarded-Host": "page.example, 10.0.0.1:80"}).status_code == 200


@pytest.mark.parametrize("path", ["/upload", "/cancel/1", "/edit"])
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://127.0.0.1:7860.evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Host": "evil.example", "Origin": "http://evil.example"},
    ],
)
def test_another_sites_page_cannot_drive_this_one(page: Page, path: str, headers: dict[str, str]) -> None:
    assert page.ask("POST", path, json=ASKED, headers=headers).status_code == 403
    ours = {"Origin": "http://127.0.0.1:7860", "Sec-Fetch-Site": "same-origin"}
    assert page.ask("POST", path, json=ASKED, headers=ours).status_code != 403


@pytest.mark.parametrize("path", ["/upload", "/cancel/1", "/files/1", "/shown/1", "/edit", "/edit/1"])
@pytest.mark.parametrize("visitor", [None, "", "ann", "a" * 25, "a" * 23 + ";", "ä" * 12])
def test_what_is_a_visitors_needs_the_cookie_that_the_page_gave(page: Page, path: str, visitor: str | None) -> None:
    method = "POST" if path in ("/upload", "/cancel/1", "/edit") else "GET"
    cookie = {} if visitor is None else {"Cookie": f"mimicbrush_visitor={visitor}".encode("latin-1")}
    answer = page.ask(method, path, json=ASKED, headers=cookie, visitor=None)
    assert answer.status_code == 400 and "cookie" in answer.json()["error"]


def test_a_new_visitor_gets_a_cookie_that_scripts_and_sites_do_not_see(page: Page) -> None:
    cookie = page.ask("GET", "/", visitor=None).headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie
    assert "Set-Cookie" not in page.ask("GET", "/").headers
    policy = page.ask("GET", "/").headers["Content-Security-Policy"]
    assert "frame-ancestors 'self'" in policy and "default-src 'none'" in policy and "script-src 'self';" in policy


LOCAL = choose_access("127.0.0.1", None)
OPEN, WITH_TOKEN = choose_access("0.0.0.0", ""), choose_access("0.0.0.0", None)


@pytest.mark.parametrize(
    ("access", "host", "expected"),
    [
        (LOCAL, "127.0.0.1:7860", True), (LOCAL, "localhost", True), (LOCAL, "[::1]:1", True),
        (LOCAL, "LOCALHOST.:80", True), (LOCAL, "192.168.1.2", False), (LOCAL, "evil.example", False),
        (LOCAL, "127.0.0.1.evil.example", False), (LOCAL, "", False), (LOCAL, "127.0.0.1:80@evil.example", False),
        (LOCAL, "127.0.0.1:", False), (LOCAL, "127.0.0.1:999999", False), (LOCAL, "127.0.0.1/x", False),
        (OPEN, "192.168.1.2:7860", True), (OPEN, "[fe80::1]:7860", True), (OPEN, "evil.example", False),
        (OPEN, "1.2.3.4.evil.example", False), (OPEN, "localhost", True), (WITH_TOKEN, "page.example", True),
    ],
)  # fmt: skip
def test_a_server_goes_by_its_own_names(access: Access, host: str, expected: bool) -> None:
    assert access.is_named(host) is expected


@given(st.text(max_size=60))
def test_no_text_is_taken_for_this_machine_unless_it_begins_with_its_name(host: str) -> None:
    if LOCAL.is_named(host):
        assert host.lower().startswith(("localhost", "127.0.0.1", "[::1]"))


def test_other_machines_need_a_token_and_this_one_does_not() -> None:
    for host in ("127.0.0.1", "127.1.2.3", "localhost", "::1"):
        assert choose_access(host, None).token == ""
        assert choose_access(host, "given").token == "given"
        assert choose_access(host, None).is_named(f"[{host}]:1" if ":" in host else host)
    for host in ("0.0.0.0", "::", "192.168.1.2", "machine.example"):
        assert len(choose_access(host, None).token) >= 32
        assert choose_access(host, None).token != choose_access(host, None).token
        assert choose_access(host, "given").token == "given"
        assert choose_access(host, "").token == ""


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    page = Page(tmp_path_factory.mktemp("locked"), Access(None, has_numbers=True, token="open sesame ä"))
    yield page
    page.close()


def test_everything_lies_behind_the_token(locked: Page) -> None:
    for path in ("/page/editing.js", "/options", "/examples/0/source", "/files/1", "/shown/1", "/edit/1"):
        assert locked.ask("GET", path).status_code == 403, path
    for path in ("/upload", "/edit", "/cancel/1", "/run/predict"):
        answer = locked.ask("POST", path, json=ASKED)
        assert answer.status_code == 403 and "log in" in answer.json()["error"], path
    for cookie in ("", "open sesame ä", "x" * 32):
        headers = {"Cookie": f"mimicbrush_login_7860={cookie}".encode("latin-1")}
        assert locked.ask("GET", "/", headers=headers).status_code == 403


@pytest.mark.parametrize("way", ["address", "form"])
def test_the_token_is_given_once(locked: Page, way: str) -> None:
    for token in ("", "wrong", "open sesame", "OPEN SESAME ä", "\x00"):
        answer = (
            locked.ask("GET", "/", params={"token": token})
            if way == "address"
            else locked.ask("POST", "/login", data={"token": token})
        )
        assert answer.status_code == 403 and 'name="token"' in answer.text and "Set-Cookie" not in answer.headers
        assert ("This token is wrong" in answer.text) == bool(token)
    token = "open sesame ä"
    answer = (
        locked.ask("GET", "/", params={"token": token})
        if way == "address"
        else locked.ask("POST", "/login", data={"token": token})
    )
    assert answer.status_code == 200
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "sesame" not in cookie + answer.text
    name_and_value = cookie.split(";")[0]
    assert locked.ask("GET", "/", headers={"Cookie": name_and_value}).status_code == 200
    assert locked.ask("GET", "/page/editing.js", headers={"Cookie": name_and_value}).status_code == 200
    other_port = name_and_value.replace("_login_", "_login_1")
    assert locked.ask("GET", "/page/editing.js", headers={"Cookie": other_port}).status_code == 403


def test_a_websocket_is_closed(page: Page) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    in_thread(page.loop.run_until_complete, page.gate({"type": "websocket", "path": "/", "headers": []}, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def trickle(chunk: bytes, pause_s: float, count: int = 10_000) -> Callable[[], Awaitable[Any]]:
    """A client that sends a chunk, again and again."""
    left = iter(range(count))

    async def receive() -> Any:
        await asyncio.sleep(pause_s)
        return {"type": "http.request", "body": chunk, "more_body": next(left) < count - 1}

    return receive


def read(reader: BodyReader, receive: Callable[[], Awaitable[Any]], most_bytes: int = 2**20, most_s: float = 60) -> int:
    async def run() -> int:
        async with reader.reading(receive, most_bytes, most_s) as body:
            return len(body)

    return in_thread(asyncio.run, asyncio.wait_for(run(), 60))


@pytest.mark.parametrize(
    ("chunk", "pause_s", "most_s", "status"),
    [
        (b"x", 0.01, 60, 408),  # a byte now and then
        (b"", 0.01, 60, 408),
        (b"x", 3600, 60, 408),  # nothing comes any more
        (b"x" * 2000, 0.01, 0.2, 408),  # fast enough, but too long in all
        (b"x" * 600_000, 0.0, 60, 413),
    ],
)
def test_a_body_that_is_slow_or_large_is_refused_and_forgotten(
    monkeypatch: pytest.MonkeyPatch, chunk: bytes, pause_s: float, most_s: float, status: int
) -> None:
    monkeypatch.setattr(bodies, "_WINDOW_S", 0.1)
    monkeypatch.setattr(bodies, "_WINDOW_BYTES", 1000)
    reader = BodyReader(2**30)
    with pytest.raises(RefusedRequestError) as refused:
        read(reader, trickle(chunk, pause_s), most_s=most_s)
    assert refused.value.status == status
    assert reader._held == 0
    assert read(reader, trickle(b"x" * 10_000, 0.0, 5)) == 50_000


def test_the_memory_of_all_bodies_is_bounded() -> None:
    reader = BodyReader(100)

    async def run() -> None:
        async with reader.reading(trickle(b"x" * 60, 0, 1), 100, 1):
            with pytest.raises(RefusedRequestError) as refused:
                async with reader.reading(trickle(b"x" * 60, 0, 1), 100, 1):
                    pass
            assert refused.value.status == 503
        async with reader.reading(trickle(b"x" * 60, 0, 1), 100, 1) as body:
            assert len(body) == 60

    in_thread(asyncio.run, run())
    assert reader._held == 0


def test_a_visitor_sends_a_few_images_at_once(page: Page) -> None:
    async def slow() -> Any:
        await asyncio.sleep(0.3)
        yield png()

    async def send_all() -> list[int]:
        cookies = [{"Cookie": f"mimicbrush_visitor={each}"} for each in [ANN] * 8 + [BOB]]
        uploads = [page.client.post("/upload", content=slow(), headers=each) for each in cookies]
        return [each.status_code for each in await asyncio.gather(*uploads)]

    statuses = in_thread(page.loop.run_until_complete, send_all())
    assert sorted(statuses[:8]) == [200] * 4 + [429] * 4 and statuses[8] == 200
    assert not page.gate._images


def test_a_visitor_has_a_few_images_shown_at_once(page: Page) -> None:
    token = page.ask("POST", "/upload", content=png((2000, 2000))).json()["token"]

    async def show_all() -> list[int]:
        cookie = {"Cookie": f"mimicbrush_visitor={ANN}"}
        asked = [page.client.get(f"/shown/{token}", headers=cookie) for _ in range(12)]
        return [each.status_code for each in await asyncio.gather(*asked)]

    assert sorted(in_thread(page.loop.run_until_complete, show_all())) == [200] * 4 + [429] * 8


def test_streams_end_when_the_server_does(tmp_path: Path) -> None:
    """Without an end, a server would wait for each open tab."""
    started = threading.Event()

    async def endless() -> Any:
        while True:
            started.set()
            yield b"data: {}\n\n"
            await asyncio.sleep(3600)

    async def run() -> list[Any]:
        app = FastAPI()
        app.get("/edit/1")(lambda: StreamingResponse(endless()))
        gate = Gate(app, Access(), VisitorLimits())
        lifespan: asyncio.Queue[Any] = asyncio.Queue()
        lifespan.put_nowait({"type": "lifespan.startup"})
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            await asyncio.sleep(3600)

        life = asyncio.create_task(gate({"type": "lifespan"}, lifespan.get, send))
        headers = [(b"host", b"127.0.0.1"), (b"cookie", f"mimicbrush_visitor={ANN}".encode())]
        scope = {"type": "http", "method": "GET", "path": "/edit/1", "headers": headers, "query_string": b""}
        scope |= {"asgi": {"spec_version": "2.3"}, "scheme": "http", "server": ("127.0.0.1", 7860)}
        stream = asyncio.create_task(gate(scope, receive, send))
        while not started.is_set():
            await asyncio.sleep(0.01)
        gate.close()
        await asyncio.wait_for(stream, 30)
        lifespan.put_nowait({"type": "lifespan.shutdown"})
        await life
        return sent

    sent = in_thread(asyncio.run, run())
    assert [each for each in sent if each["type"] == "http.response.body"][-1]["more_body"] is False
