"""Export of FLUX.2 klein: a LoRA file of diffusers, or a whole base model after full training."""

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
    """Makes the folder that a run exports, and the pipeline for its evaluations, from weights.

    Args:
        parts: all networks; of the transformer only the config is kept.
        prompt: the one of the training.
        imitation: what the weights are trained for.
        train_options: of the run.
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
        """Build a pipeline with copies of these weights, to edit with in this process.

        All weights are taken, also after an error: all processes gather sharded ones together.

        Args:
            weights: name in `KleinModel` -> tensor, all of them.
            vae: to share; the copies get its device and type.
        """
        with take_all(weights) as rest:
            transformer = self._rebuild(rest, vae.device, vae.dtype, with_frozen=True)
        components = replace(self.parts, transformer=transformer.eval(), vae=vae, text_encoder=None, tokenizer=None)
        return KleinPipeline(components.build_pipeline(), self.imitation, self.prompt)

    def export(self, weights: ExportWeights, folder: Path, *, half: bool = False) -> None:
        """Save a folder that edits with these weights. Every process must call it; the main one writes.

        Args:
            weights: name in `KleinModel` -> tensor, all of them.
            folder: an older one is replaced when the new one is complete.
            half: all weights in bfloat16, as the base is published.
        """
        quiet_libraries()
        dtype = torch.bfloat16 if half else None

        def write(aside: Path) -> None:
            # Of a base that lies elsewhere, adapters alone are written.
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
        """Build a transformer, with adapters if any, of copies of these weights; frozen ones may stay without content.

        Args:
            weights: name in `KleinModel` -> tensor.
            device: of the copies.
            dtype: of the copies; None: as the weights are.
            with_frozen: whether frozen weights are copied, too.
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
