from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mining_inputs import photograph_with_segments, write_tar
from PIL import Image
from pycocotools import mask as coco_mask

from mimicbrush.mining.options import MiningOptions
from mimicbrush.mining.refusals import UntrustedFileError
from mimicbrush.mining.segmented_images import list_archive, open_archive, read_member, read_segmented_image
from mimicbrush.ops.rle import decode_segment, read_annotation

OPTIONS = MiningOptions()


def refusal(jpeg: bytes, content: Any, options: MiningOptions = OPTIONS) -> str:
    annotation = content if isinstance(content, bytes) else json.dumps(content).encode()
    with pytest.raises(UntrustedFileError) as error:
        read_segmented_image(jpeg, annotation, options)
    return error.value.reason


def with_segmentation(size: Any, counts: Any) -> dict[str, Any]:
    return {"annotations": [{"segmentation": {"size": size, "counts": counts}}]}


def test_segments_of_a_fitting_area_are_kept_unchanged() -> None:
    jpeg, content = photograph_with_segments()
    image = read_segmented_image(jpeg, json.dumps(content).encode(), OPTIONS)
    assert (image.width_px, image.height_px) == (96, 80)
    assert (image.segments, image.ratios) == ([0], [1600 / (80 * 96)])
    mask = decode_segment(read_annotation(json.dumps(content).encode())[0], 80, 96)
    assert mask.sum() == 1600
    assert mask[10:50, 20:60].all()


@pytest.mark.parametrize("damaged", [{"exif": b"Exif\0\0II*\0\x08\0\0\0\xff\xff"}, {"icc_profile": b"no profile"}])
def test_what_pillow_warns_of_is_noted_in_the_row_and_never_printed(
    damaged: dict[str, bytes], recwarn: pytest.WarningsRecorder
) -> None:
    jpeg, content = photograph_with_segments()
    file = io.BytesIO()
    with Image.open(io.BytesIO(jpeg)) as opened:
        opened.save(file, format="JPEG", **damaged)
    image = read_segmented_image(file.getvalue(), json.dumps(content).encode(), OPTIONS)
    assert image.segments == [0] and not recwarn.list
    assert ("profile cannot be read" in image.detail) == ("icc_profile" in damaged)


def test_random_masks_survive_and_come_largest_first() -> None:
    rng = np.random.default_rng(0)
    jpeg, _ = photograph_with_segments()
    masks = [(rng.random((80, 96)) < share).astype(np.uint8) for share in (0.05, 0.5, 0.2)]
    entries = [coco_mask.encode(np.asfortranarray(mask)) for mask in masks]
    content = {
        "annotations": [{"segmentation": {"size": [80, 96], "counts": rle["counts"].decode()}} for rle in entries]
    }
    image = read_segmented_image(jpeg, json.dumps(content).encode(), MiningOptions(max_segments=2))
    assert image.segments == [1, 2]
    for mask, segmentation in zip(masks, read_annotation(json.dumps(content).encode()), strict=True):
        np.testing.assert_array_equal(decode_segment(segmentation, 80, 96), mask)


def test_uncompressed_run_lengths_are_packed() -> None:
    jpeg, _ = photograph_with_segments()
    content = with_segmentation([80, 96], [800, 1600, 80 * 96 - 2400])
    image = read_segmented_image(jpeg, json.dumps(content).encode(), OPTIONS)
    assert image.ratios == [1600 / (80 * 96)]
    assert decode_segment(content["annotations"][0]["segmentation"], 80, 96).sum() == 1600


@pytest.mark.parametrize(
    "segmentation",
    [
        ([96, 80], "anything"),
        ([80, 96], [10, 20]),
        ([80, 96], [-5, 80 * 96 + 5]),
        ([80, 96], [0.5, 80 * 96 - 0.5]),
        ([80, 96], 7),
        ([80, 96], "~~~~"),
        ([80, 96], "oooooooooooooooooooo"),
        ([80, 96], "o"),
        ([80, 96], "@"),
        ([80, 96], "\u00e9"),
        ([10**9, 10**9], "P"),
        ("80x96", "P"),
    ],
)
def test_run_lengths_that_do_not_fit_are_refused(segmentation: tuple[Any, Any]) -> None:
    jpeg, _ = photograph_with_segments()
    assert refusal(jpeg, with_segmentation(*segmentation)) == "bad_segment"


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        [],
        {},
        {"annotations": 3},
        {"annotations": [3]},
        {"annotations": [{"segmentation": []}]},
    ],
)
def test_json_of_another_layout_is_refused(content: Any) -> None:
    jpeg, _ = photograph_with_segments()
    assert refusal(jpeg, content) == "bad_json"


def test_images_that_cannot_be_trusted() -> None:
    jpeg, content = photograph_with_segments()
    assert refusal(jpeg[: len(jpeg) // 2], content) == "damaged"
    with pytest.raises(UntrustedFileError) as error:
        read_segmented_image(b"not an image", json.dumps(content).encode(), OPTIONS)
    assert (error.value.reason, error.value.detail) == ("damaged", "not a JPEG")  # the same words in every run
    assert refusal(jpeg, content, MiningOptions(max_pixels=1000)) == "too_large"
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    with Image.open(io.BytesIO(jpeg)) as image:
        image.save(turned, "JPEG", exif=exif)
    assert refusal(turned.getvalue(), content) == "rotated"


def archive_refusal(path: Path) -> str:
    with pytest.raises(UntrustedFileError) as error, open_archive(path) as archive:
        list_archive(archive)
    return error.value.reason


def test_a_tar_pairs_names_in_any_order(tmp_path: Path) -> None:
    files = {
        "x/1.json": b"one",
        "2.jpg": b"two",
        "x/1.jpg": b"three",
        "readme.txt": b"",
        "2.json": b"four",
        "3.jpg": b"",
    }
    with open_archive(write_tar(tmp_path / "a.tar", files)) as archive:
        listing = list_archive(archive)
        members, others = listing.photographs, listing.others
        contents = [
            (m.name, read_member(archive, m.image, 100), read_member(archive, m.annotation, 100)) for m in members
        ]
        with pytest.raises(UntrustedFileError) as error:
            read_member(archive, members[0].image, 2)
    assert contents == [("2.jpg", b"two", b"four"), ("x/1.jpg", b"three", b"one")]
    assert others == ["readme.txt", "3.jpg"]
    assert error.value.reason == "too_large"


def test_a_damaged_tar_is_found_out(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{n}.jpg": bytes([n]) * 2000 for n in range(1, 5)})
    original = path.read_bytes()
    for name, data in {
        "cut in a file": original[:3000],
        "cut between files": original[: 2 * (512 + 2048)],
        "broken header": original[:2560] + b"\x55" * 512 + original[3072:],
        "no tar": b"text" * 1000,
        "empty": b"",
    }.items():
        path.write_bytes(data)
        assert archive_refusal(path) == "bad_archive", name


def test_links_in_a_tar_are_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("1.jpg", "1.json"):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/hostname"
            tar.addfile(info)
    with open_archive(path) as archive:
        members = list_archive(archive).photographs
        with pytest.raises(UntrustedFileError) as error:
            read_member(archive, members[0].image, 1000)
    assert error.value.reason == "not_a_file"
