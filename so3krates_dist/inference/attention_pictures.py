"""Pictures of attention, as PNG: heat maps, and the structure with lines as strong as the attention between its atoms.

Blue is negative, vermillion positive (Okabe and Ito's, distinguishable with any colour vision), as in the other pictures. Every
colour scale is symmetric about zero. Reads numbers, computes no physics but bonds from covalent radii and a projection.
"""

import dataclasses
import functools
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from ase import Atoms
from ase.data import covalent_radii
from ase.data.colors import jmol_colors

from so3krates_dist.files import put_in_place
from so3krates_dist.graph import ELEMENT_SYMBOLS, FloatArray

BLUE: Final = "#0072B2"
VERMILLION: Final = "#D55E00"
GREY: Final = "#7F7F7F"
ABSENT: Final = "#E6E6E6"
DOTS_PER_INCH: Final = 150
MAX_COLUMNS: Final = 4
MAX_LABELS: Final = 24
"""atoms that are named beside a heat map; of larger structures every second, third, ... one is"""

BOND_FACTOR: Final = 1.15
"""atoms closer than this times the sum of their covalent radii are drawn as bonded"""
FAINTEST: Final = 0.02
"""lines weaker than this share of the strongest are left out"""
MAX_LINES: Final = 500
"""of more lines than this only the strongest are drawn"""
SMALLEST_FONT: Final = 8.0
"""dots; smaller names of atoms are left out"""
MAX_ATOMS_ARCS: Final = 30
"""in larger structures lines bend only around atoms that truly lie between two others, not for those that only seem to"""
TILTS: Final = ((0.0, 0.0), (0.32, 0.22), (0.25, 0.4), (0.5, 0.3), (-0.35, 0.5), (0.6, 0.6), (0.15, 0.75))
"""radians about the vertical and the horizontal axis; the first of them that hides fewest atoms behind others is taken"""

BoolArray = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """Attention between all atoms of a structure."""

    title: str
    matrix: FloatArray
    """(num_atoms, num_atoms) from each sender (column) to each receiver (row), summed over periodic images"""
    connected: BoolArray
    """(num_atoms, num_atoms) whether the receiver looks at the sender at all"""

    @property
    def symmetric(self) -> FloatArray:
        """Return what is drawn as lines: the mean of both directions, without the diagonal."""
        mean = (self.matrix + self.matrix.T) / 2
        np.fill_diagonal(mean, 0.0)
        return mean


def name_atom(atoms: Atoms, index: int) -> str:
    """Return element and index (from 0) of an atom, as it is called in pictures and tables."""
    return f"{ELEMENT_SYMBOLS[atoms.numbers[index]]}{index}"


def find_strongest(atoms: Atoms, symmetric: FloatArray, count: int) -> list[str]:
    """Return the pairs with the largest absolute values, e.g. `C0-O2 +0.113`.

    Args:
        atoms: Structure.
        symmetric: (num_atoms, num_atoms) symmetric; the diagonal does not count.
        count: How many; zeros are left out.
    """
    first, second = np.triu_indices(len(atoms), k=1)
    values = symmetric[first, second]
    shares = np.abs(values) / (np.abs(values).max(initial=0.0) or 1.0)
    order = np.argsort(-np.round(shares, 9), kind="stable")[
        :count
    ]  # equal by symmetry: the first ones, not what rounding says
    return [
        f"{name_atom(atoms, first[k])}-{name_atom(atoms, second[k])} {values[k]:+.3g}" for k in order if values[k] != 0
    ]


# ------------------------------------------------------------------------------------------------------------------ the pages


def plot_attention(atoms: Atoms, panels: Sequence[Panel], path: Path, title: str) -> None:
    """Draw each panel as a heat map, and below it as the structure with lines.

    Args:
        atoms: Structure.
        panels: One or more.
        path: PNG file to write.
        title: Above the page.
    """
    view = _View(atoms)
    columns = min(len(panels), MAX_COLUMNS)
    rows = math.ceil(len(panels) / columns)
    size, dots = 3.2, _choose_dots(atoms)
    heights = (1.0, max(0.35, min(1.0, 1.05 * view.aspect)))
    figure = _make_figure(max(columns * (size + 0.5), 5.2), rows * size * sum(heights) + 1.0, dots)
    grid = figure.subplots(2 * rows, columns, height_ratios=heights * rows, squeeze=False)
    for axes in grid.flat[:]:
        axes.set_visible(False)
    scale = 0.9 * 72 * min(size / view.width, size * heights[1] / view.height)
    smallest = 72 * SMALLEST_FONT / dots
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        _draw_heat_map(figure, grid[2 * row, column], atoms, panel)
        _draw_structure(grid[2 * row + 1, column], view, panel, scale, smallest)
    has_hidden_symbols = bool((view.fit_fonts(scale)[1] < smallest).any())
    _add_texts(figure, title, _write_caption(atoms, panels), _make_element_handles(atoms) if has_hidden_symbols else [])
    _save(figure, path)


