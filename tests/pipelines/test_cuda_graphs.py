"""Edits by graphs are the edits without them. On a CPU, recorded operations take the place of a CUDA graph."""

from __future__ import annotations

import copy
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from measurements.edit_launches import count_steps
from peft import LoraConfig
from recorded_ops import record_ops
from toy_edit import an_edit, build, edits, latents_of

from mimicbrush.errors import InputError
from mimicbrush.models.attention_recorder import CorrespondenceRecorder
from mimicbrush.models.components import toy_components
from mimicbrush.models.options import ToyModel
from mimicbrush.models.schedule import noise_scheduler
from mimicbrush.pipelines import MimicBrushPipeline
from mimicbrush.pipelines.cuda_graphs import GraphedPasses, describe_network, make_cuda_capture
from mimicbrush.pipelines.open_pipeline import seeded_generator

Tensors = dict[str, torch.Tensor]
SCHEDULERS = [
    f"{name}Scheduler"
    for name in (
        *("DDIM", "DDPM", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "EulerAncestralDiscrete"),
        *("EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LMSDiscrete", "PNDM"),
        *("LCM", "UniPCMultistep"),
    )
]


@pytest.fixture(scope="module")
def zero(smallest: ToyModel) -> MimicBrushPipeline:
    """For tests that leave it as it is."""
    return build(smallest, reference_timestep="zero")


def graphed(pipe: MimicBrushPipeline, max_graphs: int = 8) -> MimicBrushPipeline:
    """The same pipeline, with graphs."""
    other = copy.copy(pipe)
    other._graphs = GraphedPasses(max_graphs, record_ops, "cpu")
    return other


def both(pipe: MimicBrushPipeline, with_graphs: MimicBrushPipeline, *edit: Any, **options: Any) -> list[torch.Tensor]:
    return [latents_of(each, *edit, reference_batch_size=2, **options) for each in (pipe, with_graphs)]


@pytest.mark.parametrize(
    ("reference_timestep", "encoder"),
    [
        ("current", "unet"),
        pytest.param("zero", "unet", marks=pytest.mark.slow),
        pytest.param("current", "shared", marks=pytest.mark.slow),
    ],
)
def test_edits_in_turn_are_those_without_graphs(smallest: ToyModel, reference_timestep: str, encoder: str) -> None:
    toy = replace(smallest, reference_encoder=encoder)
    pipe = build(toy, reference_timestep=reference_timestep, reference_blend=0.5)
    with_graphs = graphed(pipe)
    two, seeds = edits(2), [seeded_generator(seed) for seed in (5, 6)]
    turns: list[tuple[Any, dict[str, Any]]] = [
        (an_edit(0), {"guidance_scale": 5.0}),
        (an_edit(1), {"guidance_scale": 7.3, "seed": 1}),  # another number in the same graphs
        (an_edit(2), {"guidance_scale": 1.0, "seed": 2, "keep_shape": True}),  # no guidance
        ({**an_edit(1), "reference": None}, {"seed": 3}),  # no reference
        ({**two, "reference": two["reference"][1]}, {"seed": 4}),  # one reference for two sources
        (two, {"num_images_per_prompt": 1, "generator": seeds}),  # one each
        (an_edit(3), {"num_images_per_prompt": 2}),
        (an_edit(0), {"guidance_scale": 5.0}),
    ]
    for edit, options in turns:
        generators = options.pop("generator", None)
        states = [each.get_state() for each in generators or []]
        plain = latents_of(pipe, edit, reference_batch_size=2, **options, **_again(generators, states))
        replayed = latents_of(with_graphs, edit, reference_batch_size=2, **options, **_again(generators, states))
        assert torch.equal(plain, replayed), options
    # Reading one reference or two; and steps: guided or not, without a reference, two results of one or two references.
    assert len(with_graphs._graphs) == 2 + 5


def _again(generators: list[torch.Generator] | None, states: list[torch.Tensor]) -> dict[str, Any]:
    """The generators as they were."""
    if generators is None:
        return {}
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    return {"generator": generators}


