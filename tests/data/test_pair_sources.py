from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from toy_data import write_mined_folder

from mimicbrush.data.dataset import PairDataset
from mimicbrush.data.manifest import read_manifest
from mimicbrush.data.options import DataOptions, PairSourceOptions
from mimicbrush.data.pair_sources import load_pair_sources, split_by_kind
from mimicbrush.errors import DataError, InputError


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mined_folder(tmp_path_factory.mktemp("other") / "pairs", pairs_per_photo=2, with_images=False)


def test_any_number_of_sources_keep_their_weights(mined: Path, other: Path) -> None:
    named = {
        "clips": PairSourceOptions(str(mined), "video", 2),
        "photographs": PairSourceOptions(str(mined), "image", 1),
        "more": PairSourceOptions(str(other), "video", 5),
    }
    options = DataOptions(sources=named, heldout_ratio=0.0)
    sources = load_pair_sources(options)
    assert [(each.name, len(each.pairs), each.weight) for each in sources] == [
        ("clips", 12, 2), ("photographs", 4, 1), ("more", 8, 5)]  # fmt: skip
    dataset = PairDataset(sources, 16, options, seed=0)
    counts = Counter(dataset.mixture.locate(n)[0] for n in range(800))
    assert [counts[n] for n in range(3)] == [200, 100, 500]


def test_the_simple_form_is_two_sources(mined: Path) -> None:
    simple = DataOptions(root=str(mined), video_ratio=0.75)
    named = {"v": PairSourceOptions(str(mined), "video", 0.75), "i": PairSourceOptions(str(mined), "image", 0.25)}
    one, two = (
        PairDataset(load_pair_sources(options), 16, options, seed=3) for options in (simple, DataOptions(sources=named))
    )
    for number in range(8):
        assert one[number].source.tobytes() == two[number].source.tobytes()


def test_heldout_sources_and_other_ssim_stay_out(mined: Path) -> None:
    everything = DataOptions(root=str(mined), heldout_ratio=0.0)
    assert sum(len(source.pairs) for source in load_pair_sources(everything)) == 16
    assert sum(len(source.pairs) for source in load_pair_sources(DataOptions(root=str(mined)))) == 8
    with pytest.warns(UserWarning, match="no video pairs: all samples come from image"):
        (images,) = load_pair_sources(DataOptions(root=str(mined), max_ssim=0.4))
    assert images.name == "image"  # SSIM is of videos; theirs is 0.5


def test_one_kind_absent_is_said(mined: Path) -> None:
    pairs = read_manifest(mined)
    videos = pairs.where(pairs.column("kind") == "video")
    with pytest.warns(UserWarning, match="no image pairs: all samples come from video"):
        (source,) = split_by_kind(videos, DataOptions())
    assert source.name == "video"
    with pytest.raises(DataError, match="no pairs to train on: none of the 0 given pairs"):
        split_by_kind(pairs[:0], DataOptions())


def test_a_source_without_pairs_is_named(other: Path) -> None:
    with pytest.raises(DataError, match=r"data\.sources\.sa1b: none of the \d pairs in .* is of kind image"):
        load_pair_sources(DataOptions(sources={"sa1b": PairSourceOptions(str(other), "image")}))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (PairSourceOptions("x", "film"), r"data\.sources\.a\.kind=film: expected one of video, image"),
        (PairSourceOptions("", "video"), r"data\.sources\.a\.root is not set"),
        (PairSourceOptions("x", "video", 0), r"data\.sources\.a\.weight=0: expected a number above 0"),
        (PairSourceOptions("x", "video", float("inf")), "weight=inf: expected a number above 0"),
    ],
)
def test_sources_that_make_no_sense(source: PairSourceOptions, message: str) -> None:
    with pytest.raises(InputError, match=message):
        DataOptions(sources={"a": source})


def test_both_forms_at_once_are_an_error() -> None:
    with pytest.raises(InputError, match=r"data\.root=here and data\.sources \(a\) are both given"):
        DataOptions(root="here", sources={"a": PairSourceOptions("there")})
