"""What `so3krates lr-find` suggests against short runs at several rates, and other optimizers and losses; MD17 ethanol.

    OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu python tests/benchmarks/learning_rates.py DATA_FOLDER OUT_FOLDER --rates
    OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu python tests/benchmarks/learning_rates.py DATA_FOLDER OUT_FOLDER --kinds

The first does the range test of three models with three seeds each, and trains each model with six rates for 200 steps. The
second trains the Euclidean transformer with other settings, one at a time, and two seeds for 300 steps. All in one process; what is
compared are errors, not times. Results: learning_rates.md.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from so3krates_dist.config import load_config
from so3krates_dist.train.lr_find import find_rates

CLONE = Path(__file__).parents[2]

MODELS = {
    "Euclidean transformer": ["model=small"],
    "So3krates (local)": [
        "model.name=so3krates", "model.num_features=48", "model.num_layers=2", "model.radial_filter_width=48",
        "model.spherical_filter_width=24",
    ],
    "GeomAtt": ["model.name=geomatt", "model.num_features=64", "model.inner_width=64", "model.num_layers=2"],
}  # fmt: skip
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3)
KINDS = {
    "AdamW, squared errors": [],
    "AMSGrad": ["train.optimizer=amsgrad"],
    "Huber, delta 0.1": ["train.energy_loss=huber", "train.forces_loss=huber", "train.huber_delta=0.1"],
    "l2 of forces, absolute energies": ["train.energy_loss=mae", "train.forces_loss=l2"],
}
COMMON = [
    "data.batch_size=10", "data.lanes=8", "train.adam_beta2=0.99", "train.gradient_clipping=0.5", "train.ema_decay=0.99",
    "train.device=cpu", "run.threads=1", "metrics.wandb=off", "train.proof=false", "train.self_check=false",
]  # fmt: skip


def train(settings: list[str], folder: Path, num_steps: int) -> str:
    """Train to the end; return the errors of the validation split, in meV/Å and meV/atom."""
    shutil.rmtree(folder, ignore_errors=True)
    steps = [f"train.{key}={num_steps}" for key in ("num_steps", "validate_every", "save_every", "log_every")]
    words = [*COMMON, *settings, *steps, "train.warmup_steps=20", f"run.folder={folder}"]
    done = subprocess.run(
        [sys.executable, "-m", "so3krates_dist.cli", "train", *words], check=False, cwd=CLONE, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env=os.environ,
    )  # fmt: skip
    if done.returncode:
        return f"exit code {done.returncode}"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "validation"][-1]
    return f"{1e3 * last['forces_mae']:.1f} / {1e3 * last['energy_mae_per_atom']:.2f}"


def compare_rates(data: Path, out: Path, names: Sequence[str]) -> None:
    """Print the ranges of three seeds, and the errors with each rate."""
    for name in names:
        settings = [*MODELS[name], f"data.folder={data}"]
        for seed in range(3):
            folder = out / f"search{seed}"
            config = load_config([*COMMON, *settings, f"run.folder={folder}", f"run.seed={seed}"])
            lines = list(find_rates(config, 1e-6, 1.0, 300))
            print(f"{name}, seed {seed}: {lines[-2]}; {lines[-3]}", flush=True)
        for rate in RATES:
            found = train([*settings, f"train.learning_rate={rate}"], out / "run", 200)
            print(f"{name}, {rate:g}: {found}", flush=True)


def compare_kinds(data: Path, out: Path) -> None:
    """Print the errors with each setting, of two seeds."""
    for name, settings in KINDS.items():
        words = [*MODELS["Euclidean transformer"], f"data.folder={data}", "train.learning_rate=4e-3", *settings]
        errors = [train([*words, f"run.seed={seed}"], out / "run", 300) for seed in range(2)]
        print(f"{name}: {', '.join(errors)}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rates", action="store_true", help="range tests and short runs at several rates")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="of --rates (default: all)")
    parser.add_argument("--kinds", action="store_true", help="short runs with other optimizers and losses")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.rates:
        compare_rates(arguments.data.resolve(), arguments.out.resolve(), arguments.models)
    if arguments.kinds:
        compare_kinds(arguments.data.resolve(), arguments.out.resolve())
