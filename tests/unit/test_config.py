"""The configuration is put together in one order, checked once, frozen, and refuses every mistake in one line."""

import ast
import dataclasses
import inspect
import math
import os
import typing
from pathlib import Path

import pytest
from test_config_data import WRONG_DATA
from test_config_training import WRONG_TRAINING

from so3krates_dist import config
from so3krates_dist.config import (
    MODEL_SECTIONS,
    RunConfig,
    checks,
    dump_config,
    load_config,
    loading,
    models,
    parse_config,
    read_config,
    sections,
    to_plain,
    training,
)
from so3krates_dist.distributed import count_threads
from so3krates_dist.errors import EXIT_CONFIG, ConfigError

SECTIONS = typing.get_type_hints(RunConfig)
ALL_MODELS = "so3krates, euclidean_transformer, so3lr, geomatt, geomatt_envelope"
OVERLAYS = [f"{p.parent.name}={p.stem}" for p in sorted(config.find_configs().glob("*/*.yaml"))]


def get_message(arguments: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(arguments)
    assert caught.value.exit_code == EXIT_CONFIG
    message = str(caught.value)
    assert "\n" not in message
    assert " must " in message
    assert "; got " in message
    return message


@pytest.fixture
def own_configs(tmp_path, monkeypatch):
    """A folder of configs that a test may fill."""
    for group in config.GROUPS:
        (tmp_path / "configs" / group).mkdir(parents=True)
    monkeypatch.setattr(loading, "find_configs", lambda: tmp_path / "configs")
    return tmp_path / "configs"


# -------------------------------------------------------------------------------------------------------- what is refused

WRONG = [
    # unknown names, with the nearest known one
    ("train.lr=0.1", "train.lr (command line) must be a known key; got an unknown one. Did you mean `train.learning_rate`?"),
    ("train.num_step=3", "train.num_step (command line) must be a known key; got an unknown one. Did you mean `train.num_steps`?"),
    ("trian.num_steps=3", "trian (command line) must be a known key; got an unknown one. Did you mean `train`?"),
    ("model.cutof=4", "Did you mean `model.cutoff`?"),
    ("train.zero_stage.x=3", "train.zero_stage.x (command line) must be a known key"),
    ("xyzzy.plugh=1", "must be a known key; got an unknown one. `so3krates info --config` lists all keys."),
    ("run=quikstart", "got quikstart. Did you mean `run=quickstart`?"),
    ("model=zzz", "got zzz. Take one of these, or the path of a yaml file."),
    ("run=/nowhere/at_all.yaml", "/nowhere/at_all.yaml must be a readable YAML file; got No such file or directory."),
    ("quickstart", "quickstart must have the form key=value; got no `=`. Write for example train.num_steps=100."),
    ("data.folder=${oc.env:HOME}", "data.folder must be a plain value; got ${oc.env:HOME}. Interpolation is not allowed"),
    # wrong types
    ("train.num_steps=many", "train.num_steps (command line) must be an integer; got 'many'."),
    ("train.num_steps=1.5", "train.num_steps (command line) must be an integer; got 1.5."),
    ("train.num_steps=true", "train.num_steps (command line) must be an integer; got True."),
    ("train.num_steps=", "train.num_steps (command line) must be an integer; got None."),
    ("train.num_steps=[1", "train.num_steps (command line) must be an integer; got '[1'."),
    ("train.learning_rate=fast", "train.learning_rate (command line) must be a number; got 'fast'."),
    ("train.self_check=perhaps", "train.self_check (command line) must be true or false; got 'perhaps'."),
    ("model.degrees=3", "model.degrees (command line) must be a list of integers, e.g. [1,2,3]; got 3."),
    ("model.degrees=[1,a]", "model.degrees (command line) must be a list of integers, e.g. [1,2,3]; got [1, 'a']."),
    ("model.degrees=[1.0,2]", "model.degrees (command line) must be a list of integers"),
    ("train=3", "train (command line) must be a section with keys of its own; got 3."),
    ("model.order_gains=[a] model.name=geomatt", "model.order_gains (command line) must be a list of numbers, e.g. [1,2,3]; got"),
    ("model=3", "model must be one of"),
    ("model.name=nequip", f"model.name (command line) must be one of {ALL_MODELS}; got 'nequip'. Change the value."),
    ("model.name=", f"model.name (command line) must be one of {ALL_MODELS}; got None."),
    ("model.name=[so3lr]", f"model.name (command line) must be one of {ALL_MODELS}; got ['so3lr']."),
    ("model.normalization=batch", "model.normalization (command line) must be one of none, pre, post; got 'batch'."),
    ("metrics.wandb=maybe", "metrics.wandb (command line) must be one of off, auto, offline, online; got 'maybe'."),
    ("train.device=tpu", "train.device (command line) must be one of auto, cpu, cuda; got 'tpu'."),
    # numbers that are none, or out of range
    ("train.learning_rate=nan", "train.learning_rate must be a finite number; got nan."),
    ("train.learning_rate=.inf", "train.learning_rate must be a finite number; got inf."),
    ("model.cutoff=nan", "model.cutoff must be a finite number; got nan."),
    ("train.learning_rate=-1", "train.learning_rate must be greater than zero; got -1.0."),
    ("model.cutoff=-5", "model.cutoff must be greater than zero; got -5.0."),
    ("model.num_heads=0", "model.num_heads must be greater than zero; got 0."),
    ("train.num_steps=0", "train.num_steps must be greater than zero; got 0."),
    ("train.weight_decay=-0.1", "train.weight_decay must be zero or greater; got -0.1."),
    ("data.batch_size=0", "data.batch_size must be greater than zero; got 0."),
    ("data.max_validation=-1", "data.max_validation must be zero or greater; got -1."),
    ("run.name=", "run.name must not be empty; got ''."),
    ("run.seed=-1", "run.seed must be zero or greater; got -1."),
    ("run.threads=-1", "run.threads must be zero or greater; got -1."),
    ("train.adam_beta1=1", "train.adam_beta1 must be at least 0 and less than 1; got 1.0."),
    ("train.ema_decay=-0.5", "train.ema_decay must be at least 0 and less than 1; got -0.5."),
    ("train.keep_checkpoints=1", "train.keep_checkpoints must be at least 2; got 1."),
    ("model.degrees=[]", "model.degrees must be ascending integers from 1 to 8; got []."),
    ("model.degrees=[2,1]", "model.degrees must be ascending integers from 1 to 8; got [2, 1]."),
    ("model.degrees=[0,1]", "model.degrees must be ascending integers from 1 to 8; got [0, 1]."),
    ("model.degrees=[1,9]", "model.degrees must be ascending integers from 1 to 8; got [1, 9]."),
    ("model.num_features=130", "model.num_features must be divisible by the num_heads (4); got 130. Take 128."),
    ("model.degrees=[1,2,3]", "model.num_features must be divisible by the number of degrees (3); got 128."),
    ("model.num_radial_basis=1", "model.num_radial_basis must be at least 2; got 1."),
    # options that only some models have, or in another range
    (
        "model.name=geomatt model.num_heads=4",
        "model.num_heads (command line) must be an option of model.name=geomatt; "
        "got an option of so3krates, euclidean_transformer, so3lr. Leave it out.",
    ),
    (
        "model.non_local=true",
        "model.non_local (command line) must be an option of model.name=euclidean_transformer; got an option of so3krates.",
    ),
    ("model.name=geomatt model.cutof=4", "model.cutof (command line) must be a known key; got an unknown one."),
    ("model.name=so3krates model.degrees=[-1,1]", "model.degrees must be ascending integers from 0 to 8; got [-1, 1]."),
    ("model.name=so3krates model.num_features=128", "model.num_features must be divisible by the number of degrees (3); got 128."),
    (
        "model.name=so3krates model.sphc_cutoff=0.1",
        "model.sphc_cutoff must be 0 without model.non_local; got 0.1. Set model.non_local=true.",
    ),
    ("model.name=so3krates model.non_local=true model.sphc_cutoff=-1", "model.sphc_cutoff must be zero or greater; got -1.0."),
    ("model.name=so3krates model.initial_sphc=random", "must be one of published, smooth, zero; got 'random'."),
    ("model.sphc_normalization=-1", "model.sphc_normalization must be zero or greater; got -1.0."),
    *(
        (
            f"model.name=so3lr model.electrostatics={method} model.long_range_cutoff=0",
            f"model.long_range_cutoff must not be 0 with dispersion beside {method}; got 0.0. Set it to 12: crystals need an end",
        )
        for method in ("ewald", "pme")
    ),
    ("model.name=so3lr model.long_range_cutoff=9.5", "model.long_range_cutoff must be 0 (none) or at least 10 Å; got 9.5."),
    (
        "model.name=so3lr model.cutoff=11 model.long_range_cutoff=10",
        "model.long_range_cutoff must be 0 (none) or at least 11 Å; got 10.0.",
    ),
    ("model.name=so3lr model.long_range_cutoff=-1", "model.long_range_cutoff must be 0 (none) or at least 10 Å; got -1.0."),
    ("model.name=so3lr model.electrostatic_damping=0", "model.electrostatic_damping must be greater than zero; got 0.0."),
    ("model.name=so3lr model.dispersion_damping=-1", "model.dispersion_damping must be greater than zero; got -1.0."),
    ("model.name=so3lr model.electrostatics=p3m", "must be one of none, cutoff, ewald, pme; got 'p3m'."),
    ("model.name=geomatt model.orders=[2.5]", "model.orders (command line) must be a list of integers, e.g. [1,2,3]; got [2.5]."),
    (
        "model.name=so3lr model.electrostatics=none model.electrostatic_damping=3",
        "model.electrostatic_damping must be left at 4 without model.electrostatics; got 3.0. Leave it out.",
    ),
    (
        "model.name=so3lr model.electrostatics=none model.dispersion=false model.long_range_cutoff=15",
        "model.long_range_cutoff must be left at 12 without model.dispersion and model.electrostatics; got 15.0.",
    ),
    ("model.name=so3lr model.dispersion=false model.dispersion_damping=1", "must be left at 1.2 without model.dispersion;"),
    ("model.name=geomatt model.orders=[]", "model.orders must be ascending integers from 2 to 5; got []."),
    ("model.name=geomatt model.orders=[3,2]", "model.orders must be ascending integers from 2 to 5; got [3, 2]."),
    ("model.name=geomatt model.orders=[1,2]", "model.orders must be ascending integers from 2 to 5; got [1, 2]."),
    ("model.name=geomatt model.orders=[2,6]", "model.orders must be ascending integers from 2 to 5; got [2, 6]."),
    ("model.name=geomatt model.inner_width=3", "model.inner_width must be at least 4 for these orders; got 3."),
    ("model.name=geomatt model.num_features=0", "model.num_features must be greater than zero; got 0."),
    ("model.name=geomatt model.grid_spacing=0", "model.grid_spacing must be greater than zero; got 0.0."),
    ("model.name=geomatt model.grid_start=-1", "model.grid_start must be zero or greater; got -1.0."),
    (
        "model.name=geomatt model.grid_end=1 model.grid_start=1",
        "model.grid_end must be at least two spacings (0.1 Å) above model.grid_start; got 1.0.",
    ),
    (
        "model.name=geomatt model.order_gains=[1,2]",
        "model.order_gains must be one number above zero for each of model.orders, or empty; got [1.0, 2.0].",
    ),
    ("model.name=geomatt model.order_gains=[1,0,2]", "model.order_gains must be one number above zero"),
    ("model.name=geomatt model.order_gains=[1,nan,2]", "model.order_gains must be one number above zero"),
    ("model.name=geomatt model.order_gains=[1,.inf,2]", "model.order_gains must be one number above zero"),
    ("model.name=geomatt_envelope model.cutoff=0", "model.cutoff must be greater than zero; got 0.0."),
    ("model.name=geomatt_envelope model.orders=[2,6]", "model.orders must be ascending integers from 2 to 5; got [2, 6]."),
    ("model.name=geomatt_envelope model.algorithm=dense", "got an option of geomatt. Leave it out."),
    # values at odds with each other
    ("train.micro_batches=3", "train.micro_batches must divide data.lanes (8); got 3."),
    ("train.warmup_steps=10000", "train.warmup_steps must be less than train.num_steps (10000); got 10000."),
    ("train.final_learning_rate=1", "train.final_learning_rate must be at most train.learning_rate (0.002); got 1.0."),
    ("train.dipole_weight=1", "must be 0 where model.name=euclidean_transformer has no output `dipole`; got 1.0. Set it to 0."),
    (
        "train.hirshfeld_weight=1 model.name=geomatt",
        "train.hirshfeld_weight must be 0 where model.name=geomatt has no output `hirshfeld_ratios`; got 1.0. Set it to 0.",
    ),
    ("train.dipole_weight=-1 model.name=so3lr", "train.dipole_weight must be zero or greater; got -1.0."),
    (
        "train.energy_weight=0 train.forces_weight=0",
        "train.forces_weight must be greater than zero where the other weights are zero; got 0.0.",
    ),
]  # fmt: skip


ALL_WRONG = WRONG + WRONG_DATA + WRONG_TRAINING


@pytest.mark.parametrize(("arguments", "expected"), ALL_WRONG, ids=[a for a, _ in ALL_WRONG])
def test_every_mistake_is_one_line_that_says_what_to_do(arguments, expected):
    assert expected in get_message(arguments.split(" "))


def find_rules(function: ast.FunctionDef) -> typing.Iterator[ast.expr]:
    """Yield the rule of every `check(...)` and `ConfigError(...)` in a function; a name stands for what it was given there."""
    names = {
        node.targets[0].id: node.value
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    parameters = {argument.arg for argument in function.args.args}
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("check", "ConfigError"):
            rule = node.args[2 if node.func.id == "check" else 1]
            if not isinstance(rule, ast.Name):
                yield rule
            elif rule.id not in parameters:
                yield names[rule.id]


def get_words(rule: ast.expr) -> list[str]:
    """Return the constant pieces of a text."""
    pieces = rule.values if isinstance(rule, ast.JoinedStr) else [rule]
    assert any(isinstance(piece, ast.Constant) for piece in pieces), ast.dump(rule)
    return [str(piece.value).strip(" (") for piece in pieces if isinstance(piece, ast.Constant)]


def test_every_raise_and_check_of_the_schema_is_in_the_table():
    """A new `check(...)` needs a line above: its rule's constant words must occur in one expected message."""
    functions = [
        node
        for module in (checks, loading, models, sections, training)
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.FunctionDef)
    ]
    rules = [get_words(rule) for function in functions for rule in find_rules(function)]
    assert len(rules) > 30
    known = [*(expected for _, expected in ALL_WRONG), *YAML_WRONG.values(), *WORLD_SIZE_MESSAGES]
    missing = [words for words in rules if not any(all(word in message for word in words) for message in known)]
    assert missing in ([], [["fit the schema"]]), "the last one guards against what omegaconf's merge lets through"


YAML_WRONG = {
    "- a\n- b\n": "must hold a mapping of sections; got list. Repair the file.",
    "train: [1\n": "must be a readable YAML file; got ParserError. Repair the file.",
    "train: 3\n": "must be a section with keys of its own; got 3.",
    "train:\n  lr: 3\n": "train.lr (own.yaml) must be a known key; got an unknown one. Did you mean `train.learning_rate`?",
    "1: 2\n": "1 (own.yaml) must be a known key",
    "run: {folder: null}\n": "must be a text; got None.",
    "train: {num_steps: 1e3}\n": "must be an integer; got 1000.0.",
    "model: 3\n": "model (own.yaml) must be a section with keys of its own; got 3.",
    "model: {name: nequip}\n": f"model.name (own.yaml) must be one of {ALL_MODELS}; got 'nequip'.",
    "model: {name: so3lr, non_local: true}\n": "model.non_local (own.yaml) must be an option of model.name=so3lr; got an option of",
}


@pytest.mark.parametrize(("text", "expected"), YAML_WRONG.items())
def test_mistakes_in_a_file_name_the_file(tmp_path, text, expected):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    message = get_message([f"run={path}"])
    assert expected in message
    assert "own.yaml" in message


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_bytes(b"\xff\xfe\x00run")
    with pytest.raises((ConfigError, UnicodeDecodeError)):
        load_config([f"run={path}"])


@pytest.mark.parametrize("source", ["file", "command line"])
def test_no_secret_of_the_environment_gets_into_a_config(tmp_path, monkeypatch, source):
    monkeypatch.setenv("SECRET_KEY_FOR_TEST", "hunter2")
    path = tmp_path / "own.yaml"
    path.write_text("run: {name: '${oc.env:SECRET_KEY_FOR_TEST}'}\n")
    arguments = [f"run={path}"] if source == "file" else ["run.name=${oc.env:SECRET_KEY_FOR_TEST}"]
    message = get_message(arguments)
    assert "must be a plain value" in message
    assert "hunter2" not in message


def test_yaml_means_what_people_write(tmp_path):
    """PyYAML follows YAML 1.1, where `off` and `no` are false and `1e-3` is a text."""
    assert load_config(["metrics.wandb=off"]).metrics.wandb == "off"
    path = tmp_path / "own.yaml"
    path.write_text("metrics: {wandb: off}\nrun: {name: no}\ntrain: {learning_rate: 1e-3, proof: False}\n")
    loaded = load_config([f"run={path}"])
    assert (loaded.metrics.wandb, loaded.run.name) == ("off", "no")
    assert (loaded.train.learning_rate, loaded.train.proof) == (1e-3, False)


def test_the_suggested_width_is_one_that_works():
    message = get_message(["model.num_features=64", "model.degrees=[1,2,3]"])
    suggestion = int(message.rsplit("Take ", 1)[1].rstrip("."))
    assert load_config([f"model.num_features={suggestion}", "model.degrees=[1,2,3]"]).model.num_features == suggestion


WORLD_SIZE_MESSAGES = (
    "be a multiple of the number of processes (3)", "divide data.lanes / processes (2)",
    "be float32, tf32 or bf16-mixed with several processes (2)",
)  # fmt: skip


def test_processes_must_divide_the_lanes():
    settings = load_config(["data.lanes=8", "train.micro_batches=4"])
    settings.check_world_size(1)
    settings.check_world_size(2)
    with pytest.raises(
        ConfigError, match=r"data.lanes must be a multiple of the number of processes \(3\); got 8"
    ) as caught:
        settings.check_world_size(3)
    assert "Start 1, 2, 4, 8 processes, or set data.lanes=9" in str(caught.value)
    with pytest.raises(ConfigError, match=r"train.micro_batches must divide data.lanes / processes \(2\); got 4"):
        settings.check_world_size(4)


def test_float64_is_for_one_process():
    settings = load_config(["train.precision=float64", "train.zero_stage=0"])
    settings.check_world_size(1)
    message = (
        r"train.precision must be float32, tf32 or bf16-mixed with several processes \(2\); got float64. Start a single"
    )
    with pytest.raises(ConfigError, match=message):
        settings.check_world_size(2)


# ------------------------------------------------------------------------------------------------------ how it is put together


def test_merge_order_is_schema_base_overlays_command_line(own_configs):
    (own_configs / "base.yaml").write_text("train: {num_steps: 1001, log_every: 1001, save_every: 1001}\n")
    (own_configs / "run/r.yaml").write_text("train: {log_every: 1002, save_every: 1002, validate_every: 1002}\n")
    (own_configs / "model/m.yaml").write_text("train: {save_every: 1003, validate_every: 1003}\n")
    # The groups have an order of their own; where the overlay stands on the command line does not matter.
    for arguments in (["run=r", "model=m"], ["model=m", "run=r"]):
        train = load_config([*arguments, "train.validate_every=1004"]).train
        assert train.num_steps == 1001
        assert train.log_every == 1002
        assert train.save_every == 1003
        assert train.validate_every == 1004
        assert train.warmup_steps == 200


def test_the_last_value_on_the_command_line_wins():
    assert load_config(["train.num_steps=5000", "train.num_steps=6000"]).train.num_steps == 6000


def test_base_is_optional(own_configs):
    assert load_config([]) == RunConfig()
    assert own_configs.is_dir()


def test_an_overlay_can_be_any_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("run: {name: mine}\nmodel: {degrees: [1, 2], cutoff: 4}\n")
    loaded = load_config([f"run={path}"])
    assert loaded.run.name == "mine"
    assert loaded.model.degrees == (1, 2)
    assert loaded.model.cutoff == 4.0


def test_an_empty_file_changes_nothing(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing yet\n")
    assert load_config([f"data={path}"]) == load_config([])


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("train.learning_rate=1e-3", 1e-3), ("train.learning_rate=2", 2.0), ("train.num_steps=1_000", 1000),
        ("train.offload_optimizer=true", True), ("model.degrees=[1, 2]", (1, 2)), ("run.name=007", "007"),
        ("run.name=yes", "yes"), ("run.folder=a=b", "a=b"), ("run.folder=/tmp/with space", "/tmp/with space"),
        ("data.verify=size", "size"), ("data.folders=[a, 7]", ("a", "7")), ("data.weights=[]", ()), ("data.cache=~/x", "~/x"),
    ],
)  # fmt: skip
def test_values_are_read_as_what_the_key_wants(argument, expected):
    section, name = argument.partition("=")[0].split(".")
    value = getattr(getattr(load_config([argument]), section), name)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_config_of_the_project_is_valid(overlay):
    load_config([overlay])


