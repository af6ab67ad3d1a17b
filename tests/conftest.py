"""Shared by all tests: optional packages are absent, and a small mined folder is at hand."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before anything of ours is imported: the default run proves that the package works without these packages.
sys.path.insert(0, str(Path(__file__).parent / "without_optional"))
import sitecustomize  # noqa: F401

# The released algorithm, an oracle, lies beside the script that measures against it.
sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
sys.path.insert(0, str(Path(__file__).parent / "helpers"))

# One thread: toy models gain nothing from two, and results do not hang on the machine.
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", OMP_NUM_THREADS="1")

# A shell that starts something in the background lets it, and all that it starts, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis
import pytest
from browser import chromium
from toy_data import write_mined_folder

from mimicbrush.models.options import ToyFlux2KleinModel, ToyModel

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# What is imported stays: the collector of cyclic garbage need not go through a million such objects again and again.
gc.disable()

# Property tests: the same few inputs in every `make test`, the same many in `make slow`, new ones with
# `--hypothesis-profile search`.
hypothesis.settings.register_profile("short", max_examples=40, derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("long", max_examples=1000, derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("search", max_examples=2000, deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("short")

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the property tests, which `make slow` runs again with many more inputs."""
    for item in items:
        if isinstance(item, pytest.Function) and hypothesis.is_hypothesis_test(item.obj):
            item.add_marker("property")


def pytest_collection_finish() -> None:
    """Collect cyclic garbage from now on, but not among what was there before the first test."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)  # the default threshold, 700, is reached a hundred times a second
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries tell of leaks


@pytest.fixture(scope="session")
def mined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mined folder with four sources of each kind; see `toy_data`."""
    return write_mined_folder(tmp_path_factory.mktemp("mined") / "pairs")


@pytest.fixture(scope="session")
def smallest() -> ToyModel:
    """The smallest model that has all parts."""
    return ToyModel(size_px=16, block_out_channels=(16, 32), attention_heads=2, context_width=16)


@pytest.fixture(scope="session")
def smallest_klein() -> ToyFlux2KleinModel:
    """The smallest FLUX.2 klein that has all parts."""
    return ToyFlux2KleinModel(size_px=64, num_layers=1, num_single_layers=1, attention_heads=2, head_width=8)


@pytest.fixture
def shared() -> Path:
    """The folder of real clips and golden files, where it is at hand."""
    if not SHARED.is_dir():
        pytest.skip("../shared is not here")
    return SHARED


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The Chromium of the distribution, where it is at hand."""
    with chromium() as found:
        yield found


@pytest.fixture(scope="session")
def script_environment() -> Callable[[], dict[str, str]]:
    """The environment for scripts in their own process: optional packages are absent there, too."""
    path = str(Path(__file__).parent / "without_optional")
    return lambda: {**os.environ, "PYTHONPATH": path}
