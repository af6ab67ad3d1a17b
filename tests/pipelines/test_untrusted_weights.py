"""Hostile weights: one plain error, little memory, no file left."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import warm_scripts
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from mimicbrush.cli import convert
from mimicbrush.errors import MimicBrushError, WeightsError
from mimicbrush.models.pretrained.check import check_weights
from mimicbrush.models.pretrained.files import read_head, read_network, read_object
from mimicbrush.pipelines import MimicBrushPipeline, folder
from mimicbrush.pipelines.checksums import CHECKSUMS_FILE
from mimicbrush.pipelines.conversion import untrusted_files
from mimicbrush.pipelines.conversion.inspection import inspect_weights
from mimicbrush.pipelines.conversion.untrusted_files import config_of, read_entries, read_files
from mimicbrush.pipelines.open_pipeline import load_pipeline
from mimicbrush.pipelines.small_model import SHIPPED_MODEL

#: A megabyte of file may cost a few of memory; the fixed part is Python's own.
MOST_GROWTH_BYTES = 100 << 20
#: Of generated files, half as many as elsewhere: each is opened by a process of its own.
MOST_FILES = min(250, settings.default.max_examples // 2)
MEASURED = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def copy_small_model(folder: Path) -> None:
    """Copy the shipped pipeline as somebody else may have made it: without the list of what was saved."""
    shutil.copytree(SHIPPED_MODEL, folder)
    (folder / CHECKSUMS_FILE).unlink()


def torch_file(file: Path, program: bytes) -> None:
    """An archive as torch.save makes it, with another pickle."""
    torch.save({}, file)
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, program if name.endswith("data.pkl") else data)


def many_views(file: Path) -> None:
    numbers = torch.zeros(1 << 14)
    torch.save({f"a{number}": numbers[number:] for number in range(500)}, file)


def lists_in_lists(file: Path) -> None:
    content: list[Any] = []
    for _ in range(60):
        content = [content, content]
    torch.save(content, file)


def list_in_itself(file: Path) -> None:
    content: list[Any] = []
    content.append(content)
    torch.save(content, file)


def compressed(file: Path) -> None:
    torch.save({"a": torch.zeros(20 << 20, dtype=torch.uint8)}, file)
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def entries_over_each_other(file: Path) -> None:
    torch.save({"a": torch.zeros(1 << 16)}, file)
    with zipfile.ZipFile(file, "a") as archive:
        whole = next(entry for entry in archive.infolist() if entry.filename.endswith("/data/0"))
        for number in range(1, 200):
            again = zipfile.ZipInfo(whole.filename[:-1] + str(number))
            again.header_offset, again.file_size, again.compress_size = whole.header_offset, whole.file_size, 1 << 18
            again.CRC = whole.CRC
            archive.filelist.append(again)
        archive._didModify = True


def larger_than_stored(file: Path) -> None:
    torch.save({"a": torch.zeros(100)}, file)
    data = file.read_bytes()
    # Both the length of the storage and the shape: 100 in each becomes 200.
    file.write_bytes(data.replace(b"Kd", b"K\xc8"))


#: What a file holds -> how it is written, and how it is refused.
HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "expanded": (
        lambda file: torch.save({"a": torch.zeros(1).expand(1 << 29)}, file),
        r"'a' should have 2,147,483,648 bytes, but only 4 are stored",
    ),
    "expanded, as before PyTorch 1.6": (
        lambda file: torch.save({"a": torch.zeros(1).expand(1 << 29)}, file, _use_new_zipfile_serialization=False),
        r"'a' should have 2,147,483,648 bytes, but only 4 are stored",
    ),
    "rows over each other": (
        lambda file: torch.save(torch.zeros(20000).as_strided((9999, 9999), (1, 1)), file),
        r"should have 399,920,004 bytes, but only 80,000 are stored",
    ),
    "many views": (many_views, r"its tensors share their memory and would need 32,"),
    "lists in lists": (lists_in_lists, "the list of its contents is longer than"),
    "a list in itself": (list_in_itself, "dicts and lists are nested too deeply"),
    "deep": (lambda file: torch_file(file, b"\x80\x02" + b"]" * 50000 + b"a" * 49999 + b"."), "too deep"),
    "a name again and again": (
        lambda file: torch.save({"n" * 200000: [torch.zeros(1) for _ in range(200)]}, file),
        "the list of its contents is longer than",
    ),
    "bytes": (
        lambda file: torch_file(file, b"\x80\x02]" + b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85Ra" * 8 + b"."),
        "it needs more memory than a file of its size may take",
    ),
    "a tensor that is stored nowhere": (
        lambda file: torch_file(file, b"\x80\x02ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85R."),
        "it needs more memory than a file of its size may take",
    ),
    "a smaller one": (
        lambda file: torch_file(file, b"\x80\x02ctorch\nFloatTensor\nJ\xff\xff\xff\x01\x85R."),
        "its tensors claim 134,217,724 bytes, but only 0 are stored",
    ),
    "compressed": (compressed, "is compressed, but PyTorch never compresses"),
    "entries over each other": (entries_over_each_other, r"its entries claim 5\d,\d+,\d+ bytes, but the file has"),
    "larger than stored": (larger_than_stored, "its tensors claim 800 bytes, but only 400 are stored"),
    "sparse": (
        lambda file: torch.save({"a": torch.eye(3).to_sparse()}, file),
        r"contains more than weights: a \(tensor",
    ),
    "meta": (lambda file: torch.save({"a": torch.empty(1 << 40, device="meta")}, file), "contains more than weights"),
    "a key of numbers": (
        lambda file: torch.save({(1, 2): torch.zeros(1)}, file),
        r"contains more than weights:  \(dict",
    ),
    "a name that hides": (lambda file: torch.save({"\x1b[2J\ud800": 3}, file), r"weights: \\x1b\[2J\\ud800 \(int"),
}


@pytest.fixture
def measured(script_environment: Callable[[], dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of the processes that opened pickles, the bytes that their memory grew by."""
    script, grown = tmp_path / "measured.py", list[int]()
    script.write_text(MEASURED)

    def run(command: Sequence[str], *, env: Mapping[str, str], timeout: float, **_: object) -> Any:
        variables = {**env, "PYTHONPATH": script_environment()["PYTHONPATH"]}
        whole = [sys.executable, str(script), *command[2:]]
        done = warm_scripts.run(whole, env=variables, capture_output=True, text=True, timeout=timeout)
        grown.append(int(done.stdout))
        return done

    stand_in = SimpleNamespace(run=run, TimeoutExpired=untrusted_files.subprocess.TimeoutExpired)
    monkeypatch.setattr(untrusted_files, "subprocess", stand_in)
    return grown


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_pickle_costs_nothing(
    kind: str, measured: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, problem = HOSTILE[kind]
    file, scratch = tmp_path / "mimicbrush.bin", tmp_path / "scratch"
    write(file)
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    with pytest.raises(WeightsError, match=problem) as caught:
        read_files([file], scratch=scratch)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1500 and str(file) in message
    assert max(measured) < MOST_GROWTH_BYTES
    assert list(scratch.iterdir()) == []


def head(entries: object, *, data: bytes = b"\0" * 8) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor_entry(begin: int = 0, end: int = 8, shape: Sequence[int] = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 1 << 60),
        struct.pack("<Q", (1 << 64) - 1) + b"{}",
        b"",
        b"\x02\0\0",
        head({"a": tensor_entry(), "b": tensor_entry(4, 8, [1])}),
        head({"a": tensor_entry(dtype="F77")}),
        head(f'{{"a":{json.dumps(tensor_entry(0, 4, [1]))},"a":{json.dumps(tensor_entry())}}}'.encode()),
        head(f'{{"a":{json.dumps(tensor_entry(0, 4, [1]))},"a":{json.dumps(tensor_entry(4, 8, [1]))}}}'.encode()),
        head(f'{{"a":{json.dumps(tensor_entry())},"a":{json.dumps(tensor_entry())}}}'.encode()),
        head({"a": tensor_entry(shape=[1 << 40, 1 << 40])}),
        head({"a": tensor_entry(8, 0)}),
        head({"a": tensor_entry(-1, 8)}),
        head({"a": {**tensor_entry(), "shape": "2"}}),
        head({"a": 3}),
        head([]),
        head(b"[" * 100000),
        head(b"\xff\xfe{}"),
        head(b" " * (17 << 20)),
        head({f"{number:0100}": tensor_entry(0, 0, [0]) for number in range(110000)}, data=b""),
        head({"__metadata__": {"a": "b" * (17 << 20)}, "a": tensor_entry()}),
    ],
)  # fmt: skip
def test_a_hostile_safetensors_file_is_refused(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    for read in (read_head, read_entries, lambda file: read_files([file]), inspect_weights):
        with pytest.raises(WeightsError, match=r"model\.safetensors") as caught:
            read(file)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 1500


def test_shapes_that_only_the_header_can_hold_are_refused(tmp_path: Path) -> None:
    for shape in ([0, 1 << 62, 1 << 62], [1] * 100000 + [2]):
        file = tmp_path / "model.safetensors"
        size = 0 if shape[0] == 0 else 8
        file.write_bytes(head({"a": tensor_entry(0, size, shape)}, data=b"\0" * size))
        try:
            assert read_files([file])[0]["a",].numel() in (0, 2)
        except WeightsError as error:
            assert len(str(error)) < 1500


@cache
def write_whole(kind: str) -> bytes:
    """A file of weights, written once: the bytes of torch.save are others each time."""
    content = {"unet": torch.arange(6.0).reshape(2, 3), "vae": torch.ones(2).half()}
    if kind == "a.safetensors":
        return save(content)
    written = io.BytesIO()
    torch.save(content, written, _use_new_zipfile_serialization=kind == "zip.bin")
    return written.getvalue()


@settings(max_examples=MOST_FILES)
@given(data=st.data())
def test_a_changed_file_is_read_or_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    where = tmp_path_factory.mktemp("changed")
    kind = data.draw(st.sampled_from(["zip.bin", "old.pth", "a.safetensors"]))
    file, whole = where / kind, bytearray(write_whole(kind))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    file.write_bytes(whole)
    try:
        (found,) = read_files([file], scratch=where)
        assert sum(tensor.nbytes for tensor in found.values()) <= 2 * len(whole)
    except WeightsError as error:
        assert str(error).isprintable() and len(str(error)) < 1500
    finally:
        del whole
        left = [path.name for path in where.iterdir()]
        shutil.rmtree(where)
    assert left == [kind]


@settings(max_examples=MOST_FILES)
@given(data=st.binary(max_size=300), suffix=st.sampled_from([".bin", ".safetensors", ".json"]))
def test_bytes_of_any_kind_are_read_or_refused(
    data: bytes, suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("any") / f"model{suffix}"
    file.write_bytes(data)
    try:
        read_object(file) if suffix == ".json" else read_files([file])
    except WeightsError as error:
        assert str(error).isprintable() and len(str(error)) < 1500


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=6,
)


@given(
    key=st.sampled_from(sorted(json.loads((SHIPPED_MODEL / "image_encoder" / "config.json").read_text()))), value=JSON
)
def test_a_config_of_wrong_types_is_refused_or_fits(
    key: str, value: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    where = tmp_path_factory.mktemp("config") / "image_encoder"
    shutil.copytree(SHIPPED_MODEL / "image_encoder", where)
    config = read_object(where / "config.json")
    (where / "config.json").write_text(json.dumps({**config, key: value}))
    try:
        check_weights("image_encoder", "CLIPVisionModelWithProjection", read_network(where, "model"))
    except WeightsError as error:
        assert len(str(error)) < 6000
    finally:
        shutil.rmtree(where.parent)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("unet", b"[" * 200000),
        ("unet", b"[]"),
        ("unet", b"\xff"),
        ("unet", b" " * (17 << 20)),
        ("unet", {"layers_per_block": 10**9}),
        ("unet", {"layers_per_block": 1e300}),
        ("unet", {"layers_per_block": 10**400}),
        ("unet", {"block_out_channels": [64] * 2000}),
        ("unet", {"block_out_channels": "wide"}),
        ("unet", {"block_out_channels": [10**19, 10**19]}),
        ("unet", {"block_out_channels": {"a": 1}}),
        ("unet", {"transformer_layers_per_block": [[10**7]]}),
        ("unet", {"norm_num_groups": 0}),
        ("unet", {"sample_size": "512"}),
        ("unet", {"sample_size": [1, 2]}),
        ("image_encoder", {"num_hidden_layers": 10**9}),
        ("image_encoder", {"hidden_size": -4}),
        ("image_encoder", {"patch_size": 0}),
        ("depth_estimator", {"num_labels": 10**9}),
        ("depth_estimator", {"backbone_config": {"model_type": "dinov2", "num_hidden_layers": 10**9}}),
        ("depth_estimator", {"backbone_config": "dinov2"}),
        ("vae", {"latent_channels": 10**30}),
    ],
)
def test_a_hostile_config_is_refused(part: str, change: dict[str, Any] | bytes, tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    copy_small_model(pipeline)
    file = pipeline / part / "config.json"
    config = json.loads(file.read_text())
    file.write_bytes(change if isinstance(change, bytes) else json.dumps({**config, **change}).encode())
    names = {"image_encoder": "model", "depth_estimator": "model"}
    kinds = folder.class_names(json.loads((SHIPPED_MODEL / "model_index.json").read_text()))

    def check() -> None:
        check_weights(part, kinds[part], read_network(pipeline / part, names.get(part, "diffusion_pytorch_model")))

    refusals = 0
    for read in (check, lambda: config_of(pipeline / part), lambda: folder.read_conventions(pipeline)):
        try:
            read()
        except MimicBrushError as error:
            refusals += 1
            assert len(str(error)) < 6000
    assert refusals


@pytest.mark.parametrize(
    "component",
    [
        ["os", "system"], ["subprocess", "Popen"], ["mimicbrush.cli.train", "main"], ["mimicbrush", "cli"], [None, "x"],
        ["diffusers", 3], ["diffusers"], [], [["diffusers"], "UNet2DConditionModel"], ["diffusers.x", "AutoencoderKL"],
    ],
)  # fmt: skip
def test_an_index_names_only_classes_of_its_own(component: list[Any], tmp_path: Path) -> None:
    copy_small_model(tmp_path / "pipeline")
    index = tmp_path / "pipeline" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "unet": component}))
    for read in (load_pipeline, MimicBrushPipeline.from_pretrained, folder.read_conventions):
        with pytest.raises(WeightsError, match=r"model_index\.json names unet=\[.*expected a class of diffusers"):
            read(tmp_path / "pipeline")


