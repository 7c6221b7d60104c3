"""The range test of learning rates: what it reads from a curve, and what it does with real data and a small model."""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_setup import make_config, make_dataset, make_settings

from so3krates_dist.config import RunConfig
from so3krates_dist.errors import CheckpointError, ConfigError
from so3krates_dist.train import budget, inputs, lr_find
from so3krates_dist.train.checkpoint import RunFolder
from so3krates_dist.train.lr_find import RangeTest, RateSpan, find_rates, find_span, grow, run_test, smooth

RATES = grow(1e-6, 1e-1, 251)
"""50 steps a decade"""


def make_curve(noise: float = 0.0, fall: float = 2.0, rises: bool = True) -> RangeTest:
    """Return a test whose logarithm of the loss falls by a straight line from 1e-4 to 1e-2, and rises beyond."""
    decades = np.log10(RATES)
    logs = -fall * np.clip((decades + 4) / 2, 0, 1) + (3 * np.clip(decades + 2, 0, None) if rises else 0)
    logs += np.random.default_rng(0).normal(scale=noise, size=len(logs))
    return RangeTest(tuple(RATES), tuple(np.exp(logs).tolist()), "all steps done")


class TestReading:
    @pytest.mark.parametrize("noise", [0.0, 0.3])
    def test_half_of_the_fall_and_its_end(self, noise: float) -> None:
        span = find_span(make_curve(noise))
        assert span is not None
        assert 0.6e-3 < span.lowest < 1.7e-3
        assert 0.5e-2 < span.highest < 1.7e-2
        assert not span.is_open
        assert "try a larger" not in span.describe()

    def test_a_loss_that_never_rises_leaves_the_upper_end_open(self) -> None:
        test = make_curve(rises=False)
        kept = sum(rate < 5e-3 for rate in test.rates)
        span = find_span(RangeTest(test.rates[:kept], test.losses[:kept], "all steps done"))
        assert span is not None
        assert span.is_open
        assert span.describe().endswith("the loss had not risen again there: try a larger --highest")

    def test_a_loss_that_rises_at_once_closes_it(self) -> None:
        kept = sum(rate < 5e-3 for rate in RATES)
        test = RangeTest(tuple(RATES[:kept]), make_curve().losses[:kept], "loss 4 times its lowest at 5.0e-03")
        span = find_span(test)
        assert span is not None
        assert not span.is_open

    @pytest.mark.parametrize("fall", [0.0, 0.05])
    def test_a_loss_that_does_not_fall_suggests_nothing(self, fall: float) -> None:
        assert find_span(make_curve(fall=fall)) is None

    def test_single_losses_that_are_far_off_change_little(self) -> None:
        test = make_curve()
        losses = list(test.losses)
        losses[20], losses[120] = 30.0, 1e-3
        span = find_span(RangeTest(test.rates, tuple(losses), ""))
        assert span is not None
        assert 0.3e-3 < span.lowest < 3e-3

    def test_one_step_is_enough_for_nothing(self) -> None:
        assert find_span(RangeTest((1e-3,), (1.0,), "")) is None

    def test_the_line_for_the_user(self) -> None:
        assert RateSpan(2e-4, 3e-3, False).describe() == (
            "train.learning_rate: start from 3.0e-03, the upper end of 2.0e-04 to 3.0e-03 (from half of the fall of the loss to its"
            " end): an order of magnitude, not the best rate (range test after Smith, arXiv:1506.01186)"
        )

    def test_the_mean_has_no_lag_and_keeps_straight_lines(self) -> None:
        line = np.linspace(3.0, -2.0, 200)
        np.testing.assert_allclose(smooth(np.exp(line).tolist()), line, rtol=0, atol=1e-12)
        step = smooth([1.0] * 50 + [math.e] * 51)
        assert step[50] == pytest.approx(6 / 11)
        assert (step[:45] == 0).all()
        assert (np.abs(step[56:] - 1) < 1e-12).all()

    def test_rates_grow_by_a_constant_factor(self) -> None:
        rates = np.array(grow(1e-5, 2.0, 30))
        assert rates[[0, -1]].tolist() == pytest.approx([1e-5, 2.0], rel=1e-12)
        np.testing.assert_allclose(rates[1:] / rates[:-1], (2e5) ** (1 / 29), rtol=1e-12)


