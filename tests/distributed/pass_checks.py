"""What test_passes.py runs in real processes: steps of different numbers of passes; findings go to a JSON file per process."""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from plain import PlainTraining
from training_setup import find_differences, make_config, make_graphs

from so3krates_dist.config import RunConfig
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.distributed import read_rank, reduce_sum, seed_everything, start_processes, stop_processes
from so3krates_dist.errors import ConfigError
from so3krates_dist.graph import Graph, GraphBatch, collate
from so3krates_dist.model.potential import ModelStatistics
from so3krates_dist.model.registry import build_model
from so3krates_dist.train import budget
from so3krates_dist.train.budget import find_limits, fit_cost
from so3krates_dist.train.engine import StepResult, TrainingEngine
from so3krates_dist.train.losses import LABELS, compute_loss, count_labels
from so3krates_dist.train.optim import compute_learning_rate
from so3krates_dist.train.probes import Probes

CPU = torch.device("cpu")
STAGES = (0, 1, 2)
CLIPPING = (0.0, 0.3)
PASSES = (1, 3, 2, 3, 1, 2, 3, 1)
"""of each step"""
EMPTY = {1: ((0, 0), (-1, 2)), 2: ((0, 1),), 3: ((-1, 2),), 4: ((-1, 0),), 6: ((0, 1), (-1, 0))}
"""processes (counted from either end) and passes without conformers, by step"""
SPOILED_STEP = 3
GRAPHS_PER_STEP = 7
STATISTICS = ModelStatistics(
    elements=(10, 18), energy_baselines={10: -3507.25, 18: -14354.5}, energy_scale=0.5, mean_neighbors=3.0
)


def deal(graphs: Sequence[Graph], step: int, world_size: int) -> list[list[GraphBatch]]:
    """Return the batches of each process and pass: unequal ones, and empty ones where `EMPTY` says so."""
    portions: list[list[list[Graph]]] = [[[] for _ in range(PASSES[step])] for _ in range(world_size)]
    places = [(rank, number) for rank in range(world_size) for number in range(PASSES[step])]
    empty = {(rank % world_size, number) for rank, number in EMPTY.get(step, ())}
    used = [place for place in places if place not in empty] or places  # a single process has no other to leave all to
    for number, graph in enumerate(graphs):
        rank, index = used[min(number, len(used) - 1)]  # one each; the last of them takes the rest
        portions[rank][index].append(graph)
    return [[collate(portion) for portion in own] for own in portions]


