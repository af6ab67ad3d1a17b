"""FLUX.2 klein as an editor: folders go round, edits are those of diffusers' pipeline, and nothing else is opened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinInpaintPipeline, Flux2KleinPipeline
from diffusers.models.embeddings import apply_rotary_emb
from PIL import Image
from toy_edit import an_edit
from toy_klein import OPTIONS, SIZE_PX, add_lora, build_klein, open_toy, toy_imitation, toy_prompt, write_toy_klein

from mimicbrush.errors import InputError, WeightsError
from mimicbrush.models.flux2_klein import lora
from mimicbrush.models.flux2_klein.components import load_klein, toy_klein
from mimicbrush.models.flux2_klein.files import fingerprint_klein
from mimicbrush.models.options import KLEIN_PROMPT
from mimicbrush.models.pretrained.files import DamagedFileError
from mimicbrush.ops.canvas import IMAGE_FILL, letterbox, letterbox_mask
from mimicbrush.pipelines import flux2_klein
from mimicbrush.pipelines.editing.editor import EditSettings, LazyEditor
from mimicbrush.pipelines.flux2_klein import KleinPipeline, open_klein, write_klein_folder
from mimicbrush.pipelines.folder import IMITATION_FILE, resolve_pipeline_folder
from mimicbrush.pipelines.klein.folder import (
    BASE_FOLDER,
    LORA_FILE,
    PROMPT_FILE,
    read_imitation,
)
from mimicbrush.pipelines.open_pipeline import open_any_pipeline, open_pipeline, seeded_generator


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a LoRA and its base."""
    folder = tmp_path_factory.mktemp("run")
    write_toy_klein(folder / "pipeline")
    return folder


@pytest.fixture(scope="module")
def editor(run: Path) -> KleinPipeline:
    opened = open_klein(run, "cpu")
    opened.set_progress_bar_config(disable=True)
    return opened


def edit(editor: KleinPipeline, seed: int = 0, **options: object) -> np.ndarray:
    """An edit in two steps, (40, 60, 3) uint8."""
    settings = {**an_edit(), "num_inference_steps": 2, "generator": seeded_generator(seed), **options}
    return np.asarray(editor(**settings).images[0])


def canvas(image: Image.Image) -> np.ndarray:
    return letterbox(np.asarray(image), SIZE_PX, IMAGE_FILL)


def test_an_edit_is_that_of_the_plain_pipeline_with_the_plain_lora(run: Path, editor: KleinPipeline) -> None:
    images = an_edit()
    plain = Flux2KleinPipeline.from_pretrained(run / "pipeline" / BASE_FOLDER, text_encoder=None, tokenizer=None)
    plain.set_progress_bar_config(disable=True)
    hole = letterbox_mask(np.asarray(images["mask"]), SIZE_PX)[..., None]
    holed, reference = canvas(images["source"]) * (1 - hole), canvas(images["reference"])

    def call(pipeline: Flux2KleinPipeline) -> np.ndarray:
        return pipeline(
            image=[Image.fromarray(holed), Image.fromarray(reference)],
            prompt_embeds=toy_prompt().embeds,
            num_inference_steps=2,
            guidance_scale=1.0,
            generator=seeded_generator(0),
            output_type="np",
        ).images[0]

    without = call(plain)
    plain.load_lora_weights(run / "pipeline")
    expected = call(plain)
    found = editor(**images, num_inference_steps=2, generator=seeded_generator(0), paste_back=False, output_type="np")
    assert np.abs(np.asarray(found.images[0]) - expected).max() < 1e-6
    assert np.abs(without - expected).mean() > 1e-3


def test_the_inpaint_pipeline_takes_the_lora(run: Path) -> None:
    images, results = an_edit(), []
    pipeline = Flux2KleinInpaintPipeline(**vars(build_klein()))
    pipeline.set_progress_bar_config(disable=True)
    for has_lora in (False, True):
        if has_lora:
            pipeline.load_lora_weights(run / "pipeline")
        results.append(
            pipeline(
                image=Image.fromarray(canvas(images["source"])),
                mask_image=images["mask"].resize((SIZE_PX, SIZE_PX)),
                image_reference=images["reference"],
                prompt_embeds=toy_prompt().embeds,
                num_inference_steps=2,
                guidance_scale=1.0,
                strength=1.0,
                generator=seeded_generator(0),
                output_type="np",
            ).images[0]
        )
    assert np.abs(results[0] - results[1]).mean() > 1e-3


