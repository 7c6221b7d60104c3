"""Whenever a run is killed, the next start finds a whole checkpoint: the one before, or the new one; never none, never half of one.

Saving is killed at every single moment at which it touches the disk, one after another.
"""

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crash_checks import hold_folder, make_state, save_and_die, save_to_a_full_disk, sign_and_die
from interruptions import flip_byte
from training_setup import make_config, make_dataset, run_processes, started

from so3krates_dist.errors import CheckpointError
from so3krates_dist.train.checkpoint import (
    RunFolder,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)


def kill_at_every_moment(log: Path, attempt: Callable[[int], tuple[Callable[..., int], tuple[Any, ...]]]) -> int:
    """Run processes that are killed at their first, second, ... moment until one comes through; return how many were.

    Args:
        log: Folder for output.
        attempt: Prepares for a moment; returns the function to run and its arguments.
    """
    for moment in range(1, 200):
        function, arguments = attempt(moment)
        outcome = run_processes(log, 1, function, *arguments)
        if outcome.codes == (0,):
            return moment - 1
        assert outcome.codes == (-signal.SIGKILL,), str(outcome)
    raise AssertionError("saving has no end")


def assert_whole(folder: Path, allowed: set[int]) -> int:
    """Assert that a resumed run would find one of the allowed steps, with its tensors; return it."""
    found, complaints = find_checkpoint(folder)
    assert found is not None
    assert not complaints
    state = load_checkpoint(found)
    assert state.step in allowed
    assert found.name == f"step_{state.step:08d}"
    assert state.best_score == 0.5 * state.step
    for name, tensor in make_state(state.step).tensors.items():
        assert torch.equal(state.tensors[name], tensor)
    return state.step


class TestKilledWhileSaving:
    def test_the_checkpoint_before_or_the_new_one_is_whole(self, tmp_path: Path) -> None:
        reached: list[int] = []
        folder = tmp_path / "checkpoints"

        def attempt(moment: int) -> tuple[Callable[..., int], tuple[Any, ...]]:
            if moment > 1:
                reached.append(assert_whole(folder, {20, 30}))
                save_checkpoint(folder, make_state(30), keep=2)  # what the resumed run does
                assert sorted(p.name for p in folder.iterdir()) == ["latest", "step_00000020", "step_00000030"]
                shutil.rmtree(folder)
            for step in (10, 20):
                save_checkpoint(folder, make_state(step), keep=2)
            return save_and_die, (folder, 30, 2, moment)

        moments = kill_at_every_moment(tmp_path / "log", attempt)
        assert moments > 15
        assert reached == sorted(reached)
        assert {20, 30} == set(reached), "the new one counts from one moment on"

    def test_the_very_first_checkpoint_is_whole_or_not_there(self, tmp_path: Path) -> None:
        folder = tmp_path / "checkpoints"
        found: list[bool] = []

        def attempt(moment: int) -> tuple[Callable[..., int], tuple[Any, ...]]:
            if moment > 1:
                found.append(find_checkpoint(folder)[0] is not None)
                if found[-1]:
                    assert_whole(folder, {10})
                shutil.rmtree(folder, ignore_errors=True)
            return save_and_die, (folder, 10, 2, moment)

        kill_at_every_moment(tmp_path / "log", attempt)
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
                save_checkpoint(folder, make_state(step), keep=2)
            flip_byte(folder / "step_00000020" / "state.safetensors", -5)
            return save_and_die, (folder, 20, 2, moment)

        assert kill_at_every_moment(tmp_path / "log", attempt) > 15

    def test_nothing_of_a_killed_save_stays_for_ever(self, tmp_path: Path) -> None:
        (tmp_path / ".step_00000033.tmp").mkdir()
        (tmp_path / ".step_00000033.tmp" / "state.safetensors").write_bytes(b"half of what")
        assert find_checkpoint(tmp_path) == (None, [])
        save_checkpoint(tmp_path, make_state(40), keep=2)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000040"]