class PassChecks:
    """All checks of one process."""

    def __init__(self) -> None:
        self.rank = read_rank()
        graphs = [build_neighbors(g, 4.0) for g in make_graphs(GRAPHS_PER_STEP * len(PASSES))]
        self.steps = [graphs[i : i + GRAPHS_PER_STEP] for i in range(0, len(graphs), GRAPHS_PER_STEP)]

    def configure(self, stage: int, clipping: float) -> RunConfig:
        settings = (f"train.zero_stage={stage}", f"train.gradient_clipping={clipping}", "train.weight_decay=0.05")
        return make_config("data", "run", *settings)

    def build(self, config: RunConfig) -> TrainingEngine:
        seed_everything(config.run.seed)
        return TrainingEngine(build_model(config.model, STATISTICS), config.train, CPU)

    def train_plainly(self, clipping: float, steps: Sequence[int]) -> tuple[dict[str, torch.Tensor], list[Any]]:
        """Return the weights after these steps, and loss and gradient norm of each."""
        plain = PlainTraining(self.configure(0, clipping), STATISTICS)
        facts = [plain.step(step, collate(self.steps[step])) for step in steps]
        return plain.weights(), facts

    def do_step(
        self, engine: TrainingEngine, config: RunConfig, step: int, spoil: Callable[[GraphBatch], None] | None = None
    ) -> tuple[float, StepResult]:
        """Do what the loop does with a step; `spoil` damages the batch of the middle pass of the last process."""
        portions = deal(self.steps[step], step, self.rank.world_size)
        sums = [sum(count_labels(b)[i] for own in portions for b in own) for i in range(len(LABELS))]
        own = portions[self.rank.rank]
        if spoil is not None and self.rank.rank == self.rank.world_size - 1:
            spoil(own[1])
        total = 0.0
        for number, batch in enumerate(own, 1):
            loss, _ = compute_loss(engine.forward(batch), batch, sums, config.train, STATISTICS.energy_scale)
            engine.backward(loss, is_last=number == len(own))
            total += float(loss.detach())
        result = engine.step(compute_learning_rate(step, config.train))
        return reduce_sum([total], CPU)[0], result

    # ------------------------------------------------------------------------------------------------------------ checks

    def check_trajectories(self) -> dict[str, Any]:
        """One, two and three passes in turn, some of them empty: the weights are those of plain torch."""
        findings = {}
        for clipping in CLIPPING:
            expected, facts = self.train_plainly(clipping, range(len(PASSES)))
            for stage in STAGES:
                config = self.configure(stage, clipping)
                engine = self.build(config)
                start = engine.gather_state()
                finding = {"loss": 0.0, "norm": 0.0, "clipped": 0}
                for step, (loss, norm) in enumerate(facts):
                    found, result = self.do_step(engine, config, step)
                    finding["loss"] = max(finding["loss"], abs(found / loss - 1))
                    finding["norm"] = max(finding["norm"], abs(result.gradient_norm / norm - 1))
                    finding["clipped"] += norm > (clipping or float("inf"))
                state = engine.gather_state()
                finding["weights"] = max(float((state[n] - w).abs().max()) for n, w in expected.items())
                finding["motion"] = max(float((state[n] - start[n]).abs().max()) for n in expected)
                finding["optimizer_steps"] = int(state["optimizer_steps"])
                findings[f"stage {stage}, clip {clipping}"] = finding
        return findings

    def check_interruptions(self) -> dict[str, Any]:
        """A middle pass that is not finite, or passes that are given up: nothing is changed, and training goes on."""
        findings = {}
        rest = [step for step in range(len(PASSES)) if step != SPOILED_STEP]
        expected, _ = self.train_plainly(CLIPPING[-1], rest)
        for stage, kind in itertools.product(STAGES, ("nan", "infinite", "given up")):
            config = self.configure(stage, CLIPPING[-1])
            engine = self.build(config)
            finding: dict[str, Any] = {"applied": False}
            for step in range(len(PASSES)):
                if step != SPOILED_STEP:
                    self.do_step(engine, config, step)
                    continue
                before = engine.gather_state()
                if kind == "given up":
                    self.give_up(engine, step)
                else:
                    _, result = self.do_step(engine, config, step, SPOILS[kind])
                    finding["applied"] = result.applied
                finding["differences"] = find_differences(before, engine.gather_state())
            state = engine.gather_state()
            finding["weights"] = max(float((state[n] - w).abs().max()) for n, w in expected.items())
            findings[f"{kind}, stage {stage}"] = finding
        return findings

    def give_up(self, engine: TrainingEngine, step: int) -> None:
        """Do all passes but the last, with large gradients, and forget them."""
        for batch in deal(self.steps[step], step, self.rank.world_size)[self.rank.rank][:-1]:
            engine.backward(1e3 * engine.forward(batch)["forces"].square().sum(), is_last=False)
        engine.discard()

    def check_measurements(self) -> dict[str, Any]:
        """Rank 0 measures in the middle of a step, the others wait: all hear the same, and nothing is changed."""
        findings = {}
        probes = self.make_probes()
        for stage in STAGES:
            config, states, found = self.configure(stage, 0.3), [], {}
            for is_measured in (False, True):
                engine = self.build(config)
                self.do_step(engine, config, 0)
                batches = deal(self.steps[2], 2, self.rank.world_size)[self.rank.rank]
                engine.backward(engine.forward(batches[0])["forces"].square().sum(), is_last=False)
                if is_measured:
                    own = (4 - 2 * self.rank.rank) * 10**6
                    more = (config.train, CPU, self.rank)
                    limits = find_limits(engine.potential, probes, *more, available_bytes=own)
                    found = limits.to_json() | fit_cost(engine.potential, probes, *more).to_json()
                    found["refused"] = self.refuse(engine, probes, config)
                engine.backward(engine.forward(batches[1])["forces"].square().sum(), is_last=True)
                engine.step(1e-2)
                states.append(engine.gather_state() | {"random": torch.random.get_rng_state()})
            findings[f"stage {stage}"] = {"found": found, "differences": find_differences(*states)}
        return findings

    def make_probes(self) -> Probes:
        """Return different conformers on each process: only those of rank 0 count."""
        graphs = self.steps[self.rank.rank][:3]
        atoms, pairs = zip(*((g.num_atoms, g.num_short_pairs or 0) for g in graphs), strict=True)
        return Probes(tuple(graphs), atoms, pairs, max(atoms), max(pairs), pairs_per_atom=sum(pairs) / sum(atoms))

    def refuse(self, engine: TrainingEngine, probes: Probes, config: RunConfig) -> str:
        """Return what a process hears where no conformer fits."""
        try:
            find_limits(engine.potential, probes, config.train, CPU, self.rank, available_bytes=1)
        except ConfigError as error:
            return str(error)
        return ""

    def count_graphs(self) -> list[list[int]]:
        """Return how many conformers each pass of this process has."""
        portions = [deal(graphs, step, self.rank.world_size) for step, graphs in enumerate(self.steps)]
        return [[batch.num_graphs for batch in own[self.rank.rank]] for own in portions]


def _spoil_positions(batch: GraphBatch) -> None:
    batch.positions[0] = float("nan")


def _spoil_label(batch: GraphBatch) -> None:
    assert batch.forces is not None
    batch.forces[0, 0] = float("inf")


SPOILS = {"nan": _spoil_positions, "infinite": _spoil_label}


def run_pass_checks(folder: Path) -> int:
    """Run all checks and write `findings<rank>.json`."""
    rank = read_rank()
    start_processes(rank, CPU)
    for name, seconds in (("MIN_SECONDS", 0.01), ("MAX_SECONDS", 0.1)):
        setattr(budget, name, seconds)  # of passes that are measured; a real run takes longer ones
    checks = PassChecks()
    findings = {
        "graphs": checks.count_graphs(),
        "trajectories": checks.check_trajectories(),
        "interruptions": checks.check_interruptions(),
        "measurements": checks.check_measurements(),
    }
    (folder / f"findings{rank.rank}.json").write_text(json.dumps(findings, indent=1))
    stop_processes()
    return 0
