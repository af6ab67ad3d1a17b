"""The sizes that are stated for FLUX.2 klein make networks of as many parameters as the published ones have."""

from __future__ import annotations

from mimicbrush.models.flux2_klein.full_size import PARAMETERS, SCHEDULER, build_full_size


def test_parameters_are_those_of_the_published_networks() -> None:
    full = build_full_size()
    for name, network in full._asdict().items():
        assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[name], name
        assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
    assert full.transformer.config.joint_attention_dim == 3 * full.text_encoder.config.hidden_size
    assert full.transformer.config.in_channels == full.vae.config.latent_channels * 4
    # The file flux-2-klein-base-4b.safetensors on the hub: two bytes a parameter, and its head.
    assert 7_751_105_712 - 2 * PARAMETERS["transformer"] == 16_560
    assert SCHEDULER["use_dynamic_shifting"]
