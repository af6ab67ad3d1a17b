from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from rendered_pairs import write_rendered_pairs

from mimicbrush.data.manifest import read_manifest
from mimicbrush.data.pair import Pair


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    """Eight landscape pairs of four sources; see `rendered_pairs`."""
    return list(read_manifest(write_rendered_pairs(tmp_path_factory.mktemp("rendered") / "pairs")))
