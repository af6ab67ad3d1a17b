"""Options of an evaluation on held-out pairs. configs/evaluate.yaml has the same defaults (a test compares)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

from mimicbrush.errors import InputError

EvaluationSplit = Literal["heldout", "all"]
SetName = Literal["natural", "warped"]


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of an evaluation.

    Attributes:
        split: `heldout`: the pairs whose source video is held out (all of a folder never trained on);
            `all`: every pair, trained on or not.
        seed: of masks, noise, warps, wrong references and the bootstrap.
        num_inference_steps: of the sampler; None: the pipeline's own default.
        guidance_scale: of classifier-free guidance; None: the pipeline's own default.
        max_pairs: at most so many, spread evenly over the source videos; None: all.
        batch_size: pairs edited together. It changes no choice, only speed and memory.
        sets: `natural`: references as mined; `warped`: each reference seen through a strong homography.
        sheet_pairs: how many pairs the contact sheets show, and whose images are kept.
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


@dataclass
class DuringTrainingOptions:
    """Options of the evaluation during training, which changes nothing of what is learnt.

    Attributes:
        every_steps: between two evaluations; one more comes at the end of a run. 0: none at all.
        pairs: a mined folder to evaluate on, none of whose held-out sources was trained on; None: what is held out
            (`data.heldout_ratio`) of the folders that are trained on.
        seed: of masks, noise, warps, wrong references and the bootstrap; not the seed of the run, so that runs with
            several seeds are compared on the same pairs.
        max_pairs, num_inference_steps, guidance_scale, batch_size, sets, sheet_pairs: see `EvaluationOptions`;
            `batch_size` is per process, `sheet_pairs` also fills the image table of a tracker.
    """

    every_steps: int = 2000
    pairs: str | None = None
    seed: int = 0
    max_pairs: int = 64
    num_inference_steps: int | None = 20
    guidance_scale: float | None = None
    batch_size: int = 8
    sets: tuple[str, ...] = ("natural",)
    sheet_pairs: int = 8

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: a value that means nothing; the message names what was given and what is possible.
        """
        self.sets = tuple(self.sets)  # omegaconf makes lists of tuples
        if self.every_steps < 0:
            raise InputError(f"eval.every_steps must be 0 (never) or more, got {self.every_steps}")
        if self.max_pairs < 2:
            raise InputError(f"eval.max_pairs must be 2 or more, got {self.max_pairs}")
        try:
            sets = self.evaluation().sets
        except InputError as error:
            raise InputError(f"eval.{error}") from error
        if "natural" not in sets:
            raise InputError(f"eval.sets={list(sets)}: must hold natural, which tells the best weights")

    def evaluation(self) -> EvaluationOptions:
        """Return the same as options of an evaluation."""
        return EvaluationOptions(
            seed=self.seed,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            max_pairs=self.max_pairs,
            batch_size=self.batch_size,
            sets=cast("tuple[SetName, ...]", self.sets),
            sheet_pairs=self.sheet_pairs,
        )


def _names(choices: object) -> str:
    return ", ".join(get_args(choices))
