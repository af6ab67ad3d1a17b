from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_data import write_mined_folder
from toy_run import forget_accelerate, metrics, train

from mimicbrush.data.schema import SCHEMA
from mimicbrush.errors import DataError
from mimicbrush.training.guards import ALWAYS_ALLOWED, BadSamples


def test_a_few_faults_never_stop_a_run(tmp_path: Path) -> None:
    bad = BadSamples(0.0, tmp_path / "f")
    bad.count(["x"] * ALWAYS_ALLOWED, ALWAYS_ALLOWED)
    with pytest.raises(
        DataError, match=rf"{ALWAYS_ALLOWED + 1} pairs of {ALWAYS_ALLOWED + 1} samples could not be read"
    ):
        bad.count(["y"], 1)


def test_the_stated_rate_is_allowed_and_no_more(tmp_path: Path) -> None:
    bad = BadSamples(0.01, tmp_path / "f")
    for _ in range(100):
        bad.count(["x"] * 30, 3000)
    with pytest.raises(DataError, match=r"3001 pairs of 300000 samples could not be read(?s:.*)y"):
        bad.count(["y"], 0)


def test_a_disk_that_fails_late_is_noticed_in_its_stretch(tmp_path: Path) -> None:
    bad = BadSamples(0.01, tmp_path / "f")
    bad.count([], 1_000_000)
    with pytest.raises(DataError, match="50 pairs of 3000 samples could not be read"):
        bad.count(["x"] * 50, 3000)


def test_faults_are_written_as_they_come(tmp_path: Path) -> None:
    bad = BadSamples(0.5, tmp_path / "f")
    bad.write([])
    assert not (tmp_path / "f").exists()
    bad.write(["one", "two"])
    bad.write(["three"])
    assert (tmp_path / "f").read_text() == "one\ntwo\nthree\n"


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    yield
    forget_accelerate()


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.slow
@pytest.mark.parametrize(("bad", "goes_on"), [(1, True), (ALWAYS_ALLOWED + 1, False)])
def test_of_a_thousand_samples_one_may_be_bad_and_more_than_the_limit_may_not(
    tmp_path: Path, bad: int, goes_on: bool
) -> None:
    """A thousand rows, each met once, of which some claim a length of 2^62 for a name with a NUL."""
    root = write_mined_folder(tmp_path / "pairs", with_images=False, size_px=32)
    part = root / "manifest" / "part-000000.parquet"
    rows = [{**row, "pair_id": f"pair-{n}"} for n, row in enumerate(pq.read_table(part).to_pylist() * 84)][:1000]
    for row in rows[: 97 * bad : 97]:
        row |= {"file": "shards/\0.tar", "a_length": 2**62}
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), part)
    options = ["data.heldout_ratio=0", "data.video_ratio=1", "train.batch_size=100", "train.total_batch_size=100"]
    options += ["train.max_steps=10", "train.log_every=5", "train.checkpoint_every=100"]
    if goes_on:
        assert train(root, tmp_path / "run", *options) == 0
    else:
        with pytest.raises(DataError, match=r"of 1000 samples could not be read(?s:.*)The state after step 10 is"):
            train(root, tmp_path / "run", *options)
    faults = (tmp_path / "run" / "bad_samples.txt").read_text().splitlines()
    logged = metrics(tmp_path / "run")
    assert logged[-1]["step"] == 10 and sum(values["bad_samples"] for values in logged) == len(faults)
    assert len(faults) == 1 if goes_on else len(faults) > ALWAYS_ALLOWED
