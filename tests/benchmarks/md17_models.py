"""What So3krates, the Euclidean transformer and GeomAtt reach on MD17 ethanol with one budget of steps, and what a step costs.

    OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu python tests/benchmarks/md17_models.py DATA_FOLDER OUT_FOLDER --speed
    OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu python tests/benchmarks/md17_models.py DATA_FOLDER OUT_FOLDER --steps 8000

The first measures steps per second of all models in turn, three times, on a quiet machine. The second trains each model by
`deepspeed` in two processes, its learning rate decaying over all steps, and evaluates it on the test split. Writes curves.json
and a picture; results: md17_models.md.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt

from so3krates_dist.train.evaluate import evaluate_run

CLONE = Path(__file__).parents[2]

MODELS = {
    "So3krates (local)": [
        "model.name=so3krates", "model.num_features=96", "model.num_layers=3", "model.radial_filter_width=96",
        "model.spherical_filter_width=24", "train.learning_rate=6e-3",
    ],
    "Euclidean transformer": [],
    "GeomAtt": ["model.name=geomatt", "train.learning_rate=3e-3"],
}  # fmt: skip
"""Settings on top of run=md17, whose own model is the Euclidean transformer"""

KCAL = 0.0433641153087705
"""eV per kcal/mol"""
PUBLISHED = {"So3krates (local)": 0.096 * KCAL * 1000, "GeomAtt": 0.98 * KCAL * 1000}
"""meV/Å, original MD17 ethanol, 1,000 training points; the first as later papers quote it, the second from GeomAtt's README"""


def train(settings: list[str], port: int) -> float:
    """Train to the end; return the seconds of the clock."""
    started = time.monotonic()
    launcher = ["deepspeed", "--num_accelerators", "2", "--master_port", str(port), str(CLONE / "launch/train.py")]
    subprocess.run([*launcher, "run=md17", "metrics.wandb=off", *settings], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def read_metrics(folder: Path, kind: str) -> list[dict[str, float]]:
    """Return the lines of one kind of a run's record."""
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line.get("kind") == kind]


def measure_speed(name: str, data: Path, folder: Path) -> float:
    """Return optimizer steps per second, from the second half of a short run."""
    shutil.rmtree(folder, ignore_errors=True)
    steps = ["train.num_steps=200", "train.warmup_steps=5", "train.log_every=100", "train.validate_every=200"]
    train([*MODELS[name], *steps, "train.save_every=200", f"data.folder={data}", f"run.folder={folder}"], 29611)
    return 1 / read_metrics(folder, "train")[-1]["seconds_per_step"]


def run_model(name: str, data: Path, folder: Path, num_steps: int) -> dict[str, object]:
    """Train and evaluate one model."""
    every = max(num_steps // 16, 1)
    schedule = [f"train.num_steps={num_steps}", f"train.validate_every={every}", f"train.log_every={every}"]
    wall = train(
        [*MODELS[name], *schedule, "train.save_every=2000", f"data.folder={data}", f"run.folder={folder}"], 29612
    )
    evaluation = evaluate_run(folder).summary()
    curve = [(line["step"], line["forces_mae"]) for line in read_metrics(folder, "validation")]
    print(f"{name}: {num_steps} steps in {wall:.0f} s, test {json.dumps(evaluation)}", flush=True)
    return {"steps": num_steps, "wall": wall, "test": evaluation, "validation": curve}


def draw(results: dict[str, dict[str, object]], path: Path) -> None:
    """Draw the learning curves beside the published end points."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for number, (name, result) in enumerate(results.items()):
        steps, errors = zip(*result["validation"], strict=True)  # type: ignore[misc, call-overload]
        label = f"{name}, test {1000 * result['test']['forces_mae']:.1f}"  # type: ignore[index]
        axes.plot(steps, [1000 * e for e in errors], "o-", color=f"C{number}", label=label, markersize=3)
        if name in PUBLISHED:
            axes.axhline(PUBLISHED[name], color=f"C{number}", linestyle=":", linewidth=1, label=f"{name}, published")
    axes.set(yscale="log", xlabel="steps of 10 conformers", ylabel="validation force MAE, meV/Å")
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(path, dpi=150)


def main(data: Path, out: Path, num_steps: int, names: list[str]) -> None:
    """Train all models and write what came out; without steps measure their speed."""
    out.mkdir(parents=True, exist_ok=True)
    folders = {name: out / name.split()[0].lower() for name in names}
    if not num_steps:
        for _ in range(3):
            print({n: round(measure_speed(n, data, folders[n].with_suffix(".pilot")), 1) for n in names}, flush=True)
        return
    results = {n: run_model(n, data, folders[n], num_steps) for n in names}
    (out / "curves.json").write_text(json.dumps(results, indent=1))
    draw(results, out / "md17_models.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    arguments = parser.parse_args()
    num_steps = 0 if arguments.speed else arguments.steps
    sys.exit(main(arguments.data, arguments.out, num_steps, arguments.models))
