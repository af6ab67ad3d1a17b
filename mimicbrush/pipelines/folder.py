"""What a pipeline folder says of itself, without loading it. No heavy import here: see `models.weight_files`."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mimicbrush.errors import InputError, WeightsError
from mimicbrush.models.options import ModelOptions, encoder_without_unet
from mimicbrush.models.pretrained.files import StoredNetwork, read_network, read_object

#: Options that choose networks or their shapes: with other values, these would be other weights.
FIXED = ("reference_encoder", "reference_sharing", "depth_channels")


@dataclass(frozen=True)
class Conventions:
    """What a pipeline is made for.

    Attributes:
        options: every option of `ModelOptions` and its value.
        size_step_px: what the side of a canvas must be a multiple of.
        prediction_type: what the U-Net predicts.
    """

    options: dict[str, Any]
    size_step_px: int
    prediction_type: str

    def with_choices(self, given: dict[str, Any], prediction_type: str) -> tuple[dict[str, Any], list[str]]:
        """All options for training on from these weights, some of them chosen.

        Args:
            given: options of `ModelOptions` that were chosen, and their values.
            prediction_type: `TrainOptions`'.

        Returns:
            All options, and a note for each that the weights were not made for, and must learn.

        Raises:
            InputError: names every choice that the weights do not allow.
        """
        other = {name: value for name, value in given.items() if value != self.options[name]}
        wrong = [
            f"model.{name} must be {self.options[name]}, got {value}" for name, value in other.items() if name in FIXED
        ]
        size = given.get("size_px", self.options["size_px"])
        if size % self.size_step_px:
            wrong.append(f"model.size_px must be a multiple of {self.size_step_px}, got {size}")
        if prediction_type != self.prediction_type:
            wrong.append(
                f"train.prediction_type must be {self.prediction_type}, got {prediction_type}; add "
                f"train.prediction_type={self.prediction_type}"
            )
        if wrong:
            raise InputError("the weights of this pipeline do not allow what was chosen: " + "; ".join(wrong))
        notes = [
            f"model.{name}={value}, while the weights were made for {self.options[name]}"
            for name, value in other.items()
        ]
        return {**self.options, **given}, notes


def find_pipeline(name: str, *, fetch: bool = True) -> Path:
    """The folder of a pipeline.

    Args:
        name: a folder, or "released" for the released weights, which are converted once, and, unless they are in
            the local Hugging Face cache, fetched.
        fetch: False never fetches.

    Raises:
        WeightsError: the released weights are not to be had.
    """
    if name == "released" and not (Path(name) / "model_index.json").is_file():
        from mimicbrush.pipelines.conversion.hub import released_pipeline_folder

        return released_pipeline_folder(fetch=fetch)
    return Path(name)


def read_index(folder: Path) -> dict[str, Any]:
    """The model_index.json of a pipeline folder.

    Raises:
        InputError: the folder is absent, no pipeline, or not whole.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise InputError(f"{folder} is no pipeline folder (it has no model_index.json)")
    try:
        components: dict[str, Any] = json.loads(index.read_text())
    except ValueError as error:
        raise InputError(f"{index} is damaged: {error}") from error
    absent = [
        name
        for name, value in components.items()
        if isinstance(value, list) and value[0] is not None and not (folder / name).is_dir()
    ]
    if absent or components.get("_class_name") != "MimicBrushPipeline":
        problem = f"lacks {', '.join(absent)}" if absent else f"holds a {components.get('_class_name')}"
        raise InputError(f"{folder} is no whole MimicBrush pipeline: it {problem}")
    return components


def class_names(index: dict[str, Any]) -> dict[str, str]:
    """Component -> its class, of those that there are."""
    return {name: value[1] for name, value in index.items() if isinstance(value, list) and value[0] is not None}


def read_networks(folder: Path) -> dict[str, tuple[str, StoredNetwork]]:
    """Component -> class and files of each network of a pipeline folder.

    Raises:
        InputError: see `read_index`.
        WeightsError: a file is absent or damaged.
    """
    networks = {}
    for name, class_name in class_names(read_index(folder)).items():
        if name != "scheduler":
            stem = "model" if any((folder / name).glob("model*.safetensors")) else "diffusion_pytorch_model"
            networks[name] = class_name, read_network(folder / name, stem)
    return networks


def read_conventions(folder: Path) -> Conventions:
    """What a pipeline folder is made for, as its `options` say once it is loaded.

    Raises:
        InputError: see `read_index`.
        WeightsError: a config is absent or damaged.
    """
    index = read_index(folder)
    classes = class_names(index)
    configs = {name: read_object(folder / name / "config.json") for name in classes if name != "scheduler"}
    unet, vae = configs["unet"], configs["vae"]
    defaults = ModelOptions()
    options = {each.name: index.get(each.name, getattr(defaults, each.name)) for each in fields(ModelOptions)}
    px_per_latent = 2 ** (len(vae.get("block_out_channels", [0])) - 1)
    tokens_of = encoder_without_unet(classes["image_encoder"])
    try:
        options |= {
            "size_px": unet["sample_size"] * px_per_latent,
            "reference_encoder": "unet" if "reference_unet" in classes else tokens_of,
            "reference_sharing": (
                "keys_values" if classes.get("reference_unet") == "KeyValueReferenceUNet" else "hidden_states"
            ),
            "depth_channels": configs["depth_projector"].get("depth_channels", defaults.depth_channels),
        }
        levels = len(unet["block_out_channels"])
    except KeyError as error:
        raise WeightsError(f"{folder / 'unet' / 'config.json'} does not state {error}") from error
    scheduler = read_object(folder / "scheduler" / "scheduler_config.json")
    return Conventions(options, px_per_latent * 2 ** (levels - 1), scheduler.get("prediction_type", "epsilon"))
