"""One command fetches all starting weights from a hub and checks them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from local_hub import COMMIT, LocalHub, local_hub
from safetensors.torch import load_file, save_file
from starting_weights import KLEIN, REPOSITORIES, SIZE_PX, write_klein, write_repositories

from mimicbrush import assembly
from mimicbrush.cli import fetch
from mimicbrush.errors import InputError
from mimicbrush.models.flux2_klein.components import load_klein
from mimicbrush.models.flux2_klein.fetch import check_or_fetch_klein
from mimicbrush.models.flux2_klein.files import locate_klein
from mimicbrush.models.flux2_klein.prompt import read_prompt
from mimicbrush.models.options import Flux2KleinModel
from mimicbrush.models.pretrained.weights import REVISIONS, split_revision

CONFIGS = Path(__file__).parents[2] / "configs"
OPTIONS = [f"model.{part}={name}" for part, name in REPOSITORIES.items()] + [f"model.size_px={SIZE_PX}"]
NEEDED = {
    "toy/inpainting": {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"},
    "toy/sd15": {"unet/config.json", "unet/diffusion_pytorch_model.safetensors.index.json"},
    "toy/sd-vae-ft-mse": {"config.json", "diffusion_pytorch_model.safetensors"},
    "toy/CLIP-ViT-H-14": {"config.json", "model.safetensors"},
    "toy/depth-anything-base-hf": {"config.json", "model.safetensors"},
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    folder = tmp_path_factory.mktemp("hub")
    write_repositories(folder)
    write_klein(folder)
    with local_hub(folder) as server:
        yield server


@pytest.fixture
def online(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    """This process sees the hub, and an empty cache."""
    # huggingface_hub reads the environment when it is imported, which is long ago.
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{constants}.ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    hub.served.clear()
    return hub


def provide(*more: str, fetching: bool = True, deep: bool = False) -> dict[str, str]:
    """Part -> problem, "" for none."""
    reports = assembly.provide_weights([*OPTIONS, *more], CONFIGS, fetching=fetching, deep=deep)
    return {report.part: str(report.problem or "") for report in reports}


def cached(tmp_path: Path, part: str, file: str) -> Path:
    return tmp_path / "hub" / f"models--{REPOSITORIES[part].replace('/', '--')}" / "snapshots" / COMMIT / file


def test_the_command_fetches_what_is_needed_and_tells_of_it(
    online: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*more: str) -> tuple[object, list[str]]:
        monkeypatch.setattr("sys.argv", ["fetch_weights.py", *OPTIONS, *more])
        with pytest.raises(SystemExit) as ended:
            fetch.main()
        return ended.value.code, capsys.readouterr().out.splitlines()

    status, lines = run()
    assert status == 0
    table = [line.split() for line in lines if not line.startswith(("note", "downloading"))]
    assert table[0] == ["part", "files", "size", "type", "check", "where"]
    assert [row[0] for row in table[1:]] == ["unet", "reference_unet", "image_encoder", "vae", "depth_estimator"]
    assert all("good" in row and row[-1].startswith(str(tmp_path)) for row in table[1:])
    assert "note: unet: cross_attention_dim=16 (paper: 768)" in lines
    newest = f"revision {COMMIT}, the newest when it was downloaded; use toy/inpainting@{COMMIT} to keep this revision"
    assert f"note: unet: {newest}" in lines
    shards = {f"unet/diffusion_pytorch_model-{n:05}-of-00011.safetensors" for n in range(1, 12)}
    expected = {**NEEDED, "toy/sd15": NEEDED["toy/sd15"] | shards}
    assert sorted(online.served) == sorted(f"{name}/{file}" for name, files in expected.items() for file in files)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    status, lines = run("--check", "--deep")
    assert status == 0 and not any(line.startswith("downloading") for line in lines)
    cached(tmp_path, "vae", "config.json").unlink()
    status, lines = run("--check")
    assert status == 2 and [line.split()[0] for line in lines if "NOT GOOD" in line] == ["vae"]


def test_what_is_at_hand_is_not_fetched_again_and_the_rest_is(online: LocalHub, tmp_path: Path) -> None:
    before = provide(fetching=False)
    assert set(before.values()) == {"neither a folder nor (completely) in the local Hugging Face cache"}
    assert not online.served
    assert not any(provide(deep=True).values())
    online.served.clear()
    assert not any(provide("model.reference_encoder=dinov2").values())
    assert {name.rsplit("/", 1)[0] for name in online.served} == {"toy/dinov2-large"}
    # A fetch that was cut off between two shards.
    shard = cached(tmp_path, "reference_unet", "unet/diffusion_pytorch_model-00004-of-00011.safetensors")
    shard.resolve().unlink()
    shard.unlink()
    online.served.clear()
    assert list(filter(None, provide(fetching=False).values()))
    assert not any(provide().values())
    assert online.served == [f"toy/sd15/unet/{shard.name}"]


def test_safetensors_of_half_precision_alone_are_fetched_and_no_pickle(
    online: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As stable-diffusion-v1-5/stable-diffusion-inpainting is: huggingface/transformers#42544."""
    repository = tmp_path / "root" / "toy" / "half"
    shutil.copytree(online.root / REPOSITORIES["unet"], repository)
    usual = repository / "unet" / "diffusion_pytorch_model.safetensors"
    half = {key: value.half() for key, value in load_file(usual).items()}
    save_file(half, usual.with_name("diffusion_pytorch_model.fp16.safetensors"), metadata={"format": "pt"})
    usual.unlink()
    for each in online.root.glob("toy/*"):
        if not (tmp_path / "root" / "toy" / each.name).exists():
            (tmp_path / "root" / "toy" / each.name).symlink_to(each)
    monkeypatch.setattr(online, "root", tmp_path / "root")
    assert not any(provide("model.unet=toy/half", deep=True).values())
    of_half = {name for name in online.served if name.startswith("toy/half/")}
    assert of_half == {"toy/half/unet/config.json", "toy/half/unet/diffusion_pytorch_model.fp16.safetensors"}


