"""A text encoder of FLUX.2 klein's class at toy size, with a tokenizer made here: letters are tokens."""

from __future__ import annotations

import torch
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

#: The beginning and end of a turn, as in the template of the real one, which is longer.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} {{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% if enable_thinking is false %}-{% endif %}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
#: As bytes are written in such a vocabulary: a space is Ġ.
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?-'Ġ"


def toy_tokenizer() -> Qwen2TokenizerFast:
    """A tokenizer that pads on the right, as the real one."""
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *LETTERS))}
    tokenizer = Qwen2TokenizerFast(vocab=vocabulary, merges=[], extra_special_tokens=list(SPECIAL[1:]))
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def toy_text_encoder(layers: int = 3, width: int = 16) -> Qwen3ForCausalLM:
    """A text encoder with random weights, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=len(SPECIAL) + len(LETTERS),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=width // 2,
            tie_word_embeddings=True,
        )
        return Qwen3ForCausalLM(config).eval()
