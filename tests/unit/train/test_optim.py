"""Optimizer, learning rate and the mean of the weights."""

import itertools
import json
import math
import re
from typing import Any

import pytest
import torch
from structures import make_potential
from torch import nn
from training_setup import make_config

from so3krates_dist.config import TrainSection
from so3krates_dist.errors import CheckpointError
from so3krates_dist.model.potential import ModelStatistics, Potential
from so3krates_dist.model.registry import build_model
from so3krates_dist.train.optim import Plateau, WeightMean, build_optimizer, compute_learning_rate, scale_layers

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
        section = TrainSection(adam_beta1=0.8, adam_beta2=0.95, learning_rate=3e-4, adam_epsilon=1e-6)
        for group in build_optimizer(potential, section).param_groups:
            assert (group["betas"], group["lr"], group["eps"]) == ((0.8, 0.95), 3e-4, 1e-6)
            assert not group["amsgrad"]
            assert group["lr_scale"] == 1.0

    @pytest.mark.parametrize("name", ["adamw", "amsgrad"])
    def test_its_steps_are_those_of_the_formula(self, name: Any) -> None:
        """Written plainly in float64, with gradients that shrink: only there the two differ."""
        section = TrainSection(optimizer=name, weight_decay=0.1, learning_rate=1e-2, adam_epsilon=1e-7)
        network = nn.Linear(3, 2).double()
        optimizer = build_optimizer(network, section)
        torch.manual_seed(0)
        expected = {n: p.detach().clone() for n, p in network.named_parameters()}
        mean = {n: torch.zeros_like(p) for n, p in expected.items()}
        square, largest = ({n: torch.zeros_like(p) for n, p in expected.items()} for _ in range(2))
        beta1, beta2 = section.adam_beta1, section.adam_beta2
        for step in range(1, 40):
            for parameter_name, parameter in network.named_parameters():
                parameter.grad = gradient = torch.randn_like(parameter) * 0.8**step
                weight = expected[parameter_name]
                weight *= 1 - section.learning_rate * (section.weight_decay if parameter_name == "weight" else 0.0)
                mean[parameter_name] = beta1 * mean[parameter_name] + (1 - beta1) * gradient
                square[parameter_name] = beta2 * square[parameter_name] + (1 - beta2) * gradient**2
                largest[parameter_name] = torch.maximum(largest[parameter_name], square[parameter_name])
                used = (largest if name == "amsgrad" else square)[parameter_name] / (1 - beta2**step)
                weight -= section.learning_rate * mean[parameter_name] / (1 - beta1**step) / (used.sqrt() + 1e-7)
            optimizer.step()
        for parameter_name, parameter in network.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[parameter_name], rtol=1e-12, atol=1e-14)

    def test_amsgrad_is_torchs(self) -> None:
        """To rounding: ours is the fused one."""
        results = []
        for build in (
            lambda n: build_optimizer(n, TrainSection(optimizer="amsgrad", learning_rate=1e-2)),
            lambda n: torch.optim.AdamW(
                n.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0, amsgrad=True, foreach=False
            ),
        ):
            torch.manual_seed(0)
            network = nn.Linear(5, 4).double()
            optimizer = build(network)
            for step in range(50):
                for parameter in network.parameters():
                    parameter.grad = torch.randn_like(parameter) * 0.8**step
                optimizer.step()
            results.append([p.detach() for p in network.parameters()])
            assert all("max_exp_avg_sq" in optimizer.state[p] for p in network.parameters())
        for ours, torchs in zip(*results, strict=True):
            torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-14)


LAYERED = {
    "backbone": (2, "embedding.weight", "layers.{}.", "readout.weight"),
    "so3krates": (2, "embedding.weight", "layers.{}.", "readout.weight"),
    "so3lr": (2, "charge_embedding.values.weight", "layers.{}.", "hirshfeld_head.queries.weight"),
    "geomatt": (2, "embedding.weight", "streams.1.values.{}.", "readout.bias"),
    "geomatt_envelope": (2, "embedding.weight", "streams.1.values.{}.", "readout.bias"),
}
"""Layers of the models of the tests, and names of weights"""


