"""What interrupts a run: steps that would spoil the weights, signals and the stop file."""

import json
import math
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from so3krates_dist.config import TrainSection
from so3krates_dist.errors import EXIT_NON_FINITE, NonFiniteError
from so3krates_dist.train.guard import LEAST_LOSSES, StepGuard, StopRequest, Verdict

NAN = math.nan


def make_guard(**keys: Any) -> StepGuard:
    return StepGuard(TrainSection(**{"max_skipped_steps": 2, "max_rollbacks": 1, **keys}))


def take(guard: StepGuard, step: int, loss: float, norm: float = 1.0) -> bool:
    """Do what the loop does."""
    verdict = guard.judge(loss)
    applied = verdict is Verdict.APPLY and math.isfinite(norm)
    return guard.record(step, loss, norm, verdict, applied)


def make_losses(count: int, seed: int = 0, scale: float = 1.0, spread: float = 0.2) -> list[float]:
    """Return losses whose logarithms are normally distributed."""
    generator = random.Random(seed)
    return [scale * math.exp(generator.gauss(0.0, spread)) for _ in range(count)]


class TestVerdicts:
    @pytest.mark.parametrize("loss", [NAN, math.inf, -math.inf])
    def test_a_loss_that_is_not_finite(self, loss: float) -> None:
        assert make_guard().judge(loss) is Verdict.NON_FINITE

    def test_spikes_are_not_looked_for_by_default(self) -> None:
        guard = make_guard()
        for step, loss in enumerate(make_losses(100)):
            take(guard, step, loss)
        assert guard.judge(1e30) is Verdict.APPLY

    def test_nothing_is_usual_before_some_steps(self) -> None:
        guard = make_guard(spike_factor=5.0)
        for step, loss in enumerate(make_losses(LEAST_LOSSES - 1)):
            assert guard.judge(1e30) is Verdict.APPLY
            assert math.isnan(guard.usual_loss)
            take(guard, step, loss)
        take(guard, 19, 1.0)
        assert guard.judge(1e30) is Verdict.SPIKE
        assert guard.usual_loss == pytest.approx(1.0, abs=0.2)

    @pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
    def test_the_rule_is_that_of_the_spread_at_any_scale(self, scale: float) -> None:
        guard = make_guard(spike_factor=5.0, spike_window=1000)
        for step, loss in enumerate(make_losses(1000, scale=scale)):
            guard.record(step, loss, 1.0, Verdict.APPLY, True)
        assert guard.judge(scale * math.exp(0.9 * 5 * 0.2)) is Verdict.APPLY
        assert guard.judge(scale * math.exp(1.1 * 5 * 0.2)) is Verdict.SPIKE
        assert guard.judge(scale * 1e-3) is Verdict.APPLY, "a small loss is no harm"

    def test_outliers_do_not_change_what_is_usual(self) -> None:
        guard = make_guard(spike_factor=6.0, spike_window=200)
        for step, loss in enumerate(make_losses(200)):
            guard.record(step, loss * (1e6 if step % 10 == 0 else 1.0), 1.0, Verdict.APPLY, True)
        assert guard.judge(5.0) is Verdict.SPIKE

    def test_losses_that_hardly_vary(self) -> None:
        guard = make_guard(spike_factor=4.0)
        for step in range(50):
            take(guard, step, 2.0)
        assert guard.judge(2.0 * 1.2) is Verdict.APPLY, "four times 5 %"
        assert guard.judge(2.0 * 1.25) is Verdict.SPIKE

    def test_losses_of_zero(self) -> None:
        guard = make_guard(spike_factor=4.0)
        for step in range(50):
            assert not take(guard, step, 0.0)
        assert guard.judge(0.0) is Verdict.APPLY
        assert guard.judge(1e-3) is Verdict.SPIKE

    def test_only_the_last_applied_steps_count(self) -> None:
        guard = make_guard(spike_factor=5.0, spike_window=20, max_skipped_steps=100)
        for step, loss in enumerate(make_losses(20, scale=1e4) + make_losses(20)):
            take(guard, step, loss)
        assert guard.judge(1e4) is Verdict.SPIKE
        for step in range(50):
            assert not take(guard, 40 + step, 1e4), "skipped, and not learned from"
        assert guard.judge(1e4) is Verdict.SPIKE

    def test_a_loss_that_falls_by_orders_of_magnitude_has_no_spikes(self) -> None:
        guard = make_guard(spike_factor=4.0)
        for step, noise in enumerate(make_losses(2000)):
            loss = noise * 1e4 ** (1 - step / 2000)
            assert guard.judge(loss) is Verdict.APPLY
            take(guard, step, loss)


