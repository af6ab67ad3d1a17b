"""FLUX.2 klein: tokens as diffusers' pipeline makes them, attention handed out as it is computed, networks kept."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.models.transformers import transformer_flux2
from PIL import Image

from mimicbrush.errors import WeightsError
from mimicbrush.models.flux2_klein import components
from mimicbrush.models.flux2_klein.attention import AttentionTap, klein_attention_paths, set_tapped_processors
from mimicbrush.models.flux2_klein.components import KleinComponents, load_klein, toy_klein
from mimicbrush.models.flux2_klein.files import locate_klein
from mimicbrush.models.flux2_klein.sequence import (
    ImageSequence,
    encode_images,
    make_sequence,
    make_text_ids,
    pack_tokens,
    patchify,
    unpack_tokens,
)
from mimicbrush.models.options import ToyFlux2KleinModel
from mimicbrush.ops.canvas import to_tensor

NUM_TEXT = 3


@pytest.fixture(scope="module")
def parts(smallest_klein: ToyFlux2KleinModel) -> KleinComponents:
    return toy_klein(smallest_klein, seed=1)


def sequence_of(parts: KleinComponents, rows: int = 2, references: int = 2) -> ImageSequence:
    side = parts.vae.config.sample_size // 8
    latents = torch.randn(2 + references, rows, 16, side, side, generator=torch.Generator().manual_seed(0))
    return make_sequence(latents[0], list(latents[1:]), NUM_TEXT)


def predict(parts: KleinComponents, sequence: ImageSequence, **kwargs: object) -> torch.Tensor:
    text = torch.randn(1, NUM_TEXT, 24, generator=torch.Generator().manual_seed(1)).expand(len(sequence.tokens), -1, -1)
    return parts.transformer(
        hidden_states=sequence.tokens,
        encoder_hidden_states=text,
        timestep=torch.tensor([0.3, 0.8]),
        img_ids=sequence.ids,
        txt_ids=make_text_ids(NUM_TEXT),
        **kwargs,
    ).sample


def test_latents_are_packed_as_the_pipeline_packs_them() -> None:
    latents = torch.randn(2, 4, 8, 12)
    theirs = Flux2KleinPipeline._patchify_latents(latents)
    assert torch.equal(patchify(latents), theirs)
    assert torch.equal(pack_tokens(theirs), Flux2KleinPipeline._pack_latents(theirs))
    assert torch.equal(unpack_tokens(pack_tokens(theirs), 4), theirs)


def test_a_sequence_is_what_the_pipeline_makes_of_the_same_images(parts: KleinComponents) -> None:
    """The whole pipeline runs one step, and what its transformer sees is compared."""
    side = parts.vae.config.sample_size
    pixels = torch.randint(0, 256, (3, side, side, 3), generator=torch.Generator().manual_seed(2)).byte().numpy()
    pipeline = parts.build_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 16, side // 8, side // 8)
    seen: dict[str, torch.Tensor] = {}
    handle = parts.transformer.register_forward_pre_hook(lambda _, __, kwargs: seen.update(kwargs), with_kwargs=True)
    pipeline(
        image=[Image.fromarray(each) for each in pixels],
        prompt_embeds=torch.zeros(1, NUM_TEXT, 24),
        height=side,
        width=side,
        num_inference_steps=1,
        guidance_scale=1.0,
        latents=noise,
        output_type="latent",
    )
    handle.remove()

    given = [pipeline.image_processor.preprocess(Image.fromarray(each)) for each in pixels]
    torch.testing.assert_close(torch.cat(given), to_tensor(pixels), rtol=0, atol=2e-7)
    conditions = [encode_images(parts.vae, each).detach() for each in given]
    ours = make_sequence(noise, conditions, NUM_TEXT)
    assert torch.equal(ours.ids, seen["img_ids"][0])
    assert torch.equal(make_text_ids(NUM_TEXT), seen["txt_ids"][0])
    assert torch.equal(ours.tokens, seen["hidden_states"])
    layout = ours.layout
    assert torch.equal(ours.tokens[0, : layout.num_image], pack_tokens(noise)[0])
    assert layout.num_tokens == NUM_TEXT + ours.tokens.shape[1]
    assert [layout.target.start, layout.source.start, layout.references.start] == [
        NUM_TEXT + number * layout.num_image for number in range(3)
    ]
    references = torch.cat([pack_tokens(each) for each in conditions[1:]], dim=1)
    assert torch.equal(ours.tokens[:, layout.references.start - NUM_TEXT :], references)


def test_attention_is_handed_out_as_it_is_computed(parts: KleinComponents, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock processors and tapped ones give the same bits, and the tap holds what reached the attention itself."""
    sequence = sequence_of(parts)
    stock = predict(parts, sequence)
    set_tapped_processors(parts.transformer)
    assert torch.equal(predict(parts, sequence), stock)

    computed: list[tuple[torch.Tensor, torch.Tensor]] = []
    dispatch = transformer_flux2.dispatch_attention_fn

    def watch(query: torch.Tensor, key: torch.Tensor, *rest: object, **kwargs: object) -> torch.Tensor:
        computed.append((query, key))
        return dispatch(query, key, *rest, **kwargs)

    monkeypatch.setattr(transformer_flux2, "dispatch_attention_fn", watch)
    tap = AttentionTap(sequence.layout)
    assert torch.equal(predict(parts, sequence, joint_attention_kwargs={"tap": tap}), stock)
    paths = klein_attention_paths(parts.transformer)
    assert list(tap.queries_and_keys) == paths
    assert all(isinstance(parts.transformer.get_submodule(path).processor.path, str) for path in paths)
    for (query, key), path in zip(computed, paths, strict=True):
        assert torch.equal(tap.queries_and_keys[path][0], query[:, sequence.layout.target]), path
        assert torch.equal(tap.queries_and_keys[path][1], key[:, sequence.layout.references]), path

    computed.clear()
    chosen = AttentionTap(sequence.layout, paths[1:2], keys=slice(None))
    predict(parts, sequence, joint_attention_kwargs={"tap": chosen})
    assert list(chosen.queries_and_keys) == paths[1:2]
    assert torch.equal(chosen.queries_and_keys[paths[1]][1], computed[1][1])


