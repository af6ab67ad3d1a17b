"""Every command asks for its outputs before it works, holds the folders that it writes to, and ends in plain words."""

from __future__ import annotations

import ast
import errno
import importlib
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import hydra.core.hydra_config
import pytest
import toy_run
from mining_inputs import write_clips
from omegaconf import OmegaConf

from mimicbrush import assembly
from mimicbrush.assembly import sweeps
from mimicbrush.cli import evaluate, mine
from mimicbrush.data.training_data import TrainingData, read_training_data, write_training_data
from mimicbrush.errors import InputError, LockedError, cli_main
from mimicbrush.io import locks
from mimicbrush.io.locks import hold_folder, hold_name
from mimicbrush.mining.run import mine_folder
from mimicbrush.mining.verify.folder import verify_folder

ROOT = Path(__file__).parents[2]
#: Command -> its module, and a command line in which OUT is what is tried: a file where the name ends in "-file".
#: What else is named is made by `material`, just enough for the command to come to its outputs.
COMMAND_LINES = {
    "edit-file": ("cli.edit", "image image image -o OUT.png"),
    "edit-map-file": ("cli.edit", "image image image -o x.png --save-correspondence OUT.png"),
    "edit-sheet-file": ("cli.edit", "image image image -o x.png --contact-sheet OUT.png"),
    "edit-batch": ("cli.edit", "--batch list.jsonl --output-dir OUT"),
    "paint": ("cli.paint", "--output OUT"),
    "pairs-file": ("cli.pairs", "export pairs -o OUT"),
    "pairs": ("cli.pairs", "export pairs --format musubi --output OUT"),
    "export": ("cli.export", "run --output OUT"),
    "import": ("cli.convert", "import --snapshot folder --output OUT"),
    "convert-file": ("cli.convert", "export --pipeline folder --output OUT"),
    "benchmark": ("cli.benchmark", "--pictures folder --output OUT"),
    "benchmark-to-paint": ("cli.benchmark", "--pictures folder --output new --to-paint OUT"),
    "pck": ("cli.pck", "--pairs pairs --output OUT"),
    "study": ("cli.study", "make folder --benchmark folder --output OUT"),
    "study-file": ("cli.study", "score folder image --output OUT"),
    "demo": ("cli.dev.demo", "--output OUT"),
    "data": ("cli.dev.data", "--output OUT"),
    "data-file": ("cli.dev.data", "--output new --pack OUT"),
    "encoders": ("cli.dev.encoders", "data --output OUT"),
    "ablations": ("cli.dev.ablations", "--pairs pairs --output OUT"),
}
#: The options of commands that name outputs. The commands that Hydra reads are tried below by themselves.
OUTPUT_OPTIONS = {"--output", "--output-dir", "--save-correspondence", "--contact-sheet", "--to-paint", "--pack"}


