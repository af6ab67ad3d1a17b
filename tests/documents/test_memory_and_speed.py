"""The table of docs/speed.md is what its own code prints."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "speed.md"


def test_the_code_prints_the_table() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (table,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, str(DOCUMENT), "exec"), {})
    assert printed.getvalue() == table
