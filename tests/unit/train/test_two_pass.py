"""What lies between the outputs of the first pass and what is called backward on."""

from typing import Any

import pytest
import torch
from structures import make_batch, make_crystal, make_molecule, make_potential

from so3krates_dist.graph import GraphBatch
from so3krates_dist.model.potential import Potential
from so3krates_dist.model.recompute import Checkpointing
from so3krates_dist.train.two_pass import TwoPass


class Wrapped(torch.nn.Module):
    """Stands around a potential as DeepSpeed's engine does, and keeps what it was called with."""

    def __init__(self, potential: Potential) -> None:
        super().__init__()
        self.potential, self.calls = potential, list[dict[str, Any]]()

    def forward(self, batch: GraphBatch, **options: Any) -> dict[str, torch.Tensor]:
        """Return the potential's outputs."""
        self.calls.append(options)
        outputs: dict[str, torch.Tensor] = self.potential(batch, **options)
        return outputs


def make(mode: Checkpointing, options: str = "backbone") -> tuple[TwoPass, Wrapped]:
    potential = make_potential(options).train()
    potential.as_network.checkpointing = mode
    return TwoPass(potential), Wrapped(potential)


@pytest.mark.parametrize("mode", ["none", "blocks"])
def test_other_modes_pass_through(mode: Checkpointing) -> None:
    passes, module = make(mode)
    outputs = passes.forward(module, make_batch([make_crystal()]), True)
    assert set(outputs) == {"energy", "forces", "stress"}
    assert module.calls == [{"compute_stress": True}]
    loss = outputs["forces"].square().sum()
    assert passes.finish(module, loss) is loss
    assert not passes.is_active


def test_the_first_pass_goes_around_the_wrapper_and_has_no_graph_of_weights() -> None:
    """DeepSpeed's engine puts hooks on whatever it returns with a graph, and they would change the loss's derivatives."""
    passes, module = make("low_memory", "so3lr")
    assert passes.is_active
    outputs = passes.forward(module, make_batch([make_crystal()], module.potential.cutoffs), True)
    assert module.calls == []
    assert set(outputs) == {"energy", "forces", "stress", "dipole", "partial_charges", "hirshfeld_ratios"}
    assert all(values.requires_grad for values in outputs.values())
    loss = torch.stack([values.square().sum() for values in outputs.values()]).sum()
    weights = list(module.potential.parameters())
    assert all(g is None for g in torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True))
    surrogate = passes.finish(module, loss)
    assert surrogate.shape == ()
    (call,) = module.calls
    assert set(call["cotangents"]) == {*(set(outputs) - {"forces", "stress"}), "derivative_by_vectors"}
    gradients = torch.autograd.grad(surrogate, weights)
    assert sum(bool(g.count_nonzero()) for g in gradients) > len(weights) / 2


def test_evaluation_is_one_pass() -> None:
    _, module = make("low_memory")
    module.potential.eval()
    outputs = module.potential(make_batch([make_molecule()]))
    assert set(outputs) == {"energy", "forces"}
    assert not any(values.requires_grad for values in outputs.values())


def test_only_what_the_loss_depends_on_is_differentiated() -> None:
    """Without forces in the loss nothing is differentiated forward."""
    passes, module = make("low_memory", "so3lr")
    outputs = passes.forward(module, make_batch([make_molecule()], module.potential.cutoffs), False)
    passes.finish(module, outputs["dipole"].sum())
    assert set(module.calls[0]["cotangents"]) == {"dipole"}


def test_each_forward_pass_is_finished_once() -> None:
    passes, module = make("low_memory")
    with pytest.raises(AssertionError, match="each forward pass is finished once"):
        passes.finish(module, torch.zeros((), requires_grad=True))
    for _ in range(2):  # a pass whose loss was given up is forgotten
        outputs = passes.forward(module, make_batch([make_molecule()]), False)
    passes.finish(module, outputs["energy"].sum())
    with pytest.raises(AssertionError, match="each forward pass is finished once"):
        passes.finish(module, outputs["energy"].sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_surrogate_has_the_dtype_of_the_loss(dtype: torch.dtype) -> None:
    """Energies are float64 always."""
    passes, module = make("low_memory")
    module.to(dtype=dtype)
    outputs = passes.forward(module, make_batch([make_molecule()], dtype=dtype), False)
    assert outputs["energy"].dtype == torch.float64
    assert passes.finish(module, outputs["energy"].square().sum().to(dtype)).dtype == dtype