@pytest.fixture
def material(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("folder", "pairs/manifest", "data/pairs/train", "run"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("image", "run/config.yaml", "run/training_data.json"):
        (tmp_path / name).write_text("x")
    line = '{"source": "image", "mask": "image", "reference": "image", "output": "x.png"}'
    (tmp_path / "list.jsonl").write_text(line)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_command(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["mimicbrush", *arguments])
    try:
        cli_main(importlib.import_module(f"mimicbrush.{module}").main)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize("name", COMMAND_LINES)
def test_what_stands_in_the_way_of_an_output_is_one_message_before_the_work(
    name: str, material: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, line = COMMAND_LINES[name]
    is_file = name.endswith("-file")
    blocked = "blocked.png" if ".png" in line and is_file else "blocked"
    (material / blocked).mkdir() if is_file else (material / blocked).touch()
    suffix = ".png" if blocked.endswith(".png") else ""
    before = sorted(path.relative_to(material) for path in material.rglob("*"))
    for output in ("blocked", "image/x", "/proc/x", "x" * 256, "/proc/version/x", "nul\0"):
        arguments = [part.replace("OUT.png", output + suffix).replace("OUT", output) for part in line.split()]
        status = run_command(module, arguments, monkeypatch)
        message = capsys.readouterr().err
        assert status == 2 and "error: " in message and "Traceback" not in message, (output, message)
        assert "report" not in message and "model" not in message, message  # of the output, and not later
        assert sorted(path.relative_to(material) for path in material.rglob("*")) == before, output


def test_every_option_that_names_an_output_is_tried_above() -> None:
    found = set()
    for path in (ROOT / "mimicbrush" / "cli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and any(each.arg == "type" for each in node.keywords):
                found |= {each.value for each in node.args if isinstance(each, ast.Constant)}
    named = {each for each in found if re.search(r"-(output|save|contact|to-paint|pack|json)", each)}
    assert named == OUTPUT_OPTIONS
    assert all(any(option in line for _, line in COMMAND_LINES.values()) for option in OUTPUT_OPTIONS)


@pytest.mark.parametrize("output", ["file", "file/x", "/proc/x", "x" * 256, "pairs", "pairs/new"])
def test_the_commands_that_hydra_reads_ask_for_their_outputs(
    output: str, mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "pairs").symlink_to(mined)
    (tmp_path / "clips").mkdir()
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in mined.rglob("*"))
    if output != "pairs":  # which mining goes on with
        with pytest.raises(InputError, match=r"output"):
            mine_folder(tmp_path / "clips", Path(output), progress=False)
    for kind in ("pairs", "benchmark"):
        values = {"editor": "oracle", "output": output, kind: "pairs"}
        config = OmegaConf.merge(OmegaConf.load(ROOT / "configs" / "evaluate.yaml"), values)
        del config.hydra, config.defaults
        with pytest.raises(InputError, match="output="):
            evaluate.run(config)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="run_dir="):
        toy_run.train(mined, Path(output))
    toy_run.forget_accelerate()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips", "file", "pairs"]
    assert sorted(path.name for path in mined.rglob("*")) == before


def test_a_folder_that_another_process_writes_to_is_refused(
    mined: Path, material: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(locks, "GRACE_S", 0.05)
    taken = material / "taken"
    write_clips(material / "clips", 1)
    with hold_folder(taken):
        with pytest.raises(LockedError, match=rf"taken is in use by process {os.getpid()} on"):
            mine_folder(material / "clips", taken, progress=False)
        with pytest.raises(LockedError):
            toy_run.train(mined, taken)
        toy_run.forget_accelerate()
        config = OmegaConf.load(ROOT / "configs" / "evaluate.yaml")
        del config.hydra, config.defaults
        with pytest.raises(LockedError):
            evaluate.run(OmegaConf.merge(config, {"editor": "oracle", "output": str(taken), "pairs": "x"}))  # type: ignore[arg-type]
        for name in ("demo", "data", "encoders", "ablations"):
            module, line = COMMAND_LINES[name]
            assert run_command(module, line.replace("OUT", "taken").split(), monkeypatch) == 2
            assert "taken is in use by process" in capsys.readouterr().err
        assert [path.name for path in taken.iterdir()] == [".lock"]
    with hold_name(taken):
        for name in ("benchmark", "study"):
            module, line = COMMAND_LINES[name]
            assert run_command(module, line.replace("OUT", "taken").split(), monkeypatch) == 2
            assert "taken is in use by process" in capsys.readouterr().err


def test_a_sweep_leaves_out_a_job_that_runs_elsewhere_and_does_not_call_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = OmegaConf.create({"runtime": {"output_dir": str(tmp_path)}, "overrides": {"task": []}})
    monkeypatch.setattr(hydra.core.hydra_config.HydraConfig, "get", lambda: job)

    def refuse(*_: object, **__: object) -> int:
        raise LockedError("it is being written to")

    monkeypatch.setattr(assembly, "train", refuse)
    sweeps.train_job(OmegaConf.create({"run_name": "a", "seed": 0, "train": {"max_steps": 1, "resume": "never"}}))
    assert "left out" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [sweeps.JOB_FILE]


@pytest.mark.parametrize("folder", ["file", "file/x", "/proc/x", "x" * 256])
def test_a_sweep_asks_for_its_folder(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path / folder)}}})
    with pytest.raises(SystemExit) as end:
        sweeps.SweepCallback().on_multirun_start(config)
    assert end.value.code == 2 and "error: hydra.sweep.dir=" in capsys.readouterr().err


