"""Weights of conformers in the loss: what they may be, and what a manifest says of them."""

import numpy as np
import pytest

from so3krates_dist.data import loss_weights
from so3krates_dist.data.loss_weights import WeightSums
from so3krates_dist.errors import DataError


def count(*values: float) -> WeightSums:
    sums = WeightSums()
    sums.add(np.array(values, np.float32))
    return sums


def test_sums_are_those_of_all_that_went_by() -> None:
    weights = np.random.default_rng(0).uniform(0, 3, 100).astype(np.float32)
    weights[::7] = 1
    whole, first, second = count(*weights), WeightSums(), WeightSums()
    first.add(weights[:30])
    first.add(weights[30:31])
    second.add(weights[31:])
    first.merge(second)
    assert first.describe() == pytest.approx(whole.describe(), rel=1e-11)
    assert whole.describe() == {
        "num_other": 85,
        "min": float(weights.min()),
        "mean": pytest.approx(float(weights.astype(np.float64).mean()), rel=1e-11),
        "max": float(weights.max()),
    }


def test_a_manifest_says_nothing_where_all_are_one() -> None:
    assert loss_weights.summarize({"train": count(1, 1), "test": WeightSums()}) == {}
    found = loss_weights.summarize({"train": count(1, 1), "validation": count(0.5), "test": WeightSums()})
    assert found == {
        "train": {"num_other": 0, "min": 1.0, "mean": 1.0, "max": 1.0},
        "validation": {"num_other": 1, "min": 0.5, "mean": 0.5, "max": 0.5},
    }
    assert loss_weights.find_largest({}) == loss_weights.find_largest(found) == 1.0


def test_summaries_are_compared() -> None:
    one = loss_weights.summarize({"train": count(0, 2, 0.3)})
    near = {"train": {**one["train"], "mean": one["train"]["mean"] * (1 + 1e-11)}}
    assert loss_weights.are_alike(one, near)
    assert loss_weights.are_alike({}, {})
    for name in one["train"]:
        assert not loss_weights.are_alike(one, {"train": {**one["train"], name: one["train"][name] + 1e-6}}), name
    assert not loss_weights.are_alike(one, {})
    assert not loss_weights.are_alike({}, one)


def test_a_line_about_them() -> None:
    found = loss_weights.summarize({"train": count(1, 0, 2.5), "test": count(1)})
    assert loss_weights.describe(found, {"train": 3, "test": 1}) == (
        "loss weights: train 0 to 2.5, mean 1.167, not 1 for 2 of 3; test 1 to 1, mean 1, not 1 for 0 of 1"
    )
    assert loss_weights.describe({}, {"train": 3}) == ""


def test_something_must_be_left_to_learn() -> None:
    loss_weights.check_not_all_zero(loss_weights.summarize({"train": count(0, 0.5), "test": count(0)}), "set")
    loss_weights.check_not_all_zero({}, "set")
    message = (
        r"set must have a loss_weight above zero in its training split; got zero for all\. .* --keys loss_weight=KEY"
    )
    with pytest.raises(DataError, match=message):
        loss_weights.check_not_all_zero(loss_weights.summarize({"train": count(0, 0), "test": count(1)}), "set")
