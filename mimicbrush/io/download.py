"""Downloads of files from the addresses of a list: only https, with a size limit, and resumed after an interruption.

What has come so far lies beside the file, as ``.NAME.part``. A file gets its name only when it is whole and its hash
is right.
"""

from __future__ import annotations

import http.client
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from mimicbrush.errors import InputError
from mimicbrush.io.atomic import write_json
from mimicbrush.io.hashing import hash_file
from mimicbrush.io.text import describe_error, in_bytes, make_storable

_CHUNK_BYTES = 1 << 18
_TIMEOUT_S = 60.0
#: Number of connections in a row that may fail without a byte, with growing pauses.
_ATTEMPTS, _PAUSE_S = 4, 1.0
_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
_AGENT = "mimicbrush (training data)"
#: No size has more digits than this; Python refuses to read some thousand of them.
_SIZE = re.compile(r"[0-9]{1,18}")
_RANGE = re.compile(rf"bytes ({_SIZE.pattern})-{_SIZE.pattern}/({_SIZE.pattern})")
#: Characters that an address may have; urllib sends no others.
_IN_ADDRESS = "".join(map(chr, range(0x21, 0x7F)))


class DownloadError(InputError):
    """A file that could not be downloaded, or is not the expected file."""


def check_address(url: str) -> None:
    """Check that an address uses https. For this machine itself, http is allowed.

    Raises:
        DownloadError: it is another.
    """
    try:
        parts = urlsplit(url)
        is_good = bool(parts.hostname) and (parts.scheme == "https" or _is_local(url))
        fault = "" if is_good else "expected an address that starts with https://"
        _encode_address(url)
    except ValueError as error:  # brackets that do not match, a port that is no number, a host with an empty part
        fault = f"expected an address that starts with https:// and has a host name ({make_storable(str(error), 100)})"
    if fault:
        raise DownloadError(f"{make_storable(url, 200)!r}: {fault}")


def _encode_address(url: str) -> str:
    """Write an address as it is sent: in ASCII, without spaces.

    Raises:
        ValueError: no server has such a name, or such a port.
    """
    parts = urlsplit(url)
    if parts.port == 0:
        raise ValueError("port 0 is not possible")
    host = (parts.hostname or "").encode("idna").decode()
    name = parts.netloc.rpartition("@")[2]
    if not name.isascii():
        name = f"{host}:{parts.port}" if parts.port else host
    elif not set(name) <= set(_IN_ADDRESS):
        raise ValueError("its host name has spaces")
    path, query = (quote(part, _IN_ADDRESS) for part in (parts.path, parts.query))
    return urlunsplit(parts._replace(netloc=name, path=path, query=query))


