"""Memory and time of passes, measured of real models on this machine; what is concluded from them, on numbers given.

Bounds are generous, and no assertion depends on how fast anything was. That measuring changes nothing about a training engine:
tests/distributed.
"""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from analytic import label, make_cluster, make_morse
from hypothesis import given
from hypothesis import strategies as st
from training_setup import make_config

from so3krates_dist.config import RunConfig
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.distributed import Rank
from so3krates_dist.errors import ConfigError
from so3krates_dist.graph import GraphBatch, collate
from so3krates_dist.model.potential import ModelStatistics, Potential
from so3krates_dist.model.registry import build_model
from so3krates_dist.train import budget
from so3krates_dist.train.budget import (
    Line,
    MeasuredCost,
    MeasuredLimits,
    Point,
    choose_limits,
    fill,
    find_limits,
    fit_cost,
    fit_line,
    normalise_cost,
)
from so3krates_dist.train.memory import measure_peak
from so3krates_dist.train.probes import Probes

CPU = torch.device("cpu")
MB = 10**6
STATISTICS = ModelStatistics(
    elements=(10, 18), energy_baselines={10: -3507.25, 18: -14354.5}, energy_scale=0.5, mean_neighbors=3.0
)
CONFIG = make_config("data", "run", "train.zero_stage=1")


def make_probes(*sizes: int) -> Probes:
    """Return clusters of so many atoms, as if there were as many of each."""
    potential = make_morse()
    graphs = [build_neighbors(label(make_cluster(s, num_atoms=n), potential), 4.0) for s, n in enumerate(sizes)]
    pairs = tuple(g.num_short_pairs or 0 for g in graphs)
    return Probes(
        graphs=tuple(graphs), atoms=sizes, pairs=pairs, most_atoms=max(sizes), most_pairs=max(pairs),
        pairs_per_atom=sum(pairs) / sum(sizes),
    )  # fmt: skip


PROBES = make_probes(60, 4, 12, 30)


