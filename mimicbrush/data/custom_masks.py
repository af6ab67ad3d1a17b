"""Mask strategies of users: a function on the Python path, given as module:function."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np

from mimicbrush.errors import InputError

#: (points, size_px, rng) -> mask, see docs/extending.md. `points` are the matches of a video pair, (K, 2) pixels (x, y)
#: on the canvas; a photograph has no stored matches: (0, 2). The mask is (S, S), 1 = repaint.
MaskFunction = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]


def find_mask_function(name: str) -> MaskFunction:
    """Import a mask function by name.

    Args:
        name: module:function.

    Raises:
        InputError: there is no such module or function.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        here = error.name is not None and f"{module_name}.".startswith(f"{error.name}.")
        hint = f"; if {module_name}.py is in the current folder, put PYTHONPATH=. before the command" if here else ""
        raise InputError(f"data.mask: {name}: {error}{hint}") from error
    if not hasattr(module, function_name):
        raise InputError(f"data.mask: {name}: {module.__file__} has no {function_name}")
    function: MaskFunction = getattr(module, function_name)
    if not callable(function):
        raise InputError(f"data.mask: {name} is not a function but {type(function).__name__}")
    return function


def sample_custom_mask(name: str, points: np.ndarray, size_px: int, rng: np.random.Generator) -> np.ndarray:
    """Sample a mask with the function of a user, and check it: (S, S) uint8.

    Raises:
        InputError: see `find_mask_function`; or the function did not return a mask with a part to repaint and a part to
            keep.
    """
    mask = np.asarray(find_mask_function(name)(points, size_px, rng))
    if mask.shape != (size_px, size_px) or mask.dtype not in (np.uint8, bool) or mask.max() > 1:
        values = f" with values up to {mask.max()}" if mask.size else ""
        raise InputError(
            f"data.mask: {name} returned {mask.shape} {mask.dtype}{values}; expected "
            f"({size_px}, {size_px}) bool, or uint8 with 1 = repaint and 0 = keep"
        )
    if mask.all() or not mask.any():
        raise InputError(
            f"data.mask: {name} returned a mask that is {int(mask[0, 0])} everywhere; nothing can be learnt from it"
        )
    return mask.astype(np.uint8)
