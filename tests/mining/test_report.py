from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from mining_inputs import moving_camera, photograph_with_segments, write_clip, write_clips, write_photograph, write_tar
from PIL import Image

from mimicbrush.cli.mine import report
from mimicbrush.data.manifest import PairTable, read_manifest, read_rows
from mimicbrush.data.pair import Pair
from mimicbrush.errors import DataError
from mimicbrush.io.hashing import hash_file
from mimicbrush.mining.executors import Resources
from mimicbrush.mining.options import MiningOptions
from mimicbrush.mining.refusals import QUARANTINED, REJECTED
from mimicbrush.mining.report import statistics
from mimicbrush.mining.report.page import render_report, write_mining_report
from mimicbrush.mining.report.plots import Histogram, HistogramMark, plot_histogram
from mimicbrush.mining.run import mine_folder
from mimicbrush.ops.geometry import letterbox_matrix, transform_points

VOID = {"meta", "img", "br", "link"}
EVIL = "<script>alert(1)</script>.mp4"


class Page(HTMLParser):
    """The page's tags, texts and attributes; a tag that is closed out of order is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.words.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with in/ and out/: clips, one still and one twice, photographs loose and in a tar, evil names."""
    folder = tmp_path_factory.mktemp("report")
    write_clips(folder / "in", 3)
    shutil.copy(folder / "in/clip0.mp4", folder / "in/twin.mp4")
    write_clip(folder / "in/still.mp4", [moving_camera(1)[0]] * 48)
    write_photograph(folder / "in", "loose", seed=5)
    image, segments = photograph_with_segments(seed=9)
    files = {"sa_1.jpg": image, "sa_1.json": json.dumps(segments).encode(), "read.me": b""}
    write_tar(folder / "in/sa.tar", files)
    (folder / "in" / EVIL).parent.mkdir()
    (folder / "in" / EVIL).write_text("text")
    names = ["clip0.mp4", "clip1.mp4", "clip2.mp4", "twin.mp4", "still.mp4", "loose.jpg", "sa.tar", EVIL, "absent.mp4"]
    with (folder / "in/list.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "licence", "url"])
        writer.writerows([name, "<b>CC</b>" if name.startswith("clip") else "", ""] for name in names)
    mine_folder(
        folder / "in/list.csv",
        folder / "out",
        MiningOptions(pairs_per_clip=3, jpeg_quality=90, inputs_per_shard=4),
        resources=Resources(workers=1),
        progress=False,
    )
    return folder


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return (folder / "out/report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_the_run_writes_it_and_the_same_folder_gives_the_same_page(folder: Path, html: str) -> None:
    assert render_report(folder / "out") == html
    before = (folder / "out/report.html").stat()
    write_mining_report(folder / "out")
    mine_folder(
        folder / "in/list.csv",
        folder / "out",
        MiningOptions(pairs_per_clip=3, jpeg_quality=90, inputs_per_shard=4),
        progress=False,
    )
    assert (folder / "out/report.html").stat() == before


def test_the_sums_are_those_of_the_manifest(folder: Path, page: Page) -> None:
    rows = read_rows(folder / "out").to_pylist()
    of = {row["source_path"]: row["status"] for row in rows}
    files = {status: list(of.values()).count(status) for status in ("pair", "rejected", "quarantined")}
    assert files == {"pair": 5, "rejected": 2, "quarantined": 2}
    videos = sum(row["status"] == "pair" and row["kind"] == "video" for row in rows)
    photographs = sum(row["status"] == "pair" and row["kind"] == "image" for row in rows)
    assert f"9 inputs = {files['pair']} accepted + {files['rejected']} rejected + {files['quarantined']}" in page.text
    pairs = f"{videos + photographs} pairs = {videos} pairs of video frames + {photographs} photographs with segments."
    assert pairs in page.text
    assert "which were ignored: 1 \N{MULTIPLICATION SIGN} .me" in page.text
    assert "jpeg_quality 90 default 92" in page.text
    assert "pairs_per_clip 3 default 16" in page.text
    assert f"<b>CC</b> 3 {sum(row['licence'] == '<b>CC</b>' and row['status'] == 'pair' for row in rows)}" in page.text


def test_every_reason_is_explained_and_counted(page: Page) -> None:
    for word, meaning in (REJECTED | QUARANTINED).items():
        assert f"{word}" in page.text
        assert meaning in page.text
    assert "duplicate 1 the same content as an earlier file twin.mp4 : the same bytes as clip0.mp4" in page.text
    assert "too_similar 1" in page.text
    assert f"{EVIL} damaged" in page.text


def test_bands_and_histograms_are_those_of_the_columns(folder: Path, page: Page) -> None:
    rows = [row for row in read_rows(folder / "out").to_pylist() if row["status"] == "pair" and row["kind"] == "video"]
    ssims = np.array([row["ssim"] for row in rows])
    for low, high in ((0.05, 0.96), (0.1, 0.95), (0.2, 0.9), (0.4, 0.8)):
        count = int(((ssims >= low) & (ssims <= high)).sum())
        assert re.search(
            rf"{low:.2f}\W+{high:.2f}( mined)? {count} {re.escape(f'{count / len(rows):.1%}')}", page.text
        ), (low, high)
    labels = {attrs.get("aria-label", "") for tag, attrs in page.tags if tag == "svg"}
    matches = [len(row["a_points"]) // 2 for row in rows]
    gaps = [row["b_time_s"] - row["a_time_s"] for row in rows]
    for title, values, style in (
        ("SSIM of the two frames", ssims, "{:.2f}"),
        ("SIFT matches per pair", matches, "{:.0f}"),
        ("Time between the frames", gaps, "{:.1f} s"),
    ):
        words = ", ".join(f"percentile {p}: {style.format(np.percentile(values, p))}" for p in (5, 25, 50, 75, 95))
        assert f"Histogram: {title}; {words}" in labels


def test_storage_and_speed_are_those_of_the_files(folder: Path, page: Page) -> None:
    out = folder / "out"
    sizes = [path.stat().st_size for name in ("shards", "manifest", "audit") for path in (out / name).iterdir()]
    total = sum(sizes) + (out / "index.arrow").stat().st_size
    assert sum(statistics.measure_disk_bytes(out).values()) == total
    pairs = len(read_manifest(out))
    assert f"per pair {total / pairs / 1000:.3g} kB" in page.text.replace("\xa0", " ")
    timings = [json.loads(path.read_text()) for path in (out / "timing").iterdir()]
    seconds = sum(sum(timing["seconds"].values()) for timing in timings)
    frames = sum(timing["num_frames"] for timing in timings)
    # From a thousand on, a narrow space stands in the number, which `Page` reads as any other space.
    assert f"frames per second {frames / seconds:,.0f}".replace(",", " ") in page.text
    videos = 6  # as planned: three clips, a twin, a still one, and text with the name of one
    assert f"seconds per clip {seconds / videos:.2f}" in page.text
    decoding = sum(timing["seconds"].get("decode", 0) for timing in timings)
    assert re.search(rf"decoding {decoding:.1f} s {re.escape(f'{decoding / seconds:.1%}')}", page.text)


def test_the_sampled_pairs_are_measured_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the figures, and for the warning of pairs that hardly move, which the miner prints, too."""
    samples: list[int] = []

    def sample(pairs: PairTable) -> list[Pair]:
        samples.append(len(pairs))
        return sampling(pairs)

    sampling = statistics.sample_pairs
    monkeypatch.setattr(statistics, "sample_pairs", sample)
    warning = write_mining_report(folder / "out")
    assert len(samples) == 1
    assert (warning is None) == ("hardly move" not in (folder / "out" / "report.html").read_text())


def test_mask_figures_count_cells_and_pixels(folder: Path) -> None:
    pairs = read_manifest(folder / "out")
    videos = pairs.where(pairs.column("kind") == "video")
    found = statistics.measure_masks(videos)
    assert len(found.hidden) == len(videos)
    by_hand = []
    for pair in videos:
        mask, n = statistics.build_grid_mask(pair)
        height, width = pair.size_px
        # Cell by cell and pixel by pixel, over the part of the canvas that the image covers.
        inside = np.zeros((256, 256), bool)
        border = round((256 - 256 * height / width) / 2)
        inside[border : 256 - border] = True
        points = transform_points(pair.a_points, letterbox_matrix(width, height, 256))
        hidden = matched = 0
        for row in range(n):
            for column in range(n):
                y, x = int((row + 0.5) * 256 / n), int((column + 0.5) * 256 / n)
                if mask[y, x] and inside[y, x]:
                    hidden += 1
                    matched += any(
                        int((px + 0.5) * n / 256) == column and int((py + 0.5) * n / 256) == row for px, py in points
                    )
        moved = np.median(np.hypot(*(pair.b_points - pair.a_points).T)) / np.hypot(height, width)
        by_hand.append((mask[inside].mean(), matched / hidden if hidden else 0, moved))
    expected = sorted(by_hand)
    np.testing.assert_allclose(sorted(zip(found.hidden, found.matched, found.motion, strict=True)), expected, atol=1e-6)


def test_a_still_camera_is_warned_of_and_a_moving_one_is_not(folder: Path, page: Page, tmp_path: Path) -> None:
    assert "hardly move" not in page.text
    noise = np.random.default_rng(0)
    frame = moving_camera(1)[0]
    frames = [np.clip(frame + noise.normal(0, 14, frame.shape), 0, 255).astype(np.uint8) for _ in range(48)]
    for number, each in enumerate(frames):  # a thing that crosses the image: few points are on it
        each[28:40, number : number + 12] = 255
    write_clip(tmp_path / "in/still.mp4", frames)
    options = MiningOptions(pairs_per_clip=4, min_matches=10)
    mined = mine_folder(tmp_path / "in", tmp_path / "out", options, resources=Resources(workers=1), progress=False)
    assert mined.warning is not None
    assert mined.warning.startswith("100% of the video pairs hardly move: 90% of their matched points move")
    assert mined.warning in " ".join(Page((tmp_path / "out/report.html").read_text(encoding="utf-8")).text.split())
    assert f"warning: {mined.warning}\n" in report(mined, tmp_path / "out")


def test_names_from_outside_are_text_and_nothing_comes_from_elsewhere(html: str, page: Page) -> None:
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;.mp4" in html
    assert not [tag for tag, _ in page.tags if tag in ("script", "b<", "iframe", "object", "link")]
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("data:image/jpeg;base64,", "#")), tag
    assert "url(" not in html
    assert "@import" not in html
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {attributes["href"][1:] for _, attributes in page.tags if "href" in attributes} <= ids


def test_every_image_is_whole_and_says_what_it_shows(html: str, page: Page) -> None:
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    kept = 2 * 9  # three pairs of three clips: the mask, and the matches
    assert len(images) >= kept + 2 + 1  # two photographs, and what was refused of the still clip
    for attributes in images:
        data = base64.b64decode(attributes["src"].partition(",")[2])
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            image.load()
            assert image.size == (int(attributes["width"]), int(attributes["height"]))
        assert attributes["alt"]
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes["aria-label"]
    assert len(html) < 3_000_000


def test_an_image_that_is_gone_does_not_stop_the_report(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "in/loose.jpg").unlink()
    tar = copy / "out/shards/shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[:2000])
    page = Page(render_report(copy / "out"))
    assert page.text.count("no image") >= 2
    (copy / "out/summary.json").write_text("{")
    with pytest.raises(DataError, match=r"summary\.json cannot be read"):
        render_report(copy / "out")


def test_a_folder_without_pairs_and_one_without_a_plan(tmp_path: Path, mined: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.mp4").write_text("text")
    mine_folder(tmp_path / "in", tmp_path / "out", resources=Resources(workers=1), progress=False)
    page = Page((tmp_path / "out/report.html").read_text())
    assert "1 inputs = 0 accepted + 0 rejected + 1 quarantined" in page.text
    assert "Kept pairs" not in page.text
    assert "12 pairs of video frames + 4 photographs" in Page(render_report(mined)).text


def test_the_sample_is_spread_and_does_not_hang_on_the_order() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 50, 5000)
    keys = statistics.hash_rows(groups.astype(np.uint64), np.arange(5000))
    assert len(np.unique(keys)) == 5000
    chosen = statistics.spread_rows(groups, keys, 50)
    assert len(np.unique(groups[chosen])) == 50
    order = rng.permutation(5000)
    assert set(order[statistics.spread_rows(groups[order], keys[order], 60)]) == set(
        statistics.spread_rows(groups, keys, 60)
    )
    assert len(statistics.spread_rows(groups[:0], keys[:0], 60)) == 0


def test_a_histogram_plots_every_bin_and_escapes_its_words() -> None:
    values = np.array([-1, 0.05, 0.05, 0.5, 2])
    histogram = Histogram.count(values, 0, 1, bins=10)
    assert histogram.counts == (3, 0, 0, 0, 0, 1, 0, 0, 0, 1)
    svg = Page(str(plot_histogram(histogram, '"<&>', " <s>", [HistogramMark(0.5, "<m>")], (0.2, 0.8))))
    bars = [float(attributes["height"]) for tag, attributes in svg.tags if attributes.get("class") == "bar"]
    assert len(bars) == 3
    assert bars[0] == pytest.approx(3 * bars[1], abs=0.1)
    assert svg.tags[0][1]["aria-label"] == '"<&>'
    assert "<m>" in svg.text


def test_at_most_so_many_quarantined_files_are_listed(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder / "out", tmp_path / "out")
    part = copy / "manifest/part-000000.parquet"
    table = pq.read_table(part)
    row = next(row for row in read_rows(copy).to_pylist() if row["status"] == "quarantined")
    rows = [row | {"source_path": f"lost{number}.mp4", "source_hash": ""} for number in range(250)]
    pq.write_table(type(table).from_pylist(rows, table.schema), part)
    marker = copy / "markers/shard-000000.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"part_sha256": hash_file(part)}))
    text = Page(render_report(copy)).text
    listed = set(re.findall(r"lost\d+\.mp4", text))
    assert len(listed) == 200
    assert re.search(r"and 5\d more", text)
