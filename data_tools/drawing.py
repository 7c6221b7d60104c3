"""Drawings of structures, seen from two sides: atoms in their elements' colours, bonds, the cell, and what is wrong with them.

Whatever is wrong: atoms without a place are left out, atoms on top of each other are drawn so. Uses matplotlib's object interface,
so nothing global changes and no display is needed. Computes no physics but bonds from covalent radii and a projection.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Final

import numpy as np

from data_tools import gate
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.errors import DataError
from so3krates_dist.files import put_in_place
from so3krates_dist.graph import ELEMENT_SYMBOLS, MAX_ATOMIC_NUMBER, FloatArray, Graph, IntArray

BLUE: Final = "#0072B2"
VERMILLION: Final = "#D55E00"
GREY: Final = "#7F7F7F"
DOTS_PER_INCH: Final = 120
BOND_FACTOR: Final = 1.2
"""atoms closer than this times the sum of their covalent radii are drawn as bonded"""
ATOM_SIZE: Final = 0.55
"""radius of the drawn atoms in covalent radii"""
MAX_NAMED: Final = 40
"""in structures with more atoms none is named"""
MAX_BONDED: Final = 5000
"""in structures with more atoms bonds are not drawn"""
_MARGIN: Final = 0.9
"""Å around the outermost atoms"""
_ARROW: Final = 0.22
"""length of the arrow, in widths of the picture"""


def make_figure(width: float, height: float) -> Any:
    """Return an empty figure (inches)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=DOTS_PER_INCH)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path, remedy: str = "Choose another --report") -> None:
    """Write a PNG, whole or not at all.

    Raises:
        DataError: It cannot be written there.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(temporary, format="png")
        put_in_place(temporary, path)
    except OSError as error:
        raise DataError(str(path), "be writable", error.strerror, remedy) from error


def make_plain(text: str) -> str:
    """Return text that matplotlib's own font has letters for."""
    return "".join(c if c.isprintable() else "?" for c in text).encode("latin-1", "replace").decode("latin-1")


@dataclasses.dataclass(frozen=True, slots=True)
class _View:
    """A structure turned so that the reader sees its longest extents."""

    numbers: IntArray
    places: FloatArray
    """(num_atoms, 3) Å; across, up, towards the reader"""
    bonds: IntArray
    """(num_bonds, 2)"""
    edges: FloatArray
    """(num_edges, 2, 3) of the cell; none for a molecule"""
    worst: int | None
    """atom with the largest force"""
    force: FloatArray
    """(3,) direction of that force, in the same frame"""

    def turn(self) -> "_View":
        """Return the structure as it is seen from above."""
        order, signs = [0, 2, 1], np.array([1.0, 1.0, -1.0])
        places, edges, force = (a[..., order] * signs for a in (self.places, self.edges, self.force))
        return dataclasses.replace(self, places=places, edges=edges, force=force)


def draw_structure(figure: Any, graph: Graph) -> None:
    """Draw a structure from the front and from above, side by side, at one scale.

    Args:
        figure: matplotlib's figure or a part of it, about twice as wide as high.
        graph: Structure; what is not finite in it is left out.
    """
    front = _look_at(graph)
    panels = figure.subplots(1, 2)
    for axes, view, name in zip(panels, (front, front.turn()), ("front", "above"), strict=True):
        axes.set_axis_off()
        axes.set_aspect("equal")
        if not len(view.places):
            axes.text(0.5, 0.5, "no finite positions", ha="center", va="center", color=GREY, transform=axes.transAxes)
            continue
        _set_limits(axes, front, view)
        _draw(axes, view)
        axes.text(0.02, 0.98, name, transform=axes.transAxes, fontsize=7, color=GREY, va="top")


def _look_at(graph: Graph) -> _View:
    finite = np.isfinite(graph.positions).all(1)
    numbers = np.clip(np.asarray(graph.atomic_numbers)[finite], 0, MAX_ATOMIC_NUMBER)
    positions = np.asarray(graph.positions, np.float64)[finite]
    center = positions.mean(0) if len(positions) else np.zeros(3)
    axes = np.eye(3)
    if len(positions) > 2 and not graph.is_periodic:
        _, _, axes = np.linalg.svd(positions - center, full_matrices=False)
        axes = np.vstack([axes[:2], np.cross(axes[0], axes[1])])
    forces = None if graph.forces is None else np.asarray(graph.forces, np.float64)[finite]
    worst, force = None, np.zeros(3)
    if forces is not None and len(forces) and np.isfinite(forces).all() and np.any(forces):
        worst = int(np.linalg.norm(forces, axis=1).argmax())
        force = forces[worst] / np.linalg.norm(forces[worst]) @ axes.T
    return _View(
        numbers=numbers,
        places=(positions - center) @ axes.T,
        bonds=_find_bonds(dataclasses.replace(graph, atomic_numbers=numbers, positions=positions)),
        edges=(_list_cell_edges(graph) - center) @ axes.T,
        worst=worst,
        force=force,
    )