# --------------------------------------------------------------------------------------------------------------- real data


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "set")


def search(config: RunConfig, rates: list[float]) -> RangeTest:
    return run_test(config, inputs.open_data(config), torch.device("cpu"), rates)


class TestSearch:
    def test_it_finds_a_range_and_ends_by_itself(self, dataset: Path) -> None:
        test = search(make_config(dataset, "run"), grow(1e-5, 1e3, 160))
        assert len(test.losses) == len(test.rates) < 160
        assert test.ending.startswith(("loss 4 times its lowest at ", "loss or gradient not finite at "))
        span = find_span(test)
        assert span is not None
        assert 1e-4 < span.lowest < span.highest < 1.0

    def test_it_is_the_same_each_time_and_another_with_another_seed(self, dataset: Path) -> None:
        rates = grow(1e-4, 1e-2, 20)
        first, second = (search(make_config(dataset, "run"), rates) for _ in range(2))
        assert first == second
        assert search(make_config(dataset, "run", "run.seed=5"), rates).losses != first.losses

    def test_nothing_random_from_before_comes_in(self, dataset: Path) -> None:
        rates = grow(1e-4, 1e-2, 5)
        first = search(make_config(dataset, "run"), rates)
        torch.randn(7)
        np.random.default_rng().normal()
        assert search(make_config(dataset, "run"), rates) == first

    def test_the_first_loss_is_that_of_the_untrained_model(self, dataset: Path) -> None:
        """Rates come in after it."""
        first, second = (search(make_config(dataset, "run"), rates) for rates in ([1e-6, 1e-6], [1e-6, 1e-1]))
        assert first.losses == second.losses
        third = search(make_config(dataset, "run"), [1e-1, 1e-1])
        assert third.losses[0] == first.losses[0]
        assert third.losses[1] != first.losses[1]

    @pytest.mark.parametrize(
        "settings", [("train.micro_batches=2",), ("data.max_atoms=20",), ("data.find_limits=true",)]
    )
    def test_passes_do_not_matter(
        self, dataset: Path, settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(budget, "MAX_SECONDS", 0.02)  # passes of a second would take ten
        rates = grow(1e-4, 1e-2, 8)
        whole = search(make_config(dataset, "run"), rates)
        parts = search(make_config(dataset, "run", *settings), rates)
        assert parts.losses == pytest.approx(whole.losses, rel=1e-4)

    @pytest.mark.parametrize(
        "settings",
        [
            ("train.precision=float64", "train.zero_stage=0"), ("train.optimizer=amsgrad", "train.layer_decay=0.8"),
            ("train.forces_loss=l2", "train.energy_loss=mae"), ("model.name=geomatt_envelope", "model.num_features=8"),
        ],
    )  # fmt: skip
    def test_it_takes_the_settings_of_the_run(self, dataset: Path, settings: tuple[str, ...]) -> None:
        test = search(make_config(dataset, "run", *settings), grow(1e-4, 1e-2, 6))
        assert len(test.losses) == 6
        assert all(math.isfinite(loss) for loss in test.losses)

    def test_a_loss_that_is_not_finite_ends_it(self, dataset: Path) -> None:
        test = search(make_config(dataset, "run"), [1e-3, 1e30, 1e30, 1e30])
        assert test.ending == "loss or gradient not finite at 1.0e+30"
        assert len(test.losses) == len(test.rates) < 4
        assert all(math.isfinite(loss) for loss in test.losses)

    def test_a_conformer_beyond_the_limits_is_named(self, dataset: Path) -> None:
        config = make_config(dataset, "run", "data.max_atoms=5", "data.oversized=refuse")
        with pytest.raises(Exception, match=r"must have at most 5 atoms \(data.max_atoms\)"):
            search(config, [1e-3])


# ----------------------------------------------------------------------------------------------------------------- command


def call(dataset: Path, run: Path, *words: str) -> int:
    parser = argparse.ArgumentParser()
    lr_find.add_arguments(parser)
    settings = make_settings(dataset, run, *(w for w in words if not w.startswith("-")))
    return lr_find.run(parser.parse_args([*settings, *(w for w in words if w.startswith("-"))]))


class TestCommand:
    def test_it_writes_and_prints_what_it_found(
        self, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert call(dataset, tmp_path / "run", "--lowest=1e-4", "--highest=1", "--steps=60") == 0
        lines = capsys.readouterr().out.splitlines()
        content = json.loads((tmp_path / "run/lr_find/rates.json").read_text())
        assert lines[0] == "note: ZeRO is not used here: this is one process"
        assert lines[1] == f"{len(content['losses'])} of 60 steps from 1.0e-04 to 1.0e+00: {content['ending']}"
        assert lines[2] == RateSpan(**content["suggestion"]).describe()
        assert lines[3] == f"written to {tmp_path / 'run/lr_find'}"
        assert len(lines) == 4
        assert len(content["rates"]) == len(content["losses"]) == len(content["smoothed"])
        assert content["train"]["optimizer"] == "adamw"
        with Image.open(tmp_path / "run/lr_find/rates.png") as picture:
            assert picture.format == "PNG"
        assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["lr_find"]

    def test_the_folder_is_still_free_for_the_run(self, dataset: Path, tmp_path: Path) -> None:
        (tmp_path / "run/lr_find").mkdir(parents=True)
        RunFolder(make_config(dataset, tmp_path / "run")).check()
        (tmp_path / "run/other").mkdir()
        with pytest.raises(CheckpointError, match="must be empty or hold a run; got other files"):
            RunFolder(make_config(dataset, tmp_path / "run")).check()

    def test_where_nothing_falls_it_says_so(
        self, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ("--lowest=1e-12", "--highest=1e-11", "--steps=20", "train.zero_stage=0", "data.batch_size=50")
        assert call(dataset, tmp_path / "run", *words) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[1] == "No suggestion: the loss did not fall. Try more --steps or other rates"
        assert json.loads((tmp_path / "run/lr_find/rates.json").read_text())["suggestion"] is None

    def test_a_loss_that_is_never_finite_is_no_picture(self, dataset: Path, tmp_path: Path) -> None:
        """Weights of the loss that overflow, say."""
        config = make_config(dataset, tmp_path / "run", "train.forces_weight=1.0e308", "train.energy_weight=1.0e308")
        lines = list(find_rates(config, 1e-4, 1.0, 20))
        assert lines[1] == "0 of 20 steps from 1.0e-04 to 1.0e+00: loss or gradient not finite at 1.0e-04"
        content = json.loads((tmp_path / "run/lr_find/rates.json").read_text())
        assert (content["losses"], content["smoothed"], content["suggestion"]) == ([], [], None)
        assert not (tmp_path / "run/lr_find/rates.png").exists()

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("--lowest=0",), r"--lowest must be a number greater than zero; got 0\.0\. Change the value\."),
            (("--lowest=nan",), r"--lowest must be a number greater than zero; got nan\."),
            (("--highest=1e-6",), r"--highest must be a number greater than --lowest \(1e-06\); got 1e-06\."),
            (("--highest=inf",), r"--highest must be a number greater than --lowest \(1e-06\); got inf\."),
            (("--steps=19",), r"--steps must be at least 20; got 19\. Change the value\."),
        ],
    )
    def test_arguments_out_of_range(self, dataset: Path, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
        with pytest.raises(ConfigError, match=f"^{message}"):
            call(dataset, tmp_path / "run", *words)
        assert not (tmp_path / "run").exists()

    def test_several_processes_are_refused(
        self, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        environment = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(
            ConfigError, match=r"^processes must be one for lr-find; got 2\. Start it without a launcher\."
        ):
            call(dataset, tmp_path / "run")

    def test_a_run_folder_that_cannot_be_written_to(self, dataset: Path, tmp_path: Path) -> None:
        (tmp_path / "run").write_text("a file")
        with pytest.raises(CheckpointError, match=r"^run.folder .*run must be a folder that can be written to; got "):
            call(dataset, tmp_path / "run", "--steps=20")
