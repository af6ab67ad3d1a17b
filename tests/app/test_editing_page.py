"""The editing page in a real browser: images go up, a mask is painted, the edit comes back; and what must not."""

from __future__ import annotations

import io
import os
import re
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from struct import pack
from typing import TYPE_CHECKING

import numpy as np
import pytest
from browser import page_of
from PIL import Image
from started_page import started_page
from toy_data import photograph

from mimicbrush.app.editing_service import EditingService, EditRequest
from mimicbrush.app.session_files import SessionFiles, VisitorLimits
from mimicbrush.errors import InputError, speak_as
from mimicbrush.models.options import ToyModel
from mimicbrush.pipelines.editing.batch import convert_memory_errors
from mimicbrush.pipelines.editing.inputs import check_cover, fit_mask

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module")
def server(smallest: ToyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page over a toy, in a process that sees gradio; its address."""
    pytest.importorskip("playwright.sync_api", reason="playwright is not here (the extra `dev` has it)")
    with started_page(smallest, tmp_path_factory.mktemp("served"), "--max-upload-mib", "2") as page:
        yield page.address
        page.end()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("given")
    cat = Image.fromarray(photograph("chelsea.png"))
    paths = {name: folder / f"{name}.png" for name in ("source", "reference", "mask", "text", "huge", "heavy")}
    cat.crop((0, 0, 320, 240)).save(paths["source"])
    cat.crop((60, 20, 300, 220)).save(paths["reference"])
    mask = Image.new("L", (320, 240))
    mask.paste(255, (40, 60, 120, 100))
    mask.save(paths["mask"])
    paths["text"].write_text("no image at all")
    paths["huge"].write_bytes(huge_png(20_000, 10_000))
    paths["heavy"].write_bytes(os.urandom(3 * 2**20))
    return paths


def huge_png(width: int, height: int) -> bytes:
    """A grey PNG of very many pixels and few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return pack(">I", len(data)) + kind + data + pack(">I", zlib.crc32(kind + data))

    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(bytes(width + 1)) for _ in range(height)) + rows.flush()
    header = pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.fixture
def page(browser: Browser, server: str) -> Iterator[Page]:
    with opened(browser, server) as page:
        yield page


@contextmanager
def opened(browser: Browser, server: str) -> Iterator[Page]:
    """A visitor's page, ready to be used."""
    with page_of(browser, 1400, 1000, refusals=True) as page:
        page.goto(server)
        page.wait_for_selector("#mb-source [data-role=undo]", timeout=60_000)
        page.wait_for_selector("#mb-reference .painter-mask", state="attached")
        yield page


def give(page: Page, panel: str, path: Path, role: str = "picture") -> None:
    page.set_input_files(f"#mb-{panel} [data-role={role}]", path)


def said_by(page: Page, panel: str, text: str) -> None:
    page.wait_for_function(
        "([panel, text]) => document.querySelector(`#mb-${panel} [data-role=said]`).textContent.includes(text)",
        arg=[panel, text],
    )


def give_both(page: Page, images: dict[str, Path]) -> None:
    give(page, "source", images["source"])
    said_by(page, "source", "320 x 240 px")
    give(page, "reference", images["reference"])
    said_by(page, "reference", "240 x 200 px")


def paint_box(page: Page, panel: str, box: tuple[int, int, int, int]) -> None:
    """Drag from corner to corner, in pixels of the image, shown at its own size."""
    shown = page.locator(f"#mb-{panel} .painter-mask").bounding_box()
    assert shown is not None
    page.mouse.move(shown["x"] + box[0] + 0.5, shown["y"] + box[1] + 0.5)
    page.mouse.down()
    page.mouse.move(shown["x"] + box[2] - 0.5, shown["y"] + box[3] - 0.5)
    page.mouse.up()


def edit(page: Page, text: str) -> str:
    page.click("#mb-go")
    page.wait_for_function(
        "(text) => document.querySelector('#mb-said').textContent.includes(text)", arg=text, timeout=60_000
    )
    return page.inner_text("#mb-said")