def test_nothing_changes_outside_of_the_mask(editor: KleinPipeline) -> None:
    images = an_edit()
    result, source = edit(editor), np.asarray(images["source"])
    changed = (result != source).any(axis=2)
    assert changed[15:25, 25:35].all()
    changed[0:40, 10:50] = False  # the mask, and ten pixels around it
    assert result.shape == source.shape and not changed.any()


def test_what_the_hole_hides_is_not_seen(editor: KleinPipeline) -> None:
    images = an_edit()
    other = np.asarray(images["source"]).copy()
    other[12:28, 22:38] = 77  # not at the edge of the mask, whose pixels the canvas blends with those beside it
    whole = {"paste_back": False}
    assert (edit(editor, **whole) == edit(editor, source=Image.fromarray(other), **whole)).all()


def test_references_are_one_several_one_each_or_none(editor: KleinPipeline) -> None:
    first, second = (an_edit(turns)["reference"] for turns in (0, 1))
    one = edit(editor)
    assert (edit(editor, reference=[first]) == one).all()
    two, swapped, none = (edit(editor, reference=each) for each in ([first, second], [second, first], None))
    assert len({each.tobytes() for each in (one, two, swapped, none)}) == 4

    images = an_edit()
    both = {"source": [images["source"]] * 2, "mask": [images["mask"]] * 2}
    generators = [seeded_generator(0), seeded_generator(0)]
    for reference, expected in (
        (first, [one, one]),
        ([first, second], [one, edit(editor, reference=second)]),
        ([[first, second], [second, first]], [two, swapped]),
    ):
        settings = {**both, "reference": reference, "num_inference_steps": 2, "generator": generators}
        for generator in generators:
            generator.manual_seed(0)
        results = editor(**settings).images
        assert [np.asarray(each).tobytes() for each in results] == [each.tobytes() for each in expected]


def test_each_of_several_results_has_its_seed(editor: KleinPipeline) -> None:
    generators = [seeded_generator(seed) for seed in (3, 4)]
    output = editor(**an_edit(), num_inference_steps=2, num_images_per_prompt=2, generator=generators, output_type="np")
    for seed, image in zip((3, 4), output.images, strict=True):
        alone = editor(**an_edit(), num_inference_steps=2, generator=seeded_generator(seed), output_type="np").images[0]
        assert np.abs(image - alone).max() < 1.5 / 255


def test_images_are_encoded_once_for_all_results(editor: KleinPipeline) -> None:
    """With the same bits as calls of their own; for two sources, the one reference is encoded once, too."""
    encoded: list[int] = []
    handle = editor.pipeline.vae.encoder.register_forward_hook(lambda *_: encoded.append(1))
    seeds, options = (3, 4), {"num_inference_steps": 2, "output_type": "latent"}
    generators = [seeded_generator(seed) for seed in seeds]
    together = editor(**an_edit(), **options, num_images_per_prompt=2, generator=generators).images
    assert len(encoded) == 2
    alone = [editor(**an_edit(), **options, generator=seeded_generator(seed)).images[0] for seed in seeds]
    assert len(encoded) == 6
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))
    two = {name: [an_edit(turns)[name] for turns in (0, 1)] for name in ("source", "mask")}
    editor(**two, reference=an_edit()["reference"], **options)
    handle.remove()
    assert len(encoded) <= 9 and "encode" not in vars(editor.pipeline.vae)


def test_steps_are_told_and_may_end_the_edit(editor: KleinPipeline) -> None:
    told: list[int] = []

    def follow(pipeline: Flux2KleinPipeline, step: int, timestep: int, tensors: dict[str, torch.Tensor]) -> dict:
        told.append(step)
        pipeline._interrupt = step == 1
        return {}

    edit(editor, num_inference_steps=5, callback_on_step_end=follow)
    assert told == [0, 1]