def test_what_is_handed_out_can_be_learnt_from(smallest_klein: ToyFlux2KleinModel) -> None:
    """Its gradients are those without checkpointing, which hands the same layers out again in the backward pass."""
    grads = []
    for checkpointed in (False, True):
        parts = toy_klein(smallest_klein, seed=1)
        set_tapped_processors(parts.transformer)
        if checkpointed:
            parts.transformer.train().enable_gradient_checkpointing()
        sequence = sequence_of(parts)
        tap = AttentionTap(sequence.layout)
        sample = predict(parts, sequence, joint_attention_kwargs={"tap": tap})
        query, key = next(reversed(tap.queries_and_keys.values()))
        (sample.square().mean() + torch.einsum("bnhd,bmhd->bhnm", query, key).square().mean()).backward()
        grads.append({name: each.grad for name, each in parts.transformer.named_parameters()})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0] if grads[0][name] is not None)
    assert grads[0]["x_embedder.weight"].abs().max() > 0


def test_a_toy_has_the_real_parts_and_a_seed(smallest_klein: ToyFlux2KleinModel) -> None:
    first, second, other = (toy_klein(smallest_klein, seed=seed) for seed in (1, 1, 2))
    weights = [each.transformer.proj_out.weight for each in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert isinstance(first.transformer, Flux2Transformer2DModel)
    colours = torch.rand(4, 3, 1, 1).expand(-1, -1, 32, 32) * 2 - 1
    deviation = encode_images(first.vae, colours).std()
    assert 0.3 < deviation < 3  # about that of the noise, as for a trained autoencoder
    embeds, ids = first.build_pipeline().encode_prompt("a b", max_sequence_length=24)
    assert embeds.shape == (1, 24, first.transformer.config.joint_attention_dim)
    assert torch.equal(ids[0], make_text_ids(24))
    assert math.isfinite(float(embeds.detach().sum()))


def test_networks_come_back_from_a_folder(parts: KleinComponents, tmp_path: Path) -> None:
    parts.build_pipeline().save_pretrained(tmp_path)
    again = load_klein(locate_klein(str(tmp_path)))
    assert again.text_encoder is None
    assert again.tokenizer is None
    assert not again.is_distilled
    assert again.scheduler.config.shift == 3.0
    for name in ("transformer", "vae"):
        before, after = getattr(parts, name).state_dict(), getattr(again, name).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), name
    assert load_klein(tmp_path, with_text_encoder=True).text_encoder is not None

    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(WeightsError, match=r"vae/diffusion_pytorch_model\.safetensors is damaged"):
        load_klein(tmp_path)


def test_a_base_model_that_is_not_here_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"model\.base=nobody/nothing is neither a folder nor in the local"):
        locate_klein("nobody/nothing")
    with pytest.raises(WeightsError, match=r"has no model_index\.json"):
        locate_klein(str(tmp_path))
    assert components.make_byte_tokenizer()("é").input_ids != components.make_byte_tokenizer()("e").input_ids