def result_of(page: Page) -> np.ndarray:
    address = page.locator("#mb-result a").get_attribute("href")
    return np.asarray(Image.open(io.BytesIO(page.request.get(page.url.rstrip("/") + str(address)).body())))


@pytest.mark.slow
def test_a_painted_hole_is_filled_and_tells_where_from(page: Page, images: dict[str, Path]) -> None:
    give_both(page, images)
    page.click("#mb-source [data-role=box]")
    paint_box(page, "source", (100, 80, 180, 160))
    edit(page, "Done.")
    found, source = result_of(page), np.asarray(Image.open(images["source"]))
    changed = np.argwhere((found != source).any(axis=-1))
    assert found.shape == source.shape and len(changed)
    # Pasted back with a soft edge of a few pixels; the hole is where it was painted.
    assert (changed.min(axis=0) >= [60, 80]).all() and (changed.max(axis=0) <= [180, 200]).all()
    assert np.array_equal(np.median(changed, axis=0).round(-1), [120, 140])

    # `hover` waits until the image is loaded and stands still, which a position read once does not.
    compared = page.locator("#mb-result [data-role=compare]")
    compared.hover(position={"x": 140, "y": 120})
    page.wait_for_selector("#mb-result [data-role=ring]", state="visible")
    compared.hover(position={"x": 10, "y": 10})
    page.wait_for_selector("#mb-result [data-role=ring]", state="hidden")
    give(page, "reference", images["source"])  # another than the one that the result comes from
    said_by(page, "reference", "320 x 240 px")
    compared.hover(position={"x": 140, "y": 120})
    page.wait_for_selector("#mb-result [data-role=ring]", state="visible")
    assert page.locator("#mb-reference .mb-ring").is_hidden()
    for where, hidden in (("0", "100%"), ("30", "70%"), ("100", "0%")):  # from "before" to "after"
        page.locator("#mb-result [data-role=where]").fill(where)
        clip = page.locator("#mb-result [data-role=after]").evaluate("(image) => getComputedStyle(image).clipPath")
        assert clip.replace("0px", "0").replace("inset(0)", "inset(0 0% 0 0)").startswith(f"inset(0 {hidden} 0 0")
    assert page.inner_text("#mb-result [data-role=slide]").split() == ["before", "after"]


@pytest.mark.slow
def test_what_is_shown_belongs_to_what_is_there(page: Page, images: dict[str, Path]) -> None:
    old = page.locator("#mb-result .mb-panel.mb-old")
    give_both(page, images)
    give(page, "source", images["mask"], "mask")
    said_by(page, "source", "the mask of")
    page.get_by_label("Seed").fill("")
    page.keyboard.press("Tab")
    said = edit(page, "Done.")
    seed = re.search(r"Seed (\d+) was chosen", said)
    assert seed and page.locator("#mb-result a").get_attribute("download") == f"edited_seed{seed[1]}.png"
    assert old.count() == 0
    paint_box(page, "source", (200, 150, 220, 170))  # with the brush: another mask
    old.wait_for()
    said_by(page, "result", "other images or of another mask")
    for name in ("Steps", "Results"):
        page.get_by_label(f"number input for {name}").fill("100" if name == "Steps" else "4")
        page.keyboard.press("Tab")
    with page.expect_response(lambda answer: "queue/join" in answer.url):
        page.click("#mb-go")
    page.wait_for_selector("#mb-result .progress-bar-wrap")
    assert page.inner_text("#mb-said").strip() == ""  # nothing of the edit before stays under the bar
    bar, text = page.wait_for_function(
        """() => {
            const parts = [".progress-bar-wrap", ".progress-text"];
            const found = parts.map((each) => document.querySelector(`#mb-result ${each}`));
            const boxes = found.map((each) => each?.getBoundingClientRect());
            return found.every(Boolean) && boxes.map(({ top, bottom }) => [top, bottom]);
        }"""
    ).json_value()
    assert text[1] <= bar[0] or bar[1] <= text[0]  # the text does not lie under the bar
    page.click("#mb-stop")
    page.wait_for_function("document.querySelector('#mb-said').textContent.includes('Cancelled')", timeout=60_000)
    page.get_by_label("number input for Results").fill("1")
    page.keyboard.press("Tab")
    edit(page, "Done.")
    assert old.count() == 0 and page.inner_text("#mb-result [data-role=said]") == ""


