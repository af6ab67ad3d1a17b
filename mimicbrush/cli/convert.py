"""Convert weights from and to other formats, or inspect them.

mimicbrush convert COMMAND --help explains each command.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from mimicbrush.errors import InputError
from mimicbrush.io.locks import hold_name
from mimicbrush.io.outputs import check_output_file, check_output_folder
from mimicbrush.ranges import CommandParser, one_of

#: Inputs of an import, by option.
INPUTS = {
    "checkpoint": "mimicbrush.bin of the release",
    "inpainting": "Stable Diffusion 1.5 inpainting (for the config of its U-Net)",
    "sd15": "Stable Diffusion 1.5 (for the config of its U-Net)",
    "vae": "autoencoder (VAE)",
    "image-encoder": "CLIP ViT-H/14 (for its config)",
    "depth": "Depth Anything: depth_anything_vitb14.pth, or a transformers folder",
}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = CommandParser(description=__doc__)
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")

    importing = commands.add_parser(
        "import",
        help="make a pipeline folder from the released weights",
        description="Make a pipeline folder from the released weights. Give either --snapshot and\n--base, "
        "with the layout of the hub (xichenhku/MimicBrush and xichenhku/cleansd),\nor each input as a file or its "
        "folder.",
    )
    importing.add_argument("--snapshot", type=Path, metavar="DIR", help="folder of xichenhku/MimicBrush")
    importing.add_argument("--base", type=Path, metavar="DIR", help="folder of xichenhku/cleansd")
    for name, meaning in INPUTS.items():
        importing.add_argument(f"--{name}", type=Path, metavar="PATH", help=meaning)
    importing.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the pipeline")
    importing.add_argument(
        "--dtype",
        **one_of("float32", "float16", "bfloat16"),
        help="data type to convert the weights to (default: as they are stored)",
    )
    importing.add_argument("--force", action="store_true", help="replace an existing pipeline")

    exporting = commands.add_parser(
        "export",
        help="make a mimicbrush.bin from a pipeline or a checkpoint",
        description="Make a mimicbrush.bin, which the released code and programs based on it can load.",
    )
    exporting.add_argument(
        "--pipeline", type=Path, metavar="DIR", help="pipeline folder (default: that of the run of the checkpoint)"
    )
    exporting.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="use the weights of this checkpoint, RUN/checkpoints/step-..."
    )
    exporting.add_argument(
        "--raw", action="store_true", help="use the last weights of the checkpoint instead of the averaged ones (EMA)"
    )
    exporting.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="file to write, such as mimicbrush.bin"
    )
    exporting.add_argument("--force", action="store_true", help="overwrite an existing file")

    renaming = commands.add_parser(
        "lora", help="convert a LoRA of FLUX.2 klein for ComfyUI", description=convert_lora.__doc__
    )
    renaming.add_argument("path", type=Path, metavar="RUN_OR_FILE", help="run of FLUX.2 klein, or its LoRA file")
    renaming.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="file to write, such as comfyui.safetensors"
    )
    renaming.add_argument("--force", action="store_true", help="overwrite an existing file")

    inspecting = commands.add_parser(
        "inspect", help="list parts, keys, shapes and types of weights", description=inspect.__doc__
    )
    inspecting.add_argument("path", type=Path, metavar="FILE_OR_DIR", help="file of weights, or a pipeline folder")
    inspecting.add_argument("--keys", action="store_true", help="list every key")
    inspecting.add_argument("--json", action="store_true", help="print JSON")

    differing = commands.add_parser("diff", help="show which parts of weights were trained", description=diff.__doc__)
    differing.add_argument(
        "--checkpoint", type=Path, required=True, metavar="PATH", help="mimicbrush.bin, or a pipeline folder"
    )
    for name in ("inpainting", "sd15", "image-encoder"):
        differing.add_argument(f"--{name}", type=Path, required=True, metavar="PATH", help="original weights")
    for name in ("vae", "depth"):
        differing.add_argument(
            f"--{name}", type=Path, metavar="PATH", help="original weights, to compare a pipeline with"
        )
    differing.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


def import_(arguments: argparse.Namespace) -> None:
    """Make a pipeline folder from the released weights."""
    import torch

    from mimicbrush.pipelines.conversion.import_released import import_released
    from mimicbrush.pipelines.conversion.layout import find_released

    names = [name.replace("-", "_") for name in INPUTS]
    files = find_released(arguments.snapshot, arguments.base, **{name: getattr(arguments, name) for name in names})
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    with hold_name(arguments.output):
        import_released(files, arguments.output, dtype=dtype, force=arguments.force)
    print(
        f"wrote the pipeline {arguments.output}. To edit with it:\n"
        f"  mimicbrush edit REF.jpg SRC.jpg MASK.png --model {shlex.quote(str(arguments.output.absolute()))}"
    )


def export(arguments: argparse.Namespace) -> None:
    """Make a mimicbrush.bin from a pipeline, or from a checkpoint of a run."""
    pipeline = arguments.pipeline
    if pipeline is None and arguments.checkpoint is None:
        raise InputError("there is nothing to export; give --pipeline DIR or --checkpoint RUN/checkpoints/step-...")
    if pipeline is None:
        pipeline = arguments.checkpoint.absolute().parents[1] / "pipeline"
        if not (pipeline / "model_index.json").is_file():
            raise InputError(
                f"--pipeline is not given, and the run has no pipeline yet ({pipeline}). A checkpoint has only the "
                "trained weights; the image encoder and all sizes come from a pipeline. To write the pipeline without "
                "further training, run the training command with train.resume=latest train.max_minutes=0"
            )

    from mimicbrush.pipelines.conversion.export_released import export_released

    warnings = export_released(
        pipeline,
        arguments.output,
        checkpoint=arguments.checkpoint,
        average=not arguments.raw,
        force=arguments.force,
    )
    for warning in warnings:
        print(f"warning: {warning}")
    print(f"wrote {arguments.output}")


def convert_lora(arguments: argparse.Namespace) -> None:
    """Convert a LoRA of FLUX.2 klein to the names that ComfyUI reads."""
    from mimicbrush.pipelines.klein.folder import find_klein_folder, find_lora, read_imitation

    folder = find_klein_folder(arguments.path)
    if folder is not None:
        read_imitation(folder, deep=True)
    file = find_lora(arguments.path, folder)
    if file is None:
        raise InputError(f"{arguments.path} has no LoRA of FLUX.2 klein; give a run, its pipeline/, or a LoRA file")
    from mimicbrush.models.flux2_klein.comfyui import convert_lora_for_comfyui

    convert_lora_for_comfyui(file, arguments.output)
    print(f"wrote {arguments.output}; put it into models/loras of ComfyUI")


def inspect(arguments: argparse.Namespace) -> None:
    """List the parts of a mimicbrush.bin, a state dict of any format, or a pipeline folder."""
    from mimicbrush.pipelines.conversion import inspection

    parts = inspection.inspect_weights(arguments.path)
    if arguments.json:
        print(json.dumps(inspection.parts_as_json(parts, keys=arguments.keys), indent=1))
    else:
        print(inspection.describe_parts(parts, keys=arguments.keys))


def diff(arguments: argparse.Namespace) -> None:
    """Compare weights with the original ones: show which parts were trained, and where."""
    from mimicbrush.pipelines.conversion import comparison

    changes = comparison.compare_with_stock(
        arguments.checkpoint,
        inpainting=arguments.inpainting,
        sd15=arguments.sd15,
        image_encoder=arguments.image_encoder,
        vae=arguments.vae,
        depth=arguments.depth,
    )
    print(
        json.dumps(comparison.changes_as_json(changes), indent=1)
        if arguments.json
        else comparison.describe_changes(changes)
    )


def check_paths(arguments: argparse.Namespace) -> None:
    """Refuse missing files before the libraries are imported, which takes ten seconds or more."""
    for name, path in vars(arguments).items():
        if isinstance(path, Path) and name != "output" and not (path.is_file() or path.is_dir()):
            option = "" if name == "path" else f"--{name.replace('_', '-')} "
            problem = "a pipe, a socket or a device" if path.exists() else "no such file or folder"
            raise InputError(f"{option}{path}: {problem}; expected a regular file or a folder")
    if arguments.command == "import":
        check_output_folder(arguments.output, "--output", is_replaced=True, force=arguments.force)
    elif arguments.command in ("export", "lora"):
        check_output_file(arguments.output, "--output", force=arguments.force)


def main() -> None:
    """Import, export, inspect or compare weights."""
    arguments = parse_arguments()
    check_paths(arguments)
    if arguments.command not in ("inspect", "lora"):
        print("reading weights; at full size, this takes a minute or more", file=sys.stderr)
    commands = {"import": import_, "export": export, "lora": convert_lora, "inspect": inspect, "diff": diff}
    commands[arguments.command](arguments)
