"""Which conformers a run goes through from now on: measured where asked for, agreed on by all processes, written down."""

import dataclasses
from collections.abc import Callable

from so3krates_dist.data.passes import Limits
from so3krates_dist.data.plan import Schedule
from so3krates_dist.distributed import broadcast_text
from so3krates_dist.model.potential import Potential
from so3krates_dist.train import budget, inputs, planning
from so3krates_dist.train.context import RunContext
from so3krates_dist.train.guard import failing_together
from so3krates_dist.train.memory import find_available_bytes
from so3krates_dist.train.probes import collect_probes


@dataclasses.dataclass(frozen=True)
class Settled:
    """What a run follows."""

    schedule: Schedule
    limits: Limits
    """of a micro-batch"""
    record: planning.PlanRecord
    """as it is written in the run folder"""


def settle_plan(
    context: RunContext, record: planning.PlanRecord | None, data_step: int, measured: Callable[[], Potential]
) -> Settled:
    """Find the plan to follow from a step on, and write it down where it is new; all processes come here.

    What has to be measured for it is measured now, once in a run.

    Args:
        context: The run.
        record: The plan so far; None where the run begins.
        data_step: Position in the data.
        measured: Makes a copy of the model, in training mode, whose passes are measured.

    Raises:
        So3kratesError: A conformer is beyond the limits, processes see different data, or the plan cannot be written.
    """
    config, mixture, rank, device = context.config, context.mixture, context.rank, context.device
    data, section = config.data, config.train
    measure_cost = planning.needs_cost(config, record)
    measure_limits = data.find_limits and (record is None or record.limits is None)
    cost = limits = None
    if measure_cost or measure_limits:
        potential = measured()
        with failing_together(device):
            probes = collect_probes(mixture.active, potential.cutoffs)
    if measure_cost:
        cost = budget.fit_cost(potential, probes, section, device, rank)
    with failing_together(device):
        cost_found = cost.to_json() if cost else None
        schedule, settled = planning.build_schedule(config, mixture, record, data_step, cost=cost_found)
        free = find_available_bytes(device, rank) if measure_limits else 0
    if measure_limits:
        conformers = planning.count_conformers(schedule, data_step, rank.world_size)
        limits = budget.find_limits(
            potential, probes, section, device, rank, available_bytes=free, conformers_per_step=conformers
        )
        settled = dataclasses.replace(settled, limits=limits.to_json())
    for line in [*(found.describe() for found in (cost, limits) if found), planning.describe_change(record, settled)]:
        if line:
            context.metrics.message(line)
    applied = inputs.find_limits(data, settled.limits)
    _agree(context, schedule, data_step, applied)
    with failing_together(device):
        if settled != record and rank.is_main:
            planning.write_record(context.folder.path, settled)
    return Settled(schedule, applied, settled)


def _agree(context: RunContext, schedule: Schedule, data_step: int, limits: Limits) -> None:
    """Check that all processes follow the same plan, and that no conformer is beyond the limits."""
    own = planning.identify(schedule, data_step, limits)
    of_main = broadcast_text(own, context.device)
    with failing_together(context.device):
        planning.check_alike(own, of_main, context.rank)
        if context.config.data.oversized == "refuse":
            inputs.check_sizes(context.mixture, limits)
