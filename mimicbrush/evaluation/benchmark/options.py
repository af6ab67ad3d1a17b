"""Options of a run over the benchmark. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field

from mimicbrush.errors import InputError


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
    seed: int = 1
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    device: str = "auto"
    shown_cases: int = 12
    backbones: BackboneOptions = field(default_factory=BackboneOptions)

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: names what was given and what is possible.
        """
        if not self.editors:
            raise InputError("editor= names none; give one, or several as editor=[a,b]")
        twice = sorted({name for name in self.editors if self.editors.count(name) > 1})
        if twice:
            raise InputError(f"editor= names {', '.join(twice)} more than once")
        for name in ("seed", "shown_cases"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise InputError(f"{name}={value}: must be a whole number, 0 or more")
        steps, guidance = self.num_inference_steps, self.guidance_scale
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
            raise InputError(f"num_inference_steps={steps}: must be a whole number, 1 or more")
        if guidance is not None and (not isinstance(guidance, int | float) or isinstance(guidance, bool)):
            raise InputError(f"guidance_scale={guidance}: must be a number")
        if self.device not in ("auto", "cpu", "cuda"):
            raise InputError(f"device={self.device}: must be auto, cpu or cuda")
