"""For WebDataset: tars in which the files of a sample follow each other and share their name up to the first dot.

webdataset/webdataset, src/webdataset/tariterators.py (`base_plus_ext`, `group_by_keys`): the text after the first dot
is the key, so NAME.target.png has the key "target.png". Its last part decides how the file is decoded.
"""

from __future__ import annotations

import json

from mimicbrush.mining.exports.formats.layout import ExportFormat, FileContent, Record, TrainingSample, number_names


def lay_out_for_webdataset(sample: TrainingSample) -> tuple[dict[str, FileContent], Record]:
    """Lay out a sample with the keys target.png, source.png, reference.png, mask.png, txt and json."""
    files: dict[str, FileContent] = {
        f"{sample.name}.target{sample.suffix}": sample.target,
        f"{sample.name}.source{sample.suffix}": sample.source,
        f"{sample.name}.mask.png": sample.mask,
        f"{sample.name}.txt": sample.caption,
        f"{sample.name}.json": json.dumps(dict(sample.facts)),
    }
    for key, reference in zip(number_names("reference", len(sample.references)), sample.references, strict=True):
        files[f"{sample.name}.{key}{sample.suffix}"] = reference
    return files, {}


WEBDATASET = ExportFormat(lay_out_for_webdataset, in_tars=True)
