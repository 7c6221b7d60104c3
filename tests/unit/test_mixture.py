"""Several data sets as one: shares, energy scales of different levels of theory, statistics, and what does not go together."""

import dataclasses
import json
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analytic import write_dataset
from training_setup import make_graphs

from so3krates_dist.config import DataSection, EuclideanTransformerSection, So3kratesSection, So3lrSection
from so3krates_dist.data import levels
from so3krates_dist.data.levels import Reference
from so3krates_dist.data.mixture import Mixture, compute_shares
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.data.passes import Limits
from so3krates_dist.data.statistics import compute_statistics
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph
from so3krates_dist.model.potential import ModelStatistics

MODEL = EuclideanTransformerSection(cutoff=4.0)
OFFSETS = {10: 1000.0, 18: -250.0}
"""eV by element: another level of theory, whose bonds are as strong"""


def shift(graphs: Sequence[Graph], offsets: dict[int, float]) -> list[Graph]:
    """Return the structures with other energies of their atoms."""
    return [
        dataclasses.replace(g, energy=g.energy + sum(offsets[z] for z in g.atomic_numbers.tolist())) for g in graphs
    ]


def alter(folder: Path, **changes: Any) -> Path:
    """Change entries of a manifest."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    statistics = changes.pop("statistics", {})
    content["statistics"] |= statistics
    path.write_text(json.dumps(content | changes))
    return folder


def make(folder: Path, count: int, first_seed: int, offsets: dict[int, float] | None = None, **changes: Any) -> Path:
    """Write a data set of clusters, `count` of them for training and two for validation."""
    graphs = shift(make_graphs(count + 2, first_seed), offsets or {10: 0.0, 18: 0.0})
    write_dataset(folder, {"train": graphs[2:], "validation": graphs[:2]}, name=folder.name)
    return alter(folder, **changes)


def open_all(*folders: Path, model: Any = MODEL, reference: Reference | None = None, **settings: Any) -> Mixture:
    section = DataSection(folders=tuple(map(str, folders)), **settings)
    return Mixture.open(section, model, reference)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    make(folder / "a", 40, 0)
    make(folder / "b", 24, 500)
    make(folder / "dft", 30, 900, OFFSETS, level_of_theory="DFT")
    return folder


# -------------------------------------------------------------------------------------------------------------- one alone


class TestOne:
    def test_it_is_what_its_manifest_says(self, root: Path) -> None:
        mixture = Mixture.open(DataSection(folder=str(root / "a")), MODEL)
        manifest = json.loads((root / "a" / "manifest.json").read_text())
        assert mixture.statistics == manifest["statistics"]
        assert (mixture.name, mixture.level_of_theory, mixture.shares) == ("a", "Morse", (1.0,))
        assert mixture.fingerprint == mixture.sources[0].manifest.fingerprint
        assert mixture.sources[0].shift is None
        assert mixture.labels == ("energy", "forces")
        assert mixture.describe() == []

    def test_the_plan_sees_its_training_blocks(self, root: Path) -> None:
        (source,) = Mixture.open(DataSection(folder=str(root / "a")), MODEL).sources
        graphs = list(source.iter_graphs("train"))
        assert source.block_sizes.tolist() == [4] * 10
        assert source.block_shards.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3]
        assert source.where(4).endswith("train-000001.tar:train-000001-000001")
        atoms, pairs = source.sizes(np.array([3, 0]))
        expected = [*graphs[12:16], *graphs[:4]]
        assert atoms.tolist() == [g.num_atoms for g in expected]
        assert pairs.tolist() == [len(build_neighbors(g, 4.0).pair_first) for g in expected]  # type: ignore[arg-type]
        assert [g.energy for g in source.read_block(3)] == [g.energy for g in graphs[12:16]]

    def test_it_travels_to_other_processes(self, root: Path) -> None:
        mixture = open_all(root / "a", root / "dft")
        for source in mixture.sources:
            source.read_block(0)
            copy = pickle.loads(pickle.dumps(source))
            assert [g.energy for g in copy.read_block(1)] == [g.energy for g in source.read_block(1)]
            assert np.array_equal(copy.sizes(np.array([2]))[1], source.sizes(np.array([2]))[1])


def test_pairs_that_count_are_those_that_cost(root: Path) -> None:
    """All of them where attention is between all atoms; long-range terms beside a cutoff are cheap."""
    far, near = So3kratesSection(non_local=True), So3lrSection(long_range_cutoff=0.0)
    assert (far.pair_cutoff, near.pair_cutoff, near.reach) == (math.inf, 4.5, math.inf)
    (source,) = open_all(root / "a", model=far).sources
    atoms, pairs = source.sizes(np.arange(10))
    assert pairs.tolist() == (atoms * (atoms - 1) // 2).tolist()


# ----------------------------------------------------------------------------------------------------- weights in the loss


class TestLossWeights:
    def test_each_data_set_has_one(self, root: Path) -> None:
        assert open_all(root / "a", root / "b").loss_weights == (1.0, 1.0)
        mixture = open_all(root / "a", root / "b", loss_weights=(0.25, 1.0))
        assert mixture.loss_weights == (0.25, 1.0)
        first, second = mixture.describe()
        assert first.endswith(", errors count 0.25 times")
        assert "count" not in second

    def test_they_change_neither_shares_nor_statistics(self, root: Path) -> None:
        plain, weighted = (
            open_all(root / "a", root / "dft"),
            open_all(root / "a", root / "dft", loss_weights=(5.0, 0.5)),
        )
        assert weighted.shares == plain.shares
        assert weighted.reference == plain.reference

    def test_errors_that_count_for_nothing(self, root: Path) -> None:
        message = (
            r"data\.loss_weights must be above zero for a data set that is trained on; got 0 for a\."
            r" Change data\.loss_weights or data\.weights\."
        )
        with pytest.raises(DataError, match=message):
            open_all(root / "a", root / "b", weights=(1.0, 0.0), loss_weights=(0.0, 2.0))
        assert open_all(root / "a", root / "b", loss_weights=(0.0, 2.0)).loss_weights == (0.0, 2.0)

    def test_products_that_single_precision_does_not_hold(self, root: Path) -> None:
        with pytest.raises(
            DataError, match=r"data\.loss_weights must give weights that single precision holds; got 1e\+39 for"
        ):
            open_all(root / "a", loss_weights=(1e39,))


# ----------------------------------------------------------------------------------------------------------------- shares


class TestShares:
    def test_weights(self, root: Path) -> None:
        assert open_all(root / "a", root / "b", weights=(0.25, 0.75)).shares == (0.25, 0.75)

    @pytest.mark.parametrize(
        ("temperature", "expected"),
        [(1.0, (0.8, 0.2)), (2.0, (2 / 3, 1 / 3)), (1e9, (0.5, 0.5)), (0.5, (16 / 17, 1 / 17))],
    )
    def test_temperature(self, temperature: float, expected: tuple[float, ...]) -> None:
        section = DataSection(folders=("a", "b"), temperature=temperature)
        assert compute_shares(section, [4000, 1000]) == pytest.approx(expected, abs=1e-8)

    def test_a_share_of_zero_leaves_a_data_set_out(self, root: Path) -> None:
        mixture = open_all(root / "a", root / "dft", weights=(1.0, 0.0))
        assert [s.name for s in mixture.active] == ["a"]
        assert mixture.num_conformers("train") == 40
        assert mixture.num_conformers("validation") == len(list(mixture.iter_graphs("validation"))) == 2
        assert mixture.statistics == open_all(root / "a").statistics
        assert len(mixture.sources) == 2, "it keeps its place in the plan"


# -------------------------------------------------------------------------------------------------------- levels of theory


class TestLevels:
    def test_one_level_is_one_scale(self, root: Path) -> None:
        """Differences between data sets of one level are real, and stay."""
        mixture = open_all(root / "a", root / "b")
        assert [s.shift for s in mixture.sources] == [None, None]
        assert mixture.level_of_theory == "Morse"
        raw = [g.energy for f in ("a", "b") for g in open_all(root / f).iter_graphs("validation")]
        assert [g.energy for g in mixture.iter_graphs("validation")] == raw

    def test_another_level_is_shifted_to_the_one_with_the_largest_share(self, root: Path) -> None:
        mixture = open_all(root / "dft", root / "a")
        assert mixture.reference.level == "Morse"
        assert mixture.level_of_theory == "Morse (energies of DFT shifted to it)"
        dft, morse = mixture.sources
        assert morse.shift is None
        own = open_all(root / "dft").reference.energy_baselines
        model = open_all(root / "a").reference.energy_baselines
        assert dft.shift == {z: model[z] - own[z] for z in (10, 18)}
        assert mixture.reference.energy_baselines == model
        raw = list(open_all(root / "dft").iter_graphs("train"))
        for before, after in zip(raw, dft.iter_graphs("train"), strict=True):
            assert before.energy is not None
            expected = before.energy + sum(model[z] - own[z] for z in before.atomic_numbers.tolist())
            assert after.energy == pytest.approx(expected, abs=1e-9)
            assert np.array_equal(after.forces, before.forces)
        assert (
            "dft: 42.9 % of each step, 30 conformers, DFT, energies shifted to the model's baselines"
            in mixture.describe()
        )

    def test_what_is_left_is_as_large_as_in_either(self, root: Path) -> None:
        """The test's second level has atoms hundreds of eV apart; after the shift its residuals are a fraction of an eV."""
        mixture = open_all(root / "a", root / "dft")
        baselines = mixture.reference.energy_baselines
        energies = [
            (g.energy or 0.0) - sum(baselines[z] for z in g.atomic_numbers.tolist())
            for g in mixture.iter_graphs("train")
        ]
        assert np.std(energies) < 1.0

    def test_weights_decide_whose_scale_it_is(self, root: Path) -> None:
        assert open_all(root / "a", root / "dft", weights=(0.1, 0.9)).reference.level == "DFT"

    def test_missing_energies_are_not_shifted_into_being(self, tmp_path: Path, root: Path) -> None:
        graphs = shift(make_graphs(8, 900), OFFSETS)
        graphs[3] = dataclasses.replace(graphs[3], energy=None)
        alter(write_dataset(tmp_path / "gaps", {"train": graphs}), level_of_theory="DFT")
        mixture = open_all(root / "a", tmp_path / "gaps")
        assert mixture.sources[1].shift is not None
        assert [g.energy is None for g in mixture.sources[1].iter_graphs("train")] == [i == 3 for i in range(8)]

    def test_data_without_energies_need_no_baselines(self, tmp_path: Path, root: Path) -> None:
        graphs = [dataclasses.replace(g, energy=None) for g in make_graphs(8, 900)]
        alter(write_dataset(tmp_path / "forces", {"train": graphs}), level_of_theory="DFT")
        mixture = open_all(root / "a", tmp_path / "forces")
        assert mixture.sources[1].shift is None
        assert mixture.reference.energy_baselines == open_all(root / "a").reference.energy_baselines

    @pytest.mark.parametrize(("first", "second"), [(" Morse\n", "Morse"), ("morse", "Morse")])
    def test_levels_are_compared_by_their_text(self, tmp_path: Path, first: str, second: str) -> None:
        """Without spaces around it, but small and capital letters differ."""
        one = make(tmp_path / "one", 8, 0, level_of_theory=first)
        two = make(tmp_path / "two", 8, 500, OFFSETS, level_of_theory=second)
        shifts = [s.shift for s in open_all(one, two).sources]
        assert (shifts == [None, None]) == (first.strip() == second)

    def test_unknown_levels_are_levels_of_their_own(self, tmp_path: Path) -> None:
        one = make(tmp_path / "one", 12, 0, level_of_theory="unknown")
        two = make(tmp_path / "two", 8, 500, OFFSETS, level_of_theory=" unknown")
        mixture = open_all(one, two)
        assert [s.shift is None for s in mixture.sources] == [True, False]

    @pytest.mark.parametrize("level", ["DFT", "unknown"])
    def test_no_baselines(self, tmp_path: Path, root: Path, level: str) -> None:
        none = {"energy_baselines": {"10": 0.0, "18": 0.0}}
        other = make(tmp_path / "other", 8, 500, level_of_theory=level, statistics=none)
        rule = (
            rf"other must have energy baselines to be trained on together with .*/a \(Morse\); got none at .* \({level}"
        )
        with pytest.raises(DataError, match=rule + r".*\)\. Convert it again, with the same --level-of-theory"):
            open_all(root / "a", other)
        with pytest.raises(DataError, match=rule):
            open_all(other, root / "a")
        same = make(tmp_path / "same", 8, 500, level_of_theory="Morse", statistics=none)
        open_all(root / "a", same)

    def test_elements_that_the_reference_lacks_have_their_own_baseline(self, tmp_path: Path, root: Path) -> None:
        graphs = [dataclasses.replace(g, atomic_numbers=g.atomic_numbers * 2) for g in make_graphs(8, 500)]
        alter(write_dataset(tmp_path / "heavy", {"train": graphs}, name="heavy"), level_of_theory="DFT")
        mixture = open_all(root / "a", tmp_path / "heavy")
        own = open_all(tmp_path / "heavy").reference.energy_baselines
        assert mixture.reference.energy_baselines == open_all(root / "a").reference.energy_baselines | own
        assert mixture.sources[1].shift is None, "no element in common"


