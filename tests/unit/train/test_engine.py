"""The engine in one process: what DeepSpeed is told, and what a state that does not fit gets. Its numbers: tests/distributed."""

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from training_setup import make_config, make_graphs

from so3krates_dist.config import TrainSection
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.distributed import Rank, start_processes, stop_processes
from so3krates_dist.errors import CheckpointError
from so3krates_dist.graph import collate
from so3krates_dist.model.potential import ModelStatistics
from so3krates_dist.model.registry import build_model
from so3krates_dist.train import zero3
from so3krates_dist.train.engine import TrainingEngine, build_deepspeed_config
from so3krates_dist.train.zero3 import find_piece

CPU = torch.device("cpu")
STAGES = (0, 1, 2, 3)
STATISTICS = ModelStatistics(
    elements=(10, 18), energy_baselines={10: -3507.25, 18: -14354.5}, energy_scale=0.5, mean_neighbors=3.0
)


@pytest.fixture(scope="module")
def processes() -> Iterator[None]:
    """Start a group of one process, and leave the environment as it was."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    before = {name: os.environ.get(name) for name in names}
    start_processes(Rank(), CPU)
    yield
    stop_processes()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def build_engine(*settings: str) -> TrainingEngine:
    config = make_config("data", "run", *settings)
    torch.manual_seed(0)
    return TrainingEngine(build_model(config.model, STATISTICS), config.train, CPU)


class TestDeepspeedConfig:
    @pytest.mark.parametrize("clipping", [0.0, 0.5, 10.0])
    def test_clipping_is_always_written(self, clipping: float) -> None:
        """DeepSpeed clips at 1.0 where the key is absent."""
        assert build_deepspeed_config(TrainSection(gradient_clipping=clipping), [7, 3])["gradient_clipping"] == clipping

    def test_nothing_rounds_the_master_weights(self) -> None:
        config = build_deepspeed_config(TrainSection(), [7, 3])
        assert not {"fp16", "bf16", "amp", "optimizer", "scheduler"} & set(config)

    def test_sections_arrive(self) -> None:
        config = build_deepspeed_config(TrainSection(zero_stage=2), [7, 3])
        assert config["zero_optimization"]["stage"] == 2

    @pytest.mark.parametrize("stage", [1, 2, 3])
    def test_buckets_are_small_but_hold_the_largest_tensor(self, stage: int) -> None:
        """DeepSpeed's own of stages 1 and 2 has 2 GB; one for all gradients undoes what stage 3 saves."""
        large = zero3.LEAST_PIECE
        for weights, bucket in (([7, 3], 10), ([1], 2), ([large] * 80, 5 * large), ([9 * large, large], 9 * large)):
            zero = build_deepspeed_config(TrainSection(zero_stage=stage), weights)["zero_optimization"]
            assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == bucket

    def test_the_optimizer_may_be_offloaded(self) -> None:
        """And is torch's all the same: DeepSpeed's own has to be compiled."""
        config = build_deepspeed_config(TrainSection(zero_stage=1, offload_optimizer=True), [7, 3])
        assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
        assert config["zero_force_ds_cpu_optimizer"] is False
        assert "offload_optimizer" not in build_deepspeed_config(TrainSection(), [7, 3])["zero_optimization"]

    def test_deepspeed_divides_nothing_by_the_number_of_passes(self) -> None:
        """Which varies from step to step; the loss has been divided by what the whole step has."""
        config = build_deepspeed_config(TrainSection(micro_batches=4), [7, 3])
        assert config["gradient_accumulation_steps"] == 1

    def test_deepspeed_takes_it_as_it_is_meant(self, processes: None) -> None:
        for stage in STAGES:
            engine = build_engine(f"train.zero_stage={stage}", "train.gradient_clipping=0.0", "train.micro_batches=2")
            inner: Any = engine._engine
            assert inner.zero_optimization_stage() == stage
            assert inner.gradient_clipping() == 0.0
            assert inner.gradient_accumulation_steps() == 1
            assert not inner.fp16_enabled()
            assert not inner.bfloat16_enabled()

    def test_the_shared_memory_op_is_off(self, processes: None) -> None:
        """It would be compiled at the first start, and a start that is killed in that hangs all later ones."""
        build_engine()
        import deepspeed.ops

        assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False