def test_guidance_is_away_from_the_empty_prompt(editor: KleinPipeline) -> None:
    assert (edit(editor, guidance_scale=3.0) != edit(editor)).any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep_shape": True}, "depth estimator"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"crop": "some"}, "full or auto"),
        ({"output_type": "tensor"}, "pil, np, pt or latent"),
        ({"reference": [an_edit()["reference"]] * 5}, "references of a source=5"),
        ({"reference": [[an_edit()["reference"]]] * 2}, "for each of 1 sources, got 2"),
        ({"reference_crop": (0, 0, 1000, 1000)}, "not a box inside the reference"),
    ],
)
def test_what_it_cannot_do_is_refused(editor: KleinPipeline, options: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        edit(editor, **options)


def test_a_crop_of_the_reference_is_that_part_of_it(editor: KleinPipeline) -> None:
    reference = an_edit()["reference"]
    part = reference.crop((10, 20, 60, 70))
    expected = edit(editor, reference=part)
    assert (edit(editor, reference_crop=(10, 20, 60, 70)) == expected).all()
    # One reference for two sources is one image, with one crop.
    two = {name: [an_edit()[name]] * 2 for name in ("source", "mask")}
    assert (edit(editor, **two, reference_crop=[(10, 20, 60, 70)]) == expected).all()


def test_a_folder_of_full_training_has_no_lora(tmp_path: Path) -> None:
    trained = build_klein(seed=5)
    write_klein_folder(tmp_path, toy_imitation(), toy_prompt(), trained)
    assert not (tmp_path / LORA_FILE).exists()
    opened = open_klein(tmp_path, "cpu")
    for name, value in trained.transformer.state_dict().items():
        assert torch.equal(value, opened.pipeline.transformer.state_dict()[name])


def test_a_base_beside_a_lora_has_no_adapters(run: Path) -> None:
    bare = build_klein().transformer.state_dict()
    stored = load_klein(run / "pipeline" / BASE_FOLDER).transformer.state_dict()
    assert bare.keys() == stored.keys() and all(torch.equal(bare[name], stored[name]) for name in bare)


def test_what_is_stated_is_read_back(run: Path) -> None:
    imitation = read_imitation(run / "pipeline")
    assert imitation == toy_imitation(prompt_checksum=toy_prompt().checksum)
    written = json.loads((run / "pipeline" / IMITATION_FILE).read_text())
    assert written["family"] == "flux2_klein" and written["version"]


def test_the_same_adapters_are_the_same_bytes(run: Path, tmp_path: Path) -> None:
    write_toy_klein(tmp_path)
    files = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert len(files) == 9
    for path in files:
        assert path.read_bytes() == (run / "pipeline" / path.relative_to(tmp_path)).read_bytes()


def test_a_base_elsewhere_is_found(run: Path, tmp_path: Path, editor: KleinPipeline) -> None:
    components = build_klein()
    add_lora(components.transformer)
    base = (run / "pipeline" / BASE_FOLDER).absolute()
    write_klein_folder(tmp_path, toy_imitation(base=str(base)), toy_prompt(), components)
    assert not (tmp_path / BASE_FOLDER).exists()
    opened = open_klein(tmp_path / LORA_FILE, "cpu")
    opened.set_progress_bar_config(disable=True)
    assert (edit(opened) == edit(editor)).all()


def test_a_base_that_is_not_here_says_what_to_do(tmp_path: Path) -> None:
    components = build_klein()
    add_lora(components.transformer)
    for base, words in (
        ("someone/FLUX.2-klein", "hf download someone/FLUX.2-klein --revision abc"),
        (str(tmp_path / "gone"), "gone, but there is no such folder"),
    ):
        write_klein_folder(tmp_path, toy_imitation(base=base, revision="abc"), toy_prompt(), components)
        with pytest.raises(WeightsError, match=words):
            open_klein(tmp_path, "cpu")


@pytest.mark.slow
def test_a_model_that_was_not_trained_encodes_its_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flux2_klein, "KLEIN_SIZE_PX", SIZE_PX)
    toy_klein(OPTIONS).build_pipeline().save_pretrained(tmp_path)
    opened = open_klein(tmp_path, "cpu")
    assert opened.prompt.facts.prompt == KLEIN_PROMPT and opened.pipeline.text_encoder is None
    assert (opened.default_num_inference_steps, opened.default_guidance_scale) == (50, 4.0)
    opened.set_progress_bar_config(disable=True)
    assert edit(opened).shape == (40, 60, 3)


