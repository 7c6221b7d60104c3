"""What processes of a run really hold at their peak, to compare with what `so3krates train --dry-run` says beforehand."""

import ctypes
import gc
import json
import re
from pathlib import Path

import torch
from training_setup import make_config, make_dataset, run_processes

from so3krates_dist.config import RunConfig
from so3krates_dist.data.mixture import Mixture
from so3krates_dist.data.stream import TrainingStream
from so3krates_dist.distributed import read_rank, start_processes, stop_processes, tune_machine
from so3krates_dist.model.potential import ModelStatistics
from so3krates_dist.model.registry import build_model
from so3krates_dist.train.dry_run import Bench, prepare
from so3krates_dist.train.engines import build_engine
from so3krates_dist.train.forecast import describe_steps, find_heaviest, predict_memory
from so3krates_dist.train.inputs import open_data
from so3krates_dist.train.losses import compute_loss, compute_weights, count_labels
from so3krates_dist.train.optim import WeightMean
from so3krates_dist.train.planning import build_schedule

CPU = torch.device("cpu")
NUM_STEPS = 3
_M_MMAP_THRESHOLD = -3


def predict(settings: list[str], world_size: int, tuned: bool, answer: Path) -> int:
    """Write what the dry run predicts of a process, and where its heaviest pass is; in a process of its own."""
    prepared = prepare(make_config(*settings[:2], *settings[2:]), world_size)
    section = prepared.config.train
    _set_allocator(tuned)
    potential = build_model(
        prepared.config.model, ModelStatistics.from_manifest(prepared.mixture.statistics, prepared.config.model)
    )
    place = prepared.schedule, 0, world_size, section.micro_batches, prepared.limits
    heaviest, figures = find_heaviest(*place), describe_steps(*place)
    trial = Bench(prepared, potential).try_heaviest(heaviest)
    weights = [w.numel() for w in potential.parameters()]
    memory = predict_memory(
        section, weights, world_size, passes=figures.most_passes, activations=trial.activations or 0
    )
    facts = {"total": memory.peak + memory.host, "activations": memory.activations, "copy": 4 * sum(weights)}
    answer.write_text(json.dumps(facts | {"step": heaviest.step}))
    return 0


def hold(settings: list[str], step: int, tuned: bool, answer: Path) -> int:
    """Take steps as training does, and write the largest memory of this process beyond what it had before the model."""
    rank = read_rank()
    config = make_config(*settings[:2], *settings[2:])
    start_processes(rank, CPU)
    _set_allocator(tuned)
    mixture = open_data(config)
    schedule, _ = build_schedule(config, mixture, None, 0)
    stream = TrainingStream(schedule, config, rank.rank, rank.world_size)
    assert stream[step].batches
    small = make_config(*settings[:2], *settings[2:], "model.num_features=8")
    _take_steps(small, mixture, stream, 0, 1)  # what is needed once: code, threads, connections
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _read("VmRSS")
    _take_steps(config, mixture, stream, step, NUM_STEPS)
    answer.with_suffix(f".{rank.rank}").write_text(str(_read("VmHWM") - before))
    stop_processes()
    return 0


def _set_allocator(tuned: bool) -> None:
    if tuned:
        tune_machine(1, CPU)
    else:
        torch.set_num_threads(1)
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**16)


def _take_steps(config: RunConfig, mixture: Mixture, stream: TrainingStream, step: int, count: int) -> None:
    statistics = ModelStatistics.from_manifest(mixture.statistics, config.model)
    potential = build_model(config.model, statistics)
    mean, section = WeightMean(potential, 0.99), config.train
    engine = build_engine(potential, section, CPU)
    for number in range(count):
        batches = stream[step].batches
        for place, batch in enumerate(batches, 1):
            outputs = engine.forward(batch)
            counts = [max(c, 1.0) for c in count_labels(batch)]
            loss, _ = compute_loss(outputs, batch, counts, section, compute_weights(0, section), 1.0)
            engine.backward(loss, is_last=place == len(batches))
        engine.step(1e-4)
        mean.update(engine.lend_weights(), number)


def _read(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def compare_with_prediction(folder: Path, world_size: int, *more: str, tuned: bool = False) -> dict[str, float]:
    """Return bytes as predicted (`total`, and of it `activations`) and as `measured`, and those of all weights (`copy`).

    Args:
        folder: For the data set and what processes say.
        world_size: Processes.
        more: Settings.
        tuned: Whether glibc keeps memory that was freed, as it does in training on CPUs; else what is held counts.
    """
    dataset = folder / "set"
    if not dataset.exists():
        make_dataset(dataset, num_train=160)
    settings = [str(dataset), str(folder / "run"), *more]
    name = re.sub(r"\W+", "_", "_".join((*more, str(world_size))))
    answer = folder / f"{name}.json"
    outcome = run_processes(folder / f"{name}_predict", 1, predict, settings, world_size, tuned, answer)
    assert outcome.codes == (0,), outcome
    facts: dict[str, float] = json.loads(answer.read_text())
    outcome = run_processes(folder / f"{name}_hold", world_size, hold, settings, int(facts["step"]), tuned, answer)
    assert set(outcome.codes) == {0}, outcome
    measured = [float(answer.with_suffix(f".{rank}").read_text()) for rank in range(world_size)]
    return facts | {"measured": max(measured)}
