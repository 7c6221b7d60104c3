"""What test_zero.py runs in real processes: one start, many checks; findings go to a JSON file per process."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from analytic import write_dataset
from plain import PlainTraining
from safetensors.torch import load_file, save_file
from training_setup import find_differences, make_config, make_graphs

from so3krates_dist.config import RunConfig
from so3krates_dist.data.shards import load_manifest
from so3krates_dist.data.stream import StepData, TrainingStream
from so3krates_dist.distributed import Rank, read_rank, start_processes, stop_processes, wait_for_all
from so3krates_dist.graph import GraphBatch
from so3krates_dist.model.potential import ModelStatistics
from so3krates_dist.train.checkpoint import RunFolder
from so3krates_dist.train.inputs import open_data
from so3krates_dist.train.loop import Training
from so3krates_dist.train.planning import build_schedule

CPU = torch.device("cpu")
STAGES = (0, 1, 2)
NUM_STEPS = 8
MICRO_BATCHES = {6: 1, 2: 2, 1: 1}
"""Portions of a step, by the conformers in it, where not all combinations are tried"""
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
MODEL_STEPS = 4
OWN_LOSS = ("train.energy_weight=0", "train.forces_weight=10", "train.dipole_weight=1", "train.hirshfeld_weight=1")
"""of SO3LR"""
Findings = dict[str, dict[str, Any]]


def open_stream(config: RunConfig, rank: Rank) -> TrainingStream:
    """Return the stream of a process from the first step on."""
    schedule, _ = build_schedule(config, open_data(config), None, 0)
    return TrainingStream(schedule, config, rank.rank, rank.world_size)


def do_step(training: Training, step: int, batches: list[GraphBatch]) -> dict[str, float]:
    """Do what the loop does with the micro-batches of a step."""
    counts, _ = training.agree(StepData(batches), None, False)
    return training.train_step(step, batches, counts)


class Checks:
    """All checks of one process."""

    def __init__(self, dataset: Path, folder: Path) -> None:
        self.dataset, self.folder = dataset, folder
        self.rank = read_rank()
        self.number = itertools.count()
        self.plain: dict[tuple[str, ...], tuple[dict[str, torch.Tensor], list[tuple[float, float]]]] = {}
        self.trainings: dict[tuple[str, ...], PlainTraining] = {}

    def build(self, *settings: str) -> Training:
        run = self.folder / f"run{next(self.number)}"
        config = make_config(self.dataset, run, "train.weight_decay=0.05", "train.log_every=1000", *settings)
        folder = RunFolder(config)
        if self.rank.is_main:
            folder.acquire()
        wait_for_all()
        training = Training(config, self.rank, CPU, open_data(config), folder, None)
        folder.close()
        return training

    def train_plainly(
        self, *settings: str, steps: tuple[int, ...] = tuple(range(NUM_STEPS))
    ) -> tuple[dict[str, torch.Tensor], list[tuple[float, float]]]:
        """Return the weights after the steps, and loss and gradient norm of each."""
        key = (*settings, str(steps))
        if key not in self.plain:
            config = make_config(self.dataset, self.folder, "train.weight_decay=0.05", *settings)
            statistics = load_manifest(self.dataset).statistics
            plain = PlainTraining(config, ModelStatistics.from_manifest(statistics, config.model))
            stream = open_stream(config, Rank())
            facts = [plain.step(step, *stream[step].batches) for step in steps]
            self.plain[key] = plain.weights(), facts
            self.trainings[key] = plain
        return self.plain[key]

    def gather(self, training: Training) -> dict[str, torch.Tensor]:
        return training.engine.gather_state() | training.mean.get_state()

    # ------------------------------------------------------------------------------------------------------------ checks

    def check_trajectories(self) -> Findings:
        """Every stage, portions, recomputation and clipping: the weights are those of plain torch."""
        findings: Findings = {}
        for clipping, batch_size in ((0.0, 6), (0.3, 6), (0.3, 2), (0.3, 1)):
            data = (f"train.gradient_clipping={clipping}", f"data.batch_size={batch_size}")
            expected, facts = self.train_plainly(*data)
            for stage, micro, recompute in itertools.product(STAGES, (1, 2), (False, True)):
                if (batch_size, clipping) != (6, 0.3) and (recompute or micro != MICRO_BATCHES[batch_size]):
                    continue  # all combinations once, and then what each of the others is there for
                name = (
                    f"stage {stage}, {micro} micro-batches, recompute {recompute}, clip {clipping}, batch {batch_size}"
                )
                more = (f"train.micro_batches={micro}", f"train.checkpoint_attention={recompute}")
                training = self.build(*data, f"train.zero_stage={stage}", *more)
                findings[name] = self.compare_trajectory(training, expected, facts)
        return findings

    def compare_trajectory(
        self, training: Training, expected: dict[str, torch.Tensor], facts: list[tuple[float, float]]
    ) -> dict[str, Any]:
        start = self.gather(training)
        finding = {"loss": 0.0, "norm": 0.0, "atoms": [], "graphs": [], "clipped": 0}
        stream = open_stream(training.config, self.rank)
        for step, (loss, norm) in enumerate(facts):
            batches = stream[step].batches
            found = do_step(training, step, batches)
            finding["loss"] = max(finding["loss"], abs(found["loss"] / loss - 1))
            finding["norm"] = max(finding["norm"], abs(found["gradient_norm"] / norm - 1))
            finding["atoms"].append(sum(len(b.atomic_numbers) for b in batches))
            finding["graphs"].append([b.num_graphs for b in batches])
            finding["clipped"] += norm > (training.config.train.gradient_clipping or float("inf"))
        state = self.gather(training)
        finding["weights"] = max(float((state[n] - w).abs().max()) for n, w in expected.items())
        finding["motion"] = max(float((state[n] - start[n]).abs().max()) for n in expected)
        return finding

    def check_models(self) -> Findings:
        """Every model, with its attention computed again or not, some portions empty: the weights are those of plain torch."""
        findings: Findings = {}
        for number, (name, options) in enumerate(MODELS.items()):
            model = name.partition(",")[0]
            settings = [f"model.name={model}", *(f"model.{option}" for option in options.split())]
            settings += ["train.weight_decay=0", "data.batch_size=2", *(OWN_LOSS if name == "so3lr" else ())]
            steps = tuple(range(MODEL_STEPS))
            expected, facts = self.train_plainly(*settings, steps=steps)
            plain = self.trainings[*settings, str(steps)]
            for stage in STAGES if model == "so3lr" else (STAGES[number % 3],):
                for recompute in (False, True):
                    more = (
                        f"train.zero_stage={stage}",
                        f"train.checkpoint_attention={recompute}",
                        "train.micro_batches=2",
                    )
                    training = self.build(*settings, *more)
                    finding = self.compare_trajectory(training, expected, facts)
                    finding |= compare_moments(self.gather(training), plain, expected)
                    findings[f"{name}, stage {stage}, recompute {recompute}"] = finding
        return findings

    def check_states(self) -> Findings:
        """A gathered state goes into any stage and number of processes and comes out bit for bit."""
        findings: Findings = {}
        states = {}
        for stage in STAGES:
            training = self.build(f"train.zero_stage={stage}")
            stream = open_stream(training.config, self.rank)
            for step in range(3):
                do_step(training, step, stream[step].batches)
            states[f"{self.rank.world_size} processes, stage {stage}"] = self.gather(training)
            if self.rank.is_main:
                path = self.folder.parent / f"{self.rank.world_size} processes, stage {stage}.safetensors"
                save_file(states[f"{self.rank.world_size} processes, stage {stage}"], path)
        if self.rank.world_size == 1:
            states |= {p.stem: load_file(p) for p in sorted(self.folder.parent.glob("[!1]*.safetensors"))}
        for name, state in states.items():
            for stage in STAGES:
                training = self.build(f"train.zero_stage={stage}", "run.seed=7")
                before = find_differences(state, self.gather(training))
                training.engine.load_state(state)
                training.mean.load_state(state)
                after = self.gather(training)
                finding: dict[str, Any] = {"before": len(before), "differences": find_differences(state, after)}
                finding |= self.compare_next_steps(state, stage, training)
                findings[f"{name} into {self.rank.world_size} processes, stage {stage}"] = finding
        return findings

    def compare_next_steps(self, state: dict[str, torch.Tensor], stage: int, loaded: Training) -> dict[str, Any]:
        """Go on for three steps (of the data that seed 0 orders) and compare with plain torch that never stopped."""
        expected, _ = self.train_plainly(steps=tuple(range(6)))
        stream = open_stream(make_config(self.dataset, self.folder), self.rank)
        for step in range(3, 6):
            do_step(loaded, step, stream[step].batches)
        after = self.gather(loaded)
        deviation = max(float((after[n] - w).abs().max()) for n, w in expected.items())
        return {"weights": deviation, "steps": int(after["optimizer_steps"])}

    def check_skipped_steps(self) -> Findings:
        """A loss or gradient that is not finite on one process: the step is skipped by all, and nothing is changed."""
        findings: Findings = {}
        expected, _ = self.train_plainly(steps=(0, 1, 2, 4, 5))
        for stage, micro in itertools.product(STAGES, (1, 2)):
            for damage in DAMAGES if micro == 2 else ("nan position",):
                training = self.build(f"train.zero_stage={stage}", f"train.micro_batches={micro}")
                stream = open_stream(training.config, self.rank)
                for step in range(3):
                    do_step(training, step, stream[step].batches)
                before = self.gather(training)
                batches = stream[3].batches
                if self.rank.rank == self.rank.world_size - 1:
                    DAMAGES[damage](batches[0])
                facts = do_step(training, 3, batches)
                finding: dict[str, Any] = {
                    "applied": facts["applied"],
                    "differences": find_differences(before, self.gather(training)),
                }
                for step in (4, 5):
                    do_step(training, step, stream[step].batches)
                after = self.gather(training)
                finding["weights"] = max(float((after[n] - w).abs().max()) for n, w in expected.items())
                findings[f"{damage}, stage {stage}, {micro} micro-batches"] = finding
        return findings


def compare_moments(
    state: dict[str, torch.Tensor], plain: PlainTraining, weights: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Compare gradients, and weights where their gradients are more than rounding."""
    moments, is_sound = plain.moments(), plain.find_sound()
    largest = max(float(m.abs().max()) for m in moments.values())
    finding: dict[str, Any] = {"moments": max(float((state[n] - m).abs().max()) for n, m in moments.items()) / largest}
    trained = sum(int(m.count_nonzero()) for m in moments.values())
    finding["sound"] = sum(int(sound.sum()) for sound in is_sound.values()) / trained
    deviations = [(state[name] - weight)[is_sound[name]].abs() for name, weight in weights.items()]
    return finding | {"sound weights": max(float(d.max()) for d in deviations if len(d))}