def spoil_json(folder: Path, name: str = IMITATION_FILE, **values: object) -> None:
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("spoil", "kind", "words"),
    [
        (lambda folder: (folder / IMITATION_FILE).write_text("{"), DamagedFileError, "cannot be read"),
        (lambda folder: spoil_json(folder, family="unets"), WeightsError, "has the family unets"),
        (lambda folder: spoil_json(folder, more=1), DamagedFileError, "missing or unknown: more"),
        (lambda folder: spoil_json(folder, size_px="64"), DamagedFileError, "size_px=64"),
        (lambda folder: spoil_json(folder, size_px=68), InputError, "a multiple of 8"),
        (lambda folder: spoil_json(folder, base="../elsewhere"), DamagedFileError, "expected a repository"),
        (lambda folder: spoil_json(folder, num_references=9), DamagedFileError, "num_references=9"),
        (lambda folder: spoil_json(folder, prompt="Another."), WeightsError, "contains the prompt"),
        (lambda folder: spoil_json(folder, prompt_checksum="0"), DamagedFileError, "but imitation.json expects"),
        (lambda folder: (folder / PROMPT_FILE).unlink(), InputError, f"lacks {PROMPT_FILE}"),
        (lambda folder: (folder / LORA_FILE).write_bytes(b"no head"), DamagedFileError, "not a safetensors file"),
        (
            lambda folder: (folder / BASE_FOLDER / "transformer" / "config.json").unlink(),
            WeightsError,
            "no config.json",
        ),
        (lambda folder: spoil_json(folder, "base/transformer/config.json", num_layers=2), WeightsError, "transformer"),
        (lambda folder: spoil_json(folder, "base/transformer/config.json", in_channels=8), WeightsError, "load"),
        (
            lambda folder: spoil_json(folder, "base/model_index.json", vae=["diffusers", "AutoencoderKL"]),
            WeightsError,
            "expected AutoencoderKLFlux2",
        ),
        (
            lambda folder: (folder / BASE_FOLDER / "model_index.json").write_text('{"_class_name": "QwenPipeline"}'),
            InputError,
            "contains a QwenPipeline, expected a Flux2KleinPipeline",
        ),
    ],
)
def test_a_damaged_folder_is_not_opened(
    run: Path, tmp_path: Path, spoil: Callable[[Path], object], kind: type[Exception], words: str
) -> None:
    folder = shutil.copytree(run / "pipeline", tmp_path / "copy")
    forget_files(folder)
    spoil(folder)
    with pytest.raises(kind, match=words):
        open_klein(folder, "cpu")


def forget_files(folder: Path) -> None:
    """Make of the folder of a run that of an older version, which did not list its files."""
    file = folder / IMITATION_FILE
    stated = json.loads(file.read_text())
    file.write_text(json.dumps({name: stated[name] for name in stated.keys() - {"files", "base_fingerprint"}}))


def test_a_folder_of_an_older_version_opens(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run / "pipeline", tmp_path / "copy")
    forget_files(folder)
    assert read_imitation(folder, deep=True) == read_imitation(run / "pipeline")


