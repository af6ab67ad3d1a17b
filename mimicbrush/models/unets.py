"""The imitative U-Net, the reference U-Net, and one U-Net for both: diffusers models with small changes.

The imitative U-Net has a wider conv_in. The reference U-Net lacks the layers after its last shared self-attention.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

# ModelMixin is not used here, but from_pretrained of a pipeline looks for it in the module of each component.
from diffusers import ModelMixin, UNet2DConditionModel  # noqa: F401
from torch import nn

from mimicbrush.errors import WeightsError
from mimicbrush.models.reference_attention import is_shared, reference_paths, set_reference_write_processors

LATENT_CHANNELS = 4
#: Input of the imitative U-Net: noisy latent 4, mask 1, masked-source latent 4, depth latent 4 (paper Sec. 3.2).
UNET_IN_CHANNELS = 3 * LATENT_CHANNELS + 1


class ReferenceUNet(UNet2DConditionModel):
    """A U-Net that only writes `ReferenceStates`; its `.sample` must not be used.

    The layers after the last self-attention that is shared would get no gradients, and DDP would fail. So they are left
    out: 24 keys for SD-1.5, exactly those that the released ``referencenet`` lacks.
    """

    _shares_keys_values = False

    # `wraps` keeps the parent's signature visible: ConfigMixin reads the config's keys from it.
    @functools.wraps(UNet2DConditionModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        set_reference_write_processors(self, self._shares_keys_values)
        last = self.get_submodule(reference_paths(self)[-1].removesuffix(".transformer_blocks.0.attn1"))
        if last is not self.up_blocks[-1].attentions[-1]:
            raise WeightsError(
                f"the last up block of a reference U-Net must contain attention, got {self.config.up_block_types}"
            )
        block = last.transformer_blocks[0]
        block.attn1.to_q = nn.Identity()
        if not self._shares_keys_values:
            block.attn1.to_k = block.attn1.to_v = nn.Identity()
        block.attn1.to_out = nn.ModuleList([nn.Identity(), nn.Identity()])
        block.attn2 = block.norm2 = None
        block.norm3 = block.ff = last.proj_out = nn.Identity()
        self.conv_norm_out, self.conv_out = None, nn.Identity()

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel) -> ReferenceUNet:
        """Make a reference U-Net with the weights of another U-Net, on its device and in its type.

        Args:
            unet: a U-Net of diffusers, or an imitative U-Net, see `init_reference_from_unet`.
        """
        reference = cls.from_config({**unet.config, "in_channels": LATENT_CHANNELS})
        init_reference_from_unet(reference, unet)
        reference = reference.to(unet.device)
        return reference if reference.dtype == unet.dtype else reference.to(unet.dtype)


class KeyValueReferenceUNet(ReferenceUNet):
    """A reference U-Net that shares its own keys and values, as in paper Sec. 3.2.

    The released code shares hidden states instead. This class has two of the 24 omitted keys: ``to_k`` and ``to_v`` of
    the last layer.
    """

    _shares_keys_values = True


class SharedUNet(UNet2DConditionModel):
    """A U-Net that both reads the reference and denoises, in two passes (*ours*).

    It has half of the weights, gradients and moments of two U-Nets. The pass that reads the reference has no loss. Its
    weights learn from gradients through the keys and values that the denoising pass uses.

    DeCo-VTON (virtual try-on, arXiv 2511.18775) also has one network that denoises one image and only reads the other,
    but both images side by side in one pass. The two passes and the input of 13 channels (`make_reference_input`) are
    ours: a reference can be read before the first step, and once for many edits.
    """

    reads_and_paints = True


def find_reference_network(
    unet: UNet2DConditionModel, reference_unet: UNet2DConditionModel | None
) -> UNet2DConditionModel | None:
    """Find the network that reads the reference: the reference U-Net, a `SharedUNet` itself, or none."""
    return unet if reference_unet is None and is_shared(unet) else reference_unet


def make_reference_input(reference_network: UNet2DConditionModel, latents: torch.Tensor) -> torch.Tensor:
    """Make the input of a U-Net that reads references: clean latents (R, 4, h, w) -> (R, 4 or 13, h, w).

    A `SharedUNet` takes 13 channels. Its input is that of an edit without anything to repaint: the reference as the
    noisy latent and as the masked source, an empty mask, and zeros instead of depth.
    """
    if reference_network.config.in_channels == LATENT_CHANNELS:
        return latents
    none = torch.zeros_like(latents)
    return torch.cat([latents, none[:, :1], latents, none], dim=1)


#: The reference U-Nets, by `ModelOptions.reference_sharing`.
REFERENCE_UNETS = {"hidden_states": ReferenceUNet, "keys_values": KeyValueReferenceUNet}


def init_reference_from_unet(reference_unet: ReferenceUNet, unet: UNet2DConditionModel) -> None:
    """Copy the weights of a U-Net into a reference U-Net, except those of the omitted layers.

    An imitative U-Net has more input channels than the reference U-Net, which gets only clean latents. From its
    conv_in, the weights of the first channels are copied, those of the noisy latent.
    """
    weights = unet.state_dict()
    weights["conv_in.weight"] = weights["conv_in.weight"][:, :LATENT_CHANNELS]
    reference_unet.load_state_dict({key: weights[key] for key in reference_unet.state_dict()})


def widen_conv_in(unet: UNet2DConditionModel, in_channels: int) -> UNet2DConditionModel:
    """Give a U-Net more input channels (paper Sec. 3.2: 9 -> 13), with zero weights for the new ones.

    With zeros, the output does not change at first, whatever the new channels contain.

    Raises:
        WeightsError: `in_channels` is smaller than the present number.
    """
    old = unet.conv_in
    if in_channels < old.in_channels:
        raise WeightsError(f"cannot widen conv_in from {old.in_channels} to {in_channels} channels")
    wide = nn.Conv2d(in_channels, old.out_channels, old.kernel_size, padding=old.padding)
    weight = old.weight.new_zeros(wide.weight.shape)
    weight[:, : old.in_channels] = old.weight.detach()
    wide.load_state_dict({"weight": weight, "bias": old.bias.detach()})
    unet.conv_in = wide.to(old.weight.dtype)
    unet.register_to_config(in_channels=in_channels)
    return unet
