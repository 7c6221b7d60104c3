"""Training under ZeRO stages 0, 1 and 2 on one and on two processes is plain AdamW on the global batches, to rounding.

Forces are in the loss, so every step differentiates twice. Each number of processes is started once for all checks.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from training_setup import make_dataset, run_processes
from zero_checks import MODELS, NUM_STEPS, make_labelled_dataset, run_checks

WORLD_SIZES = (2, 1)
"""Two first: what they gather is loaded by one"""
TOLERANCE = 5e-7
"""largest difference of a weight; weights move by 1e-2"""


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """Return what each process found, by the number of processes."""
    root = tmp_path_factory.mktemp("zero")
    dataset, labelled = make_dataset(root / "data"), make_labelled_dataset(root / "labelled")
    results = {}
    for world_size in WORLD_SIZES:
        folder = root / f"processes{world_size}"
        outcome = run_processes(folder, world_size, run_checks, dataset, labelled, folder)
        assert outcome.codes == (0,) * world_size, str(outcome)
        results[world_size] = [read(folder / f"findings{r}.json") for r in range(world_size)]
    return results


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def report(deviations: dict[str, float], tolerance: float) -> None:
    """Fail with all deviations, the largest first."""
    bad = {k: v for k, v in deviations.items() if not v <= tolerance}
    lines = [f"{v:.2e}  {k}" for k, v in sorted(bad.items(), key=lambda item: -item[1])]
    assert not bad, f"{len(bad)} of {len(deviations)} deviate by more than {tolerance}:\n" + "\n".join(lines)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
class TestTrajectories:
    def test_weights_are_those_of_plain_adamw(self, findings: Any, world_size: int) -> None:
        cases = findings[world_size][0]["trajectories"]
        assert len(cases) == 21
        assert all(c["motion"] > 5e-3 for c in cases.values()), (
            "the weights must move for the comparison to mean something"
        )
        report({name: c["weights"] for name, c in cases.items()}, TOLERANCE)

    def test_loss_and_gradient_norm_are_those_of_the_global_batch(self, findings: Any, world_size: int) -> None:
        for rank in range(world_size):
            cases = findings[world_size][rank]["trajectories"]
            report({f"loss {name}": c["loss"] for name, c in cases.items()}, 2e-6)
            report({f"norm {name}": c["norm"] for name, c in cases.items()}, 2e-5)

    def test_clipping_was_active_where_it_was_asked_for(self, findings: Any, world_size: int) -> None:
        for name, case in findings[world_size][0]["trajectories"].items():
            assert (case["clipped"] > NUM_STEPS // 2) == ("clip 0.0" not in name), f"{name}: {case['clipped']} steps"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_model_trains_as_in_plain_torch(findings: Any, world_size: int) -> None:
    cases = findings[world_size][0]["models"]
    assert len(cases) == 2 * (len(MODELS) + 4)
    assert all(c["motion"] > 2e-3 for c in cases.values())
    report({f"loss {name}": c["loss"] for name, c in cases.items()}, 5e-6)
    report({f"norm {name}": c["norm"] for name, c in cases.items()}, 5e-5)
    report({f"gradients {name}": c["moments"] for name, c in cases.items()}, 5e-6)
    report({name: c["sound weights"] for name, c in cases.items()}, TOLERANCE)
    assert {name: c["sound"] for name, c in cases.items() if c["sound"] < 0.6} == {}, "not enough was compared"
    if world_size == 2:
        assert all(any(0 in counts for counts in c["graphs"]) for c in cases.values()), "portions without conformers"


def test_ranks_held_different_numbers_of_atoms(findings: Any) -> None:
    first, second = (findings[2][r]["trajectories"] for r in range(2))
    assert all(first[name]["atoms"] != second[name]["atoms"] for name in first)


def test_some_processes_had_nothing_to_do(findings: Any) -> None:
    cases = findings[2][1]["trajectories"]
    idle = [counts for name, case in cases.items() if "batch 1" in name for counts in case["graphs"]]
    assert len(idle) == 3 * NUM_STEPS
    assert not any(map(any, idle)), "the first steps of single conformers belong to the first rank"
    portions = [counts for name, case in cases.items() if "batch 2" in name for counts in case["graphs"]]
    assert any(0 in counts and 1 in counts for counts in portions), "one portion empty, the other not"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
class TestStates:
    def test_a_state_goes_in_and_out_bit_for_bit(self, findings: Any, world_size: int) -> None:
        """Also from two processes to one, and from any stage to any other."""
        for rank in range(world_size):
            cases = findings[world_size][rank]["states"]
            assert len(cases) == (9 if world_size == 2 else 18)
            assert all(c["before"] > 10 for c in cases.values()), "the engine must have held something else before"
            assert {name: c["differences"] for name, c in cases.items() if c["differences"]} == {}

    def test_training_goes_on_as_if_it_had_not_stopped(self, findings: Any, world_size: int) -> None:
        cases = findings[world_size][0]["states"]
        assert {c["steps"] for c in cases.values()} == {6}
        report({name: c["weights"] for name, c in cases.items()}, TOLERANCE)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
class TestSkippedSteps:
    def test_a_step_that_is_not_finite_on_one_process_changes_nothing_on_any(
        self, findings: Any, world_size: int
    ) -> None:
        """Weights, moments, the optimizer's count and the mean of the weights are the same bits as before."""
        for rank in range(world_size):
            cases = findings[world_size][rank]["skipped"]
            assert len(cases) == 12
            assert {name: c["applied"] for name, c in cases.items() if c["applied"]} == {}
            assert {name: c["differences"] for name, c in cases.items() if c["differences"]} == {}

    def test_training_goes_on_as_if_the_step_had_not_been(self, findings: Any, world_size: int) -> None:
        report({name: c["weights"] for name, c in findings[world_size][0]["skipped"].items()}, TOLERANCE)
