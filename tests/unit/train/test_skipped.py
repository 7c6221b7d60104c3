"""Stored steps: what is written is what is read, damaged or hostile files are refused in one line, and format 1 loads for ever."""

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from analytic import label, make_cluster, make_morse
from safetensors.torch import load_file, save_file
from training_setup import make_graphs

from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.distributed import Rank
from so3krates_dist.errors import CheckpointError
from so3krates_dist.graph import GraphBatch, collate
from so3krates_dist.model.potential import ModelStatistics
from so3krates_dist.train import skipped
from so3krates_dist.train.guard import Verdict
from so3krates_dist.train.skipped import write_step
from so3krates_dist.train.stored_step import FIELDS, FORMAT, StepFacts, compute_checksum, list_steps, read_step

STORED = Path(__file__).parents[2] / "data" / "skipped_format_1"
WEIGHTS_SUM = 37.24228372244397
CPU = torch.device("cpu")
STATISTICS = ModelStatistics(
    elements=(10, 18), energy_baselines={10: -1.0, 18: -2.0}, energy_scale=0.5, mean_neighbors=4.0
)


def make_facts(step: int = 7, **changes: Any) -> StepFacts:
    facts = StepFacts(
        step=step, data_step=step + 2, loss=float("nan"), gradient_norm=float("inf"), verdict=Verdict.NON_FINITE,
        usual_loss=0.25, counts={"energy": 5.0, "forces": 90.0}, loss_weights={"energy": 1.0, "forces": 0.5},
        statistics=STATISTICS, precision="float32", device="cpu",
    )  # fmt: skip
    return dataclasses.replace(facts, **changes)


def make_batches() -> list[GraphBatch]:
    """Return molecules, periodic structures with nan and infinity among them, and nothing."""
    molecules = collate([build_neighbors(graph, 4.0, 4.0) for graph in make_graphs(3)])
    crystal = make_cluster(5, num_atoms=4, group="crystal")
    crystal.cell, crystal.pbc = 9.0 * torch.eye(3).numpy(), torch.tensor([True] * 3).numpy()
    odd = [label(crystal, make_morse()), make_graphs(1)[0]]
    odd[1].loss_weight, odd[1].dipole, odd[1].group = 0.5, torch.tensor([0.0, 1.0, float("inf")]).numpy(), "Ä\n∞"
    mixed = collate([build_neighbors(graph, 3.0, 4.0) for graph in odd])
    mixed.positions[1, 2] = float("nan")
    return [molecules, mixed, collate([])]


def store(folder: Path, facts: StepFacts | None = None, keep: int = 3) -> str:
    weights = {"network.a": torch.arange(6.0).view(2, 3), "network.b": torch.tensor(2.0)}
    return write_step(folder, facts or make_facts(), make_batches(), weights, Rank(), CPU, keep)


def assert_equal(first: GraphBatch, second: GraphBatch) -> None:
    for field in dataclasses.fields(GraphBatch):
        one, two = getattr(first, field.name), getattr(second, field.name)
        if isinstance(one, torch.Tensor):
            assert one.dtype == two.dtype
            assert torch.equal(one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8)), field.name
        else:
            assert one == two, field.name