class TestState:
    @pytest.mark.parametrize("stage", STAGES)
    @pytest.mark.parametrize("optimizer", ["adamw", "amsgrad"])
    def test_its_names_shapes_and_types(self, processes: None, stage: int, optimizer: str) -> None:
        engine = build_engine(f"train.zero_stage={stage}", f"train.optimizer={optimizer}")
        state = engine.gather_state()
        model = build_model(make_config("data", "run").model, STATISTICS)
        shapes = {n: p.shape for n, p in model.named_parameters()}
        moments = {"adamw": ("exp_avg", "exp_avg_sq"), "amsgrad": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}[
            optimizer
        ]
        expected = {f"{kind}.{n}" for n in shapes for kind in ("weight", *moments)} | {"optimizer_steps"}
        assert {n: t.nbytes for n, t in state.items()} == engine.state_sizes()
        assert list(state) == list(engine.state_sizes())
        assert set(engine.gather_state(lambda name: name.startswith("weight."))) == {f"weight.{n}" for n in shapes}
        assert set(state) == expected
        assert state["optimizer_steps"].tolist() == [0]
        for name, tensor in state.items():
            if name != "optimizer_steps":
                assert tensor.shape == shapes[name.partition(".")[2]]
                assert tensor.dtype == torch.float32
                assert tensor.is_contiguous()

    @pytest.mark.parametrize("stage", STAGES)
    def test_it_is_a_copy(self, processes: None, stage: int) -> None:
        engine = build_engine(f"train.zero_stage={stage}")
        state = engine.gather_state()
        before = {k: v.clone() for k, v in state.items()}
        batch = collate([build_neighbors(g, 4.0) for g in make_graphs(2)])
        outputs = engine.forward(batch)
        engine.backward(outputs["forces"].square().sum(), is_last=True)
        assert engine.step(1e-2).applied
        assert {k for k, v in engine.gather_state().items() if not torch.equal(v, before[k])} >= {"optimizer_steps"}
        assert all(torch.equal(v, before[k]) for k, v in state.items())

    def test_another_models_state_is_refused(self, processes: None) -> None:
        state = build_engine("model.num_features=16").gather_state()
        with pytest.raises(
            CheckpointError,
            match=r"`weight\.network\.embedding\.weight` must have the shape \(119, 8\); got \(119, 16\)\.",
        ):
            build_engine().load_state(state)

    def test_a_state_with_too_little_in_it_is_refused(self, processes: None) -> None:
        engine = build_engine()
        state = engine.gather_state()
        for missing in ("weight.network.readout.bias", "exp_avg_sq.network.readout.bias"):
            less = {k: v for k, v in state.items() if k != missing}
            with pytest.raises(
                CheckpointError, match=r"`.*network\.readout\.bias` must have the shape \(1,\); got none\."
            ):
                engine.load_state(less)


def test_what_is_computed_again_and_how_is_set(processes: None) -> None:
    for choice in ("blocks", "none", "low_memory"):
        engine = build_engine(f"train.activation_checkpointing={choice}", "train.precision=bf16-mixed")
        assert engine.potential.as_network.checkpointing == choice
        computed = {m.compute_dtype for m in engine.potential.modules() if hasattr(m, "compute_dtype")}
        assert computed == {torch.bfloat16}
        assert engine.dtype == torch.float32
        assert {p.dtype for p in engine.potential.parameters()} == {torch.float32}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["energy", "forces", "dipole"])
def test_no_output_can_be_differentiated_by_positions(processes: None, stage: int, name: str) -> None:
    """Forces that are taken from an engine's energies are divided by the number of passes at stage 1, without an error."""
    settings = [f"train.zero_stage={stage}"]
    if name == "dipole":
        options = "num_features=8 num_layers=1 num_heads=2 degrees=[1,2] num_radial_basis=4"
        settings += ["model.name=so3lr", *(f"model.{option}" for option in options.split())]
    engine = build_engine(*settings)
    batch = collate([build_neighbors(g, *engine.potential.cutoffs) for g in make_graphs(2)])
    batch.positions.requires_grad_(True)
    output = engine.forward(batch)[name]
    with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
        torch.autograd.grad(output.sum(), batch.positions)
    engine.discard()


@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
def test_weights_are_in_parts_between_passes_at_stage_3(processes: None, checkpointing: str) -> None:
    engine = build_engine("train.zero_stage=3", f"train.activation_checkpointing={checkpointing}")
    batch = collate([build_neighbors(g, 4.0) for g in make_graphs(2)])
    assert engine.potential.network.embedding.weight.numel() == 0
    outputs = engine.forward(batch)
    assert not any(p.numel() for p in engine.potential.parameters())
    engine.backward(outputs["forces"].square().sum(), is_last=True)
    assert not any(p.numel() for p in engine.potential.parameters())
    assert engine.step(1e-2).applied
    assert torch.nn.functional.linear.__module__ != "deepspeed.runtime.zero.linear"


