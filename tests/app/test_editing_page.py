"""The editing page in a real browser: images go up, a mask is painted, the edit comes back; and what must not."""

from __future__ import annotations

import io
import json
import os
import re
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from struct import pack
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
from browser import page_of
from PIL import Image
from started_page import StartedPage, started_page
from toy_data import photograph

from mimicbrush.app.editing_service import EditRequest
from mimicbrush.app.gate import COOKIE
from mimicbrush.app.session_files import VisitorLimits
from mimicbrush.errors import InputError, speak_as
from mimicbrush.io.images import read_image
from mimicbrush.models.options import ToyModel
from mimicbrush.pipelines import MimicBrushPipeline
from mimicbrush.pipelines.editing.batch import convert_memory_errors
from mimicbrush.pipelines.editing.inputs import check_cover, fit_mask
from mimicbrush.pipelines.open_pipeline import seeded_generator

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module")
def started(smallest: ToyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartedPage]:
    """The page over a toy, in a process of its own."""
    pytest.importorskip("playwright.sync_api", reason="playwright is not here (the extra `dev` has it)")
    with started_page(smallest, tmp_path_factory.mktemp("served"), "--max-upload-mib", "2") as page:
        yield page
        page.end()


@pytest.fixture(scope="module")
def server(started: StartedPage) -> str:
    """The address of the page."""
    return started.address


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
def opened(browser: Browser, server: str, width_px: int = 1400, height_px: int = 1000, **more: Any) -> Iterator[Page]:
    """A visitor's page, ready to be used."""
    with page_of(browser, width_px, height_px, refusals=True, **more) as page:
        page.on("dialog", lambda dialog: dialog.accept())
        load(page, server)
        yield page


def load(page: Page, address: str | None = None) -> None:
    if address is None:
        page.reload()
    else:
        page.goto(address)
    page.wait_for_selector("body[data-state=ready]", timeout=60_000)


def give(page: Page, panel: str, path: Path, role: str = "picture") -> None:
    page.set_input_files(f"#{panel} [data-role={role}]", path)


def said_by(page: Page, panel: str, text: str) -> None:
    page.wait_for_selector(f"#{panel} [data-role=said]:has-text('{text}')")


def give_both(page: Page, images: dict[str, Path]) -> None:
    give(page, "source", images["source"])
    said_by(page, "source", "320 x 240 px")
    give(page, "reference", images["reference"])
    said_by(page, "reference", "240 x 200 px")


def give_all(page: Page, images: dict[str, Path]) -> None:
    give_both(page, images)
    give(page, "source", images["mask"], "mask")
    said_by(page, "source", "loaded from mask.png")


def on_screen(page: Page, panel: str, x: float, y: float) -> tuple[float, float]:
    """Pixels of the image -> where the mouse must go."""
    image = page.locator(f"#{panel} .view-content img").first
    box, width = image.bounding_box(), image.evaluate("(image) => image.naturalWidth")
    assert box is not None
    return box["x"] + x * box["width"] / width, box["y"] + y * box["width"] / width


def drag(page: Page, panel: str, *points: tuple[float, float], button: Literal["left", "middle"] = "left") -> None:
    """Along points in pixels of the image."""
    page.mouse.move(*on_screen(page, panel, *points[0]))
    page.mouse.down(button=button)
    for point in points[1:]:
        page.mouse.move(*on_screen(page, panel, *point))
    page.mouse.up(button=button)


def paint_box(page: Page, panel: str, box: tuple[int, int, int, int]) -> None:
    """Drag from corner to corner, in pixels of the image."""
    drag(page, panel, (box[0] + 0.5, box[1] + 0.5), (box[2] - 0.5, box[3] - 0.5))


def choose(page: Page, **values: str | bool) -> None:
    """Choose settings, by the names that the page gives them."""
    for name, value in values.items():
        page.locator("#settings").evaluate("(settings) => { settings.open = true; }")
        control = page.locator(f"#settings [name={name}]")
        control.set_checked(value) if isinstance(value, bool) else control.fill(value)


def wait_until_said(page: Page, text: str) -> str:
    page.wait_for_selector(f"#said:has-text('{text}')", timeout=60_000)
    return page.inner_text("#said")


