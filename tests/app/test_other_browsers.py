"""The main path of the editing page in Firefox and in WebKit, which are not everywhere: see `other_browsers`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import other_browsers
import pytest
from other_browsers import Driver, drag, point, press, wait
from started_page import StartedPage, started_page

from mimicbrush.models.options import ToyModel

CONTROL, SHIFT, RIGHT, ENTER = "\ue009", "\ue008", "\ue014", "\ue007"
GIVE = """(async () => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([await (await fetch("/examples/0/%s")).blob()], "given.png", { type: "image/png" }));
    const input = document.querySelector("#%s [data-role=picture]");
    input.files = transfer.files;
    input.dispatchEvent(new Event("change"));
})()"""


@pytest.fixture(scope="module")
def started(smallest: ToyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartedPage]:
    with started_page(smallest, tmp_path_factory.mktemp("served")) as page:
        yield page
        page.end()


@pytest.fixture(params=["firefox", "webkit"])
def driver(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Driver]:
    with getattr(other_browsers, request.param)(tmp_path) as found:
        yield found


def place_of(driver: Driver, selector: str, x: float = 0.5, y: float = 0.5) -> tuple[float, float]:
    """A place of an element, as parts of its width and height, in the window."""
    script = f"document.querySelector({selector!r}).getBoundingClientRect().toJSON()"
    box = driver.run(script)
    return box["x"] + x * box["width"], box["y"] + y * box["height"]


def click(driver: Driver, selector: str) -> None:
    drag(driver, place_of(driver, selector))


def is_true(driver: Driver, selector: str, what: str) -> bool:
    return bool(driver.run(f"Boolean(document.querySelector({selector!r}).{what})"))


@pytest.mark.slow
def test_the_main_path(driver: Driver, started: StartedPage) -> None:
    driver.resize(1400, 1000)
    driver.go(started.address)
    wait(driver, "document.body.dataset.state === 'ready'")
    for panel in ("source", "reference"):
        driver.run(GIVE % (panel, panel))
        wait(driver, f"document.querySelector('#{panel} [data-role=said]').textContent.includes('320 x 240 px')")

    # Paint, undo, redo, and zoom.
    click(driver, "#source [data-role=box]")
    image, undo = "#source .view-content img", "#source [data-role=undo]"
    assert is_true(driver, undo, "disabled")
    drag(driver, place_of(driver, image, 0.3, 0.3), place_of(driver, image, 0.6, 0.6))
    assert not is_true(driver, undo, "disabled")
    press(driver, CONTROL, "z")
    assert is_true(driver, undo, "disabled")
    press(driver, CONTROL, SHIFT, "z")
    assert not is_true(driver, undo, "disabled")
    before = driver.run(f"document.querySelector('{image}').getBoundingClientRect().width")
    press(driver, "+")
    assert driver.run(f"document.querySelector('{image}').getBoundingClientRect().width") > 1.2 * before
    press(driver, "0")

    # Edit, and see where the result comes from.
    press(driver, CONTROL, ENTER)
    wait(driver, "document.querySelector('#said').textContent.startsWith('Done.')")
    wait(driver, "document.querySelector('#result [data-role=after]').complete")
    point(driver, *place_of(driver, "#result .view-content img", 0.45, 0.45))
    wait(driver, "!document.querySelector('#reference .heat').hidden")
    assert not is_true(driver, "#result .ring", "hidden")

    # All of it is there again after a reload.
    wait(driver, "import('/page/store.js').then((store) => store.isAllKept())")
    driver.go(started.address)
    wait(driver, "document.body.dataset.state === 'ready'")
    assert driver.run("document.querySelectorAll('#result [data-role=history] button').length") == 1
    assert not is_true(driver, "#result.panel", "classList.contains('is-old')")
    assert not is_true(driver, undo, "disabled")
    point(driver, 1, 1)  # a mouse that stays where it is says nothing
    point(driver, *place_of(driver, "#result .view-content img", 0.45, 0.45))
    wait(driver, "!document.querySelector('#reference .heat').hidden")

    # By keyboard alone, and as narrow as a phone (WebKitGTK's window is never below 450 px).
    driver.run("document.querySelector('#result [data-role=stage]').focus()")
    press(driver, RIGHT)
    wait(driver, "document.querySelector('#result [data-role=said]').textContent.startsWith('The place')")
    driver.run("document.querySelector('#source .painter-mask').focus()")
    press(driver, RIGHT)
    press(driver, " ")
    press(driver, RIGHT)
    press(driver, " ")
    wait(driver, "document.querySelector('#result').classList.contains('is-old')")
    driver.resize(390, 844)
    wait(driver, "innerWidth < 460")
    assert driver.run("document.documentElement.scrollWidth <= innerWidth")
    press(driver, CONTROL, ENTER)
    wait(driver, "!document.querySelector('#result').classList.contains('is-old')")
    wait(driver, "document.querySelectorAll('#result [data-role=history] button').length === 2")
    top, bottom = driver.run(
        "[document.querySelector('#result [data-role=stage]'), document.querySelector('footer')]"
        ".map((each) => each.getBoundingClientRect().y)"
    )
    assert 0 <= top < bottom  # the page has scrolled to the result
