"""Serves the editing page without a model: python served_page.py; prints its port.

Everything else is real: the gate, the server, the folder, and the end by a signal. `/edit/endless` is an endless
stream, and `/files/large` more bytes than a connection holds. A thread computes all the time, as an edit does.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
from typing import Any

from fastapi import FastAPI, Response
from starlette.responses import StreamingResponse

from mimicbrush.app import page_server
from mimicbrush.app.access import Access
from mimicbrush.app.edit_queue import EditQueue
from mimicbrush.app.editing_service import EditingService
from mimicbrush.app.gate import Gate
from mimicbrush.app.image_reader import ImageReader
from mimicbrush.app.page_routes import add_routes
from mimicbrush.app.session_files import SessionFiles, VisitorLimits, make_server_folder


async def endless() -> Any:
    while True:
        yield b"data: {}\n\n"
        await asyncio.sleep(3600)


def compute() -> None:
    while True:
        sum(range(1000))


def main() -> None:
    page_server._CHECK_S, page_server._HEAD_S, page_server._TAKE_S = 1, 1.0, 2.0
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    threading.Thread(target=compute, daemon=True).start()
    with make_server_folder() as folder:
        files = SessionFiles(folder / "visits", VisitorLimits())
        service = EditingService(None, "", files, ImageReader(files.limits))  # type: ignore[arg-type]
        app = FastAPI()
        app.get("/edit/endless")(lambda: StreamingResponse(endless(), media_type="text/event-stream"))
        app.get("/files/large")(lambda: Response(bytes(64 * 2**20)))
        app.get("/")(lambda: Response("page"))
        add_routes(app, service, EditQueue(service))
        server = page_server.PageServer(Gate(app, Access(), files.limits), service, folder)
        signal.signal(signal.SIGHUP, server.handle_exit)
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen(128)
            print(listening.getsockname()[1], flush=True)
            try:
                server.run(sockets=[listening])
            except (KeyboardInterrupt, SystemExit):
                pass
            finally:
                service.close()
    os._exit(128 + (server.ended_by or 0))


if __name__ == "__main__":
    main()
