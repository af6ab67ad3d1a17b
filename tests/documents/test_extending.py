"""The worked examples of docs/extending.md do what they say."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy_data import photograph
from toy_run import forget_accelerate, metrics, train, train_with
from transformers import SiglipVisionModel

from mimicbrush.data.custom_masks import sample_custom_mask
from mimicbrush.data.manifest import read_manifest
from mimicbrush.data.options import DataOptions, MaskOptions
from mimicbrush.data.transforms import SampleTransform
from mimicbrush.errors import InputError
from mimicbrush.models import options as model_options
from mimicbrush.models import token_encoders
from mimicbrush.pipelines.open_pipeline import load_pipeline, seeded_generator

DOCUMENT = Path(__file__).parents[2] / "docs" / "extending.md"
MASKS, ENCODER = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What an example adds is gone after it."""
    kept = dict(model_options.REFERENCE_ENCODERS), dict(token_encoders.TOKEN_ENCODERS)
    yield
    for table, values in zip((model_options.REFERENCE_ENCODERS, token_encoders.TOKEN_ENCODERS), kept, strict=True):
        table.clear()
        table.update(values)
    sys.modules.pop("stripes", None)
    forget_accelerate()


@pytest.fixture
def stripes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "stripes.py").write_text(MASKS)
    monkeypatch.syspath_prepend(tmp_path)
    return "stripes:stripe_mask"


def test_masks_of_the_function_are_trained_on(mined: Path, tmp_path: Path, stripes: str) -> None:
    options = DataOptions(mask=MaskOptions(strategy=stripes, image_strategy=stripes))
    maker = SampleTransform(32, options)
    for pair in read_manifest(mined):
        masks = [maker(pair, np.random.default_rng(seed)).mask for seed in range(5)]
        for mask in masks:
            assert mask.dtype == np.uint8 and (mask == mask[:1]).all() and 0 < mask.mean() < 1
        assert len({mask.tobytes() for mask in masks}) > 1
        assert np.array_equal(masks[0], maker(pair, np.random.default_rng(0)).mask)
    assert train(mined, tmp_path / "run", "train.max_steps=2", f"data.mask.strategy={stripes}") == 0
    assert metrics(tmp_path / "run")[-1]["step"] == 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return np.zeros((size_px, size_px), np.uint8)", "is 0 everywhere; nothing can be learnt from it"),
        ("return np.ones((size_px, size_px), bool)", "is 1 everywhere; nothing can"),
        ("return np.eye(size_px)", "float64 with values up to 1.0; expected"),
        ("return np.eye(size_px, dtype=np.uint8) * 255", "with values up to 255; expected"),
        ("return np.eye(3, dtype=bool)", r"returned \(3, 3\) bool"),
        ("return []", r"returned \(0,\) float64; expected"),
    ],
)
def test_a_function_that_gives_no_mask_is_told(
    body: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stripes.py").write_text(f"import numpy as np\ndef f(points, size_px, rng):\n    {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=message):
        sample_custom_mask("stripes:f", np.zeros((0, 2)), 16, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent_module:f", "No module named 'absent_module'; if absent_module.py is in the current folder"),
        ("stripes:absent", "stripes.py has no absent"),
        ("stripes:np", "is not a function but module"),
    ],
)
def test_a_function_that_is_not_there_is_told_before_a_pair_is_read(name: str, message: str, stripes: str) -> None:
    with pytest.raises(InputError, match=message):
        SampleTransform(32, DataOptions(mask=MaskOptions(strategy=name)))


def test_what_the_module_itself_lacks_is_told_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stripes.py").write_text("import absent_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"No module named 'absent_package'$"):
        SampleTransform(32, DataOptions(mask=MaskOptions(strategy="stripes:f")))


def test_another_encoder_reads_the_reference(mined: Path, tmp_path: Path) -> None:
    exec(compile(ENCODER, str(DOCUMENT), "exec"), {})
    train(mined, tmp_path / "run", "train.max_steps=2", "model.reference_encoder=siglip")
    assert metrics(tmp_path / "run")[-1]["gradient_norm_image_projector"] > 0
    pipe = load_pipeline(tmp_path / "run" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.image_encoder, SiglipVisionModel) and pipe.reference_unet is None
    assert pipe.options().reference_encoder == "siglip"
    mask = Image.new("L", (60, 40))
    mask.paste(255, (20, 10, 40, 30))
    source = Image.fromarray(photograph("coffee.png")[:40, :60])

    def latents(name: str) -> torch.Tensor:
        reference = Image.fromarray(photograph(name)[:100, :100])
        return pipe(
            source, mask, reference, num_inference_steps=2, generator=seeded_generator(0), output_type="latent"
        ).images

    assert not torch.allclose(latents("chelsea.png"), latents("astronaut.png"), atol=1e-4)
    # And is trained on.
    forget_accelerate()
    more = ["model=pipeline", f"model.path={tmp_path / 'run' / 'pipeline'}"]
    small = ["+experiment=smoke", "train.batch_size=2", "train.total_batch_size=2", "train.max_steps=1"]
    assert train_with(mined, tmp_path / "more", *small, *more) == 0


def test_an_unknown_encoder_of_tokens_is_told() -> None:
    with pytest.raises(InputError, match="image tokens of SiglipVisionModel are not supported; supported: CLIP"):
        model_options.encoder_without_unet("SiglipVisionModel")
