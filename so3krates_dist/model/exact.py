"""Matrix products of geometry, which no setting makes coarser.

With TF32 a GPU rounds the factors of products in float32 to 10 bits. Of dense layers that costs little; of a product that places
atoms it is a thousandth of a cell's length, and of the phases of an Ewald sum all of them.
"""

from collections.abc import Callable

import torch


def compute_exactly(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """Return a function of tensors in their dtype; by way of float64 where products in float32 are set to be coarser.

    Its derivatives go the same way, so they are exact wherever they are taken.

    Args:
        function: Gives a tensor of the dtype of its arguments.
        tensors: All of one floating-point dtype.
    """
    dtype = tensors[0].dtype
    if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest":
        return function(*tensors)
    return function(*(tensor.double() for tensor in tensors)).to(dtype)


def multiply_exactly(left: torch.Tensor, right: torch.Tensor, equation: str = "") -> torch.Tensor:
    """Return a product as `compute_exactly` does.

    Args:
        left: Factor.
        right: Factor of the same dtype.
        equation: As for `torch.einsum`; empty: a matrix product.
    """
    if equation:
        return compute_exactly(lambda one, two: torch.einsum(equation, one, two), left, right)
    return compute_exactly(torch.matmul, left, right)
