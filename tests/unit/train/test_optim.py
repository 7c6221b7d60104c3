"""Optimizer, learning rate and the mean of the weights."""

import itertools
import math

import pytest
import torch
from torch import nn
from training_setup import make_config

from so3krates_dist.config import TrainSection
from so3krates_dist.model.potential import ModelStatistics, Potential
from so3krates_dist.model.registry import build_model
from so3krates_dist.train.optim import WeightMean, build_optimizer, compute_learning_rate

STATISTICS = ModelStatistics(elements=(1,), energy_baselines={1: -13.6}, energy_scale=2.0, mean_neighbors=3.0)


@pytest.fixture
def potential() -> Potential:
    torch.manual_seed(0)
    return build_model(make_config("data", "run", "model.normalization=post").model, STATISTICS)


class TestOptimizer:
    def test_weight_matrices_decay_and_nothing_else(self, potential: Potential) -> None:
        decayed, free = build_optimizer(potential, TrainSection(weight_decay=0.1)).param_groups
        assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
        names = {id(p): n for n, p in potential.named_parameters()}
        chosen = {names[id(p)] for p in decayed["params"]}
        rest = {names[id(p)] for p in free["params"]}
        assert chosen | rest == set(names.values())
        assert not chosen & rest
        assert "network.readout.weight" in chosen
        assert not any(n.endswith("bias") or "norm" in n or "embedding" in n for n in chosen)
        assert {"network.embedding.weight", "network.readout.bias"} <= rest
        assert all(n.endswith("bias") or "norm" in n or "embedding" in n for n in rest), rest

    def test_settings_arrive(self, potential: Potential) -> None:
        section = TrainSection(adam_beta1=0.8, adam_beta2=0.95, learning_rate=3e-4)
        for group in build_optimizer(potential, section).param_groups:
            assert (group["betas"], group["lr"]) == ((0.8, 0.95), 3e-4)


class TestLearningRate:
    SECTION = TrainSection(num_steps=100, warmup_steps=10, learning_rate=1e-3, final_learning_rate=1e-5)

    def test_it_rises_linearly_and_falls_as_half_a_cosine(self) -> None:
        rates = [compute_learning_rate(s, self.SECTION) for s in range(100)]
        assert rates[:10] == pytest.approx([1e-3 * (k + 1) / 11 for k in range(10)])
        assert rates[10] == 1e-3
        assert rates[99] == pytest.approx(1e-5)
        middle = (rates[54] + rates[55]) / 2
        assert middle == pytest.approx((1e-3 + 1e-5) / 2, rel=1e-3)
        assert all(a > b for a, b in itertools.pairwise(rates[10:]))

    def test_beyond_the_end_it_stays(self) -> None:
        assert compute_learning_rate(10**6, self.SECTION) == pytest.approx(1e-5)

    def test_without_warm_up_it_starts_at_the_top(self) -> None:
        section = TrainSection(num_steps=100, warmup_steps=0, learning_rate=1e-3)
        assert compute_learning_rate(0, section) == 1e-3

    def test_a_run_of_one_step(self) -> None:
        section = TrainSection(num_steps=1, warmup_steps=0, learning_rate=1e-3)
        assert math.isfinite(compute_learning_rate(0, section))


class TestWeightMean:
    def test_its_formula(self, potential: Potential) -> None:
        """The mean after each step, in float64 beside it."""
        mean = WeightMean(potential, 0.5)
        expected = [p.detach().double() for p in potential.parameters()]
        for step in range(20):
            with torch.no_grad():
                for p in potential.parameters():
                    p.add_(torch.randn_like(p))
            mean.update(potential.parameters(), step)
            decay = min(0.5, (1 + step) / (10 + step))
            expected = [
                decay * e + (1 - decay) * p.detach() for e, p in zip(expected, potential.parameters(), strict=True)
            ]
        for found, value in zip(mean.potential.parameters(), expected, strict=True):
            torch.testing.assert_close(found.double(), value, atol=1e-5, rtol=1e-5)

    def test_a_decay_of_zero_is_the_weights_themselves(self, potential: Potential) -> None:
        mean = WeightMean(potential, 0.0)
        with torch.no_grad():
            potential.network.readout.bias.fill_(7.0)  # type: ignore[union-attr, operator]
        mean.update(potential.parameters(), 5)
        for found, weight in zip(mean.potential.parameters(), potential.parameters(), strict=True):
            assert torch.equal(found, weight)

    def test_it_is_a_model_of_its_own(self, potential: Potential) -> None:
        potential.train()
        mean = WeightMean(potential, 0.9)
        assert not mean.potential.training
        assert potential.training
        assert not any(p.requires_grad for p in mean.potential.parameters())
        assert not {p.data_ptr() for p in potential.parameters()} & {p.data_ptr() for p in mean.potential.parameters()}

    def test_a_state_goes_in_and_out(self, potential: Potential) -> None:
        mean = WeightMean(potential, 0.9)
        state = mean.get_state()
        assert set(state) == {f"mean.{n}" for n, _ in potential.named_parameters()}
        other = WeightMean(build_model(make_config("data", "run").model, STATISTICS), 0.9)
        other.load_state(state | {"weight.other": torch.zeros(1)})
        assert all(torch.equal(v, state[k]) for k, v in other.get_state().items())

    def test_a_state_is_a_copy(self, potential: Potential) -> None:
        mean = WeightMean(potential, 0.0)
        state = mean.get_state()
        before = {k: v.clone() for k, v in state.items()}
        with torch.no_grad():
            for p in potential.parameters():
                p.add_(1.0)
        mean.update(potential.parameters(), 0)
        assert all(torch.equal(v, before[k]) for k, v in state.items())

    def test_the_constant_weights_stay_exactly(self) -> None:
        """The mean of a number with itself is that number, bit for bit; else a model at rest would drift."""
        network = nn.Linear(3, 3)
        torch.manual_seed(0)
        mean = WeightMean(network, 0.999)  # type: ignore[arg-type]
        before = [p.clone() for p in network.parameters()]
        for step in range(100):
            mean.update(network.parameters(), step)
        assert all(torch.equal(a, b) for a, b in zip(mean.potential.parameters(), before, strict=True))
