"""What test_zero.py runs in real processes: one start, many checks; findings go to a JSON file per process.

A step's conformers are dealt unevenly to processes and passes, and some of these get none.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from plain import PlainTraining
from safetensors.torch import load_file, save_file
from training_setup import find_differences, make_config
from zero_cases import (
    COMMON,
    FEW,
    FEW_MODELS,
    GRAPHS_PER_STEP,
    MODEL_STEPS,
    MODELS,
    NUM_STEPS,
    OWN_LOSS,
    PASSES,
    PATHS,
    STAGES,
    STATISTICS,
    WITHOUT_GRADIENT,
    Case,
    deal,
    make_conformers,
)

from so3krates_dist.config import RunConfig
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.distributed import (
    choose_device,
    read_rank,
    reduce_sum,
    seed_everything,
    start_processes,
    stop_processes,
    wait_for_all,
)
from so3krates_dist.errors import ConfigError
from so3krates_dist.graph import GraphBatch, collate
from so3krates_dist.model import geomatt
from so3krates_dist.model.geomatt_paths import choose_path
from so3krates_dist.model.potential import Potential
from so3krates_dist.model.registry import build_model
from so3krates_dist.train import budget, zero3
from so3krates_dist.train.budget import find_limits, fit_cost
from so3krates_dist.train.engine import TrainingEngine
from so3krates_dist.train.losses import LABELS, compute_loss, compute_weights, count_labels
from so3krates_dist.train.optim import compute_learning_rate
from so3krates_dist.train.plain_engine import StepResult
from so3krates_dist.train.probes import Probes
from so3krates_dist.train.self_check import check_engine

Findings = dict[str, dict[str, Any]]


class Checks:
    """All checks of one process.

    Args:
        folder: For findings; states that other processes load lie beside it.
        device: `cpu` or `cuda`.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.folder, self.states = folder, folder.parent / "states"
        self.states.mkdir(exist_ok=True)
        self.rank = read_rank()
        self.device = choose_device(device, self.rank)
        start_processes(self.rank, self.device)
        zero3.LEAST_PIECE = 1  # many small exchanges, whose order matters: what large models have
        graphs = make_conformers(GRAPHS_PER_STEP * NUM_STEPS)
        self.steps = [graphs[i : i + GRAPHS_PER_STEP] for i in range(0, len(graphs), GRAPHS_PER_STEP)]
        self.plain: dict[tuple[Any, ...], tuple[dict[str, torch.Tensor], list[tuple[float, float]]]] = {}
        self.reach: tuple[float, float] = (0.0, 0.0)

    def configure(self, *settings: str) -> RunConfig:
        return make_config("data", "run", *COMMON, *settings)

    def build(self, config: RunConfig) -> TrainingEngine:
        seed_everything(config.run.seed)
        potential = build_model(config.model, STATISTICS).to(self.device)
        self.find_pairs(potential)
        return TrainingEngine(potential, config.train, self.device)

    def find_pairs(self, potential: Potential) -> None:
        """Give the conformers the pairs that a model needs."""
        if potential.cutoffs != self.reach:
            self.reach = potential.cutoffs
            self.steps = [[build_neighbors(g, *self.reach) for g in step] for step in self.steps]

    def use_molecules(self) -> None:
        """Take the cells away, which not all models see."""
        self.steps = [[dataclasses.replace(g, cell=None, pbc=None, stress=None) for g in step] for step in self.steps]
        self.reach = (0.0, 0.0)  # with other pairs, which have no shifts

    def train_plainly(
        self, settings: tuple[str, ...], steps: Sequence[int] = range(NUM_STEPS)
    ) -> tuple[dict[str, torch.Tensor], list[tuple[float, float]]]:
        """Return weights and moments after these steps, and loss and gradient norm of each; on the CPU."""
        key = (settings, tuple(steps))
        if key not in self.plain:
            plain = PlainTraining(self.configure(*settings), STATISTICS)
            self.find_pairs(plain.potential)
            facts = [plain.step(step, collate(self.steps[step])) for step in steps]
            self.plain[key] = plain.get_state(), facts
        return self.plain[key]

    def do_step(
        self, engine: TrainingEngine, config: RunConfig, step: int, passes: str = "varied",
        spoil: Callable[[GraphBatch], None] | None = None,
    ) -> tuple[float, StepResult]:  # fmt: skip
        """Do a step; `spoil` damages the batch of the last but one pass of the last process."""
        portions = deal(self.steps[step], step, self.rank.world_size, PASSES[passes])
        sums = [sum(count_labels(b)[i] for own in portions for b in own) for i in range(len(LABELS))]
        own = portions[self.rank.rank]
        if spoil is not None and self.rank.rank == self.rank.world_size - 1:
            spoil(own[-2])
        total = 0.0
        for number, conformers in enumerate(own, 1):
            batch = conformers.to(self.device, engine.dtype)
            weights = compute_weights(step, config.train)
            loss, _ = compute_loss(engine.forward(batch), batch, sums, config.train, weights, STATISTICS.energy_scale)
            engine.backward(loss, is_last=number == len(own))
            total += float(loss.detach())
        total = reduce_sum([total], self.device)[0]
        if spoil is _enlarge_label:  # the guard is asked first, whether the gradient is finite or not
            assert total == float("inf")
            engine.discard()
            return total, StepResult(float("nan"), False)
        return total, engine.step(compute_learning_rate(step, config.train))

    # ------------------------------------------------------------------------------------------------------------ checks

    def check_trajectories(self, cases: Sequence[Case]) -> Findings:
        """Weights, moments, losses and norms are those of plain torch on the global batches."""
        findings = {}
        for case in cases:
            config = self.configure(*case.settings)
            engine = self.build(config)
            plain = dataclasses.replace(case, stage=0, checkpointing="none", offload=False)
            findings[str(case)] = self.compare(engine, config, case.passes, *self.train_plainly(plain.settings))
        return findings

    def compare(
        self, engine: TrainingEngine, config: RunConfig, passes: str, expected: dict[str, torch.Tensor],
        facts: Sequence[tuple[float, float]],
    ) -> dict[str, Any]:  # fmt: skip
        """Train, and compare with what plain torch found in as many steps."""
        start = engine.gather_state()
        finding: dict[str, Any] = {"loss": 0.0, "norm": 0.0, "clipped": 0}
        for step, (loss, norm) in enumerate(facts):
            found, result = self.do_step(engine, config, step, passes)
            finding["loss"] = max(finding["loss"], abs(found / loss - 1))
            finding["norm"] = max(finding["norm"], abs(result.gradient_norm / norm - 1))
            finding["clipped"] += norm > (config.train.gradient_clipping or float("inf"))
        state = engine.gather_state()
        weights = [name for name in expected if name.startswith("weight.")]
        gradients = {name.partition(".")[2]: t for name, t in expected.items() if name.startswith("exp_avg.")}
        largest = max(float(t.abs().max()) for t in gradients.values())
        finding["gradients"] = max(
            float((state[f"exp_avg.{name}"] - t).abs().max()) / largest for name, t in gradients.items()
        )
        relative = {n: 0.0 if n == WITHOUT_GRADIENT else measure(state[n], expected[n]) for n in weights}
        finding["weights"] = max(relative.values())
        finding["worst"] = max(weights, key=lambda name: relative[name])
        finding["absolute"] = max(float((state[n] - expected[n]).abs().max()) for n in weights)
        finding["motion"] = max(float((state[n] - start[n]).abs().max()) for n in weights)
        finding["steps"] = int(state["optimizer_steps"])
        finding["sizes"] = {n: t.nbytes for n, t in state.items()} == engine.state_sizes()
        return finding

    def check_models(self, names: Sequence[str] = tuple(MODELS)) -> Findings:
        """Every model at stage 3 and one other stage; only some processes and passes have labels of SO3LR's heads."""
        findings: Findings = {}
        self.use_molecules()
        for number, name in enumerate(names):
            options = MODELS[name]
            model = name.partition(",")[0]
            settings = [f"model.name={model}", *(f"model.{option}" for option in options.split())]
            settings += ["train.stress_weight=0", *(OWN_LOSS if name == "so3lr" else ())]
            others = ((3, "blocks"), (number % 3, "none" if "geomatt" in model else "low_memory"))
            for stage, checkpointing in ((3, "none"), *others) if name == "so3lr" else others:
                more = (f"train.zero_stage={stage}", f"train.activation_checkpointing={checkpointing}")
                config = self.configure(*settings, *more)
                engine = self.build(config)
                expected = self.train_plainly(tuple(settings), range(MODEL_STEPS))
                findings[f"{name}, stage {stage}, {checkpointing}"] = self.compare(engine, config, "varied", *expected)
        return findings

    def check_paths(self) -> Findings:
        """Processes that take different ways through a model exchange gradients of the same weights.

        Ewald sums are over conformers with a cell, which some passes of some processes do not have. Of GeomAtt's two paths the
        first process takes one in all passes, the second the other.
        """
        findings: Findings = {}
        algorithm = ("dense", "neighbor_list")[self.rank.rank % 2]
        for name, options in PATHS.items():
            if "ewald" in name and not find_spec("torchpme"):
                continue
            model = name.partition(",")[0]
            settings = [f"model.name={model}", *(f"model.{option}" for option in options.split())]
            settings += OWN_LOSS if model == "so3lr" else ["train.stress_weight=0"]
            if model == "geomatt":
                self.use_molecules()
            expected = self.train_plainly(tuple(settings), range(MODEL_STEPS))
            with mock.patch.object(
                geomatt, "choose_path", lambda batch, pairs, _: choose_path(batch, pairs, algorithm)
            ):
                for stage in (1, 2, 3):
                    config = self.configure(*settings, f"train.zero_stage={stage}")
                    engine = self.build(config)
                    findings[f"{name}, stage {stage}"] = self.compare(engine, config, "varied", *expected)
        return findings

    def check_states(self, pattern: str = "*") -> Findings:
        """A state goes into any stage and number of processes, comes out bit for bit, and training goes on."""
        findings: Findings = {}
        settings = ("train.optimizer=amsgrad",)
        plain, _ = self.train_plainly(settings, range(4))
        engines = {}
        for stage in STAGES:
            config = self.configure(
                *settings, f"train.zero_stage={stage}", f"train.offload_optimizer={stage in (2, 3)}"
            )
            engines[stage] = self.build(config), config
            for step in range(3):
                self.do_step(*engines[stage], step)
            state = engines[stage][0].gather_state(lambda _: self.rank.is_main)
            if self.rank.is_main:
                save_file(state, self.states / f"{self.rank.world_size} to stage {stage}.safetensors")
            else:
                assert not state, "only what is to be kept is kept"
            self.do_step(*engines[stage], 4)  # away from what is loaded
        wait_for_all()
        for path in sorted(self.states.glob(f"{pattern}.safetensors")):
            state = load_file(path)
            state["mean.of something else"] = torch.ones(3)
            for stage, (engine, config) in engines.items():
                before = find_differences(engine.gather_state(), state)
                engine.load_state(state)
                after = engine.gather_state() | {"mean.of something else": torch.ones(3)}
                finding = {"before": len(before), "differences": find_differences(state, after)}
                self.do_step(engine, config, 3)
                after = engine.gather_state()
                finding["weights"] = max(measure(after[n], t) for n, t in plain.items() if n.startswith("weight."))
                finding["steps"] = int(after["optimizer_steps"])
                findings[f"{path.stem} into {self.rank.world_size}, stage {stage}"] = finding
        return findings

    def check_interruptions(self) -> Findings:
        """What is not finite in one pass of one process, or given up: nothing is changed, and training goes on."""
        findings: Findings = {}
        plain, _ = self.train_plainly(("train.gradient_clipping=0.3",), (0, 2, 4, 5))
        for stage, offload in (*((stage, False) for stage in STAGES), (2, True), (3, True)):
            more = f"train.offload_optimizer={str(offload).lower()}"
            config = self.configure("train.gradient_clipping=0.3", f"train.zero_stage={stage}", more)
            engine = self.build(config)
            finding: dict[str, Any] = {"applied": [], "differences": {}}
            for step in (0, 2):
                self.do_step(engine, config, step)
            for kind, spoil in DAMAGES.items():
                before = engine.gather_state()
                _, result = self.do_step(engine, config, 3, spoil=spoil)
                finding["applied"].append(result.applied)
                finding["differences"] |= {kind: find_differences(before, engine.gather_state())}
            for is_last in (False, True):
                before = engine.gather_state()
                self.give_up(engine, is_last)
                finding["differences"] |= {f"last {is_last}": find_differences(before, engine.gather_state())}
            for step in (4, 5):
                self.do_step(engine, config, step)
            state = engine.gather_state()
            finding["weights"] = max(measure(state[n], t) for n, t in plain.items() if n.startswith("weight."))
            findings[f"stage {stage}, offload {offload}"] = finding
        return findings

    def give_up(self, engine: TrainingEngine, is_last: bool) -> None:
        """Do passes of a step, with large gradients, and forget them; evaluate in between."""
        own = deal(self.steps[3], 3, self.rank.world_size)[self.rank.rank]
        for number, conformers in enumerate(own, 1):
            batch = conformers.to(self.device, engine.dtype)
            engine.backward(
                1e3 * engine.forward(batch)["forces"].square().sum(), is_last=is_last and number == len(own)
            )
            lent = [weight.shape for group in engine.lend_weights() for weight in group]
            assert lent == list(engine._shapes.values())
        engine.forward(batch)  # and one that is left without its backward pass
        engine.discard()

    def check_weights(self) -> Findings:
        """Weights can be read whole; at stage 3 they are in parts all the rest of the time."""
        findings: Findings = {}
        for stage in STAGES:
            config = self.configure(f"train.zero_stage={stage}")
            engine = self.build(config)
            self.do_step(engine, config, 0)
            state = engine.gather_state()
            names = [name for name, _ in engine.potential.named_parameters()]
            outputs = engine.forward(collate(self.steps[1]).to(self.device))
            finding: dict[str, Any] = {"held": sum(w.numel() for w in engine.potential.parameters())}
            if stage == 3:  # by autograd; a single process has them all in one piece
                finding["kept"] = len(engine._weights._storages._known) if self.rank.world_size > 1 else 0
            engine.backward(outputs["forces"].sum() * 0.0, is_last=True)
            engine.discard()
            weights = [weight.cpu().clone() for group in engine.lend_weights() for weight in group]
            finding["equal"] = all(torch.equal(w, state[f"weight.{n}"]) for n, w in zip(names, weights, strict=True))
            finding["held after"] = sum(w.numel() for w in engine.potential.parameters())
            finding["total"] = sum(t.numel() for n, t in state.items() if n.startswith("weight."))
            findings[f"stage {stage}"] = finding
        return findings

    def check_self_check(self) -> Findings:
        """It finds nothing where nothing is wrong, leaves no trace, and says on all processes what is wrong where something is."""
        findings: Findings = {}
        graphs = self.steps[0][:3]
        rounded = ((1, False, "blocks", "bf16-mixed"), (3, False, "none", "bf16-mixed"))
        for stage, offload, checkpointing, precision in (
            (0, False, "blocks", "float32"),
            (1, True, "low_memory", "float32"),
            (2, False, "none", "float32"),
            (3, True, "blocks", "float32"),
            *(rounded if self.rank.world_size > 1 else ()),
        ):
            config = self.configure(
                f"train.zero_stage={stage}", f"train.offload_optimizer={str(offload).lower()}",
                f"train.activation_checkpointing={checkpointing}", f"train.precision={precision}",
            )  # fmt: skip
            engine = self.build(config)
            finding: dict[str, Any] = {}
            for moment in ("start", "later"):
                before = engine.gather_state() | {"random": torch.random.get_rng_state()}
                arguments = (graphs, config.train, self.rank, self.device)
                finding[moment] = check_engine(engine, graphs[:1] if moment == "later" else graphs, *arguments[1:])
                after = engine.gather_state() | {"random": torch.random.get_rng_state()}
                finding[f"{moment} differences"] = find_differences(before, after)
                self.do_step(engine, config, 0)
            engine.__class__ = ForgetfulEngine
            engine.kept = 0.9 if precision == "float32" else 0.5
            before = engine.gather_state()
            try:
                check_engine(engine, *arguments)
            except ConfigError as error:
                finding["refusal"] = str(error)
            finding["refusal differences"] = find_differences(before, engine.gather_state())
            findings[f"stage {stage}, {precision}"] = finding
        return findings

    def check_measurements(self) -> Findings:
        """Rank 0 measures in the middle of a step, the others wait: all hear the same, and nothing is changed."""
        findings: Findings = {}
        for name, seconds in (("MIN_SECONDS", 0.01), ("MAX_SECONDS", 0.1)):
            setattr(budget, name, seconds)  # of passes that are measured; a real run takes longer ones
        probes = self.make_probes()
        for stage in (3,):
            config, states, found = self.configure(f"train.zero_stage={stage}"), [], {}
            for is_measured in (False, True):
                engine = self.build(config)
                self.do_step(engine, config, 0)
                batches = deal(self.steps[2], 2, self.rank.world_size)[self.rank.rank]
                engine.backward(engine.forward(batches[0])["forces"].square().sum(), is_last=False)
                if is_measured:
                    potential = build_model(config.model, STATISTICS).train()
                    own = (4 - 2 * self.rank.rank) * 10**6
                    more = (config.train, self.device, self.rank)
                    limits = find_limits(potential, probes, *more, available_bytes=own)
                    found = limits.to_json() | fit_cost(potential, probes, *more).to_json()
                    found["refused"] = self.refuse(potential, probes, config)
                engine.backward(engine.forward(batches[1])["forces"].square().sum(), is_last=True)
                engine.step(1e-2)
                states.append(engine.gather_state())
            findings[f"stage {stage}"] = {"found": found, "differences": find_differences(*states)}
        return findings

    def make_probes(self) -> Probes:
        """Return different conformers on each process: only those of rank 0 count."""
        graphs = self.steps[self.rank.rank][:3]
        atoms, pairs = zip(*((g.num_atoms, g.num_short_pairs or 0) for g in graphs), strict=True)
        return Probes(tuple(graphs), atoms, pairs, max(atoms), max(pairs), pairs_per_atom=sum(pairs) / sum(atoms))

    def refuse(self, potential: Potential, probes: Probes, config: RunConfig) -> str:
        """Return what a process hears where no conformer fits."""
        try:
            find_limits(potential, probes, config.train, self.device, self.rank, available_bytes=1)
        except ConfigError as error:
            return str(error)
        return ""

    def count_graphs(self) -> list[list[int]]:
        """Return how many conformers each pass of this process has."""
        portions = [deal(graphs, step, self.rank.world_size) for step, graphs in enumerate(self.steps)]
        return [[batch.num_graphs for batch in own[self.rank.rank]] for own in portions]


