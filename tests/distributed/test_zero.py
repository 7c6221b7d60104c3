"""Training under ZeRO 0 to 3 on one and on two processes is plain AdamW on the global batches, to rounding.

Forces and stress are in the loss, so every step differentiates twice. Each number of processes is started once for all checks, and
a single process once more, to load what two have left.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from training_setup import make_config, started, wait
from zero_cases import (
    ALL,
    COMMON,
    FEW,
    FEW_MODELS,
    GRAPHS_PER_STEP,
    MODELS,
    NUM_STEPS,
    OWN_LOSS,
    PASSES,
    PATHS,
    STAGES,
    STATISTICS,
    Case,
    make_conformers,
)
from zero_checks import run_checks, run_models, run_states, run_trajectories

from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.graph import collate
from so3krates_dist.model.registry import build_model
from so3krates_dist.train.losses import compute_loss, compute_weights, count_labels
from so3krates_dist.train.plain_engine import PlainEngine

pytestmark = pytest.mark.timeout(900)
WORLD_SIZES = (1, 2)
LIMIT_SECONDS = 400
"""for all checks of one start, which take a sixth of that where nothing else runs"""
TOLERANCE = 1e-6
"""of weights after eight steps, over the largest entry of each tensor"""
LOW_MEMORY_TOLERANCE = 5e-6
"""Two passes round otherwise than one with a second derivative; that both are the same is tested in float64"""
EWALD_TOLERANCE = 2e-5
"""Ewald sums round more: 4e-6 were found, of a tensor whose entries are all small"""
USUAL_EPSILON_TOLERANCE = 5e-7
"""with an epsilon of 1e-8 in Adam, which magnifies what is left of gradients that vanish; weights move by 1e-2"""
Findings = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    """Return what each process found, by the number of processes; under 0 what one process found about the states of two."""
    root = tmp_path_factory.mktemp("zero")
    results = {n: launch(root / f"processes{n}", n, run_checks, n) for n in WORLD_SIZES}
    return results | {0: launch(root / "again", 1, run_states)}


def launch(folder: Path, world_size: int, function: Any, *arguments: Any) -> list[dict[str, Any]]:
    """Return what each process found."""
    with started(folder, world_size, function, folder, *arguments) as processes:
        outcome = wait(folder, processes, LIMIT_SECONDS)
    assert outcome.codes == (0,) * world_size, str(outcome)
    return [json.loads((folder / f"findings{rank}.json").read_text()) for rank in range(world_size)]


def report(deviations: dict[str, float], tolerance: float) -> None:
    """Fail with all deviations, the largest first."""
    bad = {k: v for k, v in deviations.items() if not v <= tolerance}
    lines = [f"{v:.2e}  {k}" for k, v in sorted(bad.items(), key=lambda item: -item[1])]
    assert not bad, f"{len(bad)} of {len(deviations)} deviate by more than {tolerance}:\n" + "\n".join(lines)


def check_trajectories(found: list[dict[str, Any]], cases: tuple[Case, ...]) -> None:
    """Weights, losses, gradients and norms are those of plain torch, on all processes."""
    trajectories = found[0]["trajectories"]
    assert set(trajectories) == {str(case) for case in cases}
    assert all(c["motion"] > 2e-3 for c in trajectories.values()), (
        "weights must move for the comparison to mean something"
    )
    assert {c["steps"] for c in trajectories.values()} == {NUM_STEPS}
    assert all(c["sizes"] for c in trajectories.values())
    kinds = {
        str(c): "usual" if c.epsilon < 1e-6 else "low" if c.checkpointing == "low_memory" else "exact" for c in cases
    }
    named = {f"{name} ({case['worst']})": (kinds[name], case) for name, case in trajectories.items()}
    report({name: c["weights"] for name, (kind, c) in named.items() if kind == "exact"}, TOLERANCE)
    report({name: c["weights"] for name, (kind, c) in named.items() if kind == "low"}, LOW_MEMORY_TOLERANCE)
    report({name: c["absolute"] for name, (kind, c) in named.items() if kind == "usual"}, USUAL_EPSILON_TOLERANCE)
    for own in found:
        report({f"loss, {name}": c["loss"] for name, c in own["trajectories"].items()}, 2e-6)
        report({f"norm, {name}": c["norm"] for name, c in own["trajectories"].items()}, 5e-6)
        report({f"gradients, {name}": c["gradients"] for name, c in own["trajectories"].items()}, 2e-6)
    for case in cases:
        assert (trajectories[str(case)]["clipped"] > NUM_STEPS // 2) == (case.clipping > 0), case


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_training_is_that_of_plain_torch(findings: Findings, world_size: int) -> None:
    check_trajectories(findings[world_size], FEW)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_training_is_that_of_plain_torch_in_every_combination(tmp_path: Path, world_size: int) -> None:
    check_trajectories(launch(tmp_path, world_size, run_trajectories, ALL), ALL)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_on_a_gpu_is_that_of_plain_torch_on_a_cpu(tmp_path: Path) -> None:
    found = launch(tmp_path, 1, run_trajectories, FEW, "cuda")[0]["trajectories"]
    report({name: case["weights"] for name, case in found.items()}, 1e-4)
    report({name: case["loss"] for name, case in found.items()}, 1e-5)


def test_passes_varied_and_some_were_empty(findings: Findings) -> None:
    for world_size in WORLD_SIZES:
        graphs = [own["graphs"] for own in findings[world_size]]
        assert {len(passes) for passes in graphs[0]} == {1, 2, 3}
        assert [len(passes) for passes in graphs[0]] == list(PASSES["varied"])
        assert all(sum(sum(own[step]) for own in graphs) == GRAPHS_PER_STEP for step in range(NUM_STEPS))
        assert any(passes[-1] == 0 for own in graphs for passes in own), "an empty pass that ends a step"
        assert any(passes[0] == 0 for own in graphs for passes in own), "an empty pass that begins one"
    assert any((one == 0) != (two == 0) for one, two in zip(*map(flatten, graphs), strict=True))


def flatten(passes: list[list[int]]) -> list[int]:
    return [count for step in passes for count in step]


def check_models(found: list[dict[str, Any]], names: Sequence[str]) -> None:
    """Labels of dipoles and Hirshfeld ratios are in the last conformer of each step only, so with one process only."""
    for own in found:
        cases = own["models"]
        assert {name.partition(", stage")[0] for name in cases} == set(names)
        check_steps(cases)


def check_steps(cases: dict[str, Any], tolerance: float = LOW_MEMORY_TOLERANCE) -> None:
    """Weights, losses, gradients and norms are those of plain torch; `tolerance` is that of weights."""
    assert all(c["motion"] > 1e-3 for c in cases.values())
    report({f"loss {name}": c["loss"] for name, c in cases.items()}, 5e-6)
    report({f"norm {name}": c["norm"] for name, c in cases.items()}, 1e-5)
    report({f"gradients {name}": c["gradients"] for name, c in cases.items()}, 5e-6)
    report({f"{name} ({c['worst']})": c["weights"] for name, c in cases.items()}, tolerance)
    report({f"{name}, in itself": c["absolute"] for name, c in cases.items()}, USUAL_EPSILON_TOLERANCE)


def test_models_train_as_in_plain_torch(findings: Findings) -> None:
    check_models(findings[2], FEW_MODELS)


@pytest.mark.parametrize("name", PATHS)
def test_processes_may_take_different_ways_through_a_model(findings: Findings, name: str) -> None:
    """Gradients are exchanged as they come, so they must come in the same order: see the last test."""
    if "ewald" in name:
        pytest.importorskip("torchpme", reason="torch-pme (the extra longrange) is not installed")
    for own in findings[2]:
        cases = {case: c for case, c in own["paths"].items() if case.startswith(name)}
        assert len(cases) == 3, "stages"
        check_steps(cases, EWALD_TOLERANCE if "ewald" in name else LOW_MEMORY_TOLERANCE)


@pytest.mark.slow
def test_every_model_trains_as_in_plain_torch(tmp_path: Path) -> None:
    check_models(launch(tmp_path, 2, run_models), list(MODELS))


@pytest.mark.parametrize("world_size", [*WORLD_SIZES, 0])
def test_a_state_goes_into_any_stage_and_number_of_processes(findings: Findings, world_size: int) -> None:
    """Bit for bit; and training goes on as if it had not stopped."""
    for own in findings[world_size]:
        cases = own["states"]
        assert len(cases) == {1: 16, 2: 32, 0: 16}[world_size]
        assert all(c["before"] > 10 for c in cases.values()), "the engine must have held something else before"
        assert {name: c["differences"] for name, c in cases.items() if c["differences"]} == {}
        assert {c["steps"] for c in cases.values()} == {4}
        report({name: c["weights"] for name, c in cases.items()}, TOLERANCE)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_step_that_is_spoiled_or_given_up_changes_nothing(findings: Findings, world_size: int) -> None:
    """Weights, moments and the optimizer's count are the same bits as before, and training goes on without it."""
    for own in findings[world_size]:
        cases = own["interruptions"]
        assert len(cases) == len(STAGES) + 2
        assert all(c["applied"] == [False] * 3 and len(c["differences"]) == 5 for c in cases.values())
        assert {name: c["differences"] for name, c in cases.items() if any(c["differences"].values())} == {}
        report({name: c["weights"] for name, c in cases.items()}, TOLERANCE)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_weights_can_be_read_whole_and_are_in_parts_at_stage_3(findings: Findings, world_size: int) -> None:
    for own in findings[world_size]:
        for stage in STAGES:
            case = own["weights"][f"stage {stage}"]
            assert case["equal"]
            held = 0 if stage == 3 else case["total"]
            assert (case["held"], case["held after"]) == (held, held)
            assert case.get("kept", 0) == 0, "weights that autograd keeps"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_self_check_finds_what_is_wrong_and_leaves_no_trace(findings: Findings, world_size: int) -> None:
    cases = [own["self-check"] for own in findings[world_size]]
    assert all(case == cases[0] for case in cases), "all processes say the same"
    assert sum("bf16" in name for name in cases[0]) == (2 if world_size > 1 else 0)
    for case in cases[0].values():
        for moment in ("start", "later"):
            assert case[moment].startswith(
                "Self-check: a step of DeepSpeed is one of plain torch (relative deviations: loss "
            )
            assert case[f"{moment} differences"] == {}
        assert case["refusal"].startswith(
            "train.self_check must find that a step of DeepSpeed is one of plain torch; got not the same: relative deviations are"
            " loss "
        )
        assert "train.self_check=false trains nevertheless" in case["refusal"]
        assert case["refusal differences"] == {}


