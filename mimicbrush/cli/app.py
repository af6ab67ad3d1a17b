"""Edit in the browser.

mimicbrush app
mimicbrush app --model runs/NAME/pipeline

Paint on an image, choose a reference, and edit. Point at a result to see which
part of the reference the model looked at. By default, the page uses the small
model that comes with the project, and needs no network. It needs
`pip install '.[demo]'`.

Only this machine can open the page. With --host 0.0.0.0, other machines can
open it, too, if they know the token in the printed address. If the command runs
on another machine: ssh -L 7860:127.0.0.1:7860 MACHINE, then open the address on
your machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import socket
import sys
from pathlib import Path
from urllib.parse import quote

from mimicbrush.app.access import choose_access
from mimicbrush.app.session_files import make_server_folder
from mimicbrush.errors import InputError, install_command, speak_as
from mimicbrush.pipelines.find_pipeline import check_model
from mimicbrush.pipelines.folder import resolve_pipeline_folder
from mimicbrush.pipelines.klein.folder import is_klein
from mimicbrush.pipelines.small_model import SHIPPED_MODEL, SHIPPED_NAME, shipped_size_px
from mimicbrush.ranges import PORT_RANGE, CommandParser, NumberRange, one_of

SMALL = """This is the small model that comes with the project, at {size_px} px. It shows how imitation works, but it
cannot paint as well as a full-size model."""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--model",
        default=SHIPPED_NAME,
        metavar="DIR|released|small",
        help="model, as for `mimicbrush edit` (default: small)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0: other machines can open the page, too (default: 127.0.0.1)",
    )
    parser.add_argument(
        "--token",
        metavar="TEXT",
        help="token that is needed to open the page; '': none (default: with another --host, a random one)",
    )
    parser.add_argument("--port", type=PORT_RANGE.read, default=7860, help="port to listen on (default: 7860)")
    parser.add_argument(
        "--device", **one_of("auto", "cpu", "cuda"), default="auto", help="device to run on (default: auto)"
    )
    dtypes = one_of("auto", "float32", "float16", "bfloat16")
    parser.add_argument("--dtype", **dtypes, default="auto", help="data type of the weights (default: auto)")
    upload_mib = NumberRange(at_least=1, at_most=4096, whole=True)
    upload_help = "largest file that can be uploaded, in MiB (default: 32)"
    parser.add_argument("--max-upload-mib", type=upload_mib.read, default=32, metavar="MIB", help=upload_help)
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    return parser.parse_args()


def main() -> None:
    """Serve the editing page until a signal comes."""
    arguments = parse_arguments()
    check_model(arguments.model)
    if absent := [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise InputError(f"the editing page needs the package {absent[0]}. To install it: {install_command('demo')}")

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as with nohup
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    with make_server_folder() as folder_for_files, speak_as("page"):
        ended_by = serve(arguments, folder_for_files)
    if ended_by is not None:
        print("stopped", file=sys.stderr, flush=True)
        os._exit(128 + ended_by)  # a normal exit takes seconds while an edit runs, and nothing is left to do


def serve(arguments: argparse.Namespace, temporary: Path) -> int | None:
    """Load the model, print the address of the page, and serve it until a signal comes; return its number."""
    print("loading the model ...", file=sys.stderr)
    from mimicbrush.app.editing_service import EditingService
    from mimicbrush.app.examples import examples
    from mimicbrush.app.image_reader import ImageReader
    from mimicbrush.app.page_routes import build_app
    from mimicbrush.app.page_server import PageServer
    from mimicbrush.app.session_files import SessionFiles, VisitorLimits
    from mimicbrush.pipelines.open_pipeline import open_any_pipeline

    pipeline = open_any_pipeline(arguments.model, arguments.device, arguments.dtype)
    pipeline.set_progress_bar_config(disable=True)
    is_small = not is_klein(Path(arguments.model)) and resolve_pipeline_folder(arguments.model) == SHIPPED_MODEL
    about = SMALL.format(size_px=shipped_size_px()) if is_small else f"Model: {arguments.model}."
    files = SessionFiles(temporary / "visits", VisitorLimits(upload_bytes=arguments.max_upload_mib * 2**20))
    service = EditingService(pipeline, about, files, ImageReader(files.limits), examples())
    access = choose_access(arguments.host, arguments.token)
    server = PageServer(build_app(service, access), service, temporary)
    with open_socket(arguments.host, arguments.port) as listening:
        url = page_address(listening, access.token)
        print(f"edit at {url} (Ctrl-C to stop)" + ("" if is_small else f", with {arguments.model}"), flush=True)
        if access.has_numbers:
            who = "everyone who knows this address" if access.token else "WARNING: everyone who can reach this machine"
            print(f"note: {who} can use the page; the connection is not encrypted", file=sys.stderr)
        if arguments.open:
            import webbrowser

            webbrowser.open(url)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, server.handle_exit)
        try:
            server.run(sockets=[listening])
        except (KeyboardInterrupt, SystemExit):
            if server.ended_by is None:
                raise
        finally:
            service.close()
    return server.ended_by


def open_socket(host: str, port: int) -> socket.socket:
    """Open the port.

    Raises:
        InputError: the port is in use, or this address is not one of this machine.
    """
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(128)  # before the address is printed: early visitors wait
    except (OSError, OverflowError) as error:
        listening.close()
        raise InputError(
            f"cannot listen on {host}:{port} ({error}); use another --port, or 0 for any free port"
        ) from error
    return listening


def page_address(listening: socket.socket, token: str) -> str:
    """Build the address of the page, for a browser."""
    host, port = listening.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # all interfaces
        host = socket.gethostname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/" + (
        f"?token={quote(token, safe='')}" if token else ""
    )
