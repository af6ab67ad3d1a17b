"""The networks of FLUX.2 klein base 4B as they are published: layers, widths and numbers of parameters.

The check of downloaded weights and the measurements of memory and time use these sizes. Imports no torch.

All sources are public:

* transformer: the entry klein-4b in scripts/convert_flux2_to_diffusers.py of huggingface/diffusers, and
  `Klein4BParams` in src/flux2/model.py of black-forest-labs/flux2;
* VAE: the same script converts the VAE of FLUX.2 to the defaults of `AutoencoderKLFlux2`;
* text encoder: config.json of Qwen/Qwen3-4B. `Flux2KleinPipeline` reads its hidden states 9, 18 and 27;
* scheduler: the same script uses the one of FLUX.1-dev.

The numbers of parameters were not counted with this code. For the transformer, the number is from the hub: the file
flux-2-klein-base-4b has 7,751,105,712 bytes, which are a header and two bytes per parameter. For the text encoder, it
is from the index of the shards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
    from transformers import Qwen3ForCausalLM

#: 24 heads of 128 make a width of 3072; 5 blocks with separate streams of text and images, then 20 with one stream.
TRANSFORMER: dict[str, Any] = {
    "patch_size": 1,  # each patch of 2 x 2 latents is already in the channels: 4 x 32
    "in_channels": 128,
    "num_layers": 5,
    "num_single_layers": 20,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,  # three layers of a text encoder that is 2560 wide
    "timestep_guidance_channels": 256,
    "mlp_ratio": 3.0,
    "axes_dims_rope": (32, 32, 32, 32),
    "rope_theta": 2000,
    "eps": 1e-6,
    "guidance_embeds": False,
}

#: A latent is 8 x 8 pixels, and the transformer takes 2 x 2 latents as a token: 16 x 16 pixels.
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 32,
    "patch_size": (2, 2),
    "batch_norm_eps": 1e-4,
}

TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}

SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}

#: Parameters of each network, as published.
PARAMETERS = {"transformer": 3_875_544_576, "vae": 84_046_115, "text_encoder": 4_022_468_096}


class FullSize(NamedTuple):
    """Networks of full size."""

    transformer: Flux2Transformer2DModel
    vae: AutoencoderKLFlux2
    text_encoder: Qwen3ForCausalLM


def build_full_size() -> FullSize:
    """Build all networks at full size on the meta device, without memory, to count their parameters."""
    import torch
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.device("meta"):
        return FullSize(
            Flux2Transformer2DModel(**TRANSFORMER),
            AutoencoderKLFlux2(**VAE),
            Qwen3ForCausalLM(Qwen3Config(**TEXT_ENCODER)),
        )
