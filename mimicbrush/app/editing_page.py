"""The editing page as an application: gradio's controls around the mask painter.

Uploads and results do not go through gradio's file cache, whose addresses anybody may open. `SessionFiles` keeps
them, and a cookie says whose they are. Gradio runs the queue, its progress and its controls.
"""

from __future__ import annotations

import io
import secrets
from collections.abc import Awaitable, Callable, Sequence
from importlib.resources import files
from typing import Any

import gradio as gr
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware

from mimicbrush.app.editing_service import AROUND_THE_MASK, WHOLE_IMAGE, EditingService, EditRequest
from mimicbrush.errors import InputError, MimicBrushError

COOKIE = "mimicbrush_visitor"
_STATIC = {
    "painter.js": "text/javascript; charset=utf-8",
    "editing.js": "text/javascript; charset=utf-8",
    "painter.css": "text/css; charset=utf-8",
    "editing.css": "text/css; charset=utf-8",
}
#: Gradio's own ways for files: without a limit of how many, and open to everybody who knows a name.
_CLOSED = ("/gradio_api/upload", "/gradio_api/file", "/gradio_api/proxy", "/gradio_api/stream")
#: Of what the page asks gradio for; images go another way.
_MAX_REQUEST_BYTES = 64 * 1024


def build_app(service: EditingService, hosts: Sequence[str] = ("127.0.0.1", "localhost")) -> FastAPI:
    """Build the page as an application for uvicorn.

    Args:
        service: what the page does.
        hosts: what a request may call this server ("*": anything), against DNS rebinding.
    """
    app = FastAPI(openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))

    @app.middleware("http")
    async def identify_visitor(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        path = request.url.path
        if path.startswith(_CLOSED):
            return JSONResponse({"error": "this page takes and gives no files that way"}, 404)
        if request.method == "POST" and path.startswith("/gradio_api/"):
            length = request.headers.get("Content-Length", "")
            if COOKIE not in request.cookies or not length.isdecimal() or int(length) > _MAX_REQUEST_BYTES:
                return JSONResponse({"error": "this is not what the page sends; load it again"}, 400)
        response = await call_next(request)
        if request.url.path == "/" and COOKIE not in request.cookies:
            response.set_cookie(COOKIE, secrets.token_urlsafe(18), httponly=True, samesite="strict", path="/")
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    @app.exception_handler(InputError)
    async def answer_input_error(_: Request, error: InputError) -> Response:
        return JSONResponse({"error": str(error)}, 400)

    @app.get("/page/{name}")
    def static(name: str) -> Response:
        if name not in _STATIC:
            return JSONResponse({"error": "there is no such file"}, 404)
        return Response((files("mimicbrush.app") / "static" / name).read_bytes(), media_type=_STATIC[name])

    @app.post("/upload")
    async def upload(request: Request) -> dict[str, str]:
        visitor, most, data = _read_visitor(request), service.limits.upload_bytes, bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > most:
                raise InputError(f"too large; at most {most / 2**20:.0f} MiB are taken")
        return {"token": await run_in_threadpool(service.upload, visitor, bytes(data))}

    @app.get("/files/{token}")
    def file(token: str, request: Request) -> Response:
        data = service.read(_read_visitor(request), token)
        return Response(data, media_type="image/png", headers={"Cache-Control": "private, no-store"})

    @app.get("/shown/{token}")
    def shown(token: str, request: Request) -> Response:
        data = service.show(_read_visitor(request), token)
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
        service.cancel(_read_visitor(request), job)
        return {"cancelled": True}

    return gr.mount_gradio_app(app, _build_blocks(service), path="/", footer_links=[], ssr_mode=False, show_error=True)


def _read_visitor(request: Request | gr.Request) -> str:
    """Whose request it is; another site's page cannot send the cookie.

    Raises:
        InputError: nobody's.
    """
    visitor = request.cookies.get(COOKIE, "")
    if not visitor:
        raise InputError("this page was opened without its cookie; load it again (cookies must be allowed)")
    return visitor


def _build_blocks(service: EditingService) -> gr.Blocks:
    pipeline, limits = service.pipeline, service.limits
    html = (files("mimicbrush.app") / "static" / "editing.html").read_text()
    parts = dict(zip(("source", "reference", "result"), html.split("<!-- next -->"), strict=True))

    def part(name: str, **more: Any) -> gr.HTML:
        start = f"import('/page/editing.js').then((page) => page.{name}(element, {{ props, watch }}));"
        template = parts[name].replace("{max_bytes}", str(limits.upload_bytes))
        return gr.HTML(html_template=template, js_on_load=start, apply_default_css=False, elem_id=f"mb-{name}", **more)

    def run(text: str, steps: float, guidance: float, seed: float, count: float, keep_shape: bool, crop: str,
            request: gr.Request, progress: gr.Progress = gr.Progress()) -> tuple[Any, str]:  # noqa: B008  # fmt: skip
        try:
            edit_request = EditRequest.read(
                text, limits, steps=steps, guidance=guidance, seed=seed, count=count, keep_shape=keep_shape, crop=crop
            )
            values = service.edit(
                _read_visitor(request), edit_request, lambda done, of: progress((done, of), desc="painting")
            )
        except MimicBrushError as error:
            return gr.skip(), f"**Not done:** {error}"
        if values is None:
            return gr.skip(), "Cancelled."
        has_places = any(each["places"] for each in values["results"])
        hint = " Point at the hole to see where in the reference it comes from." if has_places else ""
        return values, f"Done.{hint}"

    with gr.Blocks(title="MimicBrush", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML('<link rel="stylesheet" href="/page/painter.css"><link rel="stylesheet" href="/page/editing.css">')
        gr.Markdown(
            f"# Imitate\nPaint over what is to be replaced; give an image that shows what to put there. {service.about}"
        )
        with gr.Row():
            with gr.Column():
                part("source")
            with gr.Column():
                part("reference")
            with gr.Column():
                result = part("result", value=None)
                message = gr.Markdown("", elem_id="mb-said")
        with gr.Row():
            go, stop = gr.Button("Edit", variant="primary", elem_id="mb-go"), gr.Button("Cancel", elem_id="mb-stop")
        with gr.Row():
            steps = gr.Slider(1, limits.steps, pipeline.config.default_num_inference_steps, step=1, label="Steps")
            guidance = gr.Slider(1, 10, pipeline.config.default_guidance_scale, step=0.1, label="Guidance")
            seed = gr.Number(1, label="Seed", precision=0)
            count = gr.Slider(1, limits.images, 1, step=1, label="Results")
            keep_shape = gr.Checkbox(False, label="Keep the shape (texture transfer)", elem_id="mb-keep-shape")
            crop = gr.Radio([WHOLE_IMAGE, AROUND_THE_MASK], value=WHOLE_IMAGE, label="Repaint")
        if service.examples:
            buttons = "".join(
                f'<button data-example="{number}" data-keep-shape="{int(each.keep_shape)}">'
                f'<img src="/examples/{number}/source" alt=""><span>{each.title}</span></button>'
                for number, each in enumerate(service.examples)
            )
            gr.HTML(
                f'<p>Examples</p><div class="mb-examples">{buttons}</div>',
                js_on_load="import('/page/editing.js').then((page) => page.examples(element));",
                apply_default_css=False,
            )
        text = gr.Textbox("", visible="hidden")
        go.click(
            run,
            [text, steps, guidance, seed, count, keep_shape, crop],
            [result, message],
            js="async (...values) => [await (await import('/page/editing.js')).request(), ...values.slice(1)]",
            concurrency_limit=1,
            api_visibility="private",
            show_progress_on=result,
        )
        stop.click(None, js="async () => { (await import('/page/editing.js')).cancel(); }")
    blocks.queue(max_size=limits.waiting)
    return blocks
