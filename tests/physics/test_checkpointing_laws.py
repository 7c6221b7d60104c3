"""Laws of recomputation: what is computed again, or by a forward derivative, gives the same outputs and the same gradients."""

import copy
import dataclasses
import gc
from collections import Counter
from typing import Any

import ase
import numpy as np
import pytest
import torch
from live_bytes import LiveBytes
from structures import (
    OPTIONS,
    PERIODIC,
    SO3KRATES,
    check_deviations,
    compare,
    compute,
    from_atoms,
    join,
    make_batch,
    make_crystal,
    make_ion,
    make_molecule,
    make_potential,
)

from so3krates_dist.config import LOSS_WEIGHTS, TrainSection
from so3krates_dist.graph import Graph, GraphBatch
from so3krates_dist.model.potential import Potential
from so3krates_dist.model.recompute import Checkpointing
from so3krates_dist.train.losses import compute_loss, compute_weights, count_labels
from so3krates_dist.train.two_pass import TwoPass

MODES: dict[str, tuple[Checkpointing, ...]] = {
    name: ("blocks",) if section.low_memory_obstacle else ("blocks", "low_memory") for name, section in OPTIONS.items()
}
"""What each model can be trained with"""

options = pytest.mark.parametrize("options", OPTIONS)
options_and_modes = pytest.mark.parametrize(("options", "mode"), [(o, m) for o, modes in MODES.items() for m in modes])

# Charges are made to add up, so one number on top of all of them changes nothing, and its gradient is rounding.
WITHOUT_EFFECT = "network.charge_head.output.bias"


def make_graphs(options: str) -> list[Graph]:
    """Return molecules, an ion, one atom far from a molecule and one alone, and crystals; labelled, but not all of them."""
    atom = from_atoms(ase.Atoms("O"))
    far = dataclasses.replace(atom, positions=np.array([[0.0, 30.0, 0.0]]))
    graphs = [make_molecule(), make_ion(-1.0), make_molecule("CO2", 1), join(make_molecule("CH4", 2), far), atom]
    if options in PERIODIC:
        graphs += [make_crystal(), make_crystal("self_images")]
    rng = np.random.default_rng(3)
    for graph in graphs:
        graph.energy, graph.forces = rng.normal(), rng.normal(size=(graph.num_atoms, 3))
        graph.dipole, graph.partial_charges = rng.normal(size=3), rng.normal(size=graph.num_atoms)
        graph.hirshfeld_ratios = rng.normal(size=graph.num_atoms)
        graph.stress = rng.normal(size=(3, 3)) if graph.is_periodic else None
    graphs[0].energy = graphs[1].dipole = graphs[2].forces = None
    return graphs


def make_section(options: str, **changes: Any) -> TrainSection:
    """Return a loss of all outputs that the model has."""
    labels = {"energy", "forces", *OPTIONS[options].outputs} | ({"stress"} if options in PERIODIC else set())
    weights: dict[str, Any] = {key: 0.7 if label in labels else 0.0 for label, key in LOSS_WEIGHTS.items()}
    return TrainSection(**weights | changes)


