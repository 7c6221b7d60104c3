"""What test_zero.py trains: conformers, how they are dealt, models, and combinations of what may be chosen."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from training_setup import make_graphs

from so3krates_dist.graph import Graph, GraphBatch, collate
from so3krates_dist.model.potential import ModelStatistics

STAGES = (0, 1, 2, 3)
NUM_STEPS = 8
GRAPHS_PER_STEP = 7
PASSES = {"one": (1,) * NUM_STEPS, "two": (2,) * NUM_STEPS, "varied": (1, 3, 2, 3, 1, 2, 3, 1)}
"""of each step"""
EMPTY = {1: ((0, 0), (-1, 2)), 2: ((0, 1),), 3: ((-1, 2),), 4: ((-1, 0),), 6: ((0, 1), (-1, 0))}
"""processes (counted from either end) and passes without conformers, by step"""
STATISTICS = ModelStatistics(
    elements=(10, 18), energy_baselines={10: -3507.25, 18: -14354.5}, energy_scale=0.5, mean_neighbors=3.0,
    has_unpaired_electrons=True, charge_signs=(-1, 1),
)  # fmt: skip
COMMON = ("train.weight_decay=0.05", "train.layer_decay=0.8", "train.stress_weight=100", "train.adam_epsilon=1e-3")
"""Steps by Adam divide gradients by their own size; the epsilon is of the size of the smaller ones, so that what is left of those
that vanish by symmetry does not count as one"""
MODELS = {
    "so3krates": "num_features=12 num_layers=2 num_heads=2 degrees=[0,1] cutoff=4.0 num_radial_basis=4",
    "so3krates, non-local": "num_features=12 num_layers=2 num_heads=2 degrees=[1,2] cutoff=4.0 num_radial_basis=4"
    " non_local=true layer_norm=true sphc_norm=true",
    "euclidean_transformer": "num_features=8 num_layers=2 num_heads=2 degrees=[1,2] cutoff=4.0 num_radial_basis=4 zbl=true"
    " normalization=pre residual_mlp=gated message_scale=sqrt_features",
    "so3lr": "num_features=8 num_layers=2 num_heads=2 degrees=[1,2] num_radial_basis=4",
    "so3lr, bare": "num_features=8 num_layers=2 num_heads=2 degrees=[1,2] num_radial_basis=4 electrostatics=none"
    " dispersion=false",
    "geomatt": "num_layers=2 num_features=8 inner_width=8 grid_end=4.0 grid_spacing=0.5",
    "geomatt_envelope": "num_layers=2 num_features=8 inner_width=8 grid_end=4.0 grid_spacing=0.5 cutoff=4.0",
}
"""Options of each model, so that all of its weights take part, or, in the bare one, some do not"""
PATHS = {
    "so3lr, ewald": f"{MODELS['so3lr']} electrostatics=ewald",
    "geomatt, matrices and lists": MODELS["geomatt"],
}
"""Models in which a pass of one process may do what that of another does not"""
OWN_LOSS = ("train.energy_weight=0", "train.forces_weight=10", "train.dipole_weight=1", "train.hirshfeld_weight=1")
"""of SO3LR"""
WITHOUT_GRADIENT = "weight.network.charge_head.output.bias"
"""of SO3LR, whose charges are made to add up: it starts from zero and moves by what rounding leaves, and is compared by that"""
FEW_MODELS = ("so3lr", "geomatt_envelope", "so3krates, non-local")
MODEL_STEPS = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """A combination that is trained."""

    stage: int
    passes: str = "one"
    checkpointing: str = "none"
    clipping: float = 0.0
    offload: bool = False
    optimizer: str = "adamw"
    epsilon: float = 1e-3

    def __str__(self) -> str:
        words = [f"stage {self.stage}", f"{self.passes} pass(es)", self.checkpointing, f"clip {self.clipping}"]
        more = {"offload": self.offload, "amsgrad": self.optimizer == "amsgrad", "usual epsilon": self.epsilon < 1e-6}
        return ", ".join(words + [name for name, present in more.items() if present])

    @property
    def settings(self) -> tuple[str, ...]:
        """How it is configured."""
        return (
            f"train.zero_stage={self.stage}", f"train.activation_checkpointing={self.checkpointing}",
            f"train.gradient_clipping={self.clipping}", f"train.offload_optimizer={str(self.offload).lower()}",
            f"train.optimizer={self.optimizer}", f"train.adam_epsilon={self.epsilon}",
        )  # fmt: skip


FEW = (
    Case(0), Case(0, "varied", "low_memory", 0.3), Case(0, "two", "blocks", 0.3, optimizer="amsgrad"),
    Case(1, "one", "blocks", 0.3), Case(1, "varied", epsilon=1e-8), Case(1, "two", "low_memory", 0.3, offload=True),
    Case(2, "one", "low_memory"), Case(2, "varied", "blocks", 0.3), Case(2, "varied", "none", 0.3, True, "amsgrad"),
    Case(3), Case(3, "one", "blocks", 0.3), Case(3, "varied", "none", 0.3, optimizer="amsgrad"),
    Case(3, "varied", "blocks", 0.3, offload=True), Case(3, "varied", epsilon=1e-8),
)  # fmt: skip
"""Every pair of choices at least once"""
ALL = tuple(
    Case(stage, passes, checkpointing, clipping)
    for stage, passes, checkpointing, clipping in itertools.product(
        STAGES, ("one", "two"), ("none", "blocks", "low_memory"), (0.0, 0.3)
    )
    if (stage, checkpointing) != (3, "low_memory") and (checkpointing == "none" or (passes == "two") == (clipping > 0))
) + tuple(Case(stage, passes, clipping=0.3, offload=True) for stage in (1, 2, 3) for passes in ("one", "two"))
"""Every stage, number of passes and mode, with clipping on and off where nothing is computed again; and offload"""


def make_conformers(count: int) -> list[Graph]:
    """Return labelled clusters: some in a cell, with a stress; the last of each step with charge, dipole and Hirshfeld ratios."""
    rng = np.random.default_rng(0)
    conformers = []
    for number, graph in enumerate(make_graphs(count)):
        more: dict[str, Any] = {}
        if number % GRAPHS_PER_STEP == GRAPHS_PER_STEP - 1:
            more = {
                "total_charge": (-1.0) ** number, "num_unpaired_electrons": 1.0,
                "dipole": rng.normal(size=3), "hirshfeld_ratios": rng.uniform(0.7, 1.1, graph.num_atoms),
            }  # fmt: skip
        elif number % 3 == 0:
            stress = rng.normal(scale=0.05, size=(3, 3))
            more = {"cell": 14.0 * np.eye(3), "pbc": np.ones(3, bool), "stress": stress + stress.T}
        conformers.append(dataclasses.replace(graph, **more))
    return conformers


def deal(
    graphs: Sequence[Graph], step: int, world_size: int, passes: Sequence[int] = PASSES["varied"]
) -> list[list[GraphBatch]]:
    """Return the batches of each process and pass: unequal ones, and empty ones where `EMPTY` says so."""
    portions: list[list[list[Graph]]] = [[[] for _ in range(passes[step])] for _ in range(world_size)]
    places = [(rank, number) for rank in range(world_size) for number in range(passes[step])]
    empty = {(rank % world_size, number) for rank, number in EMPTY.get(step, ())}
    used = [place for place in places if place not in empty] or places  # a single process has no other to leave all to
    for number, graph in enumerate(graphs):
        rank, index = used[min(number, len(used) - 1)]  # one each; the last of them takes the rest
        portions[rank][index].append(graph)
    return [[collate(portion) for portion in own] for own in portions]