class TestBaselinesOfOneLevel:
    """One set for all data sets of a level."""

    def count(self, graphs: Sequence[Graph], element: int) -> int:
        return sum(int((g.atomic_numbers == element).sum()) for g in graphs)

    def test_picked_where_they_agree(self, tmp_path: Path) -> None:
        """Two sets whose own baselines differ by less than matters: each element's is that of the set with most of it."""
        one, two = make(tmp_path / "one", 40, 0), make(tmp_path / "two", 20, 500)
        own = [open_all(f).reference.energy_baselines for f in (one, two)]
        alter(two, statistics={"energy_baselines": {str(z): e + 1e-4 for z, e in own[0].items()}})
        assert open_all(one, two).reference.energy_baselines == own[0]
        assert open_all(two, one).reference.energy_baselines == own[0]

    def test_fitted_anew_where_they_share_out_energy_differently(self, tmp_path: Path) -> None:
        """Each set has one composition alone, so its own fit cannot tell elements apart; both together can."""
        folders = []
        for name, numbers in (("one", [10, 10, 10, 18]), ("two", [10, 18, 18, 18])):
            graphs = [
                dataclasses.replace(
                    g, atomic_numbers=np.array(numbers), energy=float(-100 * numbers.count(10) - numbers.count(18))
                )
                for g in make_graphs(60)
                if g.num_atoms == 4
            ]
            folders.append(write_dataset(tmp_path / name, {"train": graphs}, name=name))
        found = open_all(*folders).reference.energy_baselines
        assert found == pytest.approx({10: -100.0, 18: -1.0}, abs=1e-3)
        assert open_all(*folders).reference.energy_baselines == found, "always the same"
        assert all(float(f"{e:.12g}") == e for e in found.values())

    def test_not_more_is_read_than_needed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(levels, "MAX_FIT_CONFORMERS", 10)
        one, two = make(tmp_path / "one", 40, 0), make(tmp_path / "two", 40, 500)
        taken: list[int] = []
        original = levels.BaselineSample.add
        monkeypatch.setattr(
            levels.BaselineSample, "add", lambda self, *facts: (taken.append(1), original(self, *facts))[1]
        )
        open_all(one, two)
        assert len(taken) == 2 * 2 * 10, "each conformer in its set's sample and in the joint one"


