"""Firefox and WebKit without a window, as far as the distribution has them: `firefox` and `webkit`.

Firefox is driven with WebDriver BiDi, which it speaks by itself, and WebKitGTK with its WebDriver. Both know the same
input actions, so that one test walks through both.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import pytest

_WAIT_S = 60


class Driver(Protocol):
    """A browser with one page."""

    def go(self, address: str) -> None:
        """Open an address, or load it again."""

    def run(self, script: str) -> Any:
        """The value of an expression of JavaScript, which may be a promise."""

    def act(self, *sources: dict[str, Any]) -> None:
        """Input actions, as both standards write them."""

    def resize(self, width_px: int, height_px: int) -> None:
        """Make the page so large, or nearly so."""

    def screenshot(self, path: Path) -> None:
        """Write what is seen as a PNG."""


def wait(driver: Driver, condition: str) -> None:
    """Wait until an expression is true."""
    end = time.monotonic() + _WAIT_S
    while not driver.run(f"Boolean({condition})"):
        assert time.monotonic() < end, (
            condition,
            driver.run("[...document.querySelectorAll('.said, #left')].map((each) => each.textContent)"),
        )
        time.sleep(0.1)


def drag(driver: Driver, *points: tuple[float, float], kind: str = "mouse") -> None:
    """Press at the first of some points of the window, move along the others, and let go at the last."""
    moves = [{"type": "pointerMove", "x": round(x), "y": round(y), "duration": 30} for x, y in points]
    buttons = [{"type": f"pointer{way}", "button": 0} for way in ("Down", "Up")]
    actions = [moves[0], buttons[0], *moves[1:], buttons[1]]
    driver.act({"type": "pointer", "id": kind, "parameters": {"pointerType": kind}, "actions": actions})


def point(driver: Driver, x: float, y: float) -> None:
    """Move the mouse."""
    move = {"type": "pointerMove", "x": round(x), "y": round(y), "duration": 0}
    driver.act({"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": [move]})


def press(driver: Driver, *keys: str) -> None:
    """Press keys together, the last one after the others; special ones by their code points."""
    down, up = ([{"type": f"key{way}", "value": each} for each in keys] for way in ("Down", "Up"))
    driver.act({"type": "key", "id": "keys", "actions": [*down, *reversed(up)]})


class _Firefox:
    def __init__(self, connection: Any) -> None:
        self._connection, self._number = connection, 0
        self._ask("session.new", capabilities={})
        self._context = self._ask("browsingContext.getTree")["contexts"][0]["context"]

    def _ask(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        self._connection.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._connection.recv(timeout=_WAIT_S))
            if answer.get("id") == self._number:
                assert answer["type"] == "success", answer
                return answer["result"]

    def go(self, address: str) -> None:
        self._ask("browsingContext.navigate", context=self._context, url=address, wait="complete")

    def run(self, script: str) -> Any:
        expression = f"(async () => JSON.stringify((await ({script})) ?? null))()"
        answer = self._ask(
            "script.evaluate", expression=expression, target={"context": self._context}, awaitPromise=True
        )
        assert answer["type"] == "success", answer
        return json.loads(answer["result"]["value"])

    def act(self, *sources: dict[str, Any]) -> None:
        self._ask("input.performActions", context=self._context, actions=list(sources))

    def resize(self, width_px: int, height_px: int) -> None:
        size = {"width": width_px, "height": height_px}
        self._ask("browsingContext.setViewport", context=self._context, viewport=size)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(
            base64.b64decode(self._ask("browsingContext.captureScreenshot", context=self._context)["data"])
        )


class _WebKit:
    def __init__(self, address: str, binary: str) -> None:
        options = {"binary": binary, "args": ["--automation"]}
        wanted = {"capabilities": {"alwaysMatch": {"webkitgtk:browserOptions": options}}}
        self._address = address
        self._address = f"{address}/{self._ask('POST', '', wanted)['sessionId']}"

    def _ask(self, method: str, way: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._address}{way}", data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=_WAIT_S) as answer:
                return json.loads(answer.read())["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error

    def go(self, address: str) -> None:
        self._ask("POST", "/url", {"url": address})

    def run(self, script: str) -> Any:
        inner = f"(async () => JSON.stringify((await ({script})) ?? null))()"
        body = f"const end = arguments[0]; {inner}.then(end, (error) => end(JSON.stringify({{ error: `${{error}}` }})))"
        value = json.loads(self._ask("POST", "/execute/async", {"script": body, "args": []}))
        assert not (isinstance(value, dict) and "error" in value), value
        return value

    def act(self, *sources: dict[str, Any]) -> None:
        self._ask("POST", "/actions", {"actions": list(sources)})

    def resize(self, width_px: int, height_px: int) -> None:
        self._ask("POST", "/window/rect", {"width": width_px, "height": height_px})

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))

    def close(self) -> None:
        self._ask("DELETE", "")


@contextmanager
def firefox(folder: Path) -> Iterator[Driver]:
    """Firefox with a new profile in this folder; a test is skipped where there is none."""
    client = pytest.importorskip("websockets.sync.client", reason="the package websockets is not here")
    path = shutil.which("firefox-esr") or shutil.which("firefox")
    if path is None:
        pytest.skip("Firefox is not here; on Debian: apt-get install firefox-esr")
    (folder / "profile").mkdir()
    command = [path, "--headless", "--remote-debugging-port", "0", "--profile", str(folder / "profile")]
    environment = {**os.environ, "HOME": str(folder)}
    with _process(command, environment) as (process, log):
        address = _find_in_log(process, log, r"(ws://\S+)")
        with client.connect(f"{address}/session", max_size=None) as connection:
            yield _Firefox(connection)


@contextmanager
def webkit(folder: Path) -> Iterator[Driver]:
    """WebKitGTK on a screen of its own; a test is skipped where it, or the screen, is not there."""
    if absent := [name for name in ("WebKitWebDriver", "Xvfb") if shutil.which(name) is None]:
        pytest.skip(f"{absent[0]} is not here; on Debian: apt-get install webkit2gtk-driver xvfb")
    binaries = sorted(Path("/usr").glob("lib*/**/webkit2gtk-4*/MiniBrowser"))
    if not binaries:
        pytest.skip("WebKitGTK's MiniBrowser is not here")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "HOME": str(folder), "GDK_BACKEND": "x11", "LIBGL_ALWAYS_SOFTWARE": "1"}
    with _process(["Xvfb", "-displayfd", "1", "-screen", "0", "1600x1200x24"], environment) as (screen, log):
        environment["DISPLAY"] = ":" + _find_in_log(screen, log, r"^(\d+)\n")
        with _process(["WebKitWebDriver", f"--port={port}"], environment) as (process, _):
            _wait_for_port(process, port)
            driver = _WebKit(f"http://127.0.0.1:{port}/session", str(binaries[0]))
            try:
                yield driver
            finally:
                with suppress(OSError, AssertionError):
                    driver.close()


@contextmanager
def _process(command: list[str], environment: dict[str, str]) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A process that ends with the test, and the file that has what it prints."""
    log = Path(environment["HOME"]) / f"{Path(command[0]).name}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process, log
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _find_in_log(process: subprocess.Popen[bytes], log: Path, pattern: str) -> str:
    end = time.monotonic() + _WAIT_S
    while not (found := re.search(pattern, log.read_text(errors="replace"), re.M)):
        assert process.poll() is None and time.monotonic() < end, log.read_text(errors="replace")
        time.sleep(0.1)
    return found[1]


def _wait_for_port(process: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + _WAIT_S
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
