"""Whether all processes of a run were started alike: the same settings, seed, run folder and versions.

Processes on several machines have a command line, files of settings and an environment each. Where they differ, a run would train
something that nobody asked for, or wait for ever.
"""

import json
from importlib.metadata import version
from typing import Final

import torch

from so3krates_dist import __version__
from so3krates_dist.config import RunConfig, to_plain
from so3krates_dist.distributed import Rank, broadcast_text
from so3krates_dist.errors import ConfigError
from so3krates_dist.train.checkpoint import find_absolute
from so3krates_dist.train.guard import failing_together

MAY_DIFFER: Final = frozenset(
    {"run.threads", "run.folder", "data.folder", "data.folders", "data.cache", "data.num_workers"}
)
"""Settings that may be a matter of the machine; run folder and data are compared by what they are"""


def describe_process(config: RunConfig) -> dict[str, str]:
    """Return everything that processes of a run must have in common, by the names that messages say.

    Args:
        config: Of this process.
    """
    sections = to_plain(config)
    settings = {f"{s}.{k}": json.dumps(v) for s, values in sections.items() for k, v in values.items()}
    return {k: v for k, v in settings.items() if k not in MAY_DIFFER} | {
        "run.folder": find_absolute(str(config.folder)),
        "version of so3krates-dist": __version__,
        "version of torch": torch.__version__,
        "version of deepspeed": version("deepspeed"),
    }


def check_same(config: RunConfig, device: torch.device, rank: Rank) -> None:
    """Raise `ConfigError` on all processes where one was started otherwise than the first one; all must call it.

    Args:
        config: Of this process.
        device: Of this process.
        rank: This process.
    """
    own = describe_process(config)
    of_main = json.loads(broadcast_text(json.dumps(own), device))
    with failing_together(device):
        compare(own, of_main, rank)


def compare(own: dict[str, str], of_main: dict[str, str], rank: Rank) -> None:
    """Raise `ConfigError` for the first thing in which a process differs from the first one.

    Args:
        own: Of `describe_process`.
        of_main: That of the first process.
        rank: This process.
    """
    for name in {**of_main, **own}:
        if own.get(name) != of_main.get(name):
            raise ConfigError(
                f"{name} of process {rank.rank}", f"be that of process 0 ({of_main.get(name)})", own.get(name),
                "Start all processes with the same command, files and installation",
            )  # fmt: skip