def test_a_last_chunk_of_timesteps_that_is_not_full(smallest: ToyModel) -> None:
    pipe = build(smallest)
    plain, replayed = both(pipe, with_graphs := graphed(pipe), num_inference_steps=3)
    torch.testing.assert_close(replayed, plain, atol=1e-5, rtol=1e-4)  # a batch of another size rounds differently
    assert len(with_graphs._graphs) == 2


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in SCHEDULERS
    ],
)
def test_any_scheduler_steps_outside_of_the_graph(zero: MimicBrushPipeline, name: str) -> None:
    # Those of several steps keep predictions, which a later replay must not write over.
    pipe = copy.copy(zero)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    plain, replayed = both(pipe, graphed(pipe), num_inference_steps=4)
    assert torch.equal(plain, replayed)


def test_a_callback_may_change_guidance_and_latents_and_make_another_edit(zero: MimicBrushPipeline) -> None:
    pipe, with_graphs = zero, graphed(zero)
    inner: list[torch.Tensor] = []

    def interfere(pipe: MimicBrushPipeline, step: int, timestep: int, tensors: Tensors) -> Tensors:
        pipe._guidance_scale += 1.3
        if step == 1:
            steps, scale = pipe.scheduler.timesteps, pipe._guidance_scale
            inner.append(latents_of(pipe, an_edit(1), seed=3))  # by the same graphs
            pipe.scheduler.timesteps, pipe._guidance_scale = steps, scale
            pipe.scheduler.num_inference_steps = 3
        return {"latents": tensors["latents"] * 1.1}

    options = {"num_inference_steps": 3, "guidance_scale": 2.0, "callback_on_step_end": interfere}
    plain, replayed = both(pipe, with_graphs, **options)
    assert torch.equal(plain, replayed) and torch.equal(*inner)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.slow)])
def test_guidance_is_rounded_as_a_number(smallest: ToyModel, dtype: torch.dtype) -> None:
    pipe = build(smallest, reference_timestep="zero").to(dtype)
    plain, replayed = both(pipe, graphed(pipe), guidance_scale=7.3, num_inference_steps=1)
    assert torch.equal(plain, replayed)


def test_what_a_prepared_reference_holds_is_its_own(smallest: ToyModel) -> None:
    pipe = build(smallest)
    with_graphs = graphed(pipe)

    def prepare(pipe: MimicBrushPipeline, turns: int) -> Any:
        reference = an_edit(turns)["reference"]
        return pipe.prepare_reference(
            reference, generator=seeded_generator(0), num_inference_steps=2, reference_batch_size=2
        )

    plain, replayed = prepare(pipe, 0), prepare(with_graphs, 0)
    prepare(with_graphs, 1)  # by the same graph
    edit = {**an_edit(), "reference": plain}
    assert torch.equal(latents_of(pipe, edit), latents_of(with_graphs, {**edit, "reference": replayed}))


def _write(pipe: MimicBrushPipeline) -> None:
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(1.5)


def _replace(pipe: MimicBrushPipeline) -> None:
    pipe.unet.conv_in.weight = torch.nn.Parameter(pipe.unet.conv_in.weight.detach() * 1.5)


def _add_adapter(pipe: MimicBrushPipeline) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))


def _weigh_adapter(pipe: MimicBrushPipeline) -> None:
    pipe.unet.set_adapters(["default"], weights=[0.3])  # a number that a graph would repeat


def _move(pipe: MimicBrushPipeline) -> None:
    pipe.to(torch.float64)


def test_changed_weights_are_used(smallest: ToyModel) -> None:
    pipe = build(smallest, reference_timestep="zero")
    with_graphs = graphed(pipe)
    before = latents_of(with_graphs, num_inference_steps=1)
    for change in (_write, _replace, _add_adapter, _weigh_adapter, _move):
        change(pipe)
        plain, replayed = both(pipe, with_graphs, num_inference_steps=1)
        assert torch.equal(plain, replayed) and not torch.equal(before, replayed.to(before.dtype)), change
        before = replayed


def test_a_network_is_described_by_all_that_a_graph_would_repeat(smallest: ToyModel) -> None:
    unet = build(smallest).unet
    described = [describe_network(unet)]
    assert described[0] == describe_network(unet)
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    described.append(describe_network(unet))
    unet.set_attention_backend("native")
    described.append(describe_network(unet))
    unet.train(not unet.training)
    described.append(describe_network(unet))
    layer = unet.mid_block.attentions[0].proj_in
    layer.weight.data = layer.weight.data.clone()
    described.append(describe_network(unet))
    assert len(set(described)) == 5


def test_the_least_recently_used_graph_goes_first(zero: MimicBrushPipeline) -> None:
    pipe, with_graphs = zero, graphed(zero, max_graphs=2)
    for guidance in (5.0, 1.0, 5.0):  # reading is the third graph
        plain, replayed = both(pipe, with_graphs, guidance_scale=guidance, num_inference_steps=1)
        assert torch.equal(plain, replayed) and len(with_graphs._graphs) == 2
    assert len(copy.deepcopy(with_graphs)._graphs) == 0
    with_graphs._graphs.free()
    assert len(with_graphs._graphs) == 0 and torch.equal(both(pipe, with_graphs, num_inference_steps=1)[1], replayed)


def _hook(pipe: MimicBrushPipeline) -> dict[str, Any]:
    pipe.unet.mid_block.register_forward_hook(lambda *_: None)
    return {}


def _record(pipe: MimicBrushPipeline) -> dict[str, Any]:
    return {"attention_record": CorrespondenceRecorder(torch.ones(1, 1, 8, 8))}


def _cast(pipe: MimicBrushPipeline) -> dict[str, Any]:
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    return {}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_record, "attention is recorded at each step"),
        (_hook, "a hook .* runs at every pass of mid_block"),
        pytest.param(_cast, "a hook .* runs at every pass of ", marks=pytest.mark.slow),
    ],
)
def test_what_no_graph_repeats_runs_without_and_the_reason_is_logged_once(
    smallest: ToyModel,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[MimicBrushPipeline], dict[str, Any]],
    reason: str,
) -> None:
    pipe = build(smallest, reference_timestep="zero")
    with_graphs = graphed(pipe)
    options = change(pipe)
    for _ in range(2):
        plain, replayed = both(pipe, with_graphs, num_inference_steps=1, **options)
        assert torch.equal(plain, replayed)
    (message,) = caplog.messages
    assert re.match(f"this edit runs without CUDA graphs: .*{reason}", message)


def test_a_cpu_has_none(zero: MimicBrushPipeline, caplog: pytest.LogCaptureFixture) -> None:
    pipe = copy.copy(zero)
    expected = latents_of(pipe, num_inference_steps=1)
    pipe.enable_cuda_graphs()
    for _ in range(2):
        assert torch.equal(latents_of(pipe, num_inference_steps=1), expected)
    assert caplog.messages == [
        "this edit runs without CUDA graphs: the pipeline is on the device 'cpu', but CUDA graphs need 'cuda'"
    ]
    pipe.disable_cuda_graphs()
    assert torch.equal(latents_of(pipe, num_inference_steps=1), expected)
    with pytest.raises(InputError, match="max_graphs=0: expected"):
        pipe.enable_cuda_graphs(max_graphs=0)


def test_a_recording_that_fails_costs_no_edit(zero: MimicBrushPipeline, caplog: pytest.LogCaptureFixture) -> None:
    pipe = copy.copy(zero)
    expected = latents_of(pipe, num_inference_steps=1)

    def fail(work: Callable[[], Any]) -> Callable[[], Any]:
        raise RuntimeError("operation not permitted when stream is capturing")

    pipe._graphs = GraphedPasses(8, lambda device: fail, "cpu")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(latents_of(pipe, num_inference_steps=1), expected)
        assert torch.equal(latents_of(pipe, num_inference_steps=1), expected)
    assert caplog.messages == [
        "this edit runs without CUDA graphs: a pass could not be recorded "
        "(RuntimeError: operation not permitted when stream is capturing)"
    ]


def on_meta(toy: ToyModel, reference_timestep: str) -> MimicBrushPipeline:
    """A pipeline that computes nothing; a value that the host reads is an error."""
    with torch.device("meta"):
        parts = vars(toy_components(toy))
    pipe = MimicBrushPipeline(**parts, scheduler=noise_scheduler(), reference_timestep=reference_timestep)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("reference_timestep", "with_graphs", "most"),
    [
        # Latents and timestep in, replay, a copy out, and six operations of DDIM; and the reference's features.
        ("current", True, 12),
        pytest.param("zero", True, 10, marks=pytest.mark.slow),
        pytest.param("current", False, 1000, marks=pytest.mark.slow),
        pytest.param("zero", False, 1000, marks=pytest.mark.slow),
    ],
)
def test_a_step_waits_for_nothing_and_starts_little(
    smallest: ToyModel, reference_timestep: str, with_graphs: bool, most: int
) -> None:
    found = count_steps(on_meta(smallest, reference_timestep), 4, with_graphs)
    assert 0 < found.started <= 4 * most
    assert found.sent == 0
    assert found.shapes <= {(8,)}  # the timesteps of all steps, once


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
def test_no_scheduler_makes_a_step_wait(smallest: ToyModel) -> None:
    pipe = on_meta(smallest, "zero")
    sent = {}
    for name in SCHEDULERS:
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        sent[name] = count_steps(pipe, 4, graphed=True).sent
    # UniPC sends the numbers of the linear system that it solves.
    assert [name for name, copies in sent.items() if copies] == ["UniPCMultistepScheduler"]


def test_what_records_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # Only a GPU shows that it works; this shows the order, and that PyTorch has what is called.
    log: list[str] = []

    class Stream:
        def __init__(self, device: object = "current") -> None:
            self.name = "current" if device == "current" else "side"

        def wait_stream(self, other: Stream) -> None:
            log.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    @contextmanager
    def entered(what: object) -> Iterator[None]:
        log.append(f"enter {getattr(what, 'name', what)}")
        yield
        log.append("leave")

    signature = inspect.signature(torch.cuda.graph.__init__)

    def graph(*arguments: object, **options: object) -> AbstractContextManager[None]:
        signature.bind(None, *arguments, **options)
        assert options["pool"] == "pool" and isinstance(options["stream"], Stream)
        return entered("graph")

    for name, stand_in in (
        ("Stream", Stream),
        ("current_stream", Stream),
        ("stream", entered),
        ("device", entered),
        ("CUDAGraph", Graph),
        ("graph", graph),
        ("graph_pool_handle", lambda: "pool"),
    ):
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, stand_in)

    def work() -> str:
        log.append("work")
        return "outputs"

    replay = make_cuda_capture(torch.device("cuda", 1))(work)
    assert log == [
        "enter cuda:1", "side waits for current", "enter side", "work", "work", "work", "leave",
        "current waits for side", "enter graph", "work", "leave", "leave",
    ]  # fmt: skip
    log.clear()
    assert replay() == "outputs" and log == ["replay"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("reference_timestep", ["current", "zero"])
def test_graphs_of_a_gpu(smallest: ToyModel, reference_timestep: str) -> None:
    pipe = build(smallest, reference_timestep=reference_timestep).to("cuda")
    with_graphs = copy.copy(pipe)
    with_graphs.enable_cuda_graphs()
    for turns, guidance in ((0, 5.0), (1, 1.0), (2, 7.3), (0, 5.0)):
        plain, replayed = both(
            pipe, with_graphs, an_edit(turns), guidance_scale=guidance, num_inference_steps=6, seed=turns
        )
        torch.testing.assert_close(replayed, plain, atol=1e-5, rtol=1e-4)
    assert len(with_graphs._graphs) == 3
    with_graphs.disable_cuda_graphs()
    assert torch.equal(latents_of(with_graphs), latents_of(pipe))