def test_all_groups_have_configs():
    assert {o.partition("=")[0] for o in OVERLAYS} == set(config.GROUPS)
    assert "run=quickstart" in OVERLAYS


def test_overlays_of_different_groups_go_together():
    groups = {g: [o for o in OVERLAYS if o.startswith(g)] for g in ("model", "data", "cluster")}
    for model in groups["model"]:
        for data in groups["data"]:
            for cluster in groups["cluster"]:
                load_config([model, data, cluster])


def test_quickstart_runs_on_one_and_on_two_processes():
    for world_size in (1, 2):
        load_config(["run=quickstart"]).check_world_size(world_size)


# ---------------------------------------------------------------------------------------------------- what it is afterwards


def test_nothing_can_be_changed_afterwards():
    loaded = load_config([])
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.train = loaded.train
    for name in SECTIONS:
        section = getattr(loaded, name)
        field = dataclasses.fields(section)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(section, field, getattr(section, field))
    assert isinstance(loaded.model.degrees, tuple)
    hash(loaded)


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["run=quickstart"], ["model=euclidean_transformer", "cluster=gpu", "run.name=Ångström"],
        *([f"model.name={name}", "model.num_layers=2"] for name in MODEL_SECTIONS),
        ["model.name=geomatt", "model.orders=[2,5]", "model.order_gains=[1,2.5]"],
        ["data.folders=[a,Ångström]", "data.weights=[0.25,0.75]", "data.on_damage=skip", "data.max_skipped=9", "data.rebase=true"],
    ],
)  # fmt: skip
def test_what_is_dumped_can_be_read_back(tmp_path, arguments):
    loaded = load_config(arguments)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(loaded), encoding="utf-8")
    assert read_config(path) == loaded
    assert parse_config(to_plain(loaded), "here") == loaded
    assert dump_config(read_config(path)) == dump_config(loaded)


def test_a_stored_config_is_checked_like_any_other(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(load_config([])).replace("num_layers: 3", "num_layers: 0"))
    with pytest.raises(ConfigError, match=r"model.num_layers must be greater than zero; got 0"):
        read_config(path)
    with pytest.raises(ConfigError, match=r"train.lr \(there\) must be a known key"):
        parse_config({"train": {"lr": 1.0}}, "there")


def test_sections_check_themselves_without_a_file():
    with pytest.raises(ConfigError, match=r"model.cutoff must be a finite number"):
        config.EuclideanTransformerSection(cutoff=math.inf)


def test_run_folder():
    assert load_config([]).folder == Path("runs/run")
    assert load_config(["run.name=a"]).folder == Path("runs/a")
    assert load_config(["run.name=a", "run.folder=/b"]).folder == Path("/b")


def test_threads_share_the_cores():
    assert count_threads(0, 2, 8) == 4
    assert count_threads(0, 16, 8) == 1
    assert count_threads(0, 1) == len(os.sched_getaffinity(0))
    assert count_threads(load_config(["run.threads=3"]).run.threads, 2, 8) == 3
