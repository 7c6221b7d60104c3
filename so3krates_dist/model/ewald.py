"""Electrostatics without cutoff: of periodic structures by Ewald's method or particle-mesh Ewald (the extra `longrange`).

Two interactions: the damped one of SO3LR, erf(r / sigma) / r, which is a sum over reciprocal space alone (`ReciprocalCoulomb`; in
molecules over all pairs), and point charges, 1 / r, whose sharp part is summed over pairs (`compute_point_charge_energies`).
torch-pme gives the kernels and the interpolation on meshes; this file is its only importer. The sums are ours: torch-pme's raise
where a charge is nan (one rank would leave the others waiting), have no second derivative by the cell at k = 0 (PME), or go
through twice the vectors that are needed (Ewald). Energies have first and second derivatives by positions, cell and charges.
Errors relative to the largest value are tested to stay below 1e-9 (Ewald), and below 1e-6 in energies and 1e-4 in forces (PME);
tests/physics/test_ewald_laws.py. PME is not invariant to translations within these errors, its net force is not zero, its forces
jump by as much where an atom passes a point of the mesh, and its energy where a change of the cell changes the number of points;
at a fixed cell energies are continuous. Refuses structures that are periodic along one or two directions. P3M is not offered: its
second derivatives by the cell are nan.
"""

import functools
import math
from types import ModuleType
from typing import Any, Final, Literal

import torch
from torch import nn

from so3krates_dist.config.models import EWALD_TRUNCATION, MESH_POINTS_PER_WIDTH
from so3krates_dist.errors import ConfigError
from so3krates_dist.graph import GraphBatch, check_images
from so3krates_dist.model.exact import compute_exactly
from so3krates_dist.units import CODATA_2014_COULOMB_EV_ANGSTROM

Method = Literal["ewald", "pme"]

INTERPOLATION_NODES: Final = 6
"""Even: with an odd number of nodes the interpolated energy jumps where an atom changes to the next mesh point"""


class ReciprocalCoulomb(nn.Module):
    """Coulomb energy of damped charges without a cutoff: all periodic images of a crystal, all pairs of a molecule.

    erf(r / sigma) / r has the Fourier transform 4 pi / k^2 exp(-sigma^2 k^2 / 4): Ewald's long-range part for Gaussians of width
    sigma / sqrt(2) (P. P. Ewald, Ann. Phys. 369, 253 (1921), 10.1002/andp.19213690304). The energy is that sum over k != 0, less
    each charge's interaction with itself, q^2 / (sqrt(pi) sigma). A structure with a net charge is taken with a uniform
    background that makes it neutral and interacts in the same damped way; all that it does is cancel k = 0. A neutral molecule's
    energy is that of the same molecule in a growing cell.

    Args:
        method: ewald: direct sum, for up to some thousand atoms; pme: on a mesh (Darden, York and Pedersen,
            J. Chem. Phys. 98, 10089 (1993), 10.1063/1.464397; Lagrange interpolation at six points along each axis).
        damping: Å; sigma.

    Raises:
        ConfigError: torch-pme is not installed.
    """

    def __init__(self, method: Method, damping: float) -> None:
        super().__init__()
        _import_torchpme(method)
        self.method, self.damping = method, damping

    def forward(self, batch: GraphBatch, charges: torch.Tensor) -> torch.Tensor:
        """Compute each atom's share of the energy: half of every interaction.

        Args:
            batch: Structures; their positions and cells are read, their pairs are not.
            charges: (num_atoms,) e.

        Returns:
            (num_atoms,) eV.

        Raises:
            DataError: A structure is periodic along one or two directions only.
        """
        kernel = _make_kernel(self.method, self.damping / math.sqrt(2))
        images = _compute_potentials(batch, charges, self.method, kernel)
        return charges / 2 * (images + _sum_molecules(batch, charges, self.damping))


