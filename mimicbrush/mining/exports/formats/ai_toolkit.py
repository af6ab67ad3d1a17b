"""For ai-toolkit: a folder of targets with captions, and a folder for each control image.

ostris/ai-toolkit, config/examples/train_lora_qwen_image_edit_2509_32gb.yaml: `folder_path`, `control_path` (a list of
up to three folders whose files have the names of the targets), `caption_ext`. toolkit/config_modules.py
(`DatasetConfig`): `mask_path` is a weight of the loss, larger for white than for black. toolkit/dataloader_mixins.py
(`ControlFileItemDTOMixin`) finds a control image by the name of the target without its suffix.
"""

from __future__ import annotations

from mimicbrush.mining.exports.formats.layout import ExportFormat, FileContent, Record, TrainingSample


def lay_out_for_ai_toolkit(sample: TrainingSample) -> tuple[dict[str, FileContent], Record]:
    """Lay out a sample in target/, control_1/ (the source with its hole), control_2/ (the reference) and mask/."""
    files: dict[str, FileContent] = {
        f"target/{sample.name}{sample.suffix}": sample.target,
        f"target/{sample.name}.txt": sample.caption,
        f"mask/{sample.name}.png": sample.mask,
    }
    for number, image in enumerate((sample.source, *sample.references), start=1):
        files[f"control_{number}/{sample.name}{sample.suffix}"] = image
    return files, {}


AI_TOOLKIT = ExportFormat(lay_out_for_ai_toolkit)
