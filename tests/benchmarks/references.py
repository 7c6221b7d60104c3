"""How far each model is from the authors' code: the largest deviation of every case, in float64.

    OMP_NUM_THREADS=1 SO3KRATES_REFERENCE_DIR=FOLDER python tests/benchmarks/references.py

The same numbers as in tests/physics/test_reference*.py, printed instead of bounded. Results: references.md.
"""

import os
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "physics")]

import numpy as np  # noqa: E402 - after the tests can be imported
import test_reference as euclidean_transformer  # noqa: E402
import test_reference_geomatt as geomatt  # noqa: E402
import test_reference_so3krates as so3krates  # noqa: E402
import test_reference_so3lr as so3lr  # noqa: E402
import torch  # noqa: E402

from so3krates_dist.inference.interop import import_so3lr  # noqa: E402


def print_row(model: str, case: str, deviations: dict[str, float]) -> None:
    """Print one row of the table."""
    print(f"| {model} | {case} | " + ", ".join(f"{name} {value:.1e}" for name, value in deviations.items()) + " |")


def main() -> None:
    """Print the table."""
    print("| model | case | largest deviation |\n|---|---|---|")
    for tag in so3krates.SECTIONS:
        print_row("So3krates 2022", tag, so3krates.compute_deviations(tag))
    for tag in euclidean_transformer.SECTIONS:
        print_row("Euclidean transformer", tag, euclidean_transformer.compute_deviations(tag))
    reference = Path(os.environ["SO3KRATES_REFERENCE_DIR"])
    with tempfile.TemporaryDirectory() as name:
        folder = import_so3lr(reference / "so3lr" / "params.pkl", Path(name) / "so3lr")
        for case in so3lr.CASES:
            print_row("SO3LR", case, so3lr.compare_case(folder, case, case))
        print_row("SO3LR", "dha, float32", so3lr.compare_case(folder, "dha", "dha_fp32", torch.float32))
        for case in ("atat", "dha"):
            outputs, stored = so3lr.evaluate(folder, case), np.load(so3lr.REFERENCE / f"{case}_jaxmd.npz")
            energy = abs(float(outputs["energy"][0]) - float(stored["energy"]))
            forces = float(np.abs(outputs["forces"] - stored["forces"]).max())
            print_row("SO3LR", f"{case}, the authors' own test output", {"E": energy, "F": forces})
    for algorithm in ("dense", "neighbor_list", "auto"):
        found = geomatt.compute_deviations(algorithm, reference)
        worst = {q: max(v for k, v in found.items() if k.endswith(q)) for q in ("energy", "forces", "attention")}
        print_row("GeomAtt", f"14 tags, two molecules, {algorithm}", worst)


if __name__ == "__main__":
    main()
