"""Checkpoints and run folders: what is written, what is found, whose folder it is. Crashes: tests/integration/test_crash.py."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_setup import make_config

from so3krates_dist.config import GeomAttSection, RunConfig, load_config, read_config, to_plain
from so3krates_dist.errors import CheckpointError
from so3krates_dist.train import checkpoint
from so3krates_dist.train.checkpoint import (
    FORMAT,
    IN_PLAN,
    MAY_CHANGE,
    RunFolder,
    TrainingState,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    write_text,
)

STORED = Path(__file__).parents[2] / "data" / "checkpoint_format_1"
STORED_SUM = -1.7523123994469643


def make_state(step: int, best: float = 0.25) -> TrainingState:
    tensors = {"weight.a": torch.arange(6.0).view(2, 3) + step, "optimizer_steps": torch.tensor([step])}
    return TrainingState(step=step, best_score=best, tensors=tensors)


class TestSaving:
    def test_what_was_saved_is_loaded(self, tmp_path: Path) -> None:
        path = save_checkpoint(tmp_path / "checkpoints", make_state(7, 0.1 + 0.2), keep=2)
        assert path == tmp_path / "checkpoints" / "step_00000007"
        assert find_checkpoint(tmp_path / "checkpoints") == (path, [])
        state = load_checkpoint(path)
        assert (state.step, state.best_score) == (7, 0.1 + 0.2)
        assert state.tensors.keys() == make_state(7).tensors.keys()
        for name, tensor in make_state(7).tensors.items():
            assert torch.equal(state.tensors[name], tensor)
            assert state.tensors[name].dtype == tensor.dtype

    def test_the_best_score_under_its_first_name(self, tmp_path: Path) -> None:
        manifest = save_checkpoint(tmp_path, make_state(7), keep=2) / "manifest.json"
        content = json.loads(manifest.read_text())
        content["best_forces_mae"] = content.pop("best_score")
        manifest.write_text(json.dumps(content))
        assert load_checkpoint(manifest.parent).best_score == 0.25

    def test_before_the_first_evaluation_nothing_is_best(self, tmp_path: Path) -> None:
        path = save_checkpoint(tmp_path, make_state(7, float("inf")), keep=2)
        assert load_checkpoint(path).best_score == float("inf")
        assert "Infinity" not in (path / "manifest.json").read_text(), "that would be no JSON"

    def test_no_pickle(self, tmp_path: Path) -> None:
        path = save_checkpoint(tmp_path, make_state(7), keep=2)
        assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "state.safetensors"]
        assert load_file(path / "state.safetensors").keys() == make_state(7).tensors.keys()

    @pytest.mark.parametrize("keep", [2, 3])
    def test_the_newest_are_kept(self, tmp_path: Path, keep: int) -> None:
        for step in (5, 20, 100, 99_999_999):
            save_checkpoint(tmp_path, make_state(step), keep=keep)
            assert (tmp_path / "latest").read_text() == f"step_{step:08d}\n"
        names = ["step_99999999", "step_00000100", "step_00000020", "step_00000005"]
        assert [p.name for p in list_checkpoints(tmp_path)] == names[:keep]

    def test_other_things_in_the_folder_are_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / "step_of_mine.txt").write_text("mine too")
        for step in (1, 2, 3):
            save_checkpoint(tmp_path, make_state(step), keep=2)
        assert (tmp_path / "notes.txt").read_text() == "mine"
        assert (tmp_path / "step_of_mine.txt").read_text() == "mine too"

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(
            CheckpointError, match=r"step_00000007 must find room on a disk that can be written to; got \[Errno"
        ):
            save_checkpoint(tmp_path / "file" / "checkpoints", make_state(7), keep=2)

    def test_an_interruption_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save_checkpoint(tmp_path, make_state(1), keep=2)

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(checkpoint, "write_text", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, make_state(2), keep=2)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001"]


class TestFinding:
    def test_nothing_at_all(self, tmp_path: Path) -> None:
        assert find_checkpoint(tmp_path / "checkpoints") == (None, [])

    def test_without_the_word_of_latest(self, tmp_path: Path) -> None:
        """The file is for people; a crash may leave it behind the newest checkpoint."""
        for step in (1, 2):
            save_checkpoint(tmp_path, make_state(step), keep=2)
        for content in ("step_00000001\n", ""):
            (tmp_path / "latest").write_text(content)
            assert find_checkpoint(tmp_path)[0] == tmp_path / "step_00000002"

    def test_a_format_from_the_future(self, tmp_path: Path) -> None:
        path = save_checkpoint(tmp_path, make_state(1), keep=2) / "manifest.json"
        content = json.loads(path.read_text()) | {"format": FORMAT + 1}
        content["checksum"] = checkpoint._compute_checksum(content)
        path.write_text(json.dumps(content))
        with pytest.raises(
            CheckpointError, match=r"step_00000001 must have format 1 or lower; got 2\. Install a newer"
        ):
            find_checkpoint(tmp_path)

    def test_nothing_whole(self, tmp_path: Path) -> None:
        path = save_checkpoint(tmp_path, make_state(1), keep=2)
        (path / "manifest.json").write_text("[]")
        with pytest.raises(CheckpointError, match=r"must hold a checkpoint that is whole; got .*damaged \(TypeError\)"):
            find_checkpoint(tmp_path)


class TestStoredFormat:
    """A checkpoint of each format is kept in the repository and must load for ever."""

    def test_format_1(self) -> None:
        found, complaints = find_checkpoint(STORED / "checkpoints")
        assert found == STORED / "checkpoints" / "step_00000003"
        assert complaints == []
        state = load_checkpoint(found)
        assert state.step == 3
        assert state.tensors["optimizer_steps"].tolist() == [3]
        kinds = {name.partition(".")[0] for name in state.tensors}
        assert kinds == {"weight", "exp_avg", "exp_avg_sq", "mean", "optimizer_steps"}
        assert float(state.tensors["weight.network.readout.weight"].double().sum()) == pytest.approx(
            STORED_SUM, rel=1e-12
        )

    def test_its_configuration(self) -> None:
        """Settings that came later have their defaults; settings that were removed would need a rule here."""
        config = read_config(STORED / "config.yaml")
        assert config.model.num_features == 4


class TestRunFolder:
    FINGERPRINT = "0123456789abcdef"

    def make(self, path: Path, *settings: str) -> RunFolder:
        return RunFolder(make_config("data", path, *settings))

    def sign(self, path: Path) -> None:
        folder = self.make(path)
        folder.check(self.FINGERPRINT)
        folder.acquire()
        folder.sign(self.FINGERPRINT, "1.2.3")
        folder.close()

    def test_a_new_one_is_signed(self, tmp_path: Path) -> None:
        run = tmp_path / "deep" / "run"
        self.sign(run)
        assert read_config(run / "config.yaml") == make_config(str(Path("data").absolute()), run)
        assert json.loads((run / "run.json").read_text()) == {
            "data_fingerprint": self.FINGERPRINT,
            "package_version": "1.2.3",
        }

    def test_checking_writes_nothing(self, tmp_path: Path) -> None:
        self.make(tmp_path / "run").check(self.FINGERPRINT)
        assert not (tmp_path / "run").exists()

    def test_its_own_run_may_come_back(self, tmp_path: Path) -> None:
        self.sign(tmp_path)
        before = (tmp_path / "run.json").stat().st_mtime_ns
        self.sign(tmp_path)
        assert (tmp_path / "run.json").stat().st_mtime_ns == before, "signed once"

    def test_what_may_change(self, tmp_path: Path) -> None:
        self.sign(tmp_path)
        for key in sorted(MAY_CHANGE):
            section, _, name = key.partition(".")
            value = getattr(getattr(make_config("data", tmp_path), section), name)
            others = ALSO.get(key, ())
            self.make(tmp_path, f"{key}={OTHER_VALUES.get(key, self.change(value))}", *others).check(self.FINGERPRINT)

    def test_what_must_not(self, tmp_path: Path) -> None:
        """All keys that are not listed as harmless: a key that is added must be put on one of the two sides."""
        self.sign(tmp_path)
        plain = to_plain(make_config("data", tmp_path))
        refused = []
        for section, values in plain.items():
            for name, value in values.items():
                key = f"{section}.{name}"
                if key in MAY_CHANGE | IN_PLAN or key == "model.name":
                    continue
                config = self.replace(
                    make_config("data", tmp_path), section, name, OTHER_VALUES.get(key, self.change(value))
                )
                with pytest.raises(CheckpointError, match=f"belong to this run, where {key} is "):
                    RunFolder(config).check(self.FINGERPRINT)
                refused.append(key)
        assert {"run.seed", "train.num_steps", "train.ema_decay", "model.cutoff"} <= set(refused)
        assert not [key for key in refused if key.startswith("data.")], "the plan says which data a run has"

    @staticmethod
    def change(value: object) -> object:
        """Return another value of the same type."""
        if isinstance(value, bool):
            return not value
        return (
            value * 2 + 1 if isinstance(value, int) else value / 2 + 0.01 if isinstance(value, float) else f"{value}x"
        )

    @staticmethod
    def replace(config: RunConfig, section: str, name: str, value: object) -> RunConfig:
        """Change one value past the checks, some of which would refuse it."""
        changed = load_config([])
        for field in dataclasses.fields(RunConfig):
            copy = object.__new__(type(getattr(config, field.name)))
            for key in dataclasses.fields(copy):
                object.__setattr__(copy, key.name, getattr(getattr(config, field.name), key.name))
            if field.name == section:
                object.__setattr__(copy, name, value)
            object.__setattr__(changed, field.name, copy)
        return changed

    def test_the_keys_that_may_change_exist(self) -> None:
        plain = to_plain(load_config([]))
        assert {k for k in MAY_CHANGE | IN_PLAN if k.partition(".")[2] not in plain[k.partition(".")[0]]} == set()

    def test_data_sets_are_named_from_anywhere(self, tmp_path: Path) -> None:
        """Folders may be relative, addresses stay what they are."""
        RunFolder(make_config("''", tmp_path, "data.folders=[near,s3://far/away]")).sign(self.FINGERPRINT, "1.2.3")
        stored = read_config(tmp_path / "config.yaml").data
        assert (stored.folder, stored.folders) == ("", (str(Path("near").absolute()), "s3://far/away"))

    def test_other_data_are_a_matter_of_the_plan_where_there_is_one(self, tmp_path: Path) -> None:
        self.sign(tmp_path)
        (tmp_path / "plan.json").touch()
        self.make(tmp_path).check("fff")

    def test_other_data(self, tmp_path: Path) -> None:
        self.sign(tmp_path)
        with pytest.raises(
            CheckpointError, match=r"belong to this data set \(fff\); got a run on another one \(0123456789abcdef\)"
        ):
            self.make(tmp_path).check("fff")

    def test_another_model(self, tmp_path: Path) -> None:
        """It has other keys; its name is what is said."""
        self.sign(tmp_path)
        other = dataclasses.replace(make_config("data", tmp_path), model=GeomAttSection())
        with pytest.raises(CheckpointError, match=r"where model\.name is geomatt; got another run, with euclidean_tra"):
            RunFolder(other).check(self.FINGERPRINT)

    def test_somebody_elses_files(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").touch()
        with pytest.raises(
            CheckpointError, match=r"must be empty or hold a run; got other files\. Set run\.folder to another"
        ):
            self.make(tmp_path).check(self.FINGERPRINT)

    def test_hidden_files_of_a_file_system_do_not_count(self, tmp_path: Path) -> None:
        (tmp_path / ".nfs0001").touch()
        self.make(tmp_path).check(self.FINGERPRINT)

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"data_fingerprint"'])
    def test_a_damaged_identity(self, tmp_path: Path, content: str) -> None:
        self.sign(tmp_path)
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(
            CheckpointError, match=r"must hold a readable run\.json; got (TypeError|KeyError|JSONDecodeError)"
        ):
            self.make(tmp_path).check(self.FINGERPRINT)

    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "run").touch()
        with pytest.raises(CheckpointError, match="must be a folder; got a file"):
            self.make(tmp_path / "run").check(self.FINGERPRINT)

    def test_a_place_that_cannot_be_written_to(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointError, match="must be a folder that can be written to; got Not a directory"):
            self.make(tmp_path / "file" / "run").acquire()


ALSO = {
    "data.on_damage": ("data.max_skipped=5",),
    "data.max_skipped": ("data.on_damage=skip",),
}
"""Settings that go with another value"""

OTHER_VALUES: dict[str, object] = {
    "data.on_damage": "skip", "data.oversized": "alone",
    "train.zero_stage": 2, "train.micro_batches": 2, "data.verify": "size", "train.device": "auto", "metrics.wandb": "auto",
    "model.degrees": (1, 2, 3), "train.keep_checkpoints": 5,
}  # fmt: skip


def test_text_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "first")
    write_text(tmp_path / "a.txt", "Ångström")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "Ångström"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
