"""Weights in parts: which DeepSpeed is known, what autograd keeps. What is trained with them: tests/distributed."""

import re
from importlib.metadata import version

import pytest
import torch
from torch import nn

from so3krates_dist.errors import ConfigError
from so3krates_dist.train import zero3
from so3krates_dist.train.zero3 import PROVED_VERSIONS, _Storages, build_zero3_options, check_zero3, find_piece


def test_another_deepspeed_is_refused() -> None:
    message = (
        "train.zero_stage must be 0, 1 or 2 with another DeepSpeed than 0.19.8, whose insides ZeRO 3 depends on;"
        ' got 3 with DeepSpeed 0.20.1. Set train.zero_stage=2, or install "deepspeed==0.19.8".'
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        check_zero3("0.20.1")


def test_the_installed_deepspeed_is_looked_up() -> None:
    if version("deepspeed") in PROVED_VERSIONS:
        check_zero3()
    else:
        with pytest.raises(ConfigError, match=version("deepspeed")):
            check_zero3()


def test_small_weights_are_in_parts_too() -> None:
    options = build_zero3_options()
    assert options["stage3_param_persistence_threshold"] == 0
    assert options["memory_efficient_linear"] is False, "it would replace torch's function in the whole process"


@pytest.mark.parametrize(
    ("weights", "piece"), [([5], 5), ([1, 9, 1], 9), ([1] * 160, 10), ([1] * 161, 11), ([100] + [10] * 800, 507)]
)
def test_a_piece_has_room_for_the_largest_weight_and_is_a_sixteenth_of_many(
    weights: list[int], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zero3, "LEAST_PIECE", 1)
    assert find_piece(weights) == piece


def test_small_models_are_one_piece() -> None:
    assert find_piece([100] * 1000) == 100_000
    assert find_piece([zero3.LEAST_PIECE // 2] * 8) == zero3.LEAST_PIECE


class TestStorages:
    def make(self) -> tuple[_Storages, torch.Tensor, nn.Parameter, nn.Parameter]:
        """Return two weights that share one piece of memory, as those of a single process do."""
        flat = torch.arange(10.0)
        first, second = nn.Parameter(flat[:4].view(2, 2)), nn.Parameter(flat[4:].view(2, 3))
        storages = _Storages()
        for weight in (first, second):
            weight.ds_numel = weight.numel()  # type: ignore[attr-defined]
            storages.add(weight)
        return storages, flat, first, second

    def test_views_of_weights_are_recognised_and_can_be_made_again(self) -> None:
        storages, _, first, second = self.make()
        for view, weight in (
            (first, first),
            (second.t(), second),
            (second[1:, 1:], second),
            (first.view(-1)[3:], first),
        ):
            note = storages.describe(view)
            assert note is not None
            assert note.weight is weight
            whole = weight.data.clone()
            assert torch.equal(whole.as_strided(note.size, note.stride, note.offset), view)

    def test_anything_else_is_kept_as_it_is(self) -> None:
        storages, flat, first, _ = self.make()
        assert storages.describe(first * 1.0) is None
        assert storages.describe(first[:0]) is None
        assert storages.describe(flat.view(torch.int32)) is None
        assert storages.describe(torch.zeros(4)) is None

    def test_what_is_not_in_use_is_forgotten(self) -> None:
        storages, flat, first, second = self.make()
        view = second.detach()[1:]
        first.data, second.data = torch.empty(0), torch.empty(0)
        del flat
        storages.forget()
        assert storages.describe(view) is not None
        del view
        storages.forget()
        assert not storages._known
