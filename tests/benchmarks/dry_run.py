"""Memory that `so3krates train --dry-run` predicts for a process, beside the peak of real processes that train.

    OMP_NUM_THREADS=1 python tests/benchmarks/dry_run.py

Real processes over gloo on this machine; resident memory. Results: dry_run.md.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from peak_memory import compare_with_prediction

WIDE = ("model.num_features=640", "model.num_layers=3", "data.batch_size=8")
"""most of the memory is weights"""
BUSY = ("model.num_features=128", "model.num_layers=3", "data.batch_size=120")
"""most of it is activations"""


WAYS = (
    (0, 1, 1, ""), (0, 2, 1, ""), (1, 1, 1, ""), (1, 2, 1, ""), (2, 2, 1, ""), (2, 2, 2, ""), (3, 2, 1, ""),
    (1, 2, 1, "train.offload_optimizer=true"), (2, 2, 2, "train.offload_optimizer=true"),
    (3, 2, 1, "train.offload_optimizer=true"), (1, 2, 1, "train.optimizer=amsgrad"),
    (2, 4, 1, ""), (3, 4, 1, ""),
)  # fmt: skip
"""stage, processes, passes in a step, setting"""


def main() -> None:
    """Print a row for each way to train."""
    print("model | processes | ZeRO | passes | predicted MB | of it activations | measured MB | measured / predicted")
    with tempfile.TemporaryDirectory() as name:
        rows = [("wide", WIDE, False, *way) for way in WAYS]
        rows += [("busy", BUSY, tuned, *WAYS[i]) for tuned in (False, True) for i in (0, 4)]
        for label, model, tuned, stage, world_size, passes, more in rows:
            settings = (*model, f"train.zero_stage={stage}", f"train.micro_batches={passes}", *filter(None, [more]))
            found = compare_with_prediction(Path(name), world_size, *settings, tuned=tuned)
            total, activations, measured = (found[n] / 1e6 for n in ("total", "activations", "measured"))
            print(
                f"{label}{', memory kept' if tuned else ''} | {world_size} | {stage} {more.partition('.')[2]} | {passes} |"
                f" {total:.0f} | {activations:.0f} | {measured:.0f} | {measured / total:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
