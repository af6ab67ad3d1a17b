"""A pipeline to a folder, to the hub and back, as diffusers users know it."""

from __future__ import annotations

import json
import shutil
import types
from collections.abc import Callable
from pathlib import Path

import diffusers.pipelines.pipeline_utils
import diffusers.utils.hub_utils
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file
from toy_edit import build, latents_of

from mimicbrush.errors import InputError
from mimicbrush.models.options import ToyModel
from mimicbrush.pipelines import MimicBrushPipeline
from mimicbrush.pipelines import hub as pipeline_hub
from mimicbrush.pipelines.checksums import CHECKSUMS_FILE

CONVENTIONS = {
    "reference_blend": 0.5,
    "reference_timestep": "zero",
    "depth_convention": "released",
    "no_depth_convention": "zero_input",
    "letterbox_order": "pad_then_resize",
    "posterior": "mean",
    "default_num_inference_steps": 7,
    "default_guidance_scale": 2.5,
}


def load(folder: Path, **options: object) -> MimicBrushPipeline:
    pipe = MimicBrushPipeline.from_pretrained(folder, local_files_only=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def networks(pipe: MimicBrushPipeline) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def json_without_folder(content: bytes) -> dict[str, object]:
    return {key: value for key, value in json.loads(content).items() if key != "_name_or_path"}


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    """Equal but for how the same weights lie in memory, which chooses among kernels."""
    torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def weights_of(names: list[str], ending: str) -> set[str]:
    return {name.split("/")[0] for name in names if name.endswith(ending)}


@pytest.fixture(scope="module")
def pipe(smallest: ToyModel) -> MimicBrushPipeline:
    return build(smallest, **CONVENTIONS)


@pytest.fixture(scope="module")
def saved(pipe: MimicBrushPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    pipe.save_pretrained(folder)
    return folder


def test_saving_and_loading_changes_nothing(pipe: MimicBrushPipeline, saved: Path) -> None:
    loaded = load(saved)
    assert {name: loaded.config[name] for name in CONVENTIONS} == CONVENTIONS
    assert type(loaded.scheduler) is type(pipe.scheduler)
    assert {**pipe.scheduler.config, **loaded.scheduler.config, "_use_default_values": None} == {
        **pipe.scheduler.config,
        "_use_default_values": None,
    }
    for name, network in networks(pipe).items():
        other = getattr(loaded, name)
        assert type(other) is type(network) and other.dtype == network.dtype and not other.training
        assert other.state_dict().keys() == network.state_dict().keys()
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in network.state_dict().items())
    for options in ({}, {"keep_shape": True, "guidance_scale": 1.0}):
        close(latents_of(loaded, **options), latents_of(pipe, **options))


def test_saving_what_was_loaded_writes_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    load(saved).save_pretrained(tmp_path / "once")
    once = files(tmp_path / "once")
    assert once.keys() == files(saved).keys()
    for name, content in files(saved).items():
        # The configs of transformers and diffusers note the type and the folder that they were loaded with.
        noted = name.endswith("config.json") or name in ("model_index.json", CHECKSUMS_FILE)
        assert once[name] == content or noted, name
    shutil.copytree(tmp_path / "once", tmp_path / "moved")
    load(tmp_path / "once").save_pretrained(tmp_path / "once")  # over itself
    assert files(tmp_path / "once").keys() == once.keys()
    for name, content in files(tmp_path / "once").items():
        same = content == once[name] or name == CHECKSUMS_FILE
        assert same or json_without_folder(content) == json_without_folder(once[name]), name
    load(tmp_path / "moved")


def test_only_safetensors_are_written_and_read(saved: Path) -> None:
    endings = {path.suffix for path in saved.rglob("*") if path.is_file()}
    assert endings == {".json", ".safetensors", ".md"}
    assert isinstance(load(saved, use_safetensors=True), MimicBrushPipeline)


def test_pickled_weights_are_neither_read_nor_written(pipe: MimicBrushPipeline, saved: Path, tmp_path: Path) -> None:
    for name, pickle in (("unet", "diffusion_pytorch_model.bin"), ("image_encoder", "pytorch_model.bin")):
        folder = tmp_path / name
        shutil.copytree(saved, folder)
        (weights,) = (folder / name).glob("*.safetensors")
        torch.save(load_file(weights), folder / name / pickle)
        with pytest.raises(InputError, match=r"use_safetensors=False is not supported: .*mimicbrush convert"):
            load(folder, use_safetensors=False)
        load(folder)  # takes the safetensors beside it
        weights.unlink()
        for options in ({}, {"use_safetensors": None}, {"use_safetensors": True}):
            with pytest.raises(OSError, match=r"no file named \w+\.safetensors"):
                load(folder, **options)
    for save in (pipe.save_pretrained, pipe.push_to_hub):
        with pytest.raises(InputError, match=r"safe_serialization=False is not supported: .*mimicbrush convert"):
            save(str(tmp_path / "new"), safe_serialization=False)
    assert not (tmp_path / "new").exists()


def test_a_swapped_scheduler_is_saved_too(pipe: MimicBrushPipeline, tmp_path: Path) -> None:
    euler = MimicBrushPipeline(**{**pipe.components, "scheduler": EulerDiscreteScheduler()})
    euler.save_pretrained(tmp_path)
    assert isinstance(load(tmp_path).scheduler, EulerDiscreteScheduler)


def test_a_component_can_be_handed_in_when_loading(pipe: MimicBrushPipeline, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "some")
    shutil.rmtree(tmp_path / "some" / "unet")
    with pytest.raises(OSError, match=r"no file named config.json"):
        load(tmp_path / "some")
    loaded = load(tmp_path / "some", unet=pipe.unet)
    assert loaded.unet.state_dict().keys() == pipe.unet.state_dict().keys()
    close(latents_of(loaded), latents_of(pipe))


def test_weights_are_loaded_in_the_type_that_is_asked_for(pipe: MimicBrushPipeline, saved: Path) -> None:
    loaded = load(saved, dtype=torch.bfloat16)
    assert {network.dtype for network in networks(loaded).values()} == {torch.bfloat16}
    exact = latents_of(pipe)
    assert (latents_of(loaded).float() - exact).norm() / exact.norm() < 10 * 2**-8  # see test_like_diffusers


def test_types_can_be_named_for_each_component(saved: Path) -> None:
    loaded = load(saved, dtype={"unet": torch.bfloat16, "reference_unet": torch.bfloat16, "default": torch.float16})
    types = {name: network.dtype for name, network in networks(loaded).items()}
    assert types.pop("unet") == types.pop("reference_unet") == torch.bfloat16
    assert set(types.values()) == {torch.float16}
    loaded = load(saved, dtype={"unet": torch.float16})
    types = {name: network.dtype for name, network in networks(loaded).items()}
    assert types.pop("unet") == torch.float16 and set(types.values()) == {torch.float32}
    assert latents_of(loaded).dtype == torch.float16


def test_half_precision_survives_a_folder(smallest: ToyModel, tmp_path: Path) -> None:
    pipe = build(smallest).to(torch.float16)
    pipe.save_pretrained(tmp_path)
    loaded = load(tmp_path, dtype=torch.float16)
    assert {network.dtype for network in networks(loaded).values()} == {torch.float16}
    assert torch.equal(latents_of(loaded), latents_of(pipe))


def test_a_variant_is_written_beside_the_weights_and_read_by_its_name(smallest: ToyModel, tmp_path: Path) -> None:
    pipe = build(smallest)
    pipe.save_pretrained(tmp_path, variant="fp16")
    names = list(files(tmp_path))
    assert weights_of(names, ".fp16.safetensors") == weights_of(names, ".safetensors") == set(networks(pipe))
    close(latents_of(load(tmp_path, variant="fp16")), latents_of(pipe))
    for variant in ("bf16", None):
        with pytest.raises((OSError, ValueError)):
            load(tmp_path, variant=variant)


def test_large_weights_are_cut_into_shards(pipe: MimicBrushPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    close(latents_of(load(tmp_path)), latents_of(pipe))


def test_a_card_says_what_the_weights_need(saved: Path) -> None:
    card = ModelCard.load(saved / "README.md")
    assert card.data.library_name == "mimicbrush" and card.data.pipeline_tag == "image-to-image"
    for name, value in CONVENTIONS.items():
        if name in ("posterior", "default_num_inference_steps", "default_guidance_scale"):
            continue
        assert f"| `{name}` | `{value}` |" in card.text
    assert "7 steps with guidance 2.5" in card.text


def test_a_card_that_is_there_already_is_left_alone(pipe: MimicBrushPipeline, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("My own words.\n")
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "My own words.\n"


class Hub:
    """What diffusers asks of the hub, noted instead of sent; `card` is the one that the repository has already."""

    def __init__(self, card: str | None) -> None:
        self.card, self.created, self.uploads = card, {}, []

    def create_repo(self, repo_id: str, **options: object) -> types.SimpleNamespace:
        self.created = {"repo_id": repo_id, **options}
        return types.SimpleNamespace(repo_id=f"me/{repo_id}")

    def load_card(self, repo_id: str, **_: object) -> ModelCard:
        if self.card is None:
            raise EntryNotFoundError("no card")
        return ModelCard(self.card)

    def upload_folder(self, *, repo_id: str, folder_path: str | Path, **options: object) -> str:
        self.uploads.append({"repo_id": repo_id, "files": files(Path(folder_path)), **options})
        return "https://huggingface.co/me/toy/commit/1"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(None)
    for module in (diffusers.utils.hub_utils, diffusers.pipelines.pipeline_utils, pipeline_hub):
        monkeypatch.setattr(module, "create_repo", hub.create_repo, raising=module is not pipeline_hub)
    monkeypatch.setattr(diffusers.utils.hub_utils, "upload_folder", hub.upload_folder)
    monkeypatch.setattr(ModelCard, "load", hub.load_card)
    return hub


def _push_directly(pipe: MimicBrushPipeline, folder: Path, **options: object) -> None:
    assert pipe.push_to_hub("toy", **options) == "https://huggingface.co/me/toy/commit/1"


def _push_when_saving(pipe: MimicBrushPipeline, folder: Path, **options: object) -> None:
    pipe.save_pretrained(folder, push_to_hub=True, repo_id="toy", **options)


@pytest.mark.parametrize("push", [_push_directly, _push_when_saving])
def test_what_is_pushed_to_the_hub_is_what_is_saved(
    pipe: MimicBrushPipeline, saved: Path, hub: Hub, tmp_path: Path, push: Callable[..., None]
) -> None:
    push(pipe, tmp_path / "toy", private=True, commit_message="Better")
    assert hub.created["repo_id"] == "toy" and hub.created["private"] and hub.created["exist_ok"]
    (upload,) = hub.uploads
    assert upload["repo_id"] == "me/toy" and upload["commit_message"] == "Better"
    assert upload["files"] == files(saved)  # all weights, and our card, not the general one


@pytest.mark.parametrize("push", [_push_directly, _push_when_saving])
def test_a_variant_can_be_pushed(pipe: MimicBrushPipeline, hub: Hub, tmp_path: Path, push: Callable[..., None]) -> None:
    push(pipe, tmp_path / "toy", variant="fp16")
    (upload,) = hub.uploads
    names = list(upload["files"])
    assert weights_of(names, ".fp16.safetensors") == weights_of(names, ".safetensors") == set(networks(pipe))


@pytest.mark.parametrize("push", [_push_directly, _push_when_saving])
def test_a_card_on_the_hub_is_not_overwritten(
    pipe: MimicBrushPipeline, hub: Hub, tmp_path: Path, push: Callable[..., None]
) -> None:
    hub.card = "---\nlicense: mit\n---\nMy own words.\n"
    push(pipe, tmp_path / "toy")
    (upload,) = hub.uploads
    pushed = upload["files"]["README.md"].decode()
    assert "My own words." in pushed and "license: mit" in pushed and "reference_blend" not in pushed


def test_without_being_asked_nothing_is_pushed(pipe: MimicBrushPipeline, hub: Hub, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    assert not hub.uploads and not hub.created
    with pytest.raises(TypeError, match="repo_ids"):
        pipe.save_pretrained(tmp_path, push_to_hub=True, repo_ids="toy")
