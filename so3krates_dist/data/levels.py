"""One energy scale for data of different levels of theory, and the statistics of several data sets as those of one.

Total energies of two levels of theory differ by hundreds of eV for each atom. A model has one set of energy baselines (one energy
per element), so energies of another level are shifted from their own level's baselines to those of the model, element by element;
what is left, energies of bonds and of interaction, is of the same size at all levels. Data sets of one level have one set of
baselines and are not shifted against each other: differences between them are real. A level that nobody stated is its own.

Forces are not changed. Data without energies need no baselines.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from so3krates_dist.data.manifest import Manifest
from so3krates_dist.data.statistics import MAX_FIT_CONFORMERS as MAX_JOINT_CONFORMERS
from so3krates_dist.data.statistics import BaselineSample
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph

UNKNOWN: Final = "unknown"
"""Level of theory of data whose maker did not state it"""
MAX_FIT_CONFORMERS: Final = 20_000
"""of each data set of a level (of more than ten: fewer), the first with an energy; the stored order is that of a hash"""
_SIMILAR: Final = 1.1
_SIMILAR_ENERGY: Final = 1e-3
"""eV/atom; baselines that are so much worse than a data set's own ones, or by the factor above, still reproduce its energies"""
_MAD_TO_STD: Final = 1.4826

