"""Where a run is, and by which error its best model is chosen."""

import json
import math
from typing import Any

import pytest

from so3krates_dist.config import TrainSection
from so3krates_dist.errors import CheckpointError
from so3krates_dist.train.progress import Progress, compute_score

SUMMARY = {
    "forces_mae": 1.0, "energy_mae_per_atom": 2.0, "stress_mae": 3.0, "dipole_mae": 4.0, "partial_charges_mae": 5.0,
    "hirshfeld_ratios_mae": 6.0,
}  # fmt: skip


class TestProgress:
    @pytest.mark.parametrize("best", [0.25, -3.0, math.inf])
    def test_it_survives_the_way_through_a_file(self, best: float) -> None:
        progress = Progress(step=9, applied=7, data_step=12, best_score=best, scored_on="abc")
        text = json.dumps(progress.to_json(), allow_nan=False)
        assert Progress.from_json(json.loads(text), "here") == progress

    def test_other_entries_of_a_checkpoint_are_passed_over(self) -> None:
        assert Progress.from_json(Progress(step=1, data_step=1).to_json() | {"guard": {}}, "here").step == 1

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"step": None}, "step_1 must say how far the run had come; got TypeError"),
            ({"step": math.inf}, "step_1 must say how far the run had come; got OverflowError"),
            ({"applied": "many"}, "step_1 must say how far the run had come; got ValueError"),
            ({"applied": 4}, "step_1 must count applied steps, steps and data in this order; got 4 applied of 3, 5 of the data"),
            ({"data_step": 2}, "step_1 must count applied steps, steps and data in this order; got 2 applied of 3, 2 of the data"),
            ({"applied": -1}, "step_1 must count applied steps, steps and data in this order; got -1 applied of 3, 5 of the data"),
        ],
    )  # fmt: skip
    def test_what_makes_no_sense_is_refused(self, changes: dict[str, Any], message: str) -> None:
        content = Progress(step=3, applied=2, data_step=5).to_json() | changes
        with pytest.raises(CheckpointError) as caught:
            Progress.from_json(content, "step_1")
        assert str(caught.value).startswith(message)

    def test_a_missing_position_is_refused(self) -> None:
        with pytest.raises(CheckpointError, match="step_1 must say how far the run had come; got KeyError: 'applied'"):
            Progress.from_json({"step": 3}, "step_1")


class TestScore:
    @pytest.mark.parametrize(
        ("weights", "expected"),
        [
            ({}, 1.0),
            ({"forces_weight": 0.0}, 2.0),
            ({"forces_weight": 0.0, "energy_weight": 0.0, "stress_weight": 1.0, "dipole_weight": 1.0}, 3.0),
            ({"forces_weight": 0.0, "energy_weight": 0.0, "charges_weight": 1.0, "hirshfeld_weight": 1.0}, 5.0),
            ({"forces_weight": 0.0, "energy_weight": 0.0, "hirshfeld_weight": 1.0}, 6.0),
            # Trained from some step on: counts all the time, or the best model would be one of before.
            ({"forces_weight": 0.0, "weights_until": 5, "final_forces_weight": 1.0}, 1.0),
        ],
    )
    def test_it_is_the_error_of_the_first_label_that_is_trained(self, weights: dict[str, Any], expected: float) -> None:
        assert compute_score(SUMMARY, TrainSection(**weights)) == expected

    def test_a_label_that_no_held_out_conformer_has_is_passed_over(self) -> None:
        assert compute_score(SUMMARY | {"forces_mae": math.nan}, TrainSection()) == 2.0

    def test_without_any_it_is_never_the_best(self) -> None:
        assert math.isnan(compute_score({}, TrainSection()))
