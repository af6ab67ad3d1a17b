"""For diffusers: an image folder with metadata.jsonl, which `datasets.load_dataset` opens.

huggingface/diffusers, examples/dreambooth/train_dreambooth_lora_flux2_klein_img2img.py (and its siblings for FLUX.2
dev, Qwen-Image and FLUX.1 Kontext): `--dataset_name` is a folder, `--image_column`, `--cond_image_column` and
`--caption_column` name its columns. They take one condition image, so an export for them is made with both images side
by side. huggingface/datasets, src/datasets/packaged_modules/folder_based_builder/folder_based_builder.py: a column
called `file_name` becomes the image `image`, and `X_file_name` becomes the image `X`.
"""

from __future__ import annotations

from collections.abc import Iterator

from mimicbrush.mining.exports.formats.layout import (
    ExportFormat,
    FileContent,
    Record,
    SplitList,
    TrainingSample,
    number_names,
    write_json_lines,
)


def lay_out_for_diffusers(sample: TrainingSample) -> tuple[dict[str, FileContent], Record]:
    """Lay out a sample with the columns image, source, reference, mask and text."""
    images = {
        "image": ("target", sample.target, sample.suffix),
        "source": ("source", sample.source, sample.suffix),
        "mask": ("mask", sample.mask, ".png"),
    }
    for column, reference in zip(number_names("reference", len(sample.references)), sample.references, strict=True):
        images[column] = (column, reference, sample.suffix)
    paths = {column: f"{folder}/{sample.name}{suffix}" for column, (folder, _, suffix) in images.items()}
    record = {"file_name": paths["image"], "text": sample.caption}
    record |= {f"{column}_file_name": path for column, path in paths.items() if column != "image"}
    return {paths[column]: pixels for column, (_, pixels, _) in images.items()}, record


def list_for_diffusers(split: SplitList) -> Iterator[tuple[str, Iterator[str]]]:
    """Write metadata.jsonl, with the columns of each sample."""
    yield "metadata.jsonl", write_json_lines(split.records)


DIFFUSERS = ExportFormat(lay_out_for_diffusers, list_for_diffusers)
