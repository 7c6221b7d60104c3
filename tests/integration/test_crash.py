"""Whenever a run is killed, the next start finds a whole checkpoint: the one before, or the new one; never none, never half of one.

Saving is killed at every single moment at which it touches the disk, one after another, on each of two processes. What is tested is
the writer of checkpoints by itself, without a model. Whole runs are in test_resume.py and test_failures.py.
"""

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crash_checks import (
    hold_folder,
    make_tensors,
    race_for_folder,
    save_and_die,
    save_to_a_full_disk,
    save_where_nothing_can_be_written,
    save_where_parts_appear_late,
    save_with_a_slow_part,
    save_without_end,
    sign_and_die,
)
from interruptions import flip_byte
from training_setup import make_config, make_dataset, run_processes, started, wait, write_checkpoint

from so3krates_dist.errors import CheckpointError
from so3krates_dist.train.checkpoint import RunFolder, find_checkpoint, list_checkpoints, load_checkpoint

PART = "state-00000-of-00001.safetensors"


def kill_at_every_moment(
    log: Path, world_size: int, attempt: Callable[[int], tuple[Callable[..., int], tuple[Any, ...]]]
) -> int:
    """Run processes, one of which is killed at its first, second, ... moment, until all come through; return how many were.

    Args:
        log: Folder for output.
        world_size: Number of processes.
        attempt: Prepares for a moment; returns the function to run and its arguments.
    """
    for moment in range(1, 200):
        function, arguments = attempt(moment)
        outcome = run_processes(log, world_size, function, *arguments)
        if set(outcome.codes) == {0}:
            return moment - 1
        killed = [code for code in outcome.codes if code == -signal.SIGKILL]
        assert len(killed) == 1, str(outcome)
        assert all(code not in (0, None) for code in outcome.codes), str(outcome)  # the others notice, and end
    raise AssertionError("saving has no end")


def assert_whole(folder: Path, allowed: set[int]) -> int:
    """Assert that a resumed run would find one of the allowed steps, with its tensors; return it."""
    found, complaints = find_checkpoint(folder)
    assert found is not None
    assert not complaints
    state = load_checkpoint(found)
    assert state.step in allowed
    assert found.name == f"step_{state.step:08d}"
    assert state.tensors.keys() == make_tensors(0).keys()
    for name, tensor in make_tensors(state.step).items():
        assert torch.equal(state.tensors[name], tensor)
    return state.step


