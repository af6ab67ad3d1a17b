"""Files that belong to the commands: configs, and lists of data.

In the repository they stand beside the package. An installed package holds a copy of them (pyproject.toml).
"""

from __future__ import annotations

from pathlib import Path


def _find_folder(name: str) -> Path:
    """Find the copy in the package, where there is one: a folder of that name beside it may be somebody else's."""
    package = Path(__file__).parents[1]
    copied = package / name
    return copied if copied.is_dir() else package.parent / name


CONFIGS = _find_folder("configs")
DATA_MANIFESTS = _find_folder("data_manifests")
