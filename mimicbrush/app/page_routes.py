"""The editing page's own addresses: its scripts, images to and fro, and cancelling. Without gradio."""

from __future__ import annotations

import io
from importlib.resources import files

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from mimicbrush.app.editing_service import EditingService
from mimicbrush.app.gate import COOKIE
from mimicbrush.app.image_reader import BusyError
from mimicbrush.errors import InputError

_STATIC = {
    "painter.js": "text/javascript; charset=utf-8",
    "editing.js": "text/javascript; charset=utf-8",
    "painter.css": "text/css; charset=utf-8",
    "editing.css": "text/css; charset=utf-8",
}


def add_routes(app: FastAPI, service: EditingService) -> None:
    """Add the addresses of a service; `Gate` stands before them, so requests have their visitor's cookie."""

    @app.exception_handler(InputError)
    async def answer_input_error(_: Request, error: InputError) -> Response:
        return JSONResponse({"error": str(error)}, 503 if isinstance(error, BusyError) else 400)

    @app.get("/page/{name}")
    def static(name: str) -> Response:
        if name not in _STATIC:
            return JSONResponse({"error": "there is no such file"}, 404)
        return Response((files("mimicbrush.app") / "static" / name).read_bytes(), media_type=_STATIC[name])

    @app.post("/upload")
    async def upload(request: Request) -> dict[str, str]:
        return {"token": await service.upload(request.cookies[COOKIE], await request.body())}

    @app.get("/files/{token}")
    def file(token: str, request: Request) -> Response:
        data = service.read(request.cookies[COOKIE], token)
        return Response(data, media_type="image/png", headers={"Cache-Control": "private, no-store"})

    @app.get("/shown/{token}")
    async def shown(token: str, request: Request) -> Response:
        data = await service.show(request.cookies[COOKIE], token)
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, no-store"})

    @app.get("/examples/{number}/{name}")
    def example(number: int, name: str) -> Response:
        if not 0 <= number < len(service.examples) or name not in ("source", "mask", "reference"):
            return JSONResponse({"error": "there is no such example"}, 404)
        buffer = io.BytesIO()
        getattr(service.examples[number], name).save(buffer, "PNG")
        return Response(buffer.getvalue(), media_type="image/png")

    @app.post("/cancel/{job}")
    def cancel(job: str, request: Request) -> dict[str, bool]:
        service.cancel(request.cookies[COOKIE], job)
        return {"cancelled": True}
