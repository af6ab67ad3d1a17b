"""Fixed views, encoded once: training from them equals training that encodes the same views itself."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loaded_batches import load_batches
from measurements.encoded_views import count_full_size
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy_run import SMALLEST, everything, forget_accelerate, metrics, train

from mimicbrush.assembly import encoding
from mimicbrush.cli.dev import encode_views as command
from mimicbrush.data import encoded_views
from mimicbrush.data.dataset import EncodedSample, PairDataset, Sample
from mimicbrush.data.encoded_views import open_encoded_folder
from mimicbrush.data.options import DataOptions
from mimicbrush.data.pair import Pair
from mimicbrush.data.pair_sources import load_pair_sources
from mimicbrush.data.sampler import RankBatches
from mimicbrush.errors import DataError, InputError, LockedError
from mimicbrush.training import method
from mimicbrush.training.checkpoints import checkpoint_path
from mimicbrush.training.objective import FrozenEncoders
from mimicbrush.types import EncodedViews

COUNT = 2
#: Both of ours that read more of a batch than the paper's loss does.
VIEWS = [f"data.fixed_views={COUNT}", "train.correspondence_weight=0.3", "train.unrelated_reference_ratio=0.3"]
#: So many rows has a shard of the tests: four of the 16 views, in batches of two.
ROWS_PER_SHARD = 5


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    forget_accelerate()


def encode(mined: Path, output: Path, *more: str) -> None:
    """What the command does, in this process, with several shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["encode_views.py", *SMALLEST, *VIEWS, f"data.root={mined}", "--output", str(output), *more]
        )
        honest = encoding._plan_folder
        patch.setattr(encoding, "_plan_folder", lambda *args: replace(honest(*args), rows_per_shard=ROWS_PER_SHARD))
        command.main()