class TestSkippedSteps:
    def test_some_in_a_row_are_allowed(self) -> None:
        guard = make_guard()
        for step, loss in enumerate([NAN, NAN, 1.0] * 10):
            assert not take(guard, step, loss)
        assert guard.rollbacks == 0

    def test_one_more_goes_back_and_then_ends_the_run(self) -> None:
        guard = make_guard()
        assert [take(guard, step, NAN) for step in range(5)] == [False, False, True, False, False]
        assert guard.rollbacks == 1
        rule = r"step 5 must have a finite loss and gradient in one of 3 steps; got none after going back to a checkpoint once"
        with pytest.raises(
            NonFiniteError, match=rule + r" \(loss nan, gradient norm 1 in the last\)\. Lower"
        ) as caught:
            take(guard, 5, NAN)
        assert caught.value.exit_code == EXIT_NON_FINITE == 86

    def test_a_gradient_that_is_not_finite_counts_too(self) -> None:
        guard = make_guard(max_rollbacks=0)
        assert guard.judge(1.0) is Verdict.APPLY
        assert not take(guard, 0, 1.0, math.inf)
        assert not take(guard, 1, 1.0, NAN)
        with pytest.raises(
            NonFiniteError, match=r"got none \(loss 1, gradient norm nan in the last\)\. Lower train\.learning_rate"
        ):
            take(guard, 2, 1.0, NAN)

    def test_none_may_be_allowed(self) -> None:
        guard = make_guard(max_skipped_steps=0, max_rollbacks=0)
        assert not take(guard, 0, 1.0)
        with pytest.raises(
            NonFiniteError, match="step 1 must have a finite loss and gradient in one of 1 steps; got none"
        ):
            take(guard, 1, NAN)

    def test_spikes_alone_are_called_so(self) -> None:
        guard = make_guard(spike_factor=5.0, max_rollbacks=2)
        for step in range(30):
            take(guard, step, 1.0)
        assert [take(guard, 30 + step, 50.0) for step in range(8)] == [False, False, True] * 2 + [False, False]
        rule = r"step 38 must have a loss of usual size in one of 3 steps; got none after going back to a checkpoint 2 times"
        with pytest.raises(NonFiniteError, match=rule + r".*Raise train\.spike_factor, or see `so3krates replay`"):
            take(guard, 38, 50.0)

    def test_spikes_and_nan_together_are_called_not_finite(self) -> None:
        guard = make_guard(spike_factor=5.0, max_rollbacks=0)
        for step in range(30):
            take(guard, step, 1.0)
        take(guard, 30, 50.0)
        take(guard, 31, NAN)
        with pytest.raises(NonFiniteError, match="step 32 must have a finite loss and gradient"):
            take(guard, 32, 50.0)


class TestState:
    """Part of a checkpoint: a run that was stopped decides as if it had never been."""

    def test_a_run_that_goes_on_decides_alike(self) -> None:
        losses = make_losses(300)
        for step in (60, 61, 62, 150, 151, 200):
            losses[step] = NAN if step % 2 else 1e3
        keys: dict[str, Any] = {"spike_factor": 6.0, "spike_window": 50, "max_rollbacks": 9}
        for stop in (10, 61, 62, 63, 151, 250):
            whole, first = make_guard(**keys), make_guard(**keys)
            expected = [(whole.judge(loss), take(whole, step, loss)) for step, loss in enumerate(losses)]
            found = [(first.judge(loss), take(first, step, loss)) for step, loss in enumerate(losses[:stop])]
            second = make_guard(**keys)
            second.set_state(json.loads(json.dumps(first.get_state())))
            found += [(second.judge(loss), take(second, step, loss)) for step, loss in enumerate(losses[stop:], stop)]
            assert found == expected
            assert second.get_state() == whole.get_state()

    def test_going_back_forgets_losses_but_not_that_it_went_back(self) -> None:
        guard = make_guard(spike_factor=5.0)
        for step in range(30):
            take(guard, step, 1.0)
        take(guard, 30, NAN)
        saved = guard.get_state()  # in the midst of the trouble
        take(guard, 31, NAN)
        assert take(guard, 32, NAN)
        guard.set_state(saved)
        assert guard.rollbacks == 1
        assert [take(guard, step, NAN) for step in (33, 34)] == [False, False], "it counts from none again"
        with pytest.raises(NonFiniteError, match="step 35 must"):
            take(guard, 35, NAN)

    def test_a_checkpoint_without_it(self) -> None:
        guard = make_guard()
        guard.set_state({})
        assert guard.get_state() == make_guard().get_state()

    def test_a_shorter_window(self) -> None:
        guard, shorter = make_guard(spike_window=200), make_guard(spike_window=20)
        for step in range(100):
            take(guard, step, float(step))
        shorter.set_state(guard.get_state())
        assert shorter.usual_loss == 89.5


class TestStopRequest:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
    def test_signals(self, tmp_path: Path, number: int) -> None:
        before = signal.getsignal(number)
        stop = StopRequest(tmp_path)
        try:
            assert not stop.is_pending()
            os.kill(os.getpid(), number)
            assert stop.is_pending()
            assert stop.is_pending(), "it stays"
        finally:
            stop.close()
        assert signal.getsignal(number) == before

    def test_the_stop_file(self, tmp_path: Path) -> None:
        stop = StopRequest(tmp_path)
        try:
            assert not stop.is_pending()
            (tmp_path / "STOP").touch()
            assert stop.is_pending()
        finally:
            stop.close()
        assert not (tmp_path / "STOP").exists(), "the next start must not stop at once"
        stop.close()

    def test_a_file_server_that_is_away(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It must not end a run in the midst of a step, nor a run that has saved with another exit code."""
        stop = StopRequest(tmp_path)

        def fail(*_: object, **__: object) -> None:
            raise OSError(116, "Stale file handle")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "exists", fail)
            patch.setattr(Path, "unlink", fail)
            assert not stop.is_pending()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.is_pending()
            stop.close()
