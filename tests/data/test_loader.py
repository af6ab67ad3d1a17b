"""The same samples for any number of processes and workers, from any place, and with damaged data."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm_scripts
from loaded_batches import load_batches
from toy_data import write_mined_folder

from mimicbrush.data.batch import DecodedBatch
from mimicbrush.data.dataset import PairDataset
from mimicbrush.data.manifest import INDEX_NAME, read_manifest, write_index
from mimicbrush.data.options import DataOptions
from mimicbrush.data.pair_sources import load_pair_sources
from mimicbrush.data.sampler import RankBatches
from mimicbrush.errors import DataError
from mimicbrush.types import TrainBatch

TOTAL = 8
# Four workers on two cores are slow, and here on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
_TENSORS = ("source", "reference", "mask", "key", "index")


def dataset_in(root: Path, size_px: int = 32, seed: int = 1, **choices: Any) -> PairDataset:
    options = DataOptions(root=str(root), heldout_ratio=0.0, **choices)
    return PairDataset(load_pair_sources(options), size_px, options, seed=seed)


def rows(batches: Iterable[TrainBatch]) -> list[tuple[bytes, ...]]:
    """Every sample as bytes, in order."""
    return [
        tuple(getattr(batch, name)[n].numpy().tobytes() for name in _TENSORS)
        for batch in batches
        for n in range(len(batch))
    ]


def loaded(dataset: PairDataset, ranks: int, workers: int, steps: tuple[int, int]) -> list[tuple[bytes, ...]]:
    """What all ranks together see, put in the global order: rank by rank within each step."""
    per_rank = TOTAL // ranks
    seen = [
        rows(load_batches(dataset, RankBatches(*steps, per_rank, 1, rank, ranks), num_workers=workers))
        for rank in range(ranks)
    ]
    order = ((rank, step) for step in range(steps[1] - steps[0]) for rank in range(ranks))
    return list(chain.from_iterable(seen[rank][step * per_rank : (step + 1) * per_rank] for rank, step in order))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve video pairs, the first halves of two images zeroed, and mapped by an index."""
    root = write_mined_folder(tmp_path_factory.mktemp("damaged") / "pairs", with_images=False)
    shard = root / "shards" / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    for pair in read_manifest(root)[:2]:
        offset, length = pair.a_span
        data[offset : offset + length // 2] = bytes(length // 2)
    shard.write_bytes(data)
    write_index(root, root / INDEX_NAME)
    return root


@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (4, 0), (8, 0), (1, 1), (1, 4)])
def test_samples_do_not_depend_on_ranks_or_workers(mined: Path, ranks: int, workers: int) -> None:
    dataset = dataset_in(mined)
    assert loaded(dataset, ranks, workers, (0, 2)) == loaded(dataset, 1, 0, (0, 2))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_damaged_samples_do_not_depend_on_them_either(damaged: Path, ranks: int, workers: int) -> None:
    dataset = dataset_in(damaged, video_ratio=1.0)
    assert loaded(dataset, ranks, workers, (0, 3)) == loaded(dataset, 1, 0, (0, 3))


@pytest.mark.parametrize("ranks", [1, 4])
def test_two_resumes_within_one_epoch_change_nothing(mined: Path, ranks: int) -> None:
    dataset = dataset_in(mined, video_ratio=1.0)
    assert len(dataset.pair_sources[0].pairs) == 12  # an epoch is one step and a half
    straight = loaded(dataset, 1, 0, (0, 3))
    fresh = [dataset_in(mined, video_ratio=1.0) for _ in range(3)]
    parts = [loaded(each, ranks, 0, steps) for each, steps in zip(fresh, [(0, 1), (1, 2), (2, 3)], strict=True)]
    assert [*chain.from_iterable(parts)] == straight


def test_every_sample_number_can_be_the_first(mined: Path) -> None:
    dataset = dataset_in(mined)
    straight = rows(load_batches(dataset, RankBatches(0, 12, 1), num_workers=0))
    for first in range(12):
        again = rows(load_batches(dataset_in(mined), RankBatches(first, 12, 1), num_workers=0))
        assert again == straight[first:]