class TestWriting:
    def test_what_was_stored_is_read(self, tmp_path: Path) -> None:
        line = store(tmp_path)
        assert line == f"`so3krates replay {tmp_path} 7` repeats it"
        stored = read_step(tmp_path, 7)
        for one, two in zip(make_batches(), stored.batches[0], strict=True):
            assert_equal(one, two)
        assert torch.equal(stored.weights["network.a"], torch.arange(6.0).view(2, 3))
        assert stored.weights["network.b"].shape == ()
        facts = dataclasses.asdict(stored.facts)
        assert str(facts) == str(dataclasses.asdict(make_facts())), "as text, since nan is not equal to itself"

    def test_no_pickle_and_no_nan_in_json(self, tmp_path: Path) -> None:
        store(tmp_path)
        folder = tmp_path / "skipped" / "step_00000007"
        assert sorted(p.name for p in folder.iterdir()) == [
            "batches-00000.safetensors",
            "facts.json",
            "weights.safetensors",
        ]

        def refuse(word: str) -> None:
            raise AssertionError(word)

        content = json.loads((folder / "facts.json").read_text(), parse_constant=refuse)
        assert content["loss"] == "nan"
        assert content["verdict"] == "non-finite"
        assert content["conformers"] == [[["size4", "size5", "size6"], ["crystal", "Ä\n∞"], []]]

    def test_the_last_written_are_kept(self, tmp_path: Path) -> None:
        for place, step in enumerate((30, 20, 40, 10)):
            store(tmp_path, make_facts(step), keep=2)
            facts = tmp_path / "skipped" / f"step_{step:08d}" / "facts.json"
            os.utime(facts, (1e9 + place, 1e9 + place))  # as if some time passed
        assert list_steps(tmp_path) == [10, 40]

    def test_the_same_step_again(self, tmp_path: Path) -> None:
        store(tmp_path)
        store(tmp_path, make_facts(loss=3.0))
        assert read_step(tmp_path, 7).facts.loss == 3.0

    def test_what_a_killed_run_left_is_no_step_and_goes(self, tmp_path: Path) -> None:
        for name in (".step_00000007.tmp", ".step_00000003.tmp"):
            (tmp_path / "skipped" / name).mkdir(parents=True)
            (tmp_path / "skipped" / name / "batches-00004.safetensors").write_bytes(b"half")
        assert list_steps(tmp_path) == []
        store(tmp_path)
        assert [p.name for p in (tmp_path / "skipped").iterdir()] == ["step_00000007"]
        assert len(list((tmp_path / "skipped" / "step_00000007").iterdir())) == 3

    @pytest.mark.parametrize("name", ["_write", "_commit"])
    def test_a_full_disk_is_a_line_of_the_log(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        def fail(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(skipped, name, fail)
        assert store(tmp_path) == "it could not be stored for replay: [Errno 28] No space left on device"
        assert list((tmp_path / "skipped").iterdir()) == []

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "skipped").write_text("a file")
        assert store(tmp_path).startswith("it could not be stored for replay: [Errno 17] File exists")

    def test_a_run_folder_that_has_vanished_does_not_come_back(self, tmp_path: Path) -> None:
        assert "[Errno 2] No such file or directory" in store(tmp_path / "gone")
        assert not (tmp_path / "gone").exists()

    def test_the_reader_knows_every_field(self) -> None:
        """A field that is added to `GraphBatch` has to be added there too, and needs another format where it is not optional."""
        names = {f.name for f in dataclasses.fields(GraphBatch)} - {"num_short_pairs", "group"}
        assert names == FIELDS.keys()
        assert FORMAT == 1


# ------------------------------------------------------------------------------------------------------- damaged and hostile


def change_facts(**changes: Any) -> Callable[[Path], None]:
    """Return what alters the facts as somebody does who knows the checksum."""

    def change(folder: Path) -> None:
        content = json.loads((folder / "facts.json").read_text()) | changes
        content = {k: v for k, v in content.items() if v is not ...}
        content["checksum"] = compute_checksum(content)
        (folder / "facts.json").write_text(json.dumps(content))

    return change


def change_tensors(name: str, changes: dict[str, Any], texts: dict[str, str] | None = None) -> Callable[[Path], None]:
    """Return what writes a file anew with other tensors, all hashes right."""

    def change(folder: Path) -> None:
        from safetensors import safe_open

        tensors = load_file(folder / name)
        with safe_open(folder / name, "pt") as file:
            metadata = dict(file.metadata()) | (texts or {})
        for key, value in changes.items():
            if callable(value):
                tensors[key] = value(tensors[key])
            elif value is None:
                del tensors[key]
            else:
                tensors[key] = value
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / name, metadata)
        sign(folder, name)

    return change


def sign(folder: Path, name: str) -> None:
    from so3krates_dist.files import hash_file

    files = json.loads((folder / "facts.json").read_text())["files"]
    files[name] = {"size": (folder / name).stat().st_size, "sha256": hash_file(folder / name)}
    change_facts(files=files)(folder)


