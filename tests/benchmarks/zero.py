"""How far training under ZeRO is from plain torch, in every combination of what may be chosen.

    OMP_NUM_THREADS=1 PYTHONPATH=tests:tests/distributed python tests/benchmarks/zero.py

Eight steps of a small Euclidean transformer on energies, forces and stresses, with several learning rates, on conformers that are
dealt unevenly to processes and passes, some of which get none; the same on whole batches in plain torch. A figure is the largest
difference of a weight over the largest entry of its tensor, the largest of all tensors, of clipping on and off. Then what the
self-check finds before training, by model and arithmetic. Results: zero.md.
"""

import argparse
import itertools
import json
import tempfile
from pathlib import Path

from training_setup import make_config, started, wait
from zero_cases import ALL, MODELS, OWN_LOSS
from zero_checks import Checks, run_trajectories, write_findings

from so3krates_dist.train.self_check import check_engine

PRECISIONS = ("float32", "bf16-mixed")
LIMIT_SECONDS = 1800


def run_self_checks(folder: Path, device: str) -> int:
    """Write what the self-check says of each model, at ZeRO 3."""
    checks = Checks(folder, device)
    checks.use_molecules()
    lines = {}
    for (name, options), precision in itertools.product(MODELS.items(), PRECISIONS):
        model = name.partition(",")[0]
        settings = [f"model.name={model}", *(f"model.{option}" for option in options.split())]
        settings += ["train.zero_stage=3", f"train.precision={precision}", *(OWN_LOSS if name == "so3lr" else ())]
        config = make_config("data", "run", *settings)
        engine = checks.build(config)
        graphs = checks.steps[0][-4:]
        lines[f"{name}, {precision}"] = check_engine(engine, graphs, config.train, checks.rank, checks.device)
    return write_findings(checks, lines)


def launch(world_size: int, function: object, *arguments: object) -> dict[str, object]:
    """Return what the first process found."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        with started(folder, world_size, function, folder, *arguments) as processes:  # type: ignore[arg-type]
            outcome = wait(folder, processes, LIMIT_SECONDS)
        assert outcome.codes == (0,) * world_size, str(outcome)
        return json.loads((folder / "findings0.json").read_text())  # type: ignore[no-any-return]


def print_table(found: dict[int, dict[str, dict[str, float]]], key: str) -> None:
    """Print the largest deviations, with a row for each stage and mode and a column for processes and passes."""
    cells: dict[tuple[str, str], float] = {}
    for world_size, case in itertools.product(found, ALL):
        row = f"{case.stage} | {case.checkpointing}{', offload' if case.offload else ''}"
        column = f"{world_size} process(es), {case.passes} pass(es)"
        value = found[world_size][str(case)][key]
        cells[row, column] = max(cells.get((row, column), 0.0), value)
    columns = sorted({column for _, column in cells})
    print(f"| stage | {key} | " + " | ".join(columns) + " |")
    print("|" + "---|" * (len(columns) + 2))
    for row in sorted({row for row, _ in cells}):
        print(f"| {row} | " + " | ".join(f"{cells[row, c]:.1e}" if (row, c) in cells else "" for c in columns) + " |")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only-self-check", action="store_true")
    arguments = parser.parse_args()
    worlds = (1, 2) if arguments.device == "cpu" else (1,)
    if not arguments.only_self_check:
        found = {n: launch(n, run_trajectories, ALL, arguments.device)["trajectories"] for n in worlds}
        for key in ("weights", "gradients", "norm"):
            print_table(found, key)  # type: ignore[arg-type]
            print()
    for name, line in launch(worlds[-1], run_self_checks, arguments.device).items():
        print(f"{name}: {line}")


if __name__ == "__main__":
    main()