def _find_bonds(graph: Graph) -> IntArray:
    """Return (num_bonds, 2) atoms that are bonded within the drawing: not across the faces of a cell."""
    if not 1 < graph.num_atoms <= MAX_BONDED:
        return np.zeros((0, 2), np.int64)
    radii = gate.load_covalent_radii()[graph.atomic_numbers]
    molecule = dataclasses.replace(graph, cell=None, pbc=None)  # a flat cell has no end
    try:
        near = build_neighbors(molecule, 2 * BOND_FACTOR * float(radii.max()))
    except DataError:  # atoms on top of each other, or very many
        return np.zeros((0, 2), np.int64)
    pairs = np.stack([np.asarray(near.pair_first), np.asarray(near.pair_second)], axis=1)
    distances = np.linalg.norm(graph.positions[pairs[:, 1]] - graph.positions[pairs[:, 0]], axis=1)
    return np.asarray(pairs[distances < BOND_FACTOR * radii[pairs].sum(1)])


def _list_cell_edges(graph: Graph) -> FloatArray:
    """Return (num_edges, 2, 3) both ends of the cell's edges in Å."""
    if graph.cell is None or not graph.is_periodic or not np.isfinite(graph.cell).all():
        return np.zeros((0, 2, 3))
    corners = np.array(list(np.ndindex(2, 2, 2)))
    ends = [(a, b) for a in corners for b in corners if np.sum(b - a) == 1 and np.abs(b - a).sum() == 1]
    return np.array(ends) @ np.asarray(graph.cell, np.float64)


def _set_limits(axes: Any, front: _View, view: _View) -> None:
    """Give both panels the width of the wider one, so that an ångström is as long in both."""
    points = np.vstack([view.places, view.edges.reshape(-1, 3)])
    every = np.vstack([front.places, front.edges.reshape(-1, 3)])
    reach = 0.5 * np.ptp(every, axis=0) + _MARGIN
    middle = 0.5 * (points.max(0) + points.min(0))
    height = max(reach[1], reach[2], 0.45 * reach[0])
    axes.set_xlim(middle[0] - reach[0], middle[0] + reach[0])
    axes.set_ylim(middle[1] - height, middle[1] + height)


def _draw(axes: Any, view: _View) -> None:
    from matplotlib.collections import EllipseCollection, LineCollection

    if len(view.edges):
        axes.add_collection(LineCollection(list(view.edges[:, :, :2]), colors="#B0B0B0", linewidths=0.8, zorder=0))
    order = np.argsort(view.places[:, 2], kind="stable")
    colors, radii = _load_colors()[view.numbers], ATOM_SIZE * gate.load_covalent_radii()[view.numbers]
    if len(view.bonds):
        depth = view.places[view.bonds, 2].mean(1)
        segments = view.places[view.bonds][np.argsort(depth)][:, :, :2]
        width = 2.4 if len(view.numbers) <= MAX_NAMED else 1.0
        axes.add_collection(LineCollection(list(segments), colors="#555555", linewidths=width, zorder=1))
    axes.add_collection(
        EllipseCollection(
            2 * radii[order], 2 * radii[order], np.zeros(len(order)), units="xy", offsets=view.places[order, :2],
            offset_transform=axes.transData, facecolors=colors[order], edgecolors="#333333", linewidths=0.6, zorder=2,
        )
    )  # fmt: skip
    if len(view.numbers) <= MAX_NAMED:
        _name_atoms(axes, view, colors, radii)
    if view.worst is not None:
        _draw_force(axes, view, float(radii[view.worst]))


def _name_atoms(axes: Any, view: _View, colors: FloatArray, radii: FloatArray) -> None:
    """Write the symbols of all atoms but hydrogen, where nothing nearer hides them."""
    gaps = np.linalg.norm(view.places[:, None, :2] - view.places[:, :2], axis=-1)
    nearer = view.places[None, :, 2] > view.places[:, None, 2]
    hidden = (nearer & (gaps < radii)).any(1)
    for atom in np.flatnonzero(~hidden & (view.numbers > 1)).tolist():
        color = "k" if colors[atom] @ [0.3, 0.59, 0.11] > 0.5 else "w"
        symbol = ELEMENT_SYMBOLS[view.numbers[atom]]
        axes.text(*view.places[atom, :2], symbol, ha="center", va="center", fontsize=6.5, color=color, zorder=3)


def _draw_force(axes: Any, view: _View, radius: float) -> None:
    """Draw an arrow along the largest force, or a ring where it points at the reader or away."""
    from matplotlib.patches import Circle
    from matplotlib.patheffects import withStroke

    assert view.worst is not None
    outline = [withStroke(linewidth=3.2, foreground="white")]  # it may cross atoms of any colour
    left, right = axes.get_xlim()
    start, along = view.places[view.worst, :2], view.force[:2]
    length = _ARROW * (right - left) * float(np.linalg.norm(along))
    if length < 0.05 * (right - left):
        ring = {"fill": False, "color": VERMILLION, "linewidth": 1.8, "path_effects": outline}
        axes.add_patch(Circle((float(start[0]), float(start[1])), 1.2 * radius, zorder=4, **ring))
        return
    along = along / np.linalg.norm(along)
    style = {"arrowstyle": "-|>", "color": VERMILLION, "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0}
    style |= {"path_effects": outline}
    tail, tip = start + 0.8 * radius * along, start + (radius + length) * along
    axes.annotate("", xy=tip, xytext=tail, arrowprops=style, zorder=4, annotation_clip=False)


@functools.cache
def _load_colors() -> FloatArray:
    """Return (119, 3) Jmol's colours of the elements; grey for what is none."""
    from ase.data.colors import jmol_colors

    colors = np.full((MAX_ATOMIC_NUMBER + 1, 3), 0.5)
    colors[: len(jmol_colors)] = jmol_colors
    return colors
