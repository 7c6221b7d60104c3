"""What a model attends to in a structure: pictures, raw numbers, and the verb `so3krates explain`.

Coefficients are those that multiply the messages: signed, with envelope, one set for each layer and head (GeomAtt: order). Where an
atom looks at several periodic images of another one, their coefficients are several edges; matrices hold the sum. An explanation
of what the model does, not of what nature does: large coefficients multiply messages that may be small.
"""

import argparse
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import ase.io
import numpy as np
import torch
from ase import Atoms

from so3krates_dist import __version__
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.distributed import Rank, choose_device, tune_machine
from so3krates_dist.errors import CheckpointError, ConfigError, DataError
from so3krates_dist.files import make_folder, put_in_place
from so3krates_dist.graph import FloatArray, Graph, GraphBatch, IntArray, collate
from so3krates_dist.inference.attention_pictures import (
    BoolArray,
    Panel,
    find_strongest,
    plot_attention,
    plot_overview,
)
from so3krates_dist.inference.calculator import DTYPES, make_graph, suppose_closed_shell
from so3krates_dist.metrics import print_table
from so3krates_dist.model.potential import Potential, compute_vectors, describe_ignored
from so3krates_dist.model.record import AttentionMap
from so3krates_dist.model.registry import load_model, read_model_config

NUMBERS_NAME: Final = "attention.npz"
NUM_STRONGEST: Final = 5
"""pairs of atoms that the table shows of each block"""
MAX_ATOMS: Final = 1000
"""Matrices are of all pairs of atoms; while those of GeomAtt are computed, as many as an order has channels: 3 GB"""
ORDER_PREFIX: Final = "order "
"""kinds of GeomAtt, whose coefficients act on features linearly: their layers can be multiplied"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """Attention of one block of a model."""

    layer: int
    """counted from 0"""
    kind: str
    """`feature`, `geometric`, or `order k`"""
    heads: tuple[str, ...]
    receivers: IntArray
    """(num_edges,) atom whose features change"""
    senders: IntArray
    """(num_edges,) atom that is looked at"""
    values: FloatArray
    """(num_edges, num_heads)"""
    vectors: FloatArray | None
    """(num_edges, 3) Å from receiver to sender, which tells periodic images apart; None where edges are no neighbour pairs"""
    matrices: FloatArray
    """(num_heads, num_atoms, num_atoms) from each sender (column) to each receiver (row), summed over periodic images"""
    connected: BoolArray
    """(num_atoms, num_atoms) whether there is any edge"""

    @property
    def symmetric(self) -> FloatArray:
        """Return (num_atoms, num_atoms) means of both directions, of the head where their absolute value is largest."""
        mean = (self.matrices + self.matrices.swapaxes(1, 2)) / 2
        return np.asarray(np.take_along_axis(mean, np.abs(mean).argmax(0)[None], 0)[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explanation:
    """Attention of all blocks of a model in one structure."""

    atoms: Atoms
    graph: Graph
    """the structure with its charge and number of unpaired electrons"""
    blocks: tuple[Block, ...]
    notes: tuple[str, ...] = ()
    """lines about what was supposed of the structure"""

    @property
    def rollouts(self) -> dict[str, FloatArray]:
        """Return the product over layers of one plus attention, (num_atoms, num_atoms) for each order of a GeomAtt model.

        A layer of GeomAtt (arXiv 2106.02549) adds to each atom's features the attention times a linear map of all atoms' features.
        But for these maps the product is what an atom's last features have of each atom's first ones.
        """
        products: dict[str, FloatArray] = {}
        for block in self.blocks:
            if block.kind.startswith(ORDER_PREFIX):
                step = np.eye(len(self.atoms)) + block.matrices.sum(0)
                products[block.kind] = step @ products[block.kind] if block.kind in products else step
        return products


def explain(potential: Potential, atoms: Atoms) -> Explanation:
    """Compute a model's attention in a structure.

    Args:
        potential: A model in evaluation mode; computes in its own dtype, on its own device.
        atoms: Structure; charge and spin in `info`, as for `So3kratesCalculator`.

    Raises:
        DataError: The model cannot be used for this structure, or it has more than `MAX_ATOMS` atoms.
        CheckpointError: The model gives coefficients that are not finite.
    """
    if len(atoms) > MAX_ATOMS:
        rule, remedy = f"have at most {MAX_ATOMS} atoms to be explained", "Cut out the part that matters"
        raise DataError(atoms.get_chemical_formula(), rule, len(atoms), remedy)
    graph = make_graph(atoms)
    graph, note = suppose_closed_shell(graph, atoms, potential)
    potential.check_structure(graph)
    parameter = next(potential.parameters())
    batch = collate([build_neighbors(graph, *potential.cutoffs)], parameter.dtype).to(parameter.device)
    blocks = tuple(_make_block(m, batch) for m in potential.record_attention(batch))
    names = [(b.layer, b.kind) for b in blocks]
    assert len(set(names)) == len(names), "each block of a layer has its own kind"
    if not all(np.isfinite(b.values).all() for b in blocks):
        raise CheckpointError("model", "give finite attention", "nan or infinity", "Take weights from an earlier step")
    return Explanation(atoms=atoms, graph=graph, blocks=blocks, notes=(note,) if note else ())


def _make_block(attention: AttentionMap, batch: GraphBatch) -> Block:
    num_atoms = len(batch.atomic_numbers)
    receivers, senders = attention.receivers.cpu().numpy(), attention.senders.cpu().numpy()
    values = attention.values.double().cpu().numpy()
    matrices = np.zeros((len(attention.heads), num_atoms, num_atoms))
    connected = np.zeros((num_atoms, num_atoms), bool)
    for matrix, column in zip(matrices, values.T, strict=True):
        np.add.at(matrix, (receivers, senders), column)
    connected[receivers, senders] = True
    return Block(
        layer=attention.layer, kind=attention.kind, heads=attention.heads, receivers=receivers, senders=senders,
        values=values, vectors=_find_vectors(attention, batch), matrices=matrices, connected=connected,
    )  # fmt: skip


def _find_vectors(attention: AttentionMap, batch: GraphBatch) -> FloatArray | None:
    """Return the edges' vectors where the edges are the neighbour pairs, then the same reversed."""
    first, second = batch.pair_first[: batch.num_short_pairs], batch.pair_second[: batch.num_short_pairs]
    same = torch.equal(attention.receivers, torch.cat([first, second]))
    if not (same and torch.equal(attention.senders, torch.cat([second, first]))):
        return None
    vectors = compute_vectors(batch)[: batch.num_short_pairs]
    return np.asarray(torch.cat([vectors, -vectors]).double().cpu().numpy())


