"""`plan.json` of a run folder: which order of the data a run follows, and what it has taken over from its data.

It is written once, when the run starts, and says everything that the order depends on, so that a run never goes on with another
order unnoticed: when it is resumed, the plan that its settings give is compared with the plan that is written down, field by field.
With `data.rebase=true` a difference begins a new *segment* at the next window: the steps until then are those of the old plan, and
every data set goes on from the block that it has come to. Costs and limits that were measured are written down likewise.

The model's energy baselines and scale stay what they were when the run began, whatever data come later (data/levels.py).
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from so3krates_dist.config import RunConfig
from so3krates_dist.data.levels import Reference
from so3krates_dist.data.mixture import Mixture, Source, open_source
from so3krates_dist.data.passes import Limits
from so3krates_dist.data.plan import Plan, PlanSettings, Schedule, lanes_of_rank
from so3krates_dist.distributed import Rank
from so3krates_dist.errors import CheckpointError, ConfigError, DataError
from so3krates_dist.files import write_text
from so3krates_dist.train.checkpoint import PLAN_NAME, compute_checksum, find_absolute, list_checkpoints

FORMAT: Final = 1
"""Version of the file; a reader refuses a higher one."""

_SETTINGS: Final = {
    "version": "the version of the plan", "sources": "data.folders", "fingerprints": "the fingerprint of each data set",
    "weights": "data.weights", "seed": "run.seed", "pair_cutoff": "the cutoff of the model",
}  # fmt: skip
"""What a field of the plan is called in messages, where that is not `data.<field>`"""

_DERIVED: Final = ("cursors", "slots")
"""Fields that follow from the others"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of a run that follows one plan."""

    first_step: int
    fields: Mapping[str, Any]
    """of `Plan.fields`"""
    locations: tuple[str, ...]
    """of the data sets, when it began"""
    given: Mapping[str, int]
    """by its fingerprint, how many blocks each data set of the run had given before, counted through all its epochs"""
    loss_weights: tuple[float, ...] = ()
    """of each data set in the loss, which no order depends on; empty: 1 for each"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRecord:
    """The content of `plan.json`."""

    reference: Reference
    """what the model has taken over from the data, with what later data have added"""
    segments: tuple[Segment, ...]
    cost: Mapping[str, Any] | None = None
    """coefficients that were measured, and how; None: they were given"""
    limits: Mapping[str, Any] | None = None
    """of a micro-batch, where they were measured"""


def write_record(folder: Path, record: PlanRecord) -> None:
    """Write `plan.json` into a run folder; rank 0 alone.

    Raises:
        CheckpointError: The disk is full or the folder is gone.
    """
    content = {
        "format": FORMAT,
        # Without weights the file is that of earlier versions.
        "segments": [
            {k: v for k, v in dataclasses.asdict(s).items() if v or k != "loss_weights"} for s in record.segments
        ],
        "cost": record.cost,
        "limits": record.limits,
        "reference": record.reference.to_json(),
    }
    content = json.loads(json.dumps(content))  # as it is read
    content["checksum"] = compute_checksum(content)
    try:
        write_text(folder / PLAN_NAME, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        rule, remedy = "find room on a disk that can be written to", "Free some space and start the same command again"
        raise CheckpointError(str(folder / PLAN_NAME), rule, error, remedy) from error


def read_record(folder: Path) -> PlanRecord | None:
    """Read `plan.json` of a run folder; None where there is none.

    Raises:
        CheckpointError: It is damaged, or from a newer version.
    """
    path = folder / PLAN_NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        file_format = int(content["format"])
        if file_format > FORMAT:
            rule = f"have format {FORMAT} or lower"
            raise CheckpointError(str(path), rule, file_format, "Install a newer so3krates-dist")
        segments = tuple(
            Segment(
                first_step=int(s["first_step"]), fields=dict(s["fields"]), locations=tuple(s["locations"]),
                given={str(k): int(v) for k, v in s["given"].items()},
                loss_weights=tuple(map(float, s.get("loss_weights", ()))),
            )
            for s in content["segments"]
        )  # fmt: skip
        if not segments or segments[0].first_step != 0:
            raise ValueError("no segment from step 0 on")
        needed = {"sources", "fingerprints", "cursors"} | {f.name for f in dataclasses.fields(PlanSettings)}
        if missing := sorted({name for s in segments for name in needed - s.fields.keys()}):
            raise KeyError(", ".join(missing))
        if any(len(s.loss_weights) not in (0, len(s.fields["sources"])) for s in segments):
            raise ValueError("loss_weights that are not one for each data set")
        # Earlier versions wrote none. Another digit in a baseline would be trained with, and nobody would see it.
        if content.get("checksum", "") not in ("", compute_checksum(content)):
            raise ValueError("it has been altered")
        return PlanRecord(
            reference=Reference.from_json(content["reference"]), segments=segments, cost=content["cost"],
            limits=content["limits"],
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        got = f"a damaged one ({type(error).__name__}: {error})"
        remedy = "Restore the file, or start anew in another run.folder"
        raise CheckpointError(str(path), "be a plan", got, remedy) from error


def build_settings(config: RunConfig, mixture: Mixture, cost: Mapping[str, Any] | None) -> PlanSettings:
    """Return what the plan of a configuration depends on.

    Args:
        config: Of the run.
        mixture: Its data sets.
        cost: Coefficients that were measured; None: take those of the configuration.
    """
    section, cutoff = config.data, config.model.pair_cutoff
    return PlanSettings(
        weights=mixture.shares, seed=config.run.seed, lanes=section.lanes, window_blocks=section.window_blocks,
        batch_size=section.batch_size, shuffle_shards=section.shuffle_shards,
        # A plan counts in hundredths, and a conformer must cost something.
        cost_per_atom=section.cost_per_atom if cost is None else max(cost["cost_per_atom"], 0.01),
        cost_per_pair=section.cost_per_pair if cost is None else cost["cost_per_pair"],
        pair_cutoff=None if math.isinf(cutoff) else cutoff,
    )  # fmt: skip


def needs_cost(config: RunConfig, record: PlanRecord | None) -> bool:
    """Return whether the coefficients of the cost have to be measured: once in a run."""
    return config.data.fit_cost and (record is None or record.cost is None)


def find_change(config: RunConfig, mixture: Mixture, record: PlanRecord) -> tuple[str, object, object] | None:
    """Compare the plan of a configuration with the one that a run follows.

    Returns:
        The first setting that differs, as it was and as it is; None where the plan is the same.
    """
    if config.data.fit_cost and record.cost is None:
        return "data.fit_cost", False, True
    before = record.segments[-1].fields
    settings = build_settings(config, mixture, record.cost if config.data.fit_cost else None)
    now = Plan(mixture.sources, settings).fields()
    for name in dict.fromkeys([*before, *now]):
        if name not in _DERIVED and before.get(name) != now.get(name):
            return _SETTINGS.get(name, f"data.{name}"), before.get(name), now.get(name)
    weights, wanted = _list_loss_weights(record.segments[-1]), mixture.loss_weights
    return None if weights == wanted else ("data.loss_weights", list(weights), list(wanted))


def _list_loss_weights(segment: Segment) -> tuple[float, ...]:
    return segment.loss_weights or (1.0,) * len(segment.fields["sources"])


def check_plan(config: RunConfig, mixture: Mixture, record: PlanRecord | None) -> None:
    """Check that a run goes on with the order of the data that it has begun with, or that somebody asked for another one.

    Args:
        config: Of the run.
        mixture: Its data sets.
        record: Of the run; None where it begins, or has begun with an earlier version of this package.

    Raises:
        CheckpointError: The run has no plan.
        ConfigError: Settings or data are not those of its plan.
    """
    where = f"run.folder {config.folder}"
    if record is None and not config.data.rebase and (steps := list_checkpoints(config.folder / "checkpoints")):
        raise CheckpointError(
            where, f"hold a {PLAN_NAME}, which says what its steps until {steps[0].name} were made of",
            "none: its order of the data was that of an earlier version",
            "Set data.rebase=true to go on with a new order from the next epoch on, or finish it with the earlier version",
        )  # fmt: skip
    change = None if record is None or config.data.rebase else find_change(config, mixture, record)
    if change is not None:
        name, before, now = change
        raise ConfigError(
            where, f"go on with the plan it has begun with, where {name} is {before}", now,
            "Set it back, or set data.rebase=true to change it from the next window on",
        )  # fmt: skip


def build_schedule(
    config: RunConfig,
    mixture: Mixture,
    record: PlanRecord | None,
    step: int,
    *,
    cost: Mapping[str, Any] | None = None,
) -> tuple[Schedule, PlanRecord]:
    """Return the plans of a run from a step on, and the record of them.

    Args:
        config: Of the run.
        mixture: Its data sets.
        record: Of the run; None where it begins.
        step: Steps done.
        cost: Coefficients that were measured just now.

    Raises:
        DataError: A data set that was left out of the run is needed for the steps that are left of its window, and is not there.
    """
    if record is None:
        return _begin(config, mixture, step, cost)
    record = dataclasses.replace(record, reference=mixture.reference, cost=cost or record.cost)
    if find_change(config, mixture, record) is not None:  # what was planned for later is planned anew
        begun = [s for s in record.segments if s.first_step < step] or record.segments[:1]
        record = dataclasses.replace(record, segments=tuple(begun))
    # Segments that ended before this step are not needed any more, and neither are data sets that only they had.
    current = max(i for i, s in enumerate(record.segments) if s.first_step <= step)
    plans = [(s.first_step, _rebuild(s, config, mixture)) for s in record.segments[current:]]
    if find_change(config, mixture, record) is not None:
        first, given = _find_boundary(record.segments[-1], plans[-1][1], step)
        settings = build_settings(config, mixture, record.cost if config.data.fit_cost else None)
        given |= _find_cursors(record.segments, given, Plan(mixture.sources, settings))
        plan = Plan(mixture.sources, settings, [given[s.fingerprint] for s in mixture.sources])
        plans = [(begin, p) for begin, p in plans if begin < first] + [(first, plan)]
        kept = [s for s in record.segments if s.first_step < first]
        record = dataclasses.replace(record, segments=(*kept, _describe(plan, mixture, first, given)))
    # The first one stands for those that are over.
    return Schedule([(0, plans[0][1]), *plans] if plans[0][0] else plans), record


def _begin(
    config: RunConfig, mixture: Mixture, step: int, cost: Mapping[str, Any] | None
) -> tuple[Schedule, PlanRecord]:
    """Return the first plan of a run; steps that an earlier version has done count as epochs that are over."""
    settings = build_settings(config, mixture, cost)
    plans = [(0, Plan(mixture.sources, settings))]
    segments = [_describe(plans[0][1], mixture, 0, {})]
    if step:
        total = sum(int(s.block_sizes.sum()) for s in mixture.sources)
        epochs = -(-step // -(-total // settings.batch_size))
        given = {s.fingerprint: epochs * len(s.block_sizes) for s in mixture.sources}
        plans.append((step, Plan(mixture.sources, settings, list(given.values()))))
        segments.append(_describe(plans[1][1], mixture, step, given))
    return Schedule(plans), PlanRecord(reference=mixture.reference, segments=tuple(segments), cost=cost)


def _find_boundary(segment: Segment, plan: Plan, step: int) -> tuple[int, dict[str, int]]:
    """Return the first step from a given one on that begins a window, and what each data set has given until then."""
    windows = -(-max(step - segment.first_step, 0) // plan.steps_per_window)
    by_name = plan.cursors_at(windows * plan.steps_per_window)
    own = {s.fingerprint: by_name[s.name] for s in plan.sources}
    return segment.first_step + windows * plan.steps_per_window, dict(segment.given) | own


def _find_cursors(segments: Sequence[Segment], given: Mapping[str, int], plan: Plan) -> dict[str, int]:
    """Return from which block on each data set goes on, by its fingerprint.

    Where its blocks come in another order now, it goes on with its next epoch.

    Args:
        segments: Of the run so far.
        given: Blocks that each data set has given.
        plan: The new one, from the first block on.
    """
    fields, cursors = plan.fields(), dict[str, int]()
    for source in plan.sources:
        cursor, count = given.get(source.fingerprint, 0), len(source.block_sizes)
        orders = [_get_order(s.fields) for s in segments if source.fingerprint in s.fields["fingerprints"]]
        keeps = orders and orders[-1] == _get_order(fields)
        cursors[source.fingerprint] = cursor if keeps else -(-cursor // count) * count
    return cursors


def _get_order(fields: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what the order of a data set's blocks in its epochs depends on."""
    return fields["seed"], fields["shuffle_shards"], fields["version"]


