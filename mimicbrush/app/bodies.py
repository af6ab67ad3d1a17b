"""Read the whole content of a request before it is used, within limits of size, time and speed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Message, Receive

#: In each window, this much must arrive: as over a telephone line.
_WINDOW_S, _WINDOW_BYTES = 5.0, 16 * 1024


class RefusedRequestError(Exception):
    """A request that is refused, with an HTTP status and the reason.

    Args:
        status: of HTTP.
        reason: for the reader of the page.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class BodyReader:
    """Reads the content of requests.

    Args:
        most_bytes: of all requests together; they are in memory until they are answered.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most, self._held = most_bytes, 0

    @asynccontextmanager
    async def reading(self, receive: Receive, most_bytes: int, most_s: float) -> AsyncIterator[bytearray]:
        """Read the content of one request; its memory is counted until the end of the block.

        Args:
            receive: of ASGI.
            most_bytes: of it.
            most_s: for all of it.

        Raises:
            RefusedRequestError: it is too large, too slow, not whole, or there is too much of others.
        """
        body = bytearray()
        try:
            await self._read(body, receive, most_bytes, most_s)
            yield body
        finally:
            self._held -= len(body)

    async def _read(self, body: bytearray, receive: Receive, most_bytes: int, most_s: float) -> None:
        now = asyncio.get_running_loop().time
        end, window_end, window_bytes = now() + most_s, now() + _WINDOW_S, 0
        while True:
            try:
                async with asyncio.timeout_at(min(end, window_end)):
                    message = await receive()
            except TimeoutError:
                message = {"type": "http.request", "more_body": True}
            if message["type"] == "http.disconnect":
                raise RefusedRequestError(400, "the connection was lost; try again")
            chunk = message.get("body", b"")
            if len(body) + len(chunk) > most_bytes:
                size = f"{most_bytes / 2**20:.0f} MiB" if most_bytes >= 2**20 else f"{most_bytes / 2**10:.0f} KiB"
                raise RefusedRequestError(413, f"too large; the limit is {size}")
            if self._held + len(chunk) > self._most:
                raise RefusedRequestError(
                    503, "the server is receiving many images at the moment; try again in a minute"
                )
            body += chunk
            self._held += len(chunk)
            window_bytes += len(chunk)
            if not message.get("more_body", False):
                return
            if now() >= end:
                raise RefusedRequestError(408, f"the upload took more than {most_s:.0f} s; choose a smaller file")
            if now() >= window_end:
                if window_bytes < _WINDOW_BYTES:
                    raise RefusedRequestError(408, "the connection is too slow; choose a smaller file")
                window_end, window_bytes = now() + _WINDOW_S, 0


def receive_body(body: bytes | bytearray, receive: Receive) -> Receive:
    """Build the ASGI `receive` for content that was already read; `receive` gives what comes after it."""
    is_read = False

    async def receive_again() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again
