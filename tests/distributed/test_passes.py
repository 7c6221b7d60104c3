"""Steps of any number of passes: the weights are those of plain AdamW on the global batches, to rounding, at every ZeRO stage.

The number of passes varies from step to step, and some passes of some processes are empty.
"""

import json
from typing import Any

import pytest
from pass_checks import CLIPPING, GRAPHS_PER_STEP, PASSES, SPOILED_STEP, STAGES, run_pass_checks
from test_zero import TOLERANCE, report
from training_setup import run_processes


@pytest.fixture(scope="module", params=[1, 2])
def findings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what each process found."""
    folder = tmp_path_factory.mktemp("passes")
    outcome = run_processes(folder, request.param, run_pass_checks, folder)
    assert outcome.codes == (0,) * request.param, str(outcome)
    return [json.loads((folder / f"findings{rank}.json").read_text()) for rank in range(request.param)]


def test_weights_are_those_of_plain_adamw(findings: list[dict[str, Any]]) -> None:
    cases = findings[0]["trajectories"]
    assert len(cases) == len(STAGES) * len(CLIPPING)
    assert all(c["motion"] > 5e-3 for c in cases.values()), "weights must move for the comparison to mean something"
    assert {c["optimizer_steps"] for c in cases.values()} == {len(PASSES)}
    report({name: c["weights"] for name, c in cases.items()}, TOLERANCE)


def test_loss_and_gradient_norm_are_those_of_the_global_batch(findings: list[dict[str, Any]]) -> None:
    for own in findings:
        cases = own["trajectories"]
        report({f"loss {name}": c["loss"] for name, c in cases.items()}, 2e-6)
        report({f"norm {name}": c["norm"] for name, c in cases.items()}, 2e-5)
        for name, case in cases.items():
            assert (case["clipped"] > len(PASSES) // 2) == ("clip 0.0" not in name), f"{name}: {case['clipped']} steps"


def test_a_step_that_is_spoiled_or_given_up_changes_nothing(findings: list[dict[str, Any]]) -> None:
    """Weights, moments and the optimizer's count are the same bits as before, and training goes on without it."""
    for own in findings:
        cases = own["interruptions"]
        assert len(cases) == len(STAGES) * 3
        assert {name: c["applied"] for name, c in cases.items() if c["applied"]} == {}
        assert {name: c["differences"] for name, c in cases.items() if c["differences"]} == {}
        report({name: c["weights"] for name, c in cases.items()}, TOLERANCE)


def test_measuring_changes_nothing_and_all_processes_hear_the_same(findings: list[dict[str, Any]]) -> None:
    for stage in STAGES:
        cases = [own["measurements"][f"stage {stage}"] for own in findings]
        assert [case["differences"] for case in cases] == [{}] * len(findings)
        assert all(case["found"] == cases[0]["found"] for case in cases)
        assert cases[0]["found"]["available_bytes"] == (4, 2)[len(findings) - 1] * 10**6, "the smallest counts"
        assert "data.find_limits must find memory for at least one conformer" in cases[0]["found"]["refused"]


def test_passes_varied_and_some_were_empty(findings: list[dict[str, Any]]) -> None:
    graphs = [own["graphs"] for own in findings]
    assert {len(passes) for passes in graphs[0]} == {1, 2, 3}
    assert all(sum(sum(own[step]) for own in graphs) == GRAPHS_PER_STEP for step in range(len(PASSES)))
    assert graphs[-1][SPOILED_STEP][1] > 0, "what is spoiled must hold something"
    assert any(passes[-1] == 0 for own in graphs for passes in own), "an empty pass that ends a step"
    assert any(passes[0] == 0 for own in graphs for passes in own), "an empty pass that begins one"
    if len(findings) == 2:
        assert any((first == 0) != (second == 0) for first, second in zip(*map(flatten, graphs), strict=True))


def flatten(passes: list[list[int]]) -> list[int]:
    return [count for step in passes for count in step]
