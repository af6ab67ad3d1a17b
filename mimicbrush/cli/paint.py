"""Paint masks over images, in the browser, on this machine.

mimicbrush paint PICTURES --output MASKS    the mask of PICTURES/dog/01.jpg becomes MASKS/dog/01.png
mimicbrush paint --output MASKS             for images that are uploaded in the page

A mask has its image's own size: 255 is to be repainted, 0 is kept. Ctrl-C ends it.
If it runs on another machine: ssh -L 8765:127.0.0.1:8765 MACHINE, then open the address here.
"""

from __future__ import annotations

from pathlib import Path

from mimicbrush.io.outputs import check_output_folder
from mimicbrush.ranges import PORT_RANGE, CommandParser


def main() -> None:
    """Serve the painting page until Ctrl-C."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("images", type=Path, nargs="?", metavar="PICTURES", help="a folder of images, of any depth")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="MASKS", help="folder for the masks")
    parser.add_argument("--port", type=PORT_RANGE.read, default=8765, help="0 takes one that is free (default: 8765)")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    arguments = parser.parse_args()
    check_output_folder(arguments.output, "--output")

    from mimicbrush.app.mask_painter import MaskStore, PainterServer

    store = MaskStore(arguments.output, arguments.images, on_save=lambda path: print(f"saved {path}", flush=True))
    with PainterServer(store, arguments.port) as server:
        print(f"{len(store.names())} images; paint at {server.url} (Ctrl-C ends it)", flush=True)
        if arguments.open:
            import webbrowser

            webbrowser.open(server.url)
        server.serve_forever()
