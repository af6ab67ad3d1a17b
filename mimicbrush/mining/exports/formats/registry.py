"""All formats, by their names for ``--format``."""

from __future__ import annotations

from mimicbrush.mining.exports.formats.ai_toolkit import AI_TOOLKIT
from mimicbrush.mining.exports.formats.diffsynth import DIFFSYNTH
from mimicbrush.mining.exports.formats.diffusers_folder import DIFFUSERS
from mimicbrush.mining.exports.formats.layout import ExportFormat
from mimicbrush.mining.exports.formats.musubi import MUSUBI
from mimicbrush.mining.exports.formats.onetrainer import ONETRAINER
from mimicbrush.mining.exports.formats.webdataset_tars import WEBDATASET

FORMATS: dict[str, ExportFormat] = {
    "diffusers": DIFFUSERS,
    "diffsynth": DIFFSYNTH,
    "ai-toolkit": AI_TOOLKIT,
    "onetrainer": ONETRAINER,
    "musubi": MUSUBI,
    "webdataset": WEBDATASET,
}
