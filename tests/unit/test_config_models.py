"""Sections of the models: what every option must have, and which model's options are meant."""

import dataclasses
import math
import typing

import pytest

from so3krates_dist import config
from so3krates_dist.config import MODEL_SECTIONS, RunConfig, load_config, loading
from so3krates_dist.errors import ConfigError
from so3krates_dist.model import layer, potential, radial, registry

SECTIONS = typing.get_type_hints(RunConfig)
SCHEMAS = [(name, section) for name, section in SECTIONS.items() if name != "model"]
SCHEMAS += [("model", section) for section in MODEL_SECTIONS.values()]


@pytest.fixture
def own_configs(tmp_path, monkeypatch):
    """A folder of configs that a test may fill."""
    for group in config.GROUPS:
        (tmp_path / "configs" / group).mkdir(parents=True)
    monkeypatch.setattr(loading, "find_configs", lambda: tmp_path / "configs")
    return tmp_path / "configs"


def test_a_layer_that_names_another_model_starts_the_section_anew():
    plain, changed = load_config(["run=md17"]), load_config(["run=md17", "model.name=geomatt"])
    assert plain.model.num_features == 96
    assert changed.model == config.GeomAttSection()
    assert dataclasses.replace(changed, model=plain.model) == plain
    assert load_config(["run=md17", "model.name=so3krates"]).model == config.So3kratesSection()


def test_options_of_an_overlay_that_do_not_count_are_said():
    said = config.describe_left_out(["run=md17", "model.name=geomatt", "model.orders=[2]"])
    assert said == ["model options of run=md17 are those of euclidean_transformer, not of geomatt, and were left out"]
    assert config.describe_left_out(["run=md17", "model.num_layers=2"]) == []
    assert config.describe_left_out(["model.name=geomatt"]) == []


def test_options_beside_the_name_of_the_model_are_kept():
    arguments = ["run=md17", "model.orders=[2,3]", "model.name=geomatt", "model.num_layers=2"]
    assert load_config(arguments).model == config.GeomAttSection(orders=(2, 3), num_layers=2)


def test_naming_the_same_model_again_keeps_its_options():
    arguments = ["run=md17", "model.name=euclidean_transformer"]
    assert load_config(arguments) == load_config(["run=md17"])


def test_every_layer_may_change_the_model(own_configs):
    (own_configs / "base.yaml").write_text("model: {name: geomatt, orders: [2]}\n")
    (own_configs / "run/r.yaml").write_text("model: {name: so3krates, non_local: true, cutoff: 3}\n")
    (own_configs / "model/m.yaml").write_text("model: {num_layers: 2}\n")
    assert load_config([]).model == config.GeomAttSection(orders=(2,))
    assert load_config(["run=r"]).model == config.So3kratesSection(non_local=True, cutoff=3.0)
    arguments = ["model=m", "run=r", "model.cutoff=4"]
    assert load_config(arguments).model == config.So3kratesSection(non_local=True, cutoff=4.0, num_layers=2)
    # Back again: what the base said of this model was left behind on the way.
    assert load_config(["run=r", "model.name=geomatt"]).model == config.GeomAttSection()
    assert load_config(["model=m", "model.name=so3lr"]).model == config.So3lrSection()


def test_options_of_a_model_that_is_left_behind_are_still_checked_for_it(own_configs):
    (own_configs / "run/r.yaml").write_text("model: {name: geomatt, num_heads: 4}\n")
    with pytest.raises(ConfigError, match=r"model.num_heads \(run=r\) must be an option of model.name=geomatt"):
        load_config(["run=r", "model.name=so3lr"])


