"""Plain torch: gradients of passes add up to those of the whole batch to the last digits of float64; its state is any engine's."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from training_setup import find_differences, make_config, make_graphs

from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.errors import CheckpointError
from so3krates_dist.graph import Graph, collate
from so3krates_dist.model.potential import ModelStatistics
from so3krates_dist.model.registry import build_model
from so3krates_dist.train.engines import PlainEngine, build_engine
from so3krates_dist.train.losses import compute_loss, compute_weights, count_labels
from so3krates_dist.train.plain_engine import list_moments, set_rates

CPU = torch.device("cpu")
STATISTICS = ModelStatistics(
    elements=(10, 18), energy_baselines={10: -3507.25, 18: -14354.5}, energy_scale=0.5, mean_neighbors=3.0,
    has_unpaired_electrons=True, charge_signs=(-1, 1),
)  # fmt: skip
SO3LR = (
    "model.name=so3lr", "model.num_features=8", "model.num_layers=2", "model.num_heads=2", "model.degrees=[1,2]",
    "model.num_radial_basis=4", "train.dipole_weight=1", "train.hirshfeld_weight=1",
)  # fmt: skip
GEOMATT = (
    "model.name=geomatt", "model.num_layers=2", "model.num_features=8", "model.inner_width=8", "model.grid_end=4.0",
    "model.grid_spacing=0.5",
)  # fmt: skip


def build(*settings: str) -> tuple[PlainEngine, list[Graph], tuple[str, ...]]:
    config = make_config("data", "run", "train.zero_stage=0", *settings)
    torch.manual_seed(0)
    engine = PlainEngine(build_model(config.model, STATISTICS), config.train, CPU)
    rng = np.random.default_rng(0)
    graphs = [build_neighbors(g, *engine.potential.cutoffs) for g in make_graphs(5)]
    graphs[1].dipole = rng.normal(size=3)
    graphs[3].hirshfeld_ratios = rng.uniform(0.7, 1.1, graphs[3].num_atoms)
    return engine, graphs, settings


def compute(
    engine: PlainEngine, portions: Sequence[Sequence[Graph]], settings: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Return the loss and the gradients of passes over these conformers."""
    section = make_config("data", "run", "train.zero_stage=0", *settings).train
    sums = [sum(column) for column in zip(*(count_labels(collate(p)) for p in portions), strict=True)]
    total = torch.zeros((), dtype=torch.float64)
    for number, portion in enumerate(portions, 1):
        batch = collate(portion).to(CPU, engine.dtype)
        loss, _ = compute_loss(engine.forward(batch), batch, sums, section, compute_weights(0, section), 0.5)
        engine.backward(loss, is_last=number == len(portions))
        total = total + loss.detach()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in engine.potential.named_parameters()}
    engine.discard()
    return {"loss": total} | gradients


@pytest.mark.parametrize(
    ("model", "checkpointing"),
    [((), mode) for mode in ("none", "blocks", "low_memory")]
    + [(SO3LR, mode) for mode in ("none", "blocks", "low_memory")]
    + [(GEOMATT, mode) for mode in ("none", "blocks")],
)
def test_passes_add_up_to_the_whole_batch_in_float64(model: tuple[str, ...], checkpointing: str) -> None:
    engine, graphs, settings = build(
        "train.precision=float64", f"train.activation_checkpointing={checkpointing}", "train.energy_weight=0.5", *model
    )
    whole = compute(engine, [graphs], settings)
    split = compute(engine, [graphs[:1], [], graphs[1:4], graphs[4:], []], settings)
    assert whole["loss"] > 1e-3
    for name, expected in whole.items():
        deviation = float((split[name] - expected).abs().max())
        assert deviation <= 1e-12 * max(1.0, float(expected.abs().max())), name


def test_float64_gets_plain_torch() -> None:
    config = make_config("data", "run", "train.precision=float64", "train.zero_stage=0")
    engine = build_engine(build_model(config.model, STATISTICS), config.train, CPU)
    assert isinstance(engine, PlainEngine)
    assert engine.dtype == torch.float64
    assert {p.dtype for p in engine.potential.parameters()} == {torch.float64}
    assert engine.potential.training


