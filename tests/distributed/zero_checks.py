"""What test_zero.py runs in real processes: one start, many checks; findings go to a JSON file per process."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from analytic import write_dataset
from safetensors.torch import load_file, save_file
from training_setup import find_differences, make_config, make_graphs

from so3krates_dist.config import RunConfig
from so3krates_dist.data.shards import load_manifest
from so3krates_dist.data.stream import TrainingStream
from so3krates_dist.distributed import read_rank, seed_everything, start_processes, stop_processes, wait_for_all
from so3krates_dist.graph import GraphBatch
from so3krates_dist.model.potential import ModelStatistics
from so3krates_dist.model.registry import build_model
from so3krates_dist.train.checkpoint import RunFolder
from so3krates_dist.train.loop import Training
from so3krates_dist.train.optim import compute_learning_rate

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


def do_step(training: Training, step: int, batches: list[GraphBatch]) -> dict[str, float]:
    """Do what the loop does with the micro-batches of a step."""
    counts, _ = training.agree(batches, None, False)
    return training.train_step(step, batches, counts)


class PlainTraining:
    """The same training without DeepSpeed and without processes: the definition that the engine is measured by."""

    def __init__(self, config: RunConfig) -> None:
        self.section = config.train
        dataset = Path(config.data.folder)
        manifest = load_manifest(dataset)
        self.stream = TrainingStream(dataset, manifest, config, 0, 1)
        seed_everything(config.run.seed)
        statistics = ModelStatistics.from_manifest(manifest.statistics, config.model)
        self.scale = statistics.energy_scale
        self.potential = build_model(config.model, statistics).train()
        named = dict(self.potential.named_parameters())
        decayed = {n for n, p in named.items() if n.endswith("weight") and p.dim() > 1 and "embedding" not in n}
        matrices, others = ([p for n, p in named.items() if (n in decayed) == choice] for choice in (True, False))
        groups = [
            {"params": matrices, "weight_decay": self.section.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        betas = (self.section.adam_beta1, self.section.adam_beta2)
        self.optimizer = torch.optim.AdamW(groups, betas=betas, fused=False, foreach=False)

    def step(self, step: int) -> tuple[float, float]:
        """Train on the whole global batch; return the loss and the norm of its gradient."""
        (batch,) = self.stream[step]
        outputs = self.potential(batch)
        energies = (outputs["energy"] - batch.energy) / batch.num_atoms / self.scale
        forces = (outputs["forces"] - batch.forces) / self.scale
        weights = self.section.energy_weight, self.section.forces_weight
        loss = weights[0] * energies.square().mean().float() + weights[1] * forces.square().mean()
        if self.section.dipole_weight:
            loss = loss + self.section.dipole_weight * self._compare_dipoles(outputs["dipole"], batch)
        if self.section.hirshfeld_weight:
            errors = outputs["hirshfeld_ratios"] - batch.hirshfeld_ratios
            loss = loss + self.section.hirshfeld_weight * errors.square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        limit = self.section.gradient_clipping or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.potential.parameters(), limit)
        for group in self.optimizer.param_groups:
            group["lr"] = compute_learning_rate(step, self.section)
        self.optimizer.step()
        return float(loss.detach()), float(norm)

    def _compare_dipoles(self, dipoles: torch.Tensor, batch: GraphBatch) -> torch.Tensor:
        """Return the mean squared error, with the origin of each at its centre of mass."""
        errors = []
        for number, label in enumerate(batch.dipole):
            atoms = batch.graph_index == number
            masses = torch.tensor([{10: 20.1797, 18: 39.948}[int(z)] for z in batch.atomic_numbers[atoms]])
            centre = masses @ batch.positions[atoms] / masses.sum()
            errors.append(dipoles[number] - batch.total_charge[number] * centre - label)
        return torch.stack(errors).square().mean()

    def weights(self) -> dict[str, torch.Tensor]:
        return {f"weight.{n}": p.detach().clone() for n, p in self.potential.named_parameters()}

    def moments(self) -> dict[str, torch.Tensor]:
        """Return AdamW's mean of the gradients; zero for weights that had none."""
        states = self.optimizer.state
        means = {n: states[p].get("exp_avg") for n, p in self.potential.named_parameters()}
        named = dict(self.potential.named_parameters())
        return {f"exp_avg.{n}": torch.zeros_like(named[n]) if m is None else m.clone() for n, m in means.items()}