def test_a_far_sample_is_loaded_without_those_before_it(mined: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    located: list[int] = []
    dataset = dataset_in(mined)
    locate = dataset.mixture.locate_in_epoch
    object.__setattr__(dataset.mixture, "locate_in_epoch", lambda number: located.append(number) or locate(number))
    (batch,) = load_batches(dataset, RankBatches(10**12, 10**12 + 1, 2), num_workers=0)
    assert located == batch.index.tolist() == [2 * 10**12, 2 * 10**12 + 1]


def test_unreadable_pairs_are_replaced_and_named(damaged: Path) -> None:
    dataset = dataset_in(damaged, video_ratio=1.0)
    bad = {pair.pair_id for pair in read_manifest(damaged)[:2]}
    batches = list(load_batches(dataset, RankBatches(0, 3, TOTAL), num_workers=0))
    faults = [fault for batch in batches for fault in batch.faults]
    # Two epochs of twelve: each bad pair comes twice, and may come again as a replacement.
    assert len(faults) >= 4 and all(any(f"pair {name}:" in fault for name in bad) for fault in faults)
    numbers = {int(fault.split(":")[0].removeprefix("sample ")) for fault in faults}
    assert numbers == {n for n in range(24) if dataset.mixture.locate(n)[1] in (0, 1)}
    repaired = dataset_in(damaged, video_ratio=1.0)
    again = list(load_batches(repaired, RankBatches(0, 3, TOTAL), num_workers=2))
    assert rows(again) == rows(batches)
    assert [_named(fault) for batch in again for fault in batch.faults] == [_named(fault) for fault in faults]
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(24))


def _named(fault: str) -> str:
    """Which sample and which pair, without what the decoder said: that holds an address in memory."""
    return fault.split(": bytes")[0]


def test_a_source_that_is_gone_stops_at_once(tmp_path: Path) -> None:
    root = write_mined_folder(tmp_path / "pairs", with_images=False)
    dataset = dataset_in(root, video_ratio=1.0)
    (root / "shards" / "shard-000000.tar").unlink()
    with pytest.raises(
        DataError, match=r"16 consecutive pairs of the source 'video' .* cannot read .*shard-000000\.tar"
    ):
        dataset[0]


def test_an_image_of_another_size_is_a_fault(mined: Path) -> None:
    dataset = dataset_in(mined)
    pair = dataset.pair_sources[0].pairs[0]
    object.__setattr__(pair, "size_px", (161, 160))
    with pytest.raises(DataError, match=r"are not a complete JPEG \(it has 160 x 160 px, not 160 x 161\)"):
        dataset.transform(pair, np.random.default_rng(0))


def test_a_worker_is_sent_the_way_to_the_manifest_not_the_manifest(tmp_path: Path) -> None:
    sizes = []
    for pairs_per_photo in (2, 40):
        root = write_mined_folder(tmp_path / str(pairs_per_photo), pairs_per_photo, with_images=False)
        write_index(root, root / INDEX_NAME)
        sizes.append(len(pickle.dumps(dataset_in(root, video_ratio=1.0))))
    assert sizes[1] - sizes[0] < 152 * 16  # a number per chosen row; points alone take 160 bytes


@pytest.mark.parametrize("workers", [0, 2])
def test_rendering_on_the_device_gives_the_same_samples(mined: Path, workers: int) -> None:
    batches = RankBatches(0, 2, TOTAL)
    here = list(load_batches(dataset_in(mined, 64), batches, num_workers=0))
    decoded = list(load_batches(dataset_in(mined, 64, augment_on="device"), batches, num_workers=workers))
    assert all(isinstance(batch, DecodedBatch) and batch.images.dtype == torch.uint8 for batch in decoded)
    for cpu, device in zip(here, (batch.to(torch.device("cpu")) for batch in decoded), strict=True):
        assert isinstance(device, TrainBatch)
        for name in ("mask", "key", "index"):
            assert torch.equal(getattr(cpu, name), getattr(device, name)), name
        for name in ("source", "reference"):
            difference = (getattr(cpu, name) - getattr(device, name)).abs() * 127.5
            assert difference.max() < 3 and difference.mean() < 0.1, name


def test_signals_to_the_whole_group_leave_the_loader_working(
    mined: Path, script_environment: Callable[[], dict[str, str]]
) -> None:
    """As a cluster sends them before it takes the machine: the batches of the last step must still come."""
    script = Path(__file__).parents[1] / "helpers" / "signalled_loader.py"
    done = warm_scripts.run(
        [sys.executable, script, mined], env=script_environment(), capture_output=True, text=True, timeout=200
    )
    assert done.stdout.splitlines()[-1:] == ["went on"], done.stderr