def plot_overview(atoms: Atoms, rows: Sequence[Sequence[Panel]], path: Path, title: str) -> None:
    """Draw the heat maps of several layers on one page.

    Args:
        atoms: Structure.
        rows: Panels of each layer.
        path: PNG file to write.
        title: Above the page.
    """
    columns, size = max(len(row) for row in rows), 2.2
    figure = _make_figure(max(columns * (size + 0.4), 5.2), len(rows) * (size + 0.05) + 1.0, _choose_dots(atoms))
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes in grid.flat[:]:
        axes.set_visible(False)
    for row, line in zip(rows, grid, strict=True):
        for panel, axes in zip(row, line, strict=False):
            _draw_heat_map(figure, axes, atoms, panel, max_labels=12)
    _add_texts(figure, title, _write_heat_map_caption([p for row in rows for p in row]), [])
    _save(figure, path)


def _choose_dots(atoms: Atoms) -> int:
    """Return dots per inch: as many more as large structures need."""
    return round(DOTS_PER_INCH * min(1.8, max(1.0, len(atoms) / 60)))


def _make_figure(width: float, height: float, dots: int) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=dots)
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    """Write beside and rename: a picture that is being looked at is never half there."""
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    put_in_place(temporary, path)


def _add_texts(figure: Any, title: str, caption: str, handles: list[Any]) -> None:
    """Write the title above, and below it the legend of elements and the caption."""
    width = figure.get_figwidth()
    figure.suptitle("\n".join(textwrap.wrap(title, int(12 * width))), fontsize=11)
    figure.supxlabel("\n".join(textwrap.wrap(caption, int(16 * width))), fontsize=7, color="#404040")
    if handles:
        figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)


def _write_heat_map_caption(panels: Sequence[Panel]) -> str:
    parts = ["Row: atom that looks (receiver); column: atom that is looked at (sender); atoms are counted from 0."]
    if any(not panel.connected.all() for panel in panels):
        parts.append("Grey: not looked at.")
    if any(_exceeds_scale(panel) for panel in panels):
        parts.append("Colours span the values between different atoms; the diagonal goes beyond.")
    return " ".join(parts)


def _write_caption(atoms: Atoms, panels: Sequence[Panel]) -> str:
    parts = [
        _write_heat_map_caption(panels),
        "Lines: mean of both directions, (a + aᵀ)/2, without the diagonal; width and opacity grow with its absolute value up to "
        "the strongest, colour by its sign. Thin grey: bonds, from covalent radii.",
    ]
    if len(atoms) * (len(atoms) - 1) // 2 > MAX_LINES:
        parts.append(f"Of more than {MAX_LINES} lines only the strongest are drawn.")
    if atoms.pbc.any():
        parts.append("Periodic images are summed; lines connect the atoms as they are given, not the nearest images.")
    return " ".join(parts)


# -------------------------------------------------------------------------------------------------------------- the heat maps


@functools.cache
def _make_colors() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("attention", [BLUE, "#FFFFFF", VERMILLION], N=255)
    return colors.with_extremes(bad=ABSENT)


def _find_scale(panel: Panel) -> float:
    """Return the largest absolute value between different atoms: self terms of another size would hide all others."""
    off_diagonal = panel.matrix[~np.eye(len(panel.matrix), dtype=bool)]
    largest = float(np.abs(off_diagonal).max(initial=0.0))
    return largest or float(np.abs(panel.matrix).max(initial=0.0)) or 1.0


def _exceeds_scale(panel: Panel) -> bool:
    return bool(np.abs(panel.matrix).max(initial=0.0) > _find_scale(panel))


def _draw_heat_map(figure: Any, axes: Any, atoms: Atoms, panel: Panel, max_labels: int = MAX_LABELS) -> None:
    axes.set_visible(True)
    limit = _find_scale(panel)
    image = axes.imshow(
        np.ma.masked_where(~panel.connected, panel.matrix),
        cmap=_make_colors(), vmin=-limit, vmax=limit, interpolation="nearest",
    )  # fmt: skip
    bar = figure.colorbar(
        image, ax=axes, extend="both" if _exceeds_scale(panel) else "neither", fraction=0.05, pad=0.03
    )
    bar.ax.tick_params(labelsize=6.5)
    bar.ax.locator_params(nbins=7)
    bar.formatter.set_powerlimits((-2, 3))
    bar.ax.yaxis.get_offset_text().set(size=6.5)
    shown = range(0, len(atoms), math.ceil(len(atoms) / max_labels))
    labels = [name_atom(atoms, i) for i in shown]
    axes.set_xticks(shown, labels, rotation=90)
    axes.set_yticks(shown, labels)
    axes.tick_params(labelsize=6.5, length=2, pad=1.5)
    axes.set_title(panel.title, fontsize=9)