# ------------------------------------------------------------------------------------------------------------- statistics


class TestStatistics:
    def test_in_proportion_to_their_numbers_they_are_those_of_all_together(self, root: Path) -> None:
        """To single precision, in which forces are stored; but for fits; neighbours are counted for all of so few."""
        mixture = open_all(root / "a", root / "b")
        everything = compute_statistics(list(mixture.iter_graphs("train")), None)
        found = dict(mixture.statistics)
        assert found.keys() == everything.keys()
        for name in (
            "elements",
            "element_counts",
            "total_charges",
            "num_unpaired_electrons",
            "num_periodic",
        ):
            assert found[name] == everything[name], name
        for name in ("max_force", "num_atoms", "mean_neighbors", "force_rms_per_element"):
            assert found[name] == pytest.approx(everything[name], rel=1e-7), name
        assert found["force_rms"] == pytest.approx(everything["force_rms"], rel=1e-7)
        assert found["energy_residual_std_per_atom"] == pytest.approx(
            everything["energy_residual_std_per_atom"], rel=0.2
        )
        ModelStatistics.from_manifest(found, MODEL)

    def test_they_are_those_of_what_training_sees(self, root: Path) -> None:
        """With weights, as if conformers of one data set were there several times."""
        mixture = open_all(root / "a", root / "b", weights=(0.25, 0.75))
        one, two = (list(s.iter_graphs("train")) for s in mixture.sources)
        repeated = one * 3 + two * 15  # 120 and 360
        everything = compute_statistics(repeated, None)
        for name in ("force_rms", "force_rms_per_element", "num_atoms"):
            assert mixture.statistics[name] == pytest.approx(everything[name], rel=1e-7), name

    def test_forces_that_only_some_have(self, tmp_path: Path, root: Path) -> None:
        graphs = make_graphs(12, 500)
        with_gaps = [dataclasses.replace(g, forces=None if i % 3 else g.forces) for i, g in enumerate(graphs)]
        write_dataset(tmp_path / "gaps", {"train": with_gaps})
        mixture = open_all(root / "a", tmp_path / "gaps")
        everything = compute_statistics([*mixture.sources[0].iter_graphs("train"), *with_gaps], None)
        assert mixture.statistics["force_rms"] == pytest.approx(everything["force_rms"], rel=1e-7)

    def test_no_forces_at_all(self, tmp_path: Path) -> None:
        graphs = [dataclasses.replace(g, forces=None) for g in make_graphs(16)]
        folders = [
            write_dataset(tmp_path / n, {"train": part}, name=n) for n, part in (("a", graphs[:8]), ("b", graphs[8:]))
        ]
        statistics = open_all(*folders).statistics
        assert (statistics["force_rms"], statistics["max_force"]) == (None, None)
        assert (
            ModelStatistics.from_manifest(statistics, MODEL).energy_scale == statistics["energy_residual_std_per_atom"]
        )

    def test_neighbours_at_no_common_cutoff(self, tmp_path: Path, root: Path) -> None:
        other = make(tmp_path / "other", 8, 500, statistics={"mean_neighbors": {"3.3": 1.0}})
        with pytest.raises(
            DataError, match=r"other must count neighbours at a cutoff at which .*a does; got 3\.3\. Convert"
        ):
            open_all(root / "a", other)

    def test_older_manifests_do_not_count_unpaired_electrons(self, tmp_path: Path, root: Path) -> None:
        """They are searched for where the model sees them; where it does not, nobody knows of them."""
        graphs = make_graphs(6, 500)
        graphs[3].num_unpaired_electrons = 2.0
        folder = write_dataset(tmp_path / "old", {"train": graphs})
        content = json.loads((folder / "manifest.json").read_text())
        del content["statistics"]["num_unpaired_electrons"]
        (folder / "manifest.json").write_text(json.dumps(content))
        for folders in ((folder,), (root / "a", folder)):
            found = open_all(*folders, model=So3lrSection()).statistics
            assert found["num_unpaired_electrons"]["2"] == 1
            assert ModelStatistics.from_manifest(found, So3lrSection()).has_unpaired_electrons
            assert "num_unpaired_electrons" not in open_all(*folders).statistics