def test_every_file_must_be_that_of_the_run(run: Path, tmp_path: Path) -> None:
    """Each is deleted, emptied, cut, and exchanged with that of a run of other weights; size and names are the same."""
    folder = shutil.copytree(run / "pipeline", tmp_path / "copy")
    listed = json.loads((folder / IMITATION_FILE).read_text())["files"]
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(listed) == present - {IMITATION_FILE} and {LORA_FILE, PROMPT_FILE} < set(listed)
    for name in listed:
        file, content = folder / name, (folder / name).read_bytes()
        for spoilt in (None, b"", content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
            file.unlink() if spoilt is None else file.write_bytes(spoilt)
            with pytest.raises(WeightsError, match=f"{name} (is missing|has .* saved).*mimicbrush export RUN"):
                open_klein(folder, "cpu")
            if spoilt is None or len(spoilt) != len(content):
                with pytest.raises(WeightsError, match=name):  # before anything heavy is imported
                    read_imitation(folder)
            file.write_bytes(content)
    read_imitation(folder, deep=True)
    with pytest.raises(InputError, match=r"not the LoRA file that the training run wrote to .*Give the folder"):
        open_klein(folder / PROMPT_FILE, "cpu")
    (folder / IMITATION_FILE).write_bytes(b"")
    with pytest.raises(DamagedFileError, match="mimicbrush export RUN"):
        open_klein(folder, "cpu")
    (folder / IMITATION_FILE).unlink()
    with pytest.raises(InputError, match=f"lacks {IMITATION_FILE}.*mimicbrush export RUN"):
        resolve_pipeline_folder(folder)


def test_a_lora_that_is_not_of_the_run_is_not_loaded(run: Path, tmp_path: Path) -> None:
    write_klein_folder(tmp_path, toy_imitation(), toy_prompt(), build_klein())
    shutil.copy(run / "pipeline" / LORA_FILE, tmp_path)
    with pytest.raises(WeightsError, match=f"{LORA_FILE} was not one of them. Move it to another folder"):
        open_klein(tmp_path, "cpu")


def test_another_base_elsewhere_is_not_loaded(run: Path, tmp_path: Path) -> None:
    base = shutil.copytree(run / "pipeline" / BASE_FOLDER, tmp_path / "base").absolute()
    components = build_klein()
    add_lora(components.transformer)
    imitation = toy_imitation(base=str(base), base_fingerprint=fingerprint_klein(base))
    write_klein_folder(tmp_path / "run", imitation, toy_prompt(), components)
    assert open_klein(tmp_path / "run", "cpu").imitation.base_fingerprint == imitation.base_fingerprint
    build_klein(seed=1).transformer.save_pretrained(base / "transformer")
    with pytest.raises(WeightsError, match=r"is not the base model that .* was trained with.*Put the right one"):
        open_klein(tmp_path / "run", "cpu")


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("transformer.transformer_blocks.7.attn.to_q", (2, 16), "has no layer"),
        ("transformer.transformer_blocks.0.attn.to_q", (2, 15), "does not fit"),
        ("unet.to_q", (2, 16), "has no layer unet"),
    ],
)
def test_a_lora_of_something_else_is_not_loaded(
    run: Path, tmp_path: Path, name: str, shape: tuple[int, int], words: str
) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "some.safetensors"
    save_file({f"{name}.lora_A.weight": torch.zeros(shape), f"{name}.lora_B.weight": torch.zeros(16, 2)}, file)
    with pytest.raises(WeightsError, match=words):
        lora.load_klein_lora(build_klein().build_pipeline(), file)
    for weights, message in (
        ({"weight": torch.zeros(2)}, "not a LoRA of diffusers"),
        ({"transformer.x_embedder.lora_A.weight": torch.zeros(2, 16)}, "does not fit"),
        ({f"transformer.x_embedder.lora_{half}.weight": torch.zeros(16) for half in "AB"}, "does not fit"),
    ):
        save_file(weights, file)
        with pytest.raises(WeightsError, match=message):
            lora.load_klein_lora(build_klein().build_pipeline(), file)


def test_other_folders_are_not_opened(run: Path, tmp_path: Path) -> None:
    for path in (tmp_path, run / "pipeline" / "absent.safetensors"):
        with pytest.raises(InputError, match=r"is not a FLUX\.2 klein model"):
            open_klein(path, "cpu")
    with pytest.raises(
        InputError,
        match=r"safetensors is a file; expected the folder of a pipeline or of a training run, or a LoRA file",
    ):
        resolve_pipeline_folder(next(run.rglob("pytorch_lora_weights.safetensors")))


def test_nothing_to_write_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to write"):
        write_klein_folder(tmp_path, toy_imitation(base="a/b"), toy_prompt(), build_klein())


