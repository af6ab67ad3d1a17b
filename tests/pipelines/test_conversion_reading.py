"""Foreign files: read without being trusted, or refused with a word why."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mimicbrush.errors import WeightsError
from mimicbrush.models.pretrained.stored_weights import POSITION_IDS, check_fit, rename_vae_attention
from mimicbrush.pipelines.conversion import untrusted_files
from mimicbrush.pipelines.conversion.inspection import inspect_weights
from mimicbrush.pipelines.conversion.key_maps import (
    split_parts,
    with_position_ids,
    without_position_ids,
)
from mimicbrush.pipelines.conversion.untrusted_files import read_entries, read_files, read_state_dict, weights_of


class Malicious:
    """Pickles as a call of os.system, which loading would make."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.file}",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted_files, "subprocess", subprocess)  # the real process
    file, trace = tmp_path / "mimicbrush.bin", tmp_path / "trace"
    torch.save({"unet": {"weight": torch.zeros(3)}, "more": Malicious(trace)}, file)
    with pytest.raises(WeightsError, match=r"is refused: .*posix\.system.*run code .* none of it was run"):
        read_files([file])
    assert not trace.exists()
    torch.load(file, weights_only=False)  # what it would have done
    assert trace.exists()


def test_damaged_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, cut = tmp_path / "good.bin", tmp_path / "cut.bin"
    torch.save({"weight": torch.zeros(1000)}, good)
    cut.write_bytes(good.read_bytes()[:2000])
    with pytest.raises(WeightsError, match=r"cut\.bin cannot be read: it is damaged or incomplete"):
        read_files([good, cut])
    torch.save({"weight": torch.zeros(1000), "epoch": 3}, good)
    with pytest.raises(WeightsError, match=r"good\.bin contains more than weights: epoch \(int\)"):
        read_files([good])
    save_file({"weight": torch.zeros(1000)}, tmp_path / "good.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "good.safetensors").read_bytes()[:2000])
    for read in (lambda file: read_files([file]), read_entries):
        with pytest.raises(WeightsError, match=r"cut\.safetensors cannot be read"):
            read(cut)
    with pytest.raises(WeightsError, match="no such file"):
        read_files([tmp_path / "nowhere.bin"])
    with pytest.raises(WeightsError, match=r"of an unknown type; expected a file that ends in \.safetensors, \.bin"):
        (tmp_path / "weights.zip").write_bytes(b"")
        read_files([tmp_path / "weights.zip"])
    monkeypatch.setattr(untrusted_files, "subprocess", subprocess)
    with pytest.raises(WeightsError, match=r"could not be read within 0\.01 s"):
        read_files([good], timeout_s=0.01)


def test_tensors_of_any_kind_come_out_as_they_are(tmp_path: Path) -> None:
    whole = torch.randn(6, 4)
    nested = {
        "unet": {
            "a": whole,
            "tied": whole,
            "turned": whole.T,
            "rows": whole[2:4],
            "half": whole.half(),
            "conjugate": torch.tensor([1 + 2j, 3 - 1j]).conj(),
        },
        "more": [torch.nn.Parameter(whole), torch.zeros(0), torch.tensor(3)],
    }
    torch.save(nested, tmp_path / "zip.bin")
    torch.save(nested, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file({"a.b": whole}, tmp_path / "a.safetensors")
    files = [tmp_path / name for name in ("zip.bin", "old.pth", "a.safetensors")]
    for content in (contents := read_files(files))[:2]:
        for key, tensor in nested["unet"].items():
            found = content["unet", key]
            assert torch.equal(found, tensor) and found.dtype == tensor.dtype and found.is_contiguous()
        assert torch.equal(content["more", "0"], whole) and content["more", "1"].shape == (0,)
        assert content["more", "2"] == 3
    assert list(contents[2]) == [("a.b",)]
    assert read_state_dict([tmp_path / "a.safetensors"]).keys() == {"a.b"}


def test_which_file_a_folder_means(tmp_path: Path) -> None:
    unet = tmp_path / "unet"
    unet.mkdir()
    with pytest.raises(WeightsError, match="contains no weights"):
        weights_of(tmp_path, "unet")
    for name in ("diffusion_pytorch_model.fp16.safetensors", "other.pth"):
        (unet / name).write_bytes(b"")
    with pytest.raises(WeightsError, match="several weights files, name one of them"):
        weights_of(unet)
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {"weight_map": {"a": shards[1], "b": shards[0], "c": shards[1]}}
    (unet / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights_of(tmp_path, "unet") == [unet / name for name in shards]
    (unet / "diffusion_pytorch_model.bin").write_bytes(b"")
    assert weights_of(unet) == [unet / name for name in shards]  # safetensors go before pickles
    (unet / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert weights_of(unet) == [unet / "diffusion_pytorch_model.safetensors"]
    with pytest.raises(WeightsError, match="no such file or folder"):
        weights_of(tmp_path / "nowhere")


def test_two_tensors_under_one_name_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "mimicbrush.bin"
    torch.save({"a": {1: torch.zeros(1), "1": torch.ones(1)}}, file)
    for read in (lambda: read_files([file]), lambda: read_entries(file)):
        with pytest.raises(WeightsError, match=r"mimicbrush\.bin contains 2 tensors with the same name, a / 1"):
            read()


def write_shards(folder: Path, shards: dict[str, tuple[str, ...]], weight_map: dict[str, str]) -> None:
    for name, keys in shards.items():
        save_file({key: torch.zeros(1) for key in keys}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_key_in_two_shards_is_refused(tmp_path: Path) -> None:
    names = {"a": "1.safetensors", "b": "2.safetensors"}
    write_shards(tmp_path, {"1.safetensors": ("a",), "2.safetensors": ("b", "a")}, names)
    for read in (lambda: read_state_dict(weights_of(tmp_path)), lambda: inspect_weights(tmp_path)):
        with pytest.raises(WeightsError, match=r"^a appears twice: in .*1\.safetensors and in .*2\.safetensors"):
            read()


@pytest.mark.parametrize(
    ("held", "problem"),
    [
        (("b", "c"), r"it says that c is in no file, but it is in .*2\.safetensors"),
        ((), r"it says that b is in .*2\.safetensors, but it is in no file"),
    ],
)
def test_an_index_must_fit_its_shards(tmp_path: Path, held: tuple[str, ...], problem: str) -> None:
    names = {"a": "1.safetensors", "b": "2.safetensors"}
    write_shards(tmp_path, {"1.safetensors": ("a",), "2.safetensors": ("b",)}, names)
    assert read_state_dict(weights_of(tmp_path)).keys() == {"a", "b"}
    write_shards(tmp_path, {"2.safetensors": held}, names)
    with pytest.raises(WeightsError, match=rf"model\.safetensors\.index\.json does not fit its shards: {problem}"):
        read_state_dict(weights_of(tmp_path))
    write_shards(tmp_path, {"2.safetensors": ("b",)}, {"a": "2.safetensors", "b": "1.safetensors"})
    with pytest.raises(WeightsError, match=r"it says that a is in .*2\.safetensors, but it is in .*1\.safetensors"):
        read_state_dict(weights_of(tmp_path))


@pytest.mark.parametrize("name", ["../secret.safetensors", "sub/1.safetensors", "/etc/1.safetensors", "..", ""])
def test_shards_lie_beside_their_index(tmp_path: Path, name: str) -> None:
    write_shards(tmp_path, {}, {"a": name})
    expected = r"index\.json: the shard of a is '.*', expected the name of a file in the same folder"
    with pytest.raises(WeightsError, match=expected):
        weights_of(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {}}')
    with pytest.raises(WeightsError, match="is damaged: it has no weight_map"):
        weights_of(tmp_path)


def test_shards_of_a_hub_cache_are_links(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "blobs" / "1234")
    (tmp_path / "snapshot" / "1.safetensors").symlink_to("../blobs/1234")
    write_shards(tmp_path / "snapshot", {}, {"a": "1.safetensors"})
    assert read_state_dict(weights_of(tmp_path / "snapshot")).keys() == {"a"}


def test_at_most_ten_problems_are_listed() -> None:
    expected = {f"layer{number}": torch.zeros(2) for number in range(14)}
    with pytest.raises(WeightsError) as caught:
        check_fit("unet", {"layer0": torch.zeros(3)}, expected)
    lines = str(caught.value).splitlines()
    assert lines[1] == "  layer0 has shape (3,), expected (2,)" and len(lines) == 12
    assert lines[-1] == "  and 4 more"


def test_a_checkpoint_has_five_parts() -> None:
    parts = ("unet", "referencenet", "image_proj", "depth_guider", "image_encoder")
    whole = {(part, "weight"): torch.zeros(1) for part in parts}
    assert list(split_parts(whole, "x.bin")) == list(parts)
    del whole["image_proj", "weight"]
    with pytest.raises(WeightsError, match="it lacks image_proj and it also has state_dict/unet/weight"):
        split_parts({**whole, ("state_dict", "unet", "weight"): torch.zeros(1)}, "x.bin")
    with pytest.raises(WeightsError, match="it also has a bare tensor"):
        split_parts({(): torch.zeros(1)}, "x.bin")


def test_position_ids_go_and_come_back() -> None:
    weights = {"vision_model.embeddings.position_embedding.weight": torch.zeros(5, 2)}
    stored = with_position_ids(weights)
    assert stored[POSITION_IDS].tolist() == [[0, 1, 2, 3, 4]]
    assert without_position_ids(stored).keys() == without_position_ids(weights).keys() == weights.keys()
    with pytest.raises(WeightsError, match="with the numbers 0 to 4 in order"):
        without_position_ids({**stored, POSITION_IDS: stored[POSITION_IDS] + 1})


def test_old_names_of_the_autoencoder() -> None:
    attention = "encoder.mid_block.attentions.0"
    old = {
        f"{attention}.{name}.weight": torch.zeros(1) for name in ("query", "key", "value", "proj_attn", "group_norm")
    }
    names = ("to_q", "to_k", "to_v", "to_out.0", "group_norm")
    assert list(rename_vae_attention(old)) == [f"{attention}.{name}.weight" for name in names]
    assert list(rename_vae_attention(rename_vae_attention(old))) == list(rename_vae_attention(old))
    with pytest.raises(WeightsError, match="appears twice, under its old and its new name"):
        rename_vae_attention({**old, f"{attention}.to_q.weight": torch.zeros(1)})


def test_a_file_that_is_no_weights_is_not_taken_for_its_neighbour(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "picture.jpg").write_bytes(b"")
    assert weights_of(tmp_path / "config.json") == weights_of(tmp_path) == [tmp_path / "model.safetensors"]
    with pytest.raises(WeightsError, match=r"picture\.jpg is not a weights file"):
        weights_of(tmp_path / "picture.jpg")
