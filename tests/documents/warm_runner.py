"""Runs our scripts one after the other without importing PyTorch anew for each: python warm_runner.py FOLDER.

One command a line comes in, as a JSON list; what it printed and its status go out likewise. Each runs in a fork of this
process, as its own main program, in FOLDER.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import tempfile
import traceback
from pathlib import Path

# What nearly all of them import.
import diffusers  # noqa: F401
import hydra  # noqa: F401
import torch  # noqa: F401

import mimicbrush.pipelines  # noqa: F401


def run_as_main(script: str, arguments: list[str]) -> int:
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).resolve().parent)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - it is a main program
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    os.chdir(sys.argv[1])
    for line in sys.stdin:
        script, *arguments = json.loads(line)
        with tempfile.TemporaryFile() as output:
            child = os.fork()
            if child == 0:
                for stream in (sys.stdout, sys.stderr):
                    os.dup2(output.fileno(), stream.fileno())
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                status = run_as_main(script, arguments)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            output.seek(0)
            print(json.dumps([status, output.read().decode(errors="replace")]), flush=True)


if __name__ == "__main__":
    main()