class TestKilledWhileSaving:
    @pytest.mark.parametrize(
        ("world_size", "victim", "asynchronous", "least"),
        [(1, 0, False, 20), (2, 0, True, 20), (2, 1, True, 8)],
        ids=["one process", "two, the first is killed", "two, the second is killed"],
    )
    def test_the_checkpoint_before_or_the_new_one_is_whole(
        self, tmp_path: Path, world_size: int, victim: int, asynchronous: bool, least: int
    ) -> None:
        reached: list[int] = []
        folder = tmp_path / "checkpoints"

        def attempt(moment: int) -> tuple[Callable[..., int], tuple[Any, ...]]:
            if moment > 1:
                reached.append(assert_whole(folder, {20, 30}))
                write_checkpoint(folder, 30, make_tensors(30))  # what the resumed run does
                assert sorted(p.name for p in folder.iterdir()) == ["latest", "step_00000020", "step_00000030"]
                shutil.rmtree(folder)
            for step in (10, 20):
                write_checkpoint(folder, step, make_tensors(step))
            return save_and_die, (folder, 30, moment, victim, asynchronous)

        assert kill_at_every_moment(tmp_path / "log", world_size, attempt) >= least
        assert reached == sorted(reached)
        expected = {20} if victim else {20, 30}  # what the second process does is all before the commit
        assert expected == set(reached), "the new one counts from one moment on"

    def test_the_very_first_checkpoint_is_whole_or_not_there(self, tmp_path: Path) -> None:
        folder = tmp_path / "checkpoints"
        found: list[bool] = []

        def attempt(moment: int) -> tuple[Callable[..., int], tuple[Any, ...]]:
            if moment > 1:
                found.append(find_checkpoint(folder)[0] is not None)
                if found[-1]:
                    assert_whole(folder, {10})
                shutil.rmtree(folder, ignore_errors=True)
            return save_and_die, (folder, 10, moment, 0, True)

        kill_at_every_moment(tmp_path / "log", 1, attempt)
        assert found == sorted(found)
        assert {False, True} == set(found)

    def test_in_the_place_of_a_damaged_one(self, tmp_path: Path) -> None:
        """The run came back to step 10 because 20 was damaged, and comes to 20 again."""
        folder = tmp_path / "checkpoints"

        def attempt(moment: int) -> tuple[Callable[..., int], tuple[Any, ...]]:
            if moment > 1:
                found, _ = find_checkpoint(folder)
                assert found is not None
                assert load_checkpoint(found).step in {10, 20}
                shutil.rmtree(folder)
            for step in (10, 20):
                write_checkpoint(folder, step, make_tensors(step))
            flip_byte(folder / "step_00000020" / PART, -5)
            return save_and_die, (folder, 20, moment, 0, False)

        assert kill_at_every_moment(tmp_path / "log", 1, attempt) > 15

    @pytest.mark.parametrize("victims", [(0,), (1,), (0, 1)], ids=str)
    def test_at_a_random_time(self, tmp_path: Path, victims: tuple[int, ...]) -> None:
        """Saves follow one another without a pause; more such kills are in tests/benchmarks/checkpoints.py."""
        folder, log = tmp_path / "checkpoints", tmp_path / "log"
        seed = random.randrange(2**32)
        delay = random.Random(seed).uniform(0.0, 0.5)
        with started(log, 2, save_without_end, folder, 1, 4) as processes:
            while not list_checkpoints(folder):
                assert all(p.is_alive() for p in processes)
                time.sleep(0.005)
            time.sleep(delay)
            for victim in victims:
                processes[victim].kill()
            wait(log, processes)
        found, complaints = find_checkpoint(folder)
        assert found is not None, f"seed {seed}"
        assert not complaints, f"seed {seed}"
        state = load_checkpoint(found)
        assert {float(v) for t in state.tensors.values() for v in (t.min(), t.max())} == {float(state.step)}
        assert len(state.tensors) == 8

    def test_a_slow_part_is_not_taken_for_a_written_one(self, tmp_path: Path) -> None:
        """One process has written its file and takes steps; the other is still writing, and both are killed."""
        folder, ready = tmp_path / "checkpoints", tmp_path / "ready"
        write_checkpoint(folder, 10, make_tensors(10))
        for slow in (0, 1):
            with started(tmp_path / "log", 2, save_with_a_slow_part, folder, 20, slow, ready) as processes:
                while len(list(tmp_path.glob("ready*"))) < 2:
                    assert all(p.is_alive() for p in processes)
                    time.sleep(0.01)
                for process in processes:
                    process.kill()
            for path in tmp_path.glob("ready*"):
                path.unlink()
            assert (folder / ".step_00000020.tmp" / f"state-0000{1 - slow}-of-00002.safetensors").is_file()
            assert assert_whole(folder, {10}) == 10


def test_a_folder_whose_making_was_killed_can_be_used(tmp_path: Path) -> None:
    dataset, run = make_dataset(tmp_path / "data", num_train=4), tmp_path / "run"

    def attempt(moment: int) -> tuple[Callable[..., int], tuple[Any, ...]]:
        if moment > 1:
            RunFolder(make_config(dataset, run)).check("0123456789abcdef")
            shutil.rmtree(run, ignore_errors=True)
        return sign_and_die, (dataset, run, moment)

    assert kill_at_every_moment(tmp_path / "log", 1, attempt) > 5