class TestLayerDecay:
    @pytest.mark.parametrize("name", LAYERED)
    def test_each_layer_learns_more_slowly_than_the_next(self, name: str) -> None:
        potential = make_potential(name)
        num_layers, embedding, layer, head = LAYERED[name]
        section = TrainSection(layer_decay=0.5, weight_decay=0.1, learning_rate=1e-3)
        names = {id(p): n for n, p in potential.named_parameters()}
        scales: dict[str, float] = {}
        for group in build_optimizer(potential, section).param_groups:
            assert group["lr"] == 1e-3 * group["lr_scale"]
            assert group["params"]
            scales |= {names[id(p)]: group["lr_scale"] for p in group["params"]}
        assert scales.keys() == set(names.values())
        assert scales[f"network.{head}"] == 1.0
        assert scales[f"network.{embedding}"] == 0.5 ** (num_layers + 1)
        for number in range(num_layers):
            own = {s for n, s in scales.items() if layer.format(number) in n}
            assert own == {0.5 ** (num_layers - number)}
        stacked = {s for n, s in scales.items() if n.endswith(("self_weight", "self_bias", "pair_weight", "pair_bias"))}
        assert stacked == ({0.5 ** ((num_layers + 1) / 2)} if "geomatt" in name else set())
        heads = {n for n, s in scales.items() if s == 1.0}
        assert not any("layers" in n or "streams" in n or "embedding" in n for n in heads), heads

    @pytest.mark.parametrize("name", LAYERED)
    def test_what_decays_does_not_depend_on_it(self, name: str) -> None:
        potential = make_potential(name)
        found = []
        for decay in (1.0, 0.7):
            groups = build_optimizer(potential, TrainSection(layer_decay=decay, weight_decay=0.1)).param_groups
            found.append({id(p): group["weight_decay"] for group in groups for p in group["params"]})
        assert found[0] == found[1]
        assert set(found[0].values()) == {0.0, 0.1}

    def test_a_decay_of_one_is_one_exactly(self) -> None:
        names = [
            "network.embedding.weight",
            "network.layers.11.x",
            "network.streams.0.self_bias",
            "network.readout.bias",
        ]
        assert set(scale_layers(names, 1.0).values()) == {1.0}

    def test_layers_of_two_digits(self) -> None:
        names = [f"network.layers.{k}.linear.weight" for k in range(12)] + ["network.readout.weight"]
        scales = scale_layers(names, 0.9)
        assert list(scales.values()) == pytest.approx([0.9 ** (12 - k) for k in range(12)] + [1.0], rel=1e-14)


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


SCHEDULES = {
    name: TrainSection(
        num_steps=100, warmup_steps=10, learning_rate=1e-3, final_learning_rate=1e-5, schedule=name, plateau_factor=0.5,
        plateau_patience=3,
    )
    for name in ("cosine", "exponential", "plateau", "constant")
}  # fmt: skip


class TestSchedules:
    @pytest.mark.parametrize("name", SCHEDULES)
    def test_all_warm_up_alike(self, name: str) -> None:
        rates = [compute_learning_rate(s, SCHEDULES[name]) for s in range(11)]
        assert rates == [1e-3 * (k + 1) / 11 for k in range(10)] + [1e-3]

    def test_exponential_falls_by_a_constant_factor_per_step(self) -> None:
        rates = [compute_learning_rate(s, SCHEDULES["exponential"]) for s in range(10, 100)]
        assert [b / a for a, b in itertools.pairwise(rates)] == pytest.approx([0.01 ** (1 / 89)] * 89, rel=1e-12)
        assert rates[-1] == pytest.approx(1e-5, rel=1e-12)
        assert compute_learning_rate(10**6, SCHEDULES["exponential"]) == pytest.approx(1e-5, rel=1e-12)

    def test_constant_stays(self) -> None:
        assert {compute_learning_rate(s, SCHEDULES["constant"]) for s in range(10, 200)} == {1e-3}

    def test_plateau_follows_its_factor_down_to_the_final_rate(self) -> None:
        section = SCHEDULES["plateau"]
        assert {compute_learning_rate(s, section) for s in range(10, 200)} == {1e-3}
        assert compute_learning_rate(50, section, 0.25) == 0.25e-3
        assert compute_learning_rate(50, section, 1e-9) == 1e-5

    @pytest.mark.parametrize("name", ["cosine", "exponential", "constant"])
    def test_others_have_no_factor(self, name: str) -> None:
        assert compute_learning_rate(50, SCHEDULES[name], 0.5) == compute_learning_rate(50, SCHEDULES[name])


