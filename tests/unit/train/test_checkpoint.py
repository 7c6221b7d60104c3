"""Checkpoints: what is found and what is refused. Crashes: tests/integration/test_crash.py; writing: test_saving.py."""

import json
import math
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from training_setup import write_checkpoint

from so3krates_dist.config import read_config
from so3krates_dist.errors import CheckpointError
from so3krates_dist.files import hash_file
from so3krates_dist.train.checkpoint import (
    FORMAT,
    StoredTensors,
    compute_checksum,
    encode_numbers,
    find_checkpoint,
    load_checkpoint,
)

STORED = Path(__file__).parents[2] / "data"
STORED_SUMS = {1: -1.7523123994469643, 2: -1.7523327246308327}
PART = "state-00000-of-00001.safetensors"


def make_tensors(step: int) -> dict[str, torch.Tensor]:
    return {"weight.a": torch.arange(6.0).view(2, 3) + step, "optimizer_steps": torch.tensor([step])}


def write_two(folder: Path) -> Path:
    """Write the checkpoints of steps 10 and 20; return the newer one."""
    write_checkpoint(folder, 10, make_tensors(10))
    return write_checkpoint(folder, 20, make_tensors(20))


def alter(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest, and make its checksum right again, as an attacker can."""
    manifest = checkpoint / "manifest.json"
    content = json.loads(manifest.read_text())
    change(content)
    content["checksum"] = compute_checksum(content)
    manifest.write_text(json.dumps(content))


def use_file(checkpoint: Path, name: str, source: Path) -> None:
    """Have a manifest name another file, with its true size and hash."""
    facts = {"size": source.stat().st_size, "sha256": hash_file(source)}
    alter(checkpoint, lambda content: content.update(files={name: facts}))


class TestFinding:
    def test_nothing_at_all(self, tmp_path: Path) -> None:
        assert find_checkpoint(tmp_path / "checkpoints") == (None, [])

    def test_without_the_word_of_latest(self, tmp_path: Path) -> None:
        """The file is for people; a crash may leave it behind the newest checkpoint."""
        newest = write_two(tmp_path)
        for content in ("step_00000010\n", ""):
            (tmp_path / "latest").write_text(content)
            assert find_checkpoint(tmp_path)[0] == newest

    def test_by_number_not_by_letters(self, tmp_path: Path) -> None:
        for step in (99_999_999, 100_000_000):
            write_checkpoint(tmp_path, step, make_tensors(step))
        assert find_checkpoint(tmp_path)[0] == tmp_path / "step_100000000"

    def test_a_format_from_the_future(self, tmp_path: Path) -> None:
        alter(write_two(tmp_path), lambda content: content.update(format=FORMAT + 1))
        with pytest.raises(
            CheckpointError, match=r"step_00000020 must have format 2 or lower; got 3\. Install a newer"
        ):
            find_checkpoint(tmp_path)

    def test_nothing_whole(self, tmp_path: Path) -> None:
        path = write_checkpoint(tmp_path, 1, make_tensors(1)) / "manifest.json"
        path.write_text("[]")
        with pytest.raises(CheckpointError, match=r"must hold a checkpoint that is whole; got .*damaged \(TypeError\)"):
            find_checkpoint(tmp_path)

    def test_numbers_that_json_does_not_have(self, tmp_path: Path) -> None:
        values = {"a": [math.inf, -math.inf, 1e-320], "b": {"c": (1, "inf")}}
        assert encode_numbers(values)["a"][:2] == [{"float": "inf"}, {"float": "-inf"}]
        path = write_checkpoint(tmp_path, 1, {}, values=values)
        assert load_checkpoint(path).progress["values"] == {"a": [math.inf, -math.inf, 1e-320], "b": {"c": [1, "inf"]}}

    def test_of_any_number_of_processes(self, tmp_path: Path) -> None:
        """Files are opened where their tensors are asked for."""
        names = [tmp_path / f"{i}.safetensors" for i in range(3)]
        for i, path in enumerate(names[:2]):
            save_file({f"t{i}": torch.full((2,), float(i))}, path)
        save_file({}, names[2])
        stored = StoredTensors(names)
        assert dict(stored).keys() == {"t0", "t1"}
        assert len(stored) == 2
        assert stored["t1"].tolist() == [1.0, 1.0]
        assert stored.get("t2") is None

    def test_another_machine_that_does_not_see_it(self, tmp_path: Path) -> None:
        with pytest.raises(
            CheckpointError,
            match=r"step_00000020 must be readable for all processes; got FileNotFoundError\. Set run\.f",
        ):
            load_checkpoint(tmp_path / "step_00000020")


class TestEvilFolders:
    """A run folder may come from somebody else. Nothing in it is executed, nothing outside of it is read, written or removed."""

    @pytest.fixture
    def newest(self, tmp_path: Path) -> Path:
        return write_two(tmp_path / "run" / "checkpoints")

    @pytest.fixture(autouse=True)
    def _make(self, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()

    def assert_refused(self, newest: Path, finding: str) -> None:
        assert find_checkpoint(newest.parent) == (
            newest.parent / "step_00000010",
            [f"{newest}: {finding}; taking an older checkpoint"],
        )

    @pytest.mark.parametrize(
        "name", ["../../../secret", "/etc/hostname", "state.pt", "", "manifest.json", "state-00001-of-00001.safetensors",
                 "state.safetensors", "sub/state-00000-of-00001.safetensors"],
    )  # fmt: skip
    def test_other_names(self, tmp_path: Path, newest: Path, name: str) -> None:
        save_file(make_tensors(666), tmp_path / "secret")
        use_file(newest, name, tmp_path / "secret")
        with forbidden(tmp_path / "secret"):
            self.assert_refused(newest, "manifest.json names other files than a checkpoint has")

    def test_no_files(self, newest: Path) -> None:
        alter(newest, lambda content: content.update(files={}))
        self.assert_refused(newest, "manifest.json names other files than a checkpoint has")

    def test_the_name_of_the_first_format_leads_nowhere_either(self, tmp_path: Path, newest: Path) -> None:
        save_file(make_tensors(666), tmp_path / "secret")
        use_file(newest, "../../../secret", tmp_path / "secret")
        alter(newest, lambda content: content.update(format=1))
        self.assert_refused(newest, "manifest.json names other files than a checkpoint has")

    @pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
    def test_what_is_no_file(self, tmp_path: Path, newest: Path, kind: str) -> None:
        save_file(make_tensors(666), tmp_path / "secret")
        for name, finding in ((PART, f"{PART} is missing or cut short"),
                              ("manifest.json", "manifest.json is missing or damaged (ValueError)")):  # fmt: skip
            original = (newest / name).read_bytes()
            (newest / name).unlink()
            if kind == "link":
                target = tmp_path / "secret" if name == PART else newest.parent / "step_00000010" / name
                (newest / name).symlink_to(target)
                if name == PART:
                    use_file(newest, PART, target)
            elif kind == "pipe":
                os.mkfifo(newest / name)  # reading it would wait for ever
            else:
                (newest / name).mkdir()
            self.assert_refused(newest, finding)
            (newest / name).rmdir() if kind == "folder" else (newest / name).unlink()
            (newest / name).write_bytes(original)

    def test_a_link_to_a_checkpoint(self, tmp_path: Path, newest: Path) -> None:
        newest.rename(tmp_path / "elsewhere")
        newest.symlink_to(tmp_path / "elsewhere")
        self.assert_refused(newest, "it is a link")
        write_checkpoint(newest.parent, 15, make_tensors(15))
        assert not newest.is_symlink(), "given up, like other later steps"
        assert sorted(p.name for p in (tmp_path / "elsewhere").iterdir()) == ["manifest.json", PART]

    def test_a_link_under_the_name_that_comes_next(self, tmp_path: Path, newest: Path) -> None:
        (tmp_path / "secret").write_text("mine")
        (newest.parent / ".latest.tmp").symlink_to(tmp_path / "secret")
        with pytest.raises(CheckpointError, match="Too many levels of symbolic links"):
            write_checkpoint(newest.parent, 30, make_tensors(30))
        assert (tmp_path / "secret").read_text() == "mine"

    def test_a_pickle_is_not_loaded(self, tmp_path: Path, newest: Path) -> None:
        class Evil:
            def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
                return Path.touch, (tmp_path / "executed",)

        (newest / PART).write_bytes(pickle.dumps(Evil()))
        use_file(newest, PART, newest / PART)
        self.assert_refused(newest, f"{PART} is no safetensors file (SafetensorError)")
        torch.save(Evil(), newest / PART)
        use_file(newest, PART, newest / PART)
        self.assert_refused(newest, f"{PART} is no safetensors file (SafetensorError)")
        assert not (tmp_path / "executed").exists()
        pickle.loads(pickle.dumps(Evil()))
        assert (tmp_path / "executed").exists(), "it would have been"

    @pytest.mark.parametrize(
        "header",
        [
            b"\xff" * 8,
            struct.pack("<Q", 2**40),
            struct.pack("<Q", 2**63) + b"{}",
            struct.pack("<Q", 72) + b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'[:72],
            struct.pack("<Q", 72) + b'{"a":{"dtype":"F32","shape":[4611686018427387905],"data_offsets":[0,4]}}' + b"1234",
        ],
    )  # fmt: skip
    def test_huge_sizes_in_a_file(self, newest: Path, header: bytes) -> None:
        (newest / PART).write_bytes(header)
        use_file(newest, PART, newest / PART)
        self.assert_refused(newest, f"{PART} is no safetensors file (SafetensorError)")

    def test_huge_sizes_in_the_manifest(self, newest: Path) -> None:
        alter(newest, lambda content: content["files"][PART].update(size=10**30))
        self.assert_refused(newest, f"{PART} is missing or cut short")

    @pytest.mark.parametrize(
        ("text", "error"),
        [
            ("[" * 200_000, "RecursionError"), ('{"format": 1' + "0" * 10_000 + "}", "ValueError"), ("null", "TypeError"),
            ('{"checksum": 1, "format"', "JSONDecodeError"), ("\udcff", "UnicodeDecodeError"), ("{}", "KeyError"),
        ],
    )  # fmt: skip
    def test_a_manifest_that_is_none(self, newest: Path, text: str, error: str) -> None:
        (newest / "manifest.json").write_text(text, errors="surrogateescape")
        self.assert_refused(newest, f"manifest.json is missing or damaged ({error})")

    @pytest.mark.parametrize("change", [{"files": [1, 2]}, {"files": {PART: 5}}, {"files": {PART: {}}}, {"format": None},
                                        {"step": "x"}, {"format": "nan"}])  # fmt: skip
    def test_a_manifest_of_other_things(self, newest: Path, change: dict[str, Any]) -> None:
        alter(newest, lambda content: content.update(change))
        checkpoint, complaints = find_checkpoint(newest.parent)
        assert checkpoint == newest.parent / "step_00000010"
        assert "manifest.json is missing or damaged (" in complaints[0]

    def test_a_manifest_that_would_fill_the_memory(self, newest: Path) -> None:
        with (newest / "manifest.json").open("r+b") as file:
            file.truncate(2**34)  # without using any space on the disk
        self.assert_refused(newest, "manifest.json is missing or damaged (ValueError)")

    def test_a_file_that_cannot_be_read(self, newest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(path: Path) -> str:
            raise OSError(5, "Input/output error", str(path))

        monkeypatch.setattr("so3krates_dist.train.checkpoint.hash_file", fail)
        with pytest.raises(CheckpointError, match=rf"{PART} cannot be read \(Input/output error\)"):
            find_checkpoint(newest.parent)

    def test_of_another_step_than_its_name_says(self, newest: Path) -> None:
        newest.rename(newest.with_name("step_00000099"))
        self.assert_refused(newest.with_name("step_00000099"), "manifest.json is of step 20")

    def test_one_tensor_twice(self, tmp_path: Path) -> None:
        for name in "ab":
            save_file(make_tensors(1), tmp_path / name)
        with pytest.raises(
            CheckpointError, match=r"b must have tensors of its own; got a second source of `optimizer_steps`\. Remove"
        ):
            StoredTensors([tmp_path / "a", tmp_path / "b"])

    def test_no_tensors(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"what is this")
        with pytest.raises(
            CheckpointError, match=r"a must be a file of tensors; got no safetensors file \(SafetensorErr"
        ):
            StoredTensors([tmp_path / "a"])


class forbidden:  # noqa: N801 - reads as a word of the language
    """Fails where a file is opened meanwhile, by whatever name."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        self._before = self._path.stat().st_atime_ns
        os.utime(self._path, ns=(1, self._path.stat().st_mtime_ns))

    def __exit__(self, *_: object) -> None:
        assert self._path.stat().st_atime_ns == 1, "it was read"


class TestStoredFormats:
    """A checkpoint of each format is kept in the repository and must load for ever."""

    @pytest.mark.parametrize("number", range(1, FORMAT + 1))
    def test_loads(self, number: int) -> None:
        folder = STORED / f"checkpoint_format_{number}" / "checkpoints"
        found, complaints = find_checkpoint(folder)
        assert found == folder / "step_00000003"
        assert complaints == []
        state = load_checkpoint(found)
        assert state.step == 3
        assert {k: state.progress[k] for k in ("applied", "data_step")} == {"applied": 3, "data_step": 3}
        assert state.tensors["optimizer_steps"].tolist() == [3]
        kinds = {name.partition(".")[0] for name in state.tensors}
        assert kinds == {"weight", "exp_avg", "exp_avg_sq", "mean", "optimizer_steps"}
        total = float(state.tensors["weight.network.readout.weight"].double().sum())
        assert total == pytest.approx(STORED_SUMS[number], rel=1e-12)

    def test_the_second_is_of_two_processes(self) -> None:
        parts = (STORED / "checkpoint_format_2" / "checkpoints" / "step_00000003").glob("*.safetensors")
        assert len(list(parts)) == 2

    @pytest.mark.parametrize("number", range(1, FORMAT + 1))
    def test_their_configurations(self, number: int) -> None:
        """Settings that came later have their defaults; settings that were removed would need a rule here."""
        config = read_config(STORED / f"checkpoint_format_{number}" / "config.yaml")
        assert config.model.num_features == 4

    def test_the_best_score_under_its_first_name(self, tmp_path: Path) -> None:
        shutil.copytree(STORED / "checkpoint_format_1" / "checkpoints" / "step_00000003", tmp_path / "step_00000003")

        def rename(content: dict[str, Any]) -> None:
            content.pop("best_score", None)
            content.update(best_forces_mae=0.25)

        assert load_checkpoint(tmp_path / "step_00000003").progress["best_score"] == pytest.approx(
            json.loads((tmp_path / "step_00000003" / "manifest.json").read_text()).get("best_score") or math.inf
        )
        alter(tmp_path / "step_00000003", rename)
        assert load_checkpoint(tmp_path / "step_00000003").progress["best_score"] == 0.25
        alter(tmp_path / "step_00000003", lambda content: content.update(best_forces_mae=None))
        assert load_checkpoint(tmp_path / "step_00000003").progress["best_score"] == math.inf
