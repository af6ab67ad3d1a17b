"""Every command in the documents is run: here at toy size, or what it starts by the test that its rule names."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import warm_scripts
from benchmark_material import painted, write_dreambooth, write_images
from commands import DOCUMENTS, ROOT, RULES, Elsewhere, Toy, blocks_of, commands_of, rule_of, unused_rules
from mining_inputs import photograph_with_segments, write_tar
from PIL import Image
from released_snapshot import as_hub_cache, write_snapshot
from toy_data import photograph
from toy_run import forget_accelerate, train

from mimicbrush.synthetic.clips import HELDOUT_PHOTOGRAPHS, demo_clips, write_clips

SIZE = (420, 360)  # of the images that are edited: the crop in docs/editing.md lies within


@pytest.mark.parametrize("document", DOCUMENTS)
def test_it_is_known_what_runs_each_command(document: str) -> None:
    assert [command for command in commands_of(document) if rule_of(command) is None] == []


def test_no_rule_is_left_over_and_what_it_names_is_there() -> None:
    assert unused_rules() == []
    made_by_ci = (ROOT / ".ci/run").read_text()
    all_commands = {command for document in DOCUMENTS for command in commands_of(document)}
    targets = {each for each in all_commands if each.startswith("make ") and rule_of(each) == Elsewhere(".ci/run")}
    assert targets and all(target in made_by_ci for target in targets)
    for _, rule in RULES:
        if isinstance(rule, Elsewhere):
            path, _, function = rule.name.partition("::")
            assert f"def {function}(" in (ROOT / path).read_text() if function else (ROOT / path).is_file(), rule.name


def test_extras_are_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = set()
    for path in [*(ROOT / document for document in DOCUMENTS), *(ROOT / "mimicbrush").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        named |= set(re.findall(r"pip install '\.\[(\w+)\]'|install_command\(['\"](\w+)", text))
        # There is no such package on an index.
        assert not re.search(r"install [^\n]*\bmimicbrush\[", text), path
    names = {name for pair in named for name in pair if name}
    assert len(names) > 3 and names <= extras.keys()


@dataclass
class Workplace:
    """A folder in which the documents' names mean something, and where our scripts are run."""

    folder: Path
    environment: dict[str, str]
    done: set[str] = field(default_factory=set)

    def run(self, command: str) -> tuple[int, str]:
        """Its status, and what it printed."""
        words = shlex.split(command)
        if "=" in words[0]:  # a variable of the environment, such as PYTHONPATH, which Python reads when it starts
            name, _, value = words[0].partition("=")
            finished = subprocess.run(
                [sys.executable, *words[2:]], cwd=self.folder, env={**self.environment, name: value}, text=True,
                check=False, capture_output=True,
            )  # fmt: skip
        else:
            assert words[0].endswith("python")
            finished = warm_scripts.run(
                [sys.executable, *words[1:]], cwd=self.folder, env=self.environment, text=True, capture_output=True,
                timeout=500,
            )  # fmt: skip
        return finished.returncode, finished.stdout + finished.stderr


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    root = tmp_path_factory.mktemp("documents")
    folder = root / "main"
    _furnish(folder)
    environment = {**os.environ, "HF_HOME": str(root / "hub_home"), "HF_HUB_OFFLINE": "1"}
    as_hub_cache(folder, root / "hub_home")
    return Workplace(folder, environment)


