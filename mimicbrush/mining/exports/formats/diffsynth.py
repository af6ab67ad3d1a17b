"""For DiffSynth-Studio: metadata.json with a list of edit images for each target.

modelscope/DiffSynth-Studio, examples/flux2/model_training/lora/FLUX.2-klein-base-4B.sh ("Edit") and
examples/qwen_image/model_training/lora/Qwen-Image-Edit-2509.sh: `--dataset_base_path`, `--dataset_metadata_path`,
`--data_file_keys "image,edit_image"`, `--extra_inputs "edit_image"`. diffsynth/core/data/unified_dataset.py reads the
metadata. In .json, a cell can be a list of paths. In .csv, it cannot, and pandas would read the caption "1" as a number
and "NA" as a missing value. Paths are relative to the base path.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from mimicbrush.mining.exports.formats.layout import ExportFormat, FileContent, Record, SplitList, TrainingSample


def lay_out_for_diffsynth(sample: TrainingSample) -> tuple[dict[str, FileContent], Record]:
    """Lay out a sample with the keys image, edit_image (the source with its hole, then references), mask and prompt."""
    target, mask = f"target/{sample.name}{sample.suffix}", f"mask/{sample.name}.png"
    conditions = (sample.source, *sample.references)
    edits = [f"edit_image_{number}/{sample.name}{sample.suffix}" for number in range(len(conditions))]
    files: dict[str, FileContent] = {target: sample.target, mask: sample.mask}
    files |= zip(edits, conditions, strict=True)
    return files, {"image": target, "edit_image": edits, "mask": mask, "prompt": sample.caption}


def list_for_diffsynth(split: SplitList) -> Iterator[tuple[str, Iterator[str]]]:
    """Write metadata.json, one sample per line."""

    def pieces() -> Iterator[str]:
        before = "[\n"
        for record in split.records:
            yield before + json.dumps(record)
            before = ",\n"
        yield "[]\n" if before == "[\n" else "\n]\n"

    yield "metadata.json", pieces()


DIFFSYNTH = ExportFormat(lay_out_for_diffsynth, list_for_diffsynth)