# ----------------------------------------------------------------------------------------------------- a run that has begun


class TestReference:
    def test_it_survives_a_file(self, root: Path) -> None:
        reference = open_all(root / "a", root / "dft").reference
        assert Reference.from_json(json.loads(json.dumps(reference.to_json()))) == reference

    def test_opened_again_nothing_changes(self, root: Path) -> None:
        first = open_all(root / "a", root / "dft")
        again = open_all(root / "a", root / "dft", reference=first.reference)
        assert [s.shift for s in again.sources] == [s.shift for s in first.sources]
        model = [ModelStatistics.from_manifest(m.statistics, MODEL) for m in (first, again)]
        assert model[0] == model[1]

    def test_the_model_keeps_its_scale_when_data_come_and_go(self, root: Path, tmp_path: Path) -> None:
        graphs = [dataclasses.replace(g, atomic_numbers=g.atomic_numbers * 2) for g in make_graphs(80, 500)]
        heavy = alter(write_dataset(tmp_path / "heavy", {"train": graphs}, name="heavy"), level_of_theory="DFT")
        first = open_all(root / "a")
        for folders in ((root / "dft",), (root / "a", root / "dft", root / "b"), (root / "a", heavy), (root / "b",)):
            later = open_all(*folders, reference=first.reference)
            before, now = (ModelStatistics.from_manifest(m.statistics, MODEL) for m in (first, later))
            assert (now.energy_scale, now.mean_neighbors) == (before.energy_scale, before.mean_neighbors)
            assert set(now.elements) >= set(before.elements)
            for element, energy in before.energy_baselines.items():
                assert now.energy_baselines[element] == energy
            assert later.reference.level == "Morse"
        alone = open_all(root / "dft", reference=first.reference)
        own = open_all(root / "dft").reference.energy_baselines
        assert alone.sources[0].shift == {z: first.reference.energy_baselines[z] - own[z] for z in (10, 18)}

    def test_another_level_without_baselines_cannot_join(self, root: Path, tmp_path: Path) -> None:
        none = {"energy_baselines": {"10": 0.0, "18": 0.0}}
        other = make(tmp_path / "other", 8, 500, level_of_theory="DFT", statistics=none)
        with pytest.raises(
            DataError, match=r"other must have energy baselines to be trained on together with the run; got"
        ):
            open_all(other, reference=open_all(root / "a").reference)