Baselines = Mapping[int, float]
"""eV by atomic number"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """What is known here of one data set."""

    where: str
    """name in messages"""
    level: str
    """of `name_level`"""
    statistics: Mapping[str, Any]
    """of its manifest; keys: data/statistics.py"""
    has_energies: bool
    share: float
    """of the conformers that are trained on"""
    num_conformers: int
    """of its training split"""
    num_force_atoms: int
    """atoms of its training split that have forces"""

    @property
    def baselines(self) -> dict[int, float]:
        """Its own, by atomic number."""
        return {int(z): float(e) for z, e in self.statistics["energy_baselines"].items()}

    def count(self, element: int) -> int:
        """Return its atoms of an element."""
        return int(self.statistics["element_counts"].get(str(element), 0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """What a model has taken over from the first data of its run, and keeps whatever data follow."""

    level: str
    """whose energies are not shifted"""
    baselines: Mapping[str, Baselines]
    """of each level of theory that has been seen"""
    statistics: Mapping[str, Any]
    """combined, in a manifest's form; its `energy_baselines` are the model's"""

    @property
    def energy_baselines(self) -> dict[int, float]:
        """The model's."""
        return {int(z): float(e) for z, e in self.statistics["energy_baselines"].items()}

    def shift(self, level: str) -> dict[int, float] | None:
        """Return what to add to energies of a level for each atom of an element, eV; None: nothing."""
        model = self.energy_baselines
        shift = {z: model[z] - energy for z, energy in self.baselines.get(level, {}).items()}
        return shift if any(shift.values()) else None

    def knows(self, manifest: Manifest) -> bool:
        """Return whether the model has been trained on energies of a data set's level of theory."""
        return name_level(manifest.level_of_theory, manifest.fingerprint) in self.baselines

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        baselines = {level: {str(z): e for z, e in values.items()} for level, values in self.baselines.items()}
        return {"level_of_theory": self.level, "baselines": baselines, "statistics": dict(self.statistics)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Reference":
        """Rebuild from `to_json`."""
        baselines = {
            str(level): {int(z): float(e) for z, e in values.items()} for level, values in content["baselines"].items()
        }
        return cls(level=str(content["level_of_theory"]), baselines=baselines, statistics=dict(content["statistics"]))


def name_level(level_of_theory: str, fingerprint: str) -> str:
    """Return the name under which a data set's level of theory is compared: its text, or that of a level of its own."""
    text = level_of_theory.strip()
    return text if text not in ("", UNKNOWN) else f"{UNKNOWN} ({fingerprint})"


def check_levels(members: Sequence[Member], known: Reference | None) -> None:
    """Raise `DataError` where levels of theory differ and a data set has energies without baselines.

    Args:
        members: Data sets that are trained on together.
        known: Of the run, where it has begun.
    """
    with_energies = [m for m in members if m.has_energies]
    levels = {m.level for m in with_energies} | ({known.level} if known and known.baselines else set())
    if len(levels) < 2:
        return
    for member in with_energies:
        if not any(member.baselines.values()):
            other = next((f"{m.where} ({m.level})" for m in with_energies if m.level != member.level), "the run")
            raise DataError(
                member.where, f"have energy baselines to be trained on together with {other}",
                f"none at another level of theory ({member.level})",
                "Convert it again, with the same --level-of-theory where that is true",
            )  # fmt: skip


def build_reference(
    members: Sequence[Member], samples: Sequence[Iterator[Graph]], known: Reference | None = None
) -> Reference:
    """Find one set of baselines for each level of theory and one for the model, and combine the statistics.

    The model's baselines are those of the level whose data are trained on most; for elements that these lack, those of the level
    with the most atoms of the element. All that a run has begun with stays as it is.

    Args:
        members: Data sets, checked by `check_levels`.
        samples: Training conformers of each, to be read only where a level has several data sets.
        known: Of the run, where it has begun.
    """
    by_level: dict[str, list[int]] = {}
    for number, member in enumerate(members):
        if member.has_energies:
            by_level.setdefault(member.level, []).append(number)
    baselines = {level: dict(values) for level, values in known.baselines.items()} if known else {}
    for level, numbers in by_level.items():
        own, earlier = [members[i] for i in numbers], baselines.get(level, {})
        complete = earlier.keys() >= {z for m in own for z in m.baselines}
        found = {} if complete else _find_baselines(own, [samples[i] for i in numbers])
        baselines[level] = dict(sorted((found | earlier).items()))
    shares = {level: sum(members[i].share for i in numbers) for level, numbers in by_level.items()}
    level = known.level if known else max(shares, key=lambda name: shares[name], default=members[0].level)
    model = known.energy_baselines if known else dict(baselines.get(level, {}))
    for element in sorted({z for m in members for z in m.statistics["elements"]} - model.keys()):
        model[element] = _take_baseline(element, members, baselines)
    statistics = combine_statistics(members, model, known.statistics if known else None)
    return Reference(level=level, baselines=baselines, statistics=statistics)


def _take_baseline(element: int, members: Sequence[Member], baselines: Mapping[str, Baselines]) -> float:
    """Return an element's baseline at the level of the data set that has most of it, with energies if there is one."""
    most = max(members, key=lambda m: (m.has_energies, m.count(element)))
    return baselines.get(most.level, most.baselines).get(element, 0.0)


def _find_baselines(members: Sequence[Member], samples: Sequence[Iterator[Graph]]) -> dict[int, float]:
    """Return baselines for all data sets of one level.

    Each element's is that of the data set with the most atoms of it, where these together reproduce the energies of every data set
    about as well as its own do: fits to different molecules may share out the energy of a bond differently among its elements.
    Otherwise they are fitted anew to the first `MAX_FIT_CONFORMERS` conformers of each data set, as robustly as each set's own.
    """
    elements = sorted({z for m in members for z in m.baselines})
    picked = {z: max(members, key=lambda m: m.count(z)).baselines.get(z, 0.0) for z in elements}
    if len(members) == 1 or all(m.baselines == picked for m in members):
        return picked
    most = min(MAX_FIT_CONFORMERS, MAX_JOINT_CONFORMERS // len(members))
    joint, own = BaselineSample(), [BaselineSample() for _ in members]
    for graphs, sample in zip(samples, own, strict=True):
        labelled = ((g, g.energy) for g in graphs if g.energy is not None)
        for graph, energy in itertools.islice(labelled, most):
            joint.add(graph.atomic_numbers, energy, graph.total_charge)
            sample.add(graph.atomic_numbers, energy, graph.total_charge)
    if all(_reproduces(picked, m.baselines, s) for m, s in zip(members, own, strict=True) if len(s)):
        return picked
    isolated: dict[int, float] = {}
    for member in members:
        energies = member.statistics.get("isolated_atom_energies") or {}
        isolated |= {int(z): float(e) for z, e in energies.items() if int(z) not in isolated}
    fitted, _ = joint.fit(isolated or None, elements)
    # The order in which a BLAS adds numbers must not show.
    return {z: float(f"{e:.12g}") for z, e in fitted.items()}


def _reproduces(baselines: Baselines, own: Baselines, sample: BaselineSample) -> bool:
    """Return whether baselines are about as close to energies as a data set's own ones are."""

    def misfit(values: Baselines) -> float:
        return _MAD_TO_STD * float(np.median(np.abs(sample.compute_residuals(values))))

    return misfit(baselines) <= _SIMILAR * misfit(own) + _SIMILAR_ENERGY


# ------------------------------------------------------------------------------------------------------------- statistics


def combine_statistics(
    members: Sequence[Member], baselines: Baselines, known: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the statistics of a mixture in the form of a manifest's.

    Means are those over the conformers that training sees: each data set counts with its share. Numbers of atoms, charges and
    spins are added up.

    Args:
        members: Data sets.
        baselines: The model's, eV by atomic number.
        known: Of the run, where it has begun: scales, neighbours and baselines that the model has do not change any more.
    """
    if len(members) == 1 and known is None:
        return dict(members[0].statistics)
    all_statistics = [m.statistics for m in members]
    elements = sorted({z for s in all_statistics for z in s["elements"]} | set(known["elements"] if known else ()))
    content: dict[str, Any] = {
        "elements": elements,
        "element_counts": _add_counts(all_statistics, "element_counts"),
        "energy_baselines": {str(z): e for z, e in sorted(baselines.items())},
        "isolated_atom_energies": None,
        "energy_residual_std_per_atom": _average(members, "energy_residual_std_per_atom", squared=True),
        "num_atoms": _combine_sizes(members),
        "mean_neighbors": _combine_neighbors(members),
        "num_periodic": sum(s.get("num_periodic", 0) for s in all_statistics),
        **_combine_forces(members),
    }
    for name in ("total_charges", "num_unpaired_electrons"):  # older manifests do not have them
        if all(name in s for s in all_statistics):
            content[name] = _add_counts(all_statistics, name)
    if known:
        kept = ("energy_residual_std_per_atom", "mean_neighbors", "force_rms")
        content |= {name: known[name] for name in kept if name in known}
        for name in ("total_charges", "num_unpaired_electrons"):  # what the model has seen, it has seen
            if name in content and name in known:
                content[name] = dict.fromkeys(known[name], 0) | content[name]
    return content


def _add_counts(statistics: Sequence[Mapping[str, Any]], name: str) -> dict[str, int]:
    total = Counter[str]()
    for content in statistics:
        total.update(content[name])
    return dict(sorted(total.items()))


def _average(members: Sequence[Member], name: str, *, squared: bool = False) -> float | None:
    """Return the mean over conformers (or the root of the mean of squares) of a number that some data sets lack."""
    there = [m for m in members if m.statistics.get(name) is not None and m.share]
    if not there:
        return None
    power = 2 if squared else 1
    total = math.fsum(m.share for m in there)
    mean = math.fsum(m.share * m.statistics[name] ** power for m in there) / total
    return math.sqrt(mean) if squared else mean


def _combine_sizes(members: Sequence[Member]) -> dict[str, float]:
    sizes = [m.statistics["num_atoms"] for m in members]
    total = math.fsum(m.share for m in members)
    mean = math.fsum(m.share * s["mean"] for m, s in zip(members, sizes, strict=True)) / total
    return {"min": min(s["min"] for s in sizes), "mean": mean, "max": max(s["max"] for s in sizes)}


def _combine_neighbors(members: Sequence[Member]) -> dict[str, float]:
    """Average the neighbour counts, which are means over conformers, at the cutoffs that all data sets have."""
    tables = [m.statistics["mean_neighbors"] for m in members]
    cutoffs = [c for c in tables[0] if all(c in t for t in tables)]
    if not cutoffs:
        raise DataError(
            members[1].where, f"count neighbours at a cutoff at which {members[0].where} does", ", ".join(tables[1]),
            "Convert both again",
        )  # fmt: skip
    total = math.fsum(m.share for m in members)
    return {c: math.fsum(m.share * t[c] for m, t in zip(members, tables, strict=True)) / total for c in cutoffs}


def _combine_forces(members: Sequence[Member]) -> dict[str, Any]:
    """Combine mean squares of force components; each data set counts with the atoms with forces that training sees of it."""
    there = [m for m in members if m.statistics["force_rms"] is not None and m.num_force_atoms and m.share]
    if not there:
        return {"force_rms": None, "force_rms_per_element": None, "max_force": None}
    draws = [m.share / m.num_conformers for m in there]
    weights = [d * m.num_force_atoms for d, m in zip(draws, there, strict=True)]
    squares = [w * m.statistics["force_rms"] ** 2 for w, m in zip(weights, there, strict=True)]
    per_element: dict[str, float] = {}
    for element in sorted({z for m in there for z in m.statistics["force_rms_per_element"]}, key=int):
        own = [(d * m.count(int(element)), m) for d, m in zip(draws, there, strict=True)]
        own = [(w, m) for w, m in own if element in m.statistics["force_rms_per_element"]]
        total = math.fsum(w for w, _ in own)
        mean = math.fsum(w * m.statistics["force_rms_per_element"][element] ** 2 for w, m in own) / total
        per_element[element] = math.sqrt(mean)
    return {
        "force_rms": math.sqrt(math.fsum(squares) / math.fsum(weights)),
        "force_rms_per_element": per_element,
        "max_force": max(m.statistics["max_force"] for m in there),
    }