def edit(page: Page, text: str) -> str:
    page.click("#go")
    return wait_until_said(page, text)


def begin_edit(page: Page) -> dict[str, Any]:
    """Begin one; what the page asked for."""
    with page.expect_response(lambda answer: answer.url.endswith("/edit")) as answered:
        page.click("#go")
    assert answered.value.status == 200
    return dict(json.loads(str(answered.value.request.post_data)))


def result_of(page: Page) -> np.ndarray:
    with page.expect_download() as started:
        page.click("#result [data-role=download]")
    return np.asarray(Image.open(started.value.path()).convert("RGB"))


def mask_of(page: Page) -> np.ndarray:
    """The mask that an edit sends, (H, W) bool."""
    sent = begin_edit(page)["mask"]
    page.wait_for_selector("#go:enabled", timeout=60_000)  # also where it is too thin for the toy
    stored = page.request.get(f"{page.url}files/{sent}")  # as it came
    return np.asarray(Image.open(io.BytesIO(stored.body())).convert("L")) > 0


@pytest.mark.slow
def test_a_painted_hole_is_filled_and_tells_where_from(page: Page, images: dict[str, Path]) -> None:
    give_both(page, images)
    page.click("#source [data-role=box]")
    paint_box(page, "source", (100, 80, 180, 160))
    edit(page, "Done.")
    found, source = result_of(page), np.asarray(Image.open(images["source"]))
    changed = np.argwhere((found != source).any(axis=-1))
    assert found.shape == source.shape and len(changed)
    # Pasted back with a soft edge of a few pixels; the hole is where it was painted.
    assert (changed.min(axis=0) >= [60, 80]).all() and (changed.max(axis=0) <= [180, 200]).all()
    assert np.array_equal(np.median(changed, axis=0).round(-1), [120, 140])

    ring, line = page.locator("#result .ring"), page.locator("#line")
    page.mouse.move(*on_screen(page, "result", 140, 120))
    ring.wait_for(state="visible")
    if page.locator("#reference .ring").is_visible():  # it looked at no padding
        assert line.is_visible()
    page.mouse.move(*on_screen(page, "result", 10, 10))
    ring.wait_for(state="hidden")
    assert line.is_hidden() and page.locator("#reference .ring").is_hidden()
    page.locator("#result [data-role=stage]").press("ArrowRight")  # the keyboard tells it, too
    said_by(page, "result", "in the reference")
    page.click("#result [data-role=heat]")
    page.mouse.move(0, 0)
    assert page.locator("#reference .heat").is_visible()  # of the whole hole
    give(page, "reference", images["source"])  # another than the one that the result comes from
    said_by(page, "reference", "320 x 240 px")
    page.mouse.move(*on_screen(page, "result", 140, 120))
    ring.wait_for(state="visible")
    assert page.locator("#reference .ring").is_hidden() and line.is_hidden()
    assert page.locator("#reference .heat").is_hidden()


PEAK = """(canvas) => {
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    let most = 0;
    for (let n = 3; n < data.length; n += 4) if (data[n] > data[4 * most + 3]) most = (n - 3) / 4;
    return [(most % canvas.width + 0.5) / canvas.width, (Math.floor(most / canvas.width) + 0.5) / canvas.height];
}"""


