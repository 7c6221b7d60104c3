"""Parts of a model that carry forward derivatives along, or are computed again in the backward pass instead of being kept.

A forward derivative (tangent) belongs to a level of torch's forward differentiation. While a level is open, all tangents that were
kept for the backward pass stay in memory, and when it is closed they are lost, as for a second computation in the backward pass. So
each part of a model has a level to itself, and between the parts a tensor and its tangent are two tensors, a `Dual`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

Checkpointing = Literal["none", "blocks", "low_memory"]
"""As `train.activation_checkpointing`"""


@dataclasses.dataclass(frozen=True, slots=True)
class Dual:
    """A tensor and its derivative in some direction, between parts of a model, in the place of the tensor."""

    primal: torch.Tensor
    tangent: torch.Tensor


def has_tangent(tensor: torch.Tensor) -> bool:
    """Whether a tensor inside a part carries a forward derivative."""
    return _unpack(tensor)[1] is not None


def carry(function: Callable[..., Any], *inputs: Any) -> Any:
    """Return what a part of a model returns, with forward derivatives where its inputs have some.

    Args:
        function: Module or other function of tensors; it sees a tensor in the place of each `Dual`.
        inputs: Tensors or duals, and dataclasses, tuples and dictionaries of them; the results likewise.
    """
    if not _has_dual(inputs):
        return function(*inputs)
    with forward_ad.dual_level():
        return _change_tensors(_take_apart, function(*_change_tensors(_put_together, inputs)))


def run_again(function: Callable[..., Any], *inputs: Any) -> Any:
    """Return what `carry` returns, keep nothing but the inputs, and compute it a second time in the backward pass.

    Args:
        function: As for `carry`; its results depend on its inputs and on weights alone.
        inputs: As for `carry`.
    """
    return checkpoint(carry, function, *inputs, use_reentrant=False, preserve_rng_state=True)


def _unpack(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    primal, tangent = forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call] # torch's
    return primal, tangent


def _take_apart(value: torch.Tensor | Dual) -> torch.Tensor | Dual:
    assert isinstance(value, torch.Tensor), "duals are made by parts, not within them"
    primal, tangent = _unpack(value)
    return primal if tangent is None else Dual(primal, tangent)


def _put_together(value: torch.Tensor | Dual) -> torch.Tensor:
    if not isinstance(value, Dual):
        return value
    together: torch.Tensor = forward_ad.make_dual(value.primal, value.tangent)  # type: ignore[no-untyped-call] # torch's
    return together


def _list_parts(value: Any) -> list[Any]:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, dict):
        return list(value.values())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return []


def _has_dual(value: Any) -> bool:
    return isinstance(value, Dual) or any(map(_has_dual, _list_parts(value)))


def _change_tensors(change: Callable[[Any], Any], value: Any) -> Any:
    """Return a tensor or dual, or whatever is made of them, with all of them changed."""
    if isinstance(value, torch.Tensor | Dual):
        return change(value)
    parts = [_change_tensors(change, part) for part in _list_parts(value)]
    if isinstance(value, tuple):
        return tuple(parts)
    if isinstance(value, dict):
        return dict(zip(value, parts, strict=True))
    if parts:
        names = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(value, **dict(zip(names, parts, strict=True)))
    return value
