"""What can be chosen about an evaluation. configs/evaluate.yaml says the same (a test compares)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mimicbrush.errors import InputError

EvaluationSplit = Literal["heldout", "all"]
SetName = Literal["natural", "warped"]


@dataclass(frozen=True)
class EvaluationOptions:
    """How to evaluate.

    Attributes:
        split: `heldout`: the pairs whose source video is held out (all of a folder never trained on);
            `all`: every pair, trained on or not.
        seed: of masks, noise, warps, wrong references and the bootstrap.
        num_inference_steps: of the sampler; None: the pipeline's own default.
        guidance_scale: of classifier-free guidance; None: the pipeline's own default.
        max_pairs: at most so many, spread evenly over the source videos; None: all.
        batch_size: pairs edited together. It changes no choice, only speed and memory.
        sets: `natural`: references as mined; `warped`: each reference seen through a strong homography.
        sheet_pairs: how many pairs the contact sheets show, and whose pictures are kept.
    """

    split: EvaluationSplit = "heldout"
    seed: int = 0
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    max_pairs: int | None = None
    batch_size: int = 8
    sets: tuple[SetName, ...] = ("natural", "warped")
    sheet_pairs: int = 8

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: a value that means nothing; the message names what was given and what is possible.
        """
        if self.split not in get_args(EvaluationSplit):
            raise InputError(f"split={self.split} is unknown; choose one of {_names(EvaluationSplit)}")
        if not isinstance(self.sets, tuple):
            raise InputError(f"sets={self.sets}: must be a list of {_names(SetName)}, such as sets=[natural]")
        unknown = [name for name in self.sets if name not in get_args(SetName)]
        if unknown or not self.sets:
            raise InputError(f"sets={list(self.sets)}: choose one or both of {_names(SetName)}")
        for name, least, optional in (
            ("seed", None, False),
            ("num_inference_steps", 1, True),
            ("max_pairs", 1, True),
            ("batch_size", 1, False),
            ("sheet_pairs", 0, False),
        ):
            value = getattr(self, name)
            if value is None and optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise InputError(f"{name}={value}: must be a whole number")
            if least is not None and value < least:
                raise InputError(f"{name}={value}: must be at least {least}")
        if isinstance(self.guidance_scale, bool) or not isinstance(self.guidance_scale, int | float | None):
            raise InputError(f"guidance_scale={self.guidance_scale}: must be a number")


def _names(choices: object) -> str:
    return ", ".join(get_args(choices))