def compute_point_charge_energies(
    batch: GraphBatch, vectors: torch.Tensor, charges: torch.Tensor, cutoff: float, method: Method = "ewald"
) -> torch.Tensor:
    """Compute the Coulomb energy of point charges in periodic structures, each atom's share.

    Ewald's split at a Gaussian width of a seventh of the cutoff: erfc(r / (sqrt(2) width)) / r over pairs, the rest over k != 0,
    less the interaction of each charge with itself. With a net charge Q in the volume V there is a uniform background, which
    takes 2 pi width^2 Q / V from each potential. No model uses it yet: it is what the sums are proved with.

    Args:
        batch: Structures with all their pairs up to the cutoff.
        vectors: (num_pairs, 3) Å.
        charges: (num_atoms,) e.
        cutoff: Å, of the sum over pairs; the result does not depend on it.
        method: How the rest is summed.

    Returns:
        (num_atoms,) eV; zero for atoms of molecules.

    Raises:
        ConfigError: torch-pme is not installed.
        DataError: A structure is periodic along one or two directions only.
    """
    width = cutoff / EWALD_TRUNCATION
    kernel = _make_kernel(method, width)
    potentials = _compute_potentials(batch, charges, method, kernel)
    if batch.cell is None or batch.pbc is None:
        return charges / 2 * potentials
    volumes, periodic = torch.linalg.det(batch.cell).abs(), batch.pbc.all(1)
    totals = charges.new_zeros(batch.num_graphs).index_add(0, batch.graph_index, charges)
    background = 2 * kernel.background_correction() * totals / torch.where(periodic, volumes, 1.0)
    potentials = potentials - torch.where(periodic, background, 0.0)[batch.graph_index]
    distances = torch.linalg.vector_norm(vectors, dim=-1)
    sharp = CODATA_2014_COULOMB_EV_ANGSTROM * torch.erfc(distances / (math.sqrt(2) * width)) / distances
    sharp = torch.where((distances < cutoff) & periodic[batch.graph_index[batch.pair_first]], sharp, 0.0)
    potentials = potentials.index_add(0, batch.pair_first, sharp * charges[batch.pair_second])
    return charges / 2 * potentials.index_add(0, batch.pair_second, sharp * charges[batch.pair_first])


def _import_torchpme(method: str) -> ModuleType:
    try:
        import torchpme
    except ImportError as error:
        remedy = "Install the extra: pip install 'so3krates-dist[longrange]'"
        raise ConfigError("model.electrostatics", f"have torch-pme for {method}", "no torch-pme", remedy) from error
    module: ModuleType = torchpme
    return module


def _make_kernel(method: Method, width: float) -> Any:
    """Return Ewald's long-range part for a Gaussian width in Å; not kept, for it would be stored with the weights."""
    return _import_torchpme(method).CoulombPotential(smearing=width, prefactor=CODATA_2014_COULOMB_EV_ANGSTROM)


def _compute_potentials(batch: GraphBatch, charges: torch.Tensor, method: Method, kernel: Any) -> torch.Tensor:
    """Return (num_atoms,) V: the long-range potential of all other charges and images at each atom, zero in molecules."""
    # Times zero: the charges have a gradient, if a vanishing one, on a rank that has molecules only.
    if batch.cell is None or batch.pbc is None:
        return 0.0 * charges
    counts = batch.num_atoms.tolist()
    width = float(kernel.smearing)
    sum_images = functools.partial(_sum_ewald if method == "ewald" else _sum_mesh, kernel=kernel, width=width)
    potentials = []
    structures = zip(torch.split(batch.positions, counts), torch.split(charges, counts), strict=True)
    for graph, ((positions, values), pbc) in enumerate(zip(structures, batch.pbc.cpu().numpy(), strict=True)):
        check_images(pbc, None, 0.0, f"structure {graph} of the batch")
        if pbc.any():
            cell = batch.cell[graph]
            total = compute_exactly(sum_images, positions, cell, values) / torch.linalg.det(cell).abs()
            potentials.append(total - kernel.self_contribution() * values)
        else:
            potentials.append(0.0 * values)
    return torch.cat(potentials)