def test_measuring_changes_nothing_and_all_processes_hear_the_same(findings: Findings) -> None:
    cases = [own["measurements"]["stage 3"] for own in findings[2]]
    assert [case["differences"] for case in cases] == [{}, {}]
    assert all(case["found"] == cases[0]["found"] for case in cases)
    assert cases[0]["found"]["available_bytes"] == 2 * 10**6, "the smallest counts"
    assert "data.find_limits must find memory for at least one conformer" in cases[0]["found"]["refused"]


@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_come_in_the_same_order_whatever_a_batch_holds(name: str, checkpointing: str) -> None:
    """Under ZeRO processes exchange them as they come, some at a time: those of one must be the same weights as of another."""
    options = (f"model.{option}" for option in MODELS[name].split())
    settings = (f"model.name={name.partition(',')[0]}", *options, *(OWN_LOSS if name == "so3lr" else ()))
    config = make_config("data", "run", *COMMON, *settings, f"train.activation_checkpointing={checkpointing}")
    section = config.train
    engine = PlainEngine(build_model(config.model, STATISTICS), section, torch.device("cpu"))
    order: list[str] = []
    for weight_name, weight in engine.potential.named_parameters():
        weight.register_post_accumulate_grad_hook(lambda _, name=weight_name: order.append(name))  # type: ignore[no-untyped-call,misc]
    graphs = make_conformers(GRAPHS_PER_STEP)
    if math.inf in engine.potential.cutoffs:  # it takes no cells
        graphs = [dataclasses.replace(g, cell=None, pbc=None, stress=None) for g in graphs]
    graphs = [build_neighbors(g, *engine.potential.cutoffs) for g in graphs]
    counts = [max(c, 1.0) for c in count_labels(collate(graphs))]
    orders = []
    for held in (
        graphs,
        [],
        graphs[:1],
        graphs[1:2],
        graphs[-1:],
    ):  # all, none, with a stress, with none, with a dipole
        batch = collate(held)
        loss, _ = compute_loss(engine.forward(batch), batch, counts, section, compute_weights(0, section), 1.0)
        engine.backward(loss, is_last=True)
        engine.discard()
        orders.append(tuple(order))
        order.clear()
    assert len(orders[0]) > 10
    assert len(set(orders)) == 1
