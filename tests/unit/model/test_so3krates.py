"""So3krates (2022) against a loop over atoms and edges as the paper writes it; its parts, its records and what it stores."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import yaml
from e3nn import o3
from structures import make_batch, make_molecule
from torch.nn.functional import silu

from so3krates_dist.config import So3kratesSection, parse_config
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph
from so3krates_dist.model.attention import HeadProjections, PairNetwork
from so3krates_dist.model.potential import ModelStatistics, Potential, compute_vectors
from so3krates_dist.model.record import AttentionRecord
from so3krates_dist.model.so3krates import (
    Interaction,
    So3krates,
    So3kratesAttention,
    SphcNorm,
    compute_spherical_envelope,
    compute_spherical_neighborhood,
)
from so3krates_dist.model.spherical import DegreeMaps

SECTION = So3kratesSection(
    num_features=12, num_layers=2, num_heads=4, num_radial_basis=6, cutoff=3.0, radial_filter_width=7, spherical_filter_width=5,
)  # fmt: skip
OPTIONS = {
    "local": SECTION,
    "non_local": dataclasses.replace(SECTION, non_local=True),
    "normalised": dataclasses.replace(SECTION, non_local=True, layer_norm=True, sphc_norm=True, sphc_cutoff=0.15),
    "degree_0": dataclasses.replace(SECTION, degrees=(0, 1, 2), initial_sphc="smooth", non_local=True, parity=False),
    "zero": dataclasses.replace(SECTION, degrees=(1, 3), initial_sphc="zero", cutoff_function="polynomial"),
}


def make_network(section: So3kratesSection) -> So3krates:
    torch.manual_seed(0)
    network = So3krates(section).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def make_stretched() -> Graph:
    """Return a molecule with atoms beyond the cutoff, some of which have similar SPHC."""
    graph = make_molecule("C6H6")
    graph.positions *= 1.3
    return graph


def evaluate(network: So3krates, *graphs: Graph, record: AttentionRecord | None = None) -> torch.Tensor:
    batch = make_batch(graphs, (network.cutoff, network.reach))
    return network(batch, compute_vectors(batch), record)["atom_energies"]


def apply_pair_network(network: PairNetwork, number: int, inputs: torch.Tensor) -> torch.Tensor:
    """Do one of the stacked networks alone: linear, silu, linear."""
    rows = slice(number * network.num_hidden, (number + 1) * network.num_hidden)
    hidden = silu(inputs @ network.hidden.weight[rows].T + network.hidden.bias[rows])
    return hidden @ network.weight[number] + network.bias[number, 0]


def project(projections: HeadProjections, which: int, head: int, features: torch.Tensor) -> torch.Tensor:
    width = projections.weight.shape[1]
    columns = slice(which * width, (which + 1) * width)
    chunk = features[head * width : (head + 1) * width]
    assert projections.bias is not None
    return chunk @ projections.weight[head][:, columns] + projections.bias[head, 0, columns]


def take_norms(variable: torch.Tensor, degrees: tuple[int, ...]) -> torch.Tensor:
    return torch.stack([part.norm() for part in variable.split([2 * d + 1 for d in degrees])])


class Loop:
    """The model of arXiv 2205.14276, atom by atom and edge by edge; nothing is shared with the implementation but weights."""

    def __init__(self, network: So3krates, section: So3kratesSection, graph: Graph) -> None:
        self.network, self.section = network, section
        self.numbers, self.positions = torch.from_numpy(graph.atomic_numbers), torch.from_numpy(graph.positions)
        self.degrees, self.num_atoms = section.degrees, graph.num_atoms

    def is_neighbor(self, i: int, j: int) -> bool:
        return i != j and bool((self.positions[i] - self.positions[j]).norm() < self.section.cutoff)

    def envelope(self, i: int, j: int) -> torch.Tensor:
        u = (self.positions[i] - self.positions[j]).norm() / self.section.cutoff
        if self.section.cutoff_function == "cosine":
            return (1 + torch.cos(math.pi * u)) / 2
        return 1 - 10 * u**3 + 15 * u**4 - 6 * u**5

    def harmonics(self, i: int, j: int) -> torch.Tensor:
        direction = torch.nn.functional.normalize(self.positions[i] - self.positions[j], dim=0)
        return o3.spherical_harmonics(list(self.degrees), direction[[1, 2, 0]], False, "integral")

    def start(self) -> torch.Tensor:
        chi = torch.zeros(self.num_atoms, sum(2 * d + 1 for d in self.degrees), dtype=torch.float64)
        for i in range(self.num_atoms):
            terms = [
                (self.envelope(i, j), self.harmonics(i, j)) for j in range(self.num_atoms) if self.is_neighbor(i, j)
            ]
            total = sum(phi for phi, _ in terms)
            if terms and self.section.initial_sphc != "zero":
                divisor = total if self.section.initial_sphc == "published" else 1 + total
                chi[i] = sum(phi * y for phi, y in terms) / divisor
        return chi

    def spherical_envelope(self, chi: torch.Tensor, i: int, j: int) -> torch.Tensor:
        others = [k for k in range(self.num_atoms) if k != i]
        shares = torch.softmax(torch.stack([(chi[i] - chi[k]).norm() for k in others]), 0)
        u = shares[others.index(j)] * (1 / self.section.sphc_cutoff if self.section.sphc_cutoff else self.num_atoms)
        return 1 - 28 * u**6 + 48 * u**7 - 21 * u**8 if u < 1 else torch.zeros_like(u)

    def attend(self, attention: So3kratesAttention, x: torch.Tensor, chi: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x_messages, chi_messages = torch.zeros_like(x), torch.zeros_like(chi)
        repeats = torch.tensor([2 * d + 1 for d in self.degrees])
        for i in range(self.num_atoms):
            for j in range(self.num_atoms):
                if i == j or not (self.section.non_local or self.is_neighbor(i, j)):
                    continue
                near = self.is_neighbor(i, j)
                phi = self.envelope(i, j) if near else torch.zeros((), dtype=torch.float64)
                distance = (self.positions[i] - self.positions[j]).norm()[None]
                radial = phi * self.network.radial_basis(distance)[0]
                lengths = take_norms(chi[i] - chi[j], self.degrees)
                filters = [
                    apply_pair_network(attention.radial_filter, k, radial)
                    + apply_pair_network(attention.spherical_filter, k, lengths)
                    for k in (0, 1)
                ]
                for head, part in enumerate(filters[0].chunk(self.section.num_heads)):
                    query, key, value = (
                        project(attention.feature_projections, k, head, x[atom]) for k, atom in enumerate((i, j, j))
                    )
                    weight = phi * (query * part * key).sum() / math.sqrt(len(part))
                    x_messages[i, head * len(part) : (head + 1) * len(part)] += weight * value
                both = phi + self.spherical_envelope(chi, i, j) if self.section.non_local else phi
                weights = []
                for head, part in enumerate(filters[1].chunk(len(self.degrees))):
                    query, key = (
                        project(attention.geometric_projections, k, head, x[atom]) for k, atom in enumerate((i, j))
                    )
                    weights.append(both * (query * part * key).sum() / math.sqrt(len(part)))
                chi_messages[i] += torch.stack(weights).repeat_interleave(repeats) * self.harmonics(i, j)
        return x_messages, chi_messages

    def mix(self, interaction: Interaction, chi: torch.Tensor) -> torch.Tensor:
        parts, mixed = chi.split([2 * d + 1 for d in self.degrees]), []
        for k, third in enumerate(self.degrees):
            total = torch.zeros(2 * third + 1, dtype=torch.float64)
            for a, first in enumerate(self.degrees):
                for b, second in enumerate(self.degrees):
                    odd = (first + second + third) % 2
                    if a < b and second - first <= third <= first + second and not (odd and self.section.parity):
                        symbols = o3.wigner_3j(first, second, third, dtype=torch.float64) * (-1) ** odd
                        product = torch.einsum("i,j,ijk->k", parts[a], parts[b], symbols)
                        total = total + interaction.self_mixing.factors[k, a, b] * product
            mixed.append(total)
        return torch.cat(mixed)

    def interact(self, interaction: Interaction, x: torch.Tensor, chi: torch.Tensor) -> tuple[torch.Tensor, ...]:
        repeats, width, count = torch.tensor([2 * d + 1 for d in self.degrees]), len(x), len(self.degrees)
        mixed = self.mix(interaction, chi)
        outputs = interaction.linear(torch.cat([x, take_norms(chi, self.degrees)]))
        a1, a2, b1, b2 = outputs.split([width, width, count, count])
        a3 = interaction.mixed_linear(take_norms(mixed, self.degrees))
        chi = chi + b1.repeat_interleave(repeats) * chi + b2.repeat_interleave(repeats) * mixed
        return (x + a1 + a2 * a3) / math.sqrt(3), chi

    def normalise(self, norm: torch.nn.Module, variable: torch.Tensor) -> torch.Tensor:
        if not isinstance(norm, SphcNorm):
            return variable
        factors = norm.weight / take_norms(variable, self.degrees)
        return factors.repeat_interleave(torch.tensor([2 * d + 1 for d in self.degrees])) * variable

    def evaluate(self) -> torch.Tensor:
        x, chi = self.network.embedding.weight[self.numbers], self.start()
        for layer in self.network.layers:
            x_messages, chi_messages = self.attend(layer.attention, x, chi)  # type: ignore[arg-type]
            x, chi = layer.attention_norm(x + x_messages), chi + chi_messages  # type: ignore[operator]
            pairs = [
                self.interact(layer.interaction, x[i], self.normalise(layer.attention_sphc_norm, chi[i]))  # type: ignore[arg-type]
                for i in range(self.num_atoms)
            ]
            x = layer.interaction_norm(torch.stack([a for a, _ in pairs]))  # type: ignore[operator]
            chi = torch.stack([self.normalise(layer.interaction_sphc_norm, b) for _, b in pairs])  # type: ignore[arg-type]
        return self.network.readout(silu(self.network.readout_hidden(x)))[:, 0]


@pytest.mark.parametrize("options", OPTIONS)
def test_equals_the_paper_edge_by_edge(options: str) -> None:
    network, graph = make_network(OPTIONS[options]), make_stretched()
    with torch.no_grad():
        values, expected = evaluate(network, graph), Loop(network, OPTIONS[options], graph).evaluate()
    assert expected.std() > 1e-2
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-12)


def test_one_of_several_pair_networks() -> None:
    torch.manual_seed(0)
    network, inputs = PairNetwork(3, 5, 4, 2), torch.randn(6, 3)
    with torch.no_grad():
        network.bias.normal_()
        together = network(inputs)
        for number in (0, 1):
            np.testing.assert_allclose(network.evaluate_one(number, inputs), together[number], atol=1e-6)


def test_projections_may_have_biases() -> None:
    projections = HeadProjections(6, 2, 3, bias=True)
    assert projections.bias is not None
    with torch.no_grad():
        projections.bias.copy_(torch.arange(18.0).view(2, 1, 9))
    query, key, value = projections(torch.zeros(1, 6), torch.float32)
    assert query.tolist() == [[0, 1, 2, 9, 10, 11]]
    assert key.tolist() == [[3, 4, 5, 12, 13, 14]]
    assert value.tolist() == [[6, 7, 8, 15, 16, 17]]
    assert HeadProjections(6, 2, 3).bias is None


def test_spherical_envelope_against_its_formula() -> None:
    u = torch.linspace(0, 1, 21, dtype=torch.float64)
    np.testing.assert_allclose(compute_spherical_envelope(u), 1 - 28 * u**6 + 48 * u**7 - 21 * u**8, atol=1e-14)
    assert compute_spherical_envelope(torch.tensor([0.0, 1.0, 1.5, 40.0])).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert float(compute_spherical_envelope(torch.tensor(1 - 1e-3))) == pytest.approx(56e-9, rel=0.01)


def test_spherical_neighborhood_keeps_close_sphc() -> None:
    """Two receivers: one with equal distances, all of which are above the average over the others and cut off, and one with a
    sender far closer than the others."""
    lengths = torch.tensor([0.7, 0.7, 0.7, 0.1, 9.0, 9.0], dtype=torch.float64)
    receivers = torch.tensor([0, 0, 0, 2, 2, 2])
    found = compute_spherical_neighborhood(lengths, receivers, torch.full((3,), 0.25, dtype=torch.float64))
    assert found[[0, 1, 2, 4, 5]].tolist() == [0.0] * 5
    assert found[3] == pytest.approx(1.0)
    shifted = compute_spherical_neighborhood(lengths + 1000, receivers, torch.full((3,), 0.6, dtype=torch.float64))
    unshifted = compute_spherical_neighborhood(lengths, receivers, torch.full((3,), 0.6, dtype=torch.float64))
    np.testing.assert_allclose(shifted, unshifted, rtol=1e-12)
    assert 0 < unshifted[4] < 0.9


def test_first_sphc() -> None:
    """A single neighbour: of full length as published whatever the distance, shorter if smooth, nothing without neighbours."""
    for initial, expected in (("published", 1.0), ("smooth", None), ("zero", 0.0)):
        network = make_network(dataclasses.replace(SECTION, initial_sphc=initial))
        graph = Graph(atomic_numbers=np.array([6, 1, 8]), positions=np.array([[0, 0, 0], [0, 0, 2.0], [0, 0, 9.0]]))
        batch = make_batch([graph], (network.cutoff, network.reach))
        pairs = network._build_pairs(batch, compute_vectors(batch))
        start, phi = network._start_sphc(3, pairs), float(pairs.envelope[0])
        factor = phi / (1 + phi) if expected is None else expected
        downwards = network.harmonics(torch.tensor([[0.0, 0.0, -1.0]], dtype=torch.float64))[0]
        np.testing.assert_allclose(start[0], factor * downwards, atol=1e-14)  # from the neighbour to the centre
        np.testing.assert_allclose(start[1], factor * network.maps.invert(downwards), atol=1e-14)
        assert torch.count_nonzero(start[2]) == 0


def test_spherical_cutoff_counts_the_atoms_of_each_structure() -> None:
    network = make_network(OPTIONS["non_local"])
    batch = make_batch([make_molecule("CO2"), make_molecule("H2")], (network.cutoff, network.reach))
    cutoffs = network._compute_sphc_cutoffs(batch, torch.float64)
    np.testing.assert_allclose(cutoffs, [1 / 3] * 3 + [1 / 2] * 2)
    fixed = make_network(OPTIONS["normalised"])._compute_sphc_cutoffs(batch, torch.float32)
    assert fixed.dtype == torch.float32
    np.testing.assert_allclose(fixed, [0.15] * 5)


def test_what_it_says_of_itself() -> None:
    local, non_local = (So3krates(OPTIONS[name]) for name in ("local", "non_local"))
    assert (local.cutoff, local.reach, local.sees) == (3.0, 3.0, {"cell"})
    assert (non_local.cutoff, non_local.reach, non_local.sees) == (3.0, math.inf, set())
    assert not local.uses_positions
    crystal = dataclasses.replace(make_molecule(), cell=9 * np.eye(3), pbc=np.ones(3, bool))
    with pytest.raises(DataError, match="be a molecule where a model looks at all pairs of atoms"):
        build_neighbors(crystal, non_local.cutoff, non_local.reach)


def test_attention_record() -> None:
    network, graph = make_network(OPTIONS["non_local"]), make_stretched()
    record = AttentionRecord()
    with torch.no_grad():
        recorded, plain = evaluate(network, graph, record=record), evaluate(network, graph)
    assert torch.equal(recorded, plain)
    kinds = [(m.layer, m.kind, m.heads) for m in record.maps]
    feature, geometric = ("head 0", "head 1", "head 2", "head 3"), ("l = 1", "l = 2", "l = 3")
    assert kinds == [
        (0, "feature", feature), (0, "geometric", geometric), (1, "feature", feature), (1, "geometric", geometric),
    ]  # fmt: skip
    n = graph.num_atoms
    for number, entry in enumerate(record.maps):
        assert entry.values.shape == (len(entry.receivers), len(entry.heads))
        edges = set(zip(entry.receivers.tolist(), entry.senders.tolist(), strict=True))
        assert len(edges) == len(entry.receivers)
        assert all((j, i) in edges for i, j in edges)
        assert (len(edges) == n * (n - 1)) == (number % 2 == 1)
    distances = np.linalg.norm(graph.positions[:, None] - graph.positions[None], axis=-1)
    far = distances[record.maps[1].receivers, record.maps[1].senders] > 3.0
    assert 0 < torch.count_nonzero(record.maps[1].values[far]) < far.sum() * 3  # some are close in SPHC, others not


@pytest.mark.parametrize("options", ["local", "normalised"])
def test_recomputing_the_layers_changes_nothing(options: str) -> None:
    """With the second backward pass that force losses need."""
    statistics = ModelStatistics(elements=(1, 6, 8), energy_baselines={}, energy_scale=1.0, mean_neighbors=1.0)
    network = make_network(OPTIONS[options])
    potential, calls, gradients = Potential(network, statistics).train(), [], []
    network.layers[1].attention.register_forward_pre_hook(lambda *_: calls.append(None))  # type: ignore[union-attr]
    for mode in ("none", "blocks"):
        network.checkpointing = mode  # type: ignore[assignment]
        outputs = potential(make_batch([make_molecule()], potential.cutoffs))
        loss = outputs["energy"].square().sum() + outputs["forces"].square().sum()
        gradients.append(torch.autograd.grad(loss, list(potential.parameters())))
    assert len(calls) > 2  # else nothing was recomputed
    for (name, _), kept, again in zip(potential.named_parameters(), *gradients, strict=True):
        np.testing.assert_allclose(again, kept, rtol=1e-10, atol=1e-12, err_msg=name)


def test_sphc_norm() -> None:
    norm = SphcNorm(DegreeMaps((1, 2))).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 3.0]))
    variable = torch.tensor([[3.0, 0, 4.0, 1e-14, 0, 0, 0, 0], [0.0] * 8], dtype=torch.float64, requires_grad=True)
    values = norm(variable)
    assert values[0].tolist() == pytest.approx([1.2, 0, 1.6, 0, 0, 0, 0, 0])  # rounding is not stretched to length 3
    assert values[1].tolist() == [0.0] * 8
    (first,) = torch.autograd.grad(values.square().sum() + values.sum(), variable, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), variable)
    assert first.abs().max() < 10
    assert torch.isfinite(second).all()


def test_state_holds_weights_only_and_the_last_layer_no_idle_norm() -> None:
    network = So3krates(OPTIONS["normalised"])
    names = sorted(network.state_dict())
    assert names == sorted(name for name, _ in network.named_parameters())
    norms = [name for name in names if "interaction_sphc_norm" in name]
    assert norms == ["layers.0.interaction_sphc_norm.weight"]


def test_initial_values() -> None:
    torch.manual_seed(0)
    network = So3krates(So3kratesSection())
    assert network.embedding.weight.shape == (119, 132)
    assert network.embedding.weight.std().item() == pytest.approx(132**-0.5, rel=0.05)
    factors = torch.cat([layer.interaction.self_mixing.factors.flatten() for layer in network.layers])  # type: ignore[operator,union-attr]
    assert factors.std().item() == pytest.approx(0.1, rel=0.2)


@pytest.mark.parametrize("name", ["so3krates", "so3krates_nonlocal"])
def test_published_configurations(name: str, pytestconfig: pytest.Config) -> None:
    text = (pytestconfig.rootpath / "configs" / "model" / f"{name}.yaml").read_text(encoding="utf-8")
    section = parse_config(yaml.safe_load(text), name).model
    assert section == So3kratesSection(non_local=name.endswith("nonlocal"))
    assert sum(p.numel() for p in So3krates(section).parameters()) == 715_435 + 19 * 132  # 119 rows, theirs 100
