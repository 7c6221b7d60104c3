"""Sums over the reciprocal lattice: what they refuse, molecules and empty batches, and torch-pme's own calculators."""

import dataclasses
import itertools
import math
import sys

import numpy as np
import pytest
import torch
from structures import make_batch, make_crystal, make_molecule, measure

from so3krates_dist.config import So3lrSection
from so3krates_dist.errors import ConfigError, DataError
from so3krates_dist.graph import MAX_IMAGE_POINTS, check_box, check_images, collate
from so3krates_dist.model import ewald
from so3krates_dist.model.potential import compute_vectors
from so3krates_dist.units import CODATA_2014_COULOMB_EV_ANGSTROM

METHODS = ("ewald", "pme")
methods = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def torchpme():
    return pytest.importorskip("torchpme", reason="torch-pme (the extra longrange) is not installed")


def draw_charges(count: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return random charges; they do not add up to zero."""
    return torch.randn(count, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)


@methods
def test_without_torch_pme_the_extra_is_named(method, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchpme", None)
    rule = rf"^model\.electrostatics must have torch-pme for {method}; got no torch-pme\."
    message = rule + r" Install the extra: pip install 'so3krates-dist\[longrange\]'\.$"
    with pytest.raises(ConfigError, match=message):
        ewald.ReciprocalCoulomb(method, 4.0)


@pytest.mark.parametrize("pbc", list(itertools.product([False, True], repeat=3)))
def test_structures_are_periodic_everywhere_or_nowhere(pbc, torchpme):
    graph = dataclasses.replace(make_crystal(), pbc=np.array(pbc))
    batch = make_batch([make_crystal(), graph])
    module = ewald.ReciprocalCoulomb("ewald", 4.0)
    check_images(None, None, 1.0, "molecule")
    if sum(pbc) in (0, 3):
        check_images(graph.pbc, graph.cell, 1.0, "file.xyz:1")
        module(batch, draw_charges(8))
        return
    flags = " ".join("FT"[p] for p in pbc)
    rule = "must be periodic along all three lattice vectors or none for Ewald or PME"
    with pytest.raises(DataError, match=rf"^file\.xyz:1 {rule}; got pbc {flags}\. Take model\.electrostatics=cutoff"):
        check_images(graph.pbc, graph.cell, 1.0, "file.xyz:1")
    with pytest.raises(DataError, match=rf"^structure 1 of the batch {rule}; got pbc {flags}"):
        module(batch, draw_charges(8))


@pytest.mark.parametrize(("method", "limit"), [("ewald", 468), ("pme", 104)])
def test_boxes_that_do_not_fit_into_memory_are_refused(method, limit):
    """Only where images are summed; the number of points that is estimated is the one that is used."""
    section = So3lrSection(electrostatics=method)
    rules = {"sees": section.sees, "reach": section.reach, "image_density": section.image_density}
    pbc, width = np.ones(3, bool), 4 / math.sqrt(2)
    check_box(None, 999.9 * np.eye(3), "file.xyz:1", **rules)
    check_box(np.zeros(3, bool), 999.9 * np.eye(3), "file.xyz:1", **rules)
    check_box(pbc, 999.9 * np.eye(3), "file.xyz:1", **{**rules, "image_density": So3lrSection().image_density})
    check_box(pbc, np.diag([limit - 1.0] * 3), "file.xyz:1", **rules)
    rule = rf"^file\.xyz:1 must have lattice vectors of at most {limit} Å on average for this sum of images"
    with pytest.raises(DataError, match=rule + r"; got 999\.9 x 999\.9 x 999\.9 Å\. Take a smaller cell"):
        check_box(pbc, 999.9 * np.eye(3), "file.xyz:1", **rules)
    with pytest.raises(DataError, match=rule):
        check_box(pbc, np.diag([limit + 1.0] * 3), "file.xyz:1", **rules)
    sizes = {
        "ewald": 2 * math.ceil(ewald.EWALD_TRUNCATION / width * limit / (2 * math.pi)) + 1,
        "pme": ewald._round_mesh(ewald.MESH_POINTS_PER_WIDTH * limit / width),
    }
    assert sizes[method] ** 3 == pytest.approx(MAX_IMAGE_POINTS, rel=0.1)


def test_molecules_against_a_loop_over_their_pairs(torchpme):
    graphs = [make_molecule("H2O"), make_crystal(), make_molecule("CO2")]
    charges, start = draw_charges(10), 0
    energies = ewald.ReciprocalCoulomb("ewald", 3.0)(make_batch(graphs), charges).tolist()
    for graph in graphs:
        for i, j in itertools.combinations(range(graph.num_atoms), 2) if not graph.is_periodic else ():
            distance = math.dist(graph.positions[i], graph.positions[j])
            product = float(charges[start + i] * charges[start + j])
            share = CODATA_2014_COULOMB_EV_ANGSTROM * product * math.erf(distance / 3) / distance / 2
            energies[start + i] -= share
            energies[start + j] -= share
        start += graph.num_atoms
    assert np.abs(energies[:3] + energies[7:]).max() < 1e-13
    assert np.abs(energies[3:7]).min() > 1e-3


@methods
@pytest.mark.parametrize("structures", ["none", "molecule", "mixture", "cell_without_pbc"])
def test_every_batch_gives_gradients(method, structures, torchpme):
    molecule = make_molecule("H2O")
    apart = dataclasses.replace(molecule, cell=9 * np.eye(3), pbc=np.zeros(3, bool))
    graphs = {
        "none": [],
        "molecule": [molecule],
        "mixture": [molecule, make_crystal()],
        "cell_without_pbc": [apart, make_crystal()],
    }[structures]
    batch = make_batch(graphs) if graphs else collate([], torch.float64)
    charges = draw_charges(len(batch.positions)).requires_grad_(True)
    energies = ewald.ReciprocalCoulomb(method, 4.0)(batch, charges)
    points = ewald.compute_point_charge_energies(batch, compute_vectors(batch), charges, 4.0, method)
    assert energies.shape == points.shape == charges.shape
    for values in (energies, points):
        assert (values[:3] == 0).all() == (values is points or not graphs), "points: periodic structures only"
        assert (values[3:] != 0).all()
        (gradient,) = torch.autograd.grad(values.sum(), charges)
        assert torch.isfinite(gradient).all()


@methods
def test_not_a_number_is_passed_on(method, torchpme):
    """No error is raised: the engine's guard must see the same step on all ranks."""
    charges = draw_charges(4)
    charges[1] = math.nan
    assert ewald.ReciprocalCoulomb(method, 4.0)(make_batch([make_crystal()]), charges).isnan().any()


@methods
def test_nothing_is_stored_with_the_weights(method, torchpme):
    module = ewald.ReciprocalCoulomb(method, 4.0)
    assert module.state_dict() == {}
    assert list(module.buffers()) == []


@methods
def test_single_precision(method, torchpme):
    module, graphs = ewald.ReciprocalCoulomb(method, 4.0), [make_molecule("H2O"), make_crystal()]
    double = module(make_batch(graphs), draw_charges(7))
    single = module(make_batch(graphs, dtype=torch.float32), draw_charges(7, torch.float32))
    assert single.dtype == torch.float32
    assert measure(single.numpy(), double.numpy()) < 2e-6


@pytest.mark.parametrize(("method", "limit"), [("ewald", 1e-10), ("pme", 1e-5)])
@pytest.mark.parametrize("total", [0.0, 1.5])
def test_point_charges_as_torch_pme_has_them(method, total, limit, torchpme):
    """Its calculators, with more vectors or mesh points than ours; a net charge has the same background."""
    batch = make_batch([make_crystal()], (6.0,))
    vectors, charges = compute_vectors(batch), draw_charges(4)
    charges = charges - charges.mean() + total / 4
    width = 6.0 / 8
    kernel = torchpme.CoulombPotential(smearing=width, prefactor=CODATA_2014_COULOMB_EV_ANGSTROM)
    calculator = {
        "ewald": torchpme.EwaldCalculator(kernel, lr_wavelength=width / 3),
        "pme": torchpme.PMECalculator(kernel.double(), mesh_spacing=width / 8, interpolation_nodes=7),
    }[method]
    pairs = torch.stack([batch.pair_first, batch.pair_second], 1)
    cell = batch.cell[0]
    potentials = calculator(charges[:, None], cell, batch.positions, pairs, vectors.norm(dim=1))[:, 0]
    ours = ewald.compute_point_charge_energies(batch, vectors, charges, 6.0, method)
    assert charges.sum().item() == pytest.approx(total, abs=1e-12)
    assert measure(ours.numpy(), (charges * potentials).numpy()) < limit


@pytest.mark.parametrize(("least", "size"), [(1.0, 6), (6.1, 8), (7.0, 8), (11.0, 12), (13.0, 15), (97.3, 100)])
def test_meshes_have_sizes_with_fast_transforms(least, size):
    assert ewald._round_mesh(least) == size