@pytest.mark.slow
def test_everything_has_a_name_of_its_own_and_can_be_read(page: Page) -> None:
    canvases = [each.get_attribute("aria-label") for each in page.locator("canvas").all()]
    assert len(canvases) == 2 and "source" in str(canvases[0]) and "reference" in str(canvases[1])
    names = [each.get_attribute("aria-label") for each in page.locator("[data-role=picture]").all()]
    assert len(set(names)) == 2 and all(names)
    page.wait_for_selector("#mb-said[role=status][aria-live=polite]", state="attached")
    page.mouse.move(0, 0)
    colours = "(button) => [getComputedStyle(button).color, getComputedStyle(button).backgroundColor]"
    assert contrast(*page.locator("#mb-go").evaluate(colours)) >= 4.5
    page.hover("#mb-go")
    assert contrast(*page.locator("#mb-go").evaluate(colours)) >= 4.5


def contrast(*colours: str) -> float:
    """Contrast of two CSS colours, as WCAG defines it."""
    values = [np.array([float(each) for each in re.findall(r"[\d.]+", colour)[:3]]) / 255 for colour in colours]
    linear = [np.where(each <= 0.04045, each / 12.92, ((each + 0.055) / 1.055) ** 2.4) for each in values]
    dark, light = sorted(float(each @ [0.2126, 0.7152, 0.0722]) for each in linear)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.slow
def test_several_results_of_a_part_of_the_reference_with_a_mask_from_a_file(
    page: Page, images: dict[str, Path]
) -> None:
    give_both(page, images)
    give(page, "source", images["mask"], "mask")
    said_by(page, "source", "the mask of mask.png")
    paint_box(page, "reference", (10, 10, 60, 60))
    paint_box(page, "reference", (40, 30, 120, 110))  # takes the place of the first
    page.get_by_label("number input for Results").fill("3")
    page.keyboard.press("Tab")
    with page.expect_request(lambda request: "queue/join" in request.url) as joined:
        edit(page, "Done.")
    assert r"\"reference_crop\":[40,30,120,110]" in str(joined.value.post_data)
    assert page.locator("#mb-result button").count() == 3
    first = result_of(page)
    page.click("#mb-result button >> nth=2")
    assert not np.array_equal(first, result_of(page))
    assert page.locator("#mb-result a").get_attribute("download") == "edited_seed3.png"


@pytest.mark.slow
def test_further_references_are_added_used_and_removed(page: Page, images: dict[str, Path]) -> None:
    give_both(page, images)
    give(page, "source", images["mask"], "mask")
    said_by(page, "source", "the mask of mask.png")
    edit(page, "Done.")
    alone = result_of(page)
    page.click("#mb-reference summary")
    for count, name in enumerate(("source", "mask", "reference")):
        give(page, "reference", images[name], "another")
        page.wait_for_function("(n) => document.querySelectorAll('.mb-others img').length === n", arg=count + 1)
    said_by(page, "reference", "reference.png was added")
    give(page, "reference", images["source"], "another")
    said_by(page, "reference", "at most three more references")
    assert page.locator("#mb-result .mb-panel.mb-old").count() == 1
    for _ in range(2):
        page.click(".mb-others button >> nth=1")
    with page.expect_request(lambda request: "queue/join" in request.url) as joined:
        edit(page, "Done.")
    asked = re.search(r"other_references\\\":\[([^]]*)\]", str(joined.value.post_data))
    assert asked and len(asked[1].split(",")) == 1
    assert not np.array_equal(alone, result_of(page))
    # Each place of the hole is shown in one of both, in whichever it lies.
    compared, shown = page.locator("#mb-result [data-role=compare]"), set()
    for x in range(44, 120, 8):
        compared.hover(position={"x": x, "y": 80})
        page.wait_for_selector("#mb-result [data-role=ring]", state="visible")
        rings = [
            page.locator(f"{where} .mb-ring").is_visible() for where in ("#mb-reference .painter-stage", ".mb-others")
        ]
        assert sum(rings) <= 1
        shown.add(tuple(rings))
    assert (False, True) in shown or (True, False) in shown