@pytest.mark.parametrize("stage", STAGES)
def test_weights_are_lent_a_few_at_a_time_at_stage_3(
    processes: None, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zero3, "LEAST_PIECE", 1)
    engine = build_engine(f"train.zero_stage={stage}")
    sizes = [shape.numel() for shape in engine._shapes.values()]
    lent, groups = [], []
    for group in engine.lend_weights():
        assert sum(p.numel() for p in engine.potential.parameters()) == (sum(sizes) if stage < 3 else count(group))
        lent += [weight.clone() for weight in group]
        groups.append((group, count(group)))
    state = engine.gather_state()
    names = [name for name, _ in engine.potential.named_parameters()]
    assert all(torch.equal(w, state[f"weight.{name}"]) for w, name in zip(lent, names, strict=True))
    if stage < 3:
        assert [number for _, number in groups] == [sum(sizes)]
    else:
        assert len(groups) > 2
        assert max(number for _, number in groups) <= find_piece(sizes)
        assert not any(group for group, _ in groups), "what was lent is let go"
        assert not any(p.numel() for p in engine.potential.parameters())


def count(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def test_lending_may_be_given_up(processes: None) -> None:
    """Nothing stays put together."""
    engine = build_engine("train.zero_stage=3")
    groups = engine.lend_weights()
    assert next(groups)
    groups.close()  # type: ignore[attr-defined] # it is a generator
    assert not any(p.numel() for p in engine.potential.parameters())


def test_nothing_keeps_a_copy_of_all_weights_at_stage_3(processes: None) -> None:
    """One process: weights, gradients, and the optimizer's weights and two moments, each once; and a bucket."""
    with LiveBytes() as live:
        engine = build_engine("train.zero_stage=3", "model.num_features=64")
        sizes = [shape.numel() for shape in engine._shapes.values()]
        gc.collect()
        assert 5 * sum(sizes) <= live.now / 4 < 5.1 * sum(sizes) + find_piece(sizes)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_weight_without_a_gradient_in_one_step_does_not_get_that_of_the_step_before(
    processes: None, stage: int
) -> None:
    batch = collate([build_neighbors(g, 4.0) for g in make_graphs(2)])
    engine = build_engine(f"train.zero_stage={stage}", "train.adam_beta1=0", "train.gradient_clipping=0")
    for label in ("energy", "forces"):  # forces do not depend on the last bias
        engine.backward(engine.forward(batch)[label].sum(), is_last=True)
        engine.step(1e-3)
    assert engine.gather_state()["exp_avg.network.readout.bias"].tolist() == [0.0]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("offload", [False, True])
def test_gradients_that_were_discarded_leave_no_trace(
    processes: None, stage: int, is_last: bool, offload: bool
) -> None:
    """Also where more passes of the step would have followed: stage 2 has put them away by then."""
    batch = collate([build_neighbors(g, 4.0) for g in make_graphs(2)])
    states = []
    for spoil in (False, True):
        more = f"train.offload_optimizer={str(offload and stage > 0).lower()}"
        engine = build_engine(f"train.zero_stage={stage}", more)
        if spoil:
            engine.backward(engine.forward(batch)["energy"].sum(), is_last=is_last)
            engine.discard()
        engine.backward(engine.forward(batch)["forces"].square().sum(), is_last=True)
        engine.step(1e-2)
        states.append(engine.gather_state())
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_without_a_last_pass_is_a_mistake(processes: None, stage: int) -> None:
    """DeepSpeed would do nothing at all, and say nothing."""
    batch = collate([build_neighbors(g, 4.0) for g in make_graphs(2)])
    engine = build_engine(f"train.zero_stage={stage}")
    engine.backward(engine.forward(batch)["forces"].square().sum(), is_last=False)
    with pytest.raises(AssertionError, match="the last pass has to say so"):
        engine.step(1e-2)


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_of_passes_add_up(processes: None, stage: int) -> None:
    """One, two or three passes of the same conformers have the same gradient; steps of each follow each other."""
    graphs = [build_neighbors(g, 4.0) for g in make_graphs(6)]
    engine, norms = build_engine(f"train.zero_stage={stage}", "train.gradient_clipping=0"), []
    for passes in (1, 3, 2, 1):
        batches = [collate(graphs[i::passes]) for i in range(passes)]
        for number, batch in enumerate(batches, 1):
            engine.backward(engine.forward(batch)["forces"].square().sum(), is_last=number == passes)
        norms.append(engine.step(0.0).gradient_norm)
    assert norms == pytest.approx([norms[0]] * 4, rel=1e-5)
