from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from rendered_pairs import write_rendered_pairs

from mimicbrush.data.manifest import Pair, read_manifest


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    """Eight landscape pairs of four sources; see `rendered_pairs`."""
    return read_manifest(write_rendered_pairs(tmp_path_factory.mktemp("rendered") / "pairs"))
