"""Gradients of a loss of forces without a second derivative by positions (`train.activation_checkpointing=low_memory`).

Forces are a derivative, so the gradient of their loss needs mixed second derivatives of the energy. The loss depends on the
weights through energies E, other outputs, and D = dE/dr, the derivative by the pair vectors. With the loss's derivatives by
these, one number has the same gradient by the weights as the loss: the sum of <dL/dE, E>, of the other outputs likewise, and of
the change of E when the pair vectors move along dL/dD. That change is a forward derivative, which is computed layer by layer beside
the energy and needs no graph but that of a single layer. Two passes, then: outputs first, without any graph for the weights, and
after the loss the surrogate. Both are exact; the laws are in tests/physics/test_checkpointing_laws.py.
"""

import torch

from so3krates_dist.graph import GraphBatch
from so3krates_dist.model.potential import DERIVATIVE_BY, Potential


class TwoPass:
    """What lies between an engine's forward and backward pass; without `low_memory` nothing does.

    Args:
        potential: The model, in training mode.
    """

    def __init__(self, potential: Potential) -> None:
        self._potential = potential
        self._pending: tuple[GraphBatch, dict[str, torch.Tensor]] | None = None

    @property
    def is_active(self) -> bool:
        """Whether the model computes in two passes."""
        return self._potential.as_network.checkpointing == "low_memory"

    def forward(self, module: torch.nn.Module, batch: GraphBatch, compute_stress: bool) -> dict[str, torch.Tensor]:
        """Return the potential's outputs, of which the loss is computed.

        Args:
            module: What the gradients are exchanged by: DeepSpeed's engine around the potential, or the potential itself. The first
                of two passes goes around it: it has no gradient by the weights, and an engine changes all gradients of its outputs.
            batch: On the device and in the dtype of the model.
            compute_stress: As for the potential.
        """
        if not self.is_active:
            outputs: dict[str, torch.Tensor] = module(batch, compute_stress=compute_stress)
            return outputs
        outputs = self._potential(batch, compute_stress=compute_stress)
        self._pending = batch, {k: v for k, v in outputs.items() if v.is_leaf and v.requires_grad}
        return {name: values for name, values in outputs.items() if not name.startswith(DERIVATIVE_BY)}

    def finish(self, module: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
        """Return what to call backward on, once: the loss itself, or a number with the same gradient by the weights.

        Args:
            module: As in `forward`.
            loss: Of the outputs of the latest `forward`, times any factor.
        """
        if not self.is_active:
            return loss
        assert self._pending is not None, "each forward pass is finished once"
        (batch, leaves), self._pending = self._pending, None
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        cotangents = {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}
        surrogate: torch.Tensor = module(batch, cotangents=cotangents)["surrogate"]
        return surrogate
