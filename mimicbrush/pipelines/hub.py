"""Saving a pipeline and uploading it, with a card: what it is, what its weights need, how to use it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData, create_repo
from huggingface_hub.errors import EntryNotFoundError

from mimicbrush.data.training_data import TRAINING_DATA_FILE
from mimicbrush.errors import InputError
from mimicbrush.models.options import ModelOptions
from mimicbrush.pipelines.checksums import check_checksums, write_checksums
from mimicbrush.pipelines.folder import check_components
from mimicbrush.pipelines.small_model import SHIPPED_NAMES, model_folder


def write_model_card(folder: Path, options: ModelOptions, config: Mapping[str, object]) -> None:
    """Write README.md into a pipeline folder, unless there is one already: that may be somebody's own.

    Args:
        folder: of the pipeline.
        options: where paper and released code differ.
        config: of the pipeline.
    """
    if (folder / "README.md").exists():
        return
    data = ModelCardData(
        library_name="mimicbrush",
        pipeline_tag="image-to-image",
        tags=["mimicbrush", "diffusers", "image-editing", "inpainting", "reference-guided"],
    )
    rows = "\n".join(f"| `{name}` | `{value}` |" for name, value in asdict(options).items())
    ModelCard(f"""---
{data.to_yaml()}
---

# A MimicBrush pipeline

