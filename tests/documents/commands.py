"""Every command that the documents name, and what is done with each: run at toy size, or by a test that is named."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: In this order: what an earlier one leaves behind is there for a later one.
_FIRST = ["docs/quickstart.md", "README.md", "docs/evaluation.md"]
_OTHERS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
DOCUMENTS = [
    *_FIRST,
    *(name for name in _OTHERS if name not in _FIRST),
    "CONTRIBUTING.md",
    "data_manifests/README.md",
    "data_manifests/DREAMBOOTH.md",
    "mimicbrush/assets/proof/README.md",
]
_PROGRAMS = (
    "python", ".venv/bin/python", "pip", "make", "bash", "git", "hf", "accelerate launch", "torchrun", "sbatch",
    "tensorboard", "trackio", "EDIT",
)  # fmt: skip
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_IS_COMMAND = re.compile(rf"(\w+=\S+ )*({'|'.join(map(re.escape, _PROGRAMS))}) +[^ ]")


def blocks_of(document: str, language: str) -> list[str]:
    """What stands in fences of a language."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return [block for found, block in _FENCE.findall(text) if found == language]


def commands_of(document: str) -> list[str]:
    """All commands of a document, on one line each and without remarks, in their order, each once."""
    text = (ROOT / document).read_text(encoding="utf-8")
    found = []
    for language, block, inline in re.findall(rf"{_FENCE.pattern}|`([^`]+)`", text, _FENCE.flags):
        if inline:
            lines = [" ".join(inline.split())]
        else:
            lines = re.sub(r"\\\n\s*", "", block).splitlines() if language == "bash" else []
        found += [line.partition(" #")[0].strip() for line in lines]
    return list(dict.fromkeys(line for line in found if _IS_COMMAND.match(line)))


@dataclass(frozen=True)
class Toy:
    """The command itself, made small.

    Attributes:
        more: what is added to it.
        without: options that want a GPU, or what is not here.
    """

    more: str = ""
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Elsewhere:
    """A test that runs it, or what it starts, at a small size. `name` is path::function, or ".ci/run"."""

    name: str


@dataclass(frozen=True)
class Never:
    """Not run by anything, and why."""

    why: str


_TINY = "train.max_steps=2 train.checkpoint_every=2 train.batch_size=2 train.total_batch_size=2 data.num_workers=0"
_SMALL = "model.size_px=16 model.block_out_channels=[16,32] model.attention_heads=2 model.context_width=16"
_EXACTNESS, _SPEED = "tests/training/test_exactness.py", "tests/system/test_training_speed.py"
#: What only whoever types the command has; without it the script renders all of its data.
_ONES_OWN = ("--videos", "VIDEOS", "--photographs", "PHOTOGRAPHS", "--heldout", "SUBJECTS")
_GPU_ONLY = ("train=gpu_40gb", "train=one_gpu_40gb", "train=one_gpu")

