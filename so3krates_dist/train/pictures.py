"""Pictures of a run, as PNG: learning curve, parity of energies, forces and partial charges. Reads numbers, computes no physics.

Colours are Okabe and Ito's (distinguishable with any colour vision, https://jfly.uni-koeln.de/color/) and cividis. Drawn with
matplotlib's object interface, so nothing global changes and no display is needed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from so3krates_dist.graph import FloatArray

BLUE: Final = "#0072B2"
VERMILLION: Final = "#D55E00"
GREY: Final = "#7F7F7F"
DOTS_PER_INCH: Final = 150
MAX_SCATTER_POINTS: Final = 500
"""More points than this are drawn as a density"""

_CURVES: Final = (
    ("forces_mae", "force MAE (meV/Å)"),
    ("energy_mae_per_atom", "energy MAE (meV/atom)"),
)


def _make_figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=DOTS_PER_INCH)
    FigureCanvasAgg(figure)
    return figure


def _finish_axes(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, which="major", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def _save(figure: Any, path: Path) -> None:
    """Write beside and rename: a picture that is being looked at is never half there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(path)


def plot_learning_curve(records: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> None:
    """Draw the errors of forces and energies against the step, on logarithmic axes.

    Args:
        records: What `metrics.read_metrics` returns.
        path: PNG file to write.
        title: Above the picture.
    """
    figure = _make_figure(9.0, 3.8)
    figure.suptitle(title or "Learning curve", fontsize=11)
    for axes, (key, label) in zip(figure.subplots(1, 2), _CURVES, strict=True):
        for kind, color, style in (("train", GREY, {"linewidth": 0.9}), ("validation", BLUE, {"linewidth": 1.6})):
            steps, values = _select(records, kind, key)
            marker = {"marker": "o", "markersize": 3.5} if kind == "validation" or len(steps) == 1 else {}
            if len(steps):
                axes.plot(steps, 1e3 * values, color=color, label=kind, **style, **marker)
                axes.set(xscale="log", yscale="log")
        axes.set(xlabel="optimizer step", ylabel=label)
        _annotate_best(axes, *_select(records, "validation", key))
        _finish_axes(axes)
        _label_ticks(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    _save(figure, path)


def _select(records: Sequence[Mapping[str, Any]], kind: str, key: str) -> tuple[FloatArray, FloatArray]:
    """Return steps and positive, finite values of one figure."""
    rows = [(r["step"], r[key]) for r in records if r["kind"] == kind and key in r and r["step"] > 0]
    steps, values = np.array(rows, np.float64).reshape(-1, 2).T
    good = np.isfinite(values) & (values > 0)
    return steps[good], values[good]


def _annotate_best(axes: Any, steps: FloatArray, values: FloatArray) -> None:
    if len(values):
        best = int(np.argmin(values))
        text = f"best {1e3 * values[best]:.3g} at step {steps[best]:.0f}"
        axes.set_title(text, fontsize=9, color=BLUE, loc="right")


def _label_ticks(axes: Any) -> None:
    """Write 20, 50, 100 instead of 2x10^1 where the axis spans few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        if axis.get_scale() != "log":
            continue
        decades = np.log10(limits[1] / limits[0])
        subs = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0) if decades < 1 else (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def plot_rates(
    rates: Sequence[float],
    losses: Sequence[float],
    smoothed: FloatArray,
    span: tuple[float, float] | None,
    path: Path,
) -> None:
    """Draw the loss against a growing learning rate, on logarithmic axes.

    Args:
        rates: Of the steps.
        losses: Of the steps, greater than zero.
        smoothed: The same without noise.
        span: Range of rates that is suggested; None: none.
        path: PNG file to write.
    """
    figure = _make_figure(5.2, 3.8)
    axes = figure.subplots()
    if span is not None:
        label = f"{span[0]:.1e} to {span[1]:.1e}"
        axes.axvspan(*span, color=VERMILLION, alpha=0.15, linewidth=0, label=label)
    axes.plot(rates, losses, color=GREY, linewidth=0.7, label="loss")
    axes.plot(rates, smoothed, color=BLUE, linewidth=1.6, label="smoothed")
    axes.set(xscale="log", yscale="log", xlabel="learning rate of the step", ylabel="loss before the step")
    axes.set_title("Range test of the learning rate", fontsize=11)
    _finish_axes(axes)
    axes.legend(frameon=False)
    _save(figure, path)


def plot_parity_energy(reference: FloatArray, predicted: FloatArray, path: Path, subtitle: str = "") -> None:
    """Draw predicted against reference energies per atom, and the errors below.

    Args:
        reference: (num_conformers,) eV/atom, less the baselines of the elements: what the model has to learn.
        predicted: (num_conformers,) likewise.
        path: PNG file to write.
        subtitle: Which conformers these are.
    """
    mae = _mean_absolute(1e3 * (predicted - reference))
    title = f"Energy, {subtitle}\nMAE {mae:.2f} meV/atom, {len(reference)} conformers"
    labels = ("reference energy less baselines (meV/atom)", "predicted (meV/atom)", "error (meV/atom)")
    _plot_parity(1e3 * reference, 1e3 * predicted, path, title, labels)


def plot_parity_forces(reference: FloatArray, predicted: FloatArray, path: Path, subtitle: str = "") -> None:
    """Draw predicted against reference force components as a density, and the errors below.

    Args:
        reference: (num_atoms, 3) eV/Å.
        predicted: (num_atoms, 3) eV/Å.
        path: PNG file to write.
        subtitle: Which conformers these are.
    """
    mae = _mean_absolute(1e3 * (predicted - reference))
    title = f"Forces, {subtitle}\nMAE {mae:.1f} meV/Å, {reference.size} components"
    labels = ("reference force component (eV/Å)", "predicted (eV/Å)", "error (meV/Å)")
    _plot_parity(reference.ravel(), predicted.ravel(), path, title, labels, error_scale=1e3)


def plot_parity_charges(reference: FloatArray, predicted: FloatArray, path: Path, subtitle: str = "") -> None:
    """Draw predicted against reference partial charges, and the errors below.

    Args:
        reference: (num_atoms,) e.
        predicted: (num_atoms,) e.
        path: PNG file to write.
        subtitle: Which conformers these are.
    """
    mae = _mean_absolute(1e3 * (predicted - reference))
    title = f"Partial charges, {subtitle}\nMAE {mae:.2f} me, {len(reference)} atoms"
    labels = ("reference partial charge (e)", "predicted (e)", "error (me)")
    _plot_parity(reference, predicted, path, title, labels, error_scale=1e3)


def _mean_absolute(errors: FloatArray) -> float:
    return float(np.mean(np.abs(errors))) if errors.size else float("nan")


def _plot_parity(
    reference: FloatArray,
    predicted: FloatArray,
    path: Path,
    title: str,
    labels: tuple[str, str, str],
    error_scale: float = 1.0,
) -> None:
    finite = np.isfinite(reference) & np.isfinite(predicted)
    reference, predicted = reference[finite], predicted[finite]
    errors = error_scale * (predicted - reference)
    limits = _find_limits(np.concatenate([reference, predicted]))
    reach = 1.25 * float(np.quantile(np.abs(errors), 0.999)) if errors.size else 1.0  # a few outliers may lie outside
    figure = _make_figure(5.2, 6.2)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot(limits, limits, color=VERMILLION, linewidth=0.9, zorder=0.9, label="equal")
    lower.axhline(0, color=VERMILLION, linewidth=0.9, zorder=0.9)
    _draw_points(figure, upper, reference, predicted, (*limits, *limits))
    _draw_points(figure, lower, reference, errors, (*limits, -(reach or 1.0), reach or 1.0))
    upper.set_ylabel(labels[1])
    upper.set_title(title, fontsize=10)
    upper.legend(frameon=False, loc="upper left")
    lower.set(xlabel=labels[0], ylabel=labels[2])
    for axes in (upper, lower):
        _finish_axes(axes)
    _save(figure, path)


def _draw_points(
    figure: Any, axes: Any, x: FloatArray, y: FloatArray, extent: tuple[float, float, float, float]
) -> None:
    """Draw points, or their density where they would hide each other."""
    if len(x) > MAX_SCATTER_POINTS:
        width, height = axes.get_subplotspec().get_position(figure).size
        gridsize = (
            80,
            max(1, round(80 * height / width * figure.get_figheight() / figure.get_figwidth() / np.sqrt(3))),
        )
        hexagons = axes.hexbin(
            x, y, gridsize=gridsize, bins="log", mincnt=1, cmap="cividis", extent=extent, linewidths=0.1
        )
        figure.colorbar(hexagons, ax=axes, label="count", pad=0.02)
    else:
        axes.plot(x, y, ".", color=BLUE, alpha=0.6, markersize=5, markeredgewidth=0)
    axes.set(xlim=extent[:2], ylim=extent[2:])


def _find_limits(values: FloatArray) -> tuple[float, float]:
    """Return limits that hold all values with a margin."""
    if not values.size:
        return -1.0, 1.0
    low, high = float(values.min()), float(values.max())
    margin = 0.04 * (high - low) or 1.0
    return low - margin, high + margin
