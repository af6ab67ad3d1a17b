"""A real browser for the tests of pages: the Chromium of the distribution, without a window."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser; a test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not here (the extra `dev` has it)")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser is here ({', '.join(NAMES)}); on Debian: apt-get install chromium")
    # As root, in a container, Chromium refuses to start its sandbox. Nothing but our own pages is opened.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def page_of(
    browser: Browser, width_px: int = 1100, height_px: int = 800, refusals: bool = False, **more: Any
) -> Iterator[Page]:
    """A page in a profile of its own; an error in its scripts, or a complaint of the browser, fails the test.

    With `refusals` the browser may say that an answer was a 400, or a 410 for what the server has forgotten. More
    options are those of a context of playwright.
    """
    context = browser.new_context(viewport={"width": width_px, "height": height_px}, accept_downloads=True, **more)
    try:
        page = context.new_page()
        complaints: list[str] = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.set_default_timeout(10_000)
        yield page
        assert [each for each in complaints if not (refusals and re.search("status of 4[01]0", each))] == []
    finally:
        context.close()
