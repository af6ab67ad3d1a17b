"""Requirements for starting weights. Imports no torch, see `files`.

The method depends on some facts, such as the nine channels that become thirteen: other weights are an error. Sizes,
such as the width of the context, only have to fit together. If they differ from the paper's, the report says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mimicbrush.errors import WeightsError
from mimicbrush.io.text import make_storable
from mimicbrush.models.flux2_klein import full_size
from mimicbrush.models.options import PretrainedModel
from mimicbrush.models.pretrained.files import StoredNetwork, read_network
from mimicbrush.models.pretrained.weights import HOW_TO_FETCH, LAYOUTS, find_weights, note_revision

#: Levels of both U-Nets and of the VAE: a latent is 8 x 8 pixels, and the depth projector makes latents of this size.
_LEVELS = 4
#: Scale of the VAE that SD-1.5 was trained with; later VAEs have the same shapes and other scales.
_SCALING_FACTOR = 0.18215

#: Part -> key of its config -> the required value, and the default if the config does not state it.
_FACTS: dict[str, dict[str, tuple[Any, Any]]] = {
    "unet": {
        "_class_name": ("UNet2DConditionModel", None),
        "in_channels": (9, 4),  # noisy latent 4, mask 1, masked source 4: widened to 13 for the depth latent
        "out_channels": (4, 4),
    },
    "reference_unet": {
        "_class_name": ("UNet2DConditionModel", None),
        "in_channels": (4, 4),  # a clean latent
        "out_channels": (4, 4),
    },
    "vae": {
        "_class_name": ("AutoencoderKL", None),
        "latent_channels": (4, 4),
        "scaling_factor": (_SCALING_FACTOR, _SCALING_FACTOR),
    },
    "image_encoder": {"num_channels": (3, 3)},
    "dinov2": {"model_type": ("dinov2", None), "num_channels": (3, 3)},
    "depth_estimator": {
        "model_type": ("depth_anything", None),
        "depth_estimation_type": ("relative", "relative"),  # the others predict metres
    },
    "base.transformer": {
        "_class_name": ("Flux2Transformer2DModel", None),
        "guidance_embeds": (False, True),  # the distilled dev model needs guidance as an input, which we do not give
    },
    "base.vae": {"_class_name": ("AutoencoderKLFlux2", None)},
    "base.text_encoder": {"model_type": ("qwen3", None)},
}

#: Part -> key of its config -> the paper's choice (Sec. 3.2 and 4.1; SD-1.5, ViT-H/14, ViT-B/14), or for a part of
#: FLUX.2 klein that of klein base 4B.
_SIZES: dict[str, dict[str, Any]] = {
    "unet": {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768},
    "reference_unet": {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768},
    "vae": {"block_out_channels": [128, 256, 512, 512]},
    "image_encoder": {"hidden_size": 1280, "image_size": 224, "patch_size": 14},
    "dinov2": {"hidden_size": 1024, "image_size": 518, "patch_size": 14},
    "depth_estimator": {"reassemble_hidden_size": 768},
    "base.transformer": full_size.TRANSFORMER,
    "base.vae": full_size.VAE,
    "base.text_encoder": full_size.TEXT_ENCODER,
}

#: Config keys that must be equal in both U-Nets, because features of one enter the layers of the other.
_SHARED = ("block_out_channels", "layers_per_block", "down_block_types", "up_block_types", "cross_attention_dim")


@dataclass
class PartReport:
    """Report on the starting weights of one part.

    Attributes:
        part: name of the part.
        named: the option that says where it is, and its value.
        network: the network in its folder, if it could be read.
        problem: what is wrong; None if no problem was found.
        notes: other facts that the user should know.
    """

    part: str
    named: str
    network: StoredNetwork | None = None
    problem: WeightsError | None = None
    notes: list[str] = field(default_factory=list)


def name_option(part: str, name: str) -> str:
    """Return the option of a part and its value; all parts of a base have the same option, model.base."""
    return f"model.{part.partition('.')[0]}={name}"


def inspect_part(part: str, name: str, folder: Any) -> PartReport:
    """Inspect a part from the headers of its files and its config.

    Args:
        part: a key of `LAYOUTS`.
        name: value of its option.
        folder: folder of its network, see `weights.locate_weights`.
    """
    report = PartReport(part, name_option(part, name))
    try:
        report.network = read_network(folder, LAYOUTS[part].file_stem, allow_half=True)
        check_facts(part, report.network.config)
        integers = sum(
            tensor.dtype[0] not in "FB" or tensor.dtype == "BOOL" for tensor in _list_weights(report.network)
        )
        if integers:
            raise WeightsError(f"{folder} contains {integers} tensors of integers, expected floating-point weights")
    except WeightsError as error:
        report.problem = error
    else:
        report.notes = note_revision(name, folder) + find_other_sizes(part, report.network.config)
        if report.network.variant is not None:
            report.notes.append(
                f"there is no {LAYOUTS[part].file_stem}.safetensors, so the half-precision variant is used "
                f"({report.network.files[0].name}), whose weights have only 3 digits"
            )
    return report


def _list_weights(network: StoredNetwork) -> list[Any]:
    # These integers are not weights: positions, in files of older transformers, and the batch counter of a batch norm.
    others = ("position_ids", "num_batches_tracked")
    return [tensor for key, tensor in network.tensors.items() if not key.endswith(others)]


def check_facts(part: str, config: Mapping[str, Any]) -> None:
    """Check that a network is of the kind that training starts from.

    Raises:
        WeightsError: names what the config says and what it should say.
    """
    stated = _vision_half(config) if part == "image_encoder" else dict(config)
    if part == "image_encoder":
        kind = config.get("model_type")
        if kind not in ("clip", "clip_vision_model"):
            given = make_storable(repr(kind))
            raise WeightsError(f"its config says model_type={given}, expected CLIP (clip or clip_vision_model)")
    for key, (expected, default) in _FACTS[part].items():
        value = stated.get(key, default)
        if value != expected:
            raise WeightsError(f"its config says {key}={make_storable(repr(value))}, expected {expected!r}")
    blocks = stated.get("block_out_channels", [0] * _LEVELS)
    if not isinstance(blocks, list) or len(blocks) != _LEVELS:
        given = make_storable(repr(blocks))
        raise WeightsError(f"its config says block_out_channels={given}, expected {_LEVELS} levels")


def find_other_sizes(part: str, config: Mapping[str, Any]) -> list[str]:
    """List the sizes of a network that differ from the paper's, or for FLUX.2 klein from those of base 4B."""
    stated = _vision_half(config) if part == "image_encoder" else config
    whose = "klein base 4B" if part.startswith("base.") else "paper"
    sizes = {key: list(size) if isinstance(size, tuple) else size for key, size in _SIZES[part].items()}
    return [
        f"{key}={stated[key]} ({whose}: {expected})"
        for key, expected in sizes.items()
        if key in stated and stated[key] != expected
    ]


