"""Arithmetic of a GPU on a CPU: products of float32 matrices whose factors are rounded, as TF32 does it."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_FIRST_FACTOR = {"mm": 0, "bmm": 0, "mv": 0, "dot": 0, "addmm": 1, "baddbmm": 1}


def round_to_tf32(tensor: torch.Tensor) -> torch.Tensor:
    """Round float32 to 10 bits of mantissa, to nearest even."""
    bits = tensor.contiguous().view(torch.int32)
    bits = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF
    return bits.view(torch.float32)


def round_to_bf16(tensor: torch.Tensor) -> torch.Tensor:
    """Round float32 to 7 bits of mantissa."""
    return tensor.to(torch.bfloat16).float()


class RoundedProducts(TorchDispatchMode):
    """Rounds the factors of products of float32 matrices, in the forward pass and in derivatives, and counts the products.

    Args:
        rounding: Of a tensor.
    """

    def __init__(self, rounding: Callable[[torch.Tensor], torch.Tensor] = round_to_tf32) -> None:
        super().__init__()
        self.rounding, self.count = rounding, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        first = _FIRST_FACTOR.get(func.overloadpacket.__name__)
        if first is not None and args[first].dtype == torch.float32:
            self.count += 1
            args = (*args[:first], *(self.rounding(f) for f in args[first : first + 2]), *args[first + 2 :])
        return func(*args, **(kwargs or {}))
