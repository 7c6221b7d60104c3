"""Laws of the loss in float64 with real models: each kind by its formula, any split, weights of conformers and of steps."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from analytic import make_morse
from structures import make_crystal, make_ion, make_molecule, make_potential

from so3krates_dist.config import LOSS_WEIGHTS, TrainSection
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.graph import ATOMIC_MASSES, Graph, GraphBatch, collate
from so3krates_dist.model.potential import Potential
from so3krates_dist.train.losses import (
    LABELS,
    compute_huber,
    compute_lengths,
    compute_loss,
    compute_weights,
    count_labels,
)

SCALE = 1.7
ALL = {
    "energy_weight": 0.7, "forces_weight": 1.3, "stress_weight": 20.0, "dipole_weight": 0.4, "charges_weight": 2.0,
    "hirshfeld_weight": 0.9,
}  # fmt: skip
KINDS = {
    "mse": TrainSection(**ALL),
    "huber": TrainSection(**ALL, energy_loss="huber", forces_loss="huber", huber_delta=0.4),
    "mae, l2": TrainSection(**ALL, energy_loss="mae", forces_loss="l2"),
}
SHAPES = {"energy": (), "forces": (3,), "stress": (3, 3), "dipole": (3,), "partial_charges": (), "hirshfeld_ratios": ()}
PER_ATOM = ("forces", "partial_charges", "hirshfeld_ratios")


def make_graphs(*, weighted: bool = True) -> list[Graph]:
    """Return molecules, ions and crystals with random labels, of which some are missing, and weights."""
    rng = np.random.default_rng(3)
    graphs = [make_molecule("CH3OH", 1), make_ion(1.0), make_crystal(), make_molecule("H2O", 2), make_ion(-1.0),
              make_crystal("self_images"), make_molecule("NH3", 3)]  # fmt: skip
    for number, graph in enumerate(graphs):
        for place, (label, shape) in enumerate(SHAPES.items()):
            value = rng.normal(size=(graph.num_atoms, *shape) if label in PER_ATOM else shape)
            is_there = graph.is_periodic if label == "stress" else (number + place) % 4 > 0
            if is_there and not (label == "dipole" and graph.is_periodic):
                setattr(graph, label, float(value) if label == "energy" else value)
        graph.loss_weight = (0.3, 1.0, 2.5)[number % 3] if weighted else 1.0
    return graphs


def make_batch(graphs: Sequence[Graph], cutoffs: tuple[float, float] = (4.0, 10.0)) -> GraphBatch:
    return collate([build_neighbors(g, *cutoffs) for g in graphs], torch.float64)


def predict(batch: GraphBatch, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random outputs of all kinds that can be differentiated."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {label: len(batch.atomic_numbers) if label in PER_ATOM else batch.num_graphs for label in SHAPES}
    return {
        label: torch.randn(sizes[label], *shape, dtype=torch.float64, generator=generator).requires_grad_(True)
        for label, shape in SHAPES.items()
    }


def compute(
    outputs: dict[str, torch.Tensor], batch: GraphBatch, section: TrainSection, counts: Sequence[float] = ()
) -> torch.Tensor:
    weights = compute_weights(0, section)
    return compute_loss(outputs, batch, counts or count_labels(batch), section, weights, SCALE)[0]


@pytest.fixture(scope="module")
def potential() -> Potential:
    """SO3LR, which has every output."""
    return make_potential("so3lr").train()


def find_gradients(
    potential: Potential, portions: Sequence[Sequence[Graph]], section: TrainSection
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss of a global batch and its gradient by the weights, added up over portions."""
    potential.zero_grad()
    batches = [make_batch(portion, potential.cutoffs) for portion in portions]
    counts = np.sum([count_labels(batch) for batch in batches], axis=0).tolist()
    total = 0.0
    for batch in batches:
        loss = compute(potential(batch, compute_stress=True), batch, section, counts)
        loss.backward()
        total += float(loss.detach())
    return total, {n: p.grad.clone() for n, p in potential.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------------------------------ splits


@pytest.mark.parametrize("kind", KINDS)
def test_any_split_gives_the_same_loss_and_gradient(potential: Potential, kind: str) -> None:
    graphs = make_graphs()
    loss, gradients = find_gradients(potential, [graphs], KINDS[kind])
    rng = np.random.default_rng(0)
    worst = 0.0
    for count in (1, 2, 3, 4, 5):
        owners = rng.integers(0, max(1, count - 1), len(graphs))  # the last portion is empty
        portions = [[g for g, owner in zip(graphs, owners, strict=True) if owner == k] for k in range(count)]
        assert count == 1 or not portions[-1]
        part, parts = find_gradients(potential, portions, KINDS[kind])
        assert part == pytest.approx(loss, rel=1e-12)
        assert parts.keys() == gradients.keys()
        for name, whole in gradients.items():
            worst = max(worst, float((parts[name] - whole).abs().max() / whole.abs().max().clamp(min=1e-3)))
    assert worst < 1e-12, worst


@pytest.mark.parametrize("name", ["so3lr", "backbone", "so3krates", "geomatt", "geomatt_envelope"])
def test_an_empty_batch_reaches_the_same_weights_with_a_gradient_of_zero(name: str) -> None:
    """Processes exchange gradients of those weights that have one."""
    model = make_potential(name).train()
    labels = LABELS if name == "so3lr" else ("energy", "forces")
    section = TrainSection(**{LOSS_WEIGHTS[label]: 1.0 for label in labels})
    molecules = [g for g in make_graphs() if not g.is_periodic]
    _, whole = find_gradients(model, [molecules], section)
    loss, nothing = find_gradients(model, [[]], section)
    assert loss == 0.0
    assert whole.keys() == nothing.keys()
    assert not any(gradient.any() for gradient in nothing.values())


def test_stress_of_a_batch_of_molecules_takes_part(potential: Potential) -> None:
    """It is nan there, and depends on no weight."""
    section = TrainSection(energy_weight=0.0, forces_weight=0.0, stress_weight=1.0)
    graphs = make_graphs()
    _, whole = find_gradients(potential, [[g for g in graphs if g.is_periodic]], section)
    loss, nothing = find_gradients(potential, [[g for g in graphs if not g.is_periodic]], section)
    assert loss == 0.0
    assert whole.keys() == nothing.keys()
    assert not any(gradient.any() for gradient in nothing.values())


# ---------------------------------------------------------------------------------------------------------------- formulas


def measure(error: np.ndarray, kind: str, delta: float) -> float:
    """Return the sum over the errors of a conformer, written plainly."""
    if kind == "l2":
        return sum(3 * math.sqrt(x * x + y * y + z * z) for x, y, z in error)
    single = {
        "mse": lambda e: e * e,
        "mae": abs,
        "huber": lambda e: e * e if abs(e) <= delta else 2 * delta * abs(e) - delta**2,
    }[kind]
    return sum(single(e) for e in np.ravel(error))


@pytest.mark.parametrize("kind", KINDS)
def test_the_formula(kind: str) -> None:
    section, graphs = KINDS[kind], make_graphs()
    batch = make_batch(graphs)
    outputs = predict(batch)
    first = np.cumsum([0, *(g.num_atoms for g in graphs)])
    sums, counts = dict.fromkeys(LABELS, 0.0), dict.fromkeys(LABELS, 0)
    for number, graph in enumerate(graphs):
        atoms = slice(first[number], first[number + 1])
        for label in LABELS:
            target = getattr(graph, label)
            if target is None:
                continue
            found = outputs[label].detach().numpy()[atoms if label in PER_ATOM else number]
            if label == "dipole":
                masses = np.array(ATOMIC_MASSES)[graph.atomic_numbers]
                found = found - graph.total_charge * (masses @ graph.positions / masses.sum())
            error = np.asarray(found - target) / {"energy": graph.num_atoms * SCALE, "forces": SCALE}.get(label, 1.0)
            name = {"energy": section.energy_loss, "forces": section.forces_loss}.get(label, "mse")
            sums[label] += graph.loss_weight * measure(error, name, section.huber_delta)
            counts[label] += error.size
    expected = sum(getattr(section, LOSS_WEIGHTS[label]) * sums[label] / counts[label] for label in LABELS)
    assert count_labels(batch) == list(counts.values())
    assert float(compute(outputs, batch, section).detach()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_its_gradient_is_that_of_finite_differences(kind: str) -> None:
    batch = make_batch(make_graphs())
    outputs = predict(batch)

    def find(*values: torch.Tensor) -> torch.Tensor:
        return compute(dict(zip(outputs, values, strict=True)), batch, KINDS[kind])

    assert torch.autograd.gradcheck(find, tuple(outputs.values()), eps=1e-6, atol=1e-8, rtol=1e-6)


# ------------------------------------------------------------------------------------------------------------------- kinds


class TestHuber:
    @pytest.mark.parametrize("delta", [0.01, 1.0, 30.0])
    @pytest.mark.parametrize("sign", [-1.0, 1.0])
    def test_value_and_slope_are_continuous(self, delta: float, sign: float) -> None:
        around = sign * delta * torch.tensor([1 - 1e-9, 1.0, 1 + 1e-9], dtype=torch.float64)
        errors = around.requires_grad_(True)
        values = compute_huber(errors, delta)
        (slopes,) = torch.autograd.grad(values.sum(), errors)
        torch.testing.assert_close(values.detach(), torch.full_like(values, delta**2), rtol=3e-9, atol=0)
        torch.testing.assert_close(slopes, torch.full_like(slopes, 2 * sign * delta), rtol=3e-9, atol=0)

    def test_beyond_it_is_a_straight_line(self) -> None:
        errors = torch.tensor([-7.0, 3.0, 1e20, -math.inf], dtype=torch.float64).requires_grad_(True)
        values = compute_huber(errors, 0.5)
        assert values.tolist() == [6.75, 2.75, 1e20, math.inf]
        (slopes,) = torch.autograd.grad(values[:3].sum(), errors)
        assert slopes[:3].tolist() == [-1.0, 1.0, 1.0]

    def test_a_large_delta_is_the_square_to_the_last_bit(self) -> None:
        batch = make_batch(make_graphs())
        losses = [
            compute(predict(batch), batch, dataclasses.replace(KINDS[kind], huber_delta=1e6))
            for kind in ("huber", "mse")
        ]
        assert torch.equal(*losses)


class TestLengths:
    def test_it_is_the_length(self) -> None:
        vectors = torch.randn(50, 3, dtype=torch.float64)
        torch.testing.assert_close(compute_lengths(vectors), vectors.norm(dim=-1))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_first_and_second_derivative_at_zero_are_zero(self, dtype: torch.dtype) -> None:
        vectors = torch.zeros(4, 3, dtype=dtype)
        vectors[1, 0], vectors[2, 1] = 3.0, 1e-30  # the last has a square that is zero in float32
        vectors.requires_grad_(True)
        lengths = compute_lengths(vectors)
        (first,) = torch.autograd.grad(lengths.sum(), vectors, create_graph=True)
        (second,) = torch.autograd.grad((first * torch.ones_like(first)).sum(), vectors)
        assert lengths[0] == 0
        assert first[1].tolist() == [1.0, 0.0, 0.0]
        for derivative in (first, second):
            assert torch.isfinite(derivative).all()
            assert not derivative[[0, 3]].any()

    def test_forward_mode_at_zero_is_zero(self) -> None:
        """`low_memory` differentiates forwards."""
        zeros = torch.zeros(2, 3, dtype=torch.float64)
        _, slope = torch.func.jvp(compute_lengths, (zeros,), (torch.ones_like(zeros),))
        assert slope.tolist() == [0.0, 0.0]

    def test_a_model_that_is_right_stays_where_it_is(self) -> None:
        """The second derivative of its energy is on the way to the weights."""
        model = make_morse().double().train().requires_grad_(True)
        graph = make_molecule("CH3OH")
        graph.atomic_numbers = np.full_like(graph.atomic_numbers, 10)
        graph.positions = 2.5 * graph.positions
        batch = make_batch([graph], model.cutoffs)
        batch.forces = model(batch)["forces"].detach()
        compute(model(batch), batch, TrainSection(energy_weight=0.0, forces_loss="l2")).backward()
        assert batch.forces.abs().max() > 0.01
        assert [float(p.grad) for p in model.parameters() if p.grad is not None] == [0.0] * 3


# ------------------------------------------------------------------------------------------------------------------ labels


@pytest.mark.parametrize("kind", KINDS)
def test_single_missing_components_count_nothing_and_pull_nowhere(kind: str) -> None:
    batch = make_batch([g for g in make_graphs() if g.is_periodic or g.total_charge == 0])
    for label in LABELS:
        target = getattr(batch, label)
        target.reshape(-1)[target.isfinite().reshape(-1).nonzero()[0]] = math.nan
    outputs = predict(batch)
    compute(outputs, batch, KINDS[kind]).backward()
    for label in LABELS:
        missing = getattr(batch, label).isnan()
        gradient = outputs[label].grad
        assert gradient is not None
        assert missing.any()
        assert not missing.all()
        assert torch.equal(gradient == 0, missing), label


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_label_stays_an_error(kind: str, label: str, value: float) -> None:
    batch = make_batch(make_graphs())
    target = getattr(batch, label)
    target.reshape(-1)[target.isfinite().reshape(-1).nonzero()[0]] = value
    assert not math.isfinite(compute(predict(batch), batch, KINDS[kind]).detach())


@pytest.mark.parametrize("label", LABELS)
def test_a_label_without_weight_is_not_touched(label: str) -> None:
    section = TrainSection(**{**ALL, LOSS_WEIGHTS[label]: 0.0})
    batch = make_batch(make_graphs())
    outputs = predict(batch)
    getattr(batch, label).fill_(math.inf)
    if label != "forces":  # their shape and type are always looked at
        outputs[label] = torch.full_like(outputs[label], math.nan)
    assert math.isfinite(compute(outputs, batch, section).detach())


# ----------------------------------------------------------------------------------------------------------------- weights


class TestWeightsOfConformers:
    def test_the_loss_is_linear_in_them(self) -> None:
        batch = make_batch(make_graphs())
        weights = torch.linspace(0.0, 3.0, batch.num_graphs, dtype=torch.float64)
        singles = []
        for unit in torch.eye(batch.num_graphs, dtype=torch.float64):
            single = dataclasses.replace(batch, loss_weight=unit)
            singles.append(float(compute(predict(batch), single, KINDS["mae, l2"]).detach()))
        whole = compute(predict(batch), dataclasses.replace(batch, loss_weight=weights), KINDS["mae, l2"])
        assert float(whole.detach()) == pytest.approx(float(weights @ weights.new_tensor(singles)), rel=1e-12)

    def test_ones_are_none_to_the_last_bit(self) -> None:
        batch = make_batch(make_graphs(weighted=False))
        assert batch.loss_weight is None
        ones = dataclasses.replace(batch, loss_weight=torch.ones(batch.num_graphs, dtype=torch.float64))
        for section in KINDS.values():
            assert torch.equal(compute(predict(batch), batch, section), compute(predict(batch), ones, section))

    def test_they_leave_reported_errors_and_labels_alone(self) -> None:
        section = KINDS["huber"]
        found = []
        for weighted in (False, True):
            batch = make_batch(make_graphs(weighted=weighted))
            counts = count_labels(batch)
            weights = compute_weights(0, section)
            found.append((counts, compute_loss(predict(batch), batch, counts, section, weights, SCALE)[1].tolist()))
        assert found[0] == found[1]


class TestWeightsThatMove:
    SECTION = TrainSection(
        energy_weight=0.0, forces_weight=4.0, stress_weight=3.0, weights_from=100, weights_until=200, final_energy_weight=1.0,
        final_forces_weight=0.1,
    )  # fmt: skip

    def test_they_go_in_a_straight_line(self) -> None:
        found = {step: compute_weights(step, self.SECTION) for step in (0, 99, 100, 125, 150, 199, 200, 10**6)}
        assert [w["energy"] for w in found.values()] == pytest.approx([0, 0, 0, 0.25, 0.5, 0.99, 1, 1], rel=1e-12)
        assert [w["forces"] for w in found.values()] == pytest.approx(
            [4, 4, 4, 3.025, 2.05, 0.139, 0.1, 0.1], rel=1e-12
        )
        assert {w["stress"] for w in found.values()} == {3.0}
        assert found[0]["forces"] == 4.0
        assert found[200]["forces"] == 0.1
        assert all(set(w) == {"energy", "forces", "stress"} for w in found.values())

    def test_without_them_they_never_move(self) -> None:
        section = KINDS["mse"]
        for step in (0, 1, 10**9):
            assert compute_weights(step, section) == {n: ALL[LOSS_WEIGHTS[n]] for n in LABELS}

    def test_a_weight_of_zero_for_now_has_a_gradient_of_zero(self) -> None:
        batch = make_batch(make_graphs())
        outputs = predict(batch)
        compute(outputs, batch, self.SECTION).backward()
        gradient = outputs["energy"].grad
        assert gradient is not None
        assert not gradient.any()
        assert outputs["dipole"].grad is None
