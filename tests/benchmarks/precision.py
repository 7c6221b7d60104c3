"""What arithmetic costs in forces, for trained weights of all models: float32, TF32 (emulated), bf16-mixed, and what it leaves out.

    OMP_NUM_THREADS=1 python tests/benchmarks/precision.py DATA RUN [RUN ...] --published PARAMS.pkl STRUCTURE.xyz

RUN is a folder of a training, DATA a data set that the models are fit for, of which a few held-out conformers are taken. PARAMS.pkl
is SO3LR's published checkpoint, with its hyperparameters.json beside it. Errors are against float64, in training mode. TF32 is
emulated on the CPU as a GPU's matrix units do it: both factors of a product are rounded, sums are float32, in the forward pass
and in derivatives alike. Then what a training pass keeps in memory, and its processor time. Results: precision.md.
"""

import argparse
import contextlib
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import ase.io
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from rounding import RoundedProducts

from so3krates_dist.config import DataSection
from so3krates_dist.data.mixture import Mixture
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.graph import Graph, collate
from so3krates_dist.inference.interop import import_so3lr
from so3krates_dist.model.attention import compute_in
from so3krates_dist.model.potential import Potential
from so3krates_dist.model.registry import load_model, read_model_config
from so3krates_dist.train.proof import choose_fixed_graphs, compare

WIDER = {
    "radial networks": ("radial_filter",),
    "networks of atoms": ("inner_mlp", "outer_mlp", "linear", "mixed_linear"),
    "readout and heads": ("readout_hidden", "readout", "charge_head", "hirshfeld_head"),
}
"""Parts that bf16-mixed leaves as they are, by the names of their modules"""

CONFORMERS_IN_A_PASS = 20


def round_modules(model: Potential, names: Sequence[str]) -> bool:
    """Let modules of some names compute in bfloat16 as well; return whether there are any."""
    chosen = [module for name, module in model.named_modules() if name.rpartition(".")[2] in names]
    for module in chosen:

        def run(*inputs: torch.Tensor, plain: Callable[..., torch.Tensor] = module.forward) -> torch.Tensor:
            first, *rest = inputs
            return compute_in(torch.bfloat16, lambda x: plain(x, *rest), first).float()

        module.forward = run  # type: ignore[method-assign]
    return any(next(module.parameters(), None) is not None for module in chosen)


@contextlib.contextmanager
def tf32(*, geometry: bool) -> Iterator[None]:
    """Emulate TF32: as this package uses it, or in products of geometry too."""
    torch.set_float32_matmul_precision("highest" if geometry else "high")
    with RoundedProducts():
        yield
    torch.set_float32_matmul_precision("highest")


def count_kept_bytes(model: Potential, graphs: Sequence[Graph]) -> int:
    """Return the bytes of all tensors that a training pass keeps for its backward pass, weights aside."""
    batch, kept = collate(graphs), {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(batch)
    for weight in model.parameters():
        kept.pop(weight.untyped_storage().data_ptr(), None)
    assert outputs["forces"].requires_grad
    return sum(kept.values())


def measure_seconds(models: Sequence[Potential], graphs: Sequence[Graph], rounds: int = 5) -> list[float]:
    """Return the median processor time of a forward and backward pass of each model, measured in turn."""
    batch, times = collate(graphs), [list[float]() for _ in models]
    for _ in range(rounds):
        for model, found in zip(models, times, strict=True):
            started = time.process_time()
            model(batch)["forces"].square().sum().backward()
            found.append(time.process_time() - started)
            model.zero_grad()
    return [statistics.median(found) for found in times]


def show(label: str, figures: dict[str, float]) -> None:
    """Print a row of the first table."""
    names = ("proof_forces_error", "proof_energy_error", "proof_net_force", "proof_rotation_error")
    error, energy, net, rotation = (1000 * figures[name] for name in names)
    print(
        f"| {label} | {error:.3g} | {figures['proof_forces_relative']:.1e} | {energy:.2g} | {net:.1g} | {rotation:.2g} |"
    )


def run_model(folder: Path, label: str, graphs: Sequence[Graph]) -> None:
    """Print the tables of a model."""
    exact, single = load_model(folder, dtype=torch.float64), load_model(folder).requires_grad_(True).train()
    mixed = copy.deepcopy(single)
    mixed.set_precision("bf16-mixed")
    size = float(exact(collate(graphs, torch.float64))["forces"].square().mean().sqrt())
    print(f"\n{label}: {sum(g.num_atoms for g in graphs)} atoms, rms force {size:.3f} eV/Å\n")
    print("| arithmetic | forces, meV/Å | relative | energy, meV/atom | net force, meV/Å | rotation, meV/Å |")
    print("|---|---|---|---|---|---|")
    show("float32", compare(single, exact, graphs, "cpu"))
    for geometry, words in ((False, "tf32 (emulated)"), (True, "the same without exact geometry (not used)")):
        with tf32(geometry=geometry):
            show(words, compare(single, exact, graphs, "cpu"))
    models = {"float32": single, "bf16-mixed": mixed}
    for words, names in WIDER.items():
        wider = copy.deepcopy(mixed)
        if round_modules(wider, names):
            models[f"and {words} (not used)"] = wider
    everything = models["all of these (not used)"] = copy.deepcopy(mixed)
    round_modules(everything, [name for names in WIDER.values() for name in names])
    for words, model in list(models.items())[1:]:
        show(words, compare(model, exact, graphs, "cpu"))
    many = [graphs[i % len(graphs)] for i in range(CONFORMERS_IN_A_PASS)]
    kept = [count_kept_bytes(model, many) for model in models.values()]
    seconds = measure_seconds(list(models.values()), many)
    print(
        "\n| arithmetic | kept for the backward pass, MB | ms of processor for a pass | of float32 |\n|---|---|---|---|"
    )
    for words, size, time_of_pass in zip(models, kept, seconds, strict=True):
        share = f"{size / kept[0]:.2f}, {time_of_pass / seconds[0]:.2f}"
        print(f"| {words} | {size / 1e6:.1f} | {1000 * time_of_pass:.0f} | {share} |")


def read_structure(path: Path, cutoffs: tuple[float, float]) -> Graph:
    """Read a molecule from a file, with its pairs."""
    atoms = ase.io.read(path)
    graph = Graph(atomic_numbers=atoms.numbers.astype(np.int64), positions=atoms.positions - atoms.positions.mean(0))
    return build_neighbors(graph, *cutoffs)


def main(data: Path, runs: Sequence[Path], published: Sequence[Path]) -> None:
    """Measure all models."""
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}")
    for run in runs:
        section, _, facts = read_model_config(run)
        mixture = Mixture.open(DataSection(folder=str(data)), section)
        graphs = choose_fixed_graphs(mixture, load_model(run).cutoffs)
        run_model(run, f"{section.name}, {facts['step']} steps", graphs)
    if published:
        with tempfile.TemporaryDirectory() as name:
            import_so3lr(published[0], Path(name) / "so3lr")
            cutoffs = load_model(Path(name) / "so3lr").cutoffs
            run_model(Path(name) / "so3lr", "so3lr, published", [read_structure(published[1], cutoffs)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--published", type=Path, nargs=2, default=())
    arguments = parser.parse_args()
    main(arguments.data, arguments.runs, arguments.published)
