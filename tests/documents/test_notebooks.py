"""The notebooks run from the first cell to the last, in a real kernel, with less to do."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[2] / "docs/notebooks"
#: What the notebook asks for, and what is enough for a test.
LESS = {"CLIPS = 14": "CLIPS = 8", "MINUTES = 2": "MINUTES = 0.1"}


@pytest.mark.slow
def test_the_first_steps_lead_from_videos_to_figures(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOKS / "first_steps.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in cells)  # a reader's own come there
    for asked, enough in LESS.items():
        assert cells[0].source.count(asked) == 1
        cells[0].source = cells[0].source.replace(asked, enough)
    NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]
    assert "8 videos in" in printed[1] and "8 inputs = 8 accepted + 0 rejected + 0 quarantined" in printed[2]
    images = ["image/png" in output.get("data", {}) for cell in cells for output in cell.outputs]
    assert sum(images) == 4  # pairs, edit, map, showcase
    rows = dict(line.split("  ", 1) for line in printed[-1].splitlines() if "dB in the hole" in line)
    assert {"model", "wrong_reference", "no_reference"} <= {name.strip() for name in rows}
