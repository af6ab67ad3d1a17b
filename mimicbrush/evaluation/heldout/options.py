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
        split: `heldout`: the pairs whose source video is held out (all of a folder never trained on);
            `all`: every pair, trained on or not.
        seed: chooses masks, noise, warps, wrong references and the bootstrap.
        num_inference_steps: steps of the sampler; None: the pipeline's own default.
        guidance_scale: classifier-free guidance; None: the pipeline's own default.
        max_pairs: at most so many, spread evenly over the source videos; None: all.
        batch_size: pairs edited together. It changes no choice, only speed and memory.
        sets: `natural`: references as mined; `warped`: each reference seen through a strong homography.
        sheet_pairs: how many pairs the contact sheets show, and whose images are kept.
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
    """Options of the evaluation during training, which changes nothing of what is learnt.

    Attributes:
        every_steps: steps between two evaluations; one more comes at the end of a run. 0: none at all.
        pairs: a mined folder to evaluate on, none of whose held-out sources was trained on; None: what is held out
            (`data.heldout_ratio`) of the folders that are trained on.
        seed: chooses masks, noise, warps, wrong references and the bootstrap; not the seed of the run, so that runs
            with several seeds are compared on the same pairs.
        max_pairs: at most so many, spread evenly over the source videos.
        num_inference_steps, guidance_scale, sets: see `EvaluationOptions`.
        batch_size: see `EvaluationOptions`. It is the number of each process.
        sheet_pairs: see `EvaluationOptions`. They also fill the image table of a tracker.
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
        """Return the same as options of an evaluation, with as many references of each pair as the run trains with."""
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
