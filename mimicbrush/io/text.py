"""Text from untrusted files: made safe to store and print, and read as JSON."""

from __future__ import annotations

import json
from typing import Any

from mimicbrush.errors import MimicBrushError

#: Characters of a refusal's detail that are kept. Longer text is cut in the middle.
MAX_DETAIL = 500


def make_storable(text: str, limit: int = MAX_DETAIL) -> str:
    r"""Return text that is safe for any file format and terminal: valid Unicode, one line, of limited length.

    Args:
        text: anything: a file's name with bytes that are not UTF-8, a library's message that quotes a whole file.
        limit: characters to keep, at least 3.

    Returns:
        The text, with escapes (`\x00`, `\udcff`) instead of unprintable characters, and "..." where it was cut.
    """
    if len(text) > 2 * limit:  # before the escapes, or a text of gigabytes is copied character by character
        text = text[:limit] + text[-limit:]
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(text) <= limit:
        return text
    head = (limit - 2) // 2
    return f"{text[:head]}...{text[len(text) - (limit - 3 - head) :]}"


def describe_error(error: BaseException, limit: int = 2 * MAX_DETAIL) -> str:
    """Describe an error in one line: its text, with its type unless the text is ours.

    Args:
        error: of any library; its text may be of any kind, and making it may itself fail.
        limit: characters of the text to keep.
    """
    try:
        text = make_storable(str(error).strip(), limit)
    except Exception:  # noqa: BLE001 - a number of 5000 digits, text that quotes itself
        text = ""
    return text if isinstance(error, MimicBrushError) else f"{type(error).__name__}: {text}".removesuffix(": ")


def parse_json(text: str | bytes) -> Any:
    """Read untrusted JSON.

    Raises:
        ValueError: it is no JSON, or nests too deep to be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def in_bytes(count: float) -> str:
    """Write a number of bytes for users: 1234567 -> 1.23 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
