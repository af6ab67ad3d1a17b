"""Values that hang on nothing but weights, computed once for as long as those stay the same."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import nn


class WeightDependentCache:
    """Remembers values by name, and forgets one as soon as any parameter it was made of is not what it was.

    A parameter counts as changed when it is another object, on another device, of another type, or was written to
    in place (PyTorch counts such writes). It does not count those through `.data`, which is how diffusers' `EMAModel`
    writes; so what is trained, and small, is also compared by its values.
    """

    def __init__(self) -> None:
        self._held: dict[str, tuple[list[_Seen], torch.Tensor]] = {}

    def get(
        self, name: str, frozen: nn.Module, trained: nn.Module, compute: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """The value, computed only if it is not known or no longer true.

        Args:
            name: of the value.
            frozen: a network that it depends on, and that nobody trains.
            trained: a small network that it depends on.
            compute: makes it.
        """
        parameters = [*frozen.parameters(), *trained.parameters()]
        if name in self._held:
            seen, value = self._held[name]
            if len(seen) == len(parameters) and all(map(_Seen.is_still, seen, parameters)):
                return value
        value = compute()
        seen = [_Seen(parameter) for parameter in frozen.parameters()]
        seen += [_Seen(parameter, parameter.detach().clone()) for parameter in trained.parameters()]
        self._held[name] = seen, value
        return value


class _Seen:
    """A parameter as it was."""

    def __init__(self, parameter: nn.Parameter, values: torch.Tensor | None = None) -> None:
        self._parameter, self._state, self._values = weakref.ref(parameter), self._state_of(parameter), values

    def is_still(self, parameter: nn.Parameter) -> bool:
        if self._parameter() is not parameter or self._state != self._state_of(parameter):
            return False
        # On the meta device, where offloading leaves them, there are no values to compare.
        return self._values is None or (not parameter.is_meta and torch.equal(self._values, parameter))

    @staticmethod
    def _state_of(parameter: nn.Parameter) -> tuple[torch.device, torch.dtype, int]:
        # Tensors made under torch.inference_mode() do not count writes; nobody trains those.
        return parameter.device, parameter.dtype, -1 if parameter.is_inference() else parameter._version