def test_what_a_run_states_of_its_data_is_whole_or_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = TrainingData(0.1, frozenset({"ab", "cd"}))
    write_training_data(tmp_path, before)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "the disk is gone")))
        with pytest.raises(OSError, match="the disk is gone"):
            write_training_data(tmp_path, TrainingData(0.5, frozenset({"ef"})))
    assert read_training_data(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["training_data.json"]


def ascii_terminal(monkeypatch: pytest.MonkeyPatch) -> io.BytesIO:
    """Standard output as PYTHONIOENCODING=ascii makes it, and what arrives there."""
    arrived = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(arrived, encoding="ascii", write_through=True))
    return arrived


def test_a_name_that_the_terminal_cannot_show_ends_no_finished_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = "動画 caf\udce9"  # the last of it is no UTF-8
    write_clips(tmp_path / "in", 1)
    config = OmegaConf.load(ROOT / "configs" / "mine.yaml")
    del config.hydra, config.defaults
    values = {"input": str(tmp_path / "in"), "output": str(tmp_path / folder), "workers": 1, "pairs_per_clip": 2}
    config = OmegaConf.merge(config, values | {"progress": False})
    arrived = ascii_terminal(monkeypatch)
    cli_main(lambda: mine.run(config))  # type: ignore[arg-type]
    shown = folder.encode("ascii", "backslashreplace")
    assert b"2 pairs" in arrived.getvalue() and shown in arrived.getvalue()
    # What a killed run leaves of its lock is named, and goes when the run goes on.
    assert verify_folder(tmp_path / folder, progress=False).faults == []
    (tmp_path / folder / ".lock").touch()
    (fault,) = verify_folder(tmp_path / folder, progress=False).faults
    assert "left by a run that was stopped" in str(fault)
    cli_main(lambda: mine.run(config))  # type: ignore[arg-type]
    assert verify_folder(tmp_path / folder, progress=False).faults == []


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/data/run/x.bin"), 2, "the disk of /data/run is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 2, "the disk is full, or your quota on it is used up"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), 2, "error: /data/x: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "/data/x"), 2, "error: /data/x: Read-only file system"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", ".x.tmp", None, "r/x"), 2, "error: r/x: Is a directory"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "r/x"), 2, "error: r/x: Not a directory"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "r"), 2, "error: r: Too many levels"),
        (MemoryError(), 2, "not enough memory"),
        (KeyError("x"), 1, "this is a bug in mimicbrush"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 1, "Please report it in the project's issues"),
        (InputError("mask 0"), 2, "error: mask 0"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_however_a_command_ends_it_says_what_to_do(
    error: BaseException, status: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        cli_main(fail)
    message = capsys.readouterr().err
    assert end.value.code == status and told in message
    assert ("Traceback" in message) == (status == 1)


def test_an_absent_device_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from mimicbrush.evaluation.editors.registry import open_editor
    from mimicbrush.pipelines import open_pipeline

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("it is being loaded")

    monkeypatch.setattr(open_pipeline.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(open_pipeline.MimicBrushPipeline, "from_pretrained", fail)
    monkeypatch.setattr(open_pipeline, "find_pipeline", fail)
    attempts: list[Callable[[str], object]] = [
        lambda device: open_pipeline.open_pipeline("small", device),
        lambda device: open_pipeline.open_pipeline("small", device, "float16"),
        lambda device: open_editor("small", device=device),
    ]
    for attempt in attempts:
        with pytest.raises(InputError, match="PyTorch finds no CUDA GPU"):
            attempt("cuda")
        with pytest.raises(InputError, match="must be auto, cpu or cuda"):
            attempt("tpu")
