"""Blocks: what goes in comes out, bit for bit, label by label; and what is damaged is refused."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from analytic import assert_same_graph, make_random_graph, write_graphs

from so3krates_dist.data.codec import MAX_BLOCK_CONFORMERS, Block, check_schema, decode_block, encode_block
from so3krates_dist.data.shards import iter_graphs
from so3krates_dist.errors import DataError

MISSING = ("energy", "forces", "stress", "dipole", "partial_charges", "hirshfeld_ratios", "cell", "pbc")


@pytest.mark.parametrize("everything", [False, True])
def test_conformers_survive_a_block_bit_for_bit(everything: bool) -> None:
    graphs = [make_random_graph(i, everything=everything) for i in range(7)]
    block = decode_block(encode_block(graphs))
    assert len(block) == 7
    for before, after in zip(graphs, block, strict=True):
        assert_same_graph(before, after)


def test_arrays_that_do_not_lie_in_c_order_are_stored_right() -> None:
    """safetensors stores memory as it lies, and numpy keeps the columns' order through concatenate (ASE's forces)."""
    graphs = [make_random_graph(i, num_atoms=5) for i in range(3)]
    for graph in graphs:
        graph.forces, graph.positions = np.asfortranarray(graph.forces), np.asfortranarray(graph.positions)
    for before, after in zip(graphs, decode_block(encode_block(graphs)), strict=True):
        assert_same_graph(before, after)


def test_labels_may_be_missing_for_each_conformer(tmp_path: Path) -> None:
    graphs = [make_random_graph(i, everything=True) for i in range(40)]
    generator = np.random.default_rng(0)
    for graph in graphs:
        for name in MISSING:
            if generator.random() < 0.4:
                setattr(graph, name, None)
    block = decode_block(encode_block(graphs))
    for before, after in zip(graphs, block, strict=True):
        assert_same_graph(before, after)
    for name in MISSING:
        has = [getattr(g, name) is not None for g in graphs]
        assert 0 < sum(has) < 40
        assert block.has(name).tolist() == has
        assert block.columns[f"has_{name}"].dtype == np.uint8
        column = block.columns[name]
        rows = np.repeat(has, np.diff(block.offsets)) if len(column) > 40 else np.array(has)
        assert not column[~rows].any() if name == "pbc" else np.isnan(column[~rows]).all(), name
    manifest = write_graphs(tmp_path / "set", {"train": graphs}, block_size=7)
    assert manifest.labels == MISSING[:6]
    assert manifest.label_counts["train"] == {n: sum(getattr(g, n) is not None for g in graphs) for n in MISSING[:6]}
    assert manifest.label_counts["test"] == dict.fromkeys(MISSING[:6], 0)
    for before, after in zip(graphs, iter_graphs(tmp_path / "set", manifest, "train"), strict=True):
        assert_same_graph(before, after)


def test_labels_that_all_or_none_have_take_no_further_column() -> None:
    block = decode_block(encode_block([make_random_graph(1), make_random_graph(2)]))
    assert not [name for name in block.columns if name.startswith("has_")]
    assert block.has("energy").tolist() == [True, True]
    assert block.has("stress").tolist() == [False, False]


def test_a_label_that_is_not_finite_is_no_missing_label() -> None:
    graphs = [make_random_graph(1), make_random_graph(2)]
    graphs[0].energy = float("nan")
    block = decode_block(encode_block(graphs))
    assert block.has("energy").tolist() == [True, True]
    assert np.isnan(block.graph(0).energy)


def test_weights_are_there_where_any_is_not_one() -> None:
    graphs = [make_random_graph(i, everything=True) for i in range(4)]
    plain = encode_block(graphs)
    assert b'schema\\": 2' in plain[:4000]
    for graph, weight in zip(graphs, (1.0, 0.0, 2.5, 1 / 3), strict=True):
        graph.loss_weight = weight
    payload = encode_block(graphs)
    assert b'schema\\": 3' in payload[:4000]
    block = decode_block(payload)
    assert [g.loss_weight for g in block] == [1.0, 0.0, 2.5, float(np.float32(1 / 3))]
    assert block.columns["loss_weight"].dtype == np.float32
    for graph in graphs:
        graph.loss_weight = 1 + 1e-9  # single precision holds no such number
    assert encode_block(graphs) == plain


@pytest.mark.parametrize(("weight", "found"), [(-0.5, "-0.5"), (float("nan"), "nan"), (1e39, "inf")])
def test_weights_that_are_none_are_not_written(weight: float, found: str) -> None:
    graph = make_random_graph(0)
    graph.loss_weight = weight
    message = (
        rf"block must have a loss_weight that is a finite number, not below zero; got {found}\. Correct the weights"
    )
    with pytest.raises(DataError, match=message):
        encode_block([make_random_graph(1), graph])


def test_a_block_is_read_without_copies() -> None:
    payload = encode_block([make_random_graph(i, everything=True) for i in range(3)])
    block = decode_block(payload)
    memory = np.frombuffer(payload, np.uint8)
    for name, column in block.columns.items():
        assert np.shares_memory(column, memory), name
        assert not column.flags.writeable, name
        assert column.ctypes.data % column.itemsize == 0, name


def test_any_safetensors_library_reads_a_block() -> None:
    payload = encode_block([make_random_graph(i, everything=i > 0) for i in range(3)])
    columns, block = safetensors.numpy.load(payload), decode_block(payload)
    assert set(columns) == set(block.columns)
    for name in columns:
        np.testing.assert_array_equal(columns[name], block.columns[name], err_msg=name)


def test_a_block_has_a_limited_number_of_conformers() -> None:
    graph = make_random_graph(0, num_atoms=1)
    with pytest.raises(DataError, match=r"block must have at most 65536 conformers; got 65537\. Write smaller blocks"):
        encode_block([graph] * (MAX_BLOCK_CONFORMERS + 1))


def test_a_block_has_a_limited_number_of_bytes(monkeypatch) -> None:
    monkeypatch.setattr("so3krates_dist.data.codec.MAX_BLOCK_BYTES", 16 * 2**20 + 1000)
    with pytest.raises(DataError, match=r"block must have less than \d+ bytes; got 2\d{3} bytes. Write smaller blocks"):
        encode_block([make_random_graph(0, num_atoms=80)])


def rewrite_block(payload: bytes, *, header: object = None, **columns: np.ndarray | None) -> bytes:
    """Return a block with another header, or with columns replaced (None takes one out)."""
    size = int.from_bytes(payload[:8], "little")
    text = header if header is not None else json.loads(json.loads(payload[8 : 8 + size])["__metadata__"]["so3krates"])
    table = {k: v for k, v in (safetensors.numpy.load(payload) | columns).items() if v is not None}
    if isinstance(text, dict) and header is None:
        text["schema"] = 1  # which had no check sum
    return safetensors.numpy.save(table, metadata={"so3krates": json.dumps(text)})


def replace_header(payload: bytes, old: str, new: str) -> bytes:
    """Return a block with another text in its table, whatever its length."""
    size = int.from_bytes(payload[:8], "little")
    text = payload[8 : 8 + size].replace(old.encode(), new.encode()).rstrip(b" ")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + payload[8 + size :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p[:-5], r"here must be a block of conformers; got"),
        (lambda p: b"", r"here must be a block of conformers; got"),
        (lambda p: b"<html>not found</html>", r"here must be a block of conformers; got"),
        (lambda p: struct.pack("<Q", 2**60) + p[8:], r"here must be a block of conformers; got"),
        (lambda p: rewrite_block(p, positions=None), r"here must have the column `positions`; got atomic_numbers, energy"),
        (lambda p: rewrite_block(p, energy=np.zeros(9)), r"here column `energy` must be float64 \(2,\); got float64 \(9,\)"),
        (lambda p: rewrite_block(p, header={"schema": 4, "groups": []}), r"here must have schema 3 or lower; got 4. Install"),
        (lambda p: rewrite_block(p, loss_weight=np.array([1, -1], "f4")), r"`loss_weight` must be finite .*below zero; got -1\.0"),
        (lambda p: rewrite_block(p, loss_weight=np.array([np.nan, 1], "f4")), r"`loss_weight` must be finite .*; got nan"),
        (lambda p: rewrite_block(p, loss_weight=np.array([1, np.inf], "f4")), r"`loss_weight` must be finite .*; got inf"),
        (lambda p: rewrite_block(p, loss_weight=np.ones(1, "f4")), r"`loss_weight` must be float32 \(2,\); got float32 \(1,"),
        (lambda p: rewrite_block(p, has_loss_weight=np.ones(2, "u1")), r"column `has_loss_weight` must be one of .*; got another"),
        (lambda p: rewrite_block(p, header=[1]), r"here must be a block of conformers; got AttributeError"),
        (lambda p: rewrite_block(p, header={"schema": 1}), r"here must be a block of conformers; got KeyError: 'groups'"),
        (lambda p: rewrite_block(p, header={"schema": 2, "groups": []}), r"here must have the check sum None; got \w{8}"),
        (lambda p: p[:-1] + bytes([p[-1] ^ 1]), r"here must have the check sum \w{8}; got \w{8}\."),
        (lambda p: replace_header(p, "molecule.0", "malecule.0"), r"here must have the check sum \w{8}; got \w{8}\."),
        (lambda p: replace_header(p, '"F64"', '"F16"'), r"here must be a block of conformers; got KeyError: 'F16'"),
        (lambda p: replace_header(p, '"shape":[5,3]', '"shape":[3,5]'), r"here must have the check sum"),
        (lambda p: replace_header(p, '"shape":[5,3]', '"shape":[-5,-3]'), r"got ValueError: column forces of another shape"),
        (lambda p: replace_header(p, '"data_offsets":[0,', '"data_offsets":[-8,'), r"ValueError: column energy of another"),
        (lambda p: replace_header(p, '"shape":[2]', '"shape":[2.0]'), r"got ValueError: column \w+ of another shape or place"),
        (lambda p: p + b"12345678", r"here must be a block of conformers; got ValueError: columns of \d+ bytes where \d+ bytes"),
        (lambda p: rewrite_block(p, num_atoms=np.array([9, -4], np.int32)), r"`num_atoms` must give the atoms, at least one"),
        (lambda p: rewrite_block(p, num_atoms=np.zeros((2, 1), np.int32)), r"`num_atoms` must give .* 1 to 65536 conformers; got"),
        (lambda p: rewrite_block(p, num_atoms=np.zeros(0, np.int32)), r"`num_atoms` must give .*; got int32 \(0,\)"),
        (lambda p: rewrite_block(p, num_atoms=np.array([np.nan, 1])), r"`num_atoms` must give .*; got float64 \(2,\) \[nan, 1.0\]"),
        (lambda p: rewrite_block(p, num_atoms=None), r"here must have the column `num_atoms`; got atomic_numbers"),
        (lambda p: rewrite_block(p, extra=np.zeros(2)), r"here column `extra` must be one of atomic_numbers, positions, forces"),
        (lambda p: rewrite_block(p, has_stress=np.zeros(2, np.uint8)), r"`has_stress` must be 0 or 1, beside what it is about"),
        (lambda p: rewrite_block(p, has_energy=np.full(2, 2, np.uint8)), r"`has_energy` must be 0 or 1, beside what it is about"),
        (lambda p: rewrite_block(p, has_energy=np.zeros(2, bool)), r"`has_energy` must be uint8 \(2,\); got bool \(2,\)"),
        (lambda p: rewrite_block(p, group=np.array([0, 2], np.int32)), r"column `group` must count the 2 groups; got \[0, 2\]"),
        (lambda p: rewrite_block(p, group=np.array([0, -1], np.int32)), r"here column `group` must count the 2 groups; got"),
        (lambda p: rewrite_block(p, header={"groups": []}), r"here must name its schema, an integer from 1; got None"),
    ],
)  # fmt: skip
def test_damaged_blocks_are_refused(damage, message: str) -> None:
    payload = encode_block([make_random_graph(0, num_atoms=3), make_random_graph(1, num_atoms=2)])
    assert isinstance(decode_block(payload), Block)
    with pytest.raises(DataError, match=message):
        decode_block(damage(payload), "here")


@pytest.mark.parametrize("schema", [None, 0, "1", 1.0])
def test_a_schema_is_a_positive_integer(schema: object) -> None:
    with pytest.raises(DataError, match=f"file must name its schema, an integer from 1; got {schema!r}"):
        check_schema(schema, "file")


def test_every_bit_that_flips_is_noticed() -> None:
    """In the table by what it says or by the check sum, in the columns by the check sum; never by another error."""
    payload = encode_block([make_random_graph(0, num_atoms=3), make_random_graph(1, num_atoms=2)])
    first = 8 + int.from_bytes(payload[:8], "little")
    unnoticed = []
    for position in (*range(first), *range(first, len(payload), 7)):
        for bit in range(8):
            damaged = payload[:position] + bytes([payload[position] ^ 1 << bit]) + payload[position + 1 :]
            try:
                decode_block(damaged)
            except DataError:
                continue
            unnoticed.append((position, bit))
    assert not unnoticed