def test_what_the_data_pipeline_knows_of_a_model():
    cutoffs = {name: (s.cutoff, s.reach) for name, schema in MODEL_SECTIONS.items() for s in [schema()]}
    assert cutoffs == {
        "so3krates": (5.0, 5.0), "euclidean_transformer": (5.0, 5.0), "so3lr": (4.5, 12.0), "geomatt": (5.0 + 1.2**0.5,) * 2,
        "geomatt_envelope": (5.0, 5.0),
    }  # fmt: skip
    assert config.So3kratesSection(non_local=True).reach == math.inf
    assert config.So3lrSection(long_range_cutoff=0.0).reach == math.inf
    assert config.So3lrSection(long_range_cutoff=0.0, dispersion=False).reach == math.inf
    assert config.So3lrSection(electrostatics="none", long_range_cutoff=15.0).reach == 15.0
    assert config.So3lrSection(electrostatics="none", dispersion=False).reach == 4.5
    dense = config.GeomAttSection(algorithm="dense", grid_end=4.0, gaussian_precision=24.0)
    assert (dense.cutoff, dense.reach) == (5.0, math.inf)
    assert [name for name, schema in MODEL_SECTIONS.items() if schema().uses_mean_neighbors] == [
        "euclidean_transformer", "so3lr",
    ]  # fmt: skip
    assert not config.EuclideanTransformerSection(message_scale="sqrt_features").uses_mean_neighbors
    assert {name: set(schema().sees) for name, schema in MODEL_SECTIONS.items()} == {
        "so3krates": {"cell"}, "euclidean_transformer": {"cell"}, "geomatt": set(), "geomatt_envelope": {"cell"},
        "so3lr": {"cell", "total_charge", "num_unpaired_electrons"},
    }  # fmt: skip
    assert config.So3kratesSection(non_local=True).sees == set()
    assert config.So3lrSection(spin_embedding=False).sees == {"cell", "total_charge"}
    assert config.So3lrSection(charge_embedding=False).sees == config.So3lrSection().sees, "charges add up to it"
    assert not any(schema().image_density for schema in MODEL_SECTIONS.values())
    assert [name for name, schema in MODEL_SECTIONS.items() if schema().cuts_electrostatics] == ["so3lr"]
    for method in ("ewald", "pme"):
        sums = config.So3lrSection(electrostatics=method)
        assert (sums.reach, dataclasses.replace(sums, dispersion=False).reach) == (12.0, 4.5)
        assert dataclasses.replace(sums, dispersion=False, long_range_cutoff=0.0).reach == 4.5
        assert not sums.cuts_electrostatics
    assert {name: set(schema.outputs) for name, schema in MODEL_SECTIONS.items() if schema.outputs} == {
        "so3lr": {"dipole", "partial_charges", "hirshfeld_ratios"}
    }
    trained = load_config(["model.name=so3lr", "train.dipole_weight=1", "train.hirshfeld_weight=2"]).train
    assert (trained.dipole_weight, trained.hirshfeld_weight) == (1.0, 2.0)


def test_every_key_has_a_text_and_every_section_too():
    from so3krates_dist.train.info import list_settings

    keys = [
        (n, f.name) for n, section in SCHEMAS for f in dataclasses.fields(section) if (n, f.name) != ("model", "name")
    ]
    settings = list_settings()
    assert sorted(tuple(s.key.split(".")) for s in settings if s.key != "model.name") == sorted(keys)
    assert [s.key for s in settings if len(s.text) < 4] == []
    assert all(section.__doc__ and not section.__doc__.startswith(section.__name__) for _, section in SCHEMAS)


def test_every_key_has_a_default_and_a_type_that_is_checked():
    for _, section in SCHEMAS:
        hints = typing.get_type_hints(section)
        for field in dataclasses.fields(section):
            hint = hints[field.name]
            choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else None
            assert field.default is not dataclasses.MISSING, field.name
            assert hint in (int, float, bool, str, tuple[int, ...], tuple[float, ...], tuple[str, ...]) or choices, (
                field.name
            )
            assert choices is None or field.default in choices, field.name
            assert choices is None or all(isinstance(c, str) for c in choices), field.name


def test_every_model_has_a_schema_and_a_class():
    assert set(registry.NETWORKS) == set(MODEL_SECTIONS)
    for name, section in MODEL_SECTIONS.items():
        assert typing.get_args(typing.get_type_hints(section)["name"]) == (name,)
        assert section().name == name


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("cutoff_function", radial.CUTOFF_FUNCTIONS),
        ("radial_basis", radial.RADIAL_BASES),
        ("residual_mlp", layer.RESIDUAL_MLPS),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_choice_and_the_table_beside_the_classes_are_equal(name, table):
    offered = [
        typing.get_args(typing.get_type_hints(section)[name])
        for section in MODEL_SECTIONS.values()
        if name in {field.name for field in dataclasses.fields(section)}
    ]
    assert offered
    assert all(set(choices) == set(table) for choices in offered)


@pytest.mark.parametrize("name", ["so3krates", "euclidean_transformer", "so3lr"])
@pytest.mark.parametrize("num_features", [1, 2, 3])
def test_the_smallest_widths_can_be_built(name, num_features):
    """Widths that follow from others are at least one."""
    section = MODEL_SECTIONS[name](num_features=num_features, num_heads=1, degrees=(1,), num_layers=1)
    statistics = potential.ModelStatistics(elements=(1,), energy_baselines={}, energy_scale=1.0, mean_neighbors=1.0)
    assert all(weight.numel() for weight in registry.build_model(section, statistics).parameters())