# ---------------------------------------------------------------------------------------------------------------- the drawing


class _View:
    """A structure seen along its shortest principal axis, or a little aside where atoms hide each other; never its mirror image."""

    def __init__(self, atoms: Atoms) -> None:
        self.atoms = atoms
        cell = np.asarray(atoms.cell.complete())
        corners = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)], np.float64)
        outline = corners @ cell if atoms.pbc.any() else np.zeros((0, 3))
        everything = np.concatenate([atoms.positions, outline])
        axes = _find_axes(everything)
        self.radii = 0.2 + 0.2 * covalent_radii[atoms.numbers]
        centred = everything - everything.mean(0)
        views = [centred @ (_make_rotation(*angles) @ axes).T for angles in TILTS]
        placed = min(views, key=lambda view: _count_hidden(view[: len(atoms), :2], self.radii))
        self.positions = placed[: len(atoms), :2]
        self.depths = placed[: len(atoms), 2]
        pairs = [(a, b) for a in range(8) for b in range(a) if np.abs(corners[a] - corners[b]).sum() == 1]
        outline = placed[len(atoms) :, :2]
        self.cell_edges = [outline[[a, b]] for a, b in pairs] if len(outline) else []
        low, high = placed[:, :2].min(0) - 0.55, placed[:, :2].max(0) + 0.55
        middle, spans = (low + high) / 2, np.maximum(high - low, (2.4, 1.4))
        self.low, self.high = middle - spans / 2, middle + spans / 2
        self.width, self.height = spans

    @property
    def aspect(self) -> float:
        """Height over width."""
        return float(self.height / self.width)

    @functools.cached_property
    def bonds(self) -> list[FloatArray]:
        """Ends of the bonds between atoms as they are given."""
        radii = covalent_radii[self.atoms.numbers]
        first, second = np.triu_indices(len(self.atoms), k=1)
        distances = np.linalg.norm(self.atoms.positions[first] - self.atoms.positions[second], axis=1)
        bonded = distances < BOND_FACTOR * (radii[first] + radii[second])
        return [self.positions[[a, b]] for a, b in zip(first[bonded], second[bonded], strict=True)]

    def fit_fonts(self, scale: float) -> tuple[FloatArray, FloatArray]:
        """Return the font sizes at which an atom's name, and its element alone, fit into its disc.

        Args:
            scale: Points per Å.
        """
        symbols = np.array([len(ELEMENT_SYMBOLS[z]) for z in self.atoms.numbers])
        lengths = np.stack([symbols + len(str(len(self.atoms) - 1)), symbols])  # names of an element are of one size
        fits = (
            np.minimum(2.6 / np.maximum(lengths, 1.6), 1.5) * self.radii * scale
        )  # letters are 0.65 of their font wide
        return np.minimum(fits[0], 11.0), np.minimum(fits[1], 11.0)


def _find_axes(positions: FloatArray) -> FloatArray:
    """Return the principal axes as rows, the longest first; signs follow from the axes alone, and they are right-handed."""
    axes = np.linalg.svd(positions - positions.mean(0), full_matrices=True)[2]
    for k in (0, 1):
        axes[k] *= np.sign(axes[k, np.argmax(np.abs(axes[k]))])
    axes[2] = np.cross(axes[0], axes[1])
    return np.asarray(axes)


def _make_rotation(about_vertical: float, about_horizontal: float) -> FloatArray:
    (c1, s1), (c2, s2) = ((math.cos(t), math.sin(t)) for t in (about_vertical, about_horizontal))
    vertical = np.array([[c1, 0, s1], [0, 1, 0], [-s1, 0, c1]])
    horizontal = np.array([[1, 0, 0], [0, c2, -s2], [0, s2, c2]])
    return np.asarray(horizontal @ vertical)


def _count_hidden(places: FloatArray, radii: FloatArray) -> int:
    """Return how many pairs of discs overlap so much that the name on one of them is hidden."""
    first, second = np.triu_indices(len(places), k=1)
    apart = np.linalg.norm(places[first] - places[second], axis=1)
    return int((apart < 0.75 * (radii[first] + radii[second])).sum())