def test_without_training_it_is_the_inpaint_pipeline(tmp_path: Path) -> None:
    editor = KleinPipeline(build_klein().build_pipeline(), toy_imitation(), toy_prompt(), is_trained=False)
    editor.set_progress_bar_config(disable=True)
    images, plain = an_edit(), Flux2KleinInpaintPipeline(**vars(build_klein()))
    plain.set_progress_bar_config(disable=True)
    hole = letterbox_mask(np.asarray(images["mask"]), SIZE_PX)
    tokens = hole.reshape(8, 8, 8, 8).max(axis=(1, 3)).repeat(8, 0).repeat(8, 1)  # each token that the hole touches
    expected = plain(
        image=Image.fromarray(canvas(images["source"]) * (1 - hole[..., None])),
        mask_image=Image.fromarray(tokens * np.uint8(255)),
        image_reference=Image.fromarray(canvas(images["reference"])),
        prompt_embeds=toy_prompt().embeds,
        negative_prompt_embeds=toy_prompt().empty_embeds,
        num_inference_steps=2,
        guidance_scale=4.0,
        strength=1.0,
        generator=seeded_generator(0),
        output_type="np",
    ).images[0]
    settings = {**images, "num_inference_steps": 2, "generator": seeded_generator(0), "output_type": "np"}
    found = np.asarray(editor(**settings, paste_back=False).images[0])
    assert np.abs(found - expected).max() < 1e-5
    references = [images["reference"], an_edit(1)["reference"]]
    assert (edit(editor, reference=references) != edit(editor)).any()
    assert edit(editor, reference=None).shape == (40, 60, 3)


def test_a_scale_of_0_is_the_base(editor: KleinPipeline) -> None:
    without = KleinPipeline(editor.pipeline, editor.imitation, editor.prompt, lora_scale=0)
    without.set_progress_bar_config(disable=True)
    before = edit(editor)
    assert (edit(without) == edit(open_toy())).all()
    assert (edit(editor) == before).all()


