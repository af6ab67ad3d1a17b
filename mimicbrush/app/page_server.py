"""The server of the editing page: it stops quickly, and closes the connections of slow clients."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from pathlib import Path
from types import FrameType
from weakref import WeakKeyDictionary

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mimicbrush.app.editing_service import EditingService
from mimicbrush.app.gate import Gate

#: After a signal: for streams and requests, and for everything. An edit's step or a decoder may take longer.
_GRACE_S, _LAST_S = 1, 4.0
#: Connections at once: of 60 browsers and more, and below what a process may open.
_MAX_CONNECTIONS = 800
_CHECK_S = 5
#: For the head of a request, and for an answer that the client does not take.
_HEAD_S, _TAKE_S = 20.0, 300.0


class PageServer(uvicorn.Server):
    """Server of the page.

    Args:
        gate: the page.
        service: is closed at the end.
        folder: holds what visitors sent; is removed when the end takes too long.
    """

    def __init__(self, gate: Gate, service: EditingService, folder: Path) -> None:
        self._gate, self._service, self._folder = gate, service, folder
        self._slow: WeakKeyDictionary[H11Protocol, tuple[tuple[str, object], float]] = WeakKeyDictionary()
        #: The signal that ended it.
        self.ended_by: int | None = None
        super().__init__(
            uvicorn.Config(
                gate,
                http="h11",
                ws="none",
                log_level="warning",
                access_log=False,  # addresses may have the token in them
                server_header=False,
                limit_concurrency=_MAX_CONNECTIONS,
                timeout_graceful_shutdown=_GRACE_S,
                callback_notify=self._end_slow_connections,
                timeout_notify=_CHECK_S,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop soon, if necessary by force."""
        if self.ended_by is None:
            self.ended_by = sig
            timer = threading.Timer(_LAST_S, self._end_now)
            timer.daemon = True
            timer.start()
        super().handle_exit(sig, frame)

    def _end_now(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(128 + (self.ended_by or 0))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop streams, edits and connections."""
        self._gate.close()
        self._service.close()
        await super().shutdown(sockets)

    async def _end_slow_connections(self) -> None:
        now = time.monotonic()
        for connection in list(self.server_state.connections):
            assert isinstance(connection, H11Protocol)
            if connection.transport.get_write_buffer_size():
                waits_for, most_s = "client takes it", _TAKE_S
            elif connection.cycle is None or connection.cycle.response_complete:
                waits_for, most_s = "head", _HEAD_S
            else:
                self._slow.pop(connection, None)
                continue
            state = (waits_for, connection.cycle)  # another request is another wait
            known, since = self._slow.setdefault(connection, (state, now))
            if known != state:
                self._slow[connection] = (state, now)
            elif now - since > most_s:
                connection.transport.abort()
