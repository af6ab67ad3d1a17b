from __future__ import annotations

import logging

import pytest
import torch

from mimicbrush.models.components import Components, toy_components
from mimicbrush.models.options import ToyModel
from mimicbrush.models.reference_attention import reference_paths, set_reference_processors
from mimicbrush.types import ReferenceStates


@pytest.fixture
def parts(smallest: ToyModel) -> Components:
    return toy_components(smallest)


def predict(parts: Components, states: ReferenceStates | None, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    stem = torch.randn(batch, 13, 8, 8, generator=generator)
    context = torch.randn(batch, 5, 16, generator=generator)
    return parts.unet(stem, 500, context, cross_attention_kwargs={"reference_states": states}).sample


def reference_states(parts: Components, batch: int = 2, seed: int = 2) -> ReferenceStates:
    generator = torch.Generator().manual_seed(seed)
    states = ReferenceStates()
    parts.reference_unet(
        torch.randn(batch, 4, 8, 8, generator=generator),
        500,
        torch.randn(batch, 5, 16, generator=generator),
        cross_attention_kwargs={"reference_states": states},
    )
    return states


def test_both_unets_name_the_same_layers_in_mid_and_up_blocks(parts: Components) -> None:
    paths = reference_paths(parts.unet)
    assert paths == reference_paths(parts.reference_unet) == list(reference_states(parts).features)
    assert {path.split(".")[0] for path in paths} == {"mid_block", "up_blocks"}


def test_the_reference_changes_the_prediction(parts: Components) -> None:
    set_reference_processors(parts.unet, 1.0)
    one, other = (predict(parts, reference_states(parts, seed=seed)) for seed in (2, 3))
    assert (one - other).abs().max() > 1e-3


def test_dropped_rows_equal_no_reference_and_kept_rows_do_not(parts: Components) -> None:
    for blend in (0.5, 1.0):
        set_reference_processors(parts.unet, blend)
        states = reference_states(parts)
        with_all, alone = predict(parts, states), predict(parts, None)
        states.keep = torch.tensor([True, False])
        mixed = predict(parts, states)
        torch.testing.assert_close(mixed[0], with_all[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(mixed[1], alone[1], atol=1e-5, rtol=0)
        assert (mixed[0] - alone[0]).abs().max() > 1e-3


def test_features_of_fewer_rows_serve_the_last_ones(parts: Components) -> None:
    set_reference_processors(parts.unet, 0.5)
    states = reference_states(parts)
    states.keep = torch.tensor([False, True])
    expected = predict(parts, states)
    last = ReferenceStates({path: feature[1:] for path, feature in states.features.items()})
    torch.testing.assert_close(predict(parts, last), expected, atol=1e-5, rtol=0)


def test_own_tokens_as_reference_change_nothing(parts: Components) -> None:
    set_reference_processors(parts.unet, 1.0)
    own = ReferenceStates()
    layers = {path: parts.unet.get_submodule(path) for path in reference_paths(parts.unet)}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, path=path: own.features.__setitem__(
                path, args[0] if args else kwargs["hidden_states"]
            ),
            with_kwargs=True,
        )
        for path, layer in layers.items()
    ]
    alone = predict(parts, None)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(predict(parts, own), alone, atol=1e-5, rtol=0)


def test_blend_is_the_mean_of_two_attentions_written_out(parts: Components) -> None:
    path = reference_paths(parts.unet)[0]
    layer = parts.unet.get_submodule(path)
    own, feature = torch.randn(2, 2, 6, layer.query_dim).unbind(0)

    def attention(context: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            t.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
            for t in (layer.to_q(own), layer.to_k(context), layer.to_v(context))
        )
        weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
        return (weights @ value).transpose(1, 2).flatten(2)

    expected = layer.to_out[0](0.5 * attention(torch.cat([own, feature], 1)) + 0.5 * attention(own))
    set_reference_processors(parts.unet, 0.5)
    result = layer(own, reference_states=ReferenceStates({path: feature}))
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_parameter_of_the_reference_unet(parts: Components, checkpointing: bool) -> None:
    set_reference_processors(parts.unet, 1.0)
    for unet in (parts.unet, parts.reference_unet):
        unet.train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
    predict(parts, reference_states(parts)).square().mean().backward()
    without = [name for name, p in parts.reference_unet.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_no_argument_is_dropped_by_diffusers(parts: Components, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("diffusers")
    logger.propagate = True
    set_reference_processors(parts.unet, 1.0)
    predict(parts, reference_states(parts))
    logger.propagate = False
    assert "are not expected by" not in caplog.text


def test_a_mask_over_own_tokens_is_refused_rather_than_ignored(parts: Components) -> None:
    read_by = parts.unet.get_submodule(reference_paths(parts.unet)[0])
    written_by = parts.reference_unet.get_submodule(reference_paths(parts.reference_unet)[0])
    set_reference_processors(parts.unet, 0.5)
    for layer in (read_by, written_by):
        with pytest.raises(ValueError, match="does not support attention_mask"):
            layer(torch.randn(1, 6, layer.query_dim), attention_mask=torch.zeros(1, 1, 6))