def test_a_distilled_model_takes_few_steps_and_no_guidance() -> None:
    """FLUX.2 klein 4B and 9B come base and distilled, all of one class."""
    pipeline = replace(build_klein(), is_distilled=True).build_pipeline()
    distilled = KleinPipeline(pipeline, toy_imitation(), toy_prompt())
    distilled.set_progress_bar_config(disable=True)
    assert (distilled.default_num_inference_steps, distilled.default_guidance_scale) == (4, 1.0)
    assert (edit(distilled, guidance_scale=3.0) == edit(open_toy())).all()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_it_tells_where_it_looks(editor: KleinPipeline, guidance: float) -> None:
    """The probabilities of the whole sequence, computed here from what the transformer is given, and one peak each."""
    settings = {"num_inference_steps": 1, "guidance_scale": guidance}
    images, expected = an_edit(), []

    def attend(module: torch.nn.Module, inputs: object, options: dict[str, torch.Tensor], output: object) -> None:
        if len(expected) == 2:  # the empty prompt
            return
        given = options["hidden_states"]
        text = options.get("encoder_hidden_states")
        if text is None:
            query, key = module.to_qkv_mlp_proj(given)[..., :32].chunk(2, dim=-1)
        else:
            query = torch.cat([module.add_q_proj(text), module.to_q(given)], 1)
            key = torch.cat([module.add_k_proj(text), module.to_k(given)], 1)
        query, key = (
            apply_rotary_emb(norm(each.unflatten(-1, (2, 8))), options["image_rotary_emb"], sequence_dim=1)
            for norm, each in ((module.norm_q, query), (module.norm_k, key))
        )
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / 8**0.5
        expected.append(scores.softmax(-1)[0, :, 3 : 3 + 64, -64:])  # target over reference: (heads, 64, 64)

    transformer = editor.pipeline.transformer
    blocks = (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
    handles = [block.attn.register_forward_hook(attend, with_kwargs=True) for block in blocks]
    output = editor(**images, **settings, generator=seeded_generator(0), return_correspondence=True)
    for handle in handles:
        handle.remove()
    (found,) = output.correspondences
    masked = letterbox_mask(np.asarray(images["mask"]), SIZE_PX).reshape(8, 8, 8, 8).max(axis=(1, 3)).ravel() > 0
    share = torch.cat(expected).mean(0).sum(-1)[torch.from_numpy(masked)]
    torch.testing.assert_close(torch.from_numpy(found.share), share, rtol=1e-4, atol=1e-6)
    assert found.reference_xy.shape == found.source_xy.shape == (masked.sum(), 2)
    assert (edit(editor, **settings) == np.asarray(output.images[0])).all()
    several = editor(
        **{**images, "reference": [images["reference"]] * 2}, num_inference_steps=1, return_correspondence=True
    )
    assert set(several.correspondences[0].reference_index) <= {0, 1}
    with pytest.raises(InputError, match="needs a reference"):
        edit(editor, reference=None, return_correspondence=True)


def test_the_command_edits(run: Path, tmp_path: Path, editor: KleinPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    from mimicbrush.cli.edit import main

    monkeypatch.chdir(tmp_path)
    for name, image in an_edit().items():
        image.save(f"{name}.png")
    files = ["reference.png", "source.png", "mask.png", "--model", str(run), "--steps", "2", "--seed", "5"]
    main([*files, "-o", "result.png", "--save-correspondence", "map.png", "--device", "cpu"])
    assert (np.asarray(Image.open("result.png")) == edit(editor, seed=5)).all()
    assert Path("map.png").is_file() and Path("map.npz").is_file()
    an_edit(1)["reference"].save("second.png")
    images = ["--reference", "reference.png", "second.png", "--source", "source.png", "--mask", "mask.png"]
    main([*images, *files[3:], "-o", "several.png", "--device", "cpu"])
    both = [an_edit()["reference"], an_edit(1)["reference"]]
    assert (np.asarray(Image.open("several.png")) == edit(editor, seed=5, reference=both)).all()


@pytest.mark.slow
def test_the_command_zooms_and_refuses(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mimicbrush.cli.edit import main

    monkeypatch.chdir(tmp_path)
    for name, image in an_edit().items():
        image.save(f"{name}.png")
    files = ["reference.png", "source.png", "mask.png", "--model", str(run), "--steps", "2", "--seed", "5"]
    main([*files, "-o", "zoomed.png", "--auto-zoom", "--device", "cpu"])
    assert Path("zoomed.png").is_file()
    for option, words in (("--keep-shape", "depth estimator"), ("--cuda-graphs", "only with the U-Nets")):
        with pytest.raises(InputError, match=words):
            main([*files, "-o", "refused.png", option, "--device", "cpu"])


def test_a_lora_file_is_a_model_whose_base_must_be_here(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    file = shutil.copy(run / "pipeline" / LORA_FILE, tmp_path / "some.safetensors")
    with pytest.raises(WeightsError, match=r"hf download black-forest-labs/.*A LoRA file alone does not name its base"):
        LazyEditor(EditSettings(str(file)))
    LazyEditor(EditSettings(str(run / "pipeline" / LORA_FILE)))
    shutil.copy(run / "pipeline" / PROMPT_FILE, file)
    with pytest.raises(WeightsError, match=r"is not a LoRA of diffusers: it contains .*the folder of a training run"):
        LazyEditor(EditSettings(str(file)))
    with pytest.raises(InputError, match="is not the LoRA file that the training run wrote to"):
        LazyEditor(EditSettings(str(run / "pipeline" / PROMPT_FILE)))


@pytest.mark.slow
def test_the_command_edits_with_a_lora_file(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mimicbrush.cli.edit import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flux2_klein, "KLEIN_SIZE_PX", SIZE_PX)
    toy_klein(OPTIONS).build_pipeline().save_pretrained(tmp_path / "base")
    monkeypatch.setattr("mimicbrush.pipelines.klein.folder.locate_klein", lambda name: tmp_path / "base")
    shutil.copy(run / "pipeline" / LORA_FILE, "some.safetensors")
    for name, image in an_edit().items():
        image.save(f"{name}.png")
    files = ["reference.png", "source.png", "mask.png", "--model", "some.safetensors", "--steps", "2"]
    main([*files, "-o", "result.png", "--device", "cpu"])
    told = capsys.readouterr().err
    assert Path("result.png").is_file() and "does not say how it was trained" in told and KLEIN_PROMPT in told


def test_commands_of_the_unets_say_what_this_is(run: Path) -> None:
    with pytest.raises(InputError, match=r"contains FLUX\.2 klein, but only a MimicBrush pipeline"):
        open_pipeline(run, "cpu")
    assert isinstance(open_any_pipeline(run / "pipeline", "cpu", "bfloat16"), KleinPipeline)
