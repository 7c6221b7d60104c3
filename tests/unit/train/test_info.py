"""`so3krates info`: every setting with its meaning, the installation, a run folder."""

import dataclasses
import json

import pytest

from so3krates_dist import config
from so3krates_dist.cli import main
from so3krates_dist.errors import CheckpointError, ConfigError
from so3krates_dist.model.potential import ModelStatistics
from so3krates_dist.model.registry import build_model, save_model
from so3krates_dist.train import info

PROOF = {
    "proof_forces_error": 2.1e-6, "proof_forces_relative": 1.2e-6, "proof_energy_error": 3e-7, "proof_net_force": 4e-5,
    "proof_rotation_error": 5e-6,
}  # fmt: skip


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints/step_00000020").mkdir(parents=True)
    (folder / "evaluation").mkdir()
    (folder / "evaluation/parity_forces.png").write_bytes(b"")
    (folder / "config.yaml").write_text(config.dump_config(config.load_config(["run.name=mine", "data.folder=here"])))
    (folder / "run.json").write_text(json.dumps({"data_fingerprint": "0123456789abcdef", "package_version": "1.2.3"}))
    lines = [
        {"kind": "train", "step": 10, "seconds": 1.0, "loss": 2.0},
        {"kind": "proof", "step": 0, "seconds": 0.5, **PROOF},
        {"kind": "validation", "step": 10, "seconds": 1.5, "forces_mae": 0.25, "energy_rmse_per_atom": 0.0125, "x": 3},
        {"kind": "train", "step": 20, "seconds": 2.0, "loss": 1.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_settings_are_those_of_the_schema():
    settings = {s.key: s for s in info.list_settings() if s.model in ("", "euclidean_transformer")}
    assert settings["train.num_steps"] == info.Setting(
        "train.num_steps", "int", "10000",
        "optimizer steps of the whole run; the learning rate ends its decay here",
    )  # fmt: skip
    assert settings["model.degrees"].type == "[int, ...]"
    assert settings["model.degrees"].default == "[1, 2, 3, 4]"
    assert settings["train.offload_optimizer"].default == "false"
    assert settings["run.folder"].default == '""'
    assert settings["metrics.wandb"].type == "off | auto | offline | online"
    assert settings["model.cutoff"].text.startswith("Å; ")


def test_every_model_shows_its_own_options():
    settings = {(s.model, s.key): s for s in info.list_settings()}
    assert len(settings) == len(info.list_settings())
    assert settings["", "model.name"].type == " | ".join(config.MODEL_SECTIONS)
    assert settings["", "model.name"].default == "euclidean_transformer"
    assert settings["so3krates", "model.num_layers"].default == "6"
    assert settings["so3lr", "model.num_layers"].default == "3"
    inherited = {settings[model, "model.num_layers"].text for model in ("so3krates", "so3lr", "euclidean_transformer")}
    assert inherited == {"attention layers"}
    assert settings["geomatt", "model.num_layers"].text == "layers in each stream"
    assert "(SPHC)" in settings["so3krates", "model.degrees"].text
    assert "(SPHC)" not in settings["so3lr", "model.degrees"].text
    assert settings["geomatt", "model.order_gains"].type == "[float, ...]"
    assert settings["geomatt_envelope", "model.cutoff"].text.startswith("Å; pair factors")
    assert ("geomatt", "model.cutoff") not in settings, "a property is no option"
    assert ("so3lr", "model.zbl") in settings
    assert ("so3lr", "model.normalization") not in settings, "a constant of the model is no option"


def test_every_default_that_is_shown_can_be_typed_in():
    for setting in info.list_settings():
        section, name = setting.key.split(".")
        if setting.default != '""':
            model = [f"model.name={setting.model}"] if setting.model else []
            loaded = config.load_config([*model, f"{setting.key}={setting.default}"])
            field = {f.name: f for f in dataclasses.fields(getattr(loaded, section))}[name]
            assert getattr(getattr(loaded, section), name) == field.default, setting.key


def test_config_lists_settings_and_overlays(capsys):
    assert main(["info", "--config"]) == 0
    out = capsys.readouterr().out
    default = config.TrainSection().learning_rate
    assert f"train.learning_rate = {default}    (float)\n    largest learning rate" in out
    assert "run=" in out
    assert "quickstart" in out
    for model in config.MODEL_SECTIONS:
        assert out.count(f"\noptions of model.name={model}: ") == 1
    so3krates = out.split("options of model.name=so3krates: ")[1].split("options of model.name=")[0]
    assert so3krates.startswith("So3krates as published in 2022")
    assert "model.non_local = false    (bool)\n    geometric attention" in so3krates
    assert "model.zbl" not in so3krates


def test_installation(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for name in ("so3krates-dist", "configs", "python", *info.VENDORS):
        assert name in out


def test_a_vendor_that_is_not_there_is_said(monkeypatch, capsys):
    monkeypatch.setattr(info, "VENDORS", ("no-such-distribution",))
    main(["info"])
    assert "no-such-distribution  not installed" in capsys.readouterr().out


def test_a_run_folder_is_described(run_folder, capsys):
    assert main(["info", str(run_folder)]) == 0
    out = capsys.readouterr().out
    for text in (
        "mine", "here", "step_00000020", "run.json: data_fingerprint", "0123456789abcdef",
        "run.json: package_version", "1.2.3", "train at step 20", "loss 1", "validation at step 10",
        "forces_mae 250 meV/Å, energy_rmse_per_atom 12.5 meV/atom, x 3\n",
        "euclidean_transformer", "none yet", "evaluation/parity_forces.png",
    ):  # fmt: skip
        assert text in out, text


def test_the_proof_of_precision_has_words_and_units(run_folder):
    assert dict(info.describe_run(run_folder))["proof at step 0"] == (
        "seconds 0.5, forces off float64 0.0021 meV/Å, of their size 1.2e-06, energies off float64 0.0003 meV/atom,"
        " largest net force 0.04 meV/Å, largest change of forces with a rotation 0.005 meV/Å"
    )


def test_a_run_that_has_only_begun_is_described(run_folder):
    for name in ("run.json", "metrics.jsonl", "evaluation/parity_forces.png"):
        (run_folder / name).unlink()
    stored = run_folder / "skipped" / "step_00000007"
    stored.mkdir(parents=True)
    (stored / "facts.json").write_text("{}")
    rows = dict(info.describe_run(run_folder))
    assert rows["pictures"] == "none"
    assert rows["skipped steps"] == "7; `so3krates replay RUN STEP` repeats one"
    assert rows["checkpoints"] == "step_00000020"


def test_the_plan_of_a_run_is_described(run_folder):
    segments = [
        {"first_step": step, "fields": {"sources": sources, "weights": weights, "lanes": 8}}
        for step, sources, weights in ((0, ["a"], [1.0]), (340, ["a", "b"], [0.625, 0.375]))
    ]
    content = {"segments": segments, "cost": None, "limits": {"max_atoms": 900, "max_pairs": 20000}}
    (run_folder / "plan.json").write_text(json.dumps(content))
    rows = dict(info.describe_run(run_folder))
    assert rows["plan from step 0"] == "100 % a; 8 lanes"
    assert rows["plan from step 340"] == "62.5 % a, 37.5 % b; 8 lanes"
    content["segments"][1]["loss_weights"] = [0.5, 2]
    (run_folder / "plan.json").write_text(json.dumps(content))
    rows = dict(info.describe_run(run_folder))
    assert rows["plan from step 340"] == "62.5 % a, 37.5 % b; loss weights 0.5, 2; 8 lanes"
    assert rows["measured limits"] == "max_atoms 900, max_pairs 2e+04"
    (run_folder / "plan.json").write_text('{"segments": [3]}')
    with pytest.raises(CheckpointError, match=r"plan\.json must be a plan; got TypeError: .*\. Restore the file"):
        info.describe_run(run_folder)


@pytest.mark.parametrize("model", config.MODEL_SECTIONS)
def test_the_model_of_a_run_is_described(run_folder, model):
    loaded = config.load_config([f"model.name={model}", "model.num_layers=2"])
    (run_folder / "config.yaml").write_text(config.dump_config(loaded))
    assert dict(info.describe_run(run_folder))["model"] == f"{model}, num_layers=2"


def test_a_model_without_a_run_is_described(tmp_path, capsys):
    section = config.So3lrSection(num_features=8, num_layers=1, degrees=(1, 2), zbl=False)
    statistics = ModelStatistics(elements=(1, 6, 17), energy_baselines={}, energy_scale=1.0, mean_neighbors=13.25)
    save_model(
        tmp_path,
        section,
        statistics,
        build_model(section, statistics).state_dict(),
        {"source": "somebody", "licence": "MIT"},
    )
    assert main(["info", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for text in (
        "so3lr, num_features=8, num_layers=1, degrees=[1, 2], zbl=false\n", "H C Cl", "13.25", "model.safetensors",
        "somebody", "licence", str(tmp_path),
    ):  # fmt: skip
        assert text in out, text
    (tmp_path / "model.safetensors").unlink()
    assert dict(info.describe_run(tmp_path))["weights"] == "missing"
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config.json must describe a model"):
        info.describe_run(tmp_path)


def test_other_folders_and_damage_are_refused(run_folder, tmp_path):
    with pytest.raises(
        CheckpointError,
        match=r"must be a run folder or hold a model; got neither config.yaml nor config.json in it. Name",
    ):
        info.describe_run(tmp_path)
    (run_folder / "run.json").write_text("{")
    with pytest.raises(
        CheckpointError, match=r"run.json must be readable JSON; got JSONDecodeError. Restore the file."
    ):
        info.describe_run(run_folder)
    (run_folder / "config.yaml").write_text("train: {lr: 1}\n")
    with pytest.raises(ConfigError, match=r"train.lr .* must be a known key"):
        info.describe_run(run_folder)