class TestDamage:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for step in (10, 20):
            write_checkpoint(tmp_path, step, make_tensors(step))
        return tmp_path

    def assert_falls_back(self, folder: Path, finding: str) -> None:
        checkpoint, complaints = find_checkpoint(folder)
        assert checkpoint == folder / "step_00000010"
        assert complaints == [f"{folder / 'step_00000020'}: {finding}; taking an older checkpoint"]

    def test_a_flipped_bit_anywhere_in_the_tensors(self, folder: Path) -> None:
        path = folder / "step_00000020" / PART
        content = path.read_bytes()
        for position in (0, 7, 20, len(content) // 2, len(content) - 1):
            flip_byte(path, position)
            self.assert_falls_back(folder, f"{PART} has been altered")
            path.write_bytes(content)
        assert find_checkpoint(folder) == (folder / "step_00000020", [])

    def test_a_flipped_bit_anywhere_in_the_manifest(self, folder: Path) -> None:
        """Found, or without any effect (a space that becomes another one)."""
        path = folder / "step_00000020" / "manifest.json"
        content, meaning = path.read_bytes(), json.loads(path.read_bytes())
        unnoticed = []
        for position in range(len(content)):
            for bit in (0x01, 0x10):
                damaged = bytearray(content)
                damaged[position] ^= bit
                path.write_bytes(damaged)
                checkpoint, _ = find_checkpoint(folder)
                if checkpoint != folder / "step_00000010" and json.loads(damaged) != meaning:
                    unnoticed.append((position, bytes(damaged[position - 10 : position + 10])))
        assert unnoticed == []

    def test_a_truncated_file(self, folder: Path) -> None:
        path = folder / "step_00000020" / PART
        path.write_bytes(path.read_bytes()[:-1])
        self.assert_falls_back(folder, f"{PART} is missing or cut short")

    def test_a_lost_file(self, folder: Path) -> None:
        (folder / "step_00000020" / PART).unlink()
        self.assert_falls_back(folder, f"{PART} is missing or cut short")

    def test_a_lost_manifest(self, folder: Path) -> None:
        (folder / "step_00000020" / "manifest.json").unlink()
        self.assert_falls_back(folder, "manifest.json is missing or damaged (FileNotFoundError)")

    def test_a_truncated_manifest(self, folder: Path) -> None:
        path = folder / "step_00000020" / "manifest.json"
        path.write_bytes(path.read_bytes()[:40])
        self.assert_falls_back(folder, "manifest.json is missing or damaged (JSONDecodeError)")

    @pytest.mark.parametrize("name", ["manifest.json", PART])
    def test_all_of_them(self, folder: Path, name: str) -> None:
        """Never a silent start from the beginning over what is left of a run."""
        for step in (10, 20):
            (folder / f"step_{step:08d}" / name).unlink()
        with pytest.raises(
            CheckpointError, match=r"must hold a checkpoint that is whole; got .*00020: .*00010: .*Start anew"
        ):
            find_checkpoint(folder)

    def test_damaged_ones_do_not_push_out_whole_ones(self, tmp_path: Path) -> None:
        """A run that came back to step 10 saves at 15: it keeps 10 and 15, whatever the damaged 20 and 30 are called."""
        for step in (10, 20, 30):
            write_checkpoint(tmp_path, step, make_tensors(step), keep=3)
        for step in (20, 30):
            flip_byte(tmp_path / f"step_{step:08d}" / PART, -1)
        write_checkpoint(tmp_path, 15, make_tensors(15))
        assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000015", "step_00000010"]
        assert assert_whole(tmp_path, {15}) == 15


class TestDisksThatFail:
    """All processes hear of it in the same words, end with an error, and leave the older checkpoint and nothing else."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        write_checkpoint(tmp_path / "checkpoints", 10, make_tensors(10))
        return tmp_path / "checkpoints"

    def assert_failed(self, folder: Path, message: str, function: Callable[..., int], *arguments: Any) -> None:
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        outcome = run_processes(folder.parent / "log", 2, function, folder, 20, *arguments)
        assert outcome.codes == (1, 1), str(outcome)
        for said in outcome.outputs:
            assert message in said
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
        assert sorted(p.name for p in folder.iterdir()) == ["latest", "step_00000010"]

    @pytest.mark.parametrize("victim", [0, 1])
    @pytest.mark.parametrize("limit", [0, 100, 900])
    def test_full(self, folder: Path, limit: int, victim: int) -> None:
        """The limit of the size of a file is what a test without rights of its own can set."""
        message = (
            f"step_00000020 must find room on a disk that can be written to; got in the part of rank {victim}: File too large."
            " Free some space and start the same command again; the older checkpoints are intact."
        )
        self.assert_failed(folder, message, save_to_a_full_disk, limit, victim)

    def test_full_when_it_is_committed(self, folder: Path) -> None:
        """The tensors find room, the manifest does not."""
        message = "step_00000020 must find room on a disk that can be written to; got [Errno 27] File too large"
        self.assert_failed(folder, message, save_to_a_full_disk, 3000, 0, "x" * 3000)

    @pytest.mark.parametrize(("victim", "got"), [(0, "[Errno 30] Read-only"), (1, "in the part of rank 1: Read-only")])
    def test_read_only(self, folder: Path, victim: int, got: str) -> None:
        message = f"step_00000020 must find room on a disk that can be written to; got {got} file system"
        self.assert_failed(folder, message, save_where_nothing_can_be_written, victim)

    def test_a_part_that_appears_late(self, folder: Path) -> None:
        """Network file systems remember for some seconds what was not there."""
        outcome = run_processes(folder.parent / "log", 2, save_where_parts_appear_late, folder, 20, 1.0, 30.0)
        assert outcome.codes == (0, 0), str(outcome)
        assert assert_whole(folder, {20}) == 20

    def test_a_part_that_never_appears(self, folder: Path) -> None:
        outcome = run_processes(folder.parent / "log", 2, save_where_parts_appear_late, folder, 20, 5.0, 0.5)
        assert outcome.codes == (1, 1), str(outcome)
        for said in outcome.outputs:
            assert (
                "that rank 1 wrote; got No such file or directory after 0 s. Set run.folder to a file system that"
                in said
            )
        assert assert_whole(folder, {10}) == 10


class TestOneRunAtATime:
    def test_a_killed_run_lets_its_folder_go_at_once(self, tmp_path: Path) -> None:
        """Although its worker processes live on for some seconds. The file that names its owner stays, and says nothing."""
        dataset, run, ready = make_dataset(tmp_path / "data", num_train=4), tmp_path / "run", tmp_path / "ready"
        folder = RunFolder(make_config(dataset, run))
        with started(tmp_path / "log", 1, hold_folder, dataset, run, ready) as (process,):
            while not ready.exists():
                assert process.is_alive()
                time.sleep(0.01)
            with pytest.raises(
                CheckpointError,
                match=rf"must be used by one run at a time; got another running process: {process.pid} on \S+, since 2.*\. Wait",
            ):
                folder.acquire()
            process.kill()
            process.join()
            assert (run / ".lock-owner.json").is_file()
            folder.acquire()
            folder.close()

    def test_a_race(self, tmp_path: Path) -> None:
        """50 of them are in tests/benchmarks/checkpoints.py."""
        dataset, run = make_dataset(tmp_path / "data", num_train=4), tmp_path / "run"
        outcome = run_processes(tmp_path / "log", 4, race_for_folder, dataset, run, time.time() + 2, 5)
        assert outcome.codes == (0, 0, 0, 0), str(outcome)
        said = "".join(outcome.outputs)
        assert said.count("got it") >= 1
        assert "refused: run.folder " in said
