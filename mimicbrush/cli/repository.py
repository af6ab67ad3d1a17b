"""Files of the repository that lie beside the package: configs, scripts, lists of data."""

from __future__ import annotations

from pathlib import Path

from mimicbrush.errors import InputError

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs"
SCRIPTS = REPOSITORY / "scripts"
DATA_MANIFESTS = REPOSITORY / "data_manifests"


def check_repository(folder: Path) -> None:
    """Check that a folder of the repository lies beside the package.

    Args:
        folder: one of the folders above.

    Raises:
        InputError: the package was installed without its repository.
    """
    if not folder.is_dir():
        raise InputError(
            f"for now this command needs the repository, and its folder {folder.name}/ is not beside this installation "
            "of mimicbrush; in a clone of the repository, install with `pip install --editable .`"
        )