class ForgetfulEngine(TrainingEngine):
    """An engine that loses some of what the last pass gives: a little, or more where rounding hides a little."""

    kept: float

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        super().backward(loss * (self.kept if is_last else 1.0), is_last=is_last)


def measure(values: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference over the largest entry; of what is zero, the difference itself."""
    return float((values - expected).abs().max()) / (float(expected.abs().max()) or 1.0)


def _spoil_positions(batch: GraphBatch) -> None:
    batch.positions[0] = float("nan")


def _spoil_label(batch: GraphBatch) -> None:
    assert batch.forces is not None
    batch.forces[0, 0] = float("inf")


def _enlarge_label(batch: GraphBatch) -> None:
    """The error is finite, and so may be the gradient; the loss is not."""
    assert batch.forces is not None
    batch.forces[0, 0] = 1e30


DAMAGES = {"nan position": _spoil_positions, "infinite label": _spoil_label, "huge label": _enlarge_label}


def run_checks(folder: Path, world_size: int) -> int:
    """Run all checks and write `findings<rank>.json`."""
    checks = Checks(folder)
    findings: dict[str, Any] = {
        "trajectories": checks.check_trajectories(FEW),
        "graphs": checks.count_graphs(),
        "weights": checks.check_weights(),
        "states": checks.check_states(),
        "interruptions": checks.check_interruptions(),
        "self-check": checks.check_self_check(),
    }
    if world_size == 2:
        findings["measurements"] = checks.check_measurements()
        findings["paths"] = checks.check_paths()  # cells are in use until then
        findings["models"] = checks.check_models(FEW_MODELS)
    return write_findings(checks, findings)


def run_states(folder: Path) -> int:
    """Load what the other number of processes has left."""
    checks = Checks(folder)
    return write_findings(checks, {"states": checks.check_states("2 *")})


def run_models(folder: Path) -> int:
    """Compare all models."""
    checks = Checks(folder)
    return write_findings(checks, {"models": checks.check_models()})


def run_trajectories(folder: Path, cases: Sequence[Case], device: str = "cpu") -> int:
    """Compare all of these cases."""
    checks = Checks(folder, device)
    return write_findings(checks, {"trajectories": checks.check_trajectories(cases)})


def write_findings(checks: Checks, findings: dict[str, Any]) -> int:
    (checks.folder / f"findings{checks.rank.rank}.json").write_text(json.dumps(findings, indent=1))
    stop_processes()
    return 0