def _furnish(folder: Path) -> None:
    folder.mkdir()
    for name in ("scripts", "configs", "mimicbrush", "data_manifests"):
        (folder / name).symlink_to(ROOT / name)
    # Clips, photographs with segments, images of subjects.
    for name, spec in demo_clips(HELDOUT_PHOTOGRAPHS, 5, seed=3).items():
        list(write_clips(folder / "videos", {name: type(spec)(**{**vars(spec), "seconds": 2.5})}))
    for name in ("VIDEOS", "FOLDER_OR_LIST"):
        (folder / name).symlink_to(folder / "videos")
    jpeg, annotation = photograph_with_segments()
    content = {"sa_1.jpg": jpeg, "sa_1.json": json.dumps(annotation).encode()}
    (folder / "sa1b").mkdir()
    write_tar(folder / "sa1b" / "sa_000000.tar", content)
    for name in ("dreambooth", "DREAMBOOTH"):
        write_dreambooth(folder / name, folder.parent / "unused.jsonl")
    write_images(folder / "FOLDER")
    painted(folder / "MASKS", "tabby/00", "part", (40, 40, 120, 120))
    # Images to edit.
    images = {"ref": photograph("chelsea.png"), "src": photograph("coffee.png")}
    mask = np.zeros(SIZE[::-1], np.uint8)
    mask[100:220, 120:260] = 255
    made = {name: Image.fromarray(pixels).resize(SIZE) for name, pixels in images.items()}
    made["mask"] = Image.fromarray(mask)
    for name in ("ref.jpg", "src.jpg", "mask.png"):
        made[name.partition(".")[0]].save(folder / name)
    for name in ("front.jpg", "back.jpg"):
        made["ref"].save(folder / name)
    for short, name in (("ref", "reference"), ("src", "source"), ("mask", "mask")):
        for target in (f"{name}.png", f"demo/edits/edit_1_{name}.png"):
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            made[short].save(folder / target)
    parts = folder / "benchmark" / "PartComp" / "WithinInstance"
    parts.mkdir(parents=True)
    for short, name in (("ref", "reference"), ("src", "source"), ("mask", "source_mask")):
        made[short].save(parts / f"001_{name}.png")
    (folder / "edits.jsonl").write_text('{"source": "src.jpg", "mask": "mask.png", "reference": "ref.jpg"}\n')
    (folder / "stripes.py").write_text(blocks_of("docs/extending.md", "python")[0])
    write_snapshot(folder)


def _later(workplace: Workplace) -> None:
    """What the documents take for granted once the quickstart was followed: other names for what it made."""
    folder = workplace.folder
    if (folder / "DIR").is_symlink():
        return
    train(folder / "pairs", folder / "runs" / "default", "train.max_steps=2", "train.checkpoint_every=2")
    forget_accelerate()
    checkpoints = folder / "runs" / "default" / "checkpoints"
    (checkpoints / "step-00010000").symlink_to(checkpoints / "step-00000002")
    shutil.copytree(folder / "runs" / "default", folder / "runs" / "smoke", symlinks=True)
    for name, target in {
        "DIR": "runs/smoke/pipeline", "PIPELINE": "runs/smoke/pipeline", "MINED": "pairs",
        "demo/pairs/train": "pairs", "demo/pairs/heldout": "pairs",
        "small_model_data/encoders": "mimicbrush/assets/proof",
        "small_model_data/pairs/train": "pairs", "small_model_data/pairs/heldout": "pairs",
    }.items():  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(folder / target)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_do_what_they_say(document: str, workplace: Workplace) -> None:
    edit = ""
    for command in commands_of(document):
        rule = rule_of(command)
        if command.endswith("--model DIR") and "ref.jpg" in command:
            edit = command  # what EDIT stands for
        if not isinstance(rule, Toy) or command in workplace.done:
            continue
        if document != DOCUMENTS[0]:
            _later(workplace)
        words = [word for word in shlex.split(command.replace("EDIT", edit, 1)) if word not in rule.without]
        small = shlex.join(words).replace("experiment=default", "experiment=smoke") + f" {rule.more}"
        if "train.py +experiment=smoke" in small:
            run_dir = next((word.partition("=")[2] for word in words if word.startswith("run_dir=")), "runs/unnamed")
            shutil.rmtree(workplace.folder / run_dir, ignore_errors=True)  # of the page before
            small += f" run_dir={run_dir}"
        status, printed = workplace.run(small)
        assert status == 0, f"{document}: {command}\nrun as {small}\nended with {status}:\n{printed[-3000:]}"
        workplace.done.add(command)


@pytest.mark.slow
def test_the_python_of_the_readme_runs(workplace: Workplace) -> None:
    _later(workplace)
    code = "\n".join(blocks_of("README.md", "python")).replace("num_inference_steps=20", "num_inference_steps=1")
    code = code.replace("pipe(source, mask, cat", "pipe(source, mask, cat, num_inference_steps=1")
    (workplace.folder / "readme.py").write_text(code)
    status, printed = workplace.run("python readme.py")
    assert status == 0, printed
    with Image.open(workplace.folder / "result.png") as result:
        assert result.size == SIZE
