"""Options of a run over the benchmark. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field

from mimicbrush.errors import InputError
from mimicbrush.ranges import GUIDANCE_RANGE, SEED_RANGE, STEPS_RANGE, check_options, number, word


@dataclass(frozen=True)
class BackboneOptions:
    """Networks that measure, each a folder or a hub id that is in the local cache; None: its metrics read n/a.

    Attributes:
        dino: DINO ViT-S/16 ("facebook/dino-vits16"), for DINO-I as DreamBooth has it.
        dinov2: DINOv2 ("facebook/dinov2-base"), which the paper cites.
        clip: a whole CLIP with its tokenizer ("openai/clip-vit-base-patch32"), for CLIP-I and CLIP-T.
        lpips: file of torchvision's AlexNet (alexnet-owt-*.pth, or .safetensors).
    """

    dino: str | None = None
    dinov2: str | None = None
    clip: str | None = None
    lpips: str | None = None


@dataclass(frozen=True)
class BenchmarkOptions:
    """Options of a run of editors over the benchmark.

    Attributes:
        editors: names, see `registry.KNOWN`.
        seed: of the editors' noise (1 in the released script) and of the bootstrap.
        num_inference_steps, guidance_scale: None: each editor's own.
        device: "auto", "cpu" or "cuda".
        shown_cases: how many cases of each track report.html shows, the worst of the first editor first.
        backbones: what measures.
    """

    editors: tuple[str, ...]
    seed: int = number(1, SEED_RANGE)
    num_inference_steps: int | None = number(None, STEPS_RANGE, null="the default of each editor")
    guidance_scale: float | None = number(None, GUIDANCE_RANGE, null="the default of each editor")
    device: str = word("auto", ("auto", "cpu", "cuda"))
    shown_cases: int = number(12, at_least=0)
    backbones: BackboneOptions = field(default_factory=BackboneOptions)

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: names what was given and what is possible.
        """
        if not self.editors:
            raise InputError("editor= is empty; name one editor, or several as editor=[a,b]")
        twice = sorted({name for name in self.editors if self.editors.count(name) > 1})
        if twice:
            raise InputError(f"editor= names {', '.join(twice)} more than once")
        check_options(self)