# -------------------------------------------------------------------------------------------------- what does not go together


class TestRefused:
    def test_other_units(self, root: Path, tmp_path: Path) -> None:
        other = make(tmp_path / "other", 8, 500, units={"energy": "eV", "length": "Bohr"})
        with pytest.raises(
            DataError,
            match=r"other must have the units of .*a \(length in Angstrom\); got length in Bohr\. Convert one of them again into",
        ):
            open_all(root / "a", other)

    def test_the_same_data(self, root: Path, tmp_path: Path) -> None:
        make(tmp_path / "twin", 40, 0)
        with pytest.raises(
            DataError, match=r"twin must be another data set than .*a; got the same data \(fingerprint \w{16}\)"
        ):
            open_all(root / "a", tmp_path / "twin")

    def test_data_sets_of_one_name_are_told_apart(self, root: Path, tmp_path: Path) -> None:
        make(tmp_path / "a", 8, 700)
        names = [s.name for s in open_all(root / "a", tmp_path / "a").sources]
        assert all(name.startswith("a (") for name in names)
        assert len(set(names)) == 2


class TestOversized:
    def test_none(self, root: Path) -> None:
        (source,) = open_all(root / "a").sources
        atoms, pairs = source.sizes(np.arange(10))
        assert source.find_oversized(Limits(int(atoms.max()), int(pairs.max()))) == (0, ("", ""))

    @pytest.mark.parametrize("which", ["atoms", "pairs"])
    def test_the_first_one_is_named(self, root: Path, which: str) -> None:
        (source,) = open_all(root / "a").sources
        atoms, pairs = source.sizes(np.arange(10))
        sizes, key = (atoms, "max_atoms") if which == "atoms" else (pairs, "max_pairs")
        limit = int(sizes.max()) - 1
        count, (name, text) = source.find_oversized(Limits(**{key: limit}))
        first = int(np.flatnonzero(sizes > limit)[0])
        assert count == int((sizes > limit).sum())
        assert name == f"{source.where(first // 4)}:{first % 4}"
        assert text.endswith(f", {atoms[first]} atoms and about {pairs[first]} pairs")
        assert text.startswith("Ar")
