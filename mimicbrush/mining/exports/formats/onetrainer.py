"""For OneTrainer: a concept folder with mask and condition image next to the target.

Nerogar/OneTrainer, modules/dataLoader/mixin/DataLoaderText2ImageMixin.py: NAME-masklabel.png is read for masked
training, NAME-condlabel.png as a custom conditioning image, both always as PNG. Each line of NAME.txt is a caption, and
one of them is chosen. Pull requests 812 (FLUX Fill) and 1301 (FLUX.2): there is one condition image, with the size of
the target. It is cropped and flipped like the target. So the condition image is the source with its hole; with images
side by side, it also contains the reference. Separate references are in a folder outside the concept.
"""

from __future__ import annotations

from mimicbrush.mining.exports.formats.layout import ExportFormat, FileContent, Record, TrainingSample, number_names


def lay_out_for_onetrainer(sample: TrainingSample) -> tuple[dict[str, FileContent], Record]:
    """Lay out a sample as concept/NAME.png, NAME-masklabel.png, NAME-condlabel.png and NAME.txt."""
    files: dict[str, FileContent] = {
        f"concept/{sample.name}{sample.suffix}": sample.target,
        f"concept/{sample.name}-masklabel.png": sample.mask,
        f"concept/{sample.name}-condlabel.png": sample.source,
        f"concept/{sample.name}.txt": sample.caption,
    }
    for folder, reference in zip(number_names("reference", len(sample.references)), sample.references, strict=True):
        files[f"{folder}/{sample.name}{sample.suffix}"] = reference
    return files, {}


ONETRAINER = ExportFormat(lay_out_for_onetrainer)
