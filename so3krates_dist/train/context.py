"""What all parts of a run need to know of it, and what they tell the user about it."""

import dataclasses
from collections.abc import Mapping
from typing import Final

import torch

from so3krates_dist import __version__
from so3krates_dist.config import RunConfig
from so3krates_dist.data.mixture import Mixture
from so3krates_dist.distributed import Rank
from so3krates_dist.metrics import MetricsLogger
from so3krates_dist.model.potential import CHARGED_CRYSTALS, Potential
from so3krates_dist.train.checkpoint import RunFolder

_STATED: Final = {"total_charge": "total_charges", "num_unpaired_electrons": "num_unpaired_electrons"}
"""Where the statistics say what values the data have"""


@dataclasses.dataclass(frozen=True)
class RunContext:
    """Which run this is, and where."""

    config: RunConfig
    rank: Rank
    """this process"""
    device: torch.device
    """of this process"""
    mixture: Mixture
    """the data"""
    folder: RunFolder
    metrics: MetricsLogger

    def describe(self, potential: Potential) -> list[str]:
        """Return what the user should know before training.

        Args:
            potential: The model.
        """
        lines = [f"note: {note}" for note in potential.describe_limits(self._list_electrons())]
        weights = sum(p.numel() for p in potential.parameters())
        counts = " / ".join(f"{self.mixture.num_conformers(s):,} {s}" for s in ("train", "validation", "test"))
        lines.append(
            f"so3krates_dist {__version__}: {self.config.run.name}, {self.rank.world_size} process(es) on"
            f" {self.device.type}, {weights:,} weights, conformers {counts}"
        )
        return lines + self.mixture.describe()

    def _list_electrons(self) -> list[str]:
        """Return which of charges, unpaired electrons and charged crystals the data have."""
        statistics = self.mixture.statistics
        present = [k for k, n in _STATED.items() if set(statistics.get(n, {})) - {"0"}]
        # Each is counted by itself: where they are more than all structures together, some are both.
        charged = sum(count for charge, count in statistics.get("total_charges", {}).items() if float(charge))
        if charged + statistics.get("num_periodic", 0) > self.mixture.num_conformers("train"):
            present.append(CHARGED_CRYSTALS)
        return present

    def provenance(self, step: int) -> dict[str, object]:
        """Return where a model comes from that is exported after some steps."""
        return {
            "step": step,
            "data": self.mixture.name,
            "data_fingerprint": self.mixture.fingerprint,
            "level_of_theory": self.mixture.level_of_theory,
            "package_version": __version__,
        }


def name_epochs(epochs: Mapping[str, float]) -> dict[str, float]:
    """Return the figures of a line of the log: the epoch of the data set that is behind the others, and each of several."""
    return {"epoch": min(epochs.values())} | (
        {f"epoch/{name}": epoch for name, epoch in epochs.items()} if len(epochs) > 1 else {}
    )
