"""plan.json: a run goes on with the order of its data, or changes it at the end of a window and says so."""

import dataclasses
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from analytic import write_dataset
from training_setup import make_config, make_dataset, make_graphs

from so3krates_dist.config import RunConfig
from so3krates_dist.data import stream as stream_module
from so3krates_dist.data.mixture import Mixture
from so3krates_dist.data.plan import Plan, Schedule
from so3krates_dist.data.stream import TrainingStream
from so3krates_dist.errors import CheckpointError, ConfigError, DataError
from so3krates_dist.train import planning
from so3krates_dist.train.planning import (
    PlanRecord,
    build_schedule,
    check_plan,
    count_conformers,
    describe_change,
    find_change,
    needs_cost,
    read_record,
    write_record,
)

EMPTY_SEGMENT: dict[str, object] = {"first_step": 0, "fields": {}, "locations": [], "given": {}}
COST = {"cost_per_atom": 7.0, "cost_per_pair": 1.0, "num_passes": 3}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets of 40, 24 and 20 conformers, in blocks of four."""
    folder = tmp_path_factory.mktemp("planning")
    for name, count, seed in (("a", 40, 0), ("b", 24, 500), ("c", 20, 900)):
        write_dataset(folder / name, {"train": make_graphs(count, seed)}, name=name)
    return folder


def configure(*folders: Path, more: tuple[str, ...] = ()) -> RunConfig:
    names = f"data.folders=[{','.join(map(str, folders))}]"
    small = ("data.batch_size=2", "data.lanes=2", "data.window_blocks=4")
    return make_config("''", "run", names, *small, *more)


def begin(*folders: Path, more: tuple[str, ...] = ()) -> tuple[Schedule, PlanRecord]:
    config = configure(*folders, more=more)
    return build_schedule(config, Mixture.open(config.data, config.model), None, 0)


def go_on(
    record: PlanRecord, step: int, *folders: Path, more: tuple[str, ...] = ()
) -> tuple[Schedule, PlanRecord, RunConfig]:
    config = configure(*folders, more=more)
    mixture = Mixture.open(config.data, config.model, record.reference)
    return *build_schedule(config, mixture, record, step), config


def list_conformers(schedule: Schedule, first: int, last: int) -> list[tuple[str, int, int]]:
    """Return the conformers of some steps, each as its data set, block and place in the block."""
    found = []
    for step in range(first, last):
        plan, within = schedule.locate(step)
        number, slot = plan.locate(within)
        window = plan.window(number)
        for row in window.rows_of_lanes(range(window.num_lanes), slot).tolist():
            name = plan.sources[int(window.source[row])].name
            found.append((name, int(window.block[row]), int(window.index[row])))
    return found


def assert_even(schedule: Schedule, last: int) -> None:
    """Assert that until a step that begins a window, conformers of a data set were given equally often, to within one."""
    counts = Counter(list_conformers(schedule, 0, last))
    for plan in {id(p): p for _, p in schedule.segments}.values():
        for source in plan.sources:
            own = [
                counts[source.name, block, index]
                for block, size in enumerate(source.block_sizes.tolist())
                for index in range(size)
            ]
            assert max(own) - min(own) <= 1, (source.name, own)


# ------------------------------------------------------------------------------------------------------------ the file


class TestFile:
    def test_what_was_written_is_read(self, root: Path, tmp_path: Path) -> None:
        _, record = begin(root / "a", root / "b")
        assert read_record(tmp_path) is None
        measured = dataclasses.replace(record, cost=COST, limits={"max_atoms": 10, "max_pairs": 0})
        for content in (record, measured):
            write_record(tmp_path, content)
            assert read_record(tmp_path) == content

    def test_it_says_what_the_order_depends_on(self, root: Path, tmp_path: Path) -> None:
        schedule, record = begin(root / "a", root / "b", more=("data.weights=[0.25,0.75]",))
        write_record(tmp_path, record)
        (segment,) = json.loads((tmp_path / "plan.json").read_text())["segments"]
        fields = segment["fields"]
        assert (fields["sources"], fields["weights"], fields["lanes"]) == (["a", "b"], [0.25, 0.75], 2)
        assert segment["locations"] == [str(root / "a"), str(root / "b")]
        assert schedule.segments[0][1].fields() == fields

    @pytest.mark.parametrize(
        ("text", "finding"),
        [
            ("", "JSONDecodeError"), ("[]", "TypeError"), ("{}", "KeyError: 'format'"), ('{"format": 1}', "KeyError: 'segments'"),
            ('{"format": 1, "segments": []}', "ValueError: no segment from step 0 on"), ('{"format": "x"}', "ValueError"),
            ('{"format": 1, "segments": [3]}', "TypeError"),
            (json.dumps({"format": 1, "segments": [EMPTY_SEGMENT]}), "KeyError: 'batch_size, "),
        ],
    )  # fmt: skip
    def test_damage(self, tmp_path: Path, text: str, finding: str) -> None:
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(
            CheckpointError, match=rf"plan\.json must be a plan; got a damaged one \({finding}.*\)\. Restore the"
        ):
            read_record(tmp_path)

    def test_weights_in_the_loss(self, root: Path, tmp_path: Path) -> None:
        """Without any, the file is that of earlier versions; they are on the way of no order."""
        plain, record = begin(root / "a", root / "b")
        write_record(tmp_path, record)
        (segment,) = json.loads((tmp_path / "plan.json").read_text())["segments"]
        assert set(segment) == {"first_step", "fields", "locations", "given"}
        schedule, record = begin(root / "a", root / "b", more=("data.loss_weights=[0.5,2]",))
        assert schedule.segments[0][1].fingerprint == plain.segments[0][1].fingerprint
        write_record(tmp_path, record)
        assert read_record(tmp_path) == record
        assert record.segments[0].loss_weights == (0.5, 2.0)
        content = json.loads((tmp_path / "plan.json").read_text())
        content["segments"][0]["loss_weights"] = [0.5]
        (tmp_path / "plan.json").write_text(json.dumps(content))
        with pytest.raises(
            CheckpointError, match=r"ValueError: loss_weights that are not one for each data set\)\. Restore"
        ):
            read_record(tmp_path)

    def test_another_digit_anywhere_is_found(self, root: Path, tmp_path: Path) -> None:
        """A baseline with another digit would be trained with. Files of earlier versions have no checksum."""
        write_record(tmp_path, begin(root / "a")[1])
        path = tmp_path / "plan.json"
        text = path.read_text()
        content = json.loads(text)
        del content["checksum"]
        path.write_text(json.dumps(content))
        assert read_record(tmp_path) == begin(root / "a")[1]
        digits = [m.start() for m in re.finditer("[0-9]", text)]
        for place in digits[:: len(digits) // 20]:
            path.write_text(f"{text[:place]}{(int(text[place]) + 1) % 10}{text[place + 1 :]}")
            with pytest.raises(CheckpointError, match=r"got a damaged one|format 1 or lower"):
                read_record(tmp_path)

    def test_the_future(self, tmp_path: Path) -> None:
        (tmp_path / "plan.json").write_text('{"format": 2}')
        with pytest.raises(CheckpointError, match=r"plan\.json must have format 1 or lower; got 2\. Install a newer"):
            read_record(tmp_path)

    def test_fields_that_contradict_each_other(self, root: Path) -> None:
        _, record = begin(root / "a")
        fields = {**record.segments[0].fields, "slots": 3}
        altered = dataclasses.replace(record, segments=(dataclasses.replace(record.segments[0], fields=fields),))
        with pytest.raises(
            CheckpointError, match=r"plan\.json must have the slots that follows from the rest; got 3\. Restore"
        ):
            go_on(altered, 0, root / "a")


# -------------------------------------------------------------------------------------------------------- what is compared


class TestChanges:
    @pytest.mark.parametrize(
        ("more", "name", "before", "now"),
        [
            ("data.lanes=4", "data.lanes", 2, 4),
            ("data.batch_size=3", "data.batch_size", 2, 3),
            ("data.window_blocks=5", "data.window_blocks", 4, 5),
            ("data.shuffle_shards=1", "data.shuffle_shards", 0, 1),
            ("data.cost_per_atom=2.5", "data.cost_per_atom", 3.0, 2.5),
            ("data.cost_per_pair=0", "data.cost_per_pair", 1.0, 0.0),
            ("data.weights=[0.5,0.5]", "data.weights", [0.625, 0.375], [0.5, 0.5]),
            ("data.temperature=1e9", "data.weights", [0.625, 0.375], [0.5, 0.5]),
            ("data.fit_cost=true", "data.fit_cost", False, True),
            ("data.loss_weights=[1,2]", "data.loss_weights", [1.0, 1.0], [1.0, 2.0]),
            ("run.seed=1", "run.seed", 0, 1),
        ],
    )
    def test_every_setting_is_named(self, root: Path, more: str, name: str, before: object, now: object) -> None:
        folders = (root / "a", root / "b")
        _, record = begin(*folders)
        config = configure(*folders, more=(more,))
        mixture = Mixture.open(config.data, config.model)
        found = find_change(config, mixture, record)
        assert found is not None
        assert found == (name, before, pytest.approx(now, abs=1e-8) if isinstance(now, list) else now)
        with pytest.raises(
            ConfigError, match=r"must go on with the plan it has begun with, where .* is .*; got .*\. Set it back"
        ):
            check_plan(config, mixture, record)
        check_plan(configure(*folders, more=(more, "data.rebase=true")), mixture, record)

    def test_every_setting_of_the_plan_is_compared(self) -> None:
        """A setting that is added to the plan is one that a run must not change unnoticed."""
        compared = {
            "lanes",
            "batch_size",
            "window_blocks",
            "shuffle_shards",
            "cost_per_atom",
            "cost_per_pair",
            "weights",
            "seed",
            "pair_cutoff",
        }
        assert {f.name for f in dataclasses.fields(planning.PlanSettings)} == compared

    def test_what_the_sizes_of_conformers_depend_on(self, root: Path) -> None:
        """Another cutoff fills the steps otherwise: it must show in the fingerprint."""
        plans = []
        for cutoff in (4.0, 5.5):
            schedule, record = begin(root / "a", more=(f"model.cutoff={cutoff}",))
            assert record.segments[0].fields["pair_cutoff"] == cutoff
            plans.append(schedule.segments[0][1])
        assert plans[0].fingerprint != plans[1].fingerprint
        _, record = begin(root / "a", more=("model.name=so3lr",))
        assert "pair_cutoff" in json.loads(json.dumps(record.segments[0].fields, allow_nan=False))

    @pytest.mark.parametrize(
        ("others", "name"), [(("b", "a"), "data.folders"), (("a",), "data.folders"), (("a", "b", "c"), "data.folders")]
    )
    def test_other_data(self, root: Path, others: tuple[str, ...], name: str) -> None:
        _, record = begin(root / "a", root / "b")
        config = configure(*(root / n for n in others))
        assert (find_change(config, Mixture.open(config.data, config.model), record) or ("",))[0] == name

    def test_the_same_name_with_other_bytes(self, root: Path, tmp_path: Path) -> None:
        _, record = begin(root / "a")
        write_dataset(tmp_path / "a", {"train": make_graphs(40, 1)}, name="a")
        config = configure(tmp_path / "a")
        found = find_change(config, Mixture.open(config.data, config.model), record)
        assert found is not None
        assert found[0] == "the fingerprint of each data set"

    def test_data_may_move(self, root: Path, tmp_path: Path) -> None:
        schedule, record = begin(root / "a")
        shutil.copytree(root / "a", tmp_path / "elsewhere")
        later, again, _ = go_on(record, 7, tmp_path / "elsewhere")
        assert again == record
        assert list_conformers(later, 0, 30) == list_conformers(schedule, 0, 30)

    @pytest.mark.parametrize("folder", ["data.folder", "data.folders"])
    def test_how_one_data_set_is_named_does_not_matter(self, root: Path, folder: str) -> None:
        _, record = begin(root / "a")
        config = configure(root / "a")
        data = dataclasses.replace(config.data, folder=str(root / "a"), folders=())
        config = dataclasses.replace(config, data=data) if folder == "data.folder" else config
        check_plan(config, Mixture.open(config.data, config.model), record)


class TestEarlierVersions:
    """Their run folders have no plan."""

    def save(self, folder: Path) -> None:
        (folder / "checkpoints" / "step_00000007").mkdir(parents=True)

    def test_a_run_that_has_done_steps_is_refused(self, root: Path, tmp_path: Path) -> None:
        config = configure(root / "a", more=(f"run.folder={tmp_path}",))
        mixture = Mixture.open(config.data, config.model)
        check_plan(config, mixture, None)
        self.save(tmp_path)
        with pytest.raises(
            CheckpointError,
            match=r"must hold a plan\.json, which says what its steps until step_00000007 were made of; got none: .* version\."
            r" Set data\.rebase=true to go on with a new order from the next epoch on, or finish it with the earlier version\.",
        ):
            check_plan(config, mixture, None)
        check_plan(configure(root / "a", more=(f"run.folder={tmp_path}", "data.rebase=true")), mixture, None)

    def test_it_goes_on_with_the_next_epoch(self, root: Path) -> None:
        """Forty conformers in steps of two: step 27 is in the second epoch."""
        config = configure(root / "a")
        schedule, record = build_schedule(config, Mixture.open(config.data, config.model), None, 27)
        plan, within = schedule.locate(27)
        assert (within, plan.epochs(0)) == (0, (2.0,))
        assert [s.first_step for s in record.segments] == [0, 27]
        found = Counter(list_conformers(schedule, 27, 27 + plan.windows_per_epoch * plan.steps_per_window))
        assert len(found) == 40
        assert set(found.values()) == {1}
        again, same, _ = go_on(record, 30, root / "a")
        assert same == record
        assert list_conformers(again, 30, 50) == list_conformers(schedule, 30, 50)


# ---------------------------------------------------------------------------------------------------------------- rebase


class TestRebase:
    def test_resuming_changes_nothing(self, root: Path) -> None:
        schedule, record = begin(root / "a", root / "b")
        for step in (0, 1, 17, 40):
            again, same, _ = go_on(record, step, root / "a", root / "b", more=("data.rebase=true",))
            assert same == record
            assert list_conformers(again, step, step + 20) == list_conformers(schedule, step, step + 20)
        assert describe_change(record, same) == ""
        assert describe_change(None, same) == ""

    @pytest.mark.parametrize(
        "more",
        ["data.lanes=4", "data.batch_size=3", "data.window_blocks=3", "data.weights=[0.5,0.5]", "data.cost_per_pair=2"],
    )
    def test_other_settings_from_the_next_window_on(self, root: Path, more: str) -> None:
        before, record = begin(root / "a", root / "b")
        length = before.segments[0][1].steps_per_window
        step = 2 * length + 1
        schedule, new, _ = go_on(record, step, root / "a", root / "b", more=(more,))
        assert [s.first_step for s in new.segments] == [0, 3 * length]
        assert list_conformers(schedule, 0, 3 * length) == list_conformers(before, 0, 3 * length)
        plan = schedule.segments[-1][1]
        assert plan.fields() != record.segments[0].fields
        assert_even(schedule, 3 * length + 2 * plan.steps_per_window)
        key, _, value = more.partition("=")
        assert f"New plan from step {3 * length} on: {key} " in describe_change(record, new)
        assert f" -> {value.replace(',', ', ')}" in describe_change(record, new)

    def test_other_weights_in_the_loss(self, root: Path) -> None:
        """From the next window on; the steps until then count as they did, and no conformer comes more often."""
        more = ("data.loss_weights=[0.5,2]",)
        before, record = begin(root / "a", root / "b", more=more)
        length = before.segments[0][1].steps_per_window
        schedule, new, _ = go_on(record, length + 1, root / "a", root / "b", more=("data.loss_weights=[1,3]",))
        assert [(s.first_step, s.loss_weights) for s in new.segments] == [(0, (0.5, 2.0)), (2 * length, (1.0, 3.0))]
        assert [[s.loss_weight for s in plan.sources] for _, plan in schedule.segments] == [[0.5, 2.0], [1.0, 3.0]]  # type: ignore[attr-defined]
        assert list_conformers(schedule, 0, 2 * length) == list_conformers(before, 0, 2 * length)
        assert_even(schedule, 4 * length)
        line = f"New plan from step {2 * length} on: data.loss_weights [0.5, 2.0] -> [1.0, 3.0]"
        assert describe_change(record, new) == line
        _, again, _ = go_on(new, 3 * length, root / "a", root / "b")
        assert again.segments[-1].loss_weights == (), "1 for each"

    def test_data_may_join_and_leave_a_run_with_weights_in_the_loss(self, root: Path) -> None:
        before, record = begin(root / "a", root / "b", more=("data.loss_weights=[0.5,2]",))
        length = before.segments[0][1].steps_per_window
        schedule, new, _ = go_on(record, 1, root / "c", root / "b", more=("data.loss_weights=[4,2]",))
        # The set that has left is opened where it was, and counts as it did.
        found = [[(s.name, s.loss_weight) for s in plan.sources] for _, plan in schedule.segments]  # type: ignore[attr-defined]
        assert found == [[("a", 0.5), ("b", 2.0)], [("c", 4.0), ("b", 2.0)]]
        assert [s.first_step for s in new.segments] == [0, length]
        changes = describe_change(record, new)
        assert "data.folders ['a', 'b'] -> ['c', 'b']" in changes
        assert changes.endswith(", data.loss_weights [0.5, 2.0] -> [4.0, 2.0]")

    @pytest.mark.parametrize("more", ["run.seed=5", "data.shuffle_shards=2"])
    def test_blocks_in_another_order_begin_with_an_epoch(self, root: Path, more: str) -> None:
        before, record = begin(root / "a", root / "b")
        step = before.segments[0][1].steps_per_window
        schedule, record, _ = go_on(record, step, root / "a", root / "b", more=(more,))
        assert schedule.segments[-1][1].cursors == (10, 6), "of ten and six blocks"
        assert set(record.segments[-1].given.values()) == {10, 6}

    def test_it_goes_on_from_its_record(self, root: Path, tmp_path: Path) -> None:
        _, record = begin(root / "a", root / "b")
        more = ("data.lanes=4",)
        schedule, new, _ = go_on(record, 9, root / "a", root / "b", more=more)
        write_record(tmp_path, new)
        stored = read_record(tmp_path)
        assert stored is not None
        boundary = new.segments[-1].first_step
        for step in (0, 5, 9, boundary - 1, boundary, boundary + 3):
            later, same, _ = go_on(stored, step, root / "a", root / "b", more=more)
            assert same == stored
            assert list_conformers(later, step, step + 30) == list_conformers(schedule, step, step + 30)

    def test_data_sets_come_and_go(self, root: Path) -> None:
        """One that comes back goes on where it was."""
        first, record = begin(root / "a", root / "b")
        schedule, record, _ = go_on(record, 1, root / "b", root / "c")
        one = record.segments[-1].first_step
        assert list_conformers(schedule, 0, one) == list_conformers(first, 0, one)
        second = schedule.segments[-1][1]
        schedule, record, _ = go_on(record, one + 1, root / "a", root / "c")
        two = record.segments[-1].first_step
        assert two == one + second.steps_per_window
        third = schedule.segments[-1][1]
        given = [first.segments[0][1].cursors_at(one), second.cursors_at(two - one)]
        assert third.cursors == (given[0]["a"], given[1]["c"])
        by_fingerprint = {s.fingerprint: s.name for p in (first.segments[0][1], third) for s in p.sources}
        assert {by_fingerprint[f]: n for f, n in record.segments[-1].given.items()} == given[0] | given[1]
        assert third.cursors[0] > 0
        names = {name for name, _, _ in list_conformers(schedule, two, two + third.steps_per_window)}
        assert names == {"a", "c"}

    def test_a_change_that_has_not_begun_is_replaced(self, root: Path) -> None:
        before, record = begin(root / "a", root / "b")
        length = before.segments[0][1].steps_per_window
        _, record, _ = go_on(record, 1, root / "a", root / "b", more=("data.lanes=4",))
        schedule, record, _ = go_on(record, 2, root / "a", root / "b", more=("data.lanes=6",))
        assert [(s.first_step, s.fields["lanes"]) for s in record.segments] == [(0, 2), (length, 6)]
        assert list_conformers(schedule, 2, length) == list_conformers(before, 2, length)
        _, record, _ = go_on(record, 3, root / "a", root / "b")
        assert [(s.first_step, s.fields["lanes"]) for s in record.segments] == [(0, 2)], "nothing has changed"

    def test_before_the_first_step(self, root: Path) -> None:
        _, record = begin(root / "a")
        schedule, record, _ = go_on(record, 0, root / "a", root / "b")
        (segment,) = record.segments
        assert segment.fields["sources"] == ["a", "b"]
        assert schedule.segments[0][1].cursors == (0, 0)

    def test_a_data_set_that_is_gone_is_needed_until_its_window_ends(self, root: Path, tmp_path: Path) -> None:
        shutil.copytree(root / "a", tmp_path / "a")
        first, record = begin(tmp_path / "a")
        length = first.segments[0][1].steps_per_window
        _, changed, _ = go_on(record, length + 1, root / "b")
        shutil.rmtree(tmp_path / "a")
        with pytest.raises(DataError, match=r"a must hold a manifest\.json; got no such file"):
            go_on(changed, length + 1, root / "b")
        schedule, same, _ = go_on(changed, 2 * length, root / "b")
        assert same == changed
        assert {name for name, _, _ in list_conformers(schedule, 2 * length, 2 * length + 5)} == {"b"}

    @pytest.mark.parametrize("max_kept_atoms", [stream_module.MAX_KEPT_ATOMS, 0])
    def test_processes_that_the_old_lanes_do_not_divide_among(
        self, root: Path, monkeypatch: pytest.MonkeyPatch, max_kept_atoms: int
    ) -> None:
        """Three processes: a window that was begun with two lanes is finished by two of them."""
        monkeypatch.setattr(stream_module, "MAX_KEPT_ATOMS", max_kept_atoms)
        folders = (root / "a", root / "b")
        first, record = begin(*folders)
        schedule, _, config = go_on(record, 1, *folders, more=("data.lanes=3",))
        config.check_world_size(3)
        streams = [TrainingStream(schedule, config, rank, 3) for rank in range(3)]
        length = first.segments[0][1].steps_per_window
        for step in range(1, length + 5):
            counts = [sum(batch.num_graphs for batch in stream[step].batches) for stream in streams]
            assert sum(counts) == len(list_conformers(schedule, step, step + 1))
            assert step >= length or counts[0] == 0


class TestMeasuredCost:
    def test_once_in_a_run(self, root: Path) -> None:
        config = configure(root / "a", more=("data.fit_cost=true",))
        assert needs_cost(config, None)
        mixture = Mixture.open(config.data, config.model)
        schedule, record = build_schedule(config, mixture, None, 0, cost=COST)
        assert schedule.segments[0][1].fields()["cost_per_atom"] == 7.0
        assert not needs_cost(config, record)
        again, same = build_schedule(config, mixture, record, 3)
        assert same == record
        assert list_conformers(again, 0, 20) == list_conformers(schedule, 0, 20)

    def test_measuring_later_is_a_change(self, root: Path) -> None:
        _, record = begin(root / "a")
        config = configure(root / "a", more=("data.fit_cost=true",))
        assert needs_cost(config, record)
        mixture = Mixture.open(config.data, config.model, record.reference)
        assert find_change(config, mixture, record) == ("data.fit_cost", False, True)
        _, record = build_schedule(config, mixture, record, 1, cost=COST)
        assert record.cost == COST
        assert [s.fields["cost_per_atom"] for s in record.segments] == [3.0, 7.0]

    def test_giving_them_later_is_a_change(self, root: Path) -> None:
        config = configure(root / "a", more=("data.fit_cost=true",))
        mixture = Mixture.open(config.data, config.model)
        _, record = build_schedule(config, mixture, None, 0, cost=COST)
        assert find_change(configure(root / "a"), mixture, record) == ("data.cost_per_atom", 7.0, 3.0)
        assert find_change(configure(root / "a", more=("data.cost_per_atom=7",)), mixture, record) is None

    def test_atoms_that_cost_next_to_nothing_cost_something(self, root: Path) -> None:
        config = configure(root / "a", more=("data.fit_cost=true",))
        cost = {"cost_per_atom": 0.0001, "cost_per_pair": 1.0}
        schedule, _ = build_schedule(config, Mixture.open(config.data, config.model), None, 0, cost=cost)
        assert schedule.segments[0][1].fields()["cost_per_atom"] == 0.01


def test_the_most_conformers_of_a_process(root: Path) -> None:
    schedule, _ = begin(root / "a", more=("data.batch_size=16", "data.lanes=4"))
    plan = schedule.segments[0][1]
    assert isinstance(plan, Plan)
    counts = plan.window(0).num_conformers()
    assert count_conformers(schedule, 0, 4) == counts.max()
    assert count_conformers(schedule, 0, 1) == counts.sum(axis=0).max()
    assert count_conformers(schedule, 0, 2) == np.maximum(counts[:2].sum(0), counts[2:].sum(0)).max()


def test_data_sets_with_validation_alone_do_not_disturb(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", num_train=12)
    schedule, _ = begin(tmp_path / "data")
    plan = schedule.segments[0][1]
    found = list_conformers(schedule, 0, plan.windows_per_epoch * plan.steps_per_window)
    assert len(found) == len(set(found)) == 12