def _sum_molecules(batch: GraphBatch, charges: torch.Tensor, damping: float) -> torch.Tensor:
    """Return (num_atoms,) V: the sum of erf(r / sigma) q_j / r over all other atoms of each molecule, zero in crystals."""
    counts = batch.num_atoms if batch.pbc is None else torch.where(batch.pbc.any(1), 0, batch.num_atoms)
    counts = counts[batch.graph_index]  # rows of each atom
    first = torch.repeat_interleave(counts)
    starts = (batch.num_atoms.cumsum(0) - batch.num_atoms)[batch.graph_index]
    second = torch.arange(len(first), device=first.device) - (counts.cumsum(0) - counts - starts)[first]
    # Each pair once; atoms do not interact with themselves, whose distance has no derivative.
    once = first < second
    first, second = first[once], second[once]
    distances = torch.linalg.vector_norm(batch.positions[second] - batch.positions[first], dim=1)
    values = CODATA_2014_COULOMB_EV_ANGSTROM * torch.erf(distances / damping) / distances
    potentials = torch.zeros_like(charges).index_add(0, first, values * charges[second])
    return potentials.index_add(0, second, values * charges[first])


def _sum_ewald(
    positions: torch.Tensor, cell: torch.Tensor, charges: torch.Tensor, kernel: Any, width: float
) -> torch.Tensor:
    """Return (num_atoms,) the sum over k != 0 of kernel(k) cos(k (r_i - r_j)) q_j, k up to `EWALD_TRUNCATION` over the width."""
    limit = EWALD_TRUNCATION / width
    lengths = torch.linalg.vector_norm(cell.detach(), dim=1).tolist()
    ranges = [torch.arange(-n, n + 1) for n in (math.ceil(limit * length / (2 * math.pi)) for length in lengths)]
    grid = torch.cartesian_prod(*ranges).to(cell)
    # In this order -k stands opposite to k, and both add the same: the half behind the middle, k = 0, is enough.
    grid = grid[len(grid) // 2 + 1 :]
    reciprocal = 2 * math.pi * torch.linalg.inv(cell).T
    grid = grid[(grid @ reciprocal.detach()).square().sum(1) <= limit**2]
    vectors = grid @ reciprocal
    weights = 2 * kernel.lr_from_k_sq(vectors.square().sum(1))
    phases = vectors @ positions.T
    cosines, sines = torch.cos(phases), torch.sin(phases)
    potentials: torch.Tensor = (weights * (cosines @ charges)) @ cosines + (weights * (sines @ charges)) @ sines
    return potentials


def _sum_mesh(
    positions: torch.Tensor, cell: torch.Tensor, charges: torch.Tensor, kernel: Any, width: float
) -> torch.Tensor:
    """Return what `_sum_ewald` returns, from charges that are spread on a mesh."""
    from torchpme.lib import MeshInterpolator, generate_kvectors_for_mesh

    lengths = torch.linalg.vector_norm(cell.detach(), dim=1).tolist()
    sizes = [_round_mesh(MESH_POINTS_PER_WIDTH * length / width) for length in lengths]
    shape = torch.tensor(sizes, device=cell.device)
    mesh = MeshInterpolator(cell, shape, INTERPOLATION_NODES, method="Lagrange")
    mesh.compute_weights(positions)
    density = mesh.points_to_mesh(charges[:, None])
    squares = generate_kvectors_for_mesh(cell=cell, ns=shape).square().sum(-1)
    transformed = torch.fft.rfftn(density, dim=(1, 2, 3)) * kernel.lr_from_k_sq(squares)
    values: torch.Tensor = torch.fft.irfftn(transformed, dim=(1, 2, 3), s=sizes, norm="forward")
    potentials: torch.Tensor = mesh.mesh_to_points(values)[:, 0]
    return potentials


def _round_mesh(least: float) -> int:
    """Return the next integer whose only factors are 2, 3 and 5, for which Fourier transforms are fast."""
    size = max(math.ceil(least), INTERPOLATION_NODES)
    while True:
        rest = size
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return size
        size += 1
