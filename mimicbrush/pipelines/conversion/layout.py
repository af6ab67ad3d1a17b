"""Where the released weights lie on the hub, and in folders of it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from mimicbrush.errors import InputError

MIMICBRUSH_REPOSITORY, BASE_REPOSITORY = "xichenhku/MimicBrush", "xichenhku/cleansd"


@dataclass(frozen=True)
class ReleasedFiles:
    """Paths of the released weights: each a file, or the folder that holds it (see `untrusted_files.weights_of`).

    Attributes:
        checkpoint: ``mimicbrush.bin``; all trained weights, and the image encoder's.
        inpainting: Stable Diffusion 1.5 inpainting, for the config of the U-Net.
        sd15: Stable Diffusion 1.5, for the config of the reference U-Net.
        vae: the autoencoder, weights and config.
        image_encoder: CLIP, for its config.
        depth: Depth Anything, as its authors published it, or a folder of transformers.
    """

    checkpoint: Path
    inpainting: Path
    sd15: Path
    vae: Path
    image_encoder: Path
    depth: Path


#: Input -> its place in the hub's layout: repository and path. What is read there: `HUB_FILES`.
LAYOUT = {
    "checkpoint": (MIMICBRUSH_REPOSITORY, "mimicbrush/mimicbrush.bin"),
    "inpainting": (BASE_REPOSITORY, "stable-diffusion-inpainting"),
    "sd15": (BASE_REPOSITORY, "stable-diffusion-v1-5"),
    "vae": (MIMICBRUSH_REPOSITORY, "sd-vae-ft-mse"),
    "image_encoder": (MIMICBRUSH_REPOSITORY, "image_encoder"),
    "depth": (MIMICBRUSH_REPOSITORY, "depth_model/depth_anything_vitb14.pth"),
}

#: Repository -> the files that an import reads; of the VAE's weights one will do.
HUB_FILES = {
    MIMICBRUSH_REPOSITORY: (
        "mimicbrush/mimicbrush.bin",
        "image_encoder/config.json",
        "sd-vae-ft-mse/config.json",
        "sd-vae-ft-mse/diffusion_pytorch_model.*",
        "depth_model/depth_anything_vitb14.pth",
    ),
    BASE_REPOSITORY: ("stable-diffusion-v1-5/unet/config.json", "stable-diffusion-inpainting/unet/config.json"),
}


def how_to_fetch_released(name: str) -> str:
    """Write the command that fetches an input of `ReleasedFiles`."""
    repository, path = LAYOUT[name]
    pattern = path if Path(path).suffix else f"{path}/*"
    return f"hf download {repository} --include '{pattern}'"


def find_released(snapshot: Path | None, base: Path | None, **named: Path | None) -> ReleasedFiles:
    """Find all inputs of an import: those that are named, the others in the hub's layout.

    Args:
        snapshot: folder of `MIMICBRUSH_REPOSITORY`.
        base: folder of `BASE_REPOSITORY`.
        named: fields of `ReleasedFiles`.

    Raises:
        InputError: names every input that is absent, and how to get it.
    """
    roots = {MIMICBRUSH_REPOSITORY: ("--snapshot", snapshot), BASE_REPOSITORY: ("--base", base)}
    found: dict[str, Path] = {}
    missing: list[str] = []
    for field in fields(ReleasedFiles):
        repository, path = LAYOUT[field.name]
        option, root = roots[repository]
        given = named.get(field.name) or (root / path if root is not None else None)
        if given is not None and given.exists():
            found[field.name] = given
        else:
            problem = (
                f"{given}: no such file or folder"
                if given is not None
                else f"neither this option nor {option} is given"
            )
            name = field.name.replace("_", "-")
            missing.append(f"  --{name}: {problem}. Download it: {how_to_fetch_released(field.name)}")
    if missing:
        raise InputError(
            "some files for the import are missing:\n"
            + "\n".join(missing)
            + "\n  Or download everything, and give --snapshot and --base:\n"
            f"  hf download {MIMICBRUSH_REPOSITORY} --local-dir SNAPSHOT\n"
            f"  hf download {BASE_REPOSITORY} --local-dir BASE"
        )
    return ReleasedFiles(**found)
