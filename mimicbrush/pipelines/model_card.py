"""The card of a saved pipeline: what it is, what its weights need, how to use it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError

from mimicbrush.models.options import ModelOptions


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

Repaints the masked part of a source picture so that it imitates the matching part of a reference picture
([paper](https://arxiv.org/abs/2406.07547)).

```python
from PIL import Image
from mimicbrush.pipelines import MimicBrushPipeline

pipe = MimicBrushPipeline.from_pretrained("PATH OR REPOSITORY OF THIS CARD")
source, mask, reference = (Image.open(name) for name in ("src.jpg", "mask.png", "ref.jpg"))
pipe(source, mask, reference).images[0].save("result.png")
```

Edits with {config["default_num_inference_steps"]} steps and guidance {config["default_guidance_scale"]} by default.
Paper and released code differ in what follows; these weights belong to these choices:

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
