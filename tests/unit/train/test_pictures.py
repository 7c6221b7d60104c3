"""The pictures are drawn for what a run can hold: much, little, and nothing."""

import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from so3krates_dist.train.pictures import (
    BLUE,
    plot_learning_curve,
    plot_parity_charges,
    plot_parity_energy,
    plot_parity_forces,
)


def read_picture(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def count_pixels(path: Path, color: str) -> int:
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(read_picture(path).astype(int) - wanted).max(-1) < 12).sum())


def make_records(last: int, every: int = 50) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    records: list[dict[str, Any]] = []
    for step in range(every, last + 1, every):
        force = (0.5 * (step / 50) ** -0.6 + 0.01) * math.exp(0.1 * rng.normal())
        records.append(
            {
                "kind": "train",
                "step": step,
                "seconds": 0.1 * step,
                "forces_mae": force,
                "energy_mae_per_atom": force / 20,
            }
        )
        if step % (5 * every) == 0:
            values = {"forces_mae": 1.1 * force, "energy_mae_per_atom": force / 18}
            records.append({"kind": "validation", "step": step, "seconds": 0.1 * step, **values})
    return records


@pytest.mark.parametrize("last", [10_000, 300, 250, 50, 0])
def test_learning_curve(tmp_path: Path, last: int) -> None:
    plot_learning_curve(make_records(last), tmp_path / "sub" / "curve.png")
    assert read_picture(tmp_path / "sub" / "curve.png").shape == (570, 1350, 3)
    assert (count_pixels(tmp_path / "sub" / "curve.png", BLUE) > 30) == (last >= 250)
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["curve.png"]


def test_learning_curve_passes_over_what_has_no_logarithm(tmp_path: Path) -> None:
    records = make_records(1000)
    for record, value in zip(records, (math.nan, 0.0, math.inf), strict=False):
        record["forces_mae"] = value
    records.append({"kind": "event", "step": 1000, "seconds": 1.0, "event": "stopped"})
    records.insert(0, {"kind": "validation", "step": 0, "seconds": 0.0, "forces_mae": 1.0})
    plot_learning_curve(records, tmp_path / "curve.png", title="a run")
    assert count_pixels(tmp_path / "curve.png", BLUE) > 30


@pytest.mark.parametrize("count", [1, 2, 400, 20_000])
def test_parities(tmp_path: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(scale=0.02, size=count)
    plot_parity_energy(
        reference, reference + rng.normal(scale=0.001, size=count), tmp_path / "energy.png", "test split"
    )
    forces = rng.standard_t(3, size=(count, 3))
    plot_parity_forces(forces, forces + rng.normal(scale=0.03, size=(count, 3)), tmp_path / "forces.png", "test split")
    plot_parity_charges(
        reference, reference + rng.normal(scale=0.001, size=count), tmp_path / "charges.png", "test split"
    )
    for name in ("energy.png", "forces.png", "charges.png"):
        assert read_picture(tmp_path / name).shape == (930, 780, 3)
        assert read_picture(tmp_path / name).std() > 5


def test_predictions_that_are_not_finite_do_not_stop_the_picture(tmp_path: Path) -> None:
    plot_parity_energy(np.zeros(3), np.full(3, np.nan), tmp_path / "energy.png")
    assert read_picture(tmp_path / "energy.png").shape == (930, 780, 3)


def test_pictures_are_the_same_bytes_again(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        plot_learning_curve(make_records(1000), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_pictures_can_be_drawn_outside_the_main_thread(tmp_path: Path) -> None:
    thread = threading.Thread(target=plot_learning_curve, args=(make_records(500), tmp_path / "curve.png"))
    thread.start()
    thread.join()
    assert (tmp_path / "curve.png").is_file()