# ----------------------------------------------------------------------------------------------------------------- the files


def make_arrays(explanation: Explanation) -> dict[str, np.ndarray[Any, Any]]:
    """Return the raw numbers: what `attention.npz` holds.

    Args:
        explanation: Of a structure with n atoms.

    Returns:
        `positions` (n, 3) Å, `atomic_numbers` (n,), `total_charge` e, `num_unpaired_electrons`; `cell` (3, 3) Å and `pbc` (3,)
        where the structure is periodic; for each block `layer<i>/<kind>/receivers`, `/senders` (num_edges,), `/values`
        (num_edges, num_heads), `/heads` (num_heads,), where edges are neighbour pairs `/vectors` (num_edges, 3) Å from receiver
        to sender, and for each head `layer<i>/<kind>/<head>/matrix` (n, n), row = receiver, summed over periodic images; for
        each order of a GeomAtt model `rollout/<kind>/matrix` (n, n).
    """
    atoms, graph = explanation.atoms, explanation.graph
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "positions": np.asarray(atoms.positions, np.float64),
        "atomic_numbers": graph.atomic_numbers,
        "total_charge": np.array(graph.total_charge),
        "num_unpaired_electrons": np.array(graph.num_unpaired_electrons),
    }
    if graph.is_periodic:
        assert graph.cell is not None
        assert graph.pbc is not None
        arrays |= {"cell": graph.cell, "pbc": graph.pbc}
    for block in explanation.blocks:
        name = f"layer{block.layer}/{block.kind}"
        arrays[f"{name}/heads"] = np.array(block.heads)
        arrays |= {f"{name}/{key}": getattr(block, key) for key in ("receivers", "senders", "values")}
        if block.vectors is not None:
            arrays[f"{name}/vectors"] = block.vectors
        for head, matrix in zip(block.heads, block.matrices, strict=True):
            arrays[f"{name}/{head}/matrix"] = matrix
    return arrays | {f"rollout/{kind}/matrix": product for kind, product in explanation.rollouts.items()}


def write_explanation(explanation: Explanation, folder: Path, model: str) -> list[Path]:
    """Write `attention.npz` and the pictures; each file is complete under its name or not there at all.

    Args:
        explanation: What to write.
        folder: Made where it does not exist; files of the same names are replaced, others stay.
        model: Name of the model, for the titles.

    Returns:
        The files.
    """
    make_folder(folder)
    numbers = folder / NUMBERS_NAME
    temporary = numbers.with_name(f".{numbers.name}.tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(
            file, allow_pickle=False, version=np.array(__version__), model=np.array(model), **make_arrays(explanation)
        )
    put_in_place(temporary, numbers)
    atoms, title = explanation.atoms, f"{model}: {explanation.graph.group}"
    files = [numbers]
    pages = _make_pages(explanation.blocks)
    for (layer, kind), panels in pages.items():
        files.append(folder / f"layer{layer}-{_make_name(kind)}.png")
        plot_attention(atoms, panels, files[-1], f"{title}, layer {layer}, {kind} attention")
    for kind in dict.fromkeys(kind for _, kind in pages):
        rows = {layer: panels for (layer, other), panels in pages.items() if other == kind}
        if len(rows) > 1:
            files.append(folder / f"all-layers-{_make_name(kind)}.png")
            named = [[dataclasses.replace(p, title=f"layer {i}, {p.title}") for p in row] for i, row in rows.items()]
            plot_overview(atoms, named, files[-1], f"{title}, {kind} attention in all layers")
    if explanation.rollouts:
        files.append(folder / "rollout.png")
        plot_attention(
            atoms, _make_rollout_panels(explanation), files[-1], f"{title}, rollout: ∏ (1 + a) - 1 over all layers"
        )
    return files


