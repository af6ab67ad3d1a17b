"""Values that hang on nothing but weights, computed once for as long as those stay the same."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import nn


class ConstantsOfWeights:
    """Remembers values by name, and forgets one as soon as any parameter it was made of is not what it was.

    A parameter counts as changed when it is another object, on another device, of another type, or was written to
    in place (PyTorch counts such writes).
    """

    def __init__(self) -> None:
        self._held: dict[str, tuple[list[_Seen], torch.Tensor]] = {}

    def get(self, name: str, modules: Sequence[nn.Module], compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The value, computed only if it is not known or no longer true.

        Args:
            name: of the value.
            modules: all whose parameters it depends on.
            compute: makes it.
        """
        parameters = [parameter for module in modules for parameter in module.parameters()]
        if name in self._held:
            seen, value = self._held[name]
            if len(seen) == len(parameters) and all(map(_Seen.is_still, seen, parameters)):
                return value
        value = compute()
        self._held[name] = [_Seen(parameter) for parameter in parameters], value
        return value


class _Seen:
    """A parameter as it was."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter, self._state = weakref.ref(parameter), self._state_of(parameter)

    def is_still(self, parameter: nn.Parameter) -> bool:
        return self._parameter() is parameter and self._state == self._state_of(parameter)

    @staticmethod
    def _state_of(parameter: nn.Parameter) -> tuple[torch.device, torch.dtype, int]:
        # Tensors made under torch.inference_mode() do not count writes; nobody trains those.
        return parameter.device, parameter.dtype, -1 if parameter.is_inference() else parameter._version
