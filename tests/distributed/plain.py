"""Training without DeepSpeed and without processes: the definition that the engine is measured by."""

import torch

from so3krates_dist.config import RunConfig
from so3krates_dist.distributed import seed_everything
from so3krates_dist.graph import GraphBatch
from so3krates_dist.model.potential import ModelStatistics
from so3krates_dist.model.registry import build_model
from so3krates_dist.train.optim import compute_learning_rate


class PlainTraining:
    """AdamW on whole global batches.

    Args:
        config: Of the run.
        statistics: That its model is built with.
    """

    def __init__(self, config: RunConfig, statistics: ModelStatistics) -> None:
        self.section = config.train
        seed_everything(config.run.seed)
        self.scale = statistics.energy_scale
        self.potential = build_model(config.model, statistics).train()
        named = dict(self.potential.named_parameters())
        decayed = {n for n, p in named.items() if n.endswith("weight") and p.dim() > 1 and "embedding" not in n}
        matrices, others = ([p for n, p in named.items() if (n in decayed) == choice] for choice in (True, False))
        groups = [
            {"params": matrices, "weight_decay": self.section.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        betas = (self.section.adam_beta1, self.section.adam_beta2)
        self.optimizer = torch.optim.AdamW(groups, betas=betas, fused=False, foreach=False)
        self._least = {name: torch.full_like(weight, torch.inf) for name, weight in named.items()}

    def step(self, step: int, batch: GraphBatch) -> tuple[float, float]:
        """Train on the whole global batch; return the loss and the norm of its gradient."""
        outputs = self.potential(batch)
        energies = (outputs["energy"] - batch.energy) / batch.num_atoms / self.scale
        forces = (outputs["forces"] - batch.forces) / self.scale
        weights = self.section.energy_weight, self.section.forces_weight
        loss = weights[0] * energies.square().mean().float() + weights[1] * forces.square().mean()
        if self.section.dipole_weight:
            loss = loss + self.section.dipole_weight * self._compare_dipoles(outputs["dipole"], batch)
        if self.section.hirshfeld_weight:
            errors = outputs["hirshfeld_ratios"] - batch.hirshfeld_ratios
            loss = loss + self.section.hirshfeld_weight * errors.square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self._remember_gradients()
        limit = self.section.gradient_clipping or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.potential.parameters(), limit)
        for group in self.optimizer.param_groups:
            group["lr"] = compute_learning_rate(step, self.section)
        self.optimizer.step()
        return float(loss.detach()), float(norm)

    def _compare_dipoles(self, dipoles: torch.Tensor, batch: GraphBatch) -> torch.Tensor:
        """Return the mean squared error, with the origin of each at its centre of mass."""
        errors = []
        for number, label in enumerate(batch.dipole):
            atoms = batch.graph_index == number
            masses = torch.tensor([{10: 20.1797, 18: 39.948}[int(z)] for z in batch.atomic_numbers[atoms]])
            centre = masses @ batch.positions[atoms] / masses.sum()
            errors.append(dipoles[number] - batch.total_charge[number] * centre - label)
        return torch.stack(errors).square().mean()

    def _remember_gradients(self) -> None:
        gradients = {n: p.grad.abs() for n, p in self.potential.named_parameters() if p.grad is not None}
        largest = max(float(g.max()) for g in gradients.values())
        for name, gradient in gradients.items():
            relative = torch.where(gradient > 0, gradient / largest, torch.inf)
            self._least[name] = torch.minimum(self._least[name], relative)

    def find_sound(self) -> dict[str, torch.Tensor]:
        """Return which weights had a gradient, and never one that was next to nothing but rounding.

        AdamW divides each gradient by its own size, so a weight whose gradient vanishes (the bias of the charges, which are made to
        add up) walks by what is left of it.
        """
        return {f"weight.{name}": (least > 1e-6) & least.isfinite() for name, least in self._least.items()}

    def weights(self) -> dict[str, torch.Tensor]:
        return {f"weight.{n}": p.detach().clone() for n, p in self.potential.named_parameters()}

    def moments(self) -> dict[str, torch.Tensor]:
        """Return AdamW's mean of the gradients; zero for weights that had none."""
        states = self.optimizer.state
        means = {n: states[p].get("exp_avg") for n, p in self.potential.named_parameters()}
        named = dict(self.potential.named_parameters())
        return {f"exp_avg.{n}": torch.zeros_like(named[n]) if m is None else m.clone() for n, m in means.items()}
