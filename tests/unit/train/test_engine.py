"""The engine in one process: what DeepSpeed is told, and what a state that does not fit gets. Its numbers: tests/distributed."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from training_setup import make_config, make_graphs

from so3krates_dist.config import TrainSection
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.distributed import Rank, start_processes, stop_processes
from so3krates_dist.errors import CheckpointError
from so3krates_dist.graph import collate
from so3krates_dist.model.potential import ModelStatistics
from so3krates_dist.model.registry import build_model
from so3krates_dist.train.engine import MOMENTS, TrainingEngine, build_deepspeed_config

CPU = torch.device("cpu")
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
        assert build_deepspeed_config(TrainSection(gradient_clipping=clipping), 10)["gradient_clipping"] == clipping

    def test_nothing_rounds_the_master_weights(self) -> None:
        config = build_deepspeed_config(TrainSection(), 10)
        assert not {"fp16", "bf16", "amp", "optimizer", "scheduler"} & set(config)

    def test_sections_arrive(self) -> None:
        config = build_deepspeed_config(TrainSection(zero_stage=2), 10)
        assert config["zero_optimization"]["stage"] == 2

    def test_deepspeed_divides_nothing_by_the_number_of_passes(self) -> None:
        """Which varies from step to step; the loss has been divided by what the whole step has."""
        config = build_deepspeed_config(TrainSection(micro_batches=4), 10)
        assert config["gradient_accumulation_steps"] == 1

    def test_deepspeed_takes_it_as_it_is_meant(self, processes: None) -> None:
        for stage in (0, 1, 2):
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
    def test_its_names_shapes_and_types(self, processes: None) -> None:
        engine = build_engine("train.zero_stage=2")
        state = engine.gather_state()
        shapes = {n: p.shape for n, p in engine.potential.named_parameters()}
        expected = {f"{kind}.{n}" for n in shapes for kind in ("weight", *MOMENTS)} | {"optimizer_steps"}
        assert set(state) == expected
        assert state["optimizer_steps"].tolist() == [0]
        for name, tensor in state.items():
            if name != "optimizer_steps":
                assert tensor.shape == shapes[name.partition(".")[2]]
                assert tensor.dtype == torch.float32
                assert tensor.is_contiguous()

    @pytest.mark.parametrize("stage", [0, 1, 2])
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


def test_recomputing_attention_is_switched_where_it_is_asked_for(processes: None) -> None:
    for choice in (True, False):
        engine = build_engine(f"train.checkpoint_attention={choice}")
        assert engine.potential.network.checkpoint_attention is choice


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("is_last", [False, True])
def test_gradients_that_were_discarded_leave_no_trace(processes: None, stage: int, is_last: bool) -> None:
    """Also where more passes of the step would have followed: stage 2 has put them away by then."""
    batch = collate([build_neighbors(g, 4.0) for g in make_graphs(2)])
    states = []
    for spoil in (False, True):
        engine = build_engine(f"train.zero_stage={stage}")
        if spoil:
            engine.backward(engine.forward(batch)["energy"].sum(), is_last=is_last)
            engine.discard()
        engine.backward(engine.forward(batch)["forces"].square().sum(), is_last=True)
        engine.step(1e-2)
        states.append(engine.gather_state())
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_step_without_a_last_pass_is_a_mistake(processes: None, stage: int) -> None:
    """DeepSpeed would do nothing at all, and say nothing."""
    batch = collate([build_neighbors(g, 4.0) for g in make_graphs(2)])
    engine = build_engine(f"train.zero_stage={stage}")
    engine.backward(engine.forward(batch)["forces"].square().sum(), is_last=False)
    with pytest.raises(AssertionError, match="the last pass has to say so"):
        engine.step(1e-2)


@pytest.mark.parametrize("stage", [0, 1, 2])
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