@pytest.fixture(scope="module")
def exact(mined: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoded in float32."""
    encode(mined, folder := tmp_path_factory.mktemp("exact") / "views", "--precision", "float32")
    return folder


@pytest.fixture(scope="module")
def half(mined: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoded in half precision."""
    encode(mined, folder := tmp_path_factory.mktemp("half") / "views")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def record(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The conditions, noise, drops and matches of every pass."""
    fed: list[tuple[Any, ...]] = []
    honest = method.denoising_loss

    def recording(model: Any, scheduler: Any, conditions: Any, noise_sample: Any, *rest: Any) -> Any:
        places = rest[1]
        used = [each[places.is_match] for each in (places.source_xy, places.reference_xy)] + [places.is_match]
        fed.append((*vars(conditions).values(), *vars(noise_sample).values(), *used))
        return honest(model, scheduler, conditions, noise_sample, *rest)

    monkeypatch.setattr(method, "denoising_loss", recording)
    return fed


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("an image was decoded, or a frozen encoder ran")


def test_stored_views_train_as_live_ones_do(
    mined: Path, exact: Path, half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*VIEWS, "train.max_steps=4", "train.log_every=1", "train.reference_drop_ratio=0.3"]
    fed = record(monkeypatch)
    runs = {}
    for name, more in {
        "live": [],
        "exact": [f"data.encoded_views={exact}"],
        "half": [f"data.encoded_views={half}"],
    }.items():
        if more:
            monkeypatch.setattr(Pair, "read", refuse)
            monkeypatch.setattr(FrozenEncoders, "encode", refuse)
        train(mined, tmp_path / name, *options, *more)
        runs[name] = list(fed)
        fed.clear()
    assert all(len(passes) == 4 for passes in runs.values())
    for drops in (9, 10):  # some references and depth maps are dropped, and some are not
        kept = torch.cat([one[drops] for one in runs["live"]])
        assert kept.any() and not kept.all()
    for live, stored, rounded in zip(runs["live"], runs["exact"], runs["half"], strict=True):
        for one, other, halved in zip(live, stored, rounded, strict=True):
            assert one.shape == other.shape == halved.shape
            # Half precision has 11 bits. The latents are a sum of two such numbers.
            # Live, some rows of a batch alone are encoded, which rounds in another way.
            assert torch.allclose(one.float(), other.float(), rtol=1e-5, atol=1e-5)
            assert torch.allclose(one.float(), halved.float(), rtol=2**-10, atol=2**-10)
    for live_line, stored_line, half_line in zip(*(metrics(tmp_path / name) for name in runs), strict=True):
        for name in ("loss", "loss_inside", "loss_outside", "loss_correspondence", "gradient_norm"):
            if live_line.get(name) is None:
                assert stored_line.get(name) is None and half_line.get(name) is None
            else:
                assert stored_line[name] == pytest.approx(live_line[name], rel=1e-5)
                assert half_line[name] == pytest.approx(live_line[name], rel=5e-3)


@pytest.mark.slow
def test_a_resumed_run_from_stored_views_gives_the_same_bits(mined: Path, half: Path, tmp_path: Path) -> None:
    options = [*VIEWS, f"data.encoded_views={half}", "train.checkpoint_every=5"]
    train(mined, tmp_path / "straight", *options, "train.max_steps=5")
    for stop, workers in ((2, 0), (5, 1)):
        more = [f"train.max_steps={stop}", f"data.num_workers={workers}", "train.resume=latest"]
        train(mined, tmp_path / "resumed", *options, *more)
    a, b = (everything(checkpoint_path(tmp_path / run / "checkpoints", 5)) for run in ("straight", "resumed"))
    assert a.keys() == b.keys() and [key for key in a if not torch.equal(a[key], b[key])] == []


def stored_dataset(mined: Path, folder: Path, unrelated: float = 0.3) -> PairDataset:
    """As a loader's process has it."""
    options = DataOptions(root=str(mined), fixed_views=COUNT, encoded_views=str(folder))
    encoded = open_encoded_folder(folder)
    pair_sources = load_pair_sources(options)
    dataset = PairDataset(pair_sources, 16, options, seed=0, num_matches=64, unrelated_ratio=unrelated, encoded=encoded)
    copied: PairDataset = pickle.loads(pickle.dumps(dataset))
    return copied


def test_views_with_several_references_are_refused(mined: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"have one reference each; leave out data\.num_references \(got 2\)"):
        encode(mined, tmp_path / "views", "data.num_references=2")
    assert not (tmp_path / "views").exists()


def test_two_ranks_get_the_samples_of_one(mined: Path, half: Path) -> None:
    dataset = stored_dataset(mined, half)
    [whole] = load_batches(dataset, RankBatches(1, 2, 8), num_workers=0)
    parts = [
        next(load_batches(dataset, RankBatches(1, 2, 4, rank=rank, world_size=2), num_workers=0)) for rank in (0, 1)
    ]
    assert isinstance(whole, EncodedViews) and whole.image_tokens.dtype == torch.float16
    for name in ("mean", "std", "latent_mask", "image_tokens", "depth_map", "key", "index"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
    assert whole.to(torch.device("cpu")).depth_map.dtype == torch.float32


def test_killed_and_shared_encoding_gives_the_same_bytes(mined: Path, half: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    honest, encoded = encoded_views.write_json, []

    def kill_before_the_second_marker(path: Path, value: Any) -> None:
        if path.name == "views-000001.json":
            raise Killed
        honest(path, value)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(encoded_views, "write_json", kill_before_the_second_marker)
        encode(mined, tmp_path / "killed")
    with pytest.raises(DataError, match=r"3 of 4 shards are missing; run the same"):
        open_encoded_folder(tmp_path / "killed")
    with pytest.MonkeyPatch.context() as patch:
        counted = FrozenEncoders.encode_views
        patch.setattr(FrozenEncoders, "encode_views", lambda *args: encoded.append(len(args[1])) or counted(*args))
        encode(mined, tmp_path / "killed")
    assert sum(encoded) == 16 - ROWS_PER_SHARD
    encode(mined, tmp_path / "shared", "--part", "1/2")
    with pytest.MonkeyPatch.context() as patch:  # as torchrun starts a process
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
            patch.setenv(name, value)
        encode(mined, tmp_path / "shared")
    assert files(tmp_path / "killed") == files(tmp_path / "shared") == files(half)


def test_a_damaged_shard_is_found_when_it_is_read_and_made_again(
    mined: Path, half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(mined, output := tmp_path / "views")
    folder = open_encoded_folder(output)
    data = bytearray(folder.shard_path(2).read_bytes())
    data[len(data) // 2] ^= 1
    folder.shard_path(2).write_bytes(data)
    encoded_views._open_shard.cache_clear()
    failed = 0
    for row in range(10, 15):
        try:
            folder.read_row(row)
        except DataError as error:
            failed += 1
            assert "damaged (different CRC-32). Run mimicbrush encode-views with --verify" in str(error)
    assert failed == 1
    # Training replaces it, as it does a damaged image.
    dataset = stored_dataset(mined, output)
    faults = [fault for number in range(32) for fault in dataset[number].faults]
    assert faults and all("CRC-32" in fault for fault in faults)
    with pytest.raises(DataError, match=r"1 of 4 shards .* missing or damaged: views-000002.safetensors"):
        encode(mined, output, "--verify")
    encode(mined, output)
    encode(mined, output, "--verify")
    assert capsys.readouterr().out.endswith(f"all 4 shards in {output} are intact\n")
    assert files(output) == files(half)


def read_all(folder: Path) -> list[str]:
    """What is said of the rows that cannot be read."""
    encoded_views._open_shard.cache_clear()
    opened, told = open_encoded_folder(folder), []
    for row in range(opened.num_rows):
        try:
            opened.read_row(row)
        except DataError as error:
            told.append(str(error))
    return told


def copy_of(half: Path, folder: Path) -> tuple[Path, Path, Path]:
    """A folder of its own, the first shard in it, and that shard's marker."""
    shutil.copytree(half, folder)
    opened = open_encoded_folder(folder)
    return folder, opened.shard_path(0), opened.marker_path(0)


def test_a_shard_in_the_place_of_another_is_refused(half: Path, tmp_path: Path) -> None:
    folder, shard, _ = copy_of(half, tmp_path / "views")
    shutil.copyfile(open_encoded_folder(folder).shard_path(1), shard)
    told = read_all(folder)
    assert len(told) == ROWS_PER_SHARD and all("cannot be read (it is another shard). Run" in each for each in told)


@pytest.mark.parametrize("about", ["[]", "3", "[" * 100_000, "{}", '{"place": PLACE, "faults": 3}', None])
def test_a_shard_with_a_strange_head_is_refused(half: Path, tmp_path: Path, about: str | None) -> None:
    folder, shard, marker = copy_of(half, tmp_path / "views")
    with safe_open(shard, "pt") as opened:
        place = json.dumps(json.loads(opened.metadata()["about"])["place"])
    save_file(load_file(shard), shard, None if about is None else {"about": about.replace("PLACE", place)})
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "bytes": shard.stat().st_size}))
    told = read_all(folder)
    assert len(told) == ROWS_PER_SHARD and all("cannot be read" in each for each in told)


def test_what_nests_too_deep_is_damaged(mined: Path, half: Path, tmp_path: Path) -> None:
    folder, _, marker = copy_of(half, tmp_path / "views")
    marker.write_text("[" * 100_000)
    with pytest.raises(DataError, match="1 of 4 shards are missing"):
        open_encoded_folder(folder)
    for text in ("[" * 100_000, (half / "views.json").read_text().replace('"num_rows": 16', '"num_rows": 1e999')):
        (folder / "views.json").write_text(text)
        with pytest.raises(DataError, match=r"views\.json cannot be read"):
            open_encoded_folder(folder)


def test_damaged_constants_are_refused_and_written_anew(mined: Path, half: Path, tmp_path: Path) -> None:
    folder, _, _ = copy_of(half, tmp_path / "views")
    file = folder / "constants.safetensors"
    content = load_file(file)
    save_file({**content, "no_image_tokens": content["no_image_tokens"] * 2}, file)
    with pytest.raises(DataError, match=r"\(different CRC-32\); run the same"):
        train(mined, tmp_path / "run", *VIEWS, f"data.encoded_views={folder}", "train.max_steps=1")
    save_file({"other": content["no_depth_map"]}, file)
    with pytest.raises(DataError, match="cannot be read"):
        encode(mined, folder, "--verify")
    encode(mined, folder)
    assert files(folder) == files(half)


def test_parts_of_another_count_do_not_meet(mined: Path, tmp_path: Path) -> None:
    folder = tmp_path / "views"
    with encoding._hold_part(folder, (0, 2)):
        with encoding._hold_part(folder, (1, 2)):
            pass
        for part in ("0/3", "0/1"):
            with pytest.raises(LockedError, match="is in use by process"):
                encode(mined, folder, "--part", part)
    encode(mined, folder, "--part", "0/3")
    assert sorted(path.name[0] for path in folder.iterdir()) == ["c", "m", "s", "v"]


def test_a_pair_that_could_not_be_read_is_replaced_as_it_would_be_live(
    mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest: Callable[..., Any] = Pair.read
    options = DataOptions(root=str(mined), fixed_views=COUNT)
    bad = load_pair_sources(options)[0].pairs[1].pair_id

    def read(pair: Pair, *arguments: Any) -> Any:
        if pair.pair_id == bad:
            raise DataError(f"pair {bad}: its disk is gone")
        return honest(pair, *arguments)

    monkeypatch.setattr(Pair, "read", read)
    encode(mined, output := tmp_path / "views", "--precision", "float32")
    live = PairDataset(load_pair_sources(options), 16, options, seed=0)
    stored = stored_dataset(mined, output, unrelated=0.0)
    num_replaced = 0
    for number in range(32):
        one, other = live[number], stored[number]
        assert isinstance(one, Sample) and isinstance(other, EncodedSample)
        mask = other.tensors["latent_mask"]
        of_pixels = F.interpolate(torch.from_numpy(one.mask)[None, None].float(), mask.shape[1:])[0]
        assert torch.equal(of_pixels.byte(), mask)
        assert len(one.faults) == len(other.faults)
        assert all("its disk is gone" in fault for fault in (*one.faults, *other.faults))
        num_replaced += len(one.faults)
    assert num_replaced > 0


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("data.geometry.flip_probability=0.4", "data.geometry.flip_probability: 0.5 in the folder, 0.4 now"),
        ("data.fixed_views=3", "data.fixed_views: 2 in the folder, 3 now"),
        ("data.video_ratio=1", "pairs 1 (image): "),
        ("seed=1", "frozen networks: "),  # of a toy they are random
    ],
)
def test_views_of_other_settings_are_refused(mined: Path, half: Path, tmp_path: Path, changed: str, named: str) -> None:
    with pytest.raises(DataError) as refused:
        train(mined, tmp_path / "run", *VIEWS, f"data.encoded_views={half}", "train.max_steps=1", changed)
    message = str(refused.value)
    assert f"data.encoded_views={half} was encoded with other settings:\n  {named}" in message
    assert "or encode into another folder with mimicbrush encode-views" in message
    if changed == "data.fixed_views=3":
        with pytest.raises(DataError, match=f"--output {half} was encoded with other settings"):
            encode(mined, half, changed)


def test_what_does_not_fit_half_precision_is_refused(
    mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest: Callable[..., EncodedViews] = FrozenEncoders.encode_views

    def encode_far(encoders: FrozenEncoders, batch: Any) -> EncodedViews:
        views = honest(encoders, batch)
        views.depth_map = views.depth_map + 1e5
        return views

    monkeypatch.setattr(FrozenEncoders, "encode_views", encode_far)
    with pytest.raises(DataError, match=r"depth_map of view 0 does not fit into float16 .*--precision float32"):
        encode(mined, tmp_path / "views")


def test_the_size_is_printed_before_and_alone(mined: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encode(mined, tmp_path / "views", "--size")
    told = capsys.readouterr().out
    assert told.startswith("8 pairs x 2 views x ") and "part 0 of 1: 4 shards with 16 views" in told
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_encoded_is_refused(mined: Path, half: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"give data\.fixed_views=K \(K is the number of views"):
        encode(mined, tmp_path / "views", "data.fixed_views=0")
    with pytest.raises(InputError, match="is, or is inside, the mined folder"):
        encode(mined, mined / "views")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(InputError, match="has other files than encoded views"):
        encode(mined, tmp_path / "other")
    with pytest.raises(DataError, match="is not a folder of encoded views"):
        train(mined, tmp_path / "run", *VIEWS, f"data.encoded_views={tmp_path / 'other'}", "train.max_steps=1")
    with pytest.raises(DataError, match="has views of another precision"):
        encode(mined, half, "--precision", "float32")
    for part in ("3/3", "1", "-1/2", "a/b"):
        with pytest.raises(SystemExit):
            encode(mined, tmp_path / "views", f"--part={part}")


@pytest.mark.slow
def test_what_a_full_size_sample_saves_by_count() -> None:
    counted = count_full_size()
    # Of the 9.13 TFLOP, 3 x 1.117 are the VAE's, and 0.72 those of the two other encoders.
    assert counted["live_gflop"] == pytest.approx(9130, rel=2e-3)
    assert counted["live_gflop"] - counted["encoded_gflop"] == pytest.approx(3 * 1117 + 720, rel=1e-2)
    halves = 2 * 3 * 4 * 64**2 + 257 * 1280 + 518**2
    matches = 64 * (2 * 2 * 4 + 1)
    assert counted["bytes_per_view"] == 2 * halves + 64**2 + matches
