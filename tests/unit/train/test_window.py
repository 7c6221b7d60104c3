"""Figures between two lines of the log. Times are set by hand: no test waits for a clock."""

import math

import pytest

from so3krates_dist.train import window as module
from so3krates_dist.train.window import StepWindow

STEP = {
    "loss": 2.0, "energy_mae_per_atom": 0.1, "forces_mae": 0.3, "gradient_norm": 4.0, "learning_rate": 1e-3, "conformers": 8.0,
    "applied": 1.0,
}  # fmt: skip


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_means_rates_and_shares(clock: Clock) -> None:
    window = StepWindow()
    for loss in (2.0, 4.0):
        with window.waiting():
            clock.now += 1.0
        clock.now += 3.0
        window.add(STEP | {"loss": loss, "learning_rate": loss * 1e-3})
    figures = window.summarize({"epoch": 1.5})
    assert figures == {
        "loss": 3.0, "energy_mae_per_atom": 0.1, "forces_mae": 0.3, "gradient_norm": 4.0, "learning_rate": 4e-3,
        "skipped_steps": 0.0, "conformers_per_second": 2.0, "seconds_per_step": 4.0, "data_wait_share": 0.25, "epoch": 1.5,
    }  # fmt: skip


def test_evaluating_and_saving_do_not_count(clock: Clock) -> None:
    window = StepWindow()
    clock.now += 2.0
    window.add(STEP)
    with window.pausing():
        clock.now += 1000.0
    assert window.summarize({"epoch": 0.0})["conformers_per_second"] == 4.0


def test_each_line_begins_anew(clock: Clock) -> None:
    window = StepWindow()
    clock.now += 50.0
    with window.waiting():
        clock.now += 50.0
    window.add(STEP | {"loss": 1e9})
    window.summarize({"epoch": 0.0})
    clock.now += 2.0
    window.add(STEP)
    figures = window.summarize({"epoch": 0.0})
    assert figures["loss"] == 2.0
    assert figures["seconds_per_step"] == 2.0
    assert figures["data_wait_share"] == 0.0


def test_skipped_steps_do_not_spoil_the_means(clock: Clock) -> None:
    window = StepWindow()
    clock.now += 1.0
    window.add(STEP)
    window.add(STEP | {"loss": math.nan, "gradient_norm": math.inf, "applied": 0.0})
    figures = window.summarize({"epoch": 0.0})
    assert (figures["loss"], figures["gradient_norm"], figures["skipped_steps"]) == (2.0, 4.0, 1.0)
    window.add(STEP | {"loss": math.nan, "applied": 0.0})
    assert math.isnan(window.summarize({"epoch": 0.0})["loss"]), "nothing was learned: no figure"


def test_a_step_without_some_label_does_not_count_for_it() -> None:
    window = StepWindow()
    for energy in (0.2, math.nan, 0.4):
        window.add(STEP | {"energy_mae_per_atom": energy})
    assert window.summarize({"epoch": 1.0})["energy_mae_per_atom"] == pytest.approx(0.3)
    window.add(STEP | {"energy_mae_per_atom": math.nan})
    assert math.isnan(window.summarize({"epoch": 1.0})["energy_mae_per_atom"])


def test_weights_of_the_loss_are_those_of_the_last_step() -> None:
    window = StepWindow()
    for weight in (0.1, 0.2):
        window.add(STEP | {"weight/energy": weight, "weight/forces": 1.0})
    figures = window.summarize({"epoch": 1.0})
    assert {name: value for name, value in figures.items() if "weight" in name} == {
        "weight/energy": 0.2,
        "weight/forces": 1.0,
    }
    window.add(STEP)
    assert not any("weight" in name for name in window.summarize({"epoch": 1.0}))
