"""Who may ask the editing page for what: the one door that every request passes, before anything is computed.

Requests must name this host (against DNS rebinding), come from the page itself where they change something (other
sites), know the token where there is one (other people), and bring their content soon (slow clients). Of gradio's own
addresses only those are open that the page needs: the queue and the files of its controls.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, urlencode

from starlette.requests import HTTPConnection
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mimicbrush.app.access import HOST, Access
from mimicbrush.app.bodies import BodyReader, RefusedRequestError, receive_body
from mimicbrush.app.session_files import VisitorLimits
from mimicbrush.io.text import parse_json

COOKIE, LOGIN_COOKIE = "mimicbrush_visitor", "mimicbrush_login"
JOIN, LISTEN = "/gradio_api/queue/join", "/gradio_api/queue/data"
_OPEN_GET = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", LISTEN)
_OPEN_GET_BELOW = ("/assets/", "/static/", "/page/", "/examples/", "/files/", "/shown/", "/gradio_api/heartbeat/")
_OPEN_POST, _OPEN_POST_BELOW = ("/upload", "/login", JOIN), ("/cancel/",)
#: What is sent to a visitor alone.
_PRIVATE = ("/files/", "/shown/", "/upload", "/cancel/", "/gradio_api/queue/")
#: Of everything but images.
_MAX_REQUEST_BYTES, _MAX_REQUEST_S = 64 * 1024, 20.0
#: No file of the page has a longer name, and a file system refuses one.
_MAX_NAME_BYTES, _MAX_PATH = 200, 1000
_GO_ON = '<!DOCTYPE html><title>MimicBrush</title><meta http-equiv="refresh" content="0;url=/">'
_VISITOR = re.compile(r"[A-Za-z0-9_-]{24}")
_SESSION = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HEADERS = {
    # "no-referrer" would make browsers hide where the form of the login comes from.
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "frame-ancestors 'self'",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass
class _Session:
    visitor: str
    since_s: float
    num_streams: int = 0


class Listeners:
    """Tabs that listen to the queue: whose they are, and which of them have gone.

    Args:
        clock: seconds that only grow; other ones in tests.
    """

    #: A tab that has asked for an edit listens soon; a connection may break, and come again.
    grace_s = 5.0
    most = 1000

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sessions: dict[str, _Session] = {}

    def expect(self, name: str, visitor: str) -> None:
        """Note that a visitor's tab asks for an edit, and will listen.

        Raises:
            RefusedRequestError: the session is another visitor's.
        """
        session = self._sessions.pop(name, None)
        if session is not None and session.visitor != visitor:
            self._sessions[name] = session
            raise RefusedRequestError(403, "this session is another visitor's; load the page again")
        session = session or _Session(visitor, 0.0)
        session.since_s = self._clock()
        silent = [each for each, known in self._sessions.items() if not known.num_streams]
        for each in silent[: max(0, len(self._sessions) + 1 - self.most)]:
            del self._sessions[each]
        self._sessions[name] = session

    @contextmanager
    def listen(self, name: str, visitor: str) -> Iterator[None]:
        """Note that a tab listens.

        Raises:
            RefusedRequestError: nobody asked under this name, or it was another visitor.
        """
        session = self._sessions.get(name)
        if session is None or session.visitor != visitor:
            raise RefusedRequestError(404, "nothing was asked for under this name; load the page again")
        session.num_streams += 1
        try:
            yield
        finally:
            session.num_streams -= 1
            session.since_s = self._clock()

    def find_visitor(self, name: str) -> str | None:
        """Find whose session it is."""
        session = self._sessions.get(name)
        return None if session is None else session.visitor

    def have_left(self, name: str) -> bool:
        """Whether nobody listens to this session any more."""
        session = self._sessions.get(name)
        return session is None or (not session.num_streams and self._clock() - session.since_s > self.grace_s)


class Gate:
    """The door, as middleware.

    Args:
        app: what lies behind it.
        access: who may ask.
        limits: of what a visitor may ask for.
        listeners: are noted here.
    """

    def __init__(self, app: ASGIApp, access: Access, limits: VisitorLimits, listeners: Listeners) -> None:
        self.app, self.access, self.limits, self.listeners = app, access, limits, listeners
        #: The queue's own number of the edit, and who waits: known when gradio has made the page.
        self.edit_index = 0
        self.waiting: Callable[[], list[str]] = list
        self._bodies = BodyReader(limits.arriving_bytes)
        self._images: Counter[str] = Counter()
        self._joining = 0
        self._pass = secrets.token_urlsafe(24)
        self._is_closing: asyncio.Event | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer why not."""
        if scope["type"] == "lifespan":
            self._is_closing = asyncio.Event()
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # a websocket: the page has none
            await send({"type": "websocket.close", "code": 1008})
            return
        connection = HTTPConnection(scope)
        try:
            self._check_source(scope, connection)
            answer = await self._log_in(scope, connection, receive)
            if answer is None:
                await self._let_in(scope, connection, receive, _with_headers(send, self._new_visitor(connection)))
                return
        except RefusedRequestError as refusal:
            answer = refuse(refusal)
        await answer(scope, receive, _with_headers(send))

    def close(self) -> None:
        """Let all streams end; otherwise the server would wait for them."""
        if self._is_closing is not None:
            self._is_closing.set()

    def _check_source(self, scope: Scope, connection: HTTPConnection) -> None:
        if scope["method"] not in ("GET", "HEAD", "POST"):
            raise RefusedRequestError(405, "this page takes GET, HEAD and POST")
        host = connection.headers.get("host", "")
        if not self.access.is_named(host):
            raise RefusedRequestError(
                403, "this page does not go by this name; open the address that the command printed"
            )
        forwarded = connection.headers.get("x-forwarded-host")  # gradio builds addresses of it
        if forwarded is not None and not all(HOST.fullmatch(each.strip()) for each in forwarded.split(",")):
            raise RefusedRequestError(400, "the header X-Forwarded-Host has no name of a host")
        if max(map(len, scope["path"].encode().split(b"/"))) > _MAX_NAME_BYTES or len(scope["path"]) > _MAX_PATH:
            raise RefusedRequestError(404, "there is no such page")
        origin, site = connection.headers.get("origin"), connection.headers.get("sec-fetch-site", "same-origin")
        is_ours = origin is None or origin in (f"http://{host}", f"https://{host}")
        if scope["method"] == "POST" and not (is_ours and site in ("same-origin", "none")):
            raise RefusedRequestError(403, "only the page itself may ask for this")

    async def _log_in(self, scope: Scope, connection: HTTPConnection, receive: Receive) -> Response | None:
        """The answer to who shows the token, or should; None where nothing is missing."""
        path, token = scope["path"], self.access.token
        if not token:
            if path == "/login":
                raise RefusedRequestError(404, "there is no such page")
            return None
        # A browser has one set of cookies for all ports of a machine.
        cookie = f"{LOGIN_COOKIE}_{(scope.get('server') or ('', 0))[1]}"
        shown = ""
        if path == "/":
            shown = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        elif path == "/login" and scope["method"] == "POST":
            async with self._bodies.reading(receive, _MAX_REQUEST_BYTES, _MAX_REQUEST_S) as body:
                shown = parse_qs(body.decode("latin-1")).get("token", [""])[0]
        if shown and hmac.compare_digest(shown.encode(), token.encode()):
            # Not a redirect: to one, a browser that comes from another site's link would not show the new cookie.
            answer = HTMLResponse(_GO_ON)
            answer.set_cookie(cookie, self._pass, httponly=True, samesite="strict", path="/")
            return answer
        if hmac.compare_digest(connection.cookies.get(cookie, "").encode(), self._pass.encode()) and path != "/login":
            return None
        if path not in ("/", "/login"):
            raise RefusedRequestError(403, "log in first: open the page again, with its token")
        said = "This is not the token." if shown else ""
        page = (files("mimicbrush.app") / "static" / "login.html").read_text()
        return HTMLResponse(page.replace("{said}", said), 403)

    def _new_visitor(self, connection: HTTPConnection) -> str | None:
        is_known = _VISITOR.fullmatch(connection.cookies.get(COOKIE, ""))
        return None if is_known or connection.url.path != "/" else secrets.token_urlsafe(18)

    async def _let_in(self, scope: Scope, connection: HTTPConnection, receive: Receive, send: Send) -> None:
        path, is_post = scope["path"], scope["method"] == "POST"
        exact, below = (_OPEN_POST, _OPEN_POST_BELOW) if is_post else (_OPEN_GET, _OPEN_GET_BELOW)
        if path not in exact and not path.startswith(below):
            raise RefusedRequestError(404, "there is no such page")
        visitor = connection.cookies.get(COOKIE, "")
        if path.startswith(_PRIVATE) and not _VISITOR.fullmatch(visitor):
            raise RefusedRequestError(
                400, "this page was opened without its cookie; load it again (cookies must be allowed)"
            )
        if path == LISTEN:
            session = connection.query_params.get("session_hash", "")
            with self.listeners.listen(session, visitor):
                # Written again: nobody reads two names of sessions in different ways.
                query = urlencode({"session_hash": session}).encode()
                await self._stream({**scope, "query_string": query}, receive, send)
        elif path == "/upload":
            with self._counting_images(visitor):
                most, most_s = self.limits.upload_bytes, self.limits.upload_s
                async with self._bodies.reading(receive, most, most_s) as body:
                    await self.app(scope, receive_body(body, receive), send)
        elif path.startswith("/shown/"):
            with self._counting_images(visitor):
                await self.app(scope, receive, send)
        elif is_post:
            async with self._bodies.reading(receive, _MAX_REQUEST_BYTES, _MAX_REQUEST_S) as body:
                if path == JOIN:
                    sent = self._check_join(body, visitor)
                    self._joining += 1  # not in the queue yet, but counted
                    try:
                        await self.app(scope, receive_body(sent, receive), send)
                    finally:
                        self._joining -= 1
                else:
                    await self.app(scope, receive_body(body, receive), send)
        else:  # gradio reads its own options from the address, such as files of saved sessions: none for others
            await self._stream({**scope, "query_string": b""}, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what may take long: it hears when the server ends, as if its client went, and is ended whole."""
        is_open = False

        async def send_noted(message: Message) -> None:
            nonlocal is_open
            is_open = message["type"] == "http.response.start" or message.get("more_body", False)
            await send(message)

        async def receive_or_end() -> Message:
            if self._is_closing is None:
                return await receive()
            heard, closed = asyncio.ensure_future(receive()), asyncio.ensure_future(self._is_closing.wait())
            try:
                await asyncio.wait((heard, closed), return_when=asyncio.FIRST_COMPLETED)
                return heard.result() if heard.done() else {"type": "http.disconnect"}
            finally:
                heard.cancel()
                closed.cancel()

        await self.app(scope, receive_or_end, send_noted)
        if is_open:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    @contextmanager
    def _counting_images(self, visitor: str) -> Iterator[None]:
        """Bound the images of one visitor that arrive or are read: nobody has all the readers to himself."""
        if self._images[visitor] >= self.limits.images_at_once:
            most = self.limits.images_at_once
            raise RefusedRequestError(429, f"at most {most} of your images are read at once; wait a little")
        self._images[visitor] += 1
        try:
            yield
        finally:
            self._images[visitor] -= 1
            self._images += Counter()  # forgets who has none

    def _check_join(self, body: bytearray, visitor: str) -> bytes:
        """Check what the page asks the queue for, and write it again with nothing else in it.

        Raises:
            RefusedRequestError: it is not what the page asks, or too many wait.
        """
        try:
            asked = parse_json(bytes(body))
            session, data = asked["session_hash"], asked["data"]
            is_ours = asked["fn_index"] == self.edit_index and bool(_SESSION.fullmatch(session))
            text, steps, guidance, seed, count, keep_shape, crop = data
        except (ValueError, TypeError, KeyError) as error:
            raise RefusedRequestError(400, "this is not what the page sends; load it again") from error
        numbers = (steps, guidance, count, *([] if seed is None else [seed]))
        texts_fit = isinstance(text, str) and isinstance(crop, str) and isinstance(keep_shape, bool)
        if not (is_ours and texts_fit and all(_is_number(each) for each in numbers)):
            raise RefusedRequestError(400, "this is not what the page sends; load it again")
        waiting = self.waiting()
        if len(waiting) + self._joining >= self.limits.waiting:
            raise RefusedRequestError(429, f"{self.limits.waiting} edits are waiting already; try again in a minute")
        mine = sum(self.listeners.find_visitor(each) == visitor for each in waiting)
        if mine >= self.limits.waiting_of_one:
            raise RefusedRequestError(429, f"{mine} of your edits are waiting already; wait for one of them")
        self.listeners.expect(session, visitor)
        return json.dumps({"data": data, "session_hash": session, "fn_index": self.edit_index}).encode()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**64  # not of NaN


def refuse(error: RefusedRequestError) -> Response:
    """Build the answer to a request that is refused; what is left of its content is not waited for."""
    return JSONResponse({"error": str(error)}, error.status, {"Connection": "close"})


def _with_headers(send: Send, new_visitor: str | None = None) -> Send:
    """Add what every answer says; and the cookie of a new visitor."""

    async def send_more(message: Message) -> None:
        if message["type"] == "http.response.start":
            added = Response()
            added.headers.update(_HEADERS)
            if new_visitor is not None:
                added.set_cookie(COOKIE, new_visitor, httponly=True, samesite="strict", path="/")
            del added.headers["content-length"]
            message = {**message, "headers": [*message.get("headers", []), *added.raw_headers]}
        await send(message)

    return send_more
