from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

DEMO = Path(__file__).parents[2] / "scripts" / "demo.py"


def test_the_demo_never_empties_a_folder_that_is_not_its_own(
    tmp_path: Path, script_environment: Callable[[], dict[str, str]]
) -> None:
    precious = tmp_path / "work" / "precious.txt"
    precious.parent.mkdir()
    precious.write_text("mine")
    for folder, message in ((precious.parent, "not made by this demo"), (precious, "is a file")):
        command = [sys.executable, str(DEMO), "--output", str(folder)]
        done = subprocess.run(command, env=script_environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert precious.read_text() == "mine"