@pytest.mark.slow
def test_what_cannot_be_edited_is_said(page: Page, images: dict[str, Path]) -> None:
    assert "choose an image to edit first" in edit(page, "Not done")
    give(page, "source", images["mask"], "mask")
    said_by(page, "source", "choose an image first")
    give(page, "source", images["huge"])
    said_by(page, "source", "at most 50 megapixels")
    give(page, "source", images["text"])
    said_by(page, "source", "no image of a format")
    give(page, "source", images["heavy"])
    said_by(page, "source", "at most 2 MiB")
    give_both(page, images)
    assert "the mask is empty" in edit(page, "mask is empty")
    give(page, "source", images["reference"], "mask")
    said_by(page, "source", "the mask is 240 x 200 px, its image 320 x 240 px")


@pytest.mark.slow
def test_an_edit_can_be_cancelled_and_the_next_one_runs(page: Page, images: dict[str, Path]) -> None:
    give_both(page, images)
    give(page, "source", images["mask"], "mask")
    said_by(page, "source", "the mask of")
    for name, value in (("Steps", "100"), ("Results", "4")):
        page.get_by_label(f"number input for {name}").fill(value)
        page.keyboard.press("Tab")
    with page.expect_response(lambda answer: "queue/join" in answer.url):
        page.click("#mb-go")
    page.click("#mb-stop")
    page.wait_for_function("document.querySelector('#mb-said').textContent.includes('Cancelled')", timeout=60_000)
    page.get_by_label("number input for Results").fill("1")
    page.keyboard.press("Tab")
    edit(page, "Done.")


@pytest.mark.slow
def test_two_visitors_at_once_see_their_own_images_alone(
    browser: Browser, server: str, images: dict[str, Path]
) -> None:
    with opened(browser, server) as ann, opened(browser, server) as bob:
        for visitor in (ann, bob):
            give_both(visitor, images)
            give(visitor, "source", images["mask"], "mask")
            said_by(visitor, "source", "the mask of")
        ann.click("#mb-go")
        edit(bob, "Done.")
        ann.wait_for_function("document.querySelector('#mb-said').textContent.includes('Done')", timeout=60_000)
        assert np.array_equal(result_of(ann), result_of(bob))  # the same images, model and seed
        address = server.rstrip("/") + str(ann.locator("#mb-result a").get_attribute("href"))
        assert ann.request.get(address).status == 200
        assert bob.request.get(address).status == 400
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(address)


