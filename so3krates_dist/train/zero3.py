"""ZeRO 3: each process keeps a part of every weight, which is put together where it is used. The only door to DeepSpeed's insides.

DeepSpeed's own hooks gather weights for a forward pass and once more for a backward pass. Forces are a backward pass inside the
forward pass, so the backward pass of the loss finds weights that have been taken apart again, and stops. Here its hooks on modules
are taken off, and weights are put together where they are needed:

- a module that owns weights has them while its `forward` runs, also where that is run again for a checkpoint;
- what autograd keeps of a weight is only a note of which weight, and which view of it; asked for it, autograd gets the weight put
  together again. This holds for the first derivative and for what the first derivative keeps for the second;
- a gradient is added to a weight that only has the right shape, and is taken up by DeepSpeed at once.

Putting together is done by all processes at once, so their passes have to use weights in the same order: models use all of their
weights in every pass, whatever the batch holds (an empty batch too). DeepSpeed's partition of weights, gradients and optimizer, its
sums of gradients and its step are used as they are.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any, Final

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from so3krates_dist.errors import ConfigError

PROVED_VERSIONS: Final = ("0.19.8",)
"""of DeepSpeed, with which tests/distributed have passed"""


def check_zero3(installed: str | None = None) -> None:
    """Raise `ConfigError` where another version of DeepSpeed is installed than those whose insides are known.

    Args:
        installed: The version; None looks it up.
    """
    found = installed or version("deepspeed")
    if found not in PROVED_VERSIONS:
        known = " or ".join(PROVED_VERSIONS)
        raise ConfigError(
            "train.zero_stage", f"be 0, 1 or 2 with another DeepSpeed than {known}, whose insides ZeRO 3 depends on",
            f"3 with DeepSpeed {found}", f'Set train.zero_stage=2, or install "deepspeed=={PROVED_VERSIONS[-1]}"',
        )  # fmt: skip


LEAST_PIECE = 1 << 22
"""Numbers that are worth an exchange of their own, 16 MB"""


def find_piece(weights: Sequence[int]) -> int:
    """Return how many numbers are put together at a time, and how many of gradients are collected before they are exchanged.

    No fewer than the largest tensor has, and than `LEAST_PIECE`, which takes hardly longer than a single number: smaller ones made
    steps of the quickstart on two processes 1.5 times as long. A sixteenth of all is little beside what a process holds anyway,
    and keeps the exchanges of a step few. All processes fill their buckets in the same order, whatever their batches hold: each
    weight is used in all of them, and autograd goes back through operations in the order in which they were done.

    Args:
        weights: Numbers in each tensor of weights.
    """
    total = sum(weights)
    return min(total, max(*weights, -(-total // 16), LEAST_PIECE))


def build_zero3_options() -> dict[str, Any]:
    """Return what DeepSpeed is told beside the stage.

    By default it leaves weights of up to 100,000 numbers whole, which is all of them in models like these; it replaces
    `torch.nn.functional.linear` in the whole process by a function of its own; and it gathers weights ahead of their use, by hooks
    that are taken off here.
    """
    return {
        "stage3_param_persistence_threshold": 0,
        "memory_efficient_linear": False,
        "stage3_prefetch_bucket_size": 0,
    }


@dataclasses.dataclass(frozen=True, slots=True)
class _Note:
    """What autograd keeps instead of a weight or a view of one."""

    weight: nn.Parameter
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    """in numbers, from the weight's first"""


class _Storages:
    """Which memory belongs to which weight, of those that have been put together and are still in use somewhere."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[StorageWeakRef, dict[int, nn.Parameter]]] = {}

    def add(self, weight: nn.Parameter) -> None:
        """Remember the memory of a weight that is whole now; a single process has all of them in one piece."""
        storage = weight.data.untyped_storage()
        if storage._cdata not in self._known:
            self._known[storage._cdata] = StorageWeakRef(storage), {}  # type: ignore[no-untyped-call] # torch's
        self._known[storage._cdata][1][int(weight.data.storage_offset())] = weight

    def describe(self, tensor: torch.Tensor) -> _Note | None:
        """Return a note of a tensor that is a weight or a view of one; None for any other."""
        known = self._known.get(tensor.untyped_storage()._cdata) if tensor.numel() else None
        for start, weight in known[1].items() if known else ():
            offset = int(tensor.storage_offset()) - start
            if 0 <= offset < weight.ds_numel and tensor.dtype == weight.dtype:  # type: ignore[attr-defined] # DeepSpeed's
                return _Note(weight, tensor.size(), tensor.stride(), offset)
        return None

    def forget(self) -> None:
        """Forget what is not in use any more."""
        self._known = {key: entry for key, entry in self._known.items() if not _is_gone(entry[0])}


def _is_gone(reference: StorageWeakRef) -> bool:
    return bool(reference.expired())  # type: ignore[no-untyped-call] # torch's


def _group(weights: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return consecutive groups of no more numbers than `find_piece` allows."""
    sizes = [int(w.ds_numel) for w in weights]  # type: ignore[attr-defined] # DeepSpeed's
    limit, held = find_piece(sizes), 0
    groups: list[list[nn.Parameter]] = [[]]
    for weight, size in zip(weights, sizes, strict=True):
        if held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(weight)
        held += size
    return groups


