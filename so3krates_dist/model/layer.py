"""What networks with attention have in common, and what their layers are made of besides attention.

Sources: Euclidean transformer (arXiv 2309.15126), SO3LR (10.1021/jacs.5c09558).
"""

import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn
from torch.nn.functional import silu

from so3krates_dist.config import EuclideanTransformerSection, So3kratesSection, So3lrSection
from so3krates_dist.model.radial import CUTOFF_FUNCTIONS, build_radial_basis
from so3krates_dist.model.recompute import Checkpointing, carry, has_tangent, run_again
from so3krates_dist.model.record import AttentionRecord
from so3krates_dist.model.spherical import DegreeMaps, SphericalHarmonics

LAYER_NORM_EPSILON: Final = 1e-6
"""the papers' value; torch's default 1e-5 moves forces of the published SO3LR by up to 1.1 meV/Å"""

_TRUNCATED_STD: Final = 0.87962566103423978
"""standard deviation of a normal distribution cut at two standard deviations"""


def initialize_lecun(weight: torch.Tensor, fan_in: int) -> None:
    """Fill with a normal distribution cut at two standard deviations, of variance 1 / fan_in."""
    with torch.no_grad():
        nn.init.trunc_normal_(weight, std=1.0, a=-2.0, b=2.0).mul_(1 / (_TRUNCATED_STD * math.sqrt(fan_in)))


class Linear(nn.Linear):
    """An affine map with the papers' initial values: truncated normal weights of variance 1/fan_in, zero bias."""

    def reset_parameters(self) -> None:
        """Draw initial values."""
        initialize_lecun(self.weight, self.in_features)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class LayerNorm(nn.LayerNorm):
    """Torch's, except that inputs with a forward derivative are normalised by simple operations.

    Of torch's own operation (2.13) the forward derivative is right, but the derivative of that by input and weights is not.
    """

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map (num_atoms, F) to the same shape."""
        if not has_tangent(inputs):
            return super().forward(inputs)
        deviations = inputs - inputs.mean(-1, keepdim=True)
        variances = (deviations * deviations).mean(-1, keepdim=True)
        return deviations * (variances + self.eps).rsqrt() * self.weight + self.bias


def build_layer_norm(num_features: int, enabled: bool) -> nn.Module:
    """Return a LayerNorm with the papers' epsilon, or nothing."""
    return LayerNorm(num_features, eps=LAYER_NORM_EPSILON) if enabled else nn.Identity()


class GatedResidual(nn.Module):
    """x <- silu(v + silu(silu(v) W1) W2) W3 with v = x, bias-free and not itself residual (Euclidean transformer)."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.inner_first = Linear(num_features, num_features, bias=False)
        self.inner_second = Linear(num_features, num_features, bias=False)
        self.outer = Linear(num_features, num_features, bias=False)

    def forward(self, inv_features: torch.Tensor) -> torch.Tensor:
        """Map (num_atoms, num_features) to the same shape."""
        inner = self.inner_second(silu(self.inner_first(silu(inv_features))))
        updated: torch.Tensor = self.outer(silu(inv_features + inner))
        return updated


class PreactivationResidual(nn.Module):
    """x <- x + W2 silu(W1 silu(x)), with biases (SO3LR)."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.first = Linear(num_features, num_features)
        self.second = Linear(num_features, num_features)

    def forward(self, inv_features: torch.Tensor) -> torch.Tensor:
        """Map (num_atoms, num_features) to the same shape."""
        change: torch.Tensor = self.second(silu(self.first(silu(inv_features))))
        return inv_features + change


RESIDUAL_MLPS: Final[dict[str, tuple[Callable[[int], nn.Module], Callable[[int], nn.Module]]]] = {
    # name: (after attention, after exchange)
    "none": (lambda _: nn.Identity(), lambda _: nn.Identity()),
    "gated": (GatedResidual, GatedResidual),
    "preactivation": (PreactivationResidual, lambda _: nn.Identity()),
}


class Exchange(nn.Module):
    """Lets invariant features and Euclidean variables of one atom see each other.

    [a, b] = W [x, I(chi)] + c; x <- x + a; chi_l <- chi_l + b_l chi_l (arXiv 2309.15126).

    Args:
        num_features: F.
        maps: Tables of the degrees.
    """

    def __init__(self, num_features: int, maps: DegreeMaps) -> None:
        super().__init__()
        self.num_features = num_features
        self.maps = maps
        width = num_features + maps.contraction.shape[1]
        self.linear = Linear(width, width)

    def forward(self, normed: torch.Tensor, ev_features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the changes of both.

        Args:
            normed: (num_atoms, F) invariant features, normalised where the model does so first.
            ev_features: (num_atoms, ev_dim) Euclidean variables.

        Returns:
            (num_atoms, F) and (num_atoms, ev_dim), to be added to x and chi.
        """
        mixed = self.linear(torch.cat([normed, self.maps.compute_invariants(ev_features)], dim=-1))
        change, factors = mixed.split([self.num_features, mixed.shape[-1] - self.num_features], dim=-1)
        return change, self.maps.repeat(factors) * ev_features


class AttentionNetwork(nn.Module):
    """What So3krates and the Euclidean transformer have in common: geometry of the pairs, element table, layer after layer.

    Args:
        section: Sizes and options.
        num_embeddings: Rows of the element table.
    """

    uses_positions = False
    """whether energies depend on positions and cell other than through the pair vectors"""
    layers: nn.ModuleList

    def __init__(
        self, section: So3kratesSection | EuclideanTransformerSection | So3lrSection, num_embeddings: int
    ) -> None:
        super().__init__()
        self.cutoff, self.reach, self.sees = section.cutoff, section.reach, section.sees
        self.checkpointing: Checkpointing = "none"
        self.compute_envelope = CUTOFF_FUNCTIONS[section.cutoff_function]
        self.radial_basis = build_radial_basis(section.radial_basis, section.num_radial_basis, section.cutoff)
        self.harmonics = SphericalHarmonics(section.degrees)
        self.maps = DegreeMaps(section.degrees)
        self.embedding = nn.Embedding(num_embeddings, section.num_features)
        nn.init.normal_(self.embedding.weight, std=section.num_features**-0.5)

    def run_layers(
        self, inv_features: torch.Tensor, ev_features: torch.Tensor | None, pairs: Any, record: AttentionRecord | None
    ) -> torch.Tensor:
        """Return the last features (num_atoms, F).

        Args:
            inv_features: (num_atoms, F) first features.
            ev_features: (num_atoms, ev_dim) first Euclidean variables; None stands for zero where the layers take that.
            pairs: Geometry of the pairs, as the layers take it.
            record: Keeps the attention coefficients.
        """
        for number, layer in enumerate(self.layers):
            if record is None:
                inv_features, ev_features = self.run(layer, inv_features, ev_features, pairs)
            else:
                record.layer = number
                inv_features, ev_features = layer(inv_features, ev_features, pairs, record)
        return inv_features

    def run(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Return what a part of the network returns, which is computed again in the backward pass where that is asked for.

        Args:
            function: As for `run_again`.
            inputs: Likewise.
        """
        again = self.checkpointing != "none" and torch.is_grad_enabled()
        return run_again(function, *inputs) if again else carry(function, *inputs)
