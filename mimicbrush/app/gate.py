"""Check every request to the editing page before anything is computed: who may ask, and for what.

Requests must name this host (against DNS rebinding), come from the page itself where they change something (other
sites), know the token where there is one (other people), and bring their content soon (slow clients).
"""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from urllib.parse import parse_qs

from starlette.requests import HTTPConnection
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mimicbrush.app.access import HOST, Access
from mimicbrush.app.bodies import BodyReader, RefusedRequestError, receive_body
from mimicbrush.app.session_files import VisitorLimits

COOKIE, LOGIN_COOKIE = "mimicbrush_visitor", "mimicbrush_login"
_OPEN_GET, _OPEN_GET_BELOW = ("/", "/options"), ("/page/", "/examples/", "/files/", "/maps/", "/shown/", "/edit/")
_OPEN_POST, _OPEN_POST_BELOW = ("/upload", "/login", "/edit"), ("/cancel/",)
#: What is sent to a visitor alone.
_PRIVATE = ("/files/", "/maps/", "/shown/", "/upload", "/cancel/", "/edit")
#: Of everything but images.
_MAX_REQUEST_BYTES, _MAX_REQUEST_S = 64 * 1024, 20.0
#: No file of the page has a longer name, and a file system refuses one.
_MAX_NAME_BYTES, _MAX_PATH = 200, 1000
_GO_ON = '<!DOCTYPE html><title>MimicBrush</title><meta http-equiv="refresh" content="0;url=/">'
_VISITOR = re.compile(r"[A-Za-z0-9_-]{24}")
_HEADERS = {
    # "no-referrer" would make browsers hide where the form of the login comes from.
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'self'",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Gate:
    """Middleware that checks every request.

    Args:
        app: the application behind it.
        access: who may send requests.
        limits: limits of each visitor.
    """

    def __init__(self, app: ASGIApp, access: Access, limits: VisitorLimits) -> None:
        self.app, self.access, self.limits = app, access, limits
        self._bodies = BodyReader(limits.arriving_bytes)
        self._images: Counter[str] = Counter()
        self._pass = secrets.token_urlsafe(24)
        self._is_closing: asyncio.Event | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it with a reason."""
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
            raise RefusedRequestError(405, "this server accepts only GET, HEAD and POST")
        host = connection.headers.get("host", "")
        if not self.access.is_named(host):
            raise RefusedRequestError(403, "this server has another name; open the address that the command printed")
        forwarded = connection.headers.get("x-forwarded-host")  # a framework may build addresses of it
        if forwarded is not None and not all(HOST.fullmatch(each.strip()) for each in forwarded.split(",")):
            raise RefusedRequestError(400, "the header X-Forwarded-Host contains no valid host name")
        if max(map(len, scope["path"].encode().split(b"/"))) > _MAX_NAME_BYTES or len(scope["path"]) > _MAX_PATH:
            raise RefusedRequestError(404, "there is no such page")
        origin, site = connection.headers.get("origin"), connection.headers.get("sec-fetch-site", "same-origin")
        is_ours = origin is None or origin in (f"http://{host}", f"https://{host}")
        if scope["method"] == "POST" and not (is_ours and site in ("same-origin", "none")):
            raise RefusedRequestError(403, "only this page itself may send this request")

    async def _log_in(self, scope: Scope, connection: HTTPConnection, receive: Receive) -> Response | None:
        """Handle the login: return the page to show, or None if the visitor is logged in."""
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
            raise RefusedRequestError(403, "log in first: open the address with the token again")
        said = "This token is wrong." if shown else ""
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
            raise RefusedRequestError(400, "the cookie of this page is missing; allow cookies, then reload the page")
        if path == "/upload":
            with self._counting_images(visitor):
                most, most_s = self.limits.upload_bytes, self.limits.upload_s
                async with self._bodies.reading(receive, most, most_s) as body:
                    await self.app(scope, receive_body(body, receive), send)
        elif path.startswith("/shown/"):
            with self._counting_images(visitor):
                await self.app(scope, receive, send)
        elif is_post:
            async with self._bodies.reading(receive, _MAX_REQUEST_BYTES, _MAX_REQUEST_S) as body:
                await self.app(scope, receive_body(body, receive), send)
        else:  # nothing that only reads has options in its address
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
        """Limit how many images of one visitor are uploaded or read at once, so that others get a reader, too."""
        if self._images[visitor] >= self.limits.images_at_once:
            most = self.limits.images_at_once
            raise RefusedRequestError(
                429, f"the server reads at most {most} of your images at once; try again in a moment"
            )
        self._images[visitor] += 1
        try:
            yield
        finally:
            self._images[visitor] -= 1
            self._images += Counter()  # forgets who has none


def refuse(error: RefusedRequestError) -> Response:
    """Build the response to a refused request; the rest of its content is not read."""
    return JSONResponse({"error": str(error)}, error.status, {"Connection": "close"})


def _with_headers(send: Send, new_visitor: str | None = None) -> Send:
    """Add the headers of every response, and the cookie of a new visitor."""

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