class PartitionedWeights:
    """The weights of a model at ZeRO 3, and the parts of them, of their gradients and of the optimizer that this process has.

    Args:
        model: Wrapped by DeepSpeed already.
        optimizer: DeepSpeed's, of stage 3.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self._model, self._optimizer = model, optimizer
        self._weights: list[nn.Parameter] = list(model.parameters())
        self._groups = _group(self._weights)
        self._storages = _Storages()
        self._shapes = {
            w: torch.zeros((), dtype=w.dtype, device=w.device).expand(w.ds_shape)  # type: ignore[attr-defined] # DeepSpeed's
            for w in self._weights
        }
        optimizer.parameter_offload._remove_module_hooks()
        for module in model.modules():
            if next(module.parameters(recurse=False), None) is not None:
                module.register_forward_pre_hook(self._before_module)
                module.register_forward_hook(self._after_module, always_call=True)
        for weight in self._weights:
            weight.register_hook(self._make_shape_hook(weight))  # type: ignore[no-untyped-call] # torch's
            # After DeepSpeed's, which was there before.
            weight.register_post_accumulate_grad_hook(self._after_gradient)  # type: ignore[no-untyped-call] # torch's

    # --------------------------------------------------------------------------------------------------------- together

    def _gather(self, weights: list[nn.Parameter]) -> None:
        missing = [w for w in weights if not self._has(w)]
        if missing:
            missing[0].all_gather(missing)  # type: ignore[attr-defined] # DeepSpeed's
            for weight in missing:
                self._storages.add(weight)

    def _scatter(self, weights: list[nn.Parameter]) -> None:
        present = [w for w in weights if self._has(w)]
        if present:
            present[0].partition(present)  # type: ignore[attr-defined] # DeepSpeed's

    @staticmethod
    def _has(weight: nn.Parameter) -> bool:
        return weight.ds_status.name == "AVAILABLE"  # type: ignore[attr-defined, no-any-return] # DeepSpeed's

    def _before_module(self, module: nn.Module, inputs: Any) -> None:
        self._gather(list(module.parameters(recurse=False)))

    def _after_module(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        self._scatter(list(module.parameters(recurse=False)))

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Do a forward or a backward pass of the model inside."""
        # A weight that is used outside its own module is gathered by DeepSpeed's dictionaries of weights, as long as this is set.
        self._gather_when_used(True)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self._gather_when_used(False)
            self._scatter(self._weights)
            self._storages.forget()

    def _gather_when_used(self, choice: bool) -> None:
        for module in self._model.modules():
            module._parameters._in_forward = choice  # type: ignore[attr-defined] # DeepSpeed's

    def lend(self) -> Iterator[list[torch.Tensor]]:
        """Lend all weights, whole, in groups of `find_piece` numbers at most, each until the next; all processes must do it."""
        for group in self._groups:
            self._gather(group)
            lent = [w.detach() for w in group]
            try:
                yield lent
            finally:
                lent.clear()  # or the borrower's list would keep them while the next are put together
                self._scatter(group)
                self._storages.forget()

    def _pack(self, tensor: torch.Tensor) -> Any:
        if hasattr(tensor, "ds_id") and self._has(tensor):  # type: ignore[arg-type] # a weight, as it has been asked
            self._storages.add(tensor)  # type: ignore[arg-type] # DeepSpeed may have gathered it
        return self._storages.describe(tensor) or tensor

    def _unpack(self, kept: Any) -> torch.Tensor:
        if not isinstance(kept, _Note):
            return kept  # type: ignore[no-any-return] # a tensor: all but notes
        was_there = self._has(kept.weight)
        self._gather([kept.weight])
        whole = kept.weight.data
        if not was_there:
            self._scatter([kept.weight])
        return whole.as_strided(kept.size, kept.stride, whole.storage_offset() + kept.offset)

    # -------------------------------------------------------------------------------------------------------- gradients

    def _make_shape_hook(self, weight: nn.Parameter) -> Callable[[torch.Tensor], None]:
        def give_shape(gradient: torch.Tensor) -> None:
            if not self._has(weight):
                weight.data = self._shapes[weight]

        return give_shape

    def _after_gradient(self, weight: nn.Parameter) -> None:
        if not self._has(weight):
            weight.data = torch.empty(0, dtype=weight.dtype, device=weight.device)

    def clear_gradients(self) -> None:
        """Forget the sums of gradients.

        DeepSpeed overwrites them in the first pass of the next step, but not those of weights that have no gradient in it.
        """
        self._optimizer.grad_partitions_flat_buffer.zero_()
        self._optimizer.averaged_gradients = {}
        self._optimizer._offload_boundary_param_ids.clear()
        self._optimizer.reset_cpu_buffers()

    # ------------------------------------------------------------------------------------------------------------ state

    @property
    def flat_weights(self) -> list[torch.Tensor]:
        """What the optimizer steps: this process's parts of the weights, one tensor for each group."""
        return self._optimizer.fp32_partitioned_groups_flat  # type: ignore[no-any-return] # DeepSpeed's

    def get(self, weight: nn.Parameter, kind: str) -> torch.Tensor:
        """Return a whole weight or moment; all processes must call it.

        Args:
            weight: Which.
            kind: `weight` or the name of a moment.
        """
        return self._optimizer.get_full_hp_param(weight, None if kind == "weight" else kind)  # type: ignore[no-any-return]

    @torch.no_grad()
    def set(self, weight: nn.Parameter, kind: str, value: torch.Tensor) -> None:
        """Put this process's part of a whole weight or moment in its place.

        Args:
            weight: Which.
            kind: `weight` or the name of a moment.
            value: Of the weight's shape.
        """
        part, _ = self._optimizer._get_fp32_opt_state_partition(weight, False, None if kind == "weight" else kind)
        start = part.numel() * self._optimizer._get_param_partition_rank(weight)
        own = value.flatten()[
            start : start + part.numel()
        ]  # parts are of equal size; the last ones may be longer than what is left
        part[: own.numel()].copy_(own)
        if kind == "weight":
            weight.ds_tensor[: own.numel()].copy_(own)  # type: ignore[attr-defined] # DeepSpeed's