@pytest.fixture(autouse=True)
def short_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let passes be shorter than for a real run."""
    monkeypatch.setattr(budget, "MAX_SECONDS", 0.3)
    monkeypatch.setattr(budget, "MIN_SECONDS", 0.01)


def build(*settings: str) -> tuple[Potential, RunConfig]:
    config = make_config("data", "run", *settings)
    torch.manual_seed(0)
    return build_model(config.model, STATISTICS).train(), config


def search(potential: Potential, megabytes: float, **options: Any) -> MeasuredLimits:
    return find_limits(potential, PROBES, CONFIG.train, CPU, Rank(), available_bytes=int(megabytes * MB), **options)


class TestLine:
    COMPOSITIONS = ((4, 6), (60, 300), (240, 360), (120, 600), (12, 40), (600, 900))

    @pytest.mark.parametrize(
        "line", [(5e6, 3e3, 2e4), (0.0, 3e3, 2e4), (5e6, 0.0, 2e4), (5e6, 3e3, 0.0), (0.0, 0.0, 7.0)]
    )
    @pytest.mark.parametrize("relative", [False, True])
    def test_what_lies_on_a_line_gives_it_back(self, line: tuple[float, float, float], relative: bool) -> None:
        expected = Line(*line)
        points = [Point(a, p, expected.at(a, p)) for a, p in self.COMPOSITIONS]
        found = fit_line(points, relative=relative)
        assert (found.fixed, found.per_atom, found.per_pair) == pytest.approx(line, rel=1e-6, abs=1e-6 * max(line))

    @given(st.lists(st.floats(0.1, 1e9), min_size=6, max_size=6))
    def test_nothing_is_ever_negative(self, values: list[float]) -> None:
        """And no other line without negative coefficients is closer: moving any coefficient makes it worse."""
        points = [Point(a, p, v) for (a, p), v in zip(self.COMPOSITIONS, values, strict=True)]
        found = fit_line(points, relative=False)
        coefficients = np.array([found.fixed, found.per_atom, found.per_pair])
        assert coefficients.min() >= 0
        columns = np.array([(1.0, p.atoms, p.pairs) for p in points])

        def deviate(x: Any) -> float:
            return float(np.square(columns @ x - values).sum())

        least = deviate(coefficients)
        for number, sign in ((i, s) for i in range(3) for s in (-1, 1)):
            moved = coefficients.copy()
            moved[number] = max(0.0, moved[number] + sign * 1e-3 * max(values) / columns[:, number].max())
            assert deviate(moved) >= least * (1 - 1e-9)

    def test_conformers_of_one_composition_are_enough(self) -> None:
        found = fit_line([Point(5 * n, 10 * n, 100.0 + 7 * n) for n in (1, 2, 4)], relative=False)
        assert found.at(500, 1000) == pytest.approx(800)


class TestChoice:
    @pytest.mark.parametrize("line", [Line(1e6, 3e3, 2e4), Line(0.0, 0.0, 2e4), Line(0.0, 3e3, 0.0)])
    @pytest.mark.parametrize("room", [2e7, 1e9])
    def test_a_micro_batch_at_both_limits_fits(self, line: Line, room: float) -> None:
        atoms, pairs = choose_limits(room, line, PROBES)
        assert atoms >= PROBES.most_atoms
        assert pairs >= PROBES.most_pairs
        assert 0.8 * room < line.at(atoms, pairs) <= room

    def test_two_digits(self) -> None:
        for room in (1e9, 3.3e9, 7.77e11):
            assert all(float(f"{limit:.1e}") == limit for limit in choose_limits(room, Line(1e6, 3e3, 2e4), PROBES))

    def test_the_ratio_is_that_of_the_data(self) -> None:
        atoms, pairs = choose_limits(1e12, Line(1e6, 3e3, 2e4), PROBES)
        assert pairs / atoms == pytest.approx(PROBES.pairs_per_atom, rel=0.1)

    @pytest.mark.parametrize("heaviest", [(200, 20_000), (5_000, 300)])
    def test_the_heaviest_conformer_is_let_through_where_it_fits(self, heaviest: tuple[int, int]) -> None:
        """Although the ratio of its atoms and pairs is far from that of the others."""
        line = Line(1e6, 3e3, 2e3)
        probes = Probes((), (), (), *heaviest, pairs_per_atom=5.0)
        for room in (line.at(*heaviest), 1.01 * line.at(*heaviest), 3 * line.at(*heaviest)):
            atoms, pairs = choose_limits(room, line, probes)
            assert atoms >= heaviest[0]
            assert pairs >= heaviest[1]
            assert line.at(atoms, pairs) <= room * (1 + 1e-9)

    def test_without_pairs_there_is_no_limit_on_them(self) -> None:
        atoms, pairs = choose_limits(1e9, Line(0.0, 1e3, 0.0), Probes((), (), (), 1, 0, pairs_per_atom=0.0))
        assert (atoms, pairs) == (1_000_000, 0)

    def test_pairs_that_do_not_fit_are_not_unlimited(self) -> None:
        assert choose_limits(1e3, Line(0.0, 1e3, 1e3), PROBES)[1] == 1, "0 would mean that there is no limit"

    @given(st.integers(0, 10_000), st.integers(0, 50_000))
    def test_a_full_batch_keeps_the_limits_and_has_no_room(self, max_atoms: int, max_pairs: int) -> None:
        atoms, pairs = PROBES.add_up(fill(PROBES, max_atoms, max_pairs))
        assert atoms <= max_atoms
        assert pairs <= max_pairs
        for more_atoms, more_pairs in zip(PROBES.atoms, PROBES.pairs, strict=True):
            assert atoms + more_atoms > max_atoms or pairs + more_pairs > max_pairs


class TestMemory:
    def test_limits_grow_with_the_memory(self) -> None:
        potential, _ = build("model.num_features=32")
        found = [search(potential, megabytes) for megabytes in (8, 24, 72)]
        for small, large in itertools.pairwise(found):
            assert 1.5 * small.max_atoms < large.max_atoms < 6 * small.max_atoms
            assert 1.5 * small.max_pairs < large.max_pairs < 6 * small.max_pairs

    @pytest.mark.parametrize(
        ("model", "least"), [("euclidean_transformer", 0.4), ("so3krates", 0.4), ("geomatt", 0.02)]
    )
    def test_a_micro_batch_at_the_limit_stays_below_it(self, model: str, least: float) -> None:
        """GeomAtt takes memory by the square of the neighbours, so its limits are those of the densest conformers."""
        options = ("num_layers=2", "num_features=8", "inner_width=8", "grid_end=4.0", "grid_spacing=0.5")
        settings = options if model == "geomatt" else ("cutoff=4.0", "num_features=48")
        potential, config = build(f"model.name={model}", *(f"model.{setting}" for setting in settings))
        found = find_limits(potential, PROBES, config.train, CPU, Rank(), available_bytes=80 * MB)
        batch = collate([PROBES.graphs[i] for i in fill(PROBES, found.max_atoms, found.max_pairs)])
        weights = [p for p in potential.parameters() if p.requires_grad]

        def run() -> None:
            outputs = potential(batch)
            loss = outputs["energy"].sum() + outputs["forces"].square().sum()
            torch.autograd.grad(loss, weights, allow_unused=True)

        assert least * 80 * MB < measure_peak(run, CPU) < 1.1 * 80 * MB, found.describe()

    def test_twice_the_width_takes_twice_the_memory_per_pair(self) -> None:
        found = [search(build(f"model.num_features={width}")[0], 60) for width in (32, 64)]
        weights = [found_.bytes_per_pair + found_.bytes_per_atom / PROBES.pairs_per_atom for found_ in found]
        assert 1.2 < weights[1] / weights[0] < 4

    def test_what_was_measured_is_told(self) -> None:
        found = search(build()[0], 30)
        assert found.available_bytes == 30 * MB
        assert 1 * MB < found.largest_bytes < 45 * MB
        assert 8 <= found.num_passes < 40
        assert MeasuredLimits(**found.to_json()) == found
        assert found.describe().startswith(
            f"Largest micro-batch for 0.03 GB: {found.max_atoms:,} atoms, {found.max_pairs:,} pairs ("
        )

    def test_what_is_found_out_by_itself(self) -> None:
        """Most of the machine's free memory; the check goes no further than a step does."""
        potential, _ = build()
        found = find_limits(potential, PROBES, CONFIG.train, CPU, Rank(), conformers_per_step=6)
        assert found.available_bytes > 100 * MB
        assert found.max_atoms > 1000
        assert found.largest_bytes < found.available_bytes

    @pytest.mark.parametrize("available", [1, 300_000])
    def test_too_little_for_one_conformer_is_refused(self, available: int) -> None:
        potential, _ = build("model.num_features=64")
        text = r"data\.find_limits must find memory for at least one conformer; got .* GB for a pass\. Take a smaller model"
        with pytest.raises(ConfigError, match=text):
            find_limits(potential, PROBES, CONFIG.train, CPU, Rank(), available_bytes=available)


