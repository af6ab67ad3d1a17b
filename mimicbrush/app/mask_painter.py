"""A page on this machine for painting masks over images, with its server and its files.

Only this machine is served (127.0.0.1). A page of another site that is open in the same browser gets nothing:
requests must name this host (against DNS rebinding), and what changes something must come from the page itself.
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, urlsplit

import numpy as np
from PIL import Image

from mimicbrush.errors import InputError
from mimicbrush.io.atomic import path_inside, write_aside
from mimicbrush.io.image_formats import DAMAGED_IMAGE, HEIF_START_BYTES, prepare_heif
from mimicbrush.io.images import MASK_THRESHOLD, read_image, write_image
from mimicbrush.io.text import make_storable

#: Formats that are taken, and the suffix under which an upload is kept.
PAINTABLE_FORMATS = {
    "JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif", "AVIF": ".avif", "HEIF": ".heic"
}  # fmt: skip
SUFFIXES = frozenset({*PAINTABLE_FORMATS.values(), ".jpeg", ".tiff", ".heif"})
#: Folder in the output that holds what was uploaded.
UPLOADS = "uploads"
MAX_UPLOAD_BYTES = 64 * 2**20
#: Half of what some browsers can show on a canvas at 4 bytes a pixel.
MAX_PAINTED_PIXELS = 50_000_000
#: Pages of a TIFF. Counting them takes time with the square of their number; the first alone is used.
MAX_PAGES = 100

_STATIC = {
    "/": ("painter.html", "text/html; charset=utf-8"),
    "/painter.css": ("painter.css", "text/css; charset=utf-8"),
    **{
        f"/{name}.js": (f"{name}.js", "text/javascript; charset=utf-8")
        for name in ("painter_page", "painter", "toolbar", "view", "mask", "server")
    },
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class MaskStore:
    """Folder of images to paint on, and of the masks that belong to them.

    Attributes:
        output: gets a mask `a/b.png` for an image `a/b.jpg`, and `uploads/b_mask.png` beside an upload.
        images: a folder of images, at any depth; it is only read. None: uploads alone.
        on_save: is called with the path of each saved mask.
    """

    output: Path
    images: Path | None = None
    on_save: Callable[[Path], None] = field(default=lambda path: None)

    def __post_init__(self) -> None:
        """Check the folders, and make the one for the masks.

        Raises:
            InputError: no folder of images, images that a mask would replace, or two whose masks are one file.
        """
        if self.images is not None:
            if not self.images.is_dir():
                raise InputError(f"{self.images}: no such folder; name a folder with images")
            if self.images.resolve().is_relative_to(self.output.resolve()):
                raise InputError(
                    f"--output {self.output} contains the images themselves, so the mask a.png would replace the image "
                    "a.png; name another folder"
                )
            if (self.images / UPLOADS).is_dir():
                raise InputError(f"{self.images / UPLOADS}: this name is reserved for uploads; rename the folder")
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--output {self.output} cannot be created ({error})") from error
        owners: dict[Path, str] = {}
        for name in self.names():
            other = owners.setdefault(self.mask_path(name), name)
            if other != name:
                raise InputError(
                    f"{other} and {name} would have the same mask, {self.mask_path(name)}; rename one of them"
                )

    def names(self) -> list[str]:
        """List the images, as paths with "/" relative to their folder; uploads begin with "uploads/"."""
        names = []
        if self.images is not None:
            inside = self.output.resolve()
            paths = (path for path in self.images.rglob("*") if not path.resolve().is_relative_to(inside))
            names += [path.relative_to(self.images).as_posix() for path in paths if _is_image(path)]
        uploads = self.output / UPLOADS
        names += [f"{UPLOADS}/{path.name}" for path in uploads.glob("*") if _is_image(path) and not _is_mask(path)]
        return sorted(names)

    def image_path(self, name: str) -> Path:
        """Return the path of an image.

        Raises:
            InputError: it leads out of the folder, or there is none of this name.
        """
        root = self.output if _is_upload(name) else self.images
        if root is None:
            raise InputError(f"{name!r}: the page was started without a folder of images; upload the image")
        path = path_inside(root, name)
        if not _is_image(path) or (_is_upload(name) and _is_mask(path)):
            raise InputError(f"{name!r}: there is no such image")
        return path

    def mask_path(self, name: str) -> Path:
        """Return the path of an image's mask, whether it is painted yet or not.

        Raises:
            InputError: it leads out of the folder.
        """
        image = PurePosixPath(name)
        if not image.name:
            raise InputError(f"{name!r}: there is no such image")
        mask = image.with_name(image.stem + ("_mask.png" if _is_upload(name) else ".png"))
        return path_inside(self.output, str(mask))

    def open(self, name: str) -> Image.Image:
        """Open an image, upright, in mode "RGB".

        Raises:
            InputError: there is none of this name, it cannot be read, or it has more than `MAX_PAINTED_PIXELS`.
        """
        path = self.image_path(name)
        check_kind(path, name)
        return read_image(path, "RGB")

    def save_mask(self, name: str, png: bytes) -> Path:
        """Save a mask: above `MASK_THRESHOLD` becomes 255, the rest 0.

        Args:
            name: of an image.
            png: of the image's own size.

        Raises:
            InputError: no such image, no PNG, another size, or nothing is painted.
        """
        size = self.open(name).size
        try:
            with Image.open(io.BytesIO(png), formats=["PNG"]) as opened:
                if opened.size != size:
                    raise InputError(
                        f"the mask is {opened.width} x {opened.height} px, but the image {name} is {size[0]} x "
                        f"{size[1]} px"
                    )
                painted = np.asarray(opened.convert("L")) > MASK_THRESHOLD
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"the mask of {name} is not a valid PNG ({error})") from error
        if not painted.any():
            raise InputError(f"the mask of {name} is empty; paint over the parts that should be repainted, then save")
        path = self.mask_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(Image.fromarray(painted.astype(np.uint8) * 255), path)
        self.on_save(path)
        return path

    def add(self, name: str, data: bytes) -> str:
        """Store an upload unchanged, under a simple and unique name.

        Args:
            name: as the browser gives it; only a plain part of it is used.
            data: the whole file.

        Returns:
            The name of the image.

        Raises:
            InputError: no image of a known format, damaged, or too large.
        """
        suffix = PAINTABLE_FORMATS[check_kind(io.BytesIO(data), name)]
        stem = re.sub(r"[^A-Za-z0-9-]+", "_", PurePosixPath(name.replace("\\", "/")).stem).strip("_")[:80] or "picture"
        if stem.endswith("_mask"):  # the mask of another upload is called so
            stem += "_picture"
        folder = self.output / UPLOADS
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(1, 10_000):
            path = folder / (f"{stem}{suffix}" if number == 1 else f"{stem}-{number}{suffix}")
            if path.is_file() and path.read_bytes() == data:
                return f"{UPLOADS}/{path.name}"
            if not any(path.with_suffix(other).exists() for other in SUFFIXES):
                break
        else:
            raise InputError(f"{folder} contains too many images with the name {stem}; move some of them away")

        def write(aside: Path) -> None:
            aside.write_bytes(data)
            try:
                read_image(aside, "RGB")
            except InputError as error:
                raise InputError(f"{name}: {str(error).removeprefix(f'{aside}: ')}") from error

        write_aside(path, write)
        return f"{UPLOADS}/{path.name}"


def _is_upload(name: str) -> bool:
    return PurePosixPath(name).parts[:1] == (UPLOADS,)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _is_mask(path: Path) -> bool:
    return path.stem.endswith("_mask")


def check_kind(file: Path | io.BytesIO, name: str, max_pixels: int | None = None) -> str:
    """Find the format of an image from its first bytes, without decoding pixels.

    Raises:
        InputError: none of `PAINTABLE_FORMATS`; or of more than `max_pixels`, else of `MAX_PAINTED_PIXELS`; or of more
            than `MAX_PAGES`.
    """
    most = MAX_PAINTED_PIXELS if max_pixels is None else max_pixels
    try:
        if isinstance(file, Path):
            with file.open("rb") as opened_file:
                prepare_heif(opened_file.read(HEIF_START_BYTES))
        else:
            prepare_heif(file.getbuffer()[:HEIF_START_BYTES].tobytes())
        Image.init()
        with Image.open(file, formats=[each for each in PAINTABLE_FORMATS if each in Image.OPEN]) as opened:
            pixels, kind = opened.width * opened.height, str(opened.format)
            has_more = kind == "TIFF" and _has_frame(opened, MAX_PAGES)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} is too large; the limit is {most / 1e6:.0f} megapixels") from error
    except DAMAGED_IMAGE as error:
        raise InputError(f"{name} is not an image in a supported format ({', '.join(PAINTABLE_FORMATS)})") from error
    if pixels > most:
        raise InputError(
            f"{name} is too large: {pixels / 1e6:.0f} megapixels; the limit is {most / 1e6:.0f} megapixels"
        )
    if has_more:
        raise InputError(f"{name} has more than {MAX_PAGES} pages; save the page that you need as a separate image")
    return "JPEG" if kind == "MPO" else kind  # a JPEG with previews appended, as some cameras write it


def _has_frame(image: Image.Image, number: int) -> bool:
    try:
        image.seek(number)
    except EOFError:
        return False
    return True


class _RefusedError(Exception):
    """A request that is refused, with an HTTP status and the reason."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class PainterServer(ThreadingHTTPServer):
    """Server of the page and of a `MaskStore`, for this machine only.

    Args:
        store: images and masks.
        port: 0 takes one that is free.

    Raises:
        InputError: the port cannot be had.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, store: MaskStore, port: int = 0) -> None:
        self.store = store
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            raise InputError(
                f"port {port} cannot be used ({error}); choose another --port, or 0 for any free port"
            ) from error

    def handle_error(self, request: object, client_address: object) -> None:
        """Log errors of the server, but not lost connections to a browser."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://127.0.0.1:{self.server_address[1]}/"

    @property
    def hosts(self) -> frozenset[str]:
        """Names by which a request may call this server."""
        return frozenset(f"{name}:{self.server_address[1]}" for name in ("127.0.0.1", "localhost"))


