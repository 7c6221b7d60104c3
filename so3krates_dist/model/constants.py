"""Constants of the models: tables that are computed once and never trained."""

from typing import Any, Self

from torch import nn


class ConstantsModule(nn.Module):
    """A module whose buffers are constants: they move between devices like its weights and keep their dtype.

    A forward pass casts them to the dtype that it computes in. If a conversion to float32 rounded them, Wigner symbols would be
    invariant to 1e-7 only after the way back to float64, and vectors that vanish by symmetry would be short ones instead.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Convert the weights and leave the constants as exact as they are."""
        constants = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call] # torch's
        for name, constant in constants.items():
            converted = self._buffers[name]
            if constant is not None and converted is not None:
                self._buffers[name] = constant.to(converted.device)
        return self
