"""SO3LR trained once with its own loss, forces, dipole and Hirshfeld ratios and no energies, on generated conformers.

    so3krates generate --out data/small --size 2000
    OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu python tests/benchmarks/so3lr_loss.py PARAMS.pkl data/small OUT_FOLDER --seconds 360

The conformers of the data set get new labels from the published SO3LR (PARAMS.pkl): no other source gives Hirshfeld ratios here.
A new SO3LR with random weights is then trained on them in two processes with the published weights of the terms (10, 1, 1).
Results: so3lr_loss.md.
"""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from data_tools.dataset import describe_source, write_dataset
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.data.shards import SPLITS, iter_graphs, load_manifest
from so3krates_dist.graph import Graph, collate
from so3krates_dist.inference.interop import import_so3lr
from so3krates_dist.model.potential import Potential
from so3krates_dist.model.registry import load_model
from so3krates_dist.train.evaluate import evaluate_run

CLONE = Path(__file__).parents[2]
SETTINGS = [
    "model.name=so3lr", "model.num_features=64", "model.num_layers=2", "train.energy_weight=0", "train.dipole_weight=1",
    "train.hirshfeld_weight=1", "train.learning_rate=3e-3", "train.warmup_steps=50", "data.batch_size=16", "metrics.wandb=off",
]  # fmt: skip


def relabel(folder: Path, potential: Potential) -> Iterator[Graph]:
    """Yield all conformers with the model's labels, in eV, Å and e."""
    manifest = load_manifest(folder)
    for split in SPLITS:
        for graph in iter_graphs(folder, manifest, split):
            output = potential(collate([build_neighbors(graph, *potential.cutoffs)], torch.float64))
            values = {name: tensor.numpy() for name, tensor in output.items()}
            yield dataclasses.replace(
                graph, positions=np.array(graph.positions), energy=float(values["energy"][0]), forces=values["forces"],
                dipole=values["dipole"][0], hirshfeld_ratios=values["hirshfeld_ratios"], partial_charges=None,
            )  # fmt: skip


def train(settings: list[str]) -> float:
    """Train to the end; return the seconds of the clock."""
    started = time.monotonic()
    launcher = ["deepspeed", "--num_accelerators", "2", "--master_port", "29613", str(CLONE / "launch/train.py")]
    subprocess.run([*launcher, *SETTINGS, *settings], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def main(parameters: Path, data: Path, out: Path, seconds: float) -> None:
    """Label, train and print the errors."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    import_so3lr(parameters, out / "published")
    published = load_model(out / "published", dtype=torch.float64)
    write_dataset(
        out / "data", relabel(data, published), name="so3lr-labels", level_of_theory="SO3LR", licence="unknown",
        provenance={"labels": describe_source(parameters)}, split="0.8,0.1,0.1", seed=0,
    )  # fmt: skip
    # The published weight of forces, 10, is per (eV/Å)^2; ours is in units of the forces' root mean square.
    forces_weight = 10 * load_manifest(out / "data").statistics["force_rms"] ** 2
    base = [f"data.folder={out / 'data'}", f"train.forces_weight={forces_weight}", "train.save_every=100000"]
    train([*base, f"run.folder={out / 'pilot'}", "train.num_steps=60", "train.warmup_steps=5", "train.log_every=30",
           "train.validate_every=60"])  # fmt: skip
    pilot = [json.loads(line) for line in (out / "pilot/metrics.jsonl").read_text().splitlines()]
    num_steps = int(seconds / [line for line in pilot if line["kind"] == "train"][-1]["seconds_per_step"])
    every = max(num_steps // 10, 1)
    wall = train([*base, f"run.folder={out / 'run'}", f"train.num_steps={num_steps}", f"train.validate_every={every}",
                  f"train.log_every={every}"])  # fmt: skip
    print(f"{num_steps} steps in {wall:.0f} s; test split: {json.dumps(evaluate_run(out / 'run').summary(), indent=1)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parameters", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=360.0)
    arguments = parser.parse_args()
    sys.exit(main(arguments.parameters, arguments.data, arguments.out, arguments.seconds))
