"""Edit in the browser: python scripts/app.py [--model DIR|released]. Needs `pip install '.[demo]'`.

A source to paint on, a reference, and the edit; pointing at the result shows where in the reference it comes from.
Without --model the small model that comes with the project edits, offline. Only this machine is served unless --host
says otherwise. On another machine: ssh -L 7860:127.0.0.1:7860 MACHINE, then open the address here.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
import tempfile
from pathlib import Path

from mimicbrush.errors import InputError, install_command, speak_as
from mimicbrush.pipelines.folder import resolve_pipeline_folder
from mimicbrush.pipelines.small_model import SHIPPED_MODEL, SHIPPED_NAME, shipped_size_px
from mimicbrush.ranges import PORT_RANGE, NumberRange, one_of

SMALL = """It is the small model that comes with the project, at {size_px} px: it shows how imitating works, not what a
full model paints."""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default=SHIPPED_NAME, metavar="DIR|released|small", help="as for scripts/infer.py")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves everybody (default: 127.0.0.1)")
    parser.add_argument("--port", type=PORT_RANGE.read, default=7860, help="default: 7860")
    parser.add_argument("--device", **one_of("auto", "cpu", "cuda"), default="auto", help="default: auto")
    dtypes = one_of("auto", "float32", "float16", "bfloat16")
    parser.add_argument("--dtype", **dtypes, default="auto", help="default: auto, on a GPU float16")
    upload_mib = NumberRange(at_least=1, at_most=4096, whole=True)
    parser.add_argument("--max-upload-mib", type=upload_mib.read, default=32, help="of one image (default: 32)")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    return parser.parse_args()


def main() -> None:
    """Serve the editing page until a signal comes."""
    arguments = parse_arguments()
    folder = resolve_pipeline_folder(arguments.model)  # None: the released weights, found when they are opened
    if importlib.util.find_spec("gradio") is None:
        raise InputError(f"the editing page needs the package gradio. Install it: {install_command('demo')}")

    # uvicorn ends itself with the signal that it heard; the visitors' files must be removed before.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="mimicbrush-") as temporary:
        # Both are read while gradio is imported. Nothing is sent to anybody.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(Path(temporary) / "gradio")}
        with speak_as("page"):
            serve(arguments, folder, Path(temporary))


def serve(arguments: argparse.Namespace, folder: Path | None, temporary: Path) -> None:
    """Load the model, say where the page is, and serve it until a signal comes."""
    print("loading ...", file=sys.stderr)
    import socket

    import uvicorn

    from mimicbrush.app.editing_page import build_app
    from mimicbrush.app.editing_service import EditingService
    from mimicbrush.app.examples import examples
    from mimicbrush.app.session_files import SessionFiles, VisitorLimits
    from mimicbrush.pipelines.open_pipeline import open_pipeline

    pipeline = open_pipeline(arguments.model, arguments.device, arguments.dtype)
    pipeline.set_progress_bar_config(disable=True)
    is_small = folder == SHIPPED_MODEL
    about = SMALL.format(size_px=shipped_size_px()) if is_small else f"The model: {arguments.model}."
    visits = SessionFiles(temporary / "visits", VisitorLimits(upload_bytes=arguments.max_upload_mib * 2**20))
    is_local = arguments.host in ("127.0.0.1", "localhost")
    app = build_app(
        EditingService(pipeline, about, visits, examples()), ("127.0.0.1", "localhost") if is_local else ("*",)
    )
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((arguments.host, arguments.port))
        except (OSError, OverflowError) as error:
            raise InputError(
                f"{arguments.host}:{arguments.port} cannot be opened ({error}); name another --port, or 0 for any"
            ) from error
        host, port = listening.getsockname()
        url = f"http://{host}:{port}/"
        print(f"edit at {url} (Ctrl-C ends it)" + ("" if is_small else f", with {arguments.model}"), flush=True)
        if not is_local:
            print("note: everybody who reaches this machine can use it; nothing is encrypted", file=sys.stderr)
        if arguments.open:
            import webbrowser

            webbrowser.open(url)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
