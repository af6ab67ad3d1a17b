"""The addresses of the editing page: the page and its scripts, uploads, downloads and edits."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator
from importlib.resources import files
from pathlib import PurePosixPath
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from mimicbrush.app.access import Access
from mimicbrush.app.bodies import RefusedRequestError
from mimicbrush.app.edit_queue import EditQueue, Job
from mimicbrush.app.editing_service import EditingService, EditRequest
from mimicbrush.app.gate import COOKIE, Gate, refuse
from mimicbrush.app.image_reader import BusyError
from mimicbrush.app.session_files import MissingFileError
from mimicbrush.errors import InputError

_KINDS = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8"}
_STATIC = files("mimicbrush.app") / "static"
_MINE_ALONE = {"Cache-Control": "private, no-store"}


def build_app(service: EditingService, access: Access) -> Gate:
    """Build the page as an application for uvicorn.

    Args:
        service: what the page does.
        access: who may ask.
    """
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    add_routes(app, service, EditQueue(service))
    return Gate(app, access, service.limits)


def add_routes(app: FastAPI, service: EditingService, queue: EditQueue) -> None:
    """Add the addresses of a service. `Gate` checks requests first, so they have their visitor's cookie."""
    static = {each.name: each for each in _STATIC.iterdir() if PurePosixPath(each.name).suffix in _KINDS}

    @app.exception_handler(InputError)
    async def answer_input_error(_: Request, error: InputError) -> Response:
        status = 503 if isinstance(error, BusyError) else 410 if isinstance(error, MissingFileError) else 400
        return JSONResponse({"error": str(error)}, status)

    @app.exception_handler(RefusedRequestError)
    async def answer_refusal(_: Request, error: RefusedRequestError) -> Response:
        return refuse(error)

    @app.get("/")
    def page() -> Response:
        return Response((_STATIC / "editing.html").read_bytes(), media_type="text/html; charset=utf-8")

    @app.get("/page/{name}")
    def file_of_page(name: str) -> Response:
        if name not in static:
            return JSONResponse({"error": "there is no such file"}, 404)
        headers = {"Cache-Control": "no-cache"}
        return Response(static[name].read_bytes(), media_type=_KINDS[PurePosixPath(name).suffix], headers=headers)

    @app.get("/options")
    def options() -> dict[str, Any]:
        return service.describe()

    @app.post("/upload")
    async def upload(request: Request) -> dict[str, str]:
        return {"token": await service.upload(request.cookies[COOKIE], await request.body())}

    @app.get("/files/{token}")
    def file(token: str, request: Request) -> Response:
        return Response(service.read(request.cookies[COOKIE], token), media_type="image/png", headers=_MINE_ALONE)

    @app.get("/maps/{token}")
    def maps(token: str, request: Request) -> Response:
        headers = {**_MINE_ALONE, "Content-Encoding": "gzip"}
        return Response(
            service.read(request.cookies[COOKIE], token), media_type="application/octet-stream", headers=headers
        )

    @app.get("/shown/{token}")
    async def shown(token: str, request: Request) -> Response:
        data = await service.show(request.cookies[COOKIE], token)
        return Response(data, media_type="image/jpeg", headers=_MINE_ALONE)

    @app.get("/examples/{number}/{name}")
    def example(number: int, name: str) -> Response:
        if not 0 <= number < len(service.examples) or name not in ("source", "mask", "reference"):
            return JSONResponse({"error": "there is no such example"}, 404)
        buffer = io.BytesIO()
        getattr(service.examples[number], name).save(buffer, "PNG")
        return Response(buffer.getvalue(), media_type="image/png")

    @app.post("/edit")
    async def edit(request: Request) -> dict[str, Any]:
        visitor, asked = request.cookies[COOKIE], EditRequest.read(await request.body(), service.limits)
        service.check_files(visitor, asked)
        return {"job": queue.add(visitor, asked), "seed": asked.seed}

    @app.get("/edit/{job}")
    async def listen(job: str, request: Request) -> Response:
        found = queue.find(request.cookies[COOKIE], job)
        return StreamingResponse(_send_states(queue, found), media_type="text/event-stream", headers=_MINE_ALONE)

    @app.post("/cancel/{job}")
    async def cancel(job: str, request: Request) -> dict[str, bool]:
        queue.cancel(request.cookies[COOKIE], job)
        return {"cancelled": True}


async def _send_states(queue: EditQueue, job: Job) -> AsyncIterator[str]:
    """Send the states as server-sent events, and a comment if nothing changed."""
    async for state in queue.listen(job):
        yield ": it goes on\n\n" if state is None else f"data: {json.dumps(state)}\n\n"
