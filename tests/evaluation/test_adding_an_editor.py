"""The worked example in the documents."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mimicbrush.evaluation.benchmark.layout import TRACKS, Case
from mimicbrush.evaluation.editors.protocol import CaseInputs, Editor, NotApplicableError

DOCUMENT = Path(__file__).parents[2] / "docs" / "evaluation.md"


def test_the_example_edits() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, str(DOCUMENT), "exec"), names)
    editor: Editor = names["MeanColourEditor"]()
    case = Case(TRACKS["part_inter"], "001", *(Path(name) for name in ("source", "mask", "reference")))
    mask = Image.new("L", (8, 6), 100)  # below the threshold
    mask.paste(200, (2, 1, 5, 4))
    source, reference = Image.new("RGB", (8, 6), (9, 8, 7)), Image.new("RGB", (2, 1), (10, 20, 30))
    reference.putpixel((0, 0), (30, 40, 50))
    result = editor.edit_case(case, CaseInputs(source, mask, reference, False, 1)).image
    expected = np.full((6, 8, 3), (9, 8, 7), np.uint8)
    expected[1:4, 2:5] = (20, 30, 40)
    assert np.array_equal(np.asarray(result), expected)
    assert editor.about["editor"]
    with pytest.raises(NotApplicableError):
        editor.edit_case(case, CaseInputs(source, mask, reference, True, 1))
