"""Whole maps of where masked places looked: what they sum to, and where they lie."""

from __future__ import annotations

import numpy as np
import pytest

from mimicbrush.ops import reference_maps
from mimicbrush.ops.correspondence import Correspondence
from mimicbrush.ops.crops import Placement
from mimicbrush.ops.reference_maps import ReferenceMaps


def test_maps_are_pooled_to_their_limit_and_keep_every_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, places = np.random.default_rng(0), [Placement((0, 0, 8, 8), 8), Placement((4, 2, 20, 10), 8)]
    attention, peaks = rng.uniform(size=(2, 3, 16, 8)).astype(np.float32)
    whole = ReferenceMaps.pool(attention, peaks, places)
    assert whole.attention.shape == (3, 2, 8, 8) and np.array_equal(whole.attention[:, 1], attention[:, 8:])
    monkeypatch.setattr(reference_maps, "MOST_CELLS", 3 * 2 * 4 * 4 + 1)
    pooled = ReferenceMaps.pool(attention, peaks, places)
    assert pooled.head_peaks.shape == (3, 2, 4, 4)
    np.testing.assert_allclose(pooled.attention[2, 1, 3, 0], attention[2, 14:16, :2].sum(), rtol=1e-6)
    np.testing.assert_allclose(pooled.head_peaks.sum(axis=(1, 2, 3)), peaks.sum(axis=(1, 2)), rtol=1e-5)
    # The second reference is half as high as wide: its canvas has padding above and below.
    assert pooled.boxes.tolist() == [[0, 0, 8, 8], [4, -2, 20, 14]]


def test_the_peak_of_a_map_is_the_place_that_is_told() -> None:
    n, place = 8, Placement((10, 20, 90, 100), 16)
    attention = np.full((2, n, n), 1e-3, np.float32)
    attention[0, 2, 5] = attention[1, 6, 1] = 0.5
    found = Correspondence.from_attention(np.array([9, 10]), attention, place, place, head_peaks=attention)
    assert found.maps is not None
    left, top, right, _ = found.maps.boxes[0]
    rows, columns = np.divmod(found.maps.attention[:, 0].reshape(2, -1).argmax(axis=1), n)
    cell_px = (right - left) / n
    told = np.stack([left + (columns + 0.5) * cell_px, top + (rows + 0.5) * cell_px], axis=1)
    np.testing.assert_allclose(told, found.reference_xy, atol=0.1)
    selected = found.select_reference(0)
    assert selected.maps is not None and np.array_equal(selected.maps.attention, found.maps.attention)
    assert Correspondence.from_attention(np.array([9, 10]), attention, place, place).maps is None
