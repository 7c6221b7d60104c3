"""One step of the engine against plain torch on the user's own model, before training: a wrong sum of gradients is silent.

The engine does its step as in training, with the conformers dealt unevenly to processes and passes, some of them empty. Plain torch
does it with all of them in one batch, and with nothing computed again or by a forward derivative. Then the engine gets back the
state that it had, bit for bit.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Final

import torch

from so3krates_dist.config import TrainSection
from so3krates_dist.distributed import Rank, broadcast_text, reduce_sum
from so3krates_dist.errors import ConfigError
from so3krates_dist.graph import Graph, GraphBatch, collate
from so3krates_dist.model.registry import build_model
from so3krates_dist.train.engines import Engine, PlainEngine
from so3krates_dist.train.guard import failing_together
from so3krates_dist.train.losses import LABELS, compute_loss, compute_weights, count_labels

TOLERANCES: Final = {"float32": 1e-4, "tf32": 1e-2, "bf16-mixed": 5e-2}
"""Largest deviation of the loss, of the norm of the gradient, and of the gradient of a weight over its largest entry, by
`train.precision`. Sums in another order deviate by 1e-6 in float32 (tests/benchmarks/zero.md); with fewer bits some products are
rounded to the next number instead. Gradients that lack a process, a pass or a part of the loss deviate by more than any of these"""
NEGLIGIBLE: Final = 1e-2
"""Gradients of a weight that are less than so much of the largest of all are compared with that: some vanish but for rounding"""
NUM_PASSES: Final = 2
"""of each process"""


def check_engine(
    engine: Engine, graphs: Sequence[Graph], section: TrainSection, rank: Rank, device: torch.device
) -> str:
    """Compare one step of the engine with plain torch; all processes must call it.

    Args:
        engine: Before training, or after its state was loaded; left as it is.
        graphs: A few conformers with pairs and labels, the same on all processes.
        section: Of the configuration.
        rank: This process.
        device: Of the engine.

    Returns:
        A line for the log.

    Raises:
        ConfigError: They differ by more than rounding; on all processes.
    """
    if isinstance(engine, PlainEngine):
        return "Self-check: none, this run is plain torch"
    before = engine.gather_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            text = _compare(engine, before, graphs, section, rank, device)
    finally:
        engine.load_state(before)
    if text.startswith("not "):
        raise ConfigError(
            "train.self_check", "find that a step of DeepSpeed is one of plain torch", text,
            "Set train.zero_stage=0, train.offload_optimizer=false or train.activation_checkpointing=none to find what is wrong,"
            " and report it; train.self_check=false trains nevertheless",
        )  # fmt: skip
    return f"Self-check: {text}"


def _compare(
    engine: Engine, before: Mapping[str, torch.Tensor], graphs: Sequence[Graph], section: TrainSection, rank: Rank,
    device: torch.device,
) -> str:  # fmt: skip
    """Return what was found, in the words of rank 0."""
    # Without moments the mean of gradients is the gradient after one step; and a step by Adam has no size without them.
    start = {name: t if name.startswith("weight.") else torch.zeros_like(t) for name, t in before.items()}
    engine.load_state(start)
    loss, norm = _take_step(engine, _deal(graphs, rank), graphs, section, device)
    is_gradient = "exp_avg.".__eq__
    found = engine.gather_state(lambda name: rank.is_main and is_gradient(name[: len("exp_avg.")]))
    text = ""
    with failing_together(device):
        if rank.is_main:
            potential = engine.potential
            assert potential.section is not None, "a model without a configuration cannot be built again"
            simple = dataclasses.replace(section, activation_checkpointing="none")
            plain = PlainEngine(build_model(potential.section, potential.statistics), simple, device)
            plain.load_state(start)
            expected = _take_step(plain, [collate(graphs)], graphs, section, device)
            gradients = plain.gather_state(found.__contains__)
            text = _describe((loss, norm), expected, found, gradients, section.precision)
    return broadcast_text(text, device)


def _deal(graphs: Sequence[Graph], rank: Rank) -> list[GraphBatch]:
    """Return this process's passes: conformers go round processes first, then passes; some passes have one more, or none."""
    own = graphs[rank.rank :: rank.world_size]
    return [collate(own[number::NUM_PASSES]) for number in range(NUM_PASSES)]


def _take_step(
    engine: Engine, batches: Sequence[GraphBatch], graphs: Sequence[Graph], section: TrainSection, device: torch.device
) -> tuple[float, float]:
    """Do a step; return the loss of this process's passes and the norm of the gradient."""
    counts = [sum(column) for column in zip(*(count_labels(collate([g])) for g in graphs), strict=True)]
    assert len(counts) == len(LABELS)
    scale = engine.potential.statistics.energy_scale
    # All that is trained at some time counts, also what has no weight at first.
    weights = {label: weight or section.final_weight(label) for label, weight in compute_weights(0, section).items()}
    total = 0.0
    for number, own in enumerate(batches, 1):
        batch = own.to(device, engine.dtype)
        loss, _ = compute_loss(engine.forward(batch), batch, counts, section, weights, scale)
        engine.backward(loss, is_last=number == len(batches))
        total += float(loss.detach())
    norm = engine.step(section.learning_rate).gradient_norm
    return total if isinstance(engine, PlainEngine) else reduce_sum([total], device)[0], norm


def _describe(
    got: tuple[float, float], expected: tuple[float, float], found: Mapping[str, torch.Tensor],
    gradients: Mapping[str, torch.Tensor], precision: str,
) -> str:  # fmt: skip
    """Return what the comparison found; it begins with "not" where that is more than rounding."""
    if not math.isfinite(expected[0] + expected[1]):
        return (
            "nothing was compared, because loss or gradient of the first conformers is not finite in plain torch either"
        )
    if not any((*got, *expected)):
        return "nothing was compared, because the first conformers have no label that is trained, or no error"
    largest = max(float(g.abs().max()) for g in gradients.values())
    deviations = {
        name.partition(".")[2]: _divide(
            float((found[name] - gradient).abs().max()), max(float(gradient.abs().max()), NEGLIGIBLE * largest)
        )
        for name, gradient in gradients.items()
    }
    worst = max(deviations, key=lambda name: deviations[name])
    parts = {
        "loss": _divide(abs(got[0] - expected[0]), abs(expected[0])),
        "norm of the gradient": _divide(abs(got[1] - expected[1]), abs(expected[1])),
        f"gradient of {worst}": deviations[worst],
    }
    words = ", ".join(f"{name} {value:.1e}" for name, value in parts.items())
    tolerance = TOLERANCES[precision]
    if all(value <= tolerance for value in parts.values()):
        return f"a step of DeepSpeed is one of plain torch (relative deviations: {words}; {tolerance:g} is allowed)"
    return f"not the same: relative deviations are {words}; {tolerance:g} is allowed"


def _divide(difference: float, size: float) -> float:
    return difference / size if size else difference
