"""Values that depend only on weights, computed once and kept while the weights do not change."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import nn


class WeightDependentCache:
    """Cache of values by name; it drops a value when one of the parameters behind it changes.

    A parameter counts as changed when it is another object, on another device, of another type, or was written to
    in place (PyTorch counts such writes). It does not count those through `.data`, which is how diffusers' `EMAModel`
    writes; so what is trained, and small, is also compared by its values.
    """

    def __init__(self) -> None:
        self._values: dict[str, tuple[list[_ParameterState], torch.Tensor]] = {}

    def get(
        self, name: str, frozen: nn.Module, trained: nn.Module, compute: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """Return the value; compute it only if it is absent, or a parameter has changed.

        Args:
            name: of the value.
            frozen: a network that it depends on, and that is never trained.
            trained: a small network that it depends on.
            compute: makes it.
        """
        parameters = [*frozen.parameters(), *trained.parameters()]
        if name in self._values:
            states, value = self._values[name]
            if len(states) == len(parameters) and all(map(_ParameterState.is_unchanged, states, parameters)):
                return value
        value = compute()
        states = [_ParameterState(parameter) for parameter in frozen.parameters()]
        states += [_ParameterState(parameter, parameter.detach().clone()) for parameter in trained.parameters()]
        self._values[name] = states, value
        return value


class _ParameterState:
    """State of a parameter when a value was computed from it."""

    def __init__(self, parameter: nn.Parameter, values: torch.Tensor | None = None) -> None:
        self._parameter, self._state, self._values = weakref.ref(parameter), self._state_of(parameter), values

    def is_unchanged(self, parameter: nn.Parameter) -> bool:
        if self._parameter() is not parameter or self._state != self._state_of(parameter):
            return False
        # On the meta device, where offloading leaves them, there are no values to compare.
        return self._values is None or (not parameter.is_meta and torch.equal(self._values, parameter))

    @staticmethod
    def _state_of(parameter: nn.Parameter) -> tuple[torch.device, torch.dtype, int]:
        # Tensors made under torch.inference_mode() do not count writes; nobody trains those.
        return parameter.device, parameter.dtype, -1 if parameter.is_inference() else parameter._version
