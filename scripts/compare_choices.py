"""Measure how much each choice between paper and released code changes an edit.

python scripts/compare_choices.py REF SRC MASK --model DIR

Prints a Markdown table with one row for each choice. Each row compares two edits
with the same seed: one with the settings of the pipeline, and one in which only
this choice is changed. The difference is the mean under the mask, in levels of
255. Choices that need other weights are not in the table
(docs/paper_vs_code.md lists them).
"""

from __future__ import annotations

from pathlib import Path

from mimicbrush.errors import cli_main
from mimicbrush.ranges import SEED_RANGE, STEPS_RANGE, CommandParser

#: option -> its two values; each is an option of the pipeline.
CHOICES = {
    "reference_blend": (1.0, 0.5),
    "reference_timestep": ("current", "zero"),
    "depth_convention": ("standard", "released"),
    "no_depth_convention": ("zero_map", "zero_input"),
    "letterbox_order": ("resize_then_pad", "pad_then_resize"),
    "posterior": ("sample", "mean"),
}


def main() -> None:
    parser = CommandParser(description=__doc__)
    for name in ("reference", "source", "mask"):
        parser.add_argument(name, type=Path)
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="pipeline folder, as for `mimicbrush edit`"
    )
    parser.add_argument("--seed", type=SEED_RANGE.read, default=1)
    parser.add_argument("--steps", type=STEPS_RANGE.read, help="denoising steps (default: as stored with the pipeline)")
    arguments = parser.parse_args()

    import numpy as np
    import torch

    from mimicbrush.io.images import read_image
    from mimicbrush.ops.canvas import MASK_THRESHOLD
    from mimicbrush.pipelines import MimicBrushPipeline
    from mimicbrush.pipelines.open_pipeline import open_pipeline, seeded_generator

    source, reference = read_image(arguments.source, "RGB"), read_image(arguments.reference, "RGB")
    mask = read_image(arguments.mask, "L")
    hole = np.asarray(mask) > MASK_THRESHOLD
    pipe = open_pipeline(arguments.model, "cpu", "float32")
    side = pipe.unet.config.sample_size
    start = torch.randn(1, pipe.vae.config.latent_channels, side, side, generator=seeded_generator(arguments.seed))

    def edited(keep_shape: bool, **choice: object) -> np.ndarray:
        options = {name: pipe.config[name] for name in pipe.config if name.startswith("default_") or name in CHOICES}
        changed = MimicBrushPipeline(**pipe.components, **{**options, **choice})
        changed.set_progress_bar_config(disable=True)
        result = changed(
            source,
            mask,
            reference,
            num_inference_steps=arguments.steps,
            keep_shape=keep_shape,
            latents=start,  # whatever else is drawn
            generator=seeded_generator(arguments.seed),
        )
        return np.asarray(result.images[0], float)[hole]

    usual = {keep_shape: edited(keep_shape) for keep_shape in (False, True)}
    print("| option | setting of the weights | other setting | mean difference in the hole, levels of 255 |")
    print("|---|---|---|---|")
    for name, values in CHOICES.items():
        own = pipe.config[name]
        other = values[1] if own == values[0] else values[0]
        keep_shape = name == "depth_convention"  # without it no depth is estimated
        difference = np.abs(edited(keep_shape, **{name: other}) - usual[keep_shape]).mean()
        print(f"| `{name}`{', shape kept' if keep_shape else ''} | `{own}` | `{other}` | {difference:.2f} |")
    noise = np.abs(usual[False] - usual[True]).mean()
    print(f"| for scale: `keep_shape` | `False` | `True` | {noise:.2f} |")


if __name__ == "__main__":
    cli_main(main)
