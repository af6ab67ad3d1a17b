"""Options of an evaluation on held-out pairs. configs/evaluate.yaml has the same defaults (a test compares)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

from mimicbrush.errors import InputError
from mimicbrush.ranges import (
    BATCH_RANGE,
    GUIDANCE_RANGE,
    REFERENCES_RANGE,
    SEED_RANGE,
    STEPS_RANGE,
    check_options,
    number,
    word,
)

EvaluationSplit = Literal["heldout", "all"]
SetName = Literal["natural", "warped"]


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of an evaluation.

    Attributes:
        split: `heldout`: the pairs whose source video is held out (all pairs of a folder that was never trained on);
            `all`: all pairs, trained on or not.
        seed: seed of masks, noise, warps, wrong references and the bootstrap.
        num_inference_steps: steps of the sampler; None: the pipeline's own default.
        guidance_scale: classifier-free guidance; None: the pipeline's own default.
        max_pairs: largest number of pairs, spread evenly over the source videos; None: all.
        batch_size: number of pairs edited together. It changes only speed and memory.
        sets: `natural`: references as mined; `warped`: each reference is warped by a strong homography.
        sheet_pairs: number of pairs that the contact sheets show, and whose images are kept.
        num_references: references of each pair: the other frame of the pair, then further frames of its shot. Pairs
            whose shot has too few are left out.
    """

    split: EvaluationSplit = word("heldout", get_args(EvaluationSplit))  # noqa: RUF009 - it is a field
    seed: int = number(0, SEED_RANGE)
    num_inference_steps: int | None = number(None, STEPS_RANGE, null="the pipeline's own")
    guidance_scale: float | None = number(None, GUIDANCE_RANGE, null="the pipeline's own")
    max_pairs: int | None = number(None, at_least=1, whole=True, null="all")
    batch_size: int = number(8, BATCH_RANGE)
    sets: tuple[SetName, ...] = word(("natural", "warped"), get_args(SetName), many=True)
    sheet_pairs: int = number(8, at_least=0)
    num_references: int = number(1, REFERENCES_RANGE)

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: a value that means nothing; the message names what was given and what is possible.
        """
        check_options(self)


@dataclass
class DuringTrainingOptions:
    """Options of the evaluation during training. It does not change the trained weights.

    Attributes:
        every_steps: number of steps between two evaluations; there is one more at the end of a run. 0: no evaluation.
        pairs: a mined folder to evaluate on, whose held-out sources are not trained on; None: use the held-out pairs
            (`data.heldout_ratio`) of the folders that are trained on.
        seed: seed of masks, noise, warps, wrong references and the bootstrap. It is not the seed of the run, so that
            runs with different seeds are compared on the same pairs.
        max_pairs: largest number of pairs, spread evenly over the source videos.
        num_inference_steps, guidance_scale, sets: see `EvaluationOptions`.
        batch_size: see `EvaluationOptions`. It is the number of pairs for each process.
        sheet_pairs: see `EvaluationOptions`. These pairs are also shown in the image table of a tracker.
    """

    every_steps: int = number(2000, at_least=0, note="0: never")
    pairs: str | None = None
    seed: int = number(0, SEED_RANGE)
    max_pairs: int = number(64, at_least=2)
    num_inference_steps: int | None = number(20, STEPS_RANGE, null="the pipeline's own")
    guidance_scale: float | None = number(None, GUIDANCE_RANGE, null="the pipeline's own")
    batch_size: int = number(8, BATCH_RANGE)
    sets: tuple[str, ...] = word(("natural",), get_args(SetName), many=True)
    sheet_pairs: int = number(8, at_least=0)

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: a value that means nothing; the message names what was given and what is possible.
        """
        check_options(self, "eval.")
        self.sets = tuple(self.sets)  # omegaconf makes lists of tuples
        if "natural" not in self.sets:
            raise InputError(f"eval.sets={list(self.sets)}: must contain natural, which chooses the best weights")

    def evaluation(self, num_references: int) -> EvaluationOptions:
        """Return these options as `EvaluationOptions`, with the number of references that the run trains with."""
        return EvaluationOptions(
            num_references=num_references,
            seed=self.seed,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            max_pairs=self.max_pairs,
            batch_size=self.batch_size,
            sets=cast("tuple[SetName, ...]", self.sets),
            sheet_pairs=self.sheet_pairs,
        )