Repaints the masked part of a source image so that it imitates the matching part of a reference image
([paper](https://arxiv.org/abs/2406.07547)).

```python
from PIL import Image
from mimicbrush.pipelines import MimicBrushPipeline

pipe = MimicBrushPipeline.from_pretrained("PATH OR REPOSITORY OF THIS CARD")
source, mask, reference = (Image.open(name) for name in ("src.jpg", "mask.png", "ref.jpg"))
pipe(source, mask, reference).images[0].save("result.png")
```

The default is {config["default_num_inference_steps"]} steps with guidance {config["default_guidance_scale"]}.
The paper and the released code differ in the options below. These weights were trained for these values:

| option | value |
|---|---|
{rows}
""").save(folder / "README.md")


def keep_card_of_hub(folder: Path, repo_id: str, token: str | None) -> None:
    """Put the card that a repository has into a folder that has none, so that an upload does not overwrite it."""
    if (folder / "README.md").exists():
        return
    with contextlib.suppress(EntryNotFoundError):  # a repository without a card
        ModelCard.load(repo_id, token=token).save(folder / "README.md")


def _check_safe(name: str, value: bool | None) -> None:
    """Raises InputError where one of diffusers' options asks for pickles."""
    if value is False:
        raise InputError(
            f"{name}=False is not supported: pickled weights can run code, so pipelines are read and written only as "
            ".safetensors; mimicbrush convert imports and exports the released pickles"
        )


class OldName:
    """Older name of an attribute of a pipeline: gives what the new name gives, in subclasses, too.

    Args:
        new: the name today.
    """

    def __init__(self, new: str) -> None:
        self.new = new

    def __get__(self, pipeline: object | None, kind: type) -> Any:
        return getattr(kind if pipeline is None else pipeline, self.new)


class HubPipeline(DiffusionPipeline):
    """Base of the pipeline: loads, saves and uploads as diffusers does, with three differences.

    It uses only safetensors; it writes its own model card; and it refuses attention processors of diffusers that would
    ignore the reference.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse a subclass that overrides an attribute by its older name: nothing would call it."""
        super().__init_subclass__(**options)
        for base in cls.__mro__[1:]:
            for name, old in vars(base).items():
                if isinstance(old, OldName) and name in vars(cls):
                    raise TypeError(f"{cls.__name__} overrides {name}, which is named {old.new} now")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        use_safetensors: bool | None = True,
        **options: Any,
    ) -> Self:
        """Load a pipeline as diffusers does, but never from a pickle.

        Args:
            pretrained_model_name_or_path: a folder, a repository of the hub, or "small" for the model that comes with
                the project.
            use_safetensors: must be True or None; both load only safetensors.
            options: as in diffusers.

        Raises:
            InputError: `use_safetensors` is False.
            WeightsError: a folder does not contain the files that were saved.
            OSError: a network has no safetensors; otherwise as in diffusers.
        """
        _check_safe("use_safetensors", use_safetensors)
        if str(pretrained_model_name_or_path) in SHIPPED_NAMES:
            pretrained_model_name_or_path = model_folder(str(pretrained_model_name_or_path))
        loaded: Self = super().from_pretrained(pretrained_model_name_or_path, use_safetensors=True, **options)
        # Of a component that is handed in, the files are not read.
        check_checksums(Path(pretrained_model_name_or_path), deep=True, without=options)
        return loaded

    @classmethod
    def load_config(cls, *arguments: Any, **options: Any) -> Any:
        """Read the index of a pipeline as diffusers does, and check it before anything is imported or built from it.

        Raises:
            WeightsError: see `folder.check_components`.
        """
        config = super().load_config(*arguments, **options)
        folder = Path(str(arguments[0] if arguments else options["pretrained_model_name_or_path"]))
        if (folder / "model_index.json").is_file():
            check_components(folder, config)
        return config

    def options(self) -> ModelOptions:
        """Return the options of this pipeline where paper and released code differ."""
        raise NotImplementedError

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
    ) -> None:
        """Save the pipeline as diffusers does, with checksums, and a model card that states the options of its weights.

        Args:
            save_directory: a folder.
            safe_serialization: must be True.
            variant, max_shard_size: as in diffusers.
            push_to_hub: also upload the folder.
            repo_id: repository to upload to; default: the name of the folder.
            commit_message, private, token, create_pr: of the upload, as in diffusers.

        Raises:
            InputError: `safe_serialization` is False.
        """
        _check_safe("safe_serialization", safe_serialization)
        folder = Path(save_directory)
        super().save_pretrained(str(folder), safe_serialization=True, variant=variant, max_shard_size=max_shard_size)
        parts = [name for name, value in self.components.items() if value is not None]
        write_checksums(folder, ["model_index.json", TRAINING_DATA_FILE, *parts])
        if push_to_hub:
            repo_id = create_repo(repo_id or folder.name, private=private, token=token, exist_ok=True).repo_id
            keep_card_of_hub(folder, repo_id, token)
        write_model_card(folder, self.options(), dict(self.config))
        if push_to_hub:
            self._upload_folder(folder, repo_id, token=token, commit_message=commit_message, create_pr=create_pr)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> str:
        """Upload the pipeline as diffusers does, but with a model card that states the options of its weights."""
        _check_safe("safe_serialization", safe_serialization)
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            if subfolder is None:
                keep_card_of_hub(Path(folder), repo_id, token)
            self.save_pretrained(folder, variant=variant)
            return self._upload_folder(
                folder,
                repo_id,
                token=token,
                commit_message=commit_message,
                create_pr=create_pr,
                subfolder=subfolder,
            )

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Refuse attention slicing, because diffusers' sliced attention would ignore the reference.

        Raises:
            InputError: always, except for None, which turns slicing off in diffusers.
        """
        if slice_size is None:
            return
        raise InputError(
            "attention slicing would ignore the reference; PyTorch's attention already needs little memory. To save "
            "more, use enable_model_cpu_offload() or pipe.vae.enable_slicing()"
        )

    def enable_xformers_memory_efficient_attention(self, attention_op: Callable[..., Any] | None = None) -> None:
        """Refuse xFormers' processors, which would ignore the reference; use xFormers as an attention backend instead.

        Raises:
            InputError: always; names the call that sets the backend.
        """
        raise InputError(
            "xFormers' attention processors would ignore the reference; use xFormers as a backend instead: "
            'pipe.unet.set_attention_backend("xformers")'
        )
