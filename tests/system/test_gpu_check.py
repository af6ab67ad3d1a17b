"""scripts/gpu_check.sh: its parts here, the whole command on a CPU at toy size. What a GPU does is not seen here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from measurements import breakdown, editing, gpu_check, gpu_pieces, training_step, training_variants
from measurements.breakdown import Event
from measurements.harness import Counted
from torch import nn

from mimicbrush.errors import InputError, MimicBrushError
from mimicbrush.training.options import TrainOptions

ROOT = Path(__file__).parents[2]

#: Names as profilers show them, from PyTorch, cuDNN, cuBLAS, flash attention and torch.compile.
CUDA_KERNELS = {
    "attention": [
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, cutlass::bfloat16_t>>",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<pytorch_flash::Flash_bwd_kernel_traits<96>>",
        "void pytorch_flash::flash_fwd_splitkv_kernel<pytorch_flash::Flash_fwd_kernel_traits<160, 64, 64, 4>>",
        "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<flash::CollectiveMainloopFwdSm90<2>>>>",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128_4x1x1_kernel0_0",
        "void (anonymous namespace)::softmax_warp_forward<float, float, float, 10, false, false>",
        "triton_tem_fused_flex_attention_2",
    ],
    "convolution": [
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_warpgroupsize1x1x1_g1",
        "sm80_xmma_wgrad_implicit_gemm_indexed_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x32_stage4",
        "sm90_xmma_dgrad_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize256x64x64_warpgroupsize2x1x1",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_256x128_32x3_nhwc_align8>",
        "void implicit_convolve_sgemm<float, float, 1024, 5, 5, 3, 3, 3, 1, false, false, true>",
        "void cudnn::winograd_nonfused::winogradForwardData4x4<float, float>",
        "void at::native::(anonymous namespace)::conv_depthwise2d_forward_kernel<3, float, int>",
        "triton_tem_fused_convolution_5",
    ],
    "matmul": [
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel",
        "ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_64x3_tn",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8>",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16, true, false>",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 128, 16, 4, 4, false>",
        "triton_tem_fused_addmm_7",
    ],
    "norm and activation": [
        "void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::BFloat16>",
        "void at::native::(anonymous namespace)::ComputeFusedParamsCUDAKernel<float>",
        "void at::native::(anonymous namespace)::ComputeInternalGradientsCUDAKernel<float>",
        "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernel2<float>",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::(anonymous namespace)::silu_kernel(at::Tensor"
        "IteratorBase&)::{lambda()#1}::operator()() const::{lambda()#6}>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(at::TensorIteratorBase&)>",
        "triton_red_fused_native_group_norm_3",
        "triton_poi_fused_convolution_native_group_norm_silu_12",
        "_group_norm_silu_kernel",
    ],
    "optimizer": [
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::Tensor"
        "ListMetadata<4>, at::native::(anonymous namespace)::FusedAdamMathFunctor<float, 4, (at::native::ADAM_MODE)0>>",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::LpNorm>",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::NormTwoOps<float>>>",
    ],
    "copies": [
        "Memcpy HtoD (Pinned -> Device)",
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::direct_copy_kernel"
        "_cuda(at::TensorIteratorBase&)>>",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy_vectorized<at::native::OpaqueType<2u>, 4, 128>",
        "void cudnn::engines_precompiled::nchwToNhwcKernel<__half, __half, float, false, true>",
        "triton_poi_fused__to_copy_4",
        "triton_poi_fused_clone_transpose_11",
    ],
    "other": [
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>",
        "void at::native::(anonymous namespace)::upsample_bicubic2d_out_frame<double, double>",
        "triton_poi_fused_add_convolution_9",
    ],
}


@pytest.mark.parametrize("kind", CUDA_KERNELS)
def test_the_kind_of_a_cuda_kernel(kind: str) -> None:
    assert {name: breakdown.find_kind(name) for name in CUDA_KERNELS[kind]} == dict.fromkeys(CUDA_KERNELS[kind], kind)


def test_every_kind_is_found_among_the_operators_of_a_cpu() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.SiLU())
    linear = nn.Linear(32, 32)
    adam = torch.optim.Adam([*network.parameters(), *linear.parameters()], fused=True)
    image = torch.randn(2, 4, 32, 32)

    def step() -> float:
        tokens = linear(network(image).flatten(2).transpose(1, 2))
        tokens = nn.functional.scaled_dot_product_attention(*[tokens.unflatten(-1, (2, 16)).transpose(1, 2)] * 3)
        loss = (tokens.transpose(1, 2).contiguous() * 2).exp().mean()
        loss.backward()
        adam.step()
        adam.zero_grad()
        return loss.item()

    found = breakdown.break_down(breakdown.profile(step, on_gpu=False))
    spent = {kind: found[f"{kind.replace(' ', '_')}_ms"] for kind in breakdown.ALL_KINDS}
    assert all(milliseconds > 0 for milliseconds in spent.values()), spent
    assert 0 <= found["idle_ms"] < found["total_ms"]
    # On one thread nothing overlaps.
    assert sum(spent.values()) + found["idle_ms"] == pytest.approx(found["total_ms"], rel=0.01)
    assert found["host_syncs"] == 1 + 6  # `item`, and fused Adam on a CPU reads the step of each tensor
    assert 20 < found["launches"] == found["kernels"] < 200
    assert len(found["longest"]) > 5


def trace_of_a_gpu() -> list[Event]:
    """Two streams: 10 to 30 and 20 to 50, and 70 to 80 after the host has gone on; times in ms."""
    events = [
        ("measured", "user_annotation", 0, 60), ("measured", "gpu_user_annotation", 10, 80),
        ("cudaDeviceSynchronize", "cuda_runtime", -5, -1),
        ("cudaLaunchKernel", "cuda_runtime", 1, 2), ("cuLaunchKernelEx", "cuda_driver", 3, 4),
        ("cudaGraphLaunch", "cuda_runtime", 5, 6), ("cudaMemcpyAsync", "cuda_runtime", 7, 8),
        ("cudaLaunchHostFunc", "cuda_runtime", 8, 9), ("cudaStreamWaitEvent", "cuda_runtime", 9, 10),
        ("cudaStreamSynchronize", "cuda_runtime", 10, 12), ("aten::mm", "cpu_op", 0, 5),
        ("nvjet_tst_128x256", "kernel", 10, 30), ("flash_fwd_kernel", "kernel", 20, 50),
        ("Memset (Device)", "gpu_memset", 70, 80), ("cudaDeviceSynchronize", "cuda_runtime", 61, 80),
    ]  # fmt: skip
    found = [{"name": n, "cat": c, "tid": 1, "ts": a * 1e3, "dur": (b - a) * 1e3, "ph": "X"} for n, c, a, b in events]
    return breakdown.read_trace({"traceEvents": [*found, {"name": "measured", "ph": "M"}]})


def test_idle_time_is_what_no_kernel_covers_and_only_what_the_run_did_is_counted() -> None:
    found = breakdown.break_down(trace_of_a_gpu())
    assert found["total_ms"] == 80 and found["idle_ms"] == 80 - 40 - 10
    assert (found["matmul_ms"], found["attention_ms"], found["copies_ms"], found["other_ms"]) == (20, 30, 10, 0)
    assert (found["kernels"], found["launches"], found["host_syncs"]) == (3, 3, 1)
    assert found["longest"][0] == "30 ms, 1 times, attention: flash_fwd_kernel"


@pytest.fixture
def results(tmp_path: Path) -> gpu_check.Results:
    return gpu_check.Results(tmp_path / "gpu_check.json", {"commit": "abc", "pieces": {}})


@pytest.fixture
def run_fake(
    tmp_path: Path, results: gpu_check.Results, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, int], dict[str, Any]]:
    """Run a piece whose process is this program; it has `request` and `tell`."""

    def run(program: str, limit_s: int = 60) -> dict[str, Any]:
        start = "import json, os, sys, time\nrequest = json.loads(sys.argv[1])\n"
        start += "def tell(**found): print(json.dumps(found), flush=True)\n"
        monkeypatch.setattr(gpu_check, "COMMAND", (sys.executable, "-S", "-c", start + program))
        with (tmp_path / "log").open("w+") as log:
            gpu_check.run_piece(gpu_check.Asked("edit", (), limit_s), {"device": "cpu"}, results, log)
        assert json.loads(results.path.read_text()) == results.found  # all is on the disk
        return results.found["pieces"]["edit"]

    return run


def test_a_piece_tells_its_rows(run_fake: Callable[..., dict[str, Any]], results: gpu_check.Results) -> None:
    piece = run_fake(
        "tell(machine={'name': 'a GPU'})\n"
        "tell(case='a', status='running')\n"
        "tell(case='a', status='failed', error='too large')\n"
        "tell(case='b', status='running')\n"
        "tell(case='b', status='done', ms=float('nan'))\n"
    )
    assert results.found["machine"] == {"name": "a GPU"}
    assert piece["rows"] == [
        {"case": "a", "status": "failed", "error": "too large"},
        {"case": "b", "status": "done", "ms": "NaN"},
    ]
    assert (piece["status"], piece["error"]) == ("failed", "a: too large") and 0 <= piece["seconds"] < 60


def test_after_a_crash_the_rest_of_a_piece_goes_on(run_fake: Callable[..., dict[str, Any]]) -> None:
    piece = run_fake(
        "for case in ('a', 'b', 'c'):\n"
        "    if case in request['done']: continue\n"
        "    tell(case=case, status='running')\n"
        "    if case == 'b': print('a kernel crashed', file=sys.stderr); os.abort()\n"
        "    tell(case=case, status='done')\n"
    )
    assert [(row["case"], row["status"]) for row in piece["rows"]] == [("a", "done"), ("b", "failed"), ("c", "done")]
    assert piece["status"] == "failed" and "status -6: a kernel crashed" in piece["rows"][1]["error"]


def test_a_piece_that_does_not_start_is_tried_once(run_fake: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    piece = run_fake(f"open({str(tmp_path / 'tries')!r}, 'a').write('x')\nsys.exit('no such package')")
    assert (tmp_path / "tries").read_text() == "x"
    assert piece["status"] == "failed" and piece["error"] == "the process ended with status 1: no such package"


def test_a_piece_that_takes_too_long_keeps_what_it_has(run_fake: Callable[..., dict[str, Any]]) -> None:
    piece = run_fake("tell(case='a', status='done')\ntell(case='b', status='running')\ntime.sleep(100)", limit_s=2)
    assert [row["status"] for row in piece["rows"]] == ["done", "timed out"]
    assert (piece["status"], piece["error"]) == ("timed out", "it took longer than 2 s")
    assert piece["seconds"] < 50


def test_an_interruption_keeps_what_was_found(
    run_fake: Callable[..., dict[str, Any]], results: gpu_check.Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(told: dict[str, Any], *rest: object, take: Callable[..., None] = gpu_check._take) -> None:
        take(told, *rest)
        if told["status"] == "running":
            raise KeyboardInterrupt

    monkeypatch.setattr(gpu_check, "_take", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_fake("tell(case='a', status='done')\ntell(case='b', status='running')\ntime.sleep(100)")
    piece = json.loads(results.path.read_text())["pieces"]["edit"]
    assert [row["status"] for row in piece["rows"]] == ["done", "interrupted"] and piece["status"] == "interrupted"


def test_a_variant_that_fails_leaves_the_others() -> None:
    def fail() -> dict[str, object]:
        raise torch.OutOfMemoryError("too large")

    told: list[dict[str, Any]] = []
    rows = [Counted("known", fail), Counted("a", fail), Counted("b", lambda: {"ms": 1.0})]
    gpu_pieces.run_rows(rows, "cpu", {"known"}, told.append)
    assert [(row["case"], row["status"]) for row in told if row["status"] != "running"] == [
        ("a", "failed"),
        ("b", "done"),
    ]
    assert told[1]["error"] == "OutOfMemoryError: too large" and told[3]["ms"] == 1


def test_a_gpu_that_answers_no_more_ends_the_process() -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_pieces.check_gpu("cuda:99")  # no such device: a RuntimeError, as of a GPU that is lost
    assert ended.value.code == gpu_pieces.GPU_LOST


def test_what_has_failed_is_freed_before_the_gpu_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    def ask(*size: int, device: str) -> torch.Tensor:
        log.append("ask")
        return torch.zeros(size, device=device)

    monkeypatch.setattr(gpu_pieces, "free_memory", lambda: log.append("free"))
    monkeypatch.setattr(torch, "ones", ask)
    gpu_pieces.check_gpu("cpu")
    assert log == ["free", "ask"]


def test_the_best_rows_are_held_against_the_goals() -> None:
    def row(case: str, ms: float, **more: object) -> dict[str, object]:
        return {"case": case, "status": "done", "ms": ms, **more}

    train = [
        row("peer, 8 samples", 104.0),
        row("peer, 32 samples", 50.0),
        row("half_norms, 8 samples", 60.0, share_of_peak=0.15),
        row("half_norms, 32 samples", 25.0, share_of_peak=0.37),
        {"case": "plain, 64 samples", "status": "failed", "ms": 1.0},
    ]
    edits = [row("peer, current", 3600.0), row("eager, current", 2400.0), row("graphs, zero", 300.0)]
    found = gpu_check.summarise(train, edits)
    assert found["train_step"] == {
        "best": "half_norms, 32 samples", "ms": 25.0, "share_of_peak": 0.37, "goal_share_of_peak": 0.35,
        "best_peer": "peer, 32 samples", "best_peer_ms": 50.0, "times_faster": 2.0, "goal_times_faster": 1.8,
    }  # fmt: skip
    assert found["edit_current"]["s"] == 2.4 and found["edit_current"]["goal_s"] == 0.6
    assert found["edit_zero"]["times_faster"] == 12.0 and found["edit_zero"]["goal_s"] == 0.4
    assert gpu_check.summarise([], []) == {}


def test_the_table_shows_every_row_and_its_error() -> None:
    measured = {
        "case": "half_norms, 32 samples",
        "status": "done",
        "ms": 46.3,
        "time_ratio": 1.08,
        "share_of_peak": 0.2,
    }
    profiled = {"case": "edit, eager", "status": "done", **breakdown.break_down(trace_of_a_gpu())}
    failed = {"case": "compile, 16 samples", "status": "failed", "error": "FailOnRecompileLimitHit"}
    pieces = {
        "parity": {"status": "failed", "seconds": 1, "rows": [], "error": "no such package"},
        "train_step": {"status": "failed", "seconds": 100.4, "rows": [measured, failed]},
        "breakdown": {"status": "done", "seconds": 9, "rows": [profiled]},
    }
    table = gpu_check.write_table({"machine": {"name": "a GPU"}, "commit": "abc", "pieces": pieces, "summary": {}})
    assert table.splitlines() == [
        "a GPU, commit abc, full size",
        "parity: failed, 1 s",
        "  0 of 0 tests passed",
        "  no such package",
        "train_step: failed, 100 s",
        "  half_norms, 32 samples                   46.3 ms   1.08x   20.0% of peak",
        "  compile, 16 samples: failed FailOnRecompileLimitHit",
        "breakdown: done, 9 s",
        "  edit, eager: 80.0 ms, 3 launches, 3 kernels, 1 host_syncs: matmul 25%, attention 38%, copies 12%, idle 38%",
    ]


def test_what_is_asked_for_is_checked_before_anything_starts() -> None:
    assert gpu_check.read_piece("train_step:compile,plain", None).variants == ("compile", "plain")
    assert gpu_check.read_piece("parity", 9).limit_s == 9
    for text in ("parities", "edit:fast", "parity:eager"):
        with pytest.raises(MimicBrushError, match=r"there is no (piece|variant)"):
            gpu_check.read_piece(text, None)
    assert sum(gpu_check.LIMITS_S.values()) <= 6 * 60


def test_an_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(InputError, match=r"missing: diffusers. `bash scripts/gpu_check.sh --wheels`"):
        gpu_check.check_packages()


def test_it_starts_without_any_package() -> None:
    paths = os.pathsep.join(map(str, (ROOT / "scripts", ROOT)))
    code = "import sys; sys.argv[1:] = ['out']; from measurements import gpu_check; gpu_check.cli_main(gpu_check.main)"
    bare = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path[:0] = {paths.split(os.pathsep)!r}; {code}"]
    done = subprocess.run(bare, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: these packages are missing: torch, transformers, ")


def test_a_device_or_variant_that_there_is_not_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check", str(tmp_path / "out")])
    monkeypatch.setenv("DEVICE", "banana")
    with pytest.raises(InputError, match="DEVICE=banana: expected cpu or cuda"):
        gpu_check.main()
    with pytest.raises(MimicBrushError, match="there is no variant x; this measurement has none"):
        gpu_check.read_piece("parity:x", None)
    assert not (tmp_path / "out").exists()


def test_wheels_are_named_in_the_versions_of_the_project(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--wheels"])
    gpu_check.main()
    text = capsys.readouterr().out
    pins = (ROOT / "constraints.txt").read_text()
    named = re.findall(r"[\w.-]+==\S+", text)
    assert {"diffusers", "importlib-metadata"} <= {name.split("==")[0] for name in named}
    assert all(f"{name} " in pins for name in named)


def test_collected_wheels_are_installed_for_one_run_alone(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "a-1-py3-none-any.whl").touch()
    python, told = tmp_path / "python", tmp_path / "told"
    # It writes down what it is called with, and whether what stands first on its path is there.
    program = f'echo "$PYTHONPATH $@" >> {told}; if [ -d "${{PYTHONPATH%%:*}}" ]; then echo there >> {told}; fi'
    python.write_text(f"#!/bin/bash\n{program}\n")
    python.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(python), "WHEELS": str(tmp_path / "wheels")}
    subprocess.run(["bash", str(ROOT / "scripts/gpu_check.sh"), "out", "parity"], env=environment, check=True)
    install, run, there = told.read_text().splitlines()
    site = run.split(":")[0]
    assert f"--no-index --no-deps --no-compile --no-cache-dir --target {site} {tmp_path}/wheels/a-1-py3" in install
    assert run.endswith(f"{ROOT}/scripts:{ROOT} -m measurements.gpu_check out parity") and there == "there"
    assert not Path(site).exists()


@pytest.mark.parametrize("variants", [training_variants.TRAIN_VARIANTS, editing.EDIT_VARIANTS])
def test_the_peer_is_always_measured_and_first(variants: dict[str, Any]) -> None:
    usual = training_variants.choose_variants(variants, ())
    assert next(iter(usual)) == "peer" and not any(variant.on_request for variant in usual.values())
    last = list(variants)[-1]
    assert list(training_variants.choose_variants(variants, [last])) == ["peer", last]


@pytest.mark.parametrize("name", training_variants.TRAIN_VARIANTS)
def test_a_variant_of_training_has_options_of_training(name: str) -> None:
    variant = training_variants.TRAIN_VARIANTS[name]
    TrainOptions(**variant.options)
    assert variant.applied_to(training_step.SMALL).options == variant.options
    assert list(variant.batch_sizes) == sorted(set(variant.batch_sizes))


def test_a_breakdown_is_of_the_variants_that_are_profiled_or_named() -> None:
    def cases(*names: str) -> list[str]:
        return [row.case for row in breakdown.breakdown_rows(training_step.SMALL, editing.EditSetting(), names)]

    assert {"train step, peer, 8 samples", "edit, eager, 50 steps"} <= set(cases())
    assert len(cases()) < len(training_variants.TRAIN_VARIANTS) + len(editing.EDIT_VARIANTS)
    assert cases("plain", "compiled") == ["train step, plain, 8 samples", "edit, compiled, 50 steps"]
    with pytest.raises(MimicBrushError, match="there is no variant fastest; expected some of peer, plain"):
        cases("fastest")


def test_noise_made_on_the_device_is_made_anew_with_the_same_drops() -> None:
    setting = training_step.StepSetting(size_px=64, batch_size=9, options={"noise_on": "device"})
    seen = []

    class Training:
        def step(self, _batch: object, noise_sample: Any) -> tuple[float, torch.Tensor]:
            seen.append(noise_sample)
            return 0.0, torch.zeros(())

    setting.steps(Training())()
    plain = setting.inputs()[1]
    assert not torch.equal(seen[0].noise, plain.noise)
    assert torch.equal(seen[0].reference_rows, plain.reference_rows) and len(plain.reference_rows) == 8


@pytest.fixture
def bare_environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment in which only PyTorch, transformers and what gpu_check.sh asks for can be imported."""
    (tmp_path / "bare").mkdir()
    allowed = ["torch", "transformers", "numpy", *gpu_check.ALWAYS_CARRIED, *gpu_check.OFTEN_THERE]
    (tmp_path / "bare" / "sitecustomize.py").write_text(
        "import re, sys\n"
        "from importlib import metadata\n"
        f"todo, there = {allowed!r}, set()\n"
        "def plain(name): return re.sub('[-_.]+', '-', name).lower()\n"
        "while todo:\n"
        "    name = plain(todo.pop())\n"
        "    if name not in there:\n"
        "        there.add(name)\n"
        "        try: needed = metadata.requires(name) or []\n"
        "        except metadata.PackageNotFoundError: continue\n"
        "        todo += [re.match(r'[\\w.-]+', each).group() for each in needed if 'extra ==' not in each]\n"
        "there |= {'mimicbrush', 'opencv-python'}\n"
        "for module, names in metadata.packages_distributions().items():\n"
        "    if not there & set(map(plain, names)): sys.modules.setdefault(module, None)\n"
    )
    yield {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHON": sys.executable, "DEVICE": "cpu",
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tmp_path / "bare"),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_command_on_a_cpu(bare_environment: dict[str, str], tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "scripts/gpu_check.sh"), "out", "--limit", "800"]
    done = subprocess.run(command, cwd=tmp_path, env=bare_environment, capture_output=True, text=True)
    found = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    problems = {name: piece.get("error") for name, piece in found["pieces"].items() if piece["status"] != "done"}
    assert (problems, done.returncode) == ({}, 0), done.stderr
    assert list(found["pieces"]) == list(gpu_check.LIMITS_S)
    cases = {name: [row["case"] for row in piece["rows"]] for name, piece in found["pieces"].items()}
    assert cases["edit"][:3] == ["peer, current", "eager, current", "eager, zero"]
    assert cases["train_step"][:3] == ["peer, 2 samples", "plain, 2 samples", "half_norms, 2 samples"]
    assert {"edit, eager, 1 steps", "train step, peer, 2 samples"} <= set(cases["breakdown"])
    assert len(cases["parity"]) >= 3
    assert cases["klein"] == [
        f"64 px, references: {count}, {how}" for count in (1, 2) for how in ("everything kept", "blocks computed again")
    ]
    losses = [row["loss"] for row in found["pieces"]["klein"]["rows"]]
    # The same step, whether its blocks are computed again or not.
    assert losses[0] == losses[1] and losses[2] == losses[3] != losses[0], losses
    for peer, *ours in (found["pieces"][name]["rows"] for name in ("train_step", "edit")):
        for row in ours:
            assert row.get("max_abs_diff", 0) <= 1e-3 and row["time_ratio"] == peer["ms"] / row["ms"], row
            assert ("max_abs_diff" in row) != row["case"].startswith("fused_norms"), row
            assert "share_of_peak" not in row
    assert found["machine"]["torch"] == torch.__version__ and re.match("[0-9a-f]{40}|unknown", found["commit"])
    assert set(found["summary"]) == {"train_step", "edit_current", "edit_zero"}
    assert done.stdout.splitlines()[-1].startswith("edit_zero: ")