@pytest.mark.slow
def test_other_sites_and_other_names_are_refused(server: str) -> None:
    rebound = urllib.request.Request(server, headers={"Host": "evil.example"})
    without_cookie = urllib.request.Request(server + "upload", data=b"a")
    for request, status in ((rebound, "403"), (without_cookie, "400")):
        with pytest.raises(urllib.error.HTTPError, match=status):
            urllib.request.urlopen(request)
    asked = urllib.request.Request(server + "gradio_api/queue/join", data=b"{}", headers={"Cookie": "other=1"})
    cookie = {"Cookie": f"mimicbrush_visitor={'a' * 24}", "Content-Type": "application/json"}
    large = urllib.request.Request(server + "gradio_api/queue/join", data=bytes(2**17), headers=cookie)
    for request, status in ((asked, "400"), (large, "413")):
        with pytest.raises(urllib.error.HTTPError, match=status):
            urllib.request.urlopen(request)
    for way in ("upload", "run/run", "api/run", "call/run", "call/v2/run", "cancel", "reset", "component_server"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(urllib.request.Request(server + "gradio_api/" + way, data=b"{}", headers=cookie))
    for path in (
        "page/../painter.py",
        "page/secret",
        "gradio_api/file=/etc/hostname",
        "examples/9/source",
        "examples/0/title",
    ):
        with pytest.raises(urllib.error.HTTPError, match=r"40[34]"):
            urllib.request.urlopen(server + path)


def test_a_flood_of_cancels_leaves_those_of_others(tmp_path: Path) -> None:
    page = EditingService(None, "", SessionFiles(tmp_path / "visits", VisitorLimits()), None)  # type: ignore[arg-type]  # nothing is edited
    page.cancel("ann", "mine")
    for number in range(3000):
        page.cancel("bob", str(number))
    assert ("ann", "mine") in page._cancelled and ("bob", "2999") in page._cancelled
    assert len(page._cancelled) == 11


CHOICES = {"steps": 3, "guidance": 2.0, "seed": 1, "count": 1, "keep_shape": False, "crop": "whole image"}


@pytest.mark.parametrize(
    ("text", "changed", "message"),
    [
        ("{", {}, "not what the page sends"),
        ("[]", {}, "not what the page sends"),
        ("{}", {}, "choose an image to edit first"),
        ('{"source": "a"}', {}, "choose a reference to imitate first"),
        ('{"trouble": "no network"}', {}, "no network"),
        ('{"source": "a", "reference": "b"}', {"steps": 101}, "steps: must be in 1..100, got 101"),
        ('{"source": "a", "reference": "b"}', {"count": 0}, "results: must be in 1..4, got 0"),
        ('{"source": "a", "reference": "b"}', {"seed": float("inf")}, "not what the page sends"),
        ('{"source": "a", "reference": "b"}', {"steps": 1e400}, "not what the page sends"),
        ("[" * 100_000, {}, "not what the page sends"),
        ('{"source": "a", "reference": "b"}', {"guidance": float("nan")}, "guidance"),
        ('{"source": "a", "reference": "b", "reference_crop": [1, 2]}', {}, "four whole numbers"),
        ('{"source": "a", "reference": "b", "other_references": ["c", "d", "e", "f"]}', {}, "references"),
        ('{"source": "a", "reference": "b", "other_references": 5}', {}, "not what the page sends"),
    ],
)
def test_what_the_browser_sends_is_checked(text: str, changed: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EditRequest.read(text, VisitorLimits(), **{**CHOICES, **changed})  # type: ignore[arg-type]


def test_no_seed_is_another_one_each_time() -> None:
    read = [
        EditRequest.read('{"source": "a", "reference": "b"}', VisitorLimits(), **{**CHOICES, "seed": None})  # type: ignore[arg-type]
        for _ in range(5)
    ]
    assert len({each.seed for each in read}) > 1


def collect_messages() -> list[str]:
    mask, path = Image.new("L", (40, 30), 255), Path("the mask")
    messages = []
    with pytest.raises(InputError) as error, convert_memory_errors():
        raise MemoryError
    messages.append(str(error.value))
    for size in ((80, 60), (30, 40), (41, 31), (40, 90)):
        with pytest.raises(InputError) as error:
            fit_mask(mask, path, size, Path("the source"), False)
        messages.append(str(error.value))
    with pytest.raises(InputError) as error:
        check_cover(mask, path, False)
    return [*messages, str(error.value)]


def test_no_message_of_the_page_names_an_option_of_a_command() -> None:
    with speak_as("command"):
        assert all("--" in message for message in collect_messages())
    with speak_as("page"):
        told = collect_messages()
    assert not [message for message in told if "--" in message or "=" in message]
    assert told[0] == 'not enough memory for this edit: try Repaint: "around the mask", or a smaller image'
    assert told[1].endswith("a mask must have its source's size (paint it here, or upload one of that size)")
    assert "is it turned?" in told[2]
    assert told[5].endswith("white means repaint: is it inverted? (leave a part unpainted)")
