"""A contact sheet of edits, from their files."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mimicbrush.errors import InputError
from mimicbrush.io.images import MASK_THRESHOLD, read_image
from mimicbrush.ops.contact_sheet import SheetRow, contact_sheet, fit_cell
from mimicbrush.ops.plot import mark_mask
from mimicbrush.pipelines.editing.inputs import EditInputs
from mimicbrush.pipelines.editing.requests import Edit, number_outputs

EDIT_CELL_PX = 256


def edit_sheet(edits: Sequence[Edit], read: Callable[[Edit], EditInputs], num_images: int = 1) -> np.ndarray:
    """Make a sheet with one row per edit: source with marked mask, mask, references, and existing results.

    Args:
        edits: the edits to show; cells of images that cannot be read are empty.
        read: returns the images of an edit, as they were edited.
        num_images: number of results of each edit.

    Returns:
        (H, W, 3) uint8.
    """
    results = ["result"] if num_images == 1 else [f"result {number}" for number in range(num_images)]
    most = max((len(edit.references) for edit in edits), default=1)
    references = ["reference"] if most == 1 else [f"reference {number + 1}" for number in range(most)]
    rows = [_make_row(edit, read, num_images, most) for edit in edits]
    return contact_sheet(
        "1 edit" if len(edits) == 1 else f"{len(edits)} edits",
        ["source", "mask", *references, *results],
        rows,
        EDIT_CELL_PX,
    )


def _make_row(edit: Edit, read: Callable[[Edit], EditInputs], num_images: int, num_references: int) -> SheetRow:
    cells: list[np.ndarray | None]
    try:
        inputs = read(edit)
    except InputError:
        cells = [None] * (2 + num_references)  # the edit itself reports the error
    else:
        source, mask, *references = (
            np.asarray(image) for image in (inputs.shown_source(), inputs.mask, *inputs.references)
        )
        cells = [mark_mask(source, mask > MASK_THRESHOLD), mask, *references]
        cells += [None] * (num_references - len(references))
    for path in number_outputs(edit.output, num_images):
        try:
            cells.append(np.asarray(read_image(path, "RGB")))
        except InputError:
            cells.append(None)  # it does not exist, or is damaged
    caption = (
        f"{edit.source.name} -> {edit.output.name}   seed {edit.seed}{'   keeps the shape' if edit.keep_shape else ''}"
    )
    # Reduced here, because the large images of a hundred edits would not fit into memory.
    return SheetRow(caption, [None if cell is None else fit_cell(cell, EDIT_CELL_PX) for cell in cells])
