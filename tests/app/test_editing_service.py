"""What the page's service does with a real pipeline: results, previews, progress, several references, the end."""

from __future__ import annotations

import base64
import gzip
import io
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toy_data import photograph
from toy_klein import open_toy, write_toy_klein

from mimicbrush.app.editing_service import EditingService, EditRequest, ReferenceChoice
from mimicbrush.app.page_server import PageServer
from mimicbrush.app.previews import Preview
from mimicbrush.app.session_files import MissingFileError, SessionFiles, VisitorLimits
from mimicbrush.assembly import build_components
from mimicbrush.cli import app
from mimicbrush.errors import InputError
from mimicbrush.models.options import ToyModel
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.pipelines import MimicBrushPipeline
from mimicbrush.pipelines.klein.pipeline import KleinPipeline
from mimicbrush.pipelines.open_pipeline import seeded_generator

CAT = Image.fromarray(photograph("chelsea.png"))
SOURCE, REFERENCE, OTHER = CAT.crop((0, 0, 96, 64)), CAT.crop((60, 20, 140, 100)), CAT.crop((200, 100, 280, 170))
MASK = Image.new("L", SOURCE.size)
MASK.paste(255, (24, 16, 72, 48))


@pytest.fixture(scope="module")
def service(smallest: ToyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EditingService]:
    pipeline = MimicBrushPipeline(**vars(build_components(smallest, 0)), scheduler=noise_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("service")
    yield EditingService(pipeline, "", SessionFiles(folder / "visits", VisitorLimits()), None)  # type: ignore[arg-type]  # nothing is uploaded


def keep(service: EditingService, image: Image.Image) -> str:
    def write(path: Path) -> None:
        image.save(path, "PNG")

    return service.files.keep("ann", "", write)


@pytest.fixture(scope="module")
def request_(service: EditingService) -> EditRequest:
    source, mask, reference = (keep(service, image) for image in (SOURCE, MASK, REFERENCE))
    return EditRequest(source, mask, (ReferenceChoice(reference),), 3, 2.0, 5, 1, False, "full", False)


def edit(service: EditingService, request: EditRequest) -> tuple[list[np.ndarray], list[Any], list[dict[str, Any]]]:
    """The results, what comes with them, and what was shown meanwhile."""
    shown: list[dict[str, Any]] = []
    answer = service.edit("ann", request, shown.append)
    assert answer is not None and (answer["width"], answer["height"]) == SOURCE.size
    told = answer["results"]
    return [np.asarray(Image.open(service.files.find("ann", each["token"]))) for each in told], told, shown


def directly(service: EditingService, reference: Any, seed: int = 5, **more: Any) -> np.ndarray:
    options: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 2.0, "generator": seeded_generator(seed)}
    return np.asarray(service.pipeline(SOURCE, MASK, reference, **options, **more).images[0])