def _make_pages(blocks: Sequence[Block]) -> dict[tuple[int, str], list[Panel]]:
    """Return the panels of each page by layer and kind; orders of a layer share a page."""
    pages: dict[tuple[int, str], list[Panel]] = {}
    for block in blocks:
        is_order = block.kind.startswith(ORDER_PREFIX)
        panels = pages.setdefault((block.layer, "geometric" if is_order else block.kind), [])
        for head, matrix in zip(block.heads, block.matrices, strict=True):
            title = head if not is_order else block.kind if len(block.heads) == 1 else f"{block.kind}, {head}"
            panels.append(Panel(title=title, matrix=matrix, connected=block.connected))
    return pages


def _make_rollout_panels(explanation: Explanation) -> list[Panel]:
    """Return what the layers add to an atom's own features: the ones on the diagonal would hide all else."""
    one = np.eye(len(explanation.atoms))
    everywhere = np.ones_like(one, dtype=bool)
    return [
        Panel(title=kind, matrix=product - one, connected=everywhere) for kind, product in explanation.rollouts.items()
    ]


def _make_name(text: str) -> str:
    """Return a text as part of a file's name."""
    return re.sub(r"[^\w+.-]+", "_", text).strip("._") or "structure"


# ------------------------------------------------------------------------------------------------------------------ the verb


def read_structure(path: Path, index: int | None, electrons: Mapping[str, int | None]) -> Atoms:
    """Read one structure from a file.

    Args:
        path: File that ASE reads.
        index: Which structure, from 0, or from the end where negative; None: the last one.
        electrons: `charge` and `spin` for files that do not say them; None: as `read_electrons` supposes.

    Raises:
        DataError: The file cannot be read, or has no such structure.
        ConfigError: The file says another charge or spin.
    """
    try:
        frames = ase.io.read(path, index=":")
    except Exception as error:  # ASE's readers raise what their parsers happen to raise
        got = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".rstrip(".: ")
        raise DataError(str(path), "be a structure file that ASE reads", got, "Give an .xyz file") from error
    index = -1 if index is None else index
    if not -len(frames) <= index < len(frames):
        got = f"{len(frames)} of them"
        raise DataError(str(path), f"have a structure of index {index}", got, "Take another --index, counted from 0")
    atoms: Atoms = frames[index]
    for name, value in electrons.items():
        said = atoms.info.get(name)
        if value is not None and said is not None and said != value:
            raise ConfigError(f"--{name}", f"agree with {path} ({said})", value, "Leave it out, or correct the file")
        if value is not None:
            atoms.info[name] = value
    return atoms


def make_rows(explanation: Explanation) -> list[list[str]]:
    """Return the strongest pairs of each block: a row of text each, its name first."""
    rows = []
    for block in explanation.blocks:
        found = find_strongest(explanation.atoms, block.symmetric, NUM_STRONGEST)
        rows.append([f"layer {block.layer}, {block.kind}", *found, *["-"] * (NUM_STRONGEST - len(found))])
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `so3krates explain`."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="run folder, or a folder with model.safetensors")
    parser.add_argument("structure", metavar="FILE", type=Path, help="structure file that ASE reads, e.g. .xyz")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="where the results go (default: MODEL/explain/NAME-OF-THE-FILE)"
    )
    parser.add_argument(
        "--index", type=int, help="which structure of the file, counted from 0; negative: from the end (default: last)"
    )
    parser.add_argument("--charge", type=int, help="total charge in e, where the file does not say it (default: 0)")
    parser.add_argument(
        "--spin", type=int,
        help="multiplicity or number of unpaired electrons, where the file does not say it (default: none or one unpaired)",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="cpu", help="where to compute (default: cpu)"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float64", help="precision (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Explain one structure, print a table, return the exit code."""
    folder: Path = arguments.model
    section, _, _ = read_model_config(folder)
    path: Path = arguments.structure
    atoms = read_structure(path, arguments.index, {"charge": arguments.charge, "spin": arguments.spin})
    device = choose_device(arguments.device, Rank())
    tune_machine(1, device)
    explanation = explain(load_model(folder, device=device, dtype=DTYPES[arguments.dtype]), atoms)
    name = _make_name(path.stem if arguments.index is None else f"{path.stem}-{arguments.index}")
    out: Path = folder / "explain" / name if arguments.out is None else arguments.out
    model = f"{section.name} ({folder.resolve().name})"
    make_folder(out)
    files = write_explanation(explanation, out, model)
    title = f"{model}, {path.name}: strongest pairs of each block, (a + aᵀ)/2 of the head where it is largest"
    print_table(title, ("", *(str(i + 1) for i in range(NUM_STRONGEST))), make_rows(explanation))
    present = [n for n in ("total_charge", "num_unpaired_electrons") if getattr(explanation.graph, n)]
    for line in (*explanation.notes, describe_ignored(section.sees, present), *(f"written {file}" for file in files)):
        if line:
            print(line)
    return 0
