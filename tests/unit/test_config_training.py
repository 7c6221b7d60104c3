"""The section `train`: losses, optimizer, engine, guard; every mistake is refused (`test_config.py` takes this table too)."""

import math

import pytest

from so3krates_dist.config import LOSS_WEIGHTS, TrainSection, load_config, parse_config
from so3krates_dist.errors import ConfigError

WEIGHTS = (*LOSS_WEIGHTS.values(), "final_energy_weight", "final_forces_weight", "final_stress_weight")

WRONG_TRAINING = [
    # numbers that are none, or out of range
    *((f"train.{name}=nan", f"train.{name} must be a finite number; got nan.") for name in WEIGHTS),
    *((f"train.{name}=.inf", f"train.{name} must be a finite number; got inf.") for name in WEIGHTS),
    *((f"train.{name}=-2", f"train.{name} must be zero or greater") for name in WEIGHTS),
    *(
        (f"train.{name}=0", f"train.{name} must be greater than zero; got 0")
        for name in (
            "num_steps", "micro_batches", "log_every", "validate_every", "save_every", "layer_decay", "adam_epsilon", "huber_delta",
            "plateau_factor", "plateau_patience",
        )
    ),
    *(
        (f"train.{name}=-1", f"train.{name} must be zero or greater; got -1")
        for name in (
            "final_learning_rate", "warmup_steps", "gradient_clipping", "max_skipped_steps", "stop_at", "spike_factor",
            "max_rollbacks", "keep_skipped", "weights_from", "weights_until",
        )
    ),
    ("train.adam_epsilon=nan", "train.adam_epsilon must be a finite number; got nan."),
    ("train.spike_factor=.inf", "train.spike_factor must be a finite number; got inf."),
    ("train.adam_beta2=1.5", "train.adam_beta2 must be at least 0 and less than 1; got 1.5."),
    ("train.layer_decay=1.1", "train.layer_decay must be at most 1; got 1.1."),
    ("train.plateau_factor=1", "train.plateau_factor must be less than 1; got 1.0."),
    ("train.spike_window=19", "train.spike_window must be at least 20; got 19."),
    ("train.zero_stage=4", "train.zero_stage must be 0, 1, 2 or 3; got 4. Change the value."),
    ("train.zero_stage=-1", "train.zero_stage must be 0, 1, 2 or 3; got -1."),
    # choices
    ("train.optimizer=adam", "train.optimizer (command line) must be one of adamw, amsgrad; got 'adam'."),
    ("train.schedule=linear", "train.schedule (command line) must be one of cosine, exponential, plateau, constant; got 'linear'."),
    ("train.energy_loss=l2", "train.energy_loss (command line) must be one of mse, huber, mae; got 'l2'."),
    ("train.forces_loss=mae", "train.forces_loss (command line) must be one of mse, huber, l2; got 'mae'."),
    ("train.precision=fp16", "train.precision (command line) must be one of float32, tf32, bf16-mixed, float64; got 'fp16'."),
    (
        "train.activation_checkpointing=true",
        "train.activation_checkpointing (command line) must be one of none, blocks, low_memory; got True.",
    ),
    # keys of earlier versions
    (
        "train.checkpoint_attention=true",
        "train.checkpoint_attention (command line) must be a known key; got one of earlier versions. "
        "Write train.activation_checkpointing=blocks for true.",
    ),
    (
        "model.precision=bf16",
        "model.precision (command line) must be a known key; got one of earlier versions. Write train.precision=bf16-mixed",
    ),
    ("model.name=so3lr model.precision=bf16", "got one of earlier versions. Write train.precision=bf16-mixed for bf16."),
    # weights that move
    ("train.final_stress_weight=-0.5", "train.final_stress_weight must be zero or greater, or -1; got -0.5."),
    (
        "train.final_energy_weight=1",
        "train.final_energy_weight must be -1 without train.weights_until; got 1.0. Set train.weights_until to the step at",
    ),
    (
        "train.weights_until=10",
        "train.weights_until must be 0 without a final weight; got 10. Set train.final_energy_weight or the like.",
    ),
    (
        "train.weights_from=10 train.weights_until=10 train.final_energy_weight=1",
        "train.weights_until must be greater than train.weights_from (10); got 10.",
    ),
    ("train.weights_from=10", "train.weights_until must be greater than train.weights_from (10); got 0."),
    (
        "train.num_steps=1000 train.weights_until=1001 train.final_energy_weight=1",
        "train.weights_until must be at most train.num_steps (1000); got 1001.",
    ),
    (
        "train.energy_weight=0 train.forces_weight=0 train.weights_until=9 train.final_forces_weight=1",
        "train.forces_weight must be greater than zero where the other weights are zero; got 0.0.",
    ),
    (
        "train.energy_weight=0 train.weights_until=9 train.final_forces_weight=0",
        "train.final_forces_weight must be greater than zero where the other weights are zero; got 0.0.",
    ),
    (
        "train.charges_weight=1",
        "train.charges_weight must be 0 where model.name=euclidean_transformer has no output `partial_charges`; got 1.0.",
    ),
    # what does not go together
    (
        "train.spike_factor=8 train.weights_until=9 train.final_energy_weight=9",
        "train.spike_factor must be 0 with train.weights_until; got 8.0. A loss whose weights change rises without a spike.",
    ),
    (
        "train.final_learning_rate=0 train.schedule=exponential",
        "train.final_learning_rate must be greater than zero with train.schedule=exponential; got 0.0.",
    ),
    (
        "train.offload_optimizer=true train.zero_stage=0",
        "train.offload_optimizer must be false with train.zero_stage=0; got True. Set train.zero_stage=1 or higher.",
    ),
    *(
        (
            f"train.precision=float64 train.zero_stage={stage}",
            f"train.zero_stage must be 0 with train.precision=float64; got {stage}. Set it to 0: DeepSpeed's ZeRO keeps weights in",
        )
        for stage in (1, 2, 3)
    ),
    (
        "train.precision=tf32 train.device=cpu",
        "train.precision must be float32, bf16-mixed or float64 with train.device=cpu; got tf32. Change the value.",
    ),
    (
        "train.zero_stage=3 train.activation_checkpointing=low_memory",
        "train.activation_checkpointing must be none or blocks with train.zero_stage=3; got low_memory. Weights that are gathered",
    ),
    (
        "train.activation_checkpointing=low_memory model.name=geomatt",
        "train.activation_checkpointing must be none or blocks where model.name=geomatt; got low_memory.",
    ),
    (
        "train.activation_checkpointing=low_memory model.name=geomatt_envelope",
        "train.activation_checkpointing must be none or blocks where model.name=geomatt_envelope; got low_memory.",
    ),
]  # fmt: skip


