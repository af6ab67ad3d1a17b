"""What views that are encoded once (`data.encoded_views`) save of a training step, and take on a disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from measurements.harness import Counted
from measurements.training_step import FULL_SIZE_PX, StepSetting

if TYPE_CHECKING:
    from mimicbrush.models.components import Components
    from mimicbrush.models.options import ModelOptions


def encoded_views() -> Iterator[Counted]:
    """FLOP of a sample that needs no frozen encoder, and the bytes of a view instead: full size, and the small model"""
    yield Counted("full size, no drops", count_full_size)
    yield Counted("the small model, no drops", count_small)


def count_full_size() -> dict[str, float]:
    """Count SD-1.5 at 512 px on the meta device; the measurement `encoders` says what they take with drops."""
    from mimicbrush.models.options import ModelOptions

    return _count(StepSetting(device="meta").networks(), ModelOptions(), FULL_SIZE_PX)


def count_small() -> dict[str, float]:
    """Count the small model of the experiment with this name, over the encoders that come with the project."""
    from typing import cast

    from mimicbrush.cli.repository import CONFIGS, REPOSITORY
    from omegaconf import OmegaConf

    from mimicbrush.assembly import TrainConfig, build_components
    from mimicbrush.assembly.prerequisites import compose_training

    encoders = REPOSITORY / "mimicbrush" / "assets" / "proof"
    overrides = ["+experiment=small", f"model.encoders={encoders}"]
    options = cast(TrainConfig, OmegaConf.to_object(compose_training(overrides, CONFIGS)))
    return _count(build_components(options.model, options.seed), options.model, options.model.size_px)


def _count(parts: Components, options: ModelOptions, size_px: int) -> dict[str, float]:
    from mimicbrush.data.encoded_views import make_row_forms
    from mimicbrush.data.options import DataOptions
    from mimicbrush.training.objective import FrozenEncoders, MimicBrushModel
    from mimicbrush.training.performance import count_training_flop

    model = MimicBrushModel(
        parts.unet, parts.reference_unet, parts.image_projector, parts.depth_projector, size_px=size_px
    )
    encoders = FrozenEncoders(parts, options)
    live, stored = (count_training_flop(model, encoders, is_encoded=is_encoded) for is_encoded in (False, True))
    tokens, depth_map = encoders.unconditional_inputs(parts.vae.device)
    side = parts.unet.config.sample_size
    forms = make_row_forms(
        (4, side, side),
        (tokens.shape[1], tokens.shape[2]),
        (depth_map.shape[2], depth_map.shape[3]),
        DataOptions().num_matches,
        "float16",
    )
    num_bytes = {name: float(form.num_bytes) for name, form in forms.items()}
    return {
        "live_gflop": live / 1e9,
        "encoded_gflop": stored / 1e9,
        "saved_ratio": 1 - stored / live,
        "bytes_per_view": sum(num_bytes.values()),
        "latents_bytes": num_bytes["mean"] + num_bytes["std"],
        "image_tokens_bytes": num_bytes["image_tokens"],
        "depth_bytes": num_bytes["depth_map"],
    }
