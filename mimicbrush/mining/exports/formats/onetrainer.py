"""For OneTrainer: a concept folder with mask and condition image next to the target.

Nerogar/OneTrainer, modules/dataLoader/mixin/DataLoaderText2ImageMixin.py: NAME-masklabel.png is read with masked
training, NAME-condlabel.png with a custom conditioning image, both always as PNG; each line of NAME.txt is a caption of
which one is chosen. Pull requests 812 (FLUX Fill) and 1301 (FLUX.2): one condition image, of the size of the target,
cropped and flipped together with it. So it is the source with its hole; an export with both images side by side has
the reference in it. References by themselves lie in a folder that is no part of the concept.
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
