"""Edit a picture by imitating another: python scripts/infer.py REF.jpg SRC.jpg MASK.png --model DIR."""

from __future__ import annotations

import argparse
from pathlib import Path

from mimicbrush.errors import InputError, run_plainly

MODELS = """no model was named. --model takes:
  DIR   a pipeline folder: `python scripts/train.py +experiment=smoke data.root=MINED` leaves one in
        runs/smoke/pipeline (a toy); a full training run leaves one in its run_dir
  Nothing is downloaded, and no weights are shipped yet."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reference", type=Path, help="picture to imitate")
    parser.add_argument("source", type=Path, help="picture to edit")
    parser.add_argument("mask", type=Path, help="of the source's size; white = repaint")
    parser.add_argument("--model", type=Path, metavar="DIR", help="pipeline folder")
    parser.add_argument("-o", "--output", type=Path, help="default: SRC_edited.png in this folder")
    parser.add_argument("--steps", type=int, help="DDIM steps (default: the pipeline's)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance (default: the pipeline's)")
    parser.add_argument("--seed", type=int, default=1, help="of the noise (default: 1)")
    parser.add_argument("--keep-shape", action="store_true", help="texture transfer: keep the source's shape")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--force", action="store_true", help="overwrite the output")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.model is None:
        raise InputError(MODELS)
    if not (arguments.model / "model_index.json").is_file():
        raise InputError(f"--model {arguments.model} is no pipeline folder (it has no model_index.json)")
    output = arguments.output or Path(f"{arguments.source.stem}_edited.png")
    if output.exists() and not arguments.force:
        raise InputError(f"{output} exists; name another with -o, or overwrite it with --force")

    from mimicbrush.ops.files import check_writable, read_picture, write_picture

    check_writable(output)
    source, reference = read_picture(arguments.source, "RGB"), read_picture(arguments.reference, "RGB")
    mask = read_picture(arguments.mask, "L")
    if mask.size != source.size:
        raise InputError(
            f"{arguments.mask} is {mask.width} x {mask.height} px but {arguments.source} is "
            f"{source.width} x {source.height} px; a mask must have its source's size"
        )

    from mimicbrush.pipelines.load import load_pipeline, on_device, seeded

    pipeline = on_device(load_pipeline(arguments.model), arguments.device)
    result = pipeline(
        source,
        mask,
        reference,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance,
        keep_shape=arguments.keep_shape,
        generator=seeded(arguments.seed),
    ).images[0]
    write_picture(result, output)
    print(f"{output}: {result.width} x {result.height} px, repainted at {pipeline.size_px} px, seed {arguments.seed}")


if __name__ == "__main__":
    run_plainly(main)