def test_what_is_trained_follows_from_weights_now_and_later():
    section = TrainSection(
        energy_weight=0.0, stress_weight=2.0, weights_until=5, final_energy_weight=1.0, final_stress_weight=0.0
    )
    trained = {label: section.trains(label) for label in LOSS_WEIGHTS}
    assert trained == dict.fromkeys(LOSS_WEIGHTS, False) | {"energy": True, "forces": True, "stress": True}
    finals = {label: section.final_weight(label) for label in ("energy", "forces", "stress", "dipole")}
    assert finals == {"energy": 1.0, "forces": 1.0, "stress": 0.0, "dipole": 0.0}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("value", [math.nan, -math.inf, -2.0])
def test_a_section_that_no_file_was_read_for_checks_itself(name, value):
    with pytest.raises(ConfigError, match=rf"train.{name} must be"):
        TrainSection(**{name: value})


@pytest.mark.parametrize(
    "arguments",
    [
        ["train.precision=float64", "train.zero_stage=0"],
        ["train.precision=tf32", "train.device=cuda"],
        ["train.precision=bf16-mixed", "train.device=cpu", "train.zero_stage=3"],
        ["train.zero_stage=3", "train.offload_optimizer=true", "train.activation_checkpointing=blocks"],
        [
            "train.zero_stage=2",
            "train.activation_checkpointing=low_memory",
            "model.name=so3lr",
            "model.electrostatics=ewald",
        ],
        ["train.schedule=constant", "train.final_learning_rate=0"],
        ["train.schedule=plateau", "train.optimizer=amsgrad", "train.layer_decay=0.8"],
        ["train.forces_weight=0", "train.weights_until=10000", "train.final_forces_weight=3"],
        ["model.name=so3lr", "train.charges_weight=1", "train.forces_weight=0", "train.energy_weight=0"],
    ],
)
def test_what_goes_together_is_allowed(arguments):
    load_config(arguments)


OLD = {"model": {"name": "euclidean_transformer", "num_layers": 2}, "train": {"num_steps": 500}}


@pytest.mark.parametrize(
    ("model", "train", "precision", "mode"),
    [
        ({"precision": "bf16"}, {"checkpoint_attention": True}, "bf16-mixed", "blocks"),
        ({"precision": "float32"}, {"checkpoint_attention": False}, "float32", "none"),
        ({}, {}, "float32", "none"),
        ({"precision": "bf16"}, {"precision": "float32"}, "float32", "none"),
    ],
)
def test_what_an_earlier_version_wrote_is_read_with_the_keys_of_this_one(model, train, precision, mode):
    content = {"model": OLD["model"] | model, "train": OLD["train"] | train}
    before = {name: dict(values) for name, values in content.items()}
    section = parse_config(content, "config.yaml of old")
    assert (section.train.precision, section.train.activation_checkpointing) == (precision, mode)
    assert (section.model.num_layers, section.train.num_steps) == (2, 500)
    assert content == before, "it is the caller's"


def test_the_model_of_an_earlier_version_is_read_by_itself():
    for precision in ("float32", "bf16"):
        assert parse_config({"model": {"name": "so3lr", "precision": precision}}, "config.json").model.name == "so3lr"


@pytest.mark.parametrize("content", [{"model": 3}, {"train": None}, {"train": [1]}])
def test_a_stored_config_whose_sections_are_none_is_refused_in_one_line(content):
    with pytest.raises(ConfigError, match="must be a section with keys of its own"):
        parse_config(content, "stored")
