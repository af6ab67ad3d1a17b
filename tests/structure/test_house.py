"""How the package reads: names, sizes, maps. What a linter does not know."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "mimicbrush"
MODULES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
#: Names that the code once had, and that hid what they mean.
RETIRED = {
    "Draws", "IsolatedReaders", "Later", "Meters", "Outside", "Parts", "ReadReference", "Trainee", "UndrawnBatch",
    "UndrawnSample", "Views", "WriteReference", "at_hand", "begin_alike", "context_at_hand", "drawn", "install_readers",
    "outside", "run_plainly", "says", "settle", "stem_rest", "told", "trainee", "travelling", "undrawn", "unread",
}  # fmt: skip
RETIRED_PART = re.compile(r"(^|_)pictures?(_|$)|[a-z]Pictures?\b|^Pictures?")
#: Longer than this, a function is no longer read at one glance. The pipeline's is the story itself.
MOST_LINES, THE_STORY = 110, "MimicBrushPipeline.__call__"
MOST_FILES = 15
#: What each command has, or may have: it is called by that name alone.
OF_COMMANDS = {"main", "parse_arguments", "run", "report", "export"}
#: Ways to begin a docstring that say nothing by themselves.
RIDDLES = ("See ", "Of ", "All of it", "All that", "It ", "This ", "That ", "One of ", "The same", "What came")


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{each.name}", each) for each in node.body if isinstance(each, ast.FunctionDef))


def test_a_public_name_is_defined_once() -> None:
    places = defaultdict(set)
    for name, tree in MODULES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                places[node.name].add(name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for each in (each for target in targets for each in ast.walk(target)):
                    if isinstance(each, ast.Name):
                        places[each.id].add(name)
    twice = {name: sorted(where) for name, where in places.items() if len(where) > 1 and not name.startswith("_")}
    assert {name: where for name, where in twice.items() if name not in OF_COMMANDS} == {}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_retired_word_is_an_identifier(name: str) -> None:
    tokens = tokenize.generate_tokens(io.StringIO((PACKAGE / name).read_text()).readline)
    names = {token.string for token in tokens if token.type == tokenize.NAME}
    assert sorted(each for each in names if each in RETIRED or RETIRED_PART.search(each)) == []


def test_functions_are_short() -> None:
    lengths = {
        f"{module}: {name}": (node.end_lineno or 0) - node.lineno + 1
        for module, tree in MODULES.items()
        for name, node in functions(tree)
        if name != THE_STORY
    }
    assert {name: lines for name, lines in lengths.items() if lines >= MOST_LINES} == {}


def test_folders_are_small_and_have_a_map() -> None:
    problems = []
    for folder in sorted({(PACKAGE / name).parent for name in MODULES}):
        files = sorted(path.stem for path in folder.glob("*.py"))
        if len(files) > MOST_FILES:
            problems.append(f"{folder.name} holds {len(files)} files")
        if folder == PACKAGE:
            continue
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
        packages = [path.parent.name for path in folder.glob("*/__init__.py")]
        absent = [name for name in [*files, *packages] if name != "__init__" and not re.search(rf"\b{name}\b", text)]
        problems += [f"the map of {folder.relative_to(PACKAGE)} lacks {name}" for name in absent]
    assert problems == []


def test_the_first_line_of_a_docstring_stands_alone() -> None:
    problems = []
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                first = (ast.get_docstring(node) or "").split("\n")[0]
                if first and (first.startswith(RIDDLES) or len(first.split()) < 3 or first[-1] not in ".:)?!"):
                    problems.append(f"{module}: {node.name}: {first}")
    assert problems == []
