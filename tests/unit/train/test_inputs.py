"""What is opened and checked before a run starts: every line of what bad input gets, for one data set and for several."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from analytic import label, make_cluster, write_dataset
from training_setup import make_config, make_dataset, make_graphs

from so3krates_dist.config import DataSection
from so3krates_dist.data.mixture import Mixture
from so3krates_dist.data.passes import Limits
from so3krates_dist.data.shards import load_manifest, write_index_and_manifest
from so3krates_dist.errors import ConfigError, DataError
from so3krates_dist.graph import Graph
from so3krates_dist.train.inputs import check_sizes, find_limits, open_data


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("inputs") / "data", num_train=24)


def make_periodic(seed: int) -> Graph:
    cluster = make_cluster(seed, num_atoms=4)
    cell = np.diag([9.0, 10.0, 11.0])
    return label(dataclasses.replace(cluster, cell=cell, pbc=np.ones(3, bool)))


class TestFirstChecks:
    def test_no_data_set_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(
            ConfigError, match=r"data\.folder must name a data set; got nothing\. Set data\.folder=FOLDER"
        ):
            open_data(make_config("''", tmp_path), hashes=True)

    def test_the_index_is_checked_even_where_blocks_may_be_damaged(self, dataset: Path, tmp_path: Path) -> None:
        """It says what the order of the data is; shards are looked at block by block."""
        data = tmp_path / "data"
        shutil.copytree(dataset, data)
        (data / "train-000000.tar").write_bytes(b"")
        skip = make_config(data, tmp_path, "data.on_damage=skip", "data.max_skipped=9")
        open_data(skip, hashes=True)
        with pytest.raises(DataError, match=r"train-000000\.tar must have \d+ bytes; got 0 bytes\. Copy"):
            open_data(make_config(data, tmp_path), hashes=True)
        content = bytearray((data / "index.safetensors").read_bytes())
        content[-1] ^= 1
        (data / "index.safetensors").write_bytes(content)
        with pytest.raises(DataError, match=r"index\.safetensors must have the sha256 \w+\.\.\.; got"):
            open_data(skip, hashes=True)

    def test_a_weight_without_labels(self, dataset: Path, tmp_path: Path) -> None:
        config = make_config(dataset, tmp_path, "train.stress_weight=1.0")
        with pytest.raises(
            ConfigError, match=r"train\.stress_weight must be 0 without stress labels; got a data set with energy"
        ):
            open_data(config, hashes=True)

    def test_labels_that_are_not_asked_for_need_not_be_there(self, tmp_path: Path) -> None:
        graphs = make_graphs(4)
        for graph in graphs:
            graph.forces = None
        data = write_dataset(tmp_path / "data", {"train": graphs})
        assert open_data(make_config(data, tmp_path, "train.forces_weight=0.0"), hashes=True).labels == ("energy",)

    @pytest.mark.parametrize(("key", "label"), [("dipole_weight", "dipole"), ("hirshfeld_weight", "hirshfeld_ratios")])
    def test_a_further_weight_needs_labels_and_a_model_that_gives_it(
        self, dataset: Path, tmp_path: Path, key: str, label: str
    ) -> None:
        with pytest.raises(
            ConfigError, match=rf"train\.{key} must be 0 without {label} labels; got a data set with energy"
        ):
            open_data(make_config(dataset, tmp_path, "model.name=so3lr", f"train.{key}=1.0"))
        for model in ("euclidean_transformer", "so3krates", "geomatt", "geomatt_envelope"):
            with pytest.raises(
                ConfigError, match=rf"train\.{key} must be 0 where model\.name={model} has no output `{label}`"
            ):
                make_config(dataset, tmp_path, f"model.name={model}", f"train.{key}=1.0")

    def test_a_box_for_a_model_of_molecules(self, tmp_path: Path) -> None:
        data = write_dataset(tmp_path / "data", {"train": [make_periodic(s) for s in range(4)]})
        for model, remedy in (
            (("model.name=geomatt",), "Take a model that sees the cell"),
            (("model.name=so3krates", "model.non_local=true"), "Take a model that sees the cell"),
            (("model.name=so3lr", "model.long_range_cutoff=0"), "Set a long-range cutoff"),
        ):
            with pytest.raises(
                DataError, match=f"training split must be a molecule for this model; got a periodic structure. {remedy}"
            ):
                open_data(make_config(data, tmp_path, *model))
        open_data(make_config(data, tmp_path, "model.name=so3lr"))

    def test_a_box_or_a_radical_that_only_the_validation_split_has(self, tmp_path: Path) -> None:
        train = make_graphs(4)
        data = write_dataset(tmp_path / "boxes", {"train": train, "validation": [make_periodic(1)]})
        with pytest.raises(DataError, match="validation split must be a molecule for this model"):
            open_data(make_config(data, tmp_path, "model.name=geomatt"))
        radical = dataclasses.replace(train[0], num_unpaired_electrons=2.0)
        data = write_dataset(tmp_path / "radicals", {"train": train, "validation": [radical]})
        with pytest.raises(DataError, match=r"validation split must have no unpaired electrons: .* was never trained"):
            open_data(make_config(data, tmp_path, "model.name=so3lr"))
        open_data(make_config(data, tmp_path))  # this one does not see them
        data = write_dataset(tmp_path / "both", {"train": [*train, radical], "validation": [radical]})
        open_data(make_config(data, tmp_path, "model.name=so3lr"))

    def test_an_element_that_only_the_validation_split_has(self, tmp_path: Path) -> None:
        graphs = make_graphs(4)
        strange = dataclasses.replace(graphs[0], atomic_numbers=np.full(graphs[0].num_atoms, 79))
        data = write_dataset(tmp_path / "data", {"train": graphs, "validation": [strange]})
        with pytest.raises(
            DataError, match=r"validation split must have only elements the model was trained on .*; got Au\."
        ):
            open_data(make_config(data, tmp_path))

    def test_no_training_split(self, tmp_path: Path, dataset: Path) -> None:
        data = write_dataset(tmp_path / "data", {"train": make_graphs(4, 700), "validation": make_graphs(2, 800)})
        path = data / "manifest.json"
        content = json.loads(path.read_text())
        content["shards"] = [s for s in content["shards"] if s["split"] != "train"]
        path.write_text(json.dumps(content))
        write_index_and_manifest(data, load_manifest(data))
        with pytest.raises(
            DataError,
            match=r"data training split must have conformers; got train: 0, validation: 2, test: 0\. Make it with",
        ):
            open_data(make_config("''", tmp_path, f"data.folders=[{dataset},{data}]"))

    def test_a_plateau_of_nothing(self, tmp_path: Path) -> None:
        data = write_dataset(tmp_path / "data", {"train": make_graphs(6)})
        open_data(make_config(data, tmp_path))
        with pytest.raises(
            ConfigError,
            match=r"^train\.schedule must be another schedule than plateau without a validation split; got plateau\.",
        ):
            open_data(make_config(data, tmp_path, "train.schedule=plateau"))

    def test_hashes_are_compared_where_that_is_asked_for(self, tmp_path: Path) -> None:
        from interruptions import flip_byte

        data = make_dataset(tmp_path / "data", num_train=4)
        flip_byte(data / "train-000000.tar", 3000)
        open_data(make_config(data, tmp_path))
        with pytest.raises(DataError, match=r"train-000000\.tar must have the sha256"):
            open_data(make_config(data, tmp_path), hashes=True)


class TestSeveral:
    """Several data sets are checked like one, and each is named."""

    def open(self, *folders: Path, more: tuple[str, ...] = ()) -> Mixture:
        return open_data(make_config("''", "run", f"data.folders=[{','.join(map(str, folders))}]", *more))

    def test_labels_that_only_one_has_are_enough(self, dataset: Path, tmp_path: Path) -> None:
        """Energies from one, forces from the other: each counts where it is."""
        parts = {
            name: write_dataset(
                tmp_path / name,
                {"train": [dataclasses.replace(g, **{name: None}) for g in make_graphs(8, seed)]},
                name=name,
            )
            for name, seed in (("energy", 500), ("forces", 700))
        }
        assert set(self.open(*parts.values()).labels) == {"energy", "forces"}
        with pytest.raises(
            ConfigError, match=r"train\.energy_weight must be 0 without energy labels; got a data set with forces"
        ):
            self.open(parts["energy"])
        with pytest.raises(
            DataError,
            match=r"/energy must have one of the labels that are trained \(energy\); got forces\. Leave it out of data\.folders",
        ):
            self.open(dataset, parts["energy"], more=("train.forces_weight=0",))

    def test_none_has_labels(self, tmp_path: Path) -> None:
        graphs = [dataclasses.replace(g, energy=None, forces=None) for g in make_graphs(4)]
        data = write_dataset(tmp_path / "data", {"train": graphs})
        with pytest.raises(
            ConfigError, match=r"energy_weight must be 0 without energy labels; got a data set with no labels only"
        ):
            self.open(data)

    def test_the_one_that_is_wrong_is_named(self, dataset: Path, tmp_path: Path) -> None:
        boxes = write_dataset(tmp_path / "boxes", {"train": [make_periodic(s) for s in range(4)]}, name="boxes")
        with pytest.raises(DataError, match=r"boxes training split must be a molecule for this model"):
            self.open(dataset, boxes, more=("model.name=geomatt",))
        graphs = [dataclasses.replace(g, atomic_numbers=np.full(g.num_atoms, 79)) for g in make_graphs(2)]
        gold = write_dataset(tmp_path / "gold", {"train": make_graphs(6, 700), "validation": graphs}, name="gold")
        with pytest.raises(DataError, match=r"gold validation split must have only elements the model was trained on"):
            self.open(dataset, gold)

    def test_what_one_has_seen_the_other_may_be_validated_on(self, dataset: Path, tmp_path: Path) -> None:
        graphs = [dataclasses.replace(g, atomic_numbers=np.full(g.num_atoms, 79)) for g in make_graphs(8, 700)]
        gold = write_dataset(tmp_path / "gold", {"train": graphs[:6], "validation": graphs[6:]}, name="gold")
        other = write_dataset(
            tmp_path / "other", {"train": make_graphs(6, 800), "validation": graphs[6:]}, name="other"
        )
        with pytest.raises(DataError, match="other validation split must have only elements"):
            self.open(dataset, other)
        assert self.open(dataset, other, gold).num_conformers("validation") == 4 + 2 + 2

    def test_a_data_set_that_is_left_out_is_not_checked(self, dataset: Path, tmp_path: Path) -> None:
        boxes = write_dataset(tmp_path / "boxes", {"train": [make_periodic(s) for s in range(4)]}, name="boxes")
        more = ("model.name=geomatt", "data.weights=[1,0]")
        assert [s.name for s in self.open(dataset, boxes, more=more).active] == ["small"]


class TestLimits:
    def test_a_large_structure_is_named(self, dataset: Path, tmp_path: Path) -> None:
        rule = r"train-000000\.tar:train-000000-00000\d:\d must have at most 8 atoms \(data\.max_atoms\); got Ar\d?(Ne\d?)?, 9 "
        with pytest.raises(
            DataError, match=rule + r"atoms and about \d+ pairs, and \d+ more like it\. Raise the limit, set data\.over"
        ):
            open_data(make_config(dataset, tmp_path, "data.max_atoms=8"))
        with pytest.raises(DataError, match=r"at most 5 estimated pairs \(data\.max_pairs\); got"):
            open_data(make_config(dataset, tmp_path, "data.max_pairs=5"))
        with pytest.raises(
            DataError, match=r"at most 8 atoms \(data\.max_atoms\) and at most 100 estimated pairs \(data\.max_pairs\)"
        ):
            open_data(make_config(dataset, tmp_path, "data.max_pairs=100", "data.max_atoms=8"))

    def test_only_one(self, tmp_path: Path) -> None:
        graphs = [g for g in make_graphs(20) if g.num_atoms < 9]
        large = next(g for g in make_graphs(20) if g.num_atoms == 9)
        data = write_dataset(tmp_path / "data", {"train": [*graphs[:5], large, *graphs[5:]]})
        with pytest.raises(DataError, match=r"train-000000\.tar:train-000000-000001:1 must .* pairs\. Raise the limit"):
            open_data(make_config(data, tmp_path, "data.max_atoms=8"))

    def test_it_may_be_computed_alone(self, dataset: Path, tmp_path: Path) -> None:
        open_data(make_config(dataset, tmp_path, "data.max_atoms=8", "data.oversized=alone"))

    def test_limits_that_fit(self, dataset: Path, tmp_path: Path) -> None:
        check_sizes(open_data(make_config(dataset, tmp_path, "data.max_atoms=9")), Limits())

    def test_which_ones_apply(self) -> None:
        measured = {"max_atoms": 70, "max_pairs": 900, "num_passes": 3}
        assert find_limits(DataSection(max_atoms=5), measured) == Limits(5, 0)
        assert find_limits(DataSection(find_limits=True), measured) == Limits(70, 900)
        assert find_limits(DataSection(find_limits=True)) == Limits()