def write_file(name: str, content: bytes, *, signed: bool = False) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(content)
        if signed:
            sign(folder, name)

    return write


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def replace(name: str, old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text((folder / name).read_text().replace(old, new)) and None


def flip(name: str, position: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[position] ^= 0x10
        (folder / name).write_bytes(bytes(content))

    return change


B, W = "batches-00000.safetensors", "weights.safetensors"
NAMELESS = '[{"num_short_pairs": 1, "group": ["a", 3, "c"]}, {}, {}]'
PASSES = json.dumps([{"num_short_pairs": 10**6, "group": ["a", "b", "c"]}] + [{"num_short_pairs": 0, "group": []}] * 2)

DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a flipped byte of the batches": (flip(B, -5), f"{B} has been altered"),
    "a flipped byte of the weights": (flip(W, -5), f"{W} has been altered"),
    "a file that was cut": (lambda f: os.truncate(f / B, 100), f"{B} is missing or cut short"),
    "no weights": (remove(W), f"{W} is missing or cut short"),
    "an altered number": (replace("facts.json", "0.25", "0.26"), "has been altered"),
    "no JSON": (write_file("facts.json", b"\x80{"), "UnicodeDecodeError"),
    "half of the JSON": (lambda f: os.truncate(f / "facts.json", 300), "JSONDecodeError"),
    "a list": (write_file("facts.json", b"[]"), r"facts\.json is a list"),
    "deep JSON": (write_file("facts.json", b"[" * 100_000), "RecursionError"),
    "an endless number": (write_file("facts.json", b'{"format": ' + b"9" * 5000 + b"}"), "ValueError: Exceeds the limit"),
    "much JSON": (lambda f: os.truncate(f / "facts.json", 2**26 + 1), r"facts\.json has 67108865 bytes"),
    "no format": (write_file("facts.json", b"{}"), "KeyError: 'format'"),
    "format zero": (change_facts(format=0), r"facts\.json has format 0"),
    "another step": (change_facts(step=8), r"facts\.json is of step 8"),
    "a step of text": (change_facts(step="7"), "step is '7'"),
    "a negative position": (change_facts(data_step=-1), "data_step is -1"),
    "many processes": (change_facts(world_size=10**9), "world_size is 1000000000"),
    "more processes than files": (change_facts(world_size=2), "KeyError: 'batches-00001.safetensors'"),
    "a huge loss": (change_facts(loss=10**400), "OverflowError: int too large"),
    "an unknown verdict": (change_facts(verdict="fine"), "'fine' is not a valid Verdict"),
    "an unknown label": (change_facts(counts={"spin": 1.0}), "counts has the label spin"),
    "a negative weight": (change_facts(loss_weights={"energy": -1.0}), r"loss_weights is \{'energy': -1.0\}"),
    "statistics of nothing": (change_facts(statistics={"elements": [1]}), "statistics has"),
    "no statistics": (change_facts(statistics=...), "KeyError: 'statistics'"),
    "files of nothing": (change_facts(files=3), "TypeError"),
    "no safetensors": (write_file(B, b"x" * 1000, signed=True), "SafetensorError"),
    "a pickle": (write_file(W, b"\x80\x04cos\nsystem\n(S'touch /tmp/x'\ntR.", signed=True), "SafetensorError"),
    "a newer field": (change_tensors(B, {"0.spin": torch.zeros(2)}), r"has the field 0\.spin"),
    "a field too few": (change_tensors(B, {"0.positions": None}), "pass 0: `positions` is missing"),
    "another dtype": (change_tensors(B, {"0.positions": lambda t: t.long()}), r"pass 0: `positions` is torch\.int64 \(15, 3\)"),
    "another shape": (change_tensors(B, {"1.forces": lambda t: t[:, :2]}), r"pass 1: `forces` is torch\.float32 \(8, 2\)"),
    "a row too few": (change_tensors(B, {"1.forces": lambda t: t[1:]}), "`forces` is of another length than `atomic_numbers`"),
    "atoms of nobody": (change_tensors(B, {"0.num_atoms": torch.tensor([4, 5, 5])}), "`num_atoms` does not add up"),
    "negative counts": (change_tensors(B, {"0.num_atoms": torch.tensor([-4, 9, 10])}), "`num_atoms` is out of range"),
    "huge counts": (change_tensors(B, {"0.num_atoms": torch.tensor([2**62, 2**62, 15])}), "`num_atoms` is out of range"),
    "wrong owners": (change_tensors(B, {"0.graph_index": lambda t: t.flip(0)}), "`graph_index` is not in the order"),
    "no element": (change_tensors(B, {"0.atomic_numbers": lambda t: t * 1000}), "`atomic_numbers` is out of range"),
    "pairs of nobody": (change_tensors(B, {"0.pair_first": lambda t: t - 99}), "`pair_first` is out of range"),
    "pairs across": (change_tensors(B, {"0.pair_second": lambda t: t * 0 + 14}), "pairs join different structures"),
    "half a cell": (change_tensors(B, {"1.pbc": None}), "are not there together"),
    "too many short pairs": (change_tensors(B, {}, {"passes": PASSES}), "num_short_pairs is 1000000"),
    "passes of nothing": (change_tensors(B, {}, {"passes": "[1]"}), "lists no passes"),
    "no names": (change_tensors(B, {}, {"passes": '[{"num_short_pairs": 1}]'}), "has the field 1"),
    "names of nobody": (change_tensors(B, {}, {"passes": NAMELESS}), "`group` does not name"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "finding"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_refused_in_one_line(tmp_path: Path, damage: Callable[[Path], None], finding: str) -> None:
    store(tmp_path)
    folder = tmp_path / "skipped" / "step_00000007"
    damage(folder)
    with pytest.raises(CheckpointError, match=rf"must hold a step as it was stored; got .*{finding}") as caught:
        read_step(tmp_path, 7)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(folder))
    assert str(caught.value).endswith("Copy it again, or take another step.")


def test_processes_with_different_numbers_of_passes(tmp_path: Path) -> None:
    store(tmp_path)
    folder = tmp_path / "skipped" / "step_00000007"
    shutil.copy(folder / B, folder / "batches-00001.safetensors")
    change_facts(world_size=2)(folder)
    sign(folder, "batches-00001.safetensors")
    assert [len(b) for b in read_step(tmp_path, 7).batches] == [3, 3]
    save_file({}, folder / "batches-00001.safetensors", {"format": "1", "passes": "[]"})
    sign(folder, "batches-00001.safetensors")
    with pytest.raises(CheckpointError, match="processes have different numbers of passes"):
        read_step(tmp_path, 7)


@pytest.mark.parametrize(
    "change", [change_facts(format=2), change_tensors(B, {}, {"format": "2"}), change_tensors(W, {}, {"format": "2"})]
)
def test_a_newer_format(tmp_path: Path, change: Callable[[Path], None]) -> None:
    store(tmp_path)
    change(tmp_path / "skipped" / "step_00000007")
    with pytest.raises(CheckpointError, match=r"must have format 1 or lower; got 2\. Install a newer so3krates-dist\."):
        read_step(tmp_path, 7)


def test_a_step_that_is_not_stored(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere must be a run folder; got no such folder\. Name the one"):
        read_step(tmp_path / "nowhere", 3)
    with pytest.raises(
        CheckpointError, match=r"step 3 of .* must be one of the stored steps; got one that is not; stored: none\."
    ):
        read_step(tmp_path, 3)
    store(tmp_path)
    store(tmp_path, make_facts(12))
    (tmp_path / "skipped" / "step_of_mine").mkdir()
    for step in (3, -7):
        with pytest.raises(
            CheckpointError, match=r"stored: 7, 12\. Take one of them; train\.keep_skipped says how many"
        ):
            read_step(tmp_path, step)


def test_format_1_loads_for_ever() -> None:
    stored = read_step(STORED, 8)
    assert stored.facts.verdict is Verdict.NON_FINITE
    assert [[b.group for b in batches] for batches in stored.batches] == [
        [("size8", "size4", "size6")], [("size6", "size5", "size7")],
    ]  # fmt: skip
    assert sum(float(weight.double().sum()) for weight in stored.weights.values()) == pytest.approx(WEIGHTS_SUM)
