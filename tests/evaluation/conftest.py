from __future__ import annotations

from pathlib import Path

import pytest
from benchmark_material import write_dreambooth, write_images
from rendered_pairs import write_rendered_pairs

from mimicbrush.data.manifest import read_manifest
from mimicbrush.data.pair import Pair


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    """Eight landscape pairs of four sources; see `rendered_pairs`."""
    return list(read_manifest(write_rendered_pairs(tmp_path_factory.mktemp("rendered") / "pairs")))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Folders of images, one for each subject; see `benchmark_material`."""
    return write_images(tmp_path / "pictures")


@pytest.fixture
def dreambooth(tmp_path: Path) -> tuple[Path, Path]:
    """A tiny dataset in the real layout, and the list of its pairs; see `benchmark_material`."""
    write_dreambooth(tmp_path / "dreambooth", tmp_path / "pairs.jsonl")
    return tmp_path / "dreambooth", tmp_path / "pairs.jsonl"
