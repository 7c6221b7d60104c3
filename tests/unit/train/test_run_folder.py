"""Run folders: whose one is, who holds it, and what may change when a run goes on."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from training_setup import make_config

from so3krates_dist.config import GeomAttSection, RunConfig, dump_config, load_config, read_config, to_plain
from so3krates_dist.errors import CheckpointError, ConfigError
from so3krates_dist.train.checkpoint import IN_PLAN, MAY_CHANGE, RunFolder


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
                with pytest.raises(ConfigError, match=f"another run, in which 1 setting differs: {key}="):
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
        """It has other keys; its name is what is said, and what differs besides the model."""
        self.sign(tmp_path)
        other = dataclasses.replace(make_config("data", tmp_path, "train.ema_decay=0.5"), model=GeomAttSection())
        with pytest.raises(
            ConfigError,
            match=r"must belong to this run; got another run, in which 2 settings differ: model\.name=euclidean_transformer"
            r" \(here geomatt\), train\.ema_decay=0\.9 \(here 0\.5\)\. Set run\.folder to another",
        ):
            RunFolder(other).check(self.FINGERPRINT)

    def test_all_settings_that_differ_are_named(self, tmp_path: Path) -> None:
        self.sign(tmp_path)
        settings = (
            "model.cutoff=4.5", "model.num_layers=1", "train.num_steps=50", "train.learning_rate=1e-3", "run.seed=5",
            "train.ema_decay=0.5", "train.weight_decay=0.5", "train.log_every=3",
        )  # fmt: skip
        with pytest.raises(ConfigError, match="in which 7 settings differ: ") as caught:
            self.make(tmp_path, *settings).check(self.FINGERPRINT)
        said = str(caught.value)
        assert "\n" not in said
        for key in (s.partition("=")[0] for s in settings[:-1]):
            assert key in said
        assert "model.cutoff=4.0 (here 4.5)" in said
        assert "train.log_every" not in said, "it may change"

    def test_a_run_of_an_earlier_version(self, tmp_path: Path) -> None:
        """Settings that it did not have had their defaults; those that have other names now are translated."""
        self.sign(tmp_path)
        content = to_plain(make_config(str(Path("data").absolute()), tmp_path))
        for key in ("spike_factor", "huber_delta", "optimizer", "schedule", "activation_checkpointing", "precision"):
            del content["train"][key]
        content["train"]["checkpoint_attention"] = True
        content["model"]["precision"] = "float32"
        (tmp_path / "config.yaml").write_text(json.dumps(content))
        folder = self.make(tmp_path)
        folder.check(self.FINGERPRINT)
        assert folder.changes == ()
        with pytest.raises(ConfigError, match=r"differs: train\.huber_delta=1\.0 \(here 0\.5\)"):
            self.make(tmp_path, "train.huber_delta=0.5").check(self.FINGERPRINT)

    def test_another_precision_is_said(self, tmp_path: Path) -> None:
        """Of a run of an earlier version, too, whose key was another one."""
        self.sign(tmp_path)
        content = to_plain(make_config(str(Path("data").absolute()), tmp_path))
        del content["train"]["precision"]
        content["model"]["precision"] = "bf16"
        (tmp_path / "config.yaml").write_text(json.dumps(content))
        folder = self.make(tmp_path)
        folder.check(self.FINGERPRINT)
        assert folder.changes == ("note: train.precision was bf16-mixed so far and is float32 from here on",)

    def test_a_run_of_a_later_version(self, tmp_path: Path) -> None:
        self.sign(tmp_path)
        text = dump_config(make_config("data", tmp_path)).replace("ema_decay", "ema_decay_of_the_future")
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(
            CheckpointError,
            match=r"must hold a config\.yaml that this version reads; got one that is refused \(train\.ema",
        ):
            self.make(tmp_path).check(self.FINGERPRINT)

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

    def test_the_owner_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the second job sees; that it is refused at all is in tests/integration/test_crash.py."""
        monkeypatch.setenv("SLURM_JOB_ID", "4711")
        folder = self.make(tmp_path)
        folder.acquire()
        assert (tmp_path / ".lock-owner.json").is_file()
        said = self.make(tmp_path)._find_owner()
        assert said.startswith(f": {os.getpid()} on {os.uname().nodename}, SLURM job 4711, since 2")
        folder.close()

    @pytest.mark.parametrize(
        "content", [None, "", "[]", "{}", '{"pid": 1, "host": "\\n\\u001b[2J", "job": "", "since": "x"}']
    )
    def test_an_owner_that_does_not_say(self, tmp_path: Path, content: str | None) -> None:
        if content is not None:
            (tmp_path / ".lock-owner.json").write_text(content)
        assert self.make(tmp_path)._find_owner() == ""

    def test_a_folder_without_room(self, tmp_path: Path) -> None:
        (tmp_path / ".lock-owner.json").mkdir()
        folder = self.make(tmp_path)
        with pytest.raises(CheckpointError, match="must be a folder that can be written to; got "):
            folder.acquire()
        assert folder._lock is None, "and let go"


ALSO = {
    "data.on_damage": ("data.max_skipped=5",),
    "data.max_skipped": ("data.on_damage=skip",),
}
"""Settings that go with another value"""

OTHER_VALUES: dict[str, object] = {
    "data.on_damage": "skip", "data.oversized": "alone",
    "train.zero_stage": 2, "train.micro_batches": 2, "data.verify": "size", "train.device": "auto", "metrics.wandb": "auto",
    "model.degrees": (1, 2, 3), "train.keep_checkpoints": 5,
    "train.activation_checkpointing": "blocks", "train.precision": "bf16-mixed",
}  # fmt: skip