def _describe(plan: Plan, mixture: Mixture, first_step: int, given: Mapping[str, int]) -> Segment:
    locations = tuple(find_absolute(s.location) for s in mixture.sources)
    weights = mixture.loss_weights if any(w != 1 for w in mixture.loss_weights) else ()
    return Segment(first_step=first_step, fields=plan.fields(), locations=locations, given=given, loss_weights=weights)


def _rebuild(segment: Segment, config: RunConfig, mixture: Mixture) -> Plan:
    """Return the plan of a segment; data sets that the configuration has left out since are opened where they were."""
    fields = segment.fields
    sources: list[Source] = []
    names, weights = fields["sources"], _list_loss_weights(segment)
    described = zip(names, fields["fingerprints"], fields["weights"], segment.locations, weights, strict=True)
    for name, fingerprint, share, location, weight in described:
        found = mixture.find(fingerprint)
        if found is None:
            found = open_source(
                location, config.data, config.model, name=name, share=share, reference=mixture.reference
            )
        sources.append(dataclasses.replace(found, name=name, share=share, loss_weight=weight))
    values = {f.name: fields[f.name] for f in dataclasses.fields(PlanSettings)}
    settings = PlanSettings(**values | {"weights": tuple(fields["weights"])})
    plan = Plan(sources, settings, fields["cursors"])
    if plan.fields() != fields:
        wrong = next(n for n, v in plan.fields().items() if fields.get(n) != v)
        remedy = "Restore the file, or install the version that wrote it"
        raise CheckpointError(
            f"{config.folder / PLAN_NAME}", f"have the {wrong} that follows from the rest", fields.get(wrong), remedy
        )
    return plan


