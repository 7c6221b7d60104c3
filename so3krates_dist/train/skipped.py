"""Keeps steps that were skipped in the run folder, so that `so3krates replay` can repeat them (train/stored_step.py: what is kept).

A stored step gets its name when it is complete. What goes wrong while it is written is a line of the log: it must not end a run.
"""

import dataclasses
import json
import math
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save

from so3krates_dist import __version__
from so3krates_dist.distributed import Rank, reduce_sum
from so3krates_dist.files import hash_file, sync_file, sync_folder, write_text
from so3krates_dist.graph import GraphBatch
from so3krates_dist.train.context import RunContext
from so3krates_dist.train.guard import Verdict
from so3krates_dist.train.losses import LABELS, compute_weights, count_labels
from so3krates_dist.train.run_state import RunState
from so3krates_dist.train.stored_step import (
    FACTS_NAME,
    FOLDER_NAME,
    FORMAT,
    PREFIX,
    WEIGHTS_NAME,
    StepFacts,
    compute_checksum,
    list_names,
    name_batches,
    read_passes,
    to_plain_numbers,
)


def store_step(
    context: RunContext,
    state: RunState,
    verdict: Verdict,
    figures: Mapping[str, float],
    batches: Sequence[GraphBatch],
    weights: Mapping[str, torch.Tensor],
) -> str:
    """Store a step that the run has skipped; all processes must call it before the step is counted.

    Args:
        context: The run.
        state: As it was for this step.
        verdict: On this step.
        figures: Its `loss` and `gradient_norm`, the same on all processes.
        batches: Of this process, one for each pass.
        weights: All of them, whole, by name.

    Returns:
        A line for the log: which step was skipped and why, and how to repeat it.
    """
    section, progress = context.config.train, state.progress
    loss, norm, usual = figures["loss"], figures["gradient_norm"], state.guard.usual_loss
    found = f"its loss {loss:.4g} is a spike, {usual:.4g} is usual"
    if verdict is Verdict.NON_FINITE:
        found = f"its loss is {loss:.4g}" if not math.isfinite(loss) else f"the norm of its gradient is {norm:.4g}"
    line = f"Step {progress.step} was skipped, {found}"
    if not section.keep_skipped:
        return line
    own = [sum(kinds) for kinds in zip(*map(count_labels, batches), strict=True)]
    facts = StepFacts(
        step=progress.step,
        data_step=progress.data_step,
        loss=loss,
        gradient_norm=norm,
        verdict=verdict,
        usual_loss=usual,
        counts=dict(zip(LABELS, reduce_sum(own, context.device), strict=True)),
        loss_weights=compute_weights(progress.applied, section),
        statistics=state.statistics,
        precision=section.precision,
        device=context.device.type,
    )
    path = context.folder.path
    then = write_step(path, facts, batches, weights, context.rank, context.device, section.keep_skipped)
    return f"{line}; {then}"


def write_step(
    folder: Path,
    facts: StepFacts,
    batches: Sequence[GraphBatch],
    weights: Mapping[str, torch.Tensor],
    rank: Rank,
    device: torch.device,
    keep: int,
) -> str:
    """Write a step; all processes must call it, each with its own batches.

    Args:
        folder: Run folder, on a file system that all processes share.
        facts: The same on all processes.
        batches: Of this process, one for each pass.
        weights: All of them, whole, by name; rank 0 writes them.
        rank: This process.
        device: Of this process, for a word between the processes.
        keep: Stored steps that stay: those that were written last.

    Returns:
        Words for the log: what can be done with it, or why it could not be written.
    """
    final = folder / FOLDER_NAME / f"{PREFIX}{facts.step:08d}"
    temporary = final.with_name(f".{final.name}.tmp")
    failure: Exception | None = None
    try:
        # Not those above it: a run folder that has vanished must not come back half empty.
        final.parent.mkdir(exist_ok=True)
        temporary.mkdir(exist_ok=True)
        _write(temporary / name_batches(rank.rank), *_flatten(batches))
        if rank.is_main:
            _write(temporary / WEIGHTS_NAME, weights, {"format": str(FORMAT)})
    except (OSError, SafetensorError) as error:
        failure = error
    (failed,) = reduce_sum([float(failure is not None)], device)  # says too that all files are there
    if failed:
        failure = failure or OSError("another process could not write its batches")
    if rank.is_main:
        try:
            if not failed:
                _commit(temporary, final, facts, rank.world_size)
            _remove_others(final.parent, keep)
        except (OSError, SafetensorError) as error:
            failure = error
            shutil.rmtree(temporary, ignore_errors=True)
    if failure is not None:
        return f"it could not be stored for replay: {failure}"
    return f"`so3krates replay {shlex.quote(str(folder))} {facts.step}` repeats it"


def _flatten(batches: Sequence[GraphBatch]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors of batches as `<pass>.<field>`, and the rest as text."""
    tensors: dict[str, torch.Tensor] = {}
    passes = []
    for number, batch in enumerate(batches):
        fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
        tensors |= {f"{number}.{n}": v for n, v in fields.items() if isinstance(v, torch.Tensor)}
        passes.append({"num_short_pairs": batch.num_short_pairs, "group": list(batch.group)})
    return tensors, {"format": str(FORMAT), "passes": json.dumps(passes)}


def _write(path: Path, tensors: Mapping[str, torch.Tensor], texts: dict[str, str]) -> None:
    """Write tensors as they are: copies, since safetensors refuses those that share memory."""
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    path.write_bytes(save(copies, texts))
    sync_file(path)


def _commit(temporary: Path, final: Path, facts: StepFacts, world_size: int) -> None:
    """Describe the files that all processes have written, and give the folder its name."""
    names = list_names(world_size)
    for path in temporary.iterdir():
        if path.name not in names:  # of a run that was killed here, with more processes
            path.unlink()
    groups = [[p["group"] for p in read_passes(temporary / name_batches(r))] for r in range(world_size)]
    content: dict[str, Any] = {
        "format": FORMAT,
        "package_version": __version__,
        "torch_version": str(torch.__version__),
        "world_size": world_size,
        **{f.name: to_plain_numbers(getattr(facts, f.name)) for f in dataclasses.fields(facts)},
        "conformers": groups,
        "files": {n: {"size": (temporary / n).stat().st_size, "sha256": hash_file(temporary / n)} for n in names},
    }
    content["checksum"] = compute_checksum(content)
    write_text(temporary / FACTS_NAME, json.dumps(content, indent=1, allow_nan=False) + "\n")
    sync_folder(temporary)
    if final.exists():  # a run that came back to an earlier step has skipped the same one again
        shutil.rmtree(final)
    temporary.rename(final)
    sync_folder(final.parent)


def _remove_others(folder: Path, keep: int) -> None:
    """Remove old steps, and what was begun and not finished."""
    for leftover in folder.glob(f".{PREFIX}*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    stored = sorted(folder.glob(f"{PREFIX}*/{FACTS_NAME}"), key=lambda p: (p.stat().st_mtime_ns, p.parent.name))
    for old in stored[: max(0, len(stored) - keep)]:
        shutil.rmtree(old.parent, ignore_errors=True)
