"""Find and read pipeline folders without loading them. Imports no torch, so that errors come at once."""

from __future__ import annotations

import operator
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mimicbrush.errors import InputError, WeightsError
from mimicbrush.io.text import make_storable
from mimicbrush.models.options import ModelOptions, encoder_without_unet, vae_scale_factor
from mimicbrush.models.pretrained.files import StoredNetwork, check_config_counts, check_head, read_network, read_object
from mimicbrush.pipelines.checksums import HOW_TO_MEND, check_checksums
from mimicbrush.pipelines.small_model import SHIPPED_NAME, SHIPPED_NAMES, model_folder
from mimicbrush.ranges import suggest

#: The name of the released weights on command lines.
RELEASED_NAME = "released"

#: What a run of FLUX.2 klein leaves in its pipeline folder in place of a model_index.json, see `klein.folder`.
IMITATION_FILE = "imitation.json"
#: What that folder calls the embeddings of its prompt.
PROMPT_FILE = "prompt_embeddings.safetensors"

#: Options that choose networks or their shapes: with other values, these would be other weights.
FIXED = ("reference_encoder", "reference_sharing", "depth_channels")

# Whose classes a pipeline may be made of: diffusers imports whatever a model_index.json names.
_LIBRARIES, _OUR_CLASSES = ("diffusers", "transformers"), "mimicbrush.models."


@dataclass(frozen=True)
class Conventions:
    """Options that a pipeline was trained for.

    Attributes:
        options: every option of `ModelOptions` and its value.
        size_step_px: what the side of a canvas must be a multiple of.
        prediction_type: what the U-Net predicts.
        rescale_betas_zero_snr: whether its last timestep is pure noise.
    """

    options: dict[str, Any]
    size_step_px: int
    prediction_type: str
    rescale_betas_zero_snr: bool = False

    def with_choices(
        self, choices: dict[str, Any], prediction_type: str, rescale_betas_zero_snr: bool
    ) -> tuple[dict[str, Any], list[str]]:
        """Complete the options for training on from these weights, where some of them are chosen.

        Args:
            choices: options of `ModelOptions` that were chosen, and their values.
            prediction_type, rescale_betas_zero_snr: those of `TrainOptions`.

        Returns:
            All options, and a note for each that the weights were not made for, and must learn.

        Raises:
            InputError: names every choice that the weights do not allow.
        """
        other = {name: value for name, value in choices.items() if value != self.options[name]}
        wrong = [
            f"model.{name} must be {self.options[name]}, got {value}" for name, value in other.items() if name in FIXED
        ]
        size = choices.get("size_px", self.options["size_px"])
        if size % self.size_step_px:
            wrong.append(f"model.size_px must be a multiple of {self.size_step_px}, got {size}")
        if prediction_type != self.prediction_type:
            wrong.append(
                f"train.prediction_type must be {self.prediction_type}, got {prediction_type}; add "
                f"train.prediction_type={self.prediction_type}"
            )
        if self.rescale_betas_zero_snr and not rescale_betas_zero_snr:
            wrong.append("train.rescale_betas_zero_snr must be true, got false; add train.rescale_betas_zero_snr=true")
        if wrong:
            raise InputError("the weights of this pipeline do not allow these options: " + "; ".join(wrong))
        notes = [
            f"model.{name}={value}, but the weights were trained for {self.options[name]}"
            for name, value in other.items()
        ]
        if rescale_betas_zero_snr and not self.rescale_betas_zero_snr:
            notes.append("train.rescale_betas_zero_snr=true, but the weights were trained for false")
        return {**self.options, **choices}, notes


def resolve_pipeline_folder(name: str | Path) -> Path | None:
    """Find the folder of a pipeline by its name, without importing torch and without fetching anything.

    Args:
        name: "small" (also "proof"), the model that comes with the project; "released", the released weights; a
            pipeline folder; or the folder of a training run, which leaves its pipeline in RUN/pipeline. A pipeline
            folder comes before a name.

    Returns:
        The folder. None for "released", whose folder may have to be made first: `find_pipeline.find_pipeline` does so.

    Raises:
        InputError: there is no such pipeline; says what to name, or what to do.
        WeightsError: the folder has lost files.
    """
    folder, inner = Path(name), Path(name) / "pipeline"
    if is_pipeline_folder(folder):
        return folder
    if str(name) == RELEASED_NAME:
        return None
    if str(name) in SHIPPED_NAMES:
        return model_folder(str(name))
    if is_pipeline_folder(inner):
        return inner
    if (folder / "checkpoints").is_dir():
        raise InputError(
            f"{folder} is a training run without a pipeline; "
            f"`mimicbrush export {shlex.quote(str(folder))}` writes one to {folder / 'exported'} "
            "from its newest checkpoint"
        )
    if folder.is_file():
        raise InputError(
            f"{folder} is a file; expected the folder of a pipeline or of a training run, or a LoRA file of "
            "FLUX.2 klein"
        )
    for each in (folder, inner):
        check_checksums(each)
        if (each / PROMPT_FILE).is_file():
            raise InputError(f"{each} is incomplete: it lacks {IMITATION_FILE}. {HOW_TO_MEND}")
    reason = "it has no model_index.json" if folder.is_dir() else "there is no such folder"
    meant = suggest(str(name), (SHIPPED_NAME, RELEASED_NAME))
    raise InputError(
        f"{folder} is not a pipeline folder ({reason}); expected a pipeline folder, the folder of a training run, "
        f"{SHIPPED_NAME} or {RELEASED_NAME}{meant}"
    )