class TestPlateau:
    SCORES = (5.0, 4.0, 4.0, 4.5, 4.1, 3.9, 3.9, math.nan, 3.95, math.inf, 3.0, 3.1, 3.1, 3.1, 3.1, 3.1, 3.1, 2.0)
    LOWERED = (0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 1, 0)
    """Three in a row without improvement; nan counts neither way"""

    def test_a_series_of_scores(self) -> None:
        plateau = Plateau(SCHEDULES["plateau"])
        assert [plateau.record(score, 50) for score in self.SCORES] == list(self.LOWERED)
        assert plateau.factor == 0.5 ** sum(self.LOWERED)

    def test_it_stops_at_the_final_rate(self) -> None:
        plateau = Plateau(SCHEDULES["plateau"])
        lowered = [plateau.record(1.0, 50) for _ in range(100)]
        assert sum(lowered) == 7  # 2^-7 is below 1e-2
        assert plateau.factor == pytest.approx(1e-2, rel=1e-12)
        assert compute_learning_rate(50, SCHEDULES["plateau"], plateau.factor) == pytest.approx(1e-5, rel=1e-12)

    @pytest.mark.parametrize("name", ["cosine", "exponential", "constant"])
    def test_other_schedules_have_none(self, name: str) -> None:
        plateau = Plateau(SCHEDULES[name])
        assert not any(plateau.record(1.0, 50) for _ in range(50))
        assert plateau.factor == 1.0

    @pytest.mark.parametrize("cut", range(len(SCORES) + 1))
    def test_it_goes_on_where_it_was_saved(self, cut: int) -> None:
        plateau = Plateau(SCHEDULES["plateau"])
        first = [plateau.record(score, 50) for score in self.SCORES[:cut]]
        state = json.loads(json.dumps(plateau.get_state(), allow_nan=False))
        other = Plateau(SCHEDULES["plateau"])
        other.set_state(state)
        assert first + [other.record(score, 50) for score in self.SCORES[cut:]] == list(self.LOWERED)

    def test_nothing_is_counted_while_the_rate_rises(self) -> None:
        section = SCHEDULES["plateau"]
        plateau = Plateau(section)
        assert section.warmup_steps
        assert not any(plateau.record(1.0, section.warmup_steps - 1) for _ in range(50))
        assert plateau.get_state() == Plateau(section).get_state()

    def test_scores_of_other_conformers_are_forgotten(self) -> None:
        """A harder set came in: its errors are all above the best of before."""
        section = SCHEDULES["plateau"]
        plateau = Plateau(section)
        plateau.record(1.0, 50)
        plateau.forget_scores()
        assert not any(plateau.record(9.0 - 0.1 * number, 50) for number in range(50))

    def test_nothing_is_the_beginning(self) -> None:
        """What older checkpoints have of it."""
        plateau = Plateau(SCHEDULES["plateau"])
        plateau.set_state({})
        assert plateau.get_state() == Plateau(SCHEDULES["plateau"]).get_state()

    @pytest.mark.parametrize("state", [{"factor": "half"}, {"best": []}, {"waiting": None}, [1]])
    def test_what_is_no_state_is_refused(self, state: Any) -> None:
        with pytest.raises(
            CheckpointError, match=r"^state of the schedule must be what a plateau writes; got \w+Error: "
        ):
            Plateau(SCHEDULES["plateau"]).set_state(state)


class TestWeightMean:
    def test_its_formula(self, potential: Potential) -> None:
        """The mean after each step, in float64 beside it."""
        mean = WeightMean(potential, 0.5)
        expected = [p.detach().double() for p in potential.parameters()]
        for step in range(20):
            with torch.no_grad():
                for p in potential.parameters():
                    p.add_(torch.randn_like(p))
            mean.update([list(potential.parameters())], step)
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
        mean.update([list(potential.parameters())], 5)
        for found, weight in zip(mean.potential.parameters(), potential.parameters(), strict=True):
            assert torch.equal(found, weight)

    @pytest.mark.parametrize("size", [1, 2, 5])
    def test_groups_of_weights_give_the_same_bits_as_all_at_once(self, potential: Potential, size: int) -> None:
        whole, parts = WeightMean(potential, 0.9), WeightMean(potential, 0.9)
        weights = list(potential.parameters())
        for step in range(5):
            with torch.no_grad():
                for weight in weights:
                    weight.add_(torch.randn_like(weight))
            whole.update([weights], step)
            parts.update((weights[start : start + size] for start in range(0, len(weights), size)), step)
        pairs = zip(whole.potential.parameters(), parts.potential.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)

    def test_too_few_weights_are_a_mistake(self, potential: Potential) -> None:
        with pytest.raises(AssertionError):
            WeightMean(potential, 0.9).update([list(potential.parameters())[:-1]], 0)

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
        mean.update([list(potential.parameters())], 0)
        assert all(torch.equal(v, before[k]) for k, v in state.items())

    def test_the_constant_weights_stay_exactly(self) -> None:
        """The mean of a number with itself is that number, bit for bit; else a model at rest would drift."""
        network = nn.Linear(3, 3)
        torch.manual_seed(0)
        mean = WeightMean(network, 0.999)  # type: ignore[arg-type]
        before = [p.clone() for p in network.parameters()]
        for step in range(100):
            mean.update([list(network.parameters())], step)
        assert all(torch.equal(a, b) for a, b in zip(mean.potential.parameters(), before, strict=True))


def test_a_mean_of_another_model_is_refused() -> None:
    mean = WeightMean(make_potential(), 0.9)
    state = mean.get_state()
    name, tensor = next(iter(state.items()))
    for damaged in ({k: v for k, v in state.items() if k != name}, state | {name: torch.zeros(*tensor.shape, 2)}):
        with pytest.raises(
            CheckpointError, match=rf"`{re.escape(name)}` must have the shape .*; got .*Resume with the"
        ):
            mean.load_state(damaged)