def test_results_are_those_of_the_pipeline_and_progress_is_told(
    service: EditingService, request_: EditRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mimicbrush.app.editing_service._PREVIEW_S", 0.0)
    images, told, shown = edit(service, replace(request_, count=2))
    for number, image in enumerate(images):
        np.testing.assert_array_equal(image, directly(service, REFERENCE, 5 + number))
    assert [each["seed"] for each in told] == [5, 6]
    places = told[0]["places"]
    assert len(places["source"]) == len(places["reference"]) == len(places["of"]) > 0 and set(places["of"]) == {0}
    assert [(each["done"], each["of"]) for each in shown] == [(done, 6) for done in range(7)]
    assert shown[-1]["left_s"] == 0 and all(each["left_s"] > 0 for each in shown[2:-1])
    for each in shown[1:]:
        image = Image.open(io.BytesIO(base64.b64decode(each["preview"].removeprefix("data:image/jpeg;base64,"))))
        kept = np.asarray(image).astype(int)[:8] - np.asarray(SOURCE)[:8]
        assert image.size == SOURCE.size and abs(kept).mean() < 8  # around the hole it is the source


def test_flux2_klein_is_served_too(service: EditingService, request_: EditRequest) -> None:
    """Without a preview; the shape cannot be kept, which the page does not offer then."""
    klein = replace(service, pipeline=open_toy())
    told = klein.describe()
    assert (told["steps"], told["guidance"], told["can_zoom"], told["can_keep_shape"]) == (50, 1.0, True, False)
    assert service.describe()["can_keep_shape"]
    (image,), (result,), shown = edit(klein, replace(request_, guidance=1.0, steps=2))
    expected = klein.pipeline(SOURCE, MASK, REFERENCE, num_inference_steps=2, generator=seeded_generator(5)).images[0]
    np.testing.assert_array_equal(image, np.asarray(expected))
    assert result["places"]["source"] and [each["done"] for each in shown] == [0, 1, 2]
    assert not any("preview" in each for each in shown)
    done: list[Any] = []
    assert klein.edit("ann", replace(request_, steps=4), done.append, lambda: len(done) == 2) is None
    assert len(done) == 2
    with pytest.raises(InputError, match="keep_shape needs a depth estimator"):
        edit(klein, replace(request_, keep_shape=True))


def test_the_command_serves_a_run_of_klein(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_toy_klein(tmp_path / "run" / "pipeline")
    served: list[EditingService] = []
    monkeypatch.setattr(PageServer, "run", lambda server, sockets: served.append(server._service))
    command = ["app", "--model", str(tmp_path / "run"), "--port", "0", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", command)
    assert app.serve(app.parse_arguments(), tmp_path) is None
    assert isinstance(served[0].pipeline, KleinPipeline)
    assert f"with {tmp_path / 'run'}" in capsys.readouterr().out


def test_a_preview_shows_what_the_decoder_would(service: EditingService) -> None:
    pipeline = service.pipeline
    preview = Preview(pipeline, SOURCE, MASK, REFERENCE, "full")
    latents: list[torch.Tensor] = []

    def follow(_: Any, step: int, timestep: int, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        preview.follow(step, timestep, tensors["latents"])
        latents.append(tensors["latents"])
        return {}

    directly(service, REFERENCE, callback_on_step_end=follow)
    # The last step of DDIM leaves what it took for clean.
    assert preview._clean is not None
    torch.testing.assert_close(preview._clean, latents[-1], atol=2e-2, rtol=2e-2)


def test_several_references_go_to_the_pipeline_with_their_boxes(service: EditingService, request_: EditRequest) -> None:
    both = (*request_.references, ReferenceChoice(keep(service, OTHER), (10, 20, 60, 70)))
    (image,), told, _ = edit(service, replace(request_, references=both))
    expected = service.pipeline(
        SOURCE, MASK, [REFERENCE, OTHER], num_inference_steps=3, guidance_scale=2.0, generator=seeded_generator(5),
        reference_crop=[None, (10, 20, 60, 70)], return_correspondence=True,
    )  # fmt: skip
    np.testing.assert_array_equal(image, np.asarray(expected.images[0]))
    assert set(told[0]["places"]["of"]) <= {0, 1}
    # The maps, too, are those of the pipeline, to the 255th part of a place's most, or of its share.
    (found,), places = expected.correspondences, told[0]["places"]
    packed = np.frombuffer(gzip.decompress(service.read("ann", places["maps"])), np.uint8) / 255
    attention, head_peaks = packed.reshape(2, len(found.share), 2, places["grid"], places["grid"])
    shares = found.share[:, None, None, None]
    most = found.maps.attention.max(axis=(1, 2, 3), keepdims=True)
    np.testing.assert_allclose(attention, found.maps.attention / most, atol=0.5001 / 255)
    np.testing.assert_allclose(head_peaks, found.maps.head_peaks / shares, atol=0.5001 / 255)
    np.testing.assert_allclose(places["boxes"], found.maps.boxes, atol=0.051)
    assert places["boxes"][1] == [10, 20, 60, 70]  # only this part was shown
    wrong = (*request_.references, ReferenceChoice(both[1].image, (10, 20, 600, 70)))
    with pytest.raises(InputError, match="reference 2"):
        edit(service, replace(request_, references=wrong))


def test_auto_zoom_edits_twice_and_tells_what_it_looked_at(
    service: EditingService, request_: EditRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mimicbrush.pipelines.editing import auto_zoom
    from mimicbrush.pipelines.editing.reference_part import ReferencePart

    part = ReferencePart((10, 10, 50, 50), 1.0, 1)
    monkeypatch.setattr(auto_zoom, "find_attended_part", lambda *given: part)
    (image,), told, shown = edit(service, replace(request_, auto_zoom=True))
    np.testing.assert_array_equal(image, directly(service, REFERENCE, reference_crop=part.box))
    assert told[0]["zoomed"] == part.box and [each["done"] for each in shown] == list(range(7))


def test_an_edit_ends_at_the_next_step_and_what_is_missing_is_said(
    service: EditingService, request_: EditRequest
) -> None:
    shown: list[dict[str, Any]] = []
    asked = replace(request_, steps=50)
    assert service.edit("ann", asked, shown.append, lambda: len(shown) > 2) is None
    assert len(shown) == 3
    for other in (replace(request_, mask="unknown"), replace(request_, references=(ReferenceChoice("unknown"),))):
        with pytest.raises(MissingFileError, match="not on the server"):
            service.check_files("ann", other)
        with pytest.raises(MissingFileError, match="not on the server"):
            service.edit("ann", other, shown.append)
    with pytest.raises(MissingFileError, match="not on the server"):
        service.check_files("bob", request_)
    service.check_files("ann", request_)
