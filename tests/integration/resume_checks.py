"""What test_resume.py runs in processes of their own: several runs after one another, since starting processes takes longer."""

from collections.abc import Sequence

from training_setup import train

from so3krates_dist.train import claim, loop


def train_each(runs: Sequence[Sequence[str]]) -> int:
    """Do some runs in one process group: DeepSpeed remembers the first one of a process for ever.

    Args:
        runs: Settings of each.
    """
    start, stop = claim.start_processes, loop.stop_processes

    def start_once(*arguments: object) -> None:
        claim.start_processes = lambda *_: None
        start(*arguments)  # type: ignore[arg-type]

    claim.start_processes, loop.stop_processes = start_once, lambda: None
    for settings in runs:
        if code := train(settings):
            return code
    stop()
    return 0
