"""Is a training step faster when energy and forces are traced into one graph and compiled with inductor, and is it right?

    OMP_NUM_THREADS=1 python tests/benchmarks/compile.py DATA_FOLDER [section.key=value ...]

Needs a C++ compiler. Compares the gradient of every weight with eager, in units of that weight's largest entry and of the largest
entry of all, and names the worst: a gradient that vanishes deviates by rounding alone. Results: compile.md.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from so3krates_dist.config import load_config
from so3krates_dist.data.mixture import Mixture
from so3krates_dist.data.stream import TrainingStream
from so3krates_dist.distributed import tune_machine
from so3krates_dist.graph import GraphBatch
from so3krates_dist.model.potential import ModelStatistics, compute_vectors
from so3krates_dist.model.registry import build_model
from so3krates_dist.train.planning import build_schedule

Step = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def trace(function: Step, arguments: tuple[Any, ...]) -> torch.fx.GraphModule:
    """Record energies and their derivative; drop the tracer's detach nodes, which would cut gradients of weights."""
    graph = make_fx(function, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*arguments)
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def main(folder: Path, settings: list[str]) -> None:
    """Print times of tracing, compiling and steps, and the deviations of the gradients."""
    tune_machine(1, torch.device("cpu"))
    config = load_config([f"data.folder={folder}", "data.batch_size=10", *settings])
    mixture = Mixture.open(config.data, config.model)
    schedule, _ = build_schedule(config, mixture, None, 0)
    stream = TrainingStream(schedule, config, rank=0, world_size=1)
    batches = [stream[step].batches[0] for step in range(40)]
    torch.manual_seed(0)
    statistics = ModelStatistics.from_manifest(mixture.statistics, config.model)
    network = build_model(config.model, statistics).train().network
    names, weights = zip(*network.named_parameters(), strict=True)

    def run(values: list[torch.Tensor], numbers: Any, first: Any, second: Any, vectors: Any) -> Any:
        differentiated = vectors.detach().requires_grad_(True)
        batch = dataclasses.replace(batches[0], atomic_numbers=numbers, pair_first=first, pair_second=second)
        energies = torch.func.functional_call(network, dict(zip(names, values, strict=True)), (batch, differentiated))
        (gradient,) = torch.autograd.grad(energies.sum(), differentiated, create_graph=True)
        return energies, gradient

    def arguments(batch: GraphBatch) -> tuple[Any, ...]:
        return list(weights), batch.atomic_numbers, batch.pair_first, batch.pair_second, compute_vectors(batch)

    def differentiate(function: Step, batch: GraphBatch) -> tuple[torch.Tensor, ...]:
        energies, gradient = function(*arguments(batch))
        loss = (0.1 * energies).square().mean() + (0.3 * gradient - 0.1).square().mean()
        return torch.autograd.grad(loss, weights)

    def report(label: str, function: Step) -> None:
        expected, found = differentiate(run, batches[3]), differentiate(function, batches[3])
        largest = max(float(e.abs().max()) for e in expected)
        rows = [
            (float((e - f).abs().max()), float(e.abs().max()), n)
            for e, f, n in zip(expected, found, names, strict=True)
        ]
        own = max(rows, key=lambda r: r[0] / max(r[1], 1e-30))
        every = max(rows)
        print(
            f"{label}: worst in its own unit {own[0] / max(own[1], 1e-30):.2e} ({own[2]}, largest entry {own[1]:.1e});"
        )
        print(
            f"  worst in units of the largest entry of all ({largest:.1e}): {every[0] / largest:.2e} ({every[2]})",
            flush=True,
        )

    def clock(label: str, function: Step) -> None:
        for batch in batches[:5]:
            differentiate(function, batch)
        start = time.process_time()
        for batch in batches[5:]:
            differentiate(function, batch)
        print(f"{label}: {(time.process_time() - start) / (len(batches) - 5) * 1e3:.1f} ms CPU a step", flush=True)

    start = time.perf_counter()
    graph = trace(run, arguments(batches[0]))
    print(f"traced in {time.perf_counter() - start:.0f} s, {len(graph.graph.nodes)} nodes", flush=True)
    report("traced", graph)
    start = time.perf_counter()
    compiled: Any = torch.compile(graph, dynamic=True)
    differentiate(compiled, batches[3])
    print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    report("compiled", compiled)
    for _ in range(2):
        clock("eager", run)
        clock("compiled", compiled)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