def _is_local(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme == "http" and parts.hostname in _THIS_MACHINE


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a server to another address only where that is one of https, and never onto this machine."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        parts = urlsplit(newurl)
        if parts.scheme != "https" and not _is_local(newurl):
            raise DownloadError(
                f"{req.full_url} leads to {make_storable(newurl, 200)!r}, which is not an https address"
            )
        if parts.hostname in _THIS_MACHINE and not _is_local(req.full_url):
            raise DownloadError(f"{req.full_url} leads to {make_storable(newurl, 200)!r}, which is this machine")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download_file(
    url: str,
    path: Path,
    *,
    sha256: str = "",
    num_bytes: int | None = None,
    max_bytes: int,
    check: Callable[[Path], object] = lambda _: None,
    report: Callable[[int, int | None], object] = lambda *_: None,
) -> str:
    """Download a file, or the rest of it after an interruption.

    Args:
        url: of https.
        path: the file; its folder exists, and no other process writes it.
        sha256: hex, which it must have; "" if it is not known.
        num_bytes: its size; None if it is not known.
        max_bytes: a longer file is refused.
        check: looks at the file before it gets its name, and raises what it finds.
        report: called with the bytes so far, and with all bytes if that is known.

    Returns:
        The SHA-256 of the file, hex.

    Raises:
        DownloadError: the server does not answer, or sends another file. What came of the right one stays for the next
            try.
        OSError: the disk refuses.
    """
    check_address(url)
    part = path.with_name(f".{path.name}.part")
    note = path.with_name(f".{path.name}.part.json")
    fetch = _Fetch(url, part, note, num_bytes, max_bytes, report)
    failures = 0
    while True:
        before = _size_of(part)
        try:
            if fetch.get():
                break
            problem = "the connection ended early"
        except DownloadError:
            raise
        except urllib.error.HTTPError as error:
            if error.code < 500:  # another try would give the same answer
                raise DownloadError(
                    f"{url}: the server answered {error.code} ({make_storable(str(error.reason))})"
                ) from None
            problem = f"the server answered {error.code}"
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            problem = describe_error(error)
        except ValueError as error:  # of urllib: an address that the server leads to, or a header, is none
            raise DownloadError(f"{url}: cannot read the answer of the server: {describe_error(error)}") from None
        have = _size_of(part)
        failures = 1 if have > before else failures + 1  # a slow connection that often breaks still succeeds
        if failures >= _ATTEMPTS:
            kept = f"; {in_bytes(have)} are already here. Run the same command again to continue" if have else ""
            raise DownloadError(f"{url} could not be downloaded: {problem}{kept}")
        time.sleep(failures * _PAUSE_S)
    if num_bytes not in (None, _size_of(part)):
        have = _size_of(part)
        _forget(part, note)
        raise DownloadError(
            f"{url}: the server sent {have} bytes, and the list says {num_bytes}. They were not kept: this is not the "
            "listed file, or not the whole file"
        )
    found = hash_file(part)
    if sha256 and found != sha256:
        _forget(part, note)
        raise DownloadError(
            f"{url}: the file has the SHA-256 {found}, and the list says {sha256}. It was not kept: this is not the "
            "listed file"
        )
    try:
        check(part)
    except InputError:
        _forget(part, note)
        raise
    part.replace(path)
    note.unlink(missing_ok=True)
    return found


def _size_of(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _forget(part: Path, note: Path) -> None:
    part.unlink(missing_ok=True)
    note.unlink(missing_ok=True)


def _read_some(answer: Any) -> bytes:
    """Read what has come; an error of the connection must not look like an error of the disk."""
    try:
        return bytes(answer.read1(_CHUNK_BYTES))
    except OSError as error:
        raise ConnectionError(describe_error(error)) from error


class _Fetch:
    """One file that is fetched in one or several answers of a server."""

    def __init__(
        self,
        url: str,
        part: Path,
        note: Path,
        num_bytes: int | None,
        max_bytes: int,
        report: Callable[[int, int | None], object],
    ) -> None:
        self.url, self.part, self.note = url, part, note
        self.num_bytes, self.max_bytes, self.report = num_bytes, max_bytes, report
        self._opener = urllib.request.build_opener(_CheckedRedirects)

    def get(self) -> bool:
        """Fetch what is missing; whether the file is whole."""
        have, tag = self._find_part()
        if have and have == self.num_bytes:
            return True
        headers = {"User-Agent": _AGENT, "Accept-Encoding": "identity"}
        if have:  # only of the same version: If-Range asks for all of a file that has changed
            headers |= {"Range": f"bytes={have}-", "If-Range": tag}
        request = urllib.request.Request(_encode_address(self.url), headers=headers)
        try:
            opened = self._opener.open(request, timeout=_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
            if error.headers.get("Content-Range", "") == f"bytes */{have}":
                return True  # an earlier try ended just before it gave the file its name
            _forget(self.part, self.note)
            return False
        with opened as answer:
            if answer.status == http.client.PARTIAL_CONTENT and self._find_tag(answer.headers) not in ("", tag):
                _forget(self.part, self.note)  # the rest of another version
                return False
            start, total = self._read_size(answer, have)
            self._check_answer(answer, total)
            write_json(self.note, {"url": self.url, "tag": self._find_tag(answer.headers)})
            count = start
            # Nothing waits in a buffer: what has come is on the disk, however the process ends.
            with self.part.open("r+b" if start else "wb", buffering=0) as file:
                file.truncate(start)
                file.seek(start)
                while chunk := _read_some(answer):
                    count += len(chunk)
                    if count > (total or self.max_bytes):
                        raise DownloadError(
                            f"{self.url}: the server sent more than {in_bytes(total or self.max_bytes)}"
                        )
                    file.write(chunk)
                    self.report(count, total)
        return total is None or count == total

    def _find_part(self) -> tuple[int, str]:
        """The bytes that an earlier try left, and the version of the file that they are of."""
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            known = json.loads(self.note.read_text(encoding="utf-8"))
            # A tag is sent again, as a header.
            if known["url"] == self.url and known["tag"] and known["tag"].isascii() and known["tag"].isprintable():
                return self.part.stat().st_size, known["tag"]
        return 0, ""

    def _find_tag(self, headers: Any) -> str:
        tag = headers.get("ETag", "")
        return str(
            headers.get("Last-Modified", "") if tag.startswith("W/") else tag or headers.get("Last-Modified", "")
        )

    def _read_size(self, answer: Any, have: int) -> tuple[int, int | None]:
        """Where the answer begins in the file, and the size of the whole file; None if it is not known."""
        if answer.status == http.client.PARTIAL_CONTENT:
            span = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if not have or span is None or int(span[1]) != have:
                raise DownloadError(f"{self.url}: the server sent a different part of the file than requested")
            return have, int(span[2])
        length = answer.headers.get("Content-Length", "")
        return 0, int(length) if _SIZE.fullmatch(length) else self.num_bytes

    def _check_answer(self, answer: Any, total: int | None) -> None:
        kind = answer.headers.get_content_type()
        if kind in ("text/html", "application/xhtml+xml"):
            raise DownloadError(
                f"{self.url}: the server sent a web page ({kind}) instead of the file; open the address in a browser "
                "to see why"
            )
        if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise DownloadError(f"{self.url}: the server sent compressed content, which was not requested")
        if total is not None and self.num_bytes is not None and total != self.num_bytes:
            raise DownloadError(
                f"{self.url}: the file has {total} bytes, and the list says {self.num_bytes}: this is not the "
                "listed file"
            )
        if total is not None and total > self.max_bytes:
            raise DownloadError(
                f"{self.url}: the file has {in_bytes(total)}, more than the limit of {in_bytes(self.max_bytes)}"
            )