def _spoil_positions(batch: GraphBatch) -> None:
    batch.positions[0] = float("nan")


def _spoil_label(batch: GraphBatch) -> None:
    assert batch.forces is not None
    batch.forces[0, 0] = float("inf")


def _enlarge_label(batch: GraphBatch) -> None:
    """The error itself is finite; its square and the norm of the gradient are not."""
    assert batch.forces is not None
    batch.forces[0, 0] = 1e30


DAMAGES = {"nan position": _spoil_positions, "infinite label": _spoil_label, "huge label": _enlarge_label}


def make_labelled_dataset(folder: Path) -> Path:
    """Write clusters with random dipoles and Hirshfeld ratios, every other one charged, with an unpaired electron."""
    rng = np.random.default_rng(0)
    graphs = [
        dataclasses.replace(
            graph, total_charge=float(number % 2) * (-1) ** (number // 2), num_unpaired_electrons=float(number % 2),
            dipole=rng.normal(size=3), hirshfeld_ratios=rng.uniform(0.7, 1.1, graph.num_atoms),
        )
        for number, graph in enumerate(make_graphs(20))
    ]  # fmt: skip
    return write_dataset(folder, {"train": graphs[4:], "validation": graphs[:4]})


def run_checks(dataset: Path, labelled: Path, folder: Path) -> int:
    """Run all checks and write `findings<rank>.json`."""
    rank = read_rank()
    start_processes(rank, CPU)
    checks = Checks(dataset, folder)
    findings = {
        "models": Checks(labelled, folder).check_models(),
        "trajectories": checks.check_trajectories(),
        "states": checks.check_states(),
        "skipped": checks.check_skipped_steps(),
    }
    (folder / f"findings{rank.rank}.json").write_text(json.dumps(findings, indent=1))
    stop_processes()
    return 0