class Bounded(Potential):
    """A model on a device that holds so many atoms and no more, as GPUs do; this machine has none."""

    most_atoms = 0

    def forward(self, batch: GraphBatch, compute_stress: bool = False) -> dict[str, torch.Tensor]:
        outputs = super().forward(batch, compute_stress)
        if len(batch.positions) > self.most_atoms:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return outputs


def bound(most_atoms: int) -> Bounded:
    potential, _ = build()
    bounded = Bounded(potential.network, STATISTICS).train()
    bounded.most_atoms = most_atoms
    return bounded


class TestOutOfMemory:
    @pytest.mark.parametrize("most_atoms", [70, 200, 500])
    def test_limits_are_halved_until_they_hold(self, most_atoms: int) -> None:
        found = search(bound(most_atoms), 30)
        assert most_atoms / 4 < found.max_atoms <= 1.2 * most_atoms, "as close as these conformers come"

    def test_not_even_one_conformer(self) -> None:
        with pytest.raises(ConfigError, match="must find memory for at least one conformer"):
            search(bound(3), 30)
        with pytest.raises(
            ConfigError,
            match=r"data\.fit_cost must find memory for one conformer; got too little\. Take a smaller model",
        ):
            fit_cost(bound(3), PROBES, CONFIG.train, CPU, Rank())

    def test_costs_come_from_what_fits(self) -> None:
        found = fit_cost(bound(40), PROBES, CONFIG.train, CPU, Rank())
        assert found.cost_per_atom + found.cost_per_pair > 0


class TestCost:
    def test_it_is_normalised_and_rounded(self) -> None:
        found = fit_cost(build()[0], PROBES, CONFIG.train, CPU, Rank())
        assert (found.cost_per_pair == 1 and found.cost_per_atom >= 0) or (
            found.cost_per_atom,
            found.cost_per_pair,
        ) == (1, 0)
        assert found.cost_per_atom == float(f"{found.cost_per_atom:.1e}") == round(found.cost_per_atom, 2)
        assert found.seconds_per_atom >= 0
        assert found.seconds_per_pair >= 0
        assert found.num_passes > 3 * 2 * len(PROBES.graphs)
        assert MeasuredCost(**found.to_json()) == found
        assert found.describe().startswith(f"Costs: {found.cost_per_atom:g} an atom, {found.cost_per_pair:g} a pair (")

    @pytest.mark.parametrize(
        ("per_atom", "per_pair", "expected"),
        [
            (3.27e-6, 1e-6, (3.3, 1.0)),
            (1e-6, 3e-6, (0.33, 1.0)),
            (1e-6, 70e-6, (0.01, 1.0)),
            (1234e-6, 1e-6, (1200.0, 1.0)),
            (0.0, 1e-6, (0.0, 1.0)),
            (2e-6, 0.0, (1.0, 0.0)),
            (0.0, 0.0, (1.0, 1.0)),
        ],
    )
    def test_the_numbers(self, per_atom: float, per_pair: float, expected: tuple[float, float]) -> None:
        assert normalise_cost(Line(1e-3, per_atom, per_pair)) == expected


@pytest.mark.parametrize(("mode", "times"), [("none", 1), ("blocks", 3), ("low_memory", 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_passes_are_those_of_the_mode_in_use(mode: Any, times: int, dtype: torch.dtype) -> None:
    """What is computed again counts; and gradients are left alone whatever the mode."""
    potential, config = build()
    potential.to(dtype=dtype).as_network.checkpointing = mode
    calls = []
    potential.network.layers[1].register_forward_pre_hook(lambda *_: calls.append(None))  # type: ignore[union-attr, index]
    bench = budget._Bench(potential, PROBES, config.train, CPU)
    bench.measure_bytes([0])
    assert len(calls) == times
    assert all(weight.grad is None for weight in potential.parameters())
