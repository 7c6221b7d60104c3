"""Training without DeepSpeed, processes, passes and the package's own loss: the definition that engines are measured by."""

import torch

from so3krates_dist.config import RunConfig
from so3krates_dist.distributed import seed_everything
from so3krates_dist.graph import GraphBatch
from so3krates_dist.model.potential import ModelStatistics
from so3krates_dist.model.registry import build_model
from so3krates_dist.train.optim import compute_learning_rate, scale_layers


class PlainTraining:
    """AdamW or AMSGrad on whole global batches.

    Args:
        config: Of the run.
        statistics: That its model is built with.
    """

    def __init__(self, config: RunConfig, statistics: ModelStatistics) -> None:
        self.section = config.train
        seed_everything(config.run.seed)
        self.scale = statistics.energy_scale
        self.potential = build_model(config.model, statistics).train()
        self.optimizer = self._build_optimizer()

    def _build_optimizer(self) -> torch.optim.AdamW:
        """Return one with a group for each weight, whose learning rate and decay can be read off its name."""
        scales = scale_layers([n for n, _ in self.potential.named_parameters()], self.section.layer_decay)
        tables = {f"{name}.weight" for name, m in self.potential.named_modules() if isinstance(m, torch.nn.Embedding)}
        groups = []
        for name, weight in self.potential.named_parameters():
            decays = weight.dim() > 1 and name not in tables and not name.endswith("bias")
            decay = self.section.weight_decay if decays else 0.0
            groups.append({"params": [weight], "weight_decay": decay, "scale": scales[name]})
        return torch.optim.AdamW(
            groups, betas=(self.section.adam_beta1, self.section.adam_beta2), eps=self.section.adam_epsilon,
            amsgrad=self.section.optimizer == "amsgrad", fused=False, foreach=False,
        )  # fmt: skip

    def step(self, step: int, batch: GraphBatch) -> tuple[float, float]:
        """Train on the whole global batch; return the loss and the norm of its gradient."""
        loss = self._compute_loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        for weight in self.potential.parameters():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        limit = self.section.gradient_clipping or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.potential.parameters(), limit)
        for group in self.optimizer.param_groups:
            group["lr"] = compute_learning_rate(step, self.section) * group["scale"]
        self.optimizer.step()
        return float(loss.detach()), float(norm)

    def _compute_loss(self, batch: GraphBatch) -> torch.Tensor:
        outputs = self.potential(batch, compute_stress=self.section.stress_weight > 0)
        energies = (outputs["energy"] - batch.energy) / batch.num_atoms / self.scale
        forces = (outputs["forces"] - batch.forces) / self.scale
        weights = self.section.energy_weight, self.section.forces_weight
        loss = weights[0] * energies.square().mean().float() + weights[1] * forces.square().mean()
        if self.section.stress_weight:
            errors = (outputs["stress"] - batch.stress)[~batch.stress.isnan()]
            loss = loss + self.section.stress_weight * errors.square().mean()
        if self.section.dipole_weight:
            loss = loss + self.section.dipole_weight * self._compare_dipoles(outputs["dipole"], batch)
        if self.section.hirshfeld_weight:
            errors = (outputs["hirshfeld_ratios"] - batch.hirshfeld_ratios)[~batch.hirshfeld_ratios.isnan()]
            loss = loss + self.section.hirshfeld_weight * errors.square().mean()
        return loss

    def _compare_dipoles(self, dipoles: torch.Tensor, batch: GraphBatch) -> torch.Tensor:
        """Return the mean squared error, with the origin of each at its centre of mass."""
        errors = []
        for number, label in enumerate(batch.dipole):
            if not label.isnan().any():
                atoms = batch.graph_index == number
                masses = torch.tensor([{10: 20.1797, 18: 39.948}[int(z)] for z in batch.atomic_numbers[atoms]])
                centre = masses @ batch.positions[atoms] / masses.sum()
                errors.append(dipoles[number] - batch.total_charge[number] * centre - label)
        return torch.stack(errors).square().mean()

    def get_state(self) -> dict[str, torch.Tensor]:
        """Return weights and moments under the names that engines give them."""
        state = {}
        for name, weight in self.potential.named_parameters():
            moments = self.optimizer.state[weight]
            state |= {f"weight.{name}": weight.detach().clone()}
            state |= {f"{m}.{name}": t.clone() for m, t in moments.items() if m != "step"}
        return state
