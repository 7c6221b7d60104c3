"""The writer of checkpoints in one process; several processes, full disks and kills are in tests/integration/test_crash.py."""

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from training_setup import make_config, write_checkpoint

from so3krates_dist import __version__
from so3krates_dist.config import dump_config
from so3krates_dist.distributed import Rank
from so3krates_dist.errors import CheckpointError, ConfigError
from so3krates_dist.train import saving
from so3krates_dist.train.checkpoint import find_checkpoint, list_checkpoints, load_checkpoint
from so3krates_dist.train.saving import CheckpointWriter, collect_facts

CPU = torch.device("cpu")


def make_tensors(step: int) -> dict[str, torch.Tensor]:
    return {
        "weight.a": torch.arange(6.0).view(2, 3) + step,
        "weight.b": torch.arange(4, dtype=torch.float64),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 2),
        "optimizer_steps": torch.tensor([step]),
        "scalar": torch.tensor(1.5),
    }


def make_writer(folder: Path, *, keep: int = 2, asynchronous: bool = True, world_size: int = 1) -> CheckpointWriter:
    rank = Rank(world_size=world_size)
    return CheckpointWriter(folder, rank, CPU, keep=keep, asynchronous=asynchronous, facts={"zero_stage": 1})


class Gate:
    """Holds the writing threads until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.original = threading.Event(), saving.save_file
        monkeypatch.setattr(saving, "save_file", self.save_file)

    def save_file(self, tensors: dict[str, torch.Tensor], path: Path) -> None:
        assert self.opened.wait(60)
        self.original(tensors, path)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def poll(writer: CheckpointWriter) -> str | None:
    """Do what the loop of a single process does in a step."""
    return writer.settle(*writer.flags())


class TestWriting:
    @pytest.mark.parametrize("asynchronous", [True, False])
    def test_what_was_saved_is_loaded(self, tmp_path: Path, asynchronous: bool) -> None:
        progress = {
            "step": 7,
            "best_score": 0.1 + 0.2,
            "guard": {"losses": [1.0, float("nan")], "text": "Å"},
            "none": None,
        }
        writer = make_writer(tmp_path / "checkpoints", asynchronous=asynchronous)
        assert writer.begin(7, progress, make_tensors(7), None) > 0
        said = writer.finish()
        assert said is not None
        assert said.startswith("Checkpoint of step 7: 0.0 MB written in ")
        path = tmp_path / "checkpoints" / "step_00000007"
        assert find_checkpoint(tmp_path / "checkpoints") == (path, [])
        state = load_checkpoint(path)
        assert state.step == 7
        assert repr(state.progress) == repr(progress), "in the same order, and nan is not equal to itself"
        assert state.tensors.keys() == make_tensors(7).keys()
        for name, tensor in make_tensors(7).items():
            assert torch.equal(state.tensors[name], tensor)
            assert state.tensors[name].dtype == tensor.dtype

    def test_the_manifest_says_what_it_is_of(self, tmp_path: Path) -> None:
        writer = make_writer(tmp_path, asynchronous=False)
        writer.begin(7, {"step": 7, "best_score": float("inf")}, make_tensors(7), None)
        text = (tmp_path / "step_00000007" / "manifest.json").read_text()
        content = json.loads(text)
        assert {k: content[k] for k in ("format", "step", "facts")} == {
            "format": 2,
            "step": 7,
            "facts": {"zero_stage": 1},
        }
        assert content["progress"] == {"step": 7, "best_score": {"float": "inf"}}
        assert "Infinity" not in text, "that would be no JSON"
        assert (tmp_path / "latest").read_text() == "step_00000007\n"

    def test_no_pickle(self, tmp_path: Path) -> None:
        path = write_checkpoint(tmp_path, 7, make_tensors(7))
        assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "state-00000-of-00001.safetensors"]
        assert load_file(path / "state-00000-of-00001.safetensors").keys() == make_tensors(7).keys()

    def test_files_can_be_read_by_whom_the_user_lets(self, tmp_path: Path) -> None:
        path = write_checkpoint(tmp_path, 7, make_tensors(7))
        (tmp_path / "plain").touch()
        assert {p.stat().st_mode for p in path.iterdir()} == {(tmp_path / "plain").stat().st_mode}

    @pytest.mark.parametrize("keep", [2, 3])
    def test_the_newest_are_kept(self, tmp_path: Path, keep: int) -> None:
        for step in (5, 20, 100, 99_999_999, 123_456_789):
            write_checkpoint(tmp_path, step, make_tensors(step), keep=keep)
        names = ["step_123456789", "step_99999999", "step_00000100", "step_00000020", "step_00000005"]
        assert [p.name for p in list_checkpoints(tmp_path)] == names[:keep]

    def test_other_things_in_the_folder_are_left_alone(self, tmp_path: Path) -> None:
        for name in ("notes.txt", "step_of_mine.txt", "step_of_mine/file", "step_0000/file"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("mine")
        for step in (1, 2, 3):
            write_checkpoint(tmp_path, step, make_tensors(step))
        for name in ("notes.txt", "step_of_mine.txt", "step_of_mine/file", "step_0000/file"):
            assert (tmp_path / name).read_text() == "mine"

    def test_later_steps_are_given_up(self, tmp_path: Path) -> None:
        """The run has come back to an earlier one; what is ahead of it must not be found by the next start."""
        for step in (10, 20, 30, 15):
            write_checkpoint(tmp_path, step, make_tensors(step), keep=3)
        assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000015", "step_00000010"]

    def test_the_same_step_again(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, 10, make_tensors(10))
        write_checkpoint(tmp_path, 10, make_tensors(11))
        assert load_checkpoint(tmp_path / "step_00000010").tensors["optimizer_steps"].tolist() == [11]

    def test_what_a_crash_has_left_is_cleared_away(self, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "file").touch()
        (tmp_path / ".step_00000003.tmp").mkdir()
        (tmp_path / ".step_00000003.tmp" / "state-00000-of-00001.safetensors").write_bytes(b"half of what")
        (tmp_path / ".step_00000004.tmp").write_bytes(b"?")
        (tmp_path / ".step_00000005.tmp").symlink_to(tmp_path / "elsewhere")
        write_checkpoint(tmp_path, 5, make_tensors(5))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "latest", "step_00000005"]
        assert (tmp_path / "elsewhere" / "file").exists()

    def test_facts(self, tmp_path: Path) -> None:
        config = make_config("data", tmp_path)
        facts = collect_facts(config, Rank(world_size=3))
        assert (facts["world_size"], facts["zero_stage"]) == (3, config.train.zero_stage)
        assert facts["config"] == dump_config(config)
        assert facts["versions"]["so3krates_dist"] == __version__
        assert facts["versions"].keys() == {"so3krates_dist", "torch", "deepspeed", "safetensors", "python"}


class TestSharingTheWork:
    SIZES: Mapping[str, int] = {f"w{i}": 4 * (i % 7) ** 3 for i in range(50)} | {"steps": 8}

    @pytest.mark.parametrize("world_size", [1, 2, 3, 8, 64])
    def test_each_tensor_has_one_owner(self, tmp_path: Path, world_size: int) -> None:
        owned = [self.make(tmp_path, r, world_size).owns(self.SIZES) for r in range(world_size)]
        assert sorted(name for names in owned for name in names) == sorted(self.SIZES)

    @pytest.mark.parametrize("world_size", [2, 3, 8])
    def test_by_bytes(self, tmp_path: Path, world_size: int) -> None:
        loads = [
            sum(self.SIZES[n] for n in self.make(tmp_path, r, world_size).owns(self.SIZES)) for r in range(world_size)
        ]
        assert max(loads) - min(loads) <= max(self.SIZES.values())

    def test_order_does_not_matter(self, tmp_path: Path) -> None:
        turned = dict(reversed(self.SIZES.items()))
        assert self.make(tmp_path, 1, 3).owns(turned) == self.make(tmp_path, 1, 3).owns(self.SIZES)

    @staticmethod
    def make(folder: Path, rank: int, world_size: int) -> CheckpointWriter:
        return CheckpointWriter(
            folder, Rank(rank=rank, world_size=world_size), CPU, keep=2, asynchronous=True, facts={}
        )


class TestGoingOnMeanwhile:
    def test_nothing_pending(self, tmp_path: Path) -> None:
        writer = make_writer(tmp_path)
        assert writer.flags() == (0.0, 0.0)
        assert writer.settle(0.0, 0.0) is None
        assert writer.finish() is None

    def test_committed_in_the_step_that_finds_it_written(self, tmp_path: Path, gate: Gate) -> None:
        writer = make_writer(tmp_path)
        writer.begin(7, {"step": 7}, make_tensors(7), None)
        for _ in range(3):
            assert writer.flags() == (0.0, 0.0)
            assert poll(writer) is None
        assert list_checkpoints(tmp_path) == []
        gate.opened.set()
        while not (said := poll(writer)):
            pass
        assert "Checkpoint of step 7" in said
        assert find_checkpoint(tmp_path) == (tmp_path / "step_00000007", [])
        assert writer.flags() == (0.0, 0.0)

    def test_what_training_changes_meanwhile_is_not_saved(self, tmp_path: Path, gate: Gate) -> None:
        writer, tensors, progress = make_writer(tmp_path), make_tensors(7), {"step": 7, "losses": [1.0]}
        writer.begin(7, progress, tensors, None)
        for tensor in tensors.values():
            tensor.zero_()
        progress["losses"].append(2.0)  # type: ignore[attr-defined]
        tensors.clear()
        gate.opened.set()
        writer.finish()
        state = load_checkpoint(tmp_path / "step_00000007")
        assert state.progress == {"step": 7, "losses": [1.0]}
        for name, tensor in make_tensors(7).items():
            assert torch.equal(state.tensors[name], tensor), name

    def test_the_next_save_waits_for_it_and_says_so(self, tmp_path: Path, gate: Gate) -> None:
        writer = make_writer(tmp_path)
        writer.begin(7, {"step": 7}, make_tensors(7), None)
        threading.Timer(0.2, gate.opened.set).start()
        assert writer.begin(8, {"step": 8}, make_tensors(8), None) > 0.1
        assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000007"], "one save is in the air, never two"
        said = writer.finish() or ""
        assert "Checkpoint of step 7" in said
        assert "training waited 0." in said
        assert "for the checkpoint of step 7" in said
        assert "Checkpoint of step 8" in said

    def test_sums_from_before_a_save_say_nothing_about_it(self, tmp_path: Path) -> None:
        """A step may make its sum, begin a save, and settle after that."""
        writer = make_writer(tmp_path)
        writer.begin(7, {"step": 7}, make_tensors(7), None)
        writer.finish()
        sums = (1.0, 0.0)
        writer.begin(8, {"step": 8}, make_tensors(8), None)
        writer.settle(*sums)
        assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000007"]
        writer.finish()

    def test_memory_is_given_back(self, tmp_path: Path) -> None:
        writer = make_writer(tmp_path)
        writer.begin(7, {"step": 7}, make_tensors(7), None)
        assert writer._pending is not None
        part = writer._pending.part
        part.wait()
        assert part._tensors == {}

    def test_models_are_exported_after_the_commit(self, tmp_path: Path) -> None:
        seen: list[tuple[Path | None, list[str]]] = []
        writer = make_writer(tmp_path)
        writer.begin(7, {"step": 7}, make_tensors(7), lambda: seen.append(find_checkpoint(tmp_path)))
        assert seen == []
        writer.finish()
        assert seen == [(tmp_path / "step_00000007", [])]


class TestFailing:
    @pytest.mark.parametrize("asynchronous", [True, False])
    def test_a_part_that_cannot_be_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
    ) -> None:
        write_checkpoint(tmp_path, 1, make_tensors(1))
        monkeypatch.setattr(saving, "save_file", fail(SafetensorError("I/O error: (os error 28)")))
        writer = make_writer(tmp_path, asynchronous=asynchronous)
        with pytest.raises(
            CheckpointError,
            match=r"step_00000002 must find room on a disk that can be written to; got in the part of rank 0: No space left"
            r" on device\. Free some space and start the same command again; the older checkpoints are intact",
        ):
            self.save(writer, 2)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001"]
        assert writer.flags() == (0.0, 0.0)

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    @pytest.mark.parametrize("error", [SafetensorError("no number"), MemoryError()])
    def test_an_error_without_a_number(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        monkeypatch.setattr(saving, "save_file", fail(error))
        with pytest.raises(CheckpointError, match="got in the part of rank 0: an error; its own output says more"):
            self.save(make_writer(tmp_path), 2)

    def test_the_steps_notice(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(saving, "save_file", fail(OSError(5, "Input/output error")))
        writer = make_writer(tmp_path)
        writer.begin(2, {"step": 2}, make_tensors(2), None)
        while writer.flags() == (0.0, 0.0):
            pass
        assert writer.flags() == (1.0, 1.0)
        with pytest.raises(CheckpointError, match="in the part of rank 0: Input/output error"):
            writer.settle(0.0, 1.0)  # at once, whether or not the others have written theirs

    def test_the_run_folder_has_vanished(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"step_00000007 must find room .*; got \[Errno 2\] No such file"):
            write_checkpoint(tmp_path / "run" / "checkpoints", 7, make_tensors(7))
        assert not (tmp_path / "run").exists(), "it does not come back"

    def test_the_folder_vanishes_while_it_is_written(self, tmp_path: Path, gate: Gate) -> None:
        writer = make_writer(tmp_path / "checkpoints")
        writer.begin(7, {"step": 7}, make_tensors(7), None)
        (tmp_path / "checkpoints").rename(tmp_path / "moved")
        gate.opened.set()
        with pytest.raises(CheckpointError, match="in the part of rank 0: No such file or directory"):
            writer.finish()

    def test_a_commit_that_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_checkpoint(tmp_path, 1, make_tensors(1))
        monkeypatch.setattr(saving, "write_text", fail(OSError(30, "Read-only file system")))
        with pytest.raises(
            CheckpointError, match=r"step_00000002 must find room .*; got \[Errno 30\] Read-only file system"
        ):
            self.save(make_writer(tmp_path), 2)
        assert find_checkpoint(tmp_path) == (tmp_path / "step_00000001", [])
        assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001"]

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (OSError(28, "No space left on device"), r"got \[Errno 28\] No space left on device after step_00000002 was committed"),
            (ConfigError("here", "be so", "not", "Do it"), r"^here must be so; got not\. Do it\.$"),
        ],
    )  # fmt: skip
    def test_an_export_that_fails(self, tmp_path: Path, error: Exception, message: str) -> None:
        writer = make_writer(tmp_path)
        writer.begin(2, {"step": 2}, make_tensors(2), fail(error))
        with pytest.raises(CheckpointError, match=message):
            writer.finish()
        assert find_checkpoint(tmp_path) == (tmp_path / "step_00000002", []), "the checkpoint is there all the same"

    def test_an_old_one_that_cannot_be_removed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Somebody has made it read-only: the new one counts, and the run goes on."""
        for step in (1, 2):
            write_checkpoint(tmp_path, step, make_tensors(step))
        monkeypatch.setattr(saving.shutil, "rmtree", fail(OSError(13, "Permission denied")))
        writer = make_writer(tmp_path)
        writer.begin(3, {"step": 3}, make_tensors(3), None)
        assert f"{tmp_path / 'step_00000001'} cannot be removed (Permission denied)" in str(writer.finish())
        assert find_checkpoint(tmp_path) == (tmp_path / "step_00000003", [])

    def test_what_is_written_at_once(self, tmp_path: Path) -> None:
        run = tmp_path / "run"
        run.mkdir()
        writer = make_writer(run / "checkpoints")
        writer.write_now((run / "a").touch)
        assert (run / "a").is_file()
        with pytest.raises(CheckpointError, match=r"run must find room on a disk .*; got \[Errno 28\] No space left"):
            writer.write_now(fail(OSError(28, "No space left")))
        run.rename(tmp_path / "moved")
        with pytest.raises(CheckpointError, match=r"run must find room on a disk .*; got \[Errno 2\] No such file"):
            writer.write_now(run.mkdir)
        assert not run.exists(), "a run folder that has vanished must not come back half empty"

    def test_a_part_that_nobody_else_sees(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(saving, "VISIBLE_SECONDS", 0.2)
        monkeypatch.setattr(saving, "put_in_place", lambda temporary, path: path.with_name("hidden").touch())
        monkeypatch.setattr(saving._Part, "report", lambda self: [0, 5, 0, 0, 0, 0])
        with pytest.raises(
            CheckpointError,
            match=r"state-00000-of-00001\.safetensors must have the 5 bytes that rank 0 wrote; got No such file or directory"
            r" after 0 s\. Set run\.folder to a file system that all machines of the run share",
        ):
            self.save(make_writer(tmp_path), 2)
        assert list_checkpoints(tmp_path) == []

    def test_a_part_of_another_size(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(saving, "VISIBLE_SECONDS", 0.2)
        monkeypatch.setattr(saving._Part, "report", lambda self: [0, 5, 0, 0, 0, 0])
        with pytest.raises(CheckpointError, match=r"must have the 5 bytes that rank 0 wrote; got \d+ bytes after 0 s"):
            self.save(make_writer(tmp_path), 2)
        assert list_checkpoints(tmp_path) == []

    @staticmethod
    def save(writer: CheckpointWriter, step: int) -> None:
        writer.begin(step, {"step": step}, make_tensors(step), None)
        writer.finish()


def fail(error: Exception) -> Any:
    """Return a function that raises."""

    def raise_it(*_: object) -> None:
        raise error

    return raise_it