def _draw_structure(axes: Any, view: _View, panel: Panel, scale: float, smallest: float) -> None:
    """Draw cell, bonds, lines of attention, then atoms from the farthest to the nearest.

    Args:
        axes: Where to draw.
        view: The structure.
        panel: Its attention.
        scale: Points per Å.
        smallest: Font size in points below which nothing is written.
    """
    from matplotlib.collections import LineCollection

    axes.set_visible(True)
    axes.set_axis_off()
    axes.set(xlim=(view.low[0], view.high[0]), ylim=(view.low[1], view.high[1]), aspect="equal")
    axes.add_collection(
        LineCollection(view.cell_edges, colors="#BBBBBB", linewidths=0.6, linestyles="dashed", zorder=1)
    )
    axes.add_collection(LineCollection(view.bonds, colors="#A0A0A0", linewidths=1.0, zorder=2))
    symmetric = panel.symmetric
    _draw_lines(axes, view, symmetric, widest=min(6.0, max(1.5, 0.16 * scale)))
    _draw_atoms(axes, view, scale, smallest)
    strongest = find_strongest(view.atoms, symmetric, 1)
    text = f"strongest: {strongest[0]}" if strongest else "no attention between different atoms"
    axes.set_title(text, fontsize=7.5, color="#404040")


def _draw_lines(axes: Any, view: _View, symmetric: FloatArray, widest: float) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgb

    first, second = np.triu_indices(len(symmetric), k=1)
    values = symmetric[first, second]
    shares = np.abs(values) / (np.abs(values).max(initial=0.0) or 1.0)
    order = np.argsort(shares, kind="stable")
    order = order[shares[order] > FAINTEST][-MAX_LINES:]
    first, second, values, shares = first[order], second[order], values[order], shares[order]
    colors = np.where(values[:, None] > 0, to_rgb(VERMILLION), to_rgb(BLUE))
    lines = [_trace(view, a, b) for a, b in zip(first, second, strict=True)]
    colors = np.column_stack([colors, 0.05 + 0.8 * shares**2])  # else faint lines hide strong ones
    widths = 0.3 + (widest - 0.3) * shares
    axes.add_collection(LineCollection(lines, colors=colors, linewidths=widths, capstyle="round", zorder=3))


def _trace(view: _View, first: int, second: int) -> FloatArray:
    """Return the line between two atoms; around a third one that lies on it, as in linear molecules."""
    start, end = view.positions[first], view.positions[second]
    along = end - start
    length = float(np.hypot(*along))
    if length < 1e-6:  # one behind the other
        return np.stack([start, end])
    across = np.array([-along[1], along[0]]) / length
    near = _find_between(view.positions, first, second, 0.2)
    if len(view.positions) > MAX_ATOMS_ARCS:
        near &= _find_between(view.atoms.positions, first, second, 0.5)
    if not near.any():
        return np.stack([start, end])
    t = np.linspace(0.0, 1.0, 25)[:, None]
    return np.asarray(start + t * along + min(0.16 * length + 0.2, 1.4) * 4 * t * (1 - t) * across)


def _find_between(positions: FloatArray, first: int, second: int, margin: float) -> BoolArray:
    """Return which atoms lie between two others, within a margin in Å of their connecting line."""
    along = positions[second] - positions[first]
    others = positions - positions[first]
    fractions = others @ along / (along @ along)
    offsets = np.linalg.norm(others - fractions[:, None] * along, axis=1)
    between = (offsets < margin) & (fractions > 0.02) & (fractions < 0.98)
    between[[first, second]] = False
    return np.asarray(between)


def _draw_atoms(axes: Any, view: _View, scale: float, smallest: float) -> None:
    from matplotlib.patches import Circle

    name_fonts, symbol_fonts = view.fit_fonts(scale)
    for rank, index in enumerate(np.argsort(view.depths, kind="stable").tolist()):
        number, place = view.atoms.numbers[index], view.positions[index]
        color = jmol_colors[number]
        level = 4 + rank / len(view.atoms)
        disc = Circle(place, view.radii[index], facecolor=color, edgecolor="#303030", linewidth=0.5, zorder=level)
        axes.add_patch(disc)
        if symbol_fonts[index] < smallest:
            continue
        text, font = ELEMENT_SYMBOLS[number], symbol_fonts[index]
        if name_fonts[index] >= smallest:
            text, font = name_atom(view.atoms, index), name_fonts[index]
        ink = "#000000" if float(color @ (0.299, 0.587, 0.114)) > 0.5 else "#FFFFFF"  # Rec. 601 luma
        style = {"ha": "center", "va": "center_baseline", "zorder": level + 0.5 / len(view.atoms)}
        axes.text(*place, text, fontsize=font, color=ink, **style)


def _make_element_handles(atoms: Atoms) -> list[Any]:
    from matplotlib.lines import Line2D

    return [
        Line2D(
            [], [], marker="o", linestyle="", color=jmol_colors[z], markeredgecolor="#303030", markeredgewidth=0.5,
            label=ELEMENT_SYMBOLS[z],
        )
        for z in np.unique(atoms.numbers)
    ]  # fmt: skip