def test_a_folder_whose_making_was_killed_can_be_used(tmp_path: Path) -> None:
    dataset, run = make_dataset(tmp_path / "data", num_train=4), tmp_path / "run"

    def attempt(moment: int) -> tuple[Callable[..., int], tuple[Any, ...]]:
        if moment > 1:
            RunFolder(make_config(dataset, run)).check("0123456789abcdef")
            shutil.rmtree(run, ignore_errors=True)
        return sign_and_die, (dataset, run, moment)

    assert kill_at_every_moment(tmp_path / "log", attempt) > 5


class TestDamage:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for step in (10, 20):
            save_checkpoint(tmp_path, make_state(step), keep=2)
        return tmp_path

    def assert_falls_back(self, folder: Path, finding: str) -> None:
        checkpoint, complaints = find_checkpoint(folder)
        assert checkpoint == folder / "step_00000010"
        assert complaints == [f"{folder / 'step_00000020'}: {finding}; taking an older checkpoint"]

    def test_a_flipped_bit_anywhere_in_the_tensors(self, folder: Path) -> None:
        path = folder / "step_00000020" / "state.safetensors"
        content = path.read_bytes()
        for position in (0, 7, 20, len(content) // 2, len(content) - 1):
            flip_byte(path, position)
            self.assert_falls_back(folder, "state.safetensors has been altered")
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
        path = folder / "step_00000020" / "state.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        self.assert_falls_back(folder, "state.safetensors is missing or cut short")

    def test_a_lost_file(self, folder: Path) -> None:
        (folder / "step_00000020" / "state.safetensors").unlink()
        self.assert_falls_back(folder, "state.safetensors is missing or cut short")

    def test_a_lost_manifest(self, folder: Path) -> None:
        (folder / "step_00000020" / "manifest.json").unlink()
        self.assert_falls_back(folder, "manifest.json is missing or damaged (FileNotFoundError)")

    def test_a_truncated_manifest(self, folder: Path) -> None:
        path = folder / "step_00000020" / "manifest.json"
        path.write_bytes(path.read_bytes()[:40])
        self.assert_falls_back(folder, "manifest.json is missing or damaged (JSONDecodeError)")

    @pytest.mark.parametrize("name", ["manifest.json", "state.safetensors"])
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
            save_checkpoint(tmp_path, make_state(step), keep=3)
        for step in (20, 30):
            flip_byte(tmp_path / f"step_{step:08d}" / "state.safetensors", -1)
        save_checkpoint(tmp_path, make_state(15), keep=2)
        assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000015", "step_00000010"]
        assert assert_whole(tmp_path, {15}) == 15


class TestFullDisk:
    @pytest.mark.parametrize("limit", [0, 100, 1500])
    def test_the_old_checkpoint_is_intact_and_nothing_else_is_left(self, tmp_path: Path, limit: int) -> None:
        folder = tmp_path / "checkpoints"
        save_checkpoint(folder, make_state(10), keep=2)
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        outcome = run_processes(tmp_path / "log", 1, save_to_a_full_disk, folder, 20, limit)
        assert outcome.codes == (1,), str(outcome)
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
        assert sorted(p.name for p in folder.iterdir()) == ["latest", "step_00000010"]

    def test_the_error_says_what_to_do(self, tmp_path: Path) -> None:
        outcome = run_processes(tmp_path / "log", 1, save_to_a_full_disk, tmp_path / "checkpoints", 20, 1500)
        (said,) = outcome.outputs
        assert "step_00000020 must find room on a disk that can be written to; got " in said
        assert "Free some space and start the same command again; the older checkpoints are intact." in said


def test_a_killed_run_lets_its_folder_go_at_once(tmp_path: Path) -> None:
    """Although its worker processes live on for some seconds."""
    dataset, run, ready = make_dataset(tmp_path / "data", num_train=4), tmp_path / "run", tmp_path / "ready"
    folder = RunFolder(make_config(dataset, run))
    with started(tmp_path / "log", 1, hold_folder, dataset, run, ready) as (process,):
        while not ready.exists():
            assert process.is_alive()
            time.sleep(0.01)
        with pytest.raises(CheckpointError, match="must be used by one run at a time; got another running process"):
            folder.acquire()
        process.kill()
        process.join()
        folder.acquire()
        folder.close()
