"""The pinned packages: all that pyproject.toml asks for, each with the hashes that set-up verifies."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "constraints.txt").read_text().replace("\\\n", " ").splitlines()
PINS: dict[str, list[Requirement]] = defaultdict(list)
for _line in LINES:
    _pin = Requirement(_line.partition(" --hash=")[0])
    PINS[canonicalize_name(_pin.name)].append(_pin)


def pinned(requirement: Requirement) -> bool:
    """Whether each pin of a package is a version that the requirement allows."""
    pins = PINS.get(canonicalize_name(requirement.name), [])
    versions = [next(iter(pin.specifier)).version for pin in pins]
    return bool(versions) and all(requirement.specifier.contains(version, prereleases=True) for version in versions)


def stated() -> Iterator[Requirement]:
    """What pyproject.toml asks for, to run, in all extras, and to build."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = content["project"]["optional-dependencies"].values()
    for each in (content["project"]["dependencies"], content["build-system"]["requires"], *extras):
        yield from (req for req in map(Requirement, each) if req.name != content["project"]["name"])


def test_every_pin_is_one_version_with_hashes() -> None:
    for line in LINES:
        pin, *hashes = line.split(" --hash=")
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][\w.!+]*( ; [\w.'<>=!\s()]+)?", pin.strip()), line
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", each.strip()) for each in hashes), line


def test_what_the_project_asks_for_is_pinned() -> None:
    assert [str(requirement) for requirement in stated() if not pinned(requirement)] == []  # `make lock` mends it


def test_what_the_packages_ask_for_is_pinned() -> None:
    """An unpinned package of a package would be installed without a hash."""
    seen, waiting, lacking = set(), [(req.name, frozenset(req.extras)) for req in stated()], []
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            needed = map(Requirement, importlib.metadata.requires(name) or ())
        except importlib.metadata.PackageNotFoundError:
            continue  # of an extra, or a platform, that is not installed here
        for each in needed:
            if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                lacking += [] if canonicalize_name(each.name) in PINS else [f"{each} of {name}"]
                waiting.append((each.name, frozenset(each.extras)))
    assert len(seen) > 50 and lacking == []
