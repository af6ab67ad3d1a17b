"""Exports FLUX.2 klein: a LoRA file of diffusers, or a whole base model after full training."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel

from mimicbrush.data.training_data import TrainingData, write_training_data
from mimicbrush.io.atomic import apply_umask, replace_folder
from mimicbrush.models.flux2_klein.components import KleinComponents
from mimicbrush.models.flux2_klein.prompt import PromptEmbeddings
from mimicbrush.models.library_logs import quiet_libraries
from mimicbrush.pipelines.flux2_klein import KleinImitation, KleinPipeline, write_klein_folder
from mimicbrush.pipelines.klein.folder import BASE_FOLDER
from mimicbrush.training.export import ExportWeights, take_all
from mimicbrush.training.lora import freeze_and_adapt
from mimicbrush.training.options import TrainOptions


class KleinExporter:
    """Makes the exported folder of a run, and the pipeline for its evaluations, from weights.

    Args:
        parts: all networks; only the config of the transformer is used.
        prompt: the prompt of the training.
        imitation: settings that the weights are trained for.
        train_options: options of the run.
        training_data: saved with the weights, for evaluations.
    """

    def __init__(
        self,
        parts: KleinComponents,
        prompt: PromptEmbeddings,
        imitation: KleinImitation,
        train_options: TrainOptions,
        training_data: TrainingData,
    ) -> None:
        self.parts, self.config = parts, parts.transformer.config
        self.prompt, self.imitation = prompt, imitation
        self.train_options, self.training_data = train_options, training_data

    def build_pipeline(self, weights: ExportWeights, vae: AutoencoderKLFlux2) -> KleinPipeline:
        """Build a pipeline with copies of these weights, for edits in this process.

        The iterator of weights is always consumed to its end, also after an error, because all processes gather sharded
        weights together.

        Args:
            weights: name in `KleinModel` -> tensor, all of them.
            vae: the VAE to share; the copies get its device and type.
        """
        with take_all(weights) as rest:
            transformer = self._rebuild(rest, vae.device, vae.dtype, with_frozen=True)
        components = replace(self.parts, transformer=transformer.eval(), vae=vae, text_encoder=None, tokenizer=None)
        return KleinPipeline(components.build_pipeline(), self.imitation, self.prompt)

    def export(self, weights: ExportWeights, folder: Path, *, half: bool = False) -> None:
        """Save a folder to edit with these weights. Every process must call this; the main process writes.

        Args:
            weights: name in `KleinModel` -> tensor, all of them.
            folder: folder to write; an existing one is replaced when the new one is complete.
            half: save all weights in bfloat16, as the published base.
        """
        quiet_libraries()
        dtype = torch.bfloat16 if half else None

        def write(aside: Path) -> None:
            # If the base is another folder, only the adapters are written.
            has_base = self.imitation.base == BASE_FOLDER
            transformer = self._rebuild(rest, torch.device("cpu"), dtype, with_frozen=has_base)
            vae = self.parts.vae if dtype is None else copy.deepcopy(self.parts.vae).to(dtype)
            components = replace(self.parts, transformer=transformer, vae=vae)
            aside.mkdir(parents=True)
            write_training_data(aside, self.training_data)
            write_klein_folder(aside, self.imitation, self.prompt, components)
            apply_umask(aside)

        with take_all(weights) as rest:
            if PartialState().is_main_process:
                replace_folder(folder, write)

    def _rebuild(
        self, weights: ExportWeights, device: torch.device, dtype: torch.dtype | None, *, with_frozen: bool
    ) -> Flux2Transformer2DModel:
        """Build a transformer, with adapters if any, from copies of these weights.

        Args:
            weights: name in `KleinModel` -> tensor.
            device: device of the copies.
            dtype: type of the copies; None: that of the weights.
            with_frozen: also copy frozen weights; otherwise they stay on the meta device.
        """
        with torch.device("meta"):
            transformer = Flux2Transformer2DModel.from_config(self.config)
            freeze_and_adapt({"transformer": transformer}, self.train_options)
        parameters = dict(transformer.named_parameters())
        copies = {}
        for full_name, tensor in weights:
            name = full_name.removeprefix("transformer.")
            if with_frozen or parameters[name].requires_grad:
                copies[name] = tensor.detach().to(device, dtype, copy=True)
        transformer.load_state_dict(copies, strict=with_frozen, assign=True)
        return transformer