#: The first that matches the whole of a command counts.
RULES: list[tuple[str, Toy | Elsewhere | Never]] = [
    # What needs a network, a cluster or a GPU.
    (r"(git clone|hf download) .*", Never("nothing is fetched in a test")),
    (r".*(train_dreambooth_lora_flux2_klein_img2img|model_training/train|musubi_tuner/\w+|OneTrainer/scripts/train)\.py .*", Never("a trainer of others, with its weights, on a GPU")),
    (r"python run\.py config/.*", Never("a trainer of others, with its weights, on a GPU")),
    (r"pip install \.", Elsewhere("tests/system/test_wheel.py::test_it_holds_every_file_of_the_package_and_what_stands_beside")),
    (r"pip install '\.\[\w+\]'", Elsewhere("tests/documents/test_commands.py::test_extras_are_there")),
    (r"(tensorboard --logdir|trackio show) .*", Never("a viewer of what tests/training/test_seeing.py looks at")),
    (r"sbatch .*", Elsewhere(f"{_EXACTNESS}::test_the_slurm_script_starts_its_processes_itself_and_queues_a_stopped_run_again")),
    (r".*task\.index=\$SLURM_ARRAY_TASK_ID .*", Elsewhere("tests/mining/test_inputs.py::test_the_tasks_of_an_array_share_the_shards_and_the_last_one_finishes")),
    (r".*engine=ray .*", Elsewhere("tests/mining/test_engines.py::test_ray_gives_the_bytes_of_the_local_engine")),
    (r"torchrun .*encode_views\.py .*", Elsewhere("tests/training/test_encoded_views.py::test_killed_and_shared_encoding_gives_the_same_bytes")),
    (r"torchrun --nproc_per_node 8 .*", Elsewhere("tests/assembly/test_sweep_script.py::test_processes_that_share_each_job")),
    (r"torchrun .*", Elsewhere(f"{_EXACTNESS}::test_two_processes_see_the_same_inputs_and_losses")),
    (r"accelerate launch .*sharded.*", Elsewhere(f"{_EXACTNESS}::test_sharded_processes_train_alike_and_share_checkpoints_with_one")),
    (r"accelerate launch .*", Elsewhere(f"{_EXACTNESS}::test_processes_that_a_launcher_starts_may_be_one")),
    (r".*speed\.py (breakdown_gpu|edit_gpu|train_step_gpu)", Elsewhere("tests/system/test_gpu_check.py::test_the_whole_command_on_a_cpu")),
    (r".*gpu_check\.sh.*", Elsewhere("tests/system/test_gpu_check.py::test_the_whole_command_on_a_cpu")),
    # What takes long, and has tests of its own at a small size.
    (r"make (demo|test|slow|check)|bash \.ci/run", Elsewhere(".ci/run")),
    (r"make (setup|help|style|lock)", Never("`make demo` sets up; the others change no result")),
    (r"python -m pytest .*", Elsewhere(".ci/run")),
    (r"make app", Elsewhere("tests/app/test_editing_page.py::test_a_painted_hole_is_filled_and_tells_where_from")),
    (r".*app\.py( .*)?", Elsewhere("tests/app/test_editing_page.py::test_a_painted_hole_is_filled_and_tells_where_from")),
    (r".*paint_masks\.py( .*)?", Elsewhere("tests/app/test_painter_server.py::test_the_script_serves_until_it_is_stopped")),
    (r".*speed\.py encoded_views", Elsewhere("tests/training/test_encoded_views.py::test_what_a_full_size_sample_saves_by_count")),
    (r".*speed\.py (edit|read_block)", Elsewhere("tests/system/test_speed.py::test_a_full_size_edit_by_count")),
    (r".*speed\.py launches", Elsewhere("tests/system/test_launches.py::test_fused_norms_start_and_move_less")),
    (r".*speed\.py edit_launches", Elsewhere("tests/system/test_speed.py::test_the_launches_of_a_full_size_edit_by_count")),
    (r".*speed\.py klein", Elsewhere("tests/system/test_klein_counts.py::test_flop_and_memory_of_a_sample")),
    (r".*speed\.py memory", Elsewhere(f"{_SPEED}::test_a_full_size_u_net_keeps_what_reference_md_says")),
    (r".*speed\.py train_step( .*)?", Elsewhere(f"{_SPEED}::test_the_peer_trains_as_we_do")),
    (r".*speed\.py dropped_references( .*)?", Elsewhere("tests/system/test_speed.py::test_a_measurement_is_written")),
    (r".*speed\.py mining( .*)?", Never("a minute on real clips; equal results are asserted by the command itself")),
    (r".*speed\.py mining_choice( .*)?", Elsewhere("tests/system/test_mining_speed.py::test_pairs_tried_by_rank_are_those_tried_as_they_come")),
    (r".*speed\.py mining_cluster( .*)?", Elsewhere("tests/system/test_mining_speed.py::test_the_cost_of_a_clip_is_measured_and_a_cluster_follows_from_it")),
    (r".*speed\.py samples( .*)?", Elsewhere("tests/system/test_speed.py::test_samples_with_stored_matches_equal_those_with_sift_online")),
    (r".*compare_readers\.py .*", Elsewhere("tests/mining/test_damage.py::test_the_whole_comparison_on_real_clips")),
    (r".*measurements/several_references\.py .*", Elsewhere("tests/evaluation/test_two_references.py::test_only_the_third_frame_shows_what_the_hole_covers")),
    (r".*speed\.py noise", Elsewhere("tests/training/test_noise.py::test_the_measurement_compares_equal_numbers")),
    (r".*train\.py .*experiment=(small_)?distill.*", Elsewhere("tests/training/test_consistency_distillation.py::test_a_run_resumes_to_the_same_bits_and_exports_a_model_of_few_steps")),
    (r".*small_model_data\.py .*", Toy("--clips 2 --leaves 2 --crops 1 --output made/small_model_data", without=_ONES_OWN)),
    (r".*train_small_encoders\.py .*", Toy("made/small_model_data --output made/encoders --steps 2", without=("small_model_data",))),
    (r"python tests/golden/loss_curve\.py NAME", Elsewhere("tests/training/test_golden_curve.py::test_losses_are_what_they_were")),
    (r".*ablations\.py .*", Elsewhere("tests/evaluation/test_ablations_script.py::test_killed_between_two_evaluations_it_goes_on_and_keeps_what_is_done")),
    (r".*train\.py -m .*", Elsewhere("tests/assembly/test_sweep_script.py::test_all_ablations_are_rows")),
    (r".*sweep_table\.py .*", Elsewhere("tests/assembly/test_sweep_script.py::test_a_sweep_that_is_killed_goes_on_and_an_added_row_moves_none")),
    (r".*fetch_weights\.py .*", Elsewhere("tests/system/test_fetch_weights.py::test_the_command_fetches_what_is_needed_and_tells_of_it")),
    (r".*user_study\.py .*", Elsewhere("tests/evaluation/test_user_study.py::test_the_script_makes_and_scores")),
    (r".*options_page\.py", Elsewhere("tests/documents/test_reference_pages.py::test_the_page_of_options_is_what_the_dataclasses_say")),
    (r".*convert_checkpoint\.py lora .*", Elsewhere("tests/models/test_klein_lora.py::test_the_command_converts_a_run")),
    (r".*infer\.py .*--model runs/klein_smoke", Elsewhere("tests/pipelines/test_klein_pipeline.py::test_the_command_edits")),
    (r".*pck\.py .*--model runs/klein_smoke .*", Elsewhere("tests/evaluation/test_klein_editor.py::test_keypoints_are_carried_by_its_attention")),
    (r".*evaluate\.py editor=runs/klein_smoke .*", Elsewhere("tests/evaluation/test_klein_editor.py::test_held_out_pairs_are_measured_over_none")),
    (r".*fetch_clips\.py .*", Elsewhere("tests/mining/test_free_clips.py::test_a_fetch_that_is_killed_goes_on_and_its_clips_are_mined")),
    # Everything else.
    (r".*train\.py .*experiment=small.*", Toy(f"{_TINY} train.lr_warmup_steps=1 eval.max_pairs=2 eval.num_inference_steps=1 eval.every_steps=0 data.heldout_ratio=0.1")),
    (r".*reference_encoder=siglip", Elsewhere("tests/documents/test_extending.py::test_another_encoder_reads_the_reference")),
    (r".*train\.py .*model\.path=released", Toy(f"{_TINY} train.lr_warmup_steps=1 train.prediction_type=epsilon", without=_GPU_ONLY)),
    (r".*train\.py .*(model=pipeline|experiment=fine_tune).*", Toy(f"{_TINY} train.lr_warmup_steps=1", without=_GPU_ONLY)),
    (r".*train\.py .*experiment=klein_smoke.*", Toy(f"{_TINY} train.lr_warmup_steps=1 model.num_single_layers=1")),
    (r".*train\.py .*experiment=klein.*", Elsewhere("tests/training/test_flux2_klein.py::test_a_run_from_stored_weights_needs_no_text_encoder")),
    (r".*train\.py --cfg job", Toy()),
    (r".*encode_views\.py .*", Toy(f"train.batch_size=8 data.num_workers=0 {_SMALL}")),
    (r".*train\.py .*", Toy(f"{_TINY} {_SMALL}", without=_GPU_ONLY)),
    (r".*evaluate\.py .*pairs=.*", Toy("max_pairs=2 num_inference_steps=1")),
    (r".*evaluate\.py .*", Toy("num_inference_steps=1")),
    (r"python scripts/pck\.py", Elsewhere("tests/evaluation/test_keypoint_transfer.py::test_the_script_measures_photographs_and_homographies")),
    (r".*pck\.py --homographies .*", Elsewhere("tests/evaluation/test_keypoint_transfer.py::test_the_script_measures_photographs_and_homographies")),
    (r".*pck\.py .*--photographs .*", Toy("--max-pairs 3")),
    (r".*pck\.py .*", Toy("--max-pairs 2")),
    (r".*infer\.py .*", Toy("--steps 1 --force")),
    (r".*compare_choices\.py .*", Toy("--steps 1")),
    (r"EDIT .*", Toy("--steps 1 --force")),
    (r".*pairs\.py export .*--format .*", Toy("--size 16 --views 1 --workers 1")),
    (r".*(mine_pairs|pairs|export_run|convert_checkpoint|build_benchmark)\.py .*", Toy()),
]  # fmt: skip


def rule_of(command: str) -> Toy | Elsewhere | Never | None:
    """What is done with a command."""
    return next((rule for pattern, rule in RULES if re.fullmatch(pattern, command)), None)


def unused_rules() -> list[str]:
    """Rules that no command asks for."""
    first = {
        next((pattern for pattern, _ in RULES if re.fullmatch(pattern, command)), None)
        for document in DOCUMENTS
        for command in commands_of(document)
    }
    return [pattern for pattern, _ in RULES if pattern not in first]
