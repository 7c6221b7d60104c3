"""Force errors of the published SO3LR by arithmetic: float32, products rounded to TF32 or bfloat16, and `model.precision=bf16`.

    OMP_NUM_THREADS=2 python tests/benchmarks/precision.py PARAMS.pkl STRUCTURE.xyz

PARAMS.pkl is SO3LR's published checkpoint, with its hyperparameters.json beside it. Errors are against float64, in meV/Å. TF32 and
bfloat16 are emulated on the CPU as a GPU's matrix units do them: both factors of a product are rounded, sums are float32; in the
forward pass and in the derivative alike. Results: precision.md.
"""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.graph import Graph, GraphBatch, collate
from so3krates_dist.inference.interop import import_so3lr
from so3krates_dist.model.potential import Potential
from so3krates_dist.model.registry import build_model, load_model, read_model_config

GEOMETRY_WIDTHS = {3, 5, 7, 9, 15, 21, 24}
"""sizes of the matrices that make harmonics and invariants for degrees 1 to 4; no dense layer of SO3LR has them"""


def round_to_tf32(tensor: torch.Tensor) -> torch.Tensor:
    """Round float32 to 10 bits of mantissa, to nearest even."""
    bits = tensor.contiguous().view(torch.int32)
    bits = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF
    return bits.view(torch.float32)


def round_to_bf16(tensor: torch.Tensor) -> torch.Tensor:
    """Round float32 to 7 bits of mantissa."""
    return tensor.to(torch.bfloat16).float()


class RoundedProducts(TorchDispatchMode):
    """Rounds the factors of matrix products, of the forward pass and of derivatives.

    Args:
        rounding: Of a tensor.
        geometry: Whether products that make harmonics and invariants are rounded too.
    """

    def __init__(self, rounding: Callable[[torch.Tensor], torch.Tensor], geometry: bool) -> None:
        super().__init__()
        self.rounding, self.geometry, self.count = rounding, geometry, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        name = func.overloadpacket.__name__
        first = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}.get(name)
        if first is not None:
            factors = args[first : first + 2]
            sizes = {size for factor in factors for size in factor.shape[-2:]}
            if self.geometry or not sizes & GEOMETRY_WIDTHS:
                self.count += 1
                args = (*args[:first], *(self.rounding(f) for f in factors), *args[first + 2 :])
        return func(*args, **(kwargs or {}))


def compute_forces(potential: Potential, batch: GraphBatch) -> np.ndarray:
    """Return (num_atoms, 3) eV/Å in float64."""
    return potential(batch)["forces"].double().numpy()


def main(parameters: Path, structure: Path) -> None:
    """Print a line for each kind of arithmetic."""
    atoms = ase.io.read(structure)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "so3lr"
        import_so3lr(parameters, folder)
        exact, single = (load_model(folder, dtype=dtype) for dtype in (torch.float64, torch.float32))
        section, statistics, _ = read_model_config(folder)
        mixed = build_model(dataclasses.replace(section, precision="bf16"), statistics)  # type: ignore[call-arg]
        mixed.load_state_dict(single.state_dict())
    graph = Graph(atomic_numbers=atoms.numbers.astype(np.int64), positions=atoms.positions - atoms.positions.mean(0))
    double, float32 = (collate([build_neighbors(graph, *exact.cutoffs)], d) for d in (torch.float64, torch.float32))
    expected = compute_forces(exact, double)
    print(
        f"{structure.stem}, {len(atoms)} atoms, torch {torch.__version__}, rms force {np.sqrt((expected**2).mean()):.3f} eV/Å"
    )
    print("| arithmetic | rms, meV/Å | largest, meV/Å | products rounded |\n|---|---|---|---|")

    def show(label: str, forces: np.ndarray, count: int | str = "") -> None:
        error = 1000 * (forces - expected)
        print(f"| {label} | {np.sqrt((error**2).mean()):.3f} | {np.abs(error).max():.3f} | {count} |")

    show("float32", compute_forces(single, float32))
    for label, rounding in (("TF32", round_to_tf32), ("bfloat16", round_to_bf16)):
        for geometry in (False, True):
            with RoundedProducts(rounding, geometry) as mode:
                forces = compute_forces(single, float32)
            where = "all products" if geometry else "dense layers"
            show(f"{label} in {where} (emulated)", forces, mode.count)
    show("model.precision=bf16", compute_forces(mixed.eval(), float32))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parameters", type=Path)
    parser.add_argument("structure", type=Path)
    arguments = parser.parse_args()
    sys.exit(main(arguments.parameters, arguments.structure))
