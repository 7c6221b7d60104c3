"""Parts of a model that carry forward derivatives, and are computed again in the backward pass."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from so3krates_dist.model.recompute import Dual, carry, has_tangent, run_again

torch.manual_seed(0)
VALUES, DIRECTION, WEIGHT = (torch.randn(4, 3, dtype=torch.float64) for _ in range(3))


@dataclasses.dataclass(frozen=True, slots=True)
class Pairs:
    """Some of the kinds of values that parts hand on."""

    first: Any
    count: int
    nothing: None = None
    names: tuple[str, ...] = ()


def test_without_tangents_a_part_is_a_function() -> None:
    pairs = Pairs(VALUES, 3)
    assert carry(lambda *inputs: inputs, pairs, {"a": 1.0}) == (pairs, {"a": 1.0})
    assert carry(lambda first, _: first, pairs, None) is pairs


def test_tangents_go_through_whatever_tensors_are_in() -> None:
    def compute(pairs: Pairs, options: dict[str, torch.Tensor], factor: float) -> dict[str, Any]:
        assert has_tangent(pairs.first)
        assert not has_tangent(options["weight"])
        square = pairs.first**2
        return {"a": (square, Pairs(factor * square, pairs.count, names=pairs.names)), "b": options["weight"]}

    results = carry(compute, Pairs(Dual(VALUES, DIRECTION), 5, names=("x", "y")), {"weight": WEIGHT}, 2.0)
    square, pairs = results["a"]
    torch.testing.assert_close(square.primal, VALUES**2)
    torch.testing.assert_close(square.tangent, 2 * VALUES * DIRECTION)
    torch.testing.assert_close(pairs.first.tangent, 4 * VALUES * DIRECTION)
    assert (pairs.count, pairs.nothing, pairs.names) == (5, None, ("x", "y"))
    assert results["b"] is WEIGHT or torch.equal(results["b"], WEIGHT)
    assert not has_tangent(square.primal)


def test_a_dual_inside_of_a_part_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="duals are made by parts, not within them"):
        carry(lambda value: Dual(value, value), Dual(VALUES, DIRECTION))


@pytest.mark.parametrize("with_tangents", [False, True])
def test_what_is_run_again_keeps_its_inputs_only(with_tangents: bool) -> None:
    """Three parts in a row: the same derivatives by weights, of values and of tangents, from fewer tensors that are kept."""
    kept: dict[bool, list[tuple[torch.Tensor, ...]]] = {False: [], True: []}
    calls = []

    def part(values: torch.Tensor) -> torch.Tensor:
        calls.append(has_tangent(values))
        return torch.tanh(torch.sin(values) * weight) + values

    gradients = []
    for again in (False, True):
        weight = WEIGHT.clone().requires_grad_()
        value: Any = Dual(VALUES, DIRECTION) if with_tangents else VALUES
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, again=again: kept[again].append(tensor) or tensor,  # type: ignore[misc, func-returns-value]
            lambda tensor: tensor,
        ):
            for _ in range(3):
                value = (run_again if again else carry)(part, value)
        values, tangents = (value.primal, value.tangent) if with_tangents else (value, value)
        calls.clear()
        gradients.append(torch.autograd.grad(values.square().sum() + tangents.sum(), weight)[0])
        assert calls == [with_tangents] * 3 * again
    assert torch.equal(*gradients)
    assert len(kept[True]) < len(kept[False])


def test_a_level_is_closed_where_a_part_fails() -> None:
    def fail(_: torch.Tensor) -> None:
        raise ValueError("an error of a part")

    with pytest.raises(ValueError, match="an error of a part"):
        carry(fail, Dual(VALUES, DIRECTION))
    with forward_ad.dual_level():  # which cannot be nested
        assert has_tangent(forward_ad.make_dual(VALUES, DIRECTION))