def check_together(networks: Mapping[str, StoredNetwork]) -> None:
    """Check that the networks fit each other.

    Raises:
        WeightsError: the two U-Nets differ; the message says in what.
    """
    if "reference_unet" not in networks:
        return
    unet, reference = networks["unet"].config, networks["reference_unet"].config
    differing = [
        f"{key} is {unet.get(key)} there and {reference.get(key)} here"
        for key in _SHARED
        if unet.get(key) != reference.get(key)
    ]
    if differing:
        raise WeightsError(f"it does not fit model.unet ({'; '.join(differing)})")


def inspect_starting_weights(options: PretrainedModel) -> dict[str, StoredNetwork]:
    """Inspect all starting weights on this machine without loading them.

    Raises:
        WeightsError: names the option and the problem of every part that is absent, damaged or not suitable.
    """
    reports = [inspect_part(part, getattr(options, part), folder) for part, folder in find_weights(options).items()]
    add_together(reports)
    raise_problems(reports)
    return {report.part: report.network for report in reports if report.network is not None}


def add_together(reports: list[PartReport]) -> None:
    """Add the problem that `check_together` finds to the reports, if none of them has a problem yet."""
    if all(report.problem is None for report in reports):
        by_part = {report.part: report for report in reports}
        try:
            check_together({part: report.network for part, report in by_part.items() if report.network is not None})
        except WeightsError as error:
            by_part["reference_unet"].problem = error


def raise_problems(reports: list[PartReport]) -> None:
    """Raise a WeightsError that names all problems, if there are any."""
    wrong = [f"  {r.named}: {r.problem}" for r in reports if r.problem is not None]
    if wrong:
        raise WeightsError("starting weights cannot be used:\n" + "\n".join(wrong) + f"\n  {HOW_TO_FETCH}")


def _vision_half(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the image encoder, also from the config of a whole CLIP."""
    stated = config.get("vision_config", config)
    if not isinstance(stated, Mapping):
        raise WeightsError(f"its config says vision_config={make_storable(repr(stated))}, expected an object")
    return dict(stated)