def test_a_component_lies_in_its_pipeline(tmp_path: Path) -> None:
    copy_small_model(tmp_path / "pipeline")
    index = tmp_path / "pipeline" / "model_index.json"
    outside = {"../../secret": ["diffusers", "UNet2DConditionModel"]}
    index.write_text(json.dumps({**json.loads(index.read_text()), **outside}))
    with pytest.raises(WeightsError, match=r"names \.\./\.\./secret="):
        load_pipeline(tmp_path / "pipeline")


def test_a_boundless_head_in_a_pipeline_is_refused(tmp_path: Path) -> None:
    copy_small_model(tmp_path / "pipeline")
    file = tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(head({"__metadata__": {"a": "b" * (17 << 20)}, "a": tensor_entry()}))
    with pytest.raises(WeightsError, match="its header has 17,8"):
        load_pipeline(tmp_path / "pipeline")
    file.write_bytes(save({"a": torch.zeros(1)}))
    with pytest.raises(WeightsError, match=r"unet .*does not fit"):  # the libraries would fill in random numbers
        load_pipeline(tmp_path / "pipeline")


@pytest.mark.parametrize("read", [read_head, read_object])
@pytest.mark.timeout(60)
def test_a_pipe_in_place_of_a_file_is_not_waited_for(read: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "file")
    with pytest.raises(WeightsError, match="a pipe, a socket or a device"):
        read(tmp_path / "file")


@pytest.mark.parametrize("path", ["/dev/null", "absent"])
def test_what_is_no_file_is_said_before_anything_is_imported(path: str) -> None:
    with pytest.raises(MimicBrushError, match=f"{path}: .*; expected a regular file or a folder"):
        convert.check_paths(SimpleNamespace(command="inspect", path=Path(path)))  # type: ignore[arg-type]
