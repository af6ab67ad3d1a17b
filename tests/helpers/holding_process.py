"""A process that holds a folder until it is killed: python holding_process.py FOLDER [fork | spawn].

It prints "held" once it does. With a second argument it starts a child first, as a loader starts its workers, and
prints its number, too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from mimicbrush.errors import cli_main
from mimicbrush.io.locks import hold_folder


def main() -> None:
    with hold_folder(Path(sys.argv[1])):
        child = ""
        if "fork" in sys.argv[2:]:
            child = str(os.fork())
            if child == "0":
                time.sleep(60)
                os._exit(0)
        if "spawn" in sys.argv[2:]:
            child = str(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid)
        print("held", child, flush=True)
        time.sleep(60)


if __name__ == "__main__":
    cli_main(main)
