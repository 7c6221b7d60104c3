"""Import of published weights: what is written, and what is refused with which words; no published file is needed."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from structures import make_batch, make_molecule

from so3krates_dist import cli
from so3krates_dist.config import So3lrSection
from so3krates_dist.errors import CheckpointError, ConfigError
from so3krates_dist.files import hash_file
from so3krates_dist.inference.interop import import_so3lr, list_shapes, read_arrays
from so3krates_dist.model.registry import load_model, read_model_config

HYPERPARAMETERS: dict[str, Any] = {
    "workdir": "/home/somebody/run_7",
    "data": {"avg_num_neighbors": 13.25, "filepath": "/project/secret.xyz"},
    "model": {
        "num_features": 16, "num_layers": 2, "num_heads": 2, "degrees": [1, 2], "cutoff": 4.5, "num_radial_basis_fn": 6,
        "cutoff_fn": "phys", "radial_basis_fn": "bernstein", "electrostatic_energy_scale": 3.5, "cutoff_lr": None,
        "dispersion_energy_scale": 1.3,
    },
}  # fmt: skip
SECTION = So3lrSection(
    num_features=16, num_layers=2, num_heads=2, degrees=(1, 2), cutoff=4.5, num_radial_basis=6, electrostatic_damping=3.5,
    dispersion_damping=1.3,
)  # fmt: skip


def make_tree(section: So3lrSection = SECTION) -> dict[str, Any]:
    """Return random arrays under the published names, nested as published."""
    rng, tree = np.random.default_rng(0), {}
    for name, shape in list_shapes(section).items():
        *folders, last = name.split("/")
        inner = tree
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[last] = rng.normal(scale=0.3, size=shape).astype(np.float32)
    return tree


def publish(folder: Path, tree: Any = None, hyperparameters: Any = HYPERPARAMETERS) -> Path:
    path = folder / "params.pkl"
    path.write_bytes(pickle.dumps({"params": make_tree() if tree is None else tree}, protocol=4))
    if hyperparameters is not None:
        (folder / "hyperparameters.json").write_text(json.dumps(hyperparameters), encoding="utf-8")
    return path


def test_what_is_written(tmp_path: Path) -> None:
    source, folder = publish(tmp_path), tmp_path / "models" / "so3lr"
    assert import_so3lr(source, folder) == folder
    section, statistics, provenance = read_model_config(folder)
    assert section == SECTION
    assert (statistics.elements, statistics.mean_neighbors) == ((1, 6, 7, 8, 9, 15, 16, 17), 13.25)
    assert (statistics.energy_scale, statistics.energy_baselines) == (1.0, {})
    assert not statistics.has_unpaired_electrons
    assert provenance["source_sha256"] == hash_file(source)
    assert provenance["licence"] == "MIT"
    assert "10.1021/jacs.5c09558" in provenance["citation"]
    text = (folder / "config.json").read_text(encoding="utf-8")
    assert not any(word in text for word in ("somebody", "secret", "run_7", str(tmp_path)))
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_every_array_goes_where_it_belongs(tmp_path: Path) -> None:
    """All values are there once; matrices are turned where the published ones are (in, out)."""
    tree = make_tree()
    import_so3lr(publish(tmp_path, tree), tmp_path / "out")
    weights = load_model(tmp_path / "out").state_dict()
    ours = np.sort(np.concatenate([w.numpy().ravel() for w in weights.values()]))
    theirs = np.sort(np.concatenate([a.ravel() for a in read_arrays(tmp_path / "params.pkl").values()]))
    np.testing.assert_array_equal(ours, theirs)

    def apply(name: str, inputs: np.ndarray) -> np.ndarray:
        return inputs @ weights[f"network.{name}.weight"].numpy().T + weights[f"network.{name}.bias"].numpy()

    inputs, layer = np.random.default_rng(1).normal(size=(3, 16)).astype(np.float32), tree["layers_1"]
    dense = layer["res_mlp_1_layer_2"]
    np.testing.assert_allclose(
        apply("layers.1.inner_mlp.second", inputs), inputs @ dense["kernel"] + dense["bias"], rtol=1e-5
    )
    dense = tree["observables_2"]["hirshfeld_ratios_dense_regression"]
    np.testing.assert_allclose(
        apply("hirshfeld_head.hidden", inputs), inputs @ dense["kernel"] + dense["bias"], rtol=1e-5
    )
    projections = load_model(tmp_path / "out").network.layers[1].attention.feature_projections  # type: ignore[index,union-attr]
    for values, name in zip(projections(torch.from_numpy(inputs), torch.float32), ("Wq1", "Wk1", "Wv1"), strict=True):
        heads = [inputs[:, 8 * h : 8 * h + 8] @ layer["attention_block"][name][h].T for h in range(2)]
        np.testing.assert_allclose(values.numpy(), np.concatenate(heads, axis=1), rtol=1e-5, atol=1e-6)


def test_the_random_state_of_torch_is_not_touched(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    import_so3lr(publish(tmp_path), tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), before)


def test_without_settings_the_mean_number_of_neighbors_must_be_given(tmp_path: Path) -> None:
    source = publish(tmp_path, make_tree(So3lrSection()), None)
    with pytest.raises(
        ConfigError, match=r"--mean-neighbors must be given and positive where no hyperparameters.json lies"
    ):
        import_so3lr(source, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"got -1.0"):
        import_so3lr(source, tmp_path / "out", -1.0)
    assert not (tmp_path / "out").exists()
    import_so3lr(source, tmp_path / "out", 11.5)
    section, statistics, _ = read_model_config(tmp_path / "out")
    assert (section, statistics.mean_neighbors) == (So3lrSection(), 11.5)
    potential = load_model(tmp_path / "out")
    outputs = potential(make_batch([make_molecule()], potential.cutoffs, torch.float32))
    assert bool(outputs["forces"].isfinite().all())


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


class NumpyCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return np.load, ("somewhere.npy",)


@pytest.mark.parametrize(("content", "name"), [(Malicious(), "posix.mkdir"), (NumpyCode(), "numpy.load")])
def test_code_is_never_run(content: object, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CheckpointError, match=rf"must be a pickle of plain numpy arrays under `params`; got it asks for {name}\."
    ):
        import_so3lr(publish(tmp_path, {"a": content}), tmp_path / "out")
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        (b"", "got Ran out of input"),
        (b"garbage", "got "),
        (pickle.dumps({"weights": {}}), "got 'params'"),
        (pickle.dumps({"params": {"a": 3.0}}), "got a is no array of finite numbers"),
        (pickle.dumps({"params": {"a": np.array([np.nan])}}), "got a is no array of finite numbers"),
        (pickle.dumps({"params": {"a": np.array([1e300])}}), "got a is no array of finite numbers"),
        (pickle.dumps({"params": {"a": np.array(["text"])}}), "got a is no array of finite numbers"),
        (pickle.dumps({"params": {"a": np.array([None])}}), "got a is no array of finite numbers"),
        (pickle.dumps([1, 2]), "got "),
        (pickle.dumps({"params": make_tree()})[:-500], "got "),
    ],
)
def test_damaged_files(content: bytes, finding: str, tmp_path: Path) -> None:
    source = publish(tmp_path)
    source.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"params.pkl must be a pickle of plain numpy arrays under `params`"
    ) as caught:
        import_so3lr(source, tmp_path / "out")
    assert finding in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"params\.pkl must be a file; got no such file\. Give the published params\.pkl"
    ):
        import_so3lr(tmp_path / "params.pkl", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"^\. must be a file"):
        import_so3lr(Path(), tmp_path / "out", 13.0)


def test_names_of_numpy_before_version_two_are_read(tmp_path: Path) -> None:
    content = pickle.dumps({"params": {"a": np.arange(3.0)}}, protocol=3)
    assert b"numpy._core.multiarray" in content
    (tmp_path / "old.pkl").write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert read_arrays(tmp_path / "old.pkl")["a"].tolist() == [0, 1, 2]


def remove(tree: dict[str, Any]) -> None:
    del tree["layers_1"]["attention_block"]["Wq2"]
    del tree["layers_1"]["attention_block"]["Wk2"]


def add(tree: dict[str, Any]) -> None:
    tree["layers_2"] = {"kernel": np.zeros(3)}


def reshape(tree: dict[str, Any]) -> None:
    tree["observables_0"]["atomic_scales"] = np.zeros(100)


def give_levels_of_theory(tree: dict[str, Any]) -> None:
    tree["observables_0"]["energy_offset"] = np.zeros((119, 16))
    tree["observables_0"]["atomic_scales"] = np.zeros((119, 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove, r"hold exactly the arrays of SO3LR; got no layers_1/attention_block/Wk2 and 1 more like that"),
        (add, r"hold exactly the arrays of SO3LR; got the unknown layers_2/kernel\."),
        (reshape, r"hold exactly the arrays of SO3LR; got observables_0/atomic_scales of shape \(100,\)\."),
        (give_levels_of_theory, r"hold SO3LR as published, for one level of theory; got 16 levels of theory\."),
    ],
)
def test_other_arrays(change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path) -> None:
    tree = make_tree()
    change(tree)
    with pytest.raises(CheckpointError, match=message):
        import_so3lr(publish(tmp_path, tree), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"cutoff_fn": "cosine"}, "model.cutoff_fn is 'cosine'"),
        ({"use_spin_embed": False}, "model.use_spin_embed is False"),
        ({"num_features": 15}, "model.num_features must be divisible"),
        ({"cutoff_lr": 3.0}, "model.long_range_cutoff must be 0"),
        ({"num_layers": "three"}, "num_layers"),
        ({"dispersion_energy_cutoff_lr_damping": 1.0}, "model.dispersion_energy_cutoff_lr_damping is 1.0"),
        ({"electrostatic_energy_range": 5.0}, "model.electrostatic_energy_range is unknown here"),
    ],
)
def test_settings_of_another_model(changes: dict[str, Any], finding: str, tmp_path: Path) -> None:
    settings = {**HYPERPARAMETERS, "model": {**HYPERPARAMETERS["model"], **changes}}
    with pytest.raises(CheckpointError, match=r"hyperparameters.json must describe SO3LR as published") as caught:
        import_so3lr(publish(tmp_path, hyperparameters=settings), tmp_path / "out")
    assert finding in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [("energy_unit", "kcal/mol"), ("length_unit", "Bohr")])
def test_settings_in_other_units(name: str, value: str, tmp_path: Path) -> None:
    settings = {**HYPERPARAMETERS, "data": {**HYPERPARAMETERS["data"], name: value}}
    with pytest.raises(CheckpointError, match=rf"must describe SO3LR as published; got data\.{name} is '{value}'\."):
        import_so3lr(publish(tmp_path, hyperparameters=settings), tmp_path / "out")


@pytest.mark.parametrize("switch_width", [None, 2.0, 2])
def test_settings_that_say_the_same_or_nothing_for_a_model(switch_width: float | None, tmp_path: Path) -> None:
    harmless = {"num_features_head": 32, "input_convention": "positions", "energy_regression_dim": 16}
    further = {"dispersion_energy_cutoff_lr_damping": switch_width, **harmless}
    settings = {
        **HYPERPARAMETERS,
        "data": {**HYPERPARAMETERS["data"], "energy_unit": "eV", "length_unit": "Angstrom"},
        "model": {**HYPERPARAMETERS["model"], **further},
    }
    import_so3lr(publish(tmp_path, hyperparameters=settings), tmp_path / "out")
    assert read_model_config(tmp_path / "out")[0] == SECTION


def test_a_mean_number_of_neighbors_at_odds_with_the_published_one(tmp_path: Path) -> None:
    source, folder = publish(tmp_path), tmp_path / "out"
    for value in (9.0, float("nan")):
        with pytest.raises(
            ConfigError, match=rf"--mean-neighbors must be what hyperparameters.json .* says, 13\.25; got {value}\."
        ):
            import_so3lr(source, folder, value)
    assert not folder.exists()
    import_so3lr(source, folder, 13.25)
    assert read_model_config(folder)[1].mean_neighbors == 13.25


@pytest.mark.parametrize("content", ["", "[]", '{"model": {}}', '{"model": {}, "data": {"avg_num_neighbors": -2}}'])
def test_damaged_settings(content: str, tmp_path: Path) -> None:
    source = publish(tmp_path)
    (tmp_path / "hyperparameters.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"must describe SO3LR as published; got .+\. Take the file"):
        import_so3lr(source, tmp_path / "out")


def test_what_is_there_is_kept_unless_it_is_ours(tmp_path: Path) -> None:
    source, folder = publish(tmp_path), tmp_path / "out"
    folder.mkdir()
    import_so3lr(source, folder)
    settings = {**HYPERPARAMETERS, "data": {"avg_num_neighbors": 9.0}}
    import_so3lr(publish(tmp_path, hyperparameters=settings), folder)
    assert read_model_config(folder)[1].mean_neighbors == 9.0
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    for name in ("evaluation", "dynamics", "explain"):  # what other verbs leave beside the model is no hindrance
        (folder / name).mkdir()
    (folder / "md").mkdir()
    message = (
        r"out must be new, empty, or hold nothing but a model that was imported; got also md, notes.txt\. "
        r"Choose another folder, or move that away\.$"
    )
    with pytest.raises(CheckpointError, match=message):
        import_so3lr(source, folder)
    (folder / "md").rmdir()
    with pytest.raises(CheckpointError, match=r"got params.pkl"):
        import_so3lr(source, source)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "notes.txt").unlink()
    (folder / "config.json").write_text(json.dumps({**config, "provenance": {"step": 3}}), encoding="utf-8")
    with pytest.raises(
        CheckpointError, match=r"hold nothing but a model that was imported; got config.json, model.safetensors\."
    ):  # a trained one
        import_so3lr(source, folder)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    source = publish(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"must be a folder that can be written; got Not a directory\. Choose another\."
    ):
        import_so3lr(source, source / "out")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = publish(tmp_path)
    assert cli.main(["import", "so3lr", str(source), "--out", str(tmp_path / "out"), "--mean-neighbors", "13.25"]) == 0
    printed = capsys.readouterr().out
    assert "elements H C N O F P S Cl" in printed
    assert "mean number of neighbours 13.25; long-range terms end at 12 Å, a choice" in printed
    assert "10.1021/jacs.5c09558" in printed
    assert read_model_config(tmp_path / "out")[1].mean_neighbors == 13.25
    source.write_bytes(b"")
    assert cli.main(["import", "so3lr", str(source), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith(f"so3krates: {source} must be a pickle")


def test_help_explains(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["import", "so3lr", "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for word in (
        "params.pkl",
        "--mean-neighbors",
        "hyperparameters.json",
        "long_range_cutoff",
        "general-molecular-simulations/so3lr",
    ):
        assert word in printed


def test_other_models_cannot_be_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["import", "mace", str(tmp_path), "--out", str(tmp_path / "out")])
    assert caught.value.code == cli.EXIT_USAGE
    assert "so3lr" in capsys.readouterr().err