def is_pipeline_folder(folder: Path) -> bool:
    """Whether a folder looks like a pipeline: it has a model_index.json, or that of FLUX.2 klein."""
    return (folder / "model_index.json").is_file() or is_klein_folder(folder)


def is_klein_folder(folder: Path) -> bool:
    """Whether a folder looks like what a run of FLUX.2 klein leaves: it has an imitation.json."""
    return (folder / IMITATION_FILE).is_file()


def read_index(folder: Path) -> dict[str, Any]:
    """Read the model_index.json of a pipeline folder.

    Raises:
        InputError: the folder is absent, no pipeline, or not complete.
        WeightsError: its index or a config is damaged, or see `check_components` and `checksums.check_checksums`.
    """
    index = folder / "model_index.json"
    if is_klein_folder(folder):
        raise InputError(f"{folder} contains FLUX.2 klein, but only a MimicBrush pipeline with U-Nets works here")
    if not is_pipeline_folder(folder):
        raise InputError(f"{folder} is not a pipeline folder (it has no model_index.json)")
    check_checksums(folder)
    components = read_object(index)
    check_components(folder, components)
    absent = [
        name
        for name, value in components.items()
        if isinstance(value, list) and value[0] is not None and not (folder / name).is_dir()
    ]
    if absent or components.get("_class_name") != "MimicBrushPipeline":
        problem = f"lacks {', '.join(absent)}" if absent else f"contains a {components.get('_class_name')}"
        raise InputError(f"{folder} is not a complete MimicBrush pipeline: it {problem}")
    return components


def check_components(folder: Path, index: dict[str, Any]) -> None:
    """Check the classes and configs of a pipeline folder before the libraries import and build them.

    Args:
        folder: of the pipeline.
        index: what its model_index.json holds.

    Raises:
        WeightsError: a component is to be of a class that is neither ours nor of diffusers or transformers; a config
            is damaged or asks for a boundless network; or a weights file has a boundless head.
    """
    for name, value in index.items():
        if not isinstance(value, list) or value == [None, None]:
            continue
        library, class_name = value if len(value) == 2 else (None, None)
        known = isinstance(library, str) and (library in _LIBRARIES or library.startswith(_OUR_CLASSES))
        if not known or not isinstance(class_name, str) or not name.isidentifier():
            raise WeightsError(
                f"{folder / 'model_index.json'} names {make_storable(f'{name}={value}')}, expected a class of "
                f"{' or '.join(_LIBRARIES)}, or one in {_OUR_CLASSES}*"
            )
        for file in (folder / name).glob("*config.json"):
            check_config_counts(read_object(file), file)
        for file in (folder / name).glob("*.safetensors"):
            check_head(file)


def class_names(index: dict[str, Any]) -> dict[str, str]:
    """List the class of each component that the pipeline has."""
    return {name: value[1] for name, value in index.items() if isinstance(value, list) and value[0] is not None}


def find_reference_network_name(classes: dict[str, str]) -> str | None:
    """Name what reads the reference, as `ModelOptions.reference_encoder` has it; None where no U-Net does.

    Args:
        classes: of the components, see `class_names`.
    """
    if "reference_unet" in classes:
        return "unet"
    return "shared" if classes.get("unet") == "SharedUNet" else None


def read_networks(folder: Path) -> dict[str, tuple[str, StoredNetwork]]:
    """Read class and files of each network of a pipeline folder, by component.

    Raises:
        InputError: see `read_index`.
        WeightsError: a file is absent or damaged.
    """
    networks = {}
    for name, class_name in class_names(read_index(folder)).items():
        if name != "scheduler":
            is_of_transformers = any((folder / name).glob("model*.safetensors"))
            file_stem = "model" if is_of_transformers else "diffusion_pytorch_model"
            networks[name] = class_name, read_network(folder / name, file_stem)
    return networks


def read_conventions(folder: Path) -> Conventions:
    """Read what a pipeline folder was made for, as `MimicBrushPipeline.options` says once it is loaded.

    Raises:
        InputError: see `read_index`.
        WeightsError: a config is absent or damaged.
    """
    index = read_index(folder)
    classes = class_names(index)
    configs = {name: read_object(folder / name / "config.json") for name in classes if name != "scheduler"}
    defaults = ModelOptions()
    options = {each.name: index.get(each.name, getattr(defaults, each.name)) for each in fields(ModelOptions)}
    try:
        unet, px_per_latent = configs["unet"], vae_scale_factor(configs["vae"])
        options |= {
            "size_px": operator.index(unet["sample_size"]) * px_per_latent,
            "reference_encoder": find_reference_network_name(classes) or encoder_without_unet(classes["image_encoder"]),
            "reference_sharing": (
                "keys_values" if classes.get("reference_unet") == "KeyValueReferenceUNet" else "hidden_states"
            ),
            "depth_channels": configs["depth_projector"].get("depth_channels", defaults.depth_channels),
        }
        levels = len(unet["block_out_channels"])
    except KeyError as error:
        raise WeightsError(f"{folder / 'unet' / 'config.json'} does not state {error}") from error
    except TypeError as error:
        raise WeightsError(f"a config.json in {folder} has a value of the wrong type ({error})") from error
    scheduler = read_object(folder / "scheduler" / "scheduler_config.json")
    return Conventions(
        options,
        px_per_latent * 2 ** (levels - 1),
        scheduler.get("prediction_type", "epsilon"),
        bool(scheduler.get("rescale_betas_zero_snr", False)),
    )
