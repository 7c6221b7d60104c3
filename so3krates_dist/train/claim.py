"""How the processes of a run meet: rank 0 takes the run folder first, and the others hear of it where it may not."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from so3krates_dist.distributed import Rank, start_processes
from so3krates_dist.errors import So3kratesError
from so3krates_dist.train.checkpoint import RunFolder, find_checkpoint
from so3krates_dist.train.guard import failing_together

REFUSAL_SECONDS: Final = 60
"""So long a first process that has refused waits for the others, to tell them"""


@dataclasses.dataclass(frozen=True)
class Claim:
    """What rank 0 found when it took the run folder; nothing on the others."""

    checkpoint: Path | None = None
    complaints: Sequence[str] = ()
    """about newer checkpoints that are damaged"""
    refusal: So3kratesError | None = None


def claim_folder(folder: RunFolder, fingerprint: str) -> Claim:
    """Take the run folder for this run, and find where to go on from."""
    try:
        folder.acquire()
        folder.check(fingerprint)  # again: another run may have come first
        checkpoint, complaints = find_checkpoint(folder.path / "checkpoints")
    except So3kratesError as error:
        return Claim(refusal=error)
    return Claim(checkpoint, complaints)


def meet(rank: Rank, device: torch.device, refusal: So3kratesError | None) -> None:
    """Start the process group; the others would wait there in vain for a first process that has refused.

    Args:
        rank: This process.
        device: Of this process.
        refusal: Of this process.

    Raises:
        So3kratesError: The refusal; on all processes.
    """
    if refusal is not None and rank.world_size == 1:
        raise refusal
    if refusal is None:
        start_processes(rank, device)
    else:
        try:
            start_processes(rank, device, seconds=REFUSAL_SECONDS)
        except RuntimeError:  # nobody comes, or the run that has the folder has the port as well
            raise refusal from None
    with failing_together(device):
        if refusal is not None:
            raise refusal
