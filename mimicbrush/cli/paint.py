"""Paint masks over images in the browser, on this machine.

mimicbrush paint IMAGES --output MASKS    paint masks for a folder of images
mimicbrush paint --output MASKS           for images that you upload in the page

The mask of IMAGES/dog/01.jpg is saved as MASKS/dog/01.png. It has the size of
its image; 255 means repaint, and 0 means keep. Ctrl-C stops the command. If it
runs on another machine: ssh -L 8765:127.0.0.1:8765 MACHINE, then open the
address on your machine.
"""

from __future__ import annotations

from pathlib import Path

from mimicbrush.io.outputs import check_output_folder
from mimicbrush.ranges import PORT_RANGE, CommandParser


def main() -> None:
    """Serve the painting page until Ctrl-C."""
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "images", type=Path, nargs="?", metavar="IMAGES", help="folder of images; subfolders are included"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="MASKS", help="folder for the masks")
    parser.add_argument(
        "--port", type=PORT_RANGE.read, default=8765, help="port to listen on; 0: any free port (default: 8765)"
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    arguments = parser.parse_args()
    check_output_folder(arguments.output, "--output")

    from mimicbrush.app.mask_painter import MaskStore, PainterServer

    store = MaskStore(arguments.output, arguments.images, on_save=lambda path: print(f"saved {path}", flush=True))
    with PainterServer(store, arguments.port) as server:
        print(f"{len(store.names())} images; paint at {server.url} (Ctrl-C to stop)", flush=True)
        if arguments.open:
            import webbrowser

            webbrowser.open(server.url)
        server.serve_forever()
