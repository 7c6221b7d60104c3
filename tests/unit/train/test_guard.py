"""What interrupts a run: steps that are not finite, signals and the stop file."""

import os
import signal
from pathlib import Path

import pytest

from so3krates_dist.errors import EXIT_NON_FINITE, NonFiniteError
from so3krates_dist.train.guard import FiniteGuard, StopRequest


class TestFiniteGuard:
    def test_some_in_a_row_are_allowed(self) -> None:
        guard = FiniteGuard(2)
        for step, applied in enumerate([False, False, True] * 10):
            guard.record(step, applied)

    def test_one_more_ends_the_run(self) -> None:
        guard = FiniteGuard(2)
        guard.record(0, False)
        guard.record(1, False)
        with pytest.raises(
            NonFiniteError, match="step 2 must have a finite loss and gradient in one of 3 steps; got none"
        ):
            guard.record(2, False)

    def test_none_may_be_allowed(self) -> None:
        guard = FiniteGuard(0)
        guard.record(0, True)
        with pytest.raises(NonFiniteError, match=r"Lower train\.learning_rate, or check the labels") as caught:
            guard.record(1, False)
        assert caught.value.exit_code == EXIT_NON_FINITE == 86


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
