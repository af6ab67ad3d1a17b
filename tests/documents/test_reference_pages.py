"""The pages that name parts of the code: they are complete, and what they name is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import options_page
import pytest
from commands import ROOT
from omegaconf import OmegaConf

from mimicbrush.assembly.command_line import list_training_options
from mimicbrush.cli.project_files import CONFIGS

API = (ROOT / "docs/api.md").read_text(encoding="utf-8")
PAPER = (ROOT / "docs/paper_vs_code.md").read_text(encoding="utf-8")


def table_rows(text: str) -> list[str]:
    """The first cells of all tables."""
    return re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)


def test_the_page_of_options_is_what_the_dataclasses_say() -> None:
    assert (
        options_page.PAGE.read_text(encoding="utf-8") == options_page.build_page()
    )  # scripts/options_page.py mends it


def test_the_page_of_options_has_every_key_and_says_something_of_each() -> None:
    page = options_page.build_page()
    rows = table_rows(page)
    training = {name.replace("*", "NAME") for name in list_training_options(CONFIGS).names}
    groups = {name for name in training if any(other.startswith(f"{name}.") for other in training)}
    assert groups and training - groups <= set(rows)
    for config in ("mine", "evaluate"):
        values = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{config}.yaml"))
        assert isinstance(values, dict)
        names = {*values, "task.index", "task.count"} if config == "mine" else {*values}
        assert names - {"defaults", "hydra", "task"} <= set(rows), config
    for line in page.splitlines():
        if line.startswith("| `"):
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            assert len(cells) == 4 and all(cell.strip() for cell in cells), line


def body_of(name: str) -> list[ast.stmt]:
    """The statements of a module of the pipelines, or of a class in it: read, for importing takes ten seconds."""
    module, _, class_name = name.partition(".")
    body = ast.parse((ROOT / "mimicbrush/pipelines" / f"{module}.py").read_text(encoding="utf-8")).body
    if not class_name:
        return body
    (found,) = (node for node in body if isinstance(node, ast.ClassDef) and node.name == class_name)
    return found.body


def public_names(name: str) -> Iterator[str]:
    """Methods and properties that a class defines, and its fields."""
    for node in body_of(name):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


@pytest.mark.parametrize(
    "name",
    [
        "pipeline_mimicbrush.MimicBrushPipeline",
        "hub.HubPipeline",
        "prepared.PreparedReference",
        "pipeline_output.MimicBrushPipelineOutput",
    ],
)
def test_the_page_of_the_pipeline_names_all_that_is_public(name: str) -> None:
    names = [each for each in public_names(name) if not each.startswith("_")]
    assert names and [each for each in names if not re.search(rf"`(\w+\.)?{each}\b", API)] == []


@pytest.mark.parametrize(
    ("where", "function"),
    [
        ("pipeline_mimicbrush.MimicBrushPipeline", "__call__"),
        ("pipeline_mimicbrush.MimicBrushPipeline", "prepare_reference"),
        ("open_pipeline", "open_pipeline"),
    ],
)
def test_the_page_of_the_pipeline_names_all_arguments(where: str, function: str) -> None:
    (found,) = (node for node in body_of(where) if isinstance(node, ast.FunctionDef) and node.name == function)
    arguments = [each.arg for each in (*found.args.args, *found.args.kwonlyargs) if each.arg != "self"]
    assert len(arguments) > 2 and [name for name in arguments if f"| `{name}` |" not in API] == []


def test_the_sections_of_the_paper_lead_to_code_that_is_there() -> None:
    _, _, section = PAPER.partition("## From the paper to the code")
    section = section.partition("\n## ")[0]
    places = re.findall(r"`((?:mimicbrush|configs|scripts)/[\w/.-]+)`(?:: ((?:`[\w.]+`(?:, )?)+))?", section)
    assert len(places) > 15
    wrong = []
    for path, names in places:
        file = ROOT / path
        if not file.exists():
            wrong.append(path)
        elif names:
            text = file.read_text(encoding="utf-8")
            wrong += [f"{path}: {name}" for name in re.findall(r"`([\w.]+)`", names) if not is_defined(name, text)]
    assert wrong == []


def is_defined(name: str, text: str) -> bool:
    """Whether a module defines a name, or a method of a class."""
    outer, _, inner = name.rpartition(".")
    nodes = ast.parse(text).body
    if outer:
        nodes = next((node.body for node in nodes if isinstance(node, ast.ClassDef) and node.name == outer), [])
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == inner:
            return True
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == inner for t in node.targets):
            return True
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == inner:
            return True
    return False


def test_a_name_that_is_not_there_would_be_found() -> None:
    text = "class A:\n    size: int = 1\n    def b(self): ...\nX = 3\n"
    assert [is_defined(name, text) for name in ("A", "A.b", "A.size", "X", "A.c", "b")] == [True] * 4 + [False] * 2


@pytest.mark.slow
def test_the_example_of_the_page_of_the_pipeline_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from commands import blocks_of
    from PIL import Image
    from toy_data import photograph

    monkeypatch.chdir(tmp_path)
    Image.fromarray(photograph("chelsea.png")).save("ref.jpg")
    Image.fromarray(photograph("coffee.png")[:60, :90]).save("src.jpg")
    mask = Image.new("L", (90, 60))
    mask.paste(255, (30, 20, 60, 40))
    mask.save("mask.png")
    values: dict[str, object] = {}
    exec("\n".join(blocks_of("docs/api.md", "python")), values)
    assert Path("result.png").is_file() and values