class Checks:
    """All checks of one process."""

    def __init__(self, dataset: Path, folder: Path) -> None:
        self.dataset, self.folder = dataset, folder
        self.rank = read_rank()
        self.number = itertools.count()
        self.plain: dict[tuple[str, ...], tuple[dict[str, torch.Tensor], list[tuple[float, float]]]] = {}
        self.moments: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}

    def build(self, *settings: str) -> Training:
        run = self.folder / f"run{next(self.number)}"
        config = make_config(self.dataset, run, "train.weight_decay=0.05", "train.log_every=1000", *settings)
        folder = RunFolder(config)
        if self.rank.is_main:
            folder.acquire()
        wait_for_all()
        training = Training(config, self.rank, CPU, load_manifest(self.dataset), folder)
        folder.close()
        return training

    def train_plainly(
        self, *settings: str, steps: tuple[int, ...] = tuple(range(NUM_STEPS))
    ) -> tuple[dict[str, torch.Tensor], list[tuple[float, float]]]:
        """Return the weights after the steps, and loss and gradient norm of each."""
        key = (*settings, str(steps))
        if key not in self.plain:
            plain = PlainTraining(make_config(self.dataset, self.folder, "train.weight_decay=0.05", *settings))
            facts = [plain.step(step) for step in steps]
            self.plain[key] = plain.weights(), facts
            self.moments[key] = plain.moments()
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
        for step, (loss, norm) in enumerate(facts):
            batches = training.stream[step]
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
            moments = self.moments[*settings, str(steps)]
            for stage in STAGES if model == "so3lr" else (STAGES[number % 3],):
                for recompute in (False, True):
                    more = (
                        f"train.zero_stage={stage}",
                        f"train.checkpoint_attention={recompute}",
                        "train.micro_batches=2",
                    )
                    training = self.build(*settings, *more)
                    finding = self.compare_trajectory(training, expected, facts)
                    finding |= compare_moments(self.gather(training), moments, expected)
                    findings[f"{name}, stage {stage}, recompute {recompute}"] = finding
        return findings

    def check_states(self) -> Findings:
        """A gathered state goes into any stage and number of processes and comes out bit for bit."""
        findings: Findings = {}
        states = {}
        for stage in STAGES:
            training = self.build(f"train.zero_stage={stage}")
            for step in range(3):
                do_step(training, step, training.stream[step])
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
        stream = TrainingStream(
            self.dataset, load_manifest(self.dataset), make_config(self.dataset, self.folder), self.rank.rank,
            self.rank.world_size,
        )  # fmt: skip
        for step in range(3, 6):
            do_step(loaded, step, stream[step])
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
                for step in range(3):
                    do_step(training, step, training.stream[step])
                before = self.gather(training)
                batches = training.stream[3]
                if self.rank.rank == self.rank.world_size - 1:
                    DAMAGES[damage](batches[0])
                facts = do_step(training, 3, batches)
                finding: dict[str, Any] = {
                    "applied": facts["applied"],
                    "differences": find_differences(before, self.gather(training)),
                }
                for step in (4, 5):
                    do_step(training, step, training.stream[step])
                after = self.gather(training)
                finding["weights"] = max(float((after[n] - w).abs().max()) for n, w in expected.items())
                findings[f"{damage}, stage {stage}, {micro} micro-batches"] = finding
        return findings


def compare_moments(
    state: dict[str, torch.Tensor], moments: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Compare gradients, and weights where their gradients are more than rounding.

    AdamW divides each gradient by its own size, so a weight whose gradient vanishes (the bias of the charges, which are made to
    add up) walks by what is left of it.
    """
    largest = max(float(m.abs().max()) for m in moments.values())
    finding: dict[str, Any] = {"moments": max(float((state[n] - m).abs().max()) for n, m in moments.items()) / largest}
    deviation = 0.0
    for name, weight in weights.items():
        moment = moments[name.replace("weight.", "exp_avg.", 1)].abs()
        is_sound = moment > 1e-5 * largest
        if is_sound.any():
            deviation = max(deviation, float((state[name] - weight)[is_sound].abs().max()))
    return finding | {"sound weights": deviation}


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
