"""The editing page as an application: gradio's controls around the mask painter.

Uploads and results do not go through gradio's file cache, whose addresses anybody may open. `SessionFiles` keeps
them, and a cookie says whose they are. Gradio runs the queue, its progress and its controls; `Gate` stands before it.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import gradio as gr
from fastapi import FastAPI

from mimicbrush.app.access import Access
from mimicbrush.app.editing_service import AROUND_THE_MASK, WHOLE_IMAGE, EditingService, EditRequest
from mimicbrush.app.gate import COOKIE, Gate, Listeners
from mimicbrush.app.page_routes import add_routes
from mimicbrush.errors import MimicBrushError


def build_app(service: EditingService, access: Access) -> Gate:
    """Build the page as an application for uvicorn.

    Args:
        service: what the page does.
        access: who may ask.
    """
    app = FastAPI(openapi_url=None)
    add_routes(app, service)
    listeners = Listeners()
    blocks, edit_index = _build_blocks(service, listeners)
    app = gr.mount_gradio_app(app, blocks, path="/", footer_links=[], ssr_mode=False, show_error=True)
    gate = Gate(app, access, service.limits, listeners)
    gate.edit_index = edit_index
    queue = blocks._queue  # gradio has no other way to see who waits
    gate.waiting = lambda: [
        event.session_hash for each in queue.event_queue_per_concurrency_id.values() for event in each.queue
    ]
    return gate


def _build_blocks(service: EditingService, listeners: Listeners) -> tuple[gr.Blocks, int]:
    """The page, and the queue's number of the edit."""
    pipeline, limits = service.pipeline, service.limits
    html = (files("mimicbrush.app") / "static" / "editing.html").read_text()
    parts = dict(zip(("source", "reference", "result"), html.split("<!-- next -->"), strict=True))

    def part(name: str, **more: Any) -> gr.HTML:
        start = f"import('/page/editing.js').then((page) => page.{name}(element, {{ props, watch }}));"
        template = parts[name].replace("{max_bytes}", str(limits.upload_bytes))
        return gr.HTML(html_template=template, js_on_load=start, apply_default_css=False, elem_id=f"mb-{name}", **more)

    def run(text: str, steps: float, guidance: float, seed: float | None, count: float, keep_shape: bool, crop: str,
            request: gr.Request, progress: gr.Progress = gr.Progress()) -> tuple[Any, str]:  # noqa: B008  # fmt: skip
        try:
            edit_request = EditRequest.read(
                text, limits, steps=steps, guidance=guidance, seed=seed, count=count, keep_shape=keep_shape, crop=crop
            )
            values = service.edit(
                request.cookies[COOKIE],
                edit_request,
                lambda done, of: progress((done, of), desc="painting"),
                lambda: listeners.have_left(str(request.session_hash)),
            )
        except MimicBrushError as error:
            return gr.skip(), f"**Not done:** {error}"
        if values is None:
            return gr.skip(), "Cancelled."
        has_places = any(each["places"] for each in values["results"])
        hint = " Point at the hole to see where in the reference it comes from." if has_places else ""
        chosen = f" Seed {edit_request.seed} was chosen." if seed is None else ""
        return values, f"Done.{chosen}{hint}"

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
            seed = gr.Number(1, label="Seed (empty: a new one each time)", precision=0)
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
        blocks.load(None, None, None, js="async () => { (await import('/page/editing.js')).announce(); }")
        text = gr.Textbox("", visible="hidden")
        # What was said of the edit before goes at once, not when the next one is done.
        go.click(None, None, message, js="() => ''")
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
    blocks.queue(max_size=limits.waiting, api_open=False)
    (edit_index,) = (index for index, each in blocks.fns.items() if each.fn is run)
    return blocks, edit_index