@pytest.mark.parametrize("optimizer", ["adamw", "amsgrad"])
def test_its_state_goes_between_precisions(optimizer: str) -> None:
    engine, graphs, settings = build(f"train.optimizer={optimizer}")
    batch = collate(graphs)
    for _ in range(3):
        engine.backward(engine.forward(batch)["forces"].square().sum(), is_last=True)
        assert engine.step(1e-2).applied
    state = engine.gather_state()
    assert {name.partition(".")[0] for name in state} == {
        "weight", "optimizer_steps", *list_moments(make_config("d", "r", *settings).train)
    }  # fmt: skip
    assert {n: t.nbytes for n, t in state.items()} == engine.state_sizes()
    assert state["optimizer_steps"].tolist() == [3]
    exact, _, _ = build(f"train.optimizer={optimizer}", "train.precision=float64")
    exact.load_state(state)
    there = exact.gather_state()
    assert {n: t.nbytes for n, t in there.items()} == exact.state_sizes()
    other, _, _ = build(f"train.optimizer={optimizer}", "run.seed=7")
    other.load_state({**there, "mean.anything": torch.ones(1)})
    assert find_differences(state, other.gather_state()) == {}
    assert set(engine.gather_state(lambda name: name.startswith("exp_avg_sq."))) == {
        n for n in state if n.startswith("exp_avg_sq.")
    }


def test_a_state_of_another_optimizer_is_refused() -> None:
    state = build()[0].gather_state()
    with pytest.raises(
        CheckpointError, match=r"`max_exp_avg_sq\..*` must have the shape \(.*\); got none\. Resume with"
    ):
        build("train.optimizer=amsgrad")[0].load_state(state)


def test_a_gradient_that_is_not_finite_or_given_up_changes_nothing() -> None:
    engine, graphs, _ = build()
    before = engine.gather_state()
    for factor in (float("nan"), float("inf")):
        engine.backward(engine.forward(collate(graphs))["forces"].square().sum() * factor, is_last=True)
        result = engine.step(1e-2)
        assert not result.applied
        assert not np.isfinite(result.gradient_norm)
    engine.backward(engine.forward(collate(graphs))["forces"].square().sum(), is_last=True)
    engine.discard()
    assert find_differences(before, engine.gather_state()) == {}
    assert engine.step(1e-2).gradient_norm == 0


def test_weights_without_a_gradient_decay_like_the_others() -> None:
    """As under ZeRO, where no gradient is a gradient of zero."""
    engine, *_ = build("train.weight_decay=0.5")
    before = engine.gather_state()
    assert engine.step(0.1).applied
    after = engine.gather_state()
    name = "weight.network.readout.weight"
    torch.testing.assert_close(after[name], before[name] * (1 - 0.1 * 0.5))


def test_weights_are_lent_in_one_group() -> None:
    engine, *_ = build()
    (group,) = [list(group) for group in engine.lend_weights()]
    assert [w.data_ptr() for w in group] == [p.data_ptr() for p in engine.potential.parameters()]


def test_groups_have_learning_rates_of_their_own() -> None:
    groups = [{"params": [torch.zeros(1)], "lr_scale": 0.25}, {"params": [torch.zeros(1)]}]
    optimizer = torch.optim.AdamW(groups)
    set_rates(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.1]


@pytest.mark.parametrize("limit", [0.0, 0.01, 1e6])
def test_the_gradient_is_clipped_to_its_largest_norm(limit: float) -> None:
    engine, graphs, settings = build("train.precision=float64", f"train.gradient_clipping={limit}")
    section = make_config("data", "run", "train.zero_stage=0", *settings).train
    batch = collate(graphs).to(CPU, engine.dtype)
    weights = compute_weights(0, section)
    loss, _ = compute_loss(engine.forward(batch), batch, count_labels(batch), section, weights, 0.5)
    engine.backward(loss, is_last=True)
    norm = engine.step(1e-3).gradient_norm
    means = [t for name, t in engine.gather_state().items() if name.startswith("exp_avg.")]
    used = float(torch.nn.utils.get_total_norm(means)) / (1 - section.adam_beta1)
    assert norm > 0.1, "before clipping"
    assert used == pytest.approx(0.01 if limit == 0.01 else norm, rel=1e-5)
