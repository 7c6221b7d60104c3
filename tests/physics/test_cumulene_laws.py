"""Cumulenes longer than a local model sees: the dihedral between the ends exists for non-local attention only."""

import dataclasses

import numpy as np
import pytest
from structures import compute, make_potential

from so3krates_dist.graph import Graph
from so3krates_dist.model.potential import Potential

LOCAL: dict[str, dict[str, object]] = {
    "published": {}, "smooth": {"initial_sphc": "smooth"}, "normalised": {"layer_norm": True, "sphc_norm": True},
}  # fmt: skip
NON_LOCAL: dict[str, dict[str, object]] = {
    "published": {}, "normalised": {"layer_norm": True, "sphc_norm": True}, "degree_0": {"degrees": (0, 1, 2, 3)},
}  # fmt: skip
local = pytest.mark.parametrize("options", LOCAL)
CUTOFF = 2.2
"""Å: a carbon's neighbours are those that it is bound to"""


def make_cumulene(num_carbons: int, noise: float = 0.0) -> Graph:
    """Return H2C(=C)nCH2 along z, the hydrogens of both ends last; noise (Å) distorts it."""
    z = 1.28 * np.arange(num_carbons)
    hydrogens = [[x, 0.0, at] for at in (z[0] - 0.55, z[-1] + 0.55) for x in (0.93, -0.93)]
    positions = np.concatenate([np.stack([0 * z, 0 * z, z], 1), hydrogens])
    positions += noise * np.random.default_rng(2).standard_normal(positions.shape)
    return Graph(atomic_numbers=np.array([6] * num_carbons + [1] * 4, np.int64), positions=positions)


def turn(graph: Graph, degrees: float, atoms: slice) -> Graph:
    """Return the chain with some atoms turned about z."""
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    positions = graph.positions.copy()
    positions[atoms] = positions[atoms] @ np.array([[cosine, sine, 0], [-sine, cosine, 0], [0, 0, 1]])
    return dataclasses.replace(graph, positions=positions)


def build(options: str, non_local: bool) -> Potential:
    changes = (NON_LOCAL if non_local else LOCAL)[options]
    return make_potential("so3krates", cutoff=CUTOFF, num_layers=2, non_local=non_local, **changes)


def vary(potential: Potential, graph: Graph) -> float:
    """Return the range (eV) of the energy while the last CH2 turns."""
    angles = np.linspace(0, 180, 13)
    return float(np.ptp(compute(potential, *(turn(graph, a, slice(-2, None)) for a in angles))["energy"]))


def couple(potential: Potential, graph: Graph) -> float:
    """Return what the energies (eV) of turning both ends do not share with those of turning each: 0 if no term sees both."""
    graphs = [turn(turn(graph, a, slice(-4, -2)), b, slice(-2, None)) for a in (0, 40) for b in (0, 70)]
    energy = compute(potential, *graphs)["energy"]
    return abs(float(energy[0] - energy[1] - energy[2] + energy[3]))


@local
def test_a_local_model_is_flat_for_a_long_chain(options: str) -> None:
    """Twice two layers of 2.2 Å are 8.8 Å, the ends are 10.1 Å apart or more."""
    potential = build(options, non_local=False)
    assert vary(potential, make_cumulene(3)) > 1e-6, (
        "the short chain shows that the energy may depend on the angle at all"
    )
    assert max(vary(potential, make_cumulene(n)) for n in (8, 9, 12)) < 1e-10


@local
def test_no_term_of_a_local_model_sees_both_ends_of_a_distorted_chain(options: str) -> None:
    """Without symmetry too: a distorted chain carries the orientation of its ends as far as there are hops."""
    potential = build(options, non_local=False)
    assert couple(potential, make_cumulene(4, noise=0.1)) > 1e-9
    assert max(couple(potential, make_cumulene(n, noise=0.1)) for n in (8, 9, 12)) < 1e-10


@pytest.mark.parametrize("options", NON_LOCAL)
@pytest.mark.parametrize("num_carbons", [8, 9, 12])
def test_a_non_local_model_sees_the_dihedral(options: str, num_carbons: int) -> None:
    potential = build(options, non_local=True)
    assert vary(potential, make_cumulene(num_carbons)) > 1e-5
    assert couple(potential, make_cumulene(num_carbons, noise=0.1)) > 1e-5
