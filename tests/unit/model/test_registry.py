"""Models on disk: bit for bit there and back, whole files only, and what is refused with which words."""

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from structures import OPTIONS, STATISTICS, check_deviations, compare, compute, make_molecule, make_potential

from so3krates_dist.config import MODEL_SECTIONS, ModelSection, find_configs, load_config
from so3krates_dist.errors import CheckpointError, ConfigError
from so3krates_dist.model import registry
from so3krates_dist.model.potential import ModelStatistics, Potential
from so3krates_dist.model.registry import build_model, change_model, load_model, read_model_config, save_model

SECTION = OPTIONS["backbone"]
STORED = Path(__file__).parents[2] / "data"


def save(folder: Path, seed: int = 0, **changes: Any) -> Potential:
    potential = make_potential(dtype=torch.float32, seed=seed)
    arguments = {"section": SECTION, "statistics": STATISTICS, "provenance": {"step": 7}, **changes}
    save_model(folder, weights=potential.state_dict(), **arguments)
    return potential


def edit(file: Path, *path: str, value: Any) -> None:
    """Change one value of config.json."""
    content = json.loads(file.read_text(encoding="utf-8"))
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(json.dumps(content), encoding="utf-8")


def find_dtypes(potential: Potential) -> set[torch.dtype | None]:
    """Return what is set for the parts that may be done coarsely."""
    return {module.compute_dtype for module in potential.modules() if hasattr(module, "compute_dtype")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("options", OPTIONS)
def test_there_and_back_bit_for_bit(options: str, tmp_path: Path) -> None:
    potential = make_potential(options, torch.float32)
    save_model(tmp_path, OPTIONS[options], STATISTICS, potential.state_dict(), {"step": 7})
    loaded = load_model(tmp_path)
    assert loaded.state_dict().keys() == potential.state_dict().keys()
    for name, weight in potential.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert loaded.statistics == STATISTICS
    for name, values in compute(potential, make_molecule()).items():
        assert values.tobytes() == compute(loaded, make_molecule())[name].tobytes(), name


def test_config_survives(folder: Path) -> None:
    assert read_model_config(folder) == (SECTION, STATISTICS, {"step": 7})
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert sorted(content) == ["format", "model", "provenance", "statistics"]
    assert content["format"] == registry.FORMAT == 2
    assert content["model"]["degrees"] == [1, 2, 3, 4]


def test_a_loaded_model_is_for_use(folder: Path) -> None:
    loaded = load_model(str(folder))
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    double = load_model(folder, dtype=torch.float64)
    assert {p.dtype for p in double.parameters()} == {torch.float64}
    assert compute(double, make_molecule())["forces"].dtype == "float64"


def test_loading_in_float64_keeps_every_digit(folder: Path) -> None:
    """The constants of harmonics and bases, and the baselines, do not go through float32 on the way."""
    exact = Potential(build_model(SECTION, STATISTICS).network.double(), STATISTICS).eval()
    exact.load_state_dict(load_file(folder / "model.safetensors"))
    double = load_model(folder, dtype=torch.float64)
    check_deviations(compare(compute(double, make_molecule()), compute(exact, make_molecule())), 1e-14)


def test_weights_are_plain_tensors_on_the_cpu_and_exact(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == make_potential().state_dict().keys()
    assert {w.dtype for w in weights.values()} == {torch.float32}


def test_weights_may_be_views_and_carry_gradients(tmp_path: Path) -> None:
    potential = make_potential(dtype=torch.float32)
    weights = {n: p.t().contiguous().t() if p.ndim == 2 else p for n, p in potential.named_parameters()}
    save_model(tmp_path, SECTION, STATISTICS, weights, {})
    assert all(torch.equal(load_model(tmp_path).state_dict()[n], p) for n, p in weights.items())


def test_saving_again_replaces_both_files(folder: Path) -> None:
    second = save(folder, seed=1, provenance={"step": 8})
    assert read_model_config(folder)[2] == {"step": 8}
    assert torch.equal(next(load_model(folder).parameters()), next(second.parameters()))
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("moment", ["weights", "config"])
def test_a_crash_while_saving_leaves_the_old_model(folder: Path, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first file or at the second: what is there under its name is whole."""
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    calls = []

    def crash(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == ("weights", "config").index(moment) + 1:
            raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="no space left"):
        save(folder, seed=1)
    monkeypatch.undo()
    assert (folder / "config.json").read_bytes() == before["config.json"]
    if moment == "weights":
        assert (folder / "model.safetensors").read_bytes() == before["model.safetensors"]
    load_model(folder)
    save(folder, seed=2)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_build_model_draws_from_torchs_seed_and_takes_the_statistics() -> None:
    first, second = (torch.manual_seed(5) and build_model(SECTION, STATISTICS) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.training
    assert first.network.layers[0].attention.scales == (6.5, 6.5)  # type: ignore[index,union-attr]


def test_loading_does_not_touch_torchs_random_state(folder: Path) -> None:
    before = torch.get_rng_state()
    load_model(folder)
    assert torch.equal(torch.get_rng_state(), before)


def check_refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert ".." not in message, message


@pytest.mark.parametrize("missing", ["folder", "config"])
def test_no_model_there(folder: Path, missing: str) -> None:
    (folder / "config.json").unlink()
    where = folder / "nowhere" if missing == "folder" else folder
    text = "must hold config.json and model.safetensors; got no such file. Give a run folder that was trained."
    with pytest.raises(CheckpointError, match=re.escape(f"{where} {text}")):
        load_model(where)


def test_a_newer_format_is_refused(folder: Path) -> None:
    edit(folder / "config.json", "format", value=3)
    check_refused(folder, "config.json must have format 2 or lower; got 3. Install a newer so3krates-dist.")


@pytest.mark.parametrize(
    ("version", "name", "energy", "size"),
    [
        (
            1,
            "euclidean_transformer",
            -4194.628392435838,
            0.6767957352510354,
        ),  # as the program that wrote it computed them
        (2, "so3lr", -4178.811770558298, 55.8728988739805),
    ],
)
def test_stored_models_of_every_format_load(version: int, name: str, energy: float, size: float) -> None:
    stored = STORED / f"model_format_{version}"
    assert json.loads((stored / "config.json").read_text(encoding="utf-8"))["format"] == version
    section, statistics, provenance = read_model_config(stored)
    assert (section.name, statistics.elements, provenance["step"]) == (name, (1, 6, 8), 3)
    assert statistics.has_unpaired_electrons == (version == 2)
    outputs = compute(load_model(stored, dtype=torch.float64), make_molecule())
    assert float(outputs["energy"][0]) == pytest.approx(energy, abs=1e-8)
    assert float(np.abs(outputs["forces"]).sum()) == pytest.approx(size, abs=1e-7)


def test_a_copy_for_use_is_the_model_from_its_folder(tmp_path: Path) -> None:
    """In full float64 from a model in float32, in float32 where training was in bf16, and the original as it was."""
    potential = build_model(SECTION, STATISTICS).requires_grad_(True)
    potential.set_precision("bf16-mixed")
    save_model(tmp_path, SECTION, STATISTICS, potential.state_dict(), {})
    for dtype in (torch.float32, torch.float64):
        copied, loaded = change_model(potential, {}, device="cpu", dtype=dtype), load_model(tmp_path, dtype=dtype)
        assert copied.section == loaded.section == SECTION
        assert not copied.training
        assert not any(p.requires_grad for p in copied.parameters())
        for name, values in compute(loaded, make_molecule()).items():
            assert values.tobytes() == compute(copied, make_molecule())[name].tobytes(), name
    assert potential.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in potential.parameters())
    double = make_potential()
    copied = change_model(double, {}, device="cpu", dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), double.parameters(), strict=True))
    assert potential.section == SECTION
    unnamed = Potential(potential.network, STATISTICS)
    copied = change_model(unnamed, {}, device="cpu", dtype=torch.float32)
    assert find_dtypes(copied) == {None}
    assert find_dtypes(unnamed) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (
            "backbone", {"cutoff": 5.0},
            r"^model\.cutoff must stay as it was in training; got 5\.0\. Leave it out, or train",
        ),
        (
            "so3lr", {"dispersion": False},
            r"model\.dispersion must stay .* only long_range_cutoff, electrostatics may change; got False",
        ),
        ("geomatt", {"grid_end": 4.0}, r"model\.grid_end must stay .* only algorithm may change"),
        ("so3krates", {"parity": False}, r"model\.parity must stay as it was in training; got False"),
        ("so3krates", {"algorithm": "dense"}, r"model\.algorithm must be an option of model\.name=so3krates"),
        (
            "so3lr_semi_local", {"electrostatics": "ewald", "long_range_cutoff": 15.0},
            r"^model\.long_range_cutoff must be left out where the model has no energy that ends there; got 15\.0\.",
        ),
        ("so3lr_semi_local", {"long_range_cutoff": 15.0}, r"must be left at 12 without .*; got 15\.0"),
        ("so3lr_semi_local", {"long_range_cutoff": 0.0}, r"must be left at 12 without .*; got 0\.0"),
    ],
)  # fmt: skip
def test_only_what_the_weights_do_not_depend_on_may_change(
    options: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    potential = make_potential(options)
    save_model(tmp_path, OPTIONS[options], STATISTICS, potential.state_dict(), {})
    with pytest.raises(ConfigError, match=message):
        load_model(tmp_path, changes=changes)
    with pytest.raises(ConfigError, match=message):
        change_model(potential, changes, device="cpu", dtype=torch.float64)


def test_every_option_that_may_change_is_one() -> None:
    options = {field.name for section in MODEL_SECTIONS.values() for field in dataclasses.fields(section)}
    assert set(registry.CHANGEABLE) <= options
    changed = change_model(make_potential("geomatt"), {"algorithm": "auto"}, device="cpu", dtype=torch.float64)
    check_deviations(
        compare(compute(changed, make_molecule()), compute(make_potential("geomatt"), make_molecule())), 1e-9
    )


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("so3krates", 717_943),  # 715,435 with the 100 rows of elements of the authors' code; 119 here
        ("so3krates_nonlocal", 717_943),
        ("euclidean_transformer", 636_937),  # 634,429 with LayerNorm and gated networks, 100 rows
        ("so3lr", 530_238),
        ("so3lr_backbone", 397_309),
        ("geomatt", 451_265),  # 436,545 with the four rows of the authors' example
        ("geomatt_envelope", 451_265),
        ("small", 70_885),
    ],
)
def test_sizes_of_the_models_in_configs(name: str, num_parameters: int) -> None:
    potential = build_model(load_config([f"model={name}"]).model, STATISTICS)
    assert sum(p.numel() for p in potential.parameters()) == num_parameters


def test_every_model_in_configs_has_its_size_here() -> None:
    (mark,) = test_sizes_of_the_models_in_configs.pytestmark  # type: ignore[attr-defined]
    assert sorted(name for name, _ in mark.args[1]) == sorted(p.stem for p in (find_configs() / "model").glob("*.yaml"))


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"format": 1}', '{"format": "one"}', "\x00"])
def test_damaged_config(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content, encoding="utf-8")
    check_refused(folder, "config.json must describe a model; got", "Export the model again.")


def test_config_in_another_encoding(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    check_refused(folder, "config.json must describe a model; got UnicodeDecodeError")


@pytest.mark.parametrize(
    ("path", "value", "word"),
    [
        (("statistics", "energy_scale_"), 1.0, "energy_scale_"),
        (("statistics",), [1], "statistics"),
        (("provenance",), None, "TypeError"),
        (("model", "num_feature"), 3, "got model.num_feature ("),
        (("model", "cutoff"), -1.0, "model.cutoff must be greater than zero; got -1.0"),
        (("model", "name"), "transformer", "model.name"),
        (("statistics", "energy_baselines"), [1], "energy_baselines"),
        (("statistics", "energy_baselines"), {"500": 1.0}, "500"),
        (("statistics", "energy_scale"), "large", "energy_scale"),
        (("statistics", "energy_scale"), float("nan"), "energy_scale"),
        (("statistics", "mean_neighbors"), None, "mean_neighbors"),
        (("statistics", "elements"), "CH", "elements"),
        (("format",), float("inf"), "OverflowError"),
    ],
)
def test_wrong_values_in_the_config(folder: Path, path: tuple[str, ...], value: Any, word: str) -> None:
    edit(folder / "config.json", *path, value=value)
    check_refused(folder, "config.json must describe a model; got", word, "Export the model again.")


def test_missing_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    check_refused(folder, "model.safetensors must hold the weights of config.json; got No such file")


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b"", lambda b: b"x" * 1000, lambda b: b[:6]])
def test_damaged_weights(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    check_refused(
        folder, "model.safetensors must hold the weights of config.json; got Error while deserializing header"
    )


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_features": 48}, "network."),
        ({"num_layers": 1}, "network.layers.1"),
        ({"num_layers": 3}, "network.layers.2"),
    ],
)
def test_weights_of_another_model_are_refused_by_name(folder: Path, changes: dict[str, int], word: str) -> None:
    for key, value in changes.items():
        edit(folder / "config.json", "model", key, value=value)
    check_refused(folder, "model.safetensors must hold the weights of config.json; got", word)


def test_one_missing_and_one_unknown_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    for changed in ({n: w for n, w in weights.items() if "readout" not in n}, {**weights, "extra": torch.ones(1)}):
        save_file(changed, folder / "model.safetensors")
        check_refused(folder, "model.safetensors must hold the weights of config.json; got")


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", ["euclidean_transformer", "so3lr"])
def test_models_that_name_a_precision_load(folder: Path, name: str, precision: str, tmp_path: Path) -> None:
    """Earlier versions wrote it among the model's options. It was for training: loaded models were in float32 then as now."""
    section = OPTIONS["backbone" if name == "euclidean_transformer" else "so3lr"]
    potential = make_potential(section, torch.float32)
    save_model(folder, section, STATISTICS, potential.state_dict(), {"step": 7})
    edit(folder / "config.json", "model", "precision", value=precision)
    assert read_model_config(folder)[0] == section
    loaded = load_model(folder)
    assert find_dtypes(loaded) == {None}
    for label, values in compute(potential, make_molecule()).items():
        assert values.tobytes() == compute(loaded, make_molecule())[label].tobytes(), label


def test_every_option_survives_the_config(tmp_path: Path) -> None:
    section = dataclasses.replace(SECTION, cutoff_function="cosine", radial_filter_width=10, degrees=(2, 4, 8))
    statistics = ModelStatistics(elements=(1,), energy_baselines={1: -13.6}, energy_scale=0.7, mean_neighbors=1.5)
    save_model(tmp_path, section, statistics, build_model(section, statistics).state_dict(), {})
    assert read_model_config(tmp_path)[:2] == (section, statistics)
    assert isinstance(section, ModelSection)
