"""What the self-check says; that it finds what is wrong, on any number of processes and stage: tests/distributed."""

import pytest
import torch
from training_setup import make_config, make_graphs

from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.distributed import Rank
from so3krates_dist.graph import collate
from so3krates_dist.model.potential import ModelStatistics
from so3krates_dist.model.registry import build_model
from so3krates_dist.train.engines import PlainEngine
from so3krates_dist.train.self_check import TOLERANCES, _compare, _deal, _describe, _take_step, check_engine
from so3krates_dist.train.two_pass import TwoPass

CPU = torch.device("cpu")
GRADIENTS = {"exp_avg.a": torch.tensor([1.0, -2.0]), "exp_avg.b": torch.tensor([1e-6])}


def test_plain_torch_is_not_compared_with_itself() -> None:
    config = make_config("data", "run", "train.zero_stage=0", "train.precision=float64")
    statistics = ModelStatistics(elements=(10, 18), energy_baselines={}, energy_scale=0.5, mean_neighbors=3.0)
    engine = PlainEngine(build_model(config.model, statistics), config.train, CPU)
    line = check_engine(engine, make_graphs(1), config.train, Rank(), CPU)
    assert line == "Self-check: none, this run is plain torch"


@pytest.mark.parametrize(("number", "factor"), [(0, 1.01), (1, 1.01), (2, 1.01), (3, 1.0)])
def test_each_deviation_counts(number: int, factor: float) -> None:
    """Of the loss, the norm and a gradient; not of one that vanishes beside the others."""
    got = [1.0, 2.0]
    found = {name: gradient.clone() for name, gradient in GRADIENTS.items()}
    if number < 2:
        got[number] *= factor
    elif number == 2:
        found["exp_avg.a"][0] *= factor
    else:
        found["exp_avg.b"] += 1e-7
    text = _describe((got[0], got[1]), (1.0, 2.0), found, GRADIENTS, "float32")
    assert text.startswith("not the same: relative deviations are loss ") == (number < 3)
    assert "gradient of a " in text or number == 3


def test_coarse_arithmetic_may_deviate_by_more() -> None:
    assert TOLERANCES["float32"] < TOLERANCES["tf32"] < TOLERANCES["bf16-mixed"] < 0.1
    found = {name: gradient * 1.005 for name, gradient in GRADIENTS.items()}
    texts = [_describe((1.0, 2.0), (1.0, 2.0), found, GRADIENTS, p) for p in ("float32", "tf32", "bf16-mixed")]
    assert [text.startswith("not ") for text in texts] == [True, False, False]


@pytest.mark.parametrize("expected", [(float("nan"), 1.0), (1.0, float("inf"))])
def test_what_is_not_finite_anywhere_is_said(expected: tuple[float, float]) -> None:
    text = _describe((1.0, 1.0), expected, GRADIENTS, GRADIENTS, "float32")
    assert text.startswith("nothing was compared, because loss or gradient of the first conformers is not finite")


def test_conformers_without_labels_are_said() -> None:
    zero = {name: torch.zeros_like(gradient) for name, gradient in GRADIENTS.items()}
    text = _describe((0.0, 0.0), (0.0, 0.0), zero, zero, "float32")
    assert text == "nothing was compared, because the first conformers have no label that is trained, or no error"
    assert _describe((0.0, 1.0), (0.0, 0.0), GRADIENTS, zero, "float32").startswith("not ")


@pytest.mark.parametrize("size", [1.0, 0.9])
def test_a_wrong_forward_derivative_is_found(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be the same on both sides, if both used it."""
    config = make_config("data", "run", "train.zero_stage=0", "train.activation_checkpointing=low_memory")
    statistics = ModelStatistics(elements=(10, 18), energy_baselines={}, energy_scale=0.5, mean_neighbors=3.0)
    potential = build_model(config.model, statistics)
    graphs = [build_neighbors(g, *potential.cutoffs) for g in make_graphs(3)]
    engine = PlainEngine(potential, config.train, CPU)
    finish = TwoPass.finish

    def scale(self: TwoPass, module: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
        return finish(self, module, loss) * (size if self.is_active else 1.0)

    monkeypatch.setattr(TwoPass, "finish", scale)
    text = _compare(engine, engine.gather_state(), graphs, config.train, Rank(), CPU)
    assert text.startswith("not ") == (size < 1)


def test_what_is_trained_later_is_compared_too() -> None:
    later = ("train.energy_weight=0", "train.final_energy_weight=0.7", "train.weights_until=5")
    found = []
    for settings in (later, ("train.energy_weight=0.7",), ("train.energy_weight=0",)):
        config = make_config("data", "run", "train.zero_stage=0", *settings)
        statistics = ModelStatistics(elements=(10, 18), energy_baselines={}, energy_scale=0.5, mean_neighbors=3.0)
        torch.manual_seed(0)
        engine = PlainEngine(build_model(config.model, statistics), config.train, CPU)
        graphs = [build_neighbors(g, *engine.potential.cutoffs) for g in make_graphs(2)]
        found.append(_take_step(engine, [collate(graphs)], graphs, config.train, CPU))
    assert found[0] == found[1] != found[2]


def test_an_engine_that_is_not_finite_alone_is_refused() -> None:
    assert _describe((float("nan"), 1.0), (1.0, 1.0), GRADIENTS, GRADIENTS, "float32").startswith("not the same")


def test_conformers_are_dealt_unevenly() -> None:
    graphs = [build_neighbors(g, 4.0) for g in make_graphs(3)]
    dealt = [[b.num_graphs for b in _deal(graphs, Rank(rank=r, world_size=2))] for r in range(2)]
    assert dealt == [[1, 1], [1, 0]]
    assert [b.num_graphs for b in _deal(graphs[:1], Rank())] == [1, 0]
