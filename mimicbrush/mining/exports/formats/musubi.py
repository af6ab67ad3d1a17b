"""For musubi-tuner: JSON lines with control paths, and the dataset TOML that names them.

kohya-ss/musubi-tuner, docs/dataset_config.md (image dataset with metadata JSONL, and with control images):
`image_path`, `caption`, `control_path_0`, `control_path_1` and so on; `image_jsonl_file` and `cache_directory` in the
TOML. The paths are absolute, because src/musubi_tuner/dataset/datasources.py opens images relative to the working
directory. After an export was moved, run the same command again to update its paths.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from mimicbrush.mining.exports.formats.layout import (
    ExportFormat,
    FileContent,
    Record,
    SplitList,
    TrainingSample,
    write_json_lines,
)

_METADATA = "metadata.jsonl"
_PATHS = ("image_path", "control_path_")


def lay_out_for_musubi(sample: TrainingSample) -> tuple[dict[str, FileContent], Record]:
    """Lay out a sample with control 0 (the source with its hole) and the next controls (references)."""
    target = f"target/{sample.name}{sample.suffix}"
    conditions = (sample.source, *sample.references)
    controls = [f"control_{number}/{sample.name}{sample.suffix}" for number in range(len(conditions))]
    files: dict[str, FileContent] = {target: sample.target, f"mask/{sample.name}.png": sample.mask}
    record = {"image_path": target, "caption": sample.caption}
    record |= {f"control_path_{number}": path for number, path in enumerate(controls)}
    return files | dict(zip(controls, conditions, strict=True)), record


def list_for_musubi(split: SplitList) -> Iterator[tuple[str, Iterator[str]]]:
    """Write metadata.jsonl with the paths of each sample, and dataset.toml, which names it."""

    def find(record: Record) -> Record:
        return {key: str(split.folder / value) if key.startswith(_PATHS) else value for key, value in record.items()}

    yield _METADATA, write_json_lines(map(find, split.records))
    height, width = split.size_px
    lines = [
        "[general]",
        f"resolution = [{width}, {height}]",
        "batch_size = 1",
        "",
        "[[datasets]]",
        # A JSON string of printable characters is also a TOML string.
        f"image_jsonl_file = {json.dumps(str(split.folder / _METADATA), ensure_ascii=False)}",
        f"cache_directory = {json.dumps(str(split.folder / 'cache'), ensure_ascii=False)}",
    ]
    yield "dataset.toml", (f"{line}\n" for line in lines)


MUSUBI = ExportFormat(lay_out_for_musubi, list_for_musubi)