@pytest.mark.slow
def test_each_place_has_a_map_of_where_the_pipeline_says_it_looked(
    page: Page, images: dict[str, Path], started: StartedPage, tmp_path: Path
) -> None:
    square = tmp_path / "square.png"  # on a canvas without padding, which an untrained model likes to look at
    Image.open(images["reference"]).crop((0, 0, 200, 200)).save(square)
    give_all(page, images)
    give(page, "reference", square)
    said_by(page, "reference", "200 x 200 px")
    edit(page, "Done.")
    pipeline = MimicBrushPipeline.from_pretrained(started.temporary.parent / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    source, mask, reference = (read_image(path, "RGB") for path in (images["source"], images["mask"], square))
    result = pipeline(
        source, mask.convert("L"), reference, generator=seeded_generator(1), return_correspondence=True
    )  # the page begins with the pipeline's steps and guidance, and with seed 1
    (found,) = result.correspondences
    maps = found.maps
    assert maps is not None and maps.attention.shape[1:] == (1, 8, 8)
    left, top, right, _ = maps.boxes[0]
    rows, columns = np.divmod(maps.attention[:, 0].reshape(-1, 64).argmax(axis=1), 8)
    peaks = np.stack([left + (columns + 0.5) * (right - left) / 8, top + (rows + 0.5) * (right - left) / 8], axis=1)
    first, second = 0, int(np.flatnonzero((peaks != peaks[0]).any(axis=1))[0])
    heat, seen = page.locator("#reference .heat"), []
    for place in (first, second):
        page.mouse.move(*on_screen(page, "result", *found.source_xy[place].tolist()))
        heat.wait_for(state="visible")
        np.testing.assert_allclose(np.array(heat.evaluate(PEAK)) * 200, peaks[place], atol=(right - left) / 16)
        seen.append(heat.evaluate("(canvas) => canvas.toDataURL()"))
        style = page.locator("#reference .ring").get_attribute("style")
        ring = [float(each) for each in re.findall(r"(?:left|top): (-?[\d.]+)px", str(style))]
        np.testing.assert_allclose(ring, found.reference_xy[place], atol=0.06)
    assert seen[0] != seen[1]
    page.click("#result [data-role=heads]")
    page.mouse.move(*on_screen(page, "result", *found.source_xy[second].tolist()))
    heat.wait_for(state="visible")
    assert heat.evaluate("(canvas) => canvas.toDataURL()") not in seen
    page.mouse.move(0, 0)
    heat.wait_for(state="hidden")

    # By keyboard, a sentence: where, and how many of the heads agree.
    page.locator("#result [data-role=stage]").press("ArrowRight")
    said_by(page, "result", "agree")
    said = re.search(r"The place at (\d+), (\d+) .* (\d+) % of", page.inner_text("#result [data-role=said]"))
    assert said is not None
    place = int(np.abs(found.source_xy - [float(said[1]), float(said[2])]).sum(axis=1).argmin())
    near = (np.abs(np.arange(8) - rows[place]) <= 1)[:, None] & (np.abs(np.arange(8) - columns[place]) <= 1)
    agreed = maps.head_peaks[place, 0][near].sum() / found.share[place]
    assert abs(100 * agreed - int(said[3])) < 2
    load(page)  # kept with the result
    page.mouse.move(*on_screen(page, "result", *found.source_xy[first].tolist()))
    heat.wait_for(state="visible")


@pytest.mark.slow
def test_before_is_to_the_left_of_the_line_and_after_to_the_right(page: Page, images: dict[str, Path]) -> None:
    give_all(page, images)
    edit(page, "Done.")
    after, divider = page.locator("#result [data-role=after]"), page.locator("#result .divider")
    assert divider.is_hidden() and page.locator("#result [data-role=where]").input_value() == "0"  # all of the result
    image = page.locator("#result [data-role=before]").bounding_box()
    assert image is not None
    sides = [page.locator(f"#result [data-role={side}-side]") for side in ("left", "right")]
    for where in ("30", "100", "0"):
        page.locator("#result [data-role=where]").fill(where)
        clip = after.evaluate("(image) => getComputedStyle(image).clipPath").replace("0px", "0")
        assert clip.startswith(f"inset(0 0 0 {where}%" if where != "0" else "inset(0")
        if where == "30":
            line = divider.bounding_box()
            assert line is not None and abs((line["x"] - image["x"]) / image["width"] - 0.3) < 0.02
        # What is named is what is seen: at the left end that is the result alone.
        assert [side.is_visible() for side in sides] == [where != "0", where != "100"]
    assert [side.text_content() for side in sides] == ["◂ Before", "After ▸"]


@pytest.mark.slow
def test_what_is_shown_belongs_to_what_is_there(page: Page, images: dict[str, Path]) -> None:
    old = page.locator("#result.is-old")
    give_all(page, images)
    choose(page, seed="")
    said = edit(page, "Done.")
    seed = re.search(r"Seed (\d+) was used", said)
    download = page.locator("#result [data-role=download]")
    assert seed and download.get_attribute("download") == f"edited_seed{seed[1]}.png"
    assert old.count() == 0
    paint_box(page, "source", (200, 150, 220, 170))  # with the brush: another mask
    old.wait_for()
    said_by(page, "result", "from other images or with another mask")
    choose(page, steps="100", count="4")
    begin_edit(page)
    page.wait_for_selector("#left:has-text('of 400')")
    assert page.inner_text("#said") == ""  # nothing of the edit before stays beside the bar
    page.wait_for_selector("#left:has-text('left')")  # how long it will take
    page.wait_for_selector("#result [data-role=preview]:visible")
    assert 0 < page.locator("#bar").evaluate("(bar) => bar.value") < 1
    assert page.locator("#go").is_disabled()
    page.click("#stop")
    wait_until_said(page, "Cancelled")
    assert page.locator("#result [data-role=preview]").is_hidden() and page.locator("#bar").is_hidden()
    choose(page, count="1", steps="3")
    edit(page, "Done.")
    assert old.count() == 0 and page.inner_text("#result [data-role=said]") == ""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width_px", [1280, 820, 390])
def test_everything_has_a_name_of_its_own_and_can_be_read(
    browser: Browser, server: str, images: dict[str, Path], width_px: int, scheme: Literal["light", "dark"]
) -> None:
    """By the rules of axe-core, WCAG 2.2 AA among them: names, roles, contrast."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the extra `dev` has axe-core")
    with opened(browser, server, width_px, 900, color_scheme=scheme) as page:
        canvases = [each.get_attribute("aria-label") for each in page.locator(".painter-mask").all()]
        assert len(canvases) == 2 and "source" in str(canvases[0]) and "reference" in str(canvases[1])
        names = [each.get_attribute("aria-label") for each in page.locator("[data-role=picture]").all()]
        assert len(set(names)) == 2 and all(names)
        assert page.locator("#said[role=status][aria-live=polite]").count() == 1
        checked = axe.Axe().run(page)
        assert checked.violations_count == 0, checked.generate_report()
        give_all(page, images)
        edit(page, "Done.")
        for each in page.locator("details").all():
            each.evaluate("(element) => { element.open = true; }")
        paint_box(page, "source", (200, 150, 220, 170))  # the result is dimmed now
        checked = axe.Axe().run(page)
        assert checked.violations_count == 0, checked.generate_report()
        page.mouse.move(0, 0)
        colours = "(button) => [getComputedStyle(button).color, getComputedStyle(button).backgroundColor]"
        assert contrast(*page.locator("#go").evaluate(colours)) >= 4.5
        page.hover("#go")
        assert contrast(*page.locator("#go").evaluate(colours)) >= 4.5
        wide = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide[0] <= wide[1]  # nothing sticks out to the side


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
    give_all(page, images)
    paint_box(page, "reference", (10, 10, 60, 60))
    paint_box(page, "reference", (40, 30, 120, 110))  # takes the place of the first
    choose(page, count="3")
    asked = begin_edit(page)
    assert [each["box"] for each in asked["references"]] == [[40, 30, 120, 110]]
    wait_until_said(page, "Done.")
    thumbs = page.locator("#result [data-role=history] button")
    assert thumbs.count() == 3
    first = result_of(page)
    thumbs.nth(2).click()
    assert not np.array_equal(first, result_of(page))
    assert page.locator("#result [data-role=download]").get_attribute("download") == "edited_seed3.png"
    page.click("#reference [data-role=all]")
    assert begin_edit(page)["references"][0]["box"] is None
    wait_until_said(page, "Done.")
    assert thumbs.count() == 6
    page.click("#result [data-role=forget]")
    assert thumbs.count() == 5


@pytest.mark.slow
def test_several_references_are_added_used_each_with_its_box_and_removed(page: Page, images: dict[str, Path]) -> None:
    give_all(page, images)
    edit(page, "Done.")
    alone = result_of(page)
    page.set_input_files("#reference [data-role=more]", images["source"])
    said_by(page, "reference", "320 x 240 px")
    page.locator("#result.is-old").wait_for()
    thumbs = page.locator("#reference [data-role=thumbs] button")
    assert thumbs.count() == 2
    paint_box(page, "reference", (20, 30, 290, 200))
    thumbs.first.click()
    said_by(page, "reference", "240 x 200 px")
    sent = begin_edit(page)["references"]
    assert [each["box"] for each in sent] == [None, [20, 30, 290, 200]] and sent[0]["image"] != sent[1]["image"]
    wait_until_said(page, "Done.")
    assert not np.array_equal(alone, result_of(page))
    # Each place of the hole is in one of both: the ring shows it in the one that is shown, a line leads to the other.
    shown = set()
    for x in range(44, 120, 8):
        page.mouse.move(*on_screen(page, "result", x, 80))
        page.locator("#result .ring").wait_for(state="visible")
        shown.add((page.locator("#reference .ring").is_visible(), page.locator("#line").is_visible()))
    assert shown <= {(True, True), (False, True), (False, False)} and shown != {(False, False)}
    thumbs.nth(1).click()
    said_by(page, "reference", "320 x 240 px")
    page.click("#reference [data-role=remove]")
    thumbs.nth(1).wait_for(state="detached")
    edit(page, "Done.")
    assert np.array_equal(alone, result_of(page))
    page.click("#reference [data-role=remove]")
    assert page.locator("#reference [data-role=empty]").is_visible()
    page.set_input_files("#reference [data-role=picture]", [images["source"], images["reference"], images["mask"]])
    page.wait_for_selector("#reference [data-role=thumbs] li:nth-child(3) button")
    page.set_input_files("#reference [data-role=more]", [images["source"], images["reference"]])
    said_by(page, "reference", "at most 4 references")
    assert thumbs.count() == 4


@pytest.mark.slow
def test_what_cannot_be_edited_is_said(page: Page, images: dict[str, Path]) -> None:
    assert "choose an image to edit first" in edit(page, "Could not edit")
    give(page, "source", images["mask"], "mask")
    said_by(page, "source", "Choose the image to edit first")
    give(page, "source", images["huge"])
    said_by(page, "source", "the limit is 50 megapixels")
    give(page, "source", images["text"])
    said_by(page, "source", "not an image in a supported format")
    give(page, "source", images["heavy"])
    said_by(page, "source", "the limit is 2 MiB")
    give_both(page, images)
    assert "the mask is empty" in edit(page, "mask is empty")
    give(page, "source", images["reference"], "mask")
    said_by(page, "source", "the mask is 240 x 200 px, but the image is 320 x 240 px")


@pytest.mark.slow
def test_an_edit_can_be_cancelled_and_the_next_one_runs(page: Page, images: dict[str, Path]) -> None:
    give_all(page, images)
    choose(page, steps="100", count="4")
    begin_edit(page)
    page.click("#stop")
    wait_until_said(page, "Cancelled")
    choose(page, count="1", steps="3")
    edit(page, "Done.")


@pytest.mark.slow
def test_two_visitors_at_once_see_their_own_images_alone(
    browser: Browser, server: str, images: dict[str, Path]
) -> None:
    with opened(browser, server) as ann, opened(browser, server) as bob:
        for visitor in (ann, bob):
            give_all(visitor, images)
        with ann.expect_request("**/files/*") as fetched:
            ann.click("#go")
            edit(bob, "Done.")
            wait_until_said(ann, "Done")
        assert np.array_equal(result_of(ann), result_of(bob))  # the same images, model and seed
        address = fetched.value.url
        assert ann.request.get(address).status == 200
        assert bob.request.get(address).status == 410
        assert bob.request.get(address.replace("/files/", "/maps/")).status == 410
        with pytest.raises(urllib.error.HTTPError, match="410"):
            urllib.request.urlopen(urllib.request.Request(address, headers={"Cookie": f"{COOKIE}={'a' * 24}"}))
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(address)


@pytest.mark.slow
def test_who_waits_sees_the_place_in_the_queue(browser: Browser, server: str, images: dict[str, Path]) -> None:
    with opened(browser, server) as ann, opened(browser, server) as bob:
        for visitor in (ann, bob):
            give_all(visitor, images)
        choose(ann, steps="100", count="4")
        begin_edit(ann)
        ann.wait_for_selector("#left:has-text('Step')")
        bob.click("#go")
        bob.wait_for_selector("#left:has-text('One edit is ahead of yours')")
        ann.click("#stop")
        wait_until_said(bob, "Done.")


@pytest.mark.slow
def test_a_reload_loses_nothing(page: Page, images: dict[str, Path], server: str) -> None:
    give_both(page, images)
    page.click("#source [data-role=box]")
    paint_box(page, "source", (100, 80, 180, 160))
    paint_box(page, "source", (10, 10, 30, 30))
    paint_box(page, "reference", (40, 30, 120, 110))
    choose(page, count="2", keep_shape=True)
    edit(page, "Done.")
    first = result_of(page)
    page.wait_for_timeout(600)  # until all is kept
    load(page)
    assert page.locator("#result [data-role=history] button").count() == 2
    assert page.locator("#result.is-old").count() == 0 and np.array_equal(result_of(page), first)
    page.context.clear_cookies()  # as if the server had forgotten all images
    load(page, server)
    edit(page, "Done.")
    assert np.array_equal(result_of(page), first)  # images, mask, box and settings are what they were
    page.keyboard.press("Control+z")
    page.locator("#result.is-old").wait_for()  # strokes can be undone after a reload
    choose(page, count="1")
    mask = mask_of(page)
    assert mask[80:160, 100:180].all() and mask.sum() == 80 * 80
    page.keyboard.press("Control+Shift+Z")
    assert mask_of(page).sum() == 80 * 80 + 20 * 20
    page.click("#start-over")
    page.wait_for_selector("body[data-state=ready] #source [data-role=empty]:visible")
    assert page.locator("#result [data-role=history] button").count() == 0


@pytest.mark.slow
def test_an_edit_that_runs_survives_a_reload_and_leaving_asks_first(page: Page, images: dict[str, Path]) -> None:
    give_all(page, images)
    page.wait_for_timeout(600)
    asks = "() => { const leave = new Event('beforeunload', { cancelable: true }); return !dispatchEvent(leave); }"
    assert not page.evaluate(asks)
    choose(page, steps="100", count="2")
    page.wait_for_timeout(600)
    begin_edit(page)
    page.wait_for_selector("#left:has-text('of 200')")
    assert page.evaluate(asks)
    load(page)
    page.wait_for_selector("#left:has-text('of 200')")
    wait_until_said(page, "Done.")
    assert page.locator("#result [data-role=history] button").count() == 2
    page.wait_for_timeout(600)
    assert not page.evaluate(asks)


GIVE_FILE = """async ([selector, kind, address]) => {
    const transfer = new DataTransfer();
    const file = new File([await (await fetch(address)).blob()], "given.png", { type: "image/png" });
    transfer.items.add(file);
    const event = kind === "paste"
        ? new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true })
        : new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true });
    document.querySelector(selector).dispatchEvent(event);
}"""


@pytest.mark.slow
def test_images_are_dropped_and_pasted(page: Page) -> None:
    """Pasted ones go to what is empty, or to the panel under the pointer; dropped ones to where they fall."""
    page.evaluate(GIVE_FILE, ["body", "paste", "/examples/0/source"])
    said_by(page, "source", "px")
    page.evaluate(GIVE_FILE, ["body", "paste", "/examples/0/reference"])
    said_by(page, "reference", "px")
    page.evaluate(GIVE_FILE, ["#source .painter-mask", "dragover", "/examples/1/source"])
    assert page.locator("#source.is-over").count() == 1
    before = page.locator("#source .view-content img").get_attribute("src")
    page.evaluate(GIVE_FILE, ["#source .painter-mask", "drop", "/examples/1/source"])
    page.wait_for_selector(f"#source .view-content img:not([src='{before}'])")
    before = page.locator("#reference .view-content img").get_attribute("src")
    page.hover("#reference .painter-mask")
    page.evaluate(GIVE_FILE, ["body", "paste", "/examples/1/reference"])
    page.wait_for_selector(f"#reference .view-content img:not([src='{before}'])")
    assert page.locator("#source.is-over").count() == 0 and page.url.endswith("/")


@pytest.mark.slow
def test_zoomed_in_moved_and_by_keys_what_is_painted_is_exact(page: Page, images: dict[str, Path]) -> None:
    give_both(page, images)
    size = page.locator("#source [data-role=size-shown]")
    page.mouse.move(*on_screen(page, "source", 160, 120))
    assert size.inner_text() == "32 px"
    page.mouse.wheel(0, -100)
    assert int(size.inner_text().split()[0]) > 32
    page.keyboard.press("[")
    page.keyboard.press("[")
    assert int(size.inner_text().split()[0]) < 32
    fitted = page.locator("#source .view-content img").bounding_box()
    page.keyboard.down("Control")
    page.mouse.wheel(0, -300)
    page.keyboard.up("Control")
    zoomed = page.locator("#source .view-content img").bounding_box()
    assert fitted and zoomed and zoomed["width"] > 3 * fitted["width"]
    drag(page, "source", (160, 120), (150, 110), button="middle")
    moved = page.locator("#source .view-content img").bounding_box()
    assert moved and moved["x"] < zoomed["x"] - 5 and abs(moved["width"] - zoomed["width"]) < 0.01
    page.keyboard.press("r")
    paint_box(page, "source", (150, 110, 170, 125))
    page.keyboard.press("0")
    again = page.locator("#source .view-content img").bounding_box()
    assert again and again == pytest.approx(fitted, abs=0.01)
    mask = mask_of(page)
    assert mask[110:125, 150:170].all() and mask.sum() == 20 * 15
    page.keyboard.press("i")
    assert np.array_equal(mask_of(page), ~mask)
    page.keyboard.press("Control+z")
    page.click("#source [data-role=clear]")
    page.keyboard.press("Control+z")
    assert np.array_equal(mask_of(page), mask)


@pytest.mark.slow
def test_two_fingers_zoom_and_paint_nothing(browser: Browser, server: str, images: dict[str, Path]) -> None:
    with opened(browser, server, 390, 844, has_touch=True) as page:
        give_both(page, images)
        session = page.context.new_cdp_session(page)

        def touch(kind: str, *points: tuple[float, float]) -> None:
            at = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(points)]
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": at})

        fitted = page.locator("#source .view-content img").bounding_box()
        assert fitted is not None
        x, y = fitted["x"] + fitted["width"] / 2, fitted["y"] + fitted["height"] / 2
        touch("touchStart", (x - 20, y))
        touch("touchStart", (x - 20, y), (x + 20, y))
        touch("touchMove", (x - 60, y), (x + 60, y))
        touch("touchEnd")
        zoomed = page.locator("#source .view-content img").bounding_box()
        assert zoomed is not None and zoomed["width"] > 2 * fitted["width"]
        assert page.locator("#source [data-role=undo]").is_disabled()
        page.click("#source [data-role=fit]")
        touch("touchStart", (x, y))
        touch("touchMove", (x + 20, y))
        touch("touchEnd")
        page.wait_for_selector("#source [data-role=undo]:enabled")


@pytest.mark.slow
def test_a_result_is_the_next_source_and_examples_are_scrolled_to(page: Page, images: dict[str, Path]) -> None:
    give_all(page, images)
    edit(page, "Done.")
    result = result_of(page)
    with page.expect_request("**/shown/*") as shown:
        page.click("#result [data-role=use]")
    said_by(page, "source", "Paint over")
    seen = np.asarray(Image.open(io.BytesIO(page.request.get(shown.value.url).body()))).astype(int)
    assert abs(seen - result).mean() < 3  # a JPEG of it
    page.set_viewport_size({"width": 390, "height": 700})
    page.locator("[data-example='1']").scroll_into_view_if_needed()
    page.click("[data-example='1']")
    said_by(page, "source", "press Edit")
    page.wait_for_timeout(800)  # it scrolls smoothly
    box = page.locator("#source [data-role=stage]").bounding_box()
    assert box is not None and 0 <= box["y"] < 300
    assert page.locator("#settings [name=keep_shape]").is_checked()
    assert begin_edit(page)["keep_shape"] is True
    wait_until_said(page, "Done.")


@pytest.mark.slow
def test_auto_zoom_and_around_the_mask_are_asked_for(page: Page, images: dict[str, Path]) -> None:
    give_all(page, images)
    choose(page, auto_zoom=True, around=True, guidance="3.5")
    asked = begin_edit(page)
    assert asked["auto_zoom"] is True and asked["crop"] == "auto" and asked["guidance"] == 3.5
    wait_until_said(page, "Done.")
    assert "auto-zoom" in page.inner_text("#chosen") and "around the mask" in page.inner_text("#chosen")


@pytest.mark.slow
def test_other_sites_and_other_names_are_refused(server: str) -> None:
    rebound = urllib.request.Request(server, headers={"Host": "evil.example"})
    without_cookie = urllib.request.Request(server + "upload", data=b"a")
    for request, status in ((rebound, "403"), (without_cookie, "400")):
        with pytest.raises(urllib.error.HTTPError, match=status):
            urllib.request.urlopen(request)
    asked = urllib.request.Request(server + "edit", data=b"{}", headers={"Cookie": "other=1"})
    cookie = {"Cookie": f"{COOKIE}={'a' * 24}", "Content-Type": "application/json"}
    large = urllib.request.Request(server + "edit", data=bytes(2**17), headers=cookie)
    for request, status in ((asked, "400"), (large, "413")):
        with pytest.raises(urllib.error.HTTPError, match=status):
            urllib.request.urlopen(request)
    for way in ("gradio_api/upload", "run/run", "api/run", "call/run", "edit/", "cancel", "reset", "docs"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(urllib.request.Request(server + way, data=b"{}", headers=cookie))
    for path in ("page/../painter.py", "page/secret", "page/editing.html", "examples/9/source", "examples/0/title"):
        with pytest.raises(urllib.error.HTTPError, match=r"40[34]"):
            urllib.request.urlopen(server + path)


ASKED = {
    "source": "a", "mask": "m", "references": [{"image": "b"}], "steps": 3, "guidance": 2.0, "seed": 1, "count": 1,
    "keep_shape": False, "crop": "full", "auto_zoom": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("{", "^the request is not valid .*; reload the page$"),
        ("[]", "^the request is not valid .*; reload the page$"),
        ("{}", "^the request is not valid .*; reload the page$"),
        ("[" * 100_000, "^the request is not valid .*; reload the page$"),
        ({"source": ""}, "choose an image to edit first"),
        ({"references": []}, "choose a reference to imitate first"),
        ({"references": [{"image": ""}]}, "choose a reference to imitate first"),
        ({"references": [{"image": "b"}] * 5}, "references must be in 1..4, got 5"),
        ({"references": [{"image": "b"}] * 2, "auto_zoom": True}, "auto-zoom takes one reference"),
        ({"steps": 101}, "steps must be in 1..100, got 101"),
        ({"count": 0}, "results must be in 1..4, got 0"),
        ({"seed": float("inf")}, "^the request is not valid .*; reload the page$"),
        ({"seed": -1}, "'seed'"),
        ({"steps": 1e400}, "^the request is not valid .*; reload the page$"),
        ({"guidance": float("nan")}, "^guidance must be in|^the request is not valid .*; reload the page$"),
        ({"references": [{"image": "b", "box": [1, 2]}]}, "four whole numbers"),
        ({"crop": "none"}, "^the request is not valid .*; reload the page$"),
    ],
)
def test_what_the_browser_sends_is_checked(changed: str | dict[str, object], message: str) -> None:
    text = changed if isinstance(changed, str) else json.dumps({**ASKED, **changed})
    with pytest.raises(InputError, match=message):
        EditRequest.read(text, VisitorLimits())


def test_no_seed_is_another_one_each_time() -> None:
    read = [EditRequest.read(json.dumps({**ASKED, "seed": None}), VisitorLimits()) for _ in range(5)]
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
    assert (
        told[0]
        == 'not enough memory for this edit: try the setting "Use only the area around the mask", or a smaller image'
    )
    assert told[1].endswith(
        "the mask must have the size of its source (paint the mask here, or upload a mask of that size)"
    )
    assert "is the mask rotated?" in told[2]
    assert told[5].endswith("white means repaint: is the mask inverted? (leave a part of the image unpainted)")
