"""The section `train`: what is learned, by which steps, with what arithmetic, and what happens when something goes wrong."""

import dataclasses
from typing import Final, Literal

from so3krates_dist.config.checks import check, check_numbers

LOSS_WEIGHTS: Final = {
    "energy": "energy_weight",
    "forces": "forces_weight",
    "stress": "stress_weight",
    "dipole": "dipole_weight",
    "partial_charges": "charges_weight",
    "hirshfeld_ratios": "hirshfeld_weight",
}
"""Key of the section `train` that weighs the errors of each label"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _LossKeys:
    """What is compared, and how much it counts."""

    energy_weight: float = 1.0
    """weight of the error of the energy per atom, in units of the force RMS times 1 Å"""
    forces_weight: float = 1.0
    """weight of the error of the forces, in units of the force RMS"""
    stress_weight: float = 0.0
    """weight of the mean squared stress error, in (eV/Å³)^-2; 0: stress is not trained"""
    dipole_weight: float = 0.0
    """weight of the mean squared error of the dipole's components, in (e Å)^-2; 0: dipoles are not trained"""
    charges_weight: float = 0.0
    """weight of the mean squared error of the atoms' partial charges, in e^-2; 0: they are not trained"""
    hirshfeld_weight: float = 0.0
    """weight of the mean squared error of the Hirshfeld ratios, which have no unit; 0: they are not trained"""
    energy_loss: Literal["mse", "huber", "mae"] = "mse"
    """error of the energy per atom: squared, squared up to train.huber_delta and linear beyond, or absolute"""
    forces_loss: Literal["mse", "huber", "l2"] = "mse"
    """error of the forces: of components, squared, or squared up to train.huber_delta and linear beyond; l2: length of the error"""
    huber_delta: float = 1.0
    """where the Huber loss becomes linear: error over the RMS of the forces (of the energy per atom: over this times 1 Å)"""
    weights_from: int = 0
    """step at which weights begin to move to their final values"""
    weights_until: int = 0
    """step at which they have them; 0: weights stay as they are"""
    final_energy_weight: float = -1.0
    """train.energy_weight from train.weights_until on; -1: as before"""
    final_forces_weight: float = -1.0
    """train.forces_weight from train.weights_until on; -1: as before"""
    final_stress_weight: float = -1.0
    """train.stress_weight from train.weights_until on; -1: as before"""

    def final_weight(self, label: str) -> float:
        """Return the weight of a label's errors from `weights_until` on."""
        now: float = getattr(self, LOSS_WEIGHTS[label])
        final: float = getattr(self, f"final_{LOSS_WEIGHTS[label]}", -1.0)
        return now if final < 0 or not self.weights_until else final

    def trains(self, label: str) -> bool:
        """Whether the errors of a label count in some step."""
        return getattr(self, LOSS_WEIGHTS[label]) > 0 or self.final_weight(label) > 0

    def _check_loss(self) -> None:
        names = ("final_energy_weight", "final_forces_weight", "final_stress_weight")
        for name in names:
            value = getattr(self, name)
            check(value == -1 or value >= 0, f"train.{name}", "be zero or greater, or -1", value)
            check(
                value == -1 or self.weights_until > 0, f"train.{name}", "be -1 without train.weights_until", value,
                "Set train.weights_until to the step at which it is reached",
            )  # fmt: skip
        until, begin = self.weights_until, self.weights_from
        check(
            until > begin or not (until or begin), "train.weights_until", f"be greater than train.weights_from ({begin})",
            until,
        )  # fmt: skip
        check(
            not until or any(getattr(self, n) != -1 for n in names), "train.weights_until",
            "be 0 without a final weight", until, "Set train.final_energy_weight or the like",
        )  # fmt: skip
        for prefix, weights in (
            ("", [getattr(self, key) for key in LOSS_WEIGHTS.values()]),
            ("final_", [self.final_weight(label) for label in LOSS_WEIGHTS]),
        ):
            check(
                any(weights), f"train.{prefix}forces_weight", "be greater than zero where the other weights are zero", 0.0,
            )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OptimizerKeys:
    """How the weights move."""

    num_steps: int = 10_000
    """optimizer steps of the whole run; the learning rate ends its decay here"""
    optimizer: Literal["adamw", "amsgrad"] = "adamw"
    """AdamW, or its variant AMSGrad whose squared gradients never shrink (SO3LR's)"""
    learning_rate: float = 2e-3
    """largest learning rate, reached after the warm-up"""
    final_learning_rate: float = 1e-6
    """learning rate at the end of the decay; with schedule=plateau the lowest"""
    schedule: Literal["cosine", "exponential", "plateau", "constant"] = "cosine"
    """after the warm-up: half a cosine, or a constant factor per step, down to train.final_learning_rate; plateau: times
    train.plateau_factor when the held-out error has not improved; constant"""
    plateau_factor: float = 0.5
    """of the learning rate at a plateau"""
    plateau_patience: int = 5
    """evaluations in a row without improvement that make a plateau"""
    warmup_steps: int = 200
    """steps in which the learning rate rises linearly from zero"""
    layer_decay: float = 1.0
    """learning rate of each layer over that of the next one; below 1 the layers near the input learn more slowly"""
    weight_decay: float = 0.0
    """decoupled weight decay (AdamW) of weight matrices; biases, norms and embeddings have none"""
    adam_beta1: float = 0.9
    """decay of the optimizer's mean of gradients"""
    adam_beta2: float = 0.99
    """decay of the optimizer's mean of squared gradients"""
    adam_epsilon: float = 1e-8
    """added to the root of the mean squared gradient"""
    gradient_clipping: float = 0.5
    """largest norm of the gradient of all weights; 0: not clipped"""
    ema_decay: float = 0.999
    """decay of the exponential mean of the weights, which is what is evaluated and exported; 0: the weights themselves"""

    def _check_optimizer(self) -> None:
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            check(0 <= getattr(self, name) < 1, f"train.{name}", "be at least 0 and less than 1", getattr(self, name))
        check(self.layer_decay <= 1, "train.layer_decay", "be at most 1", self.layer_decay)
        check(self.plateau_factor < 1, "train.plateau_factor", "be less than 1", self.plateau_factor)
        check(
            self.warmup_steps < self.num_steps, "train.warmup_steps", f"be less than train.num_steps ({self.num_steps})",
            self.warmup_steps,
        )  # fmt: skip
        least = self.final_learning_rate
        rule = f"be at most train.learning_rate ({self.learning_rate})"
        check(least <= self.learning_rate, "train.final_learning_rate", rule, least)
        check(
            least > 0 or self.schedule != "exponential", "train.final_learning_rate",
            "be greater than zero with train.schedule=exponential", least,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class _EngineKeys:
    """Where and with what arithmetic it is computed, and what is kept in memory."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute; auto: a GPU where there is one"""
    precision: Literal["float32", "tf32", "bf16-mixed", "float64"] = "float32"
    """arithmetic; tf32: matrix products of a GPU with 10 bits; bf16-mixed: products in attention with 7 bits, all else float32;
    float64: one process without ZeRO"""
    proof: bool = True
    """compare forces with float64 on a fixed batch, and look at net force and rotations, at the start and at each evaluation"""
    zero_stage: int = 1
    """DeepSpeed's ZeRO: processes share 1: the optimizer's state, 2: gradients too, 3: weights too; 0: nothing"""
    offload_optimizer: bool = False
    """keep the optimizer's state in the memory of the CPU, and take its steps there; needs ZeRO"""
    self_check: bool = True
    """take one step on a few conformers before training, and compare it with plain torch"""
    micro_batches: int = 1
    """portions that a process does one after another per step, to save memory; divides data.lanes / processes"""
    activation_checkpointing: Literal["none", "blocks", "low_memory"] = "none"
    """compute layers again in the backward pass instead of keeping their values; exact; low_memory: also without a second
    derivative; bytes and times are in tests/benchmarks/memory.md"""

    def _check_engine(self) -> None:
        check(self.zero_stage in (0, 1, 2, 3), "train.zero_stage", "be 0, 1, 2 or 3", self.zero_stage)
        check(
            not self.offload_optimizer or self.zero_stage > 0, "train.offload_optimizer", "be false with train.zero_stage=0",
            True, "Set train.zero_stage=1 or higher",
        )  # fmt: skip
        check(
            self.precision != "float64" or self.zero_stage == 0, "train.zero_stage", "be 0 with train.precision=float64",
            self.zero_stage, "Set it to 0: DeepSpeed's ZeRO keeps weights in float32",
        )  # fmt: skip
        check(
            self.precision != "tf32" or self.device != "cpu", "train.precision",
            "be float32, bf16-mixed or float64 with train.device=cpu", self.precision,
        )  # fmt: skip
        check(
            self.activation_checkpointing != "low_memory" or self.zero_stage < 3, "train.activation_checkpointing",
            "be none or blocks with train.zero_stage=3", self.activation_checkpointing,
            "Weights that are gathered on the way have no forward derivative; take ZeRO 2",
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class _GuardKeys:
    """When the run looks at itself, and what it does where something is wrong."""

    log_every: int = 50
    """steps between lines of the log"""
    validate_every: int = 500
    """steps between evaluations on the validation split"""
    save_every: int = 500
    """steps between checkpoints"""
    async_save: bool = True
    """go on training while a checkpoint is written"""
    stop_at: int = 0
    """save and stop after this many steps, with exit code 0; the same command without it goes on; 0: run to the end"""
    keep_checkpoints: int = 2
    """checkpoints kept, at least 2: the newest may be damaged"""
    max_skipped_steps: int = 10
    """steps in a row that may be skipped (loss or gradient not finite, or a spike) before the run goes back to a checkpoint"""
    spike_factor: float = 0.0
    """skip a step whose loss is above the median of the last ones by more than so many times their spread, by logarithms; 0: none;
    8 never fired in healthy runs (tests/benchmarks/spikes.md)"""
    spike_window: int = 200
    """steps whose losses tell what is usual"""
    max_rollbacks: int = 2
    """how often the run may go back to its newest checkpoint, past the data that spoiled it, before it stops"""
    keep_skipped: int = 3
    """skipped steps that are kept in the run folder, for `so3krates replay`"""

    def _check_guard(self) -> None:
        check(self.keep_checkpoints >= 2, "train.keep_checkpoints", "be at least 2", self.keep_checkpoints)
        check(self.spike_window >= 20, "train.spike_window", "be at least 20", self.spike_window)

    def _check_spikes(self, weights_until: int) -> None:
        """Refuse to look for spikes of a loss whose terms change their weights: it would jump, and all later steps be skipped."""
        check(
            not (self.spike_factor and weights_until), "train.spike_factor", "be 0 with train.weights_until",
            self.spike_factor, "A loss whose weights change rises without a spike",
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSection(_GuardKeys, _EngineKeys, _LossKeys, _OptimizerKeys):
    """How the weights are learned."""

    def __post_init__(self) -> None:
        """Check the values."""
        check_numbers(
            self,
            "train",
            positive=(
                "num_steps", "learning_rate", "micro_batches", "log_every", "validate_every", "save_every", "layer_decay",
                "adam_epsilon", "huber_delta", "plateau_factor", "plateau_patience",
            ),
            at_least_zero=(
                "final_learning_rate", "warmup_steps", "weight_decay", "gradient_clipping", "energy_weight",
                "forces_weight", "stress_weight", "dipole_weight", "charges_weight", "hirshfeld_weight", "max_skipped_steps",
                "stop_at", "spike_factor", "max_rollbacks", "keep_skipped", "weights_from", "weights_until",
            ),
        )  # fmt: skip
        self._check_optimizer()
        self._check_loss()
        self._check_engine()
        self._check_guard()
        self._check_spikes(self.weights_until)
        until, last = self.weights_until, self.num_steps
        check(until <= last, "train.weights_until", f"be at most train.num_steps ({last})", until)
