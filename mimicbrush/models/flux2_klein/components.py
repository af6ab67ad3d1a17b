"""The networks of FLUX.2 klein: loaded from a folder or the local cache, or at toy size from random numbers.

Toy and full-size networks have the same classes of diffusers and transformers, with other sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from transformers import PreTrainedTokenizerBase, Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

from mimicbrush.errors import WeightsError
from mimicbrush.io.text import describe_error
from mimicbrush.models.flux2_klein.files import TRAINING_NETWORKS
from mimicbrush.models.flux2_klein.files import locate_klein as locate_klein
from mimicbrush.models.flux2_klein.sequence import patchify
from mimicbrush.models.options import ToyFlux2KleinModel
from mimicbrush.models.pretrained.check import check_weights
from mimicbrush.models.pretrained.files import read_network


@dataclass
class KleinComponents:
    """All networks, with scheduler and tokenizer. The transformer is trained; the other networks are frozen.

    Attributes:
        transformer: predicts the velocity of the target's latents.
        vae: converts between pixels and latents.
        scheduler: the noise levels.
        text_encoder, tokenizer: encode the prompt; None if its embeddings are stored.
        is_distilled: whether it was distilled to few steps without guidance; False for a base model.
    """

    transformer: Flux2Transformer2DModel
    vae: AutoencoderKLFlux2
    scheduler: FlowMatchEulerDiscreteScheduler
    text_encoder: Qwen3ForCausalLM | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    is_distilled: bool = False

    def build_pipeline(self) -> Flux2KleinPipeline:
        """Put the same networks into diffusers' own pipeline."""
        return Flux2KleinPipeline(**vars(self))


def load_klein(folder: Path, *, dtype: torch.dtype = torch.float32, with_text_encoder: bool = False) -> KleinComponents:
    """Load the networks of a base model from its folder; pickles are not opened.

    Args:
        folder: folder of a `Flux2KleinPipeline`, see `files.locate_klein`.
        dtype: type of all networks.
        with_text_encoder: False leaves out text encoder and tokenizer, which take half of the memory.

    Raises:
        WeightsError: something is absent, damaged, or of another kind; or weights are missing or unexpected.
    """
    networks = {name: read_network(folder / name, "diffusion_pytorch_model") for name in TRAINING_NETWORKS}
    without: dict[str, Any] = {} if with_text_encoder else {"text_encoder": None, "tokenizer": None}
    try:
        pipeline = Flux2KleinPipeline.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, **without
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(f"{folder} cannot be loaded as FLUX.2 klein: {describe_error(error)}") from error
    for name, network in networks.items():  # diffusers uses random numbers for weights that are missing
        check_weights(name, type(pipeline.components[name]).__name__, network, pipeline.components[name])
    return KleinComponents(**pipeline.components, is_distilled=bool(pipeline.config.is_distilled))


def toy_klein(options: ToyFlux2KleinModel, *, seed: int = 0) -> KleinComponents:
    """Build all networks at toy size with random weights: for tests, and to try a training run.

    The autoencoder's norm fits its latents of random images, like a trained norm fits those of photographs. The text
    encoder has as many layers as the pipeline reads, and its tokens are bytes instead of words.

    Args:
        options: the sizes.
        seed: seed of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 16),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=options.size_px,
        ).eval()
        _fit_norm(vae)
        transformer = Flux2Transformer2DModel(
            in_channels=4 * vae.config.latent_channels,
            num_layers=options.num_layers,
            num_single_layers=options.num_single_layers,
            attention_head_dim=options.head_width,
            num_attention_heads=options.attention_heads,
            joint_attention_dim=3 * options.text_width,
            timestep_guidance_channels=32,
            axes_dims_rope=(options.head_width // 4,) * 4,
            guidance_embeds=False,
        )
        tokenizer = make_byte_tokenizer()
        text_encoder = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=options.text_width,
                intermediate_size=2 * options.text_width,
                num_hidden_layers=28,  # the pipeline reads the states after 9, 18 and 27
                num_attention_heads=1,
                num_key_value_heads=1,
                head_dim=options.text_width,
            )
        ).eval()
    # The schedule of FLUX.2 klein base.
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return KleinComponents(transformer, vae, scheduler, text_encoder, tokenizer)


@torch.no_grad()
def _fit_norm(vae: AutoencoderKLFlux2) -> None:
    """Give the batch norm of an untrained autoencoder the statistics of its own latents."""
    colours = torch.rand(32, 3, 4, 4) * 2 - 1
    images = torch.nn.functional.interpolate(colours, scale_factor=8, mode="bilinear")
    latents = patchify(vae.encode(images).latent_dist.mode())
    vae.bn.running_mean.copy_(latents.mean(dim=(0, 2, 3)))
    vae.bn.running_var.copy_(latents.var(dim=(0, 2, 3)))


def make_byte_tokenizer() -> Qwen2TokenizerFast:
    """Make a tokenizer of Qwen's class whose tokens are bytes, with the chat template that the pipeline needs."""
    from tokenizers.pre_tokenizers import ByteLevel

    words = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2TokenizerFast(
        vocab={word: number for number, word in enumerate(words)},
        merges=[],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer
