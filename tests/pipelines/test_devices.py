"""Where and how networks run (offloading, compilation, backends, memory formats) changes no number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from toy_edit import an_edit, build, latents_of

from mimicbrush.errors import InputError, WeightsError
from mimicbrush.models.options import ToyModel
from mimicbrush.pipelines import MimicBrushPipeline
from mimicbrush.pipelines.open_pipeline import seeded_generator

#: With and without the reference U-Net at every step, and with everything that is there to be called.
WAYS = [
    {"reference_timestep": "current", "no_depth_convention": "zero_input", "depth_convention": "released"},
    {"reference_timestep": "zero"},
]
#: `make test` tries the first, `make slow` both.
EACH_WAY = [WAYS[0], pytest.param(WAYS[1], marks=pytest.mark.slow)]


def networks(pipe: MimicBrushPipeline) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


class Away(Mapping[str, torch.Tensor]):
    """Weights that were put away: a copy at every look, as from another device, or accelerate takes them for tied."""

    def __init__(self, network: torch.nn.Module) -> None:
        self._weights = {key: value.clone() for key, value in network.state_dict().items()}

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._weights[key].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def image_of(pipe: MimicBrushPipeline, **options: object) -> torch.Tensor:
    """Pixels of an edit in which every network is called."""
    return latents_of(pipe, output_type="pt", keep_shape=True, **options)


def on_meta(module: torch.nn.Module) -> bool:
    return all(parameter.is_meta for parameter in module.parameters())


@pytest.mark.parametrize("way", EACH_WAY)
def test_sequential_offloading_keeps_weights_away_and_numbers_equal(smallest: ToyModel, way: dict[str, str]) -> None:
    pipe = build(smallest, **way)
    expected, without_depth = image_of(pipe), latents_of(pipe)
    for network in networks(pipe).values():  # as enable_sequential_cpu_offload does it
        buffers = len(network._parameters) > 0
        cpu_offload(network, torch.device("cpu"), offload_buffers=buffers, state_dict=Away(network))
    for _ in range(2):
        assert all(map(on_meta, networks(pipe).values()))
        assert pipe._execution_device.type == "cpu"
        assert torch.equal(image_of(pipe), expected)
        assert torch.equal(latents_of(pipe), without_depth)
    pipe.remove_all_hooks()
    assert not any(map(on_meta, networks(pipe).values()))
    assert torch.equal(image_of(pipe), expected)


@pytest.mark.parametrize("way", EACH_WAY)
def test_no_network_is_called_behind_the_back_of_its_hook(smallest: ToyModel, way: dict[str, str]) -> None:
    # Model offloading moves a network when its own hook is told, and no sooner. On a machine without an accelerator
    # the meta device takes the CPU's place: what is used without a word to the hook has no numbers.
    pipe = build(smallest, **way)
    expected, without_depth = image_of(pipe), latents_of(pipe)
    for network in networks(pipe).values():
        hook = AlignDevicesHook("cpu", offload=True, place_submodules=True, weights_map=Away(network))
        add_hook_to_module(network, hook)
    assert all(map(on_meta, networks(pipe).values()))
    assert torch.equal(image_of(pipe), expected)
    assert torch.equal(latents_of(pipe), without_depth)
    prepared = pipe.prepare_reference(
        an_edit()["reference"], generator=(generator := seeded_generator(0)), num_inference_steps=2
    )
    reused = latents_of(pipe, {**an_edit(), "reference": prepared}, generator=generator)
    assert torch.equal(reused, without_depth)


@pytest.mark.parametrize("way", EACH_WAY)
def test_model_offloading_gives_equal_numbers_twice(smallest: ToyModel, way: dict[str, str]) -> None:
    pipe = build(smallest, **way)
    expected = image_of(pipe)
    assert set(pipe.model_cpu_offload_seq.split("->")) == set(networks(pipe))
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.equal(image_of(pipe), expected)
    pipe.remove_all_hooks()
    assert not any(hasattr(network, "_hf_hook") for network in networks(pipe).values())
    assert torch.equal(image_of(pipe), expected)


@pytest.mark.parametrize("way", EACH_WAY)
@pytest.mark.parametrize(
    "kind",
    [
        "leaf_level",
        pytest.param(
            "block_level",
            marks=pytest.mark.xfail(
                strict=True,
                reason="parts of CLIP and of the U-Nets are called by themselves; only accelerate's hooks hear of it",
            ),
        ),
    ],
)
def test_group_offloading_gives_equal_numbers(
    smallest: ToyModel, tmp_path: Path, way: dict[str, str], kind: str
) -> None:
    # To disk, because the weights that are put away then hold no numbers, on a CPU, too.
    pipe = build(smallest, **way)
    expected = image_of(pipe)
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    for name, network in networks(pipe).items():  # each in a folder of its own: they have layers of one name
        folder = {"offload_to_disk_path": str(tmp_path / name)}
        apply_group_offloading(network, torch.device("cpu"), offload_type=kind, **folder, **blocks)
    for _ in range(2):
        torch.testing.assert_close(image_of(pipe), expected, atol=2e-5, rtol=1e-4)


@pytest.fixture
def active_backend() -> Iterator[None]:
    """Put diffusers' global choice of a backend back."""
    before = _AttentionBackendRegistry.get_active_backend()[0]
    yield
    _AttentionBackendRegistry.set_active_backend(before)


@pytest.mark.usefixtures("active_backend")
@pytest.mark.parametrize("blend", [1.0, 0.5])
@pytest.mark.parametrize("backend", ["native", "_native_math"])  # those that run on a CPU; flex warns there
def test_attention_back_ends_agree(smallest: ToyModel, backend: str, blend: float) -> None:
    pipe = build(smallest, reference_blend=blend)
    expected = latents_of(pipe)
    for network in (pipe.unet, pipe.reference_unet):
        network.set_attention_backend(backend)
    torch.testing.assert_close(latents_of(pipe), expected, atol=1e-5, rtol=1e-4)
    for network in (pipe.unet, pipe.reference_unet):
        network.reset_attention_backend()  # of the networks: the global choice stays
    torch.testing.assert_close(latents_of(pipe), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("active_backend")
def test_a_named_back_end_still_tells_where_from(smallest: ToyModel) -> None:
    pipe = build(smallest)
    options = {"num_inference_steps": 2, "return_correspondence": True}
    expected = pipe(**an_edit(), **options, generator=seeded_generator(0)).correspondences[0]
    for network in (pipe.unet, pipe.reference_unet):
        network.set_attention_backend("native")
    found = pipe(**an_edit(), **options, generator=seeded_generator(0)).correspondences[0]
    np.testing.assert_allclose(found.reference_xy, expected.reference_xy)


@pytest.mark.parametrize(
    "replace",
    [
        lambda pipe: pipe.unet.set_attention_slice("auto"),
        lambda pipe: pipe.unet.fuse_qkv_projections(),
        lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()),
        lambda pipe: pipe.reference_unet.set_attn_processor(AttnProcessor2_0()),
    ],
    ids=["sliced", "fused", "plain", "reference_plain"],
)
def test_attention_that_knows_no_reference_is_an_error(smallest: ToyModel, replace: object) -> None:
    pipe = build(smallest)
    expected = latents_of(pipe)
    try:
        replace(pipe)
        result = latents_of(pipe)
    except WeightsError as error:
        assert "does not use a reference" in str(error) and "set_attention_backend" in str(error)
    else:
        assert torch.equal(result, expected)  # whatever it was, the reference is not lost in silence


def test_what_would_leave_the_reference_out_is_refused_at_once(smallest: ToyModel) -> None:
    pipe = build(smallest)
    expected = latents_of(pipe)
    for refused in (pipe.enable_attention_slicing, pipe.enable_xformers_memory_efficient_attention):
        with pytest.raises(InputError, match="would ignore the reference"):
            refused()
    pipe.disable_attention_slicing()
    assert torch.equal(latents_of(pipe), expected)


@pytest.mark.parametrize("way", EACH_WAY)
def test_channels_last_gives_the_same_numbers(smallest: ToyModel, way: dict[str, str]) -> None:
    pipe = build(smallest, **way)
    expected = image_of(pipe)
    for name in ("unet", "reference_unet", "vae", "depth_projector"):
        getattr(pipe, name).to(memory_format=torch.channels_last)
    assert pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(image_of(pipe), expected, atol=1e-5, rtol=1e-4)


def test_slicing_and_tiling_of_the_autoencoder_change_nothing(smallest: ToyModel) -> None:
    pipe = build(smallest)
    options = {
        "num_images_per_prompt": 2,
        "generator": None,
        "latents": torch.randn(2, 4, 8, 8, generator=seeded_generator(0)),
    }
    pipe.register_to_config(posterior="mean")
    expected = image_of(pipe, **options)
    pipe.vae.enable_slicing()
    torch.testing.assert_close(image_of(pipe, **options), expected, atol=1e-5, rtol=1e-4)
    pipe.vae.enable_tiling()  # images of one tile
    torch.testing.assert_close(image_of(pipe, **options), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("way", EACH_WAY)
def test_weights_kept_in_a_smaller_type_are_computed_with_in_the_larger(
    smallest: ToyModel, way: dict[str, str]
) -> None:
    # Weights that bfloat16 holds exactly lose nothing when they are put away in it.
    pipe = build(smallest, **way)
    pipe.unet.to(torch.bfloat16).to(torch.float32)
    pipe.reference_unet.to(torch.bfloat16).to(torch.float32)
    expected = latents_of(pipe)
    for network in (pipe.unet, pipe.reference_unet):
        network.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert pipe.unet.mid_block.attentions[0].proj_in.weight.dtype == torch.bfloat16
    assert torch.equal(latents_of(pipe), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "how"), [(WAYS[0], "function"), (WAYS[1], "method")])
def test_compiled_u_nets_give_the_same_numbers(smallest: ToyModel, way: dict[str, str], how: str) -> None:
    pipe = build(smallest, **way)
    expected = latents_of(pipe)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=16):
        if how == "function":
            pipe.unet = torch.compile(pipe.unet, backend="aot_eager", fullgraph=True)
        else:
            pipe.unet.compile(backend="aot_eager", fullgraph=True)
        pipe.reference_unet.compile(backend="aot_eager", fullgraph=True)
        for _ in range(2):
            compiled = latents_of(pipe)
            torch.testing.assert_close(compiled, expected, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


def test_a_pipeline_with_a_compiled_u_net_can_be_saved(smallest: ToyModel, tmp_path: Path) -> None:
    pipe = build(smallest)
    expected = latents_of(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="aot_eager")
    pipe.save_pretrained(tmp_path)
    loaded = MimicBrushPipeline.from_pretrained(tmp_path, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(latents_of(loaded), expected, atol=2e-5, rtol=1e-4)


def test_an_edit_looks_for_its_device_once_and_a_prepared_reference_once_more(
    smallest: ToyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look walks through all modules of all networks: 18 ms for two U-Nets of full size."""
    pipe = build(smallest)
    image_of(pipe)  # fills the cache of what is the same for all edits
    found: list[torch.device] = []

    def find(self: MimicBrushPipeline) -> torch.device:
        found.append(self.device)
        return found[-1]

    monkeypatch.setattr(type(pipe), "_execution_device", property(find))
    image_of(pipe)
    assert len(found) == 2
