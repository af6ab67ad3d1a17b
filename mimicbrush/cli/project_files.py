"""Files that belong to the commands: configs, and lists of data.

In the repository, they are next to the package. An installed package has a copy of them (pyproject.toml).
"""

from __future__ import annotations

from pathlib import Path


def _find_folder(name: str) -> Path:
    """Find the copy in the package if there is one: a folder of that name next to it may belong to something else."""
    package = Path(__file__).parents[1]
    copied = package / name
    return copied if copied.is_dir() else package.parent / name


CONFIGS = _find_folder("configs")
DATA_MANIFESTS = _find_folder("data_manifests")


def explain_options(config: str) -> str:
    """Return the options of a config file with their comments, for ``--help``. Hydra's own help takes seconds.

    Args:
        config: name of a file in `CONFIGS`. Its options are between the comment at its head and its defaults list.
    """
    text = (CONFIGS / config).read_text(encoding="utf-8")
    return text.partition("\n\n")[2].partition("\ndefaults:")[0].strip()