def test_a_revision_is_fetched_and_no_other(online: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []
    download = huggingface_hub.snapshot_download

    def note(hub_id: str, *, revision: str | None = None, **options: object) -> str:
        asked.append((hub_id, revision))
        return download(hub_id, revision=revision, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", note)
    vae = REPOSITORIES["vae"]
    reports = assembly.provide_weights([*OPTIONS, f"model.vae={vae}@{COMMIT}"], CONFIGS, fetching=True, deep=False)
    assert not any(report.problem for report in reports)
    assert {revision for name, revision in asked if name == vae} == {COMMIT}
    notes = {report.part: [note for note in report.notes if note.startswith("revision")] for report in reports}
    assert not notes["vae"] and notes["unet"]
    # Another one is not taken for it; a pinned one goes before the newest, and an older copy will do.
    other = "b" * 40
    assert "neither a folder" in provide(f"model.vae={vae}@{other}", fetching=False)["vae"]
    provide()
    monkeypatch.setitem(REVISIONS, vae, other)
    asked.clear()
    assert not provide(fetching=False)["vae"]
    assert [revision for name, revision in asked if name == vae] == [other, None]
    asked.clear()
    (tmp_path / "hub" / f"models--{vae.replace('/', '--')}" / "refs" / "main").unlink(missing_ok=True)
    shutil.rmtree(cached(tmp_path, "vae", "config.json").parent)
    provide()
    assert (vae, other) in asked and (vae, COMMIT) not in asked


def test_every_pin_is_a_commit() -> None:
    assert all(re.fullmatch("[0-9a-f]{40}", revision) for revision in REVISIONS.values())
    assert split_revision("a/b") == ("a/b", None) and split_revision("a/b@v1") == ("a/b", "v1")
    for hub_id, revision in REVISIONS.items():
        assert split_revision(hub_id) == (hub_id, revision) and split_revision(f"{hub_id}@x") == (hub_id, "x")


def test_damage_in_the_cache_is_found_and_mended(online: LocalHub, tmp_path: Path) -> None:
    provide()
    vae = cached(tmp_path, "vae", "diffusion_pytorch_model.safetensors")
    data = vae.read_bytes()
    vae.resolve().write_bytes(data[:-100])
    online.served.clear()
    found = provide(fetching=False)
    assert [part for part, problem in found.items() if problem] == ["vae"] and str(vae) in found["vae"]
    assert not any(provide().values()) and vae.read_bytes() == data
    assert online.served == ["toy/sd-vae-ft-mse/diffusion_pytorch_model.safetensors"]
    # A bit that flipped: only a deep look sees it.
    vae.resolve().write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert not any(provide(fetching=False).values())
    assert "the hub states" in provide(fetching=False, deep=True)["vae"]
    assert not any(provide(deep=True).values()) and vae.read_bytes() == data


def test_what_cannot_be_had_is_told_for_each_part(online: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    found = provide("model.unet=toy/nothing", "model.vae=toy/CLIP-ViT-H-14")
    assert "it does not exist, or it needs a token" in found["unet"]
    assert "has no diffusion_pytorch_model.safetensors" in found["vae"]
    assert not found["image_encoder"] and not found["reference_unet"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "the hub cannot be reached (OfflineModeIsEnabled" in provide("model.vae=toy/other")["vae"]


def test_options_are_those_of_training() -> None:
    assert assembly.provide_weights(["+experiment=smoke"], CONFIGS, fetching=True, deep=False) == []
    for plus in ("", "+"):
        with pytest.raises(InputError, match=r"there is no option model\.unett\. Did you mean 'model\.unet'\?"):
            provide(f"{plus}model.unett=x")
    with pytest.raises(InputError, match=r"model\.encoders: the chosen configs have no such option"):
        provide("model.encoders=x")
    with pytest.raises(InputError, match=r"needs model\.path"):
        assembly.provide_weights(["model=pipeline"], CONFIGS, fetching=False, deep=False)


def provide_klein(
    prompt: Path, base: str = KLEIN, text: str = "Fill the hole.", fetching: bool = True
) -> dict[str, str]:
    """Part -> problem, "" for none."""
    options = Flux2KleinModel(base=base, prompt=text, prompt_embeddings=str(prompt))
    reports = check_or_fetch_klein(options, fetching=fetching, deep=True)
    return {report.part: str(report.problem or "") for report in reports}


def test_klein_is_fetched_and_its_prompt_encoded_once(online: LocalHub, tmp_path: Path) -> None:
    prompt = tmp_path / "runs" / "prompt.safetensors"
    options = ["model=flux2_klein", f"model.base={KLEIN}", f"model.prompt_embeddings={prompt}", "model.prompt=x"]
    absent = assembly.provide_weights(options, CONFIGS, fetching=False, deep=False)
    assert [report.part for report in absent] == ["base.transformer", "base.vae", "prompt_embeddings"]
    assert all(report.problem for report in absent) and not online.served
    assert absent[0].named == f"model.base={KLEIN}"
    networks = ["base.transformer", "base.vae", "base.text_encoder"]
    assert provide_klein(prompt) == dict.fromkeys([*networks, "prompt_embeddings"], "")
    served = {name.removeprefix(f"{KLEIN}/") for name in online.served}
    assert {"model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"} < served
    assert {f"text_encoder/model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)} < served
    assert "vae/diffusion_pytorch_model.safetensors" in served and "flux-2-klein-base-4b.safetensors" not in served
    embeddings = read_prompt(prompt)
    assert embeddings.facts.encoder == f"{KLEIN}@{COMMIT}" and embeddings.facts.prompt == "Fill the hole."
    # What training loads, and the prompt as the whole pipeline encodes it.
    snapshot = locate_klein(KLEIN)
    assert load_klein(snapshot).text_encoder is None
    pipeline = load_klein(snapshot, with_text_encoder=True).build_pipeline()
    with torch.no_grad():
        assert torch.equal(embeddings.embeds, pipeline.encode_prompt("Fill the hole.")[0])
    # From now on the file alone is needed, and another prompt is encoded again.
    shutil.rmtree(snapshot / "text_encoder")
    online.served.clear()
    assert provide_klein(prompt) == dict.fromkeys([*networks[:2], "prompt_embeddings"], "") and not online.served
    assert "contains the prompt 'Fill" in provide_klein(prompt, text="x", fetching=False)["prompt_embeddings"]
    assert set(provide_klein(prompt, text="x").values()) == {""} and read_prompt(prompt).facts.prompt == "x"


def test_klein_of_another_kind_is_refused(hub: LocalHub, tmp_path: Path) -> None:
    prompt, folder = tmp_path / "prompt.safetensors", tmp_path / "klein"
    shutil.copytree(hub.root / KLEIN, folder)

    def problems() -> dict[str, str]:
        return {part: text for part, text in provide_klein(prompt, str(folder)).items() if text}

    tokenizer = folder / "tokenizer" / "tokenizer.json"
    whole = tokenizer.read_text()
    tokenizer.write_text("{}")
    assert "cannot be loaded" in problems()["base.text_encoder"] and not prompt.exists()
    tokenizer.write_text(whole)
    assert not problems() and read_prompt(prompt).facts.encoder == str(folder)
    (folder / "scheduler" / "scheduler_config.json").unlink()
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors.pop("bn.running_mean")
    save_file(tensors, weights)
    prompt.write_bytes(prompt.read_bytes()[:-1])
    shutil.rmtree(folder / "text_encoder")
    found = problems()
    assert "has no scheduler/scheduler_config.json" in found["base.transformer"]
    assert "bn.running_mean is missing" in found["base.vae"] and "interrupted" in found["prompt_embeddings"]
    assert "text_encoder" in found["base.text_encoder"] or "config.json" in found["base.text_encoder"]
    (folder / "scheduler" / "scheduler_config.json").touch()
    config = folder / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"guidance_embeds": false', '"guidance_embeds": true'))
    assert "guidance_embeds=True, expected False" in problems()["base.transformer"]
