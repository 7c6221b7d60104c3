"""Charts of a survey: histograms and bars, drawn with matplotlib's object interface. Reads numbers, computes none.

Counts are on a logarithmic scale: what is there once in a million is what one looks for.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from data_tools.drawing import BLUE, GREY, VERMILLION, make_plain
from data_tools.survey import NEIGHBOR_CUTOFF, Histogram, Outlier, Survey
from so3krates_dist.graph import ELEMENT_SYMBOLS, compute_formula

_MAX_BARS: Final = 14


def draw_histograms(figure: Any, survey: Survey) -> None:
    """Draw six panels: energies, forces, sizes; neighbours, elements, charges and spins.

    Args:
        figure: matplotlib's figure or a part of it.
        survey: What was seen in a data set.
    """
    panels = figure.subplots(2, 3).ravel()
    for axes, histogram, label in (
        (panels[0], survey.energies, "energy less baselines (meV/atom)"),
        (panels[1], survey.forces, "force on an atom (eV/Å)"),
        (panels[2], survey.sizes, "atoms in a conformer"),
        (panels[3], survey.neighbors, f"neighbours of an atom within {NEIGHBOR_CUTOFF:g} Å"),
    ):
        _draw_histogram(axes, histogram, label)
    elements = {ELEMENT_SYMBOLS[z]: survey.atoms[z] for z in sorted(survey.atoms) if 0 < z < len(ELEMENT_SYMBOLS)}
    _draw_bars(panels[4], elements, "atoms of each element")
    charges = {_name_charge(q): n for q, n in sorted(survey.total_charges.items(), key=lambda item: float(item[0]))}
    spins = {f"{s} unpaired": n for s, n in sorted(survey.unpaired_electrons.items(), key=lambda item: float(item[0]))}
    _draw_bars(panels[5], {**charges, **spins}, "conformers by charge and by spin")
    for axes, counted in zip(panels, ("conformers", "atoms", "conformers", "conformers"), strict=False):
        axes.set_ylabel(counted)


def _name_charge(text: str) -> str:
    charge = float(text)
    return f"{charge:+g} e" if charge else "neutral"


def _draw_histogram(axes: Any, histogram: Histogram | None, label: str) -> None:
    axes.set_xlabel(label)
    _finish_axes(axes)
    if histogram is None or not histogram.total:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "none", ha="center", va="center", color=GREY, transform=axes.transAxes)
        return
    axes.stairs(histogram.counts, histogram.edges, fill=True, color=BLUE)
    axes.set_xlim(histogram.edges[0], histogram.edges[-1])
    _set_scale(axes, float(histogram.counts.max()))
    for count, side, place, align in (
        (histogram.num_below, "below", 0.02, "left"),
        (histogram.num_above, "above", 0.98, "right"),
    ):
        if count:
            style = {"ha": align, "va": "top", "fontsize": 8, "color": VERMILLION}
            axes.text(place, 0.98, f"{count} {side}", transform=axes.transAxes, **style)


def _draw_bars(axes: Any, counts: Mapping[str, int], label: str) -> None:
    frequent = sorted(counts, key=lambda name: -counts[name])[:_MAX_BARS]
    kept = [name for name in counts if name in frequent]
    names = [make_plain(name) for name in kept]
    axes.bar(range(len(kept)), [counts[name] for name in kept], color=BLUE, width=0.7)
    slanted = sum(map(len, names)) > 24
    axes.set_xticks(
        range(len(kept)), names, fontsize=8, rotation=40 if slanted else 0, ha="right" if slanted else "center"
    )
    axes.set_xlabel(label if len(kept) == len(counts) else f"{label} ({len(kept)} of {len(counts)})")
    _finish_axes(axes)
    _set_scale(axes, float(max([1, *counts.values()])))


def _set_scale(axes: Any, largest: float) -> None:
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(0, 3 * max(largest, 1.0))
    decades = np.arange(np.ceil(np.log10(3 * max(largest, 1.0))))
    axes.set_yticks([0, *(10**decades)], ["0", *(f"{10**d:,.0f}" for d in decades)], fontsize=8)
    axes.minorticks_off()


def _finish_axes(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def name_outlier(outlier: Outlier) -> str:
    """Return group, formula and charge of a conformer."""
    graph = outlier.graph
    known = all(0 < z < len(ELEMENT_SYMBOLS) for z in graph.atomic_numbers.tolist())
    formula = compute_formula(graph.atomic_numbers) if known else "unknown elements"
    charge = f", charge {graph.total_charge:+g}" if graph.total_charge else ""
    spin = f", {graph.num_unpaired_electrons:g} unpaired electrons" if graph.num_unpaired_electrons else ""
    name = formula if graph.group in ("", formula) else f"{graph.group} ({formula})"
    return f"{name}, {graph.num_atoms} atoms{charge}{spin}"