def train(
    potential: Potential, mode: Checkpointing, batches: list[GraphBatch], section: TrainSection
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the loss and the outputs, and the gradients by all weights, of batches one after another."""
    potential = copy.deepcopy(potential).train()
    potential.as_network.checkpointing = mode
    passes, outputs = TwoPass(potential), {}
    for number, batch in enumerate(batches):
        results = passes.forward(potential, batch, section.trains("stress"))
        loss, _ = compute_loss(results, batch, count_labels(batch), section, compute_weights(0, section), 1.3)
        passes.finish(potential, 2 * loss).backward()  # type: ignore[no-untyped-call] # torch's
        results = {"loss": loss, **results}
        outputs |= {f"{name} {number}": np.nan_to_num(v.detach().double().cpu().numpy()) for name, v in results.items()}
    zero = torch.zeros(())
    named = {n: zero.expand_as(w) if w.grad is None else w.grad for n, w in potential.named_parameters()}
    return outputs, {name: gradient.double().cpu().numpy() for name, gradient in named.items()}


def compare_gradients(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the largest deviation of each weight's gradient, relative to its largest entry."""
    scales = {name: np.abs(values).max() for name, values in expected.items()}
    if WITHOUT_EFFECT in scales:
        scales[WITHOUT_EFFECT] = max(scales.values())
    return {name: float(np.abs(found[name] - expected[name]).max() / (scales[name] or 1.0)) for name in expected}


@options_and_modes
def test_a_loss_of_all_outputs_has_the_same_gradients(options: str, mode: Checkpointing) -> None:
    potential, graphs, section = make_potential(options), make_graphs(options), make_section(options)
    batches = [make_batch(part, potential.cutoffs) for part in (graphs[:2], [], graphs[2:5], graphs[5:], [graphs[4]])]
    expected, exact = train(potential, "none", batches, section)
    outputs, gradients = train(potential, mode, batches, section)
    assert max(np.abs(values).max() for values in exact.values()) > 0.1
    check_deviations(compare(outputs, expected) | compare_gradients(gradients, exact), 1e-12)


@pytest.mark.parametrize("options", ["backbone", "so3lr"])
@pytest.mark.parametrize("label", LOSS_WEIGHTS)
def test_a_loss_of_a_single_output_has_the_same_gradients(options: str, label: str) -> None:
    if label not in {"energy", "forces", "stress"} | OPTIONS[options].outputs:
        pytest.skip("the model has no such output")
    section = TrainSection(**dict.fromkeys(LOSS_WEIGHTS.values(), 0.0) | {LOSS_WEIGHTS[label]: 1.0})
    potential = make_potential(options)
    batches = [make_batch(make_graphs(options), potential.cutoffs)]
    (_, exact), (_, gradients) = (train(potential, mode, batches, section) for mode in ("none", "low_memory"))
    check_deviations(compare_gradients(gradients, exact), 1e-12)


@pytest.mark.parametrize("kinds", [("huber", "huber"), ("mae", "l2")])
def test_a_loss_that_is_not_quadratic_has_the_same_gradients(kinds: tuple[Any, Any]) -> None:
    section = make_section("backbone", energy_loss=kinds[0], forces_loss=kinds[1], huber_delta=0.5)
    potential = make_potential()
    batches = [make_batch(make_graphs("backbone"), potential.cutoffs)]
    (_, exact), (_, gradients) = (train(potential, mode, batches, section) for mode in ("none", "low_memory"))
    check_deviations(compare_gradients(gradients, exact), 1e-12)


@pytest.mark.parametrize("options", ["pre_gated", "repulsive", "so3lr", "so3krates_scalars"])
def test_symmetric_structures_have_the_same_gradients(options: str) -> None:
    """Where lengths and differences of features vanish, which have no derivative there."""
    potential, section = make_potential(options), make_section(options)
    batches = [make_batch([make_molecule(name, None) for name in ("CH4", "CO2")], potential.cutoffs)]
    (_, exact), (_, gradients) = (train(potential, mode, batches, section) for mode in ("none", "low_memory"))
    # What is rounding in either case decides which of So3krates' lengths count as zero.
    check_deviations(compare_gradients(gradients, exact), 1e-9 if options in SO3KRATES else 1e-12)


def test_particle_mesh_ewald_has_the_same_gradients() -> None:
    potential, section = make_potential("so3lr_ewald", electrostatics="pme"), make_section("so3lr_ewald")
    batches = [make_batch(make_graphs("so3lr_ewald"), potential.cutoffs)]
    (_, exact), (_, gradients) = (train(potential, mode, batches, section) for mode in ("none", "low_memory"))
    check_deviations(compare_gradients(gradients, exact), 1e-12)


@options_and_modes
def test_evaluation_is_the_same(options: str, mode: Checkpointing) -> None:
    potential, graphs = make_potential(options), make_graphs(options)[:5]
    expected = compute(potential, *graphs)
    potential.as_network.checkpointing = mode
    check_deviations(compare(compute(potential, *graphs), expected), 1e-12)
    with torch.no_grad():
        check_deviations(compare(compute(potential, *graphs), expected), 1e-12)


@options_and_modes
def test_layers_are_computed_again(options: str, mode: Checkpointing) -> None:
    potential, calls, counts = make_potential(options).train(), list[str](), []
    for name, module in potential.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    for potential.as_network.checkpointing in ("none", mode):
        passes = TwoPass(potential)
        outputs = passes.forward(potential, make_batch([make_molecule()], potential.cutoffs), False)
        loss = sum(values.square().sum() for values in outputs.values())
        calls.clear()
        passes.finish(potential, loss).backward()  # type: ignore[arg-type, no-untyped-call]
        counts.append(Counter(calls))
    again = counts[1] - counts[0]
    part = "network.streams.0" if options.startswith("geomatt") else "network.layers.0"
    assert again[part] == (2 if mode == "low_memory" else 1)  # the plain way goes through no layer after the loss
    assert again["network.embedding"] == (mode == "low_memory")


@pytest.mark.parametrize("mode", ["none", "blocks", "low_memory"])
def test_rounding_matters_as_much_in_all_modes(mode: Checkpointing) -> None:
    """In single precision, and with products in bfloat16, gradients are as far from those of float64 as the plain ones."""
    section, exact = make_section("so3lr"), make_potential("so3lr", torch.float32)
    graphs = make_graphs("so3lr")
    _, expected = train(copy.deepcopy(exact).double(), "none", [make_batch(graphs, exact.cutoffs)], section)
    largest = {}
    for precision in ("float32", "bf16-mixed"):
        exact.set_precision(precision)
        _, gradients = train(exact, mode, [make_batch(graphs, exact.cutoffs, torch.float32)], section)
        names = [name for name in expected if name != WITHOUT_EFFECT]
        errors = np.concatenate([(gradients[name] - expected[name]).ravel() for name in names])
        size = np.concatenate([expected[name].ravel() for name in names])
        largest[precision] = float(np.linalg.norm(errors) / np.linalg.norm(size))
    check_deviations(largest, {"float32": 1e-5, "bf16-mixed": 0.1})
    assert largest["bf16-mixed"] > 1e-4, "bf16 is not in use"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@options_and_modes
def test_a_gpu_gives_the_same_gradients(options: str, mode: Checkpointing) -> None:
    """The second computation takes place in a thread of its own there."""
    potential, section = make_potential(options), make_section(options)
    batches = [make_batch(make_graphs(options), potential.cutoffs)]
    expected, exact = train(potential, "none", batches, section)
    outputs, gradients = train(potential.cuda(), mode, [batch.to("cuda") for batch in batches], section)
    check_deviations(compare(outputs, expected) | compare_gradients(gradients, exact), 1e-9)


def measure_peak(options: str, mode: Checkpointing, num_layers: int) -> float:
    potential = make_potential(options, torch.float32, num_layers=num_layers).train()
    potential.as_network.checkpointing = mode
    batch, passes = make_batch([make_molecule("C6H6")] * 8, potential.cutoffs, torch.float32), TwoPass(potential)
    gc.collect()
    with LiveBytes() as live:
        loss = passes.forward(potential, batch, False)["forces"].square().sum()
        passes.finish(potential, loss).backward()  # type: ignore[no-untyped-call]
    return live.peak


@pytest.mark.parametrize("options", ["backbone", "so3krates", "so3lr_semi_local"])
def test_low_memory_keeps_one_layer_at_a_time(options: str) -> None:
    """Six layers take hardly more than two, and much less than all of them."""
    plain = [measure_peak(options, "none", n) for n in (2, 6)]
    low = [measure_peak(options, "low_memory", n) for n in (2, 6)]
    assert plain[1] > 2.5 * plain[0]
    assert low[1] < 1.2 * low[0]
    assert low[1] < plain[1] / 3
    assert measure_peak(options, "blocks", 6) < plain[1]
