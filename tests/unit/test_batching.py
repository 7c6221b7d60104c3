"""Batches from columns are those of `collate([build_neighbors(graph), ...])`, bit for bit, in one buffer."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from so3krates_dist.data.batching import Table, unpack
from so3krates_dist.data.codec import Block, decode_block, encode_block
from so3krates_dist.data.neighbors import MAX_ATOMS_ALL_PAIRS, NeighborPairs, build_neighbors
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph, GraphBatch, collate

LABELS = ("energy", "forces", "stress", "dipole", "hirshfeld_ratios", "partial_charges")


def make_graph(seed: int, num_atoms: int, labels: Sequence[str] = ("energy", "forces"), group: str = "") -> Graph:
    rng = np.random.default_rng(seed)
    size = (num_atoms / 0.08) ** (1 / 3) + 0.5
    values = {
        "energy": float(rng.normal(-1e5, 1.0)),
        "forces": rng.normal(size=(num_atoms, 3)).astype(np.float32),
        "stress": rng.normal(size=(3, 3)).astype(np.float32),
        "dipole": rng.normal(size=3).astype(np.float32),
        "hirshfeld_ratios": rng.uniform(0.5, 1, num_atoms).astype(np.float32),
        "partial_charges": rng.normal(size=num_atoms).astype(np.float32),
    }
    return Graph(
        atomic_numbers=rng.integers(1, 119, num_atoms),
        positions=rng.uniform(-50, -50 + size, (num_atoms, 3)).astype(np.float32),
        total_charge=float(rng.integers(-2, 3)),
        num_unpaired_electrons=float(rng.integers(0, 3)),
        group=group or f"size{num_atoms}",
        **{name: values[name] for name in labels},
    )


def make_crystal(seed: int, pbc: Sequence[bool] = (True, True, True)) -> Graph:
    cell = np.array([[4.0, 0.1, 0.0], [0.7, 4.4, 0.0], [0.3, -0.7, 5.1]])
    return dataclasses.replace(
        make_graph(seed, 5, ("energy", "forces", "stress"), "crystal"), cell=cell, pbc=np.array(pbc)
    )


def decode(graphs: Sequence[Graph], block_size: int = 7) -> list[Block]:
    return [decode_block(encode_block(graphs[i : i + block_size])) for i in range(0, len(graphs), block_size)]


def make_table(blocks: Sequence[Block]) -> Table:
    table = Table([len(b) for b in blocks], [int(b.offsets[-1]) for b in blocks])
    for number in reversed(range(len(blocks))):  # in any order
        table.put(number, blocks[number])
    return table


def assemble(table: Table, rows: Sequence[int], cutoffs: tuple[float, float]) -> torch.Tensor:
    index = np.array(rows, np.int64)
    return table.assemble(index, [table.find_pairs(row, *cutoffs) for row in rows])


def assert_same(found: GraphBatch, expected: GraphBatch) -> None:
    for field in dataclasses.fields(GraphBatch):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(other, torch.Tensor):
            assert (one.dtype, one.shape) == (other.dtype, other.shape), field.name
            same = one.contiguous().numpy().tobytes() == other.contiguous().numpy().tobytes()
            assert same, f"{field.name}: {one} instead of {other}"
        else:
            assert one == other, field.name


def check(graphs: Sequence[Graph], rows: Sequence[int], cutoffs: tuple[float, float]) -> GraphBatch:
    """Compare with the way through structures, which come from the same blocks."""
    blocks = decode(graphs)
    stored = [graph for block in blocks for graph in block]
    batch = unpack(assemble(make_table(blocks), rows, cutoffs))
    assert_same(batch, collate([build_neighbors(stored[row], *cutoffs) for row in rows]))
    return batch


def shuffle(count: int) -> list[int]:
    return np.random.default_rng(count).permutation(count).tolist()


@pytest.mark.parametrize("cutoffs", [(5.0, 5.0), (3.0, 7.0), (4.0, math.inf), (100.0, 100.0), (0.1, 0.1)])
def test_molecules(cutoffs: tuple[float, float]) -> None:
    graphs = [make_graph(i, 1 + i % 30) for i in range(40)]
    batch = check(graphs, shuffle(40)[:25], cutoffs)
    assert batch.cell is batch.stress is batch.dipole is batch.pair_shifts is None
    assert batch.num_short_pairs <= len(batch.pair_first)


def test_a_molecule_too_large_for_all_pairs() -> None:
    graphs = [make_graph(0, MAX_ATOMS_ALL_PAIRS + 5), make_graph(1, MAX_ATOMS_ALL_PAIRS), make_graph(2, 3)]
    for cutoffs in ((4.0, 4.0), (4.0, 8.0), (4.0, math.inf)):
        check(graphs, [2, 0, 1], cutoffs)


@pytest.mark.parametrize("cutoffs", [(4.0, 4.0), (3.0, 6.5)])
def test_crystals_among_molecules(cutoffs: tuple[float, float]) -> None:
    molecule = dataclasses.replace(make_graph(9, 6), cell=3 * np.eye(3), pbc=np.zeros(3, bool))
    wire = make_crystal(7, (False, True, False))
    graphs = [make_graph(0, 4), make_crystal(1), molecule, wire, make_graph(3, 5), make_crystal(4), make_graph(5, 1)]
    batch = check(graphs, [3, 0, 6, 1, 2, 5], cutoffs)
    assert batch.pbc is not None
    assert batch.pbc.any(dim=1).tolist() == [True, False, False, True, False, True]
    without = check(graphs, [0, 2, 4], cutoffs)
    assert without.pbc is without.cell is without.pair_shifts is None, "only of those that are in the batch"


def test_a_periodic_structure_whose_cell_is_not_known() -> None:
    graph = dataclasses.replace(make_graph(0, 4), pbc=np.ones(3, bool))
    table = make_table(decode([graph]))
    batch = unpack(table.assemble(np.array([0]), [NeighborPairs(np.zeros(0, int), np.zeros(0, int), None, 0)]))
    assert batch.cell is not None
    assert not batch.cell.any()
    assert table.get_box(0)[1] is None


def test_labels_that_some_lack() -> None:
    """Conformer i has label k where bit k of i is set; blocks have columns that others have not."""
    graphs = [make_graph(i, 2 + i % 5, [n for k, n in enumerate(LABELS) if i >> k & 1]) for i in range(64)]
    whole = check(graphs, shuffle(64), (4.0, 4.0))
    for label in LABELS:
        assert getattr(whole, label).isnan().any(), label
    for row in range(64):
        batch = check(graphs, [row], (4.0, 4.0))
        present = [getattr(batch, label) is not None for label in LABELS]
        assert present == [bool(row >> k & 1) for k in range(6)]


def test_weights_in_the_loss() -> None:
    """Blocks have them or not; batches of ones have none."""
    graphs = [make_graph(i, 2 + i % 5) for i in range(30)]
    for row in (3, 8, 12):
        graphs[row].loss_weight = 0.25 * row
    batch = check(graphs, shuffle(30), (4.0, 4.0))
    assert batch.loss_weight is not None
    assert sorted(batch.loss_weight.tolist()) == [0.75, *[1.0] * 27, 2.0, 3.0]
    assert check(graphs, [0, 4, 29], (4.0, 4.0)).loss_weight is None
    assert check(graphs, [4, 3], (4.0, 4.0)).loss_weight.tolist() == [1.0, 0.75]  # type: ignore[union-attr]


def test_weights_of_blocks_are_factors_of_those_of_conformers() -> None:
    graphs = [make_graph(i, 3) for i in range(8)]
    graphs[1].loss_weight, graphs[6].loss_weight, graphs[7].loss_weight = 4.0, 0.0, 0.5
    blocks = decode(graphs, 2)
    table = Table([2] * 4, [6] * 4)
    for number, factor in enumerate((0.5, 0.0, 1.0, 2.0)):
        table.put(number, blocks[number], factor)
    batch = unpack(assemble(table, range(8), (4.0, 4.0)))
    assert batch.loss_weight is not None
    assert batch.loss_weight.tolist() == [0.5, 2.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    assert unpack(assemble(table, [4, 5, 7], (4.0, 4.0))).loss_weight is None, "all products are 1"


def test_what_a_missing_label_is_stored_as_does_not_matter() -> None:
    graphs = [make_crystal(1), make_graph(2, 3, ("energy", "dipole")), make_graph(3, 4, ())]
    (block,) = decode(graphs)
    columns = {name: np.array(column) for name, column in block.columns.items()}
    for name in ("energy", "forces", "stress", "dipole", "cell", "pbc"):
        has = block.has(name)
        columns[name][~(np.repeat(has, np.diff(block.offsets)) if name == "forces" else has)] = 1
    table = make_table([dataclasses.replace(block, columns=columns)])
    expected = collate([build_neighbors(g, 4.0) for g in block])
    assert_same(unpack(assemble(table, [0, 1, 2], (4.0, 4.0))), expected)


def test_groups_of_any_name() -> None:
    names = ["", "C2H6O", "a b", "x\0y", "éthane", 'quoted "'] * 2
    graphs = [make_graph(i, 2, group=name or "n") for i, name in enumerate(names)]
    graphs[0].group = ""
    batch = check(graphs, [11, 3, 0, 9, 4, 5, 1], (4.0, 4.0))
    assert batch.group == ('quoted "', "x\0y", "", "x\0y", "éthane", 'quoted "', "C2H6O")
    table = make_table(decode(graphs))
    assert [table.get_group(row) for row in range(3)] == ["", "C2H6O", "a b"]


def test_a_batch_of_nothing() -> None:
    table = make_table(decode([make_crystal(0)]))
    assert_same(unpack(table.assemble(np.zeros(0, np.int64), [])), collate([]))


def test_all_fields_are_views_of_one_aligned_buffer() -> None:
    graphs = [make_graph(i, 3 + i, LABELS) for i in range(5)] + [make_crystal(3)]
    buffer = assemble(make_table(decode(graphs)), [4, 5, 1], (3.0, 5.0))
    assert buffer.dtype == torch.uint8
    batch = unpack(buffer)
    tensors = {f.name: getattr(batch, f.name) for f in dataclasses.fields(GraphBatch)}
    tensors = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    assert len(tensors) == 17
    for name, tensor in tensors.items():
        assert tensor.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr(), name
        assert (tensor.data_ptr() - buffer.data_ptr()) % 64 == 0, name
    used = sum(t.nbytes for t in tensors.values())
    assert used < buffer.nbytes < used + 64 * (len(tensors) + 4)


def test_atoms_on_top_of_each_other_are_refused() -> None:
    molecule, crystal = make_graph(0, 4), make_crystal(1)
    molecule.positions[3] = molecule.positions[1]
    crystal.positions[3] = crystal.positions[1]
    table = make_table(decode([molecule, crystal]))
    for row in (0, 1):
        with pytest.raises(DataError, match=r"must have its atoms at least 0\.001 Å apart; got 0 Å\."):
            table.find_pairs(row, 4.0, 4.0)


def test_a_crystal_has_no_list_of_all_its_pairs() -> None:
    table = make_table(decode([make_graph(0, 2), make_crystal(1)]))
    with pytest.raises(DataError, match="must be a molecule where a model looks at all pairs of atoms"):
        table.find_pairs(1, 4.0, math.inf)
    assert table.is_periodic(np.array([0, 1])).tolist() == [False, True]


def test_rows_of_blocks_that_are_not_there() -> None:
    blocks = decode([make_graph(i, 2 + i % 3) for i in range(20)])
    table = Table([len(b) for b in blocks], [int(b.offsets[-1]) for b in blocks])
    table.put(1, blocks[1])
    assert table.is_there.tolist() == [False] * 7 + [True] * 7 + [False] * 6
    expected = collate([build_neighbors(g, 4.0) for g in blocks[1]])
    assert_same(unpack(assemble(table, range(7, 14), (4.0, 4.0))), expected)
