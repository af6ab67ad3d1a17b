"""Forks a main program for each request, from a process in which PyTorch is imported: python warm_server.py FD.

The file descriptor FD is one end of a Unix socket. See `warm_scripts`, which starts this.
"""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing.process
import os
import random
import runpy
import signal
import socket
import sys
import traceback
from typing import Any

import numpy as np

#: What nearly all of the scripts import, and names of it that are imported late. Nothing of ours: that is their own.
LIBRARIES = {
    "accelerate": (),
    "cv2": (),
    "diffusers": ("AutoencoderKL", "DDIMScheduler", "DiffusionPipeline", "UNet2DConditionModel"),
    "diffusers.guiders": (),  # with kornia: diffusers imports both for the first pipeline
    "diffusers.training_utils": ("EMAModel",),
    "hydra": (),
    "pandas": (),  # pyarrow imports it for the first table of Python objects
    "pyarrow.parquet": (),
    "skimage.metrics": (),
    "torch": (),
    "transformers": ("CLIPVisionModelWithProjection", "DepthAnythingForDepthEstimation"),
}


def import_libraries() -> None:
    """Import them; forks then go through their own objects alone for cyclic garbage, and share the memory of these."""
    gc.disable()
    for library, names in LIBRARIES.items():
        module = importlib.import_module(library)
        for name in names:
            getattr(module, name)
    gc.freeze()
    gc.enable()


def run_as_main(script: str, arguments: list[str]) -> int:
    sys.argv, sys.path[0] = [script, *arguments], os.path.dirname(os.path.abspath(script))  # noqa: PTH100, PTH120
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


def become_main(request: dict[str, Any], streams: list[int]) -> None:
    """Be what the request asks for, as if just started; does not return."""
    if request["new_session"]:
        os.setsid()
    for stream, given in enumerate(streams):
        os.dup2(given, stream)
    os.closerange(3, 1024)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    multiprocessing.process.ORIGINAL_DIR = request["cwd"]  # type: ignore[attr-defined]
    random.seed()
    np.random.seed()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    script, *arguments = request["command"]
    try:
        status = run_as_main(script, arguments)
        for thread in threads_to_join():
            thread.join()
        sys.stdout.flush()
        sys.stderr.flush()
    except KeyboardInterrupt:
        status = 130
    os._exit(status & 0xFF)


def threads_to_join() -> list[Any]:
    import atexit
    import concurrent.futures.thread
    import threading

    concurrent.futures.thread._python_exit()  # as Python does it at its end: an idle pool would never be joined
    found = [each for each in threading.enumerate() if each is not threading.current_thread() and not each.daemon]
    atexit._run_exitfuncs()
    return found


def watch(request: dict[str, Any], streams: list[int], answer: socket.socket) -> None:
    """Start the program, and tell its number, and later how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        become_main(request, streams)
    for stream in streams:
        os.close(stream)
    answer.sendall(json.dumps({"pid": child}).encode() + b"\n")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    answer.sendall(json.dumps({"status": status}).encode() + b"\n")


def main() -> None:
    requests = socket.socket(fileno=int(sys.argv[1]))
    import_libraries()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the watchers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        message, given, _, _ = socket.recv_fds(requests, 1 << 20, 4)
        if not message:
            os._exit(0)  # what was frozen would be told of as leaked
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            *streams, answer = given
            watch(json.loads(message), streams, socket.socket(fileno=answer))
            os._exit(0)
        for each in given:
            os.close(each)


if __name__ == "__main__":
    main()