def describe_change(before: PlanRecord | None, now: PlanRecord) -> str:
    """Return a line for the log where a new segment has been begun; empty where none was."""
    if before is None or before.segments == now.segments:
        return ""
    old, new = before.segments[-1].fields, now.segments[-1].fields
    names = [n for n in new if n not in _DERIVED and old.get(n) != new[n]]
    changes = ", ".join(f"{_SETTINGS.get(n, f'data.{n}')} {old.get(n)} -> {new[n]}" for n in names)
    weights = [list(_list_loss_weights(r.segments[-1])) for r in (before, now)]
    if weights[0] != weights[1]:
        changes += f"{', ' if changes else ''}data.loss_weights {weights[0]} -> {weights[1]}"
    return f"New plan from step {now.segments[-1].first_step} on: {changes}"


def identify(schedule: Schedule, step: int, limits: Limits) -> str:
    """Return on what processes must agree, or they would wait for each other for ever: where they are in which plan, and limits."""
    plans = ", ".join(f"{first}: {plan.fingerprint}" for first, plan in schedule.segments)
    return f"step {step} of plan {plans}, limits {limits.max_atoms} and {limits.max_pairs}"


def check_alike(own: str, of_main: str, rank: Rank) -> None:
    """Raise `DataError` where a process has another plan than the first one.

    Args:
        own: Of `identify`.
        of_main: That of the first process.
        rank: This process.
    """
    if own != of_main:
        raise DataError(
            f"process {rank.rank}", f"go through the data as process 0 does ({of_main})", own,
            "Give all machines the same data sets, command line and version of this package",
        )  # fmt: skip


def count_conformers(schedule: Schedule, step: int, world_size: int) -> int:
    """Return the most conformers that a process has in a step of the window that a step is in.

    Args:
        schedule: Of the run.
        step: Step.
        world_size: Processes.
    """
    plan, within = schedule.locate(step)
    counts = plan.window(plan.locate(within)[0]).num_conformers()
    lanes = [lanes_of_rank(len(counts), rank, world_size) for rank in range(world_size)]
    return max(int(counts[own.start : own.stop].sum(axis=0).max()) for own in lanes)