class _Handler(BaseHTTPRequestHandler):
    server: PainterServer
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing here: the store reports what is saved."""

    def _answer(self, respond: Callable[[], tuple[str, bytes]]) -> None:
        status = HTTPStatus.OK
        try:
            self._check_host()
            kind, body = respond()
        except (_RefusedError, InputError) as error:
            status = error.status if isinstance(error, _RefusedError) else HTTPStatus.BAD_REQUEST
            kind, body = "application/json", json.dumps({"error": str(error)}).encode()
        except ValueError as error:  # an address or a name that no file system can have
            status = HTTPStatus.BAD_REQUEST
            kind, body = (
                "application/json",
                json.dumps({"error": make_storable(f"the request is not valid ({error})")}).encode(),
            )
        except ConnectionError:
            raise  # nobody is there to answer
        except OSError as error:  # the disk is full, or a folder may not be written
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            kind, body = (
                "application/json",
                json.dumps({"error": f"the file could not be read or saved ({error})"}).encode(),
            )
        self.close_connection = self.close_connection or status != HTTPStatus.OK  # a body may be left unread
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def _check_host(self) -> None:
        if self.headers.get("Host", "") not in self.server.hosts:
            raise _RefusedError(HTTPStatus.FORBIDDEN, f"this page is available only at {self.server.url}")

    def _get(self) -> tuple[str, bytes]:
        path, store = urlsplit(self.path).path, self.server.store
        if path in _STATIC:
            name, kind = _STATIC[path]
            return kind, (files("mimicbrush.app") / "static" / name).read_bytes()
        if path == "/api/pictures":
            return _json(
                {
                    "pictures": [self._describe(name) for name in store.names()],
                    "max_upload_bytes": MAX_UPLOAD_BYTES,
                }
            )
        if path == "/api/picture":
            buffer = io.BytesIO()
            # As it will be read, not as it lies there: browsers know neither all formats nor all kinds of turning.
            store.open(self._read_name()).save(buffer, "JPEG", quality=92, subsampling=0)
            return "image/jpeg", buffer.getvalue()
        if path == "/api/mask":
            mask = store.mask_path(self._read_name())
            if not mask.is_file():
                raise _RefusedError(HTTPStatus.NOT_FOUND, f"{self._read_name()!r} has no mask yet")
            return "image/png", mask.read_bytes()
        raise _RefusedError(HTTPStatus.NOT_FOUND, f"{path}: there is no such page")

    def _post(self) -> tuple[str, bytes]:
        path, store = urlsplit(self.path).path, self.server.store
        origin, host = self.headers.get("Origin", ""), self.headers["Host"]
        if origin != f"http://{host}" or self.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
            raise _RefusedError(HTTPStatus.FORBIDDEN, "only this page itself may send this request")
        if path == "/api/mask":
            name = self._read_name()
            store.image_path(name)
            saved = store.save_mask(name, self._read_body("image/png"))
            return _json({"saved": saved.relative_to(store.output).as_posix()})
        if path == "/api/upload":
            return _json(self._describe(store.add(self._read_name(), self._read_body("application/octet-stream"))))
        raise _RefusedError(HTTPStatus.NOT_FOUND, f"{path}: there is no such page")

    def _describe(self, name: str) -> dict[str, object]:
        return {"name": name, "masked": self.server.store.mask_path(name).is_file()}

    def _read_name(self) -> str:
        names = parse_qs(urlsplit(self.path).query).get("name", [])
        if len(names) != 1:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "the address must name one image: ?name=...")
        return names[0]

    def _read_body(self, kind: str) -> bytes:
        if self.headers.get("Content-Type", "") != kind:
            raise _RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"expected the Content-Type {kind}")
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]{1,12}", length) or "Transfer-Encoding" in self.headers:
            raise _RefusedError(HTTPStatus.LENGTH_REQUIRED, "the request must give its size (Content-Length)")
        if int(length) > MAX_UPLOAD_BYTES:
            raise _RefusedError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"too large: {int(length) / 2**20:.0f} MiB; the limit is {MAX_UPLOAD_BYTES / 2**20:.0f} MiB",
            )
        body = self.rfile.read(int(length))
        if len(body) != int(length):
            raise _RefusedError(HTTPStatus.BAD_REQUEST, f"only {len(body)} of {length} bytes arrived; try again")
        return body


def _json(value: object) -> tuple[str, bytes]:
    return "application/json", json.dumps(value).encode()
