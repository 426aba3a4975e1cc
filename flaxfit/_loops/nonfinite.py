"""Detects non-finite losses without blocking on the device."""

import time
import warnings
from typing import Any

import jax
import numpy as np

from flaxfit._loops.context import FitContext
from flaxfit._loops.dispatch_queue import DispatchQueue
from flaxfit._loops.host_reads import read
from flaxfit._programs.compile import EpochAccumulators
from flaxfit.callbacks.base import Outcome

_SECONDS_BETWEEN_POLLS = 0.25
_MOST_ROLLBACKS = 3  # to the same checkpoint


class NonFiniteGuard:
    """Detects a loss that is not finite; then stops, rolls back, or reports a skip.

    Before a stop or a rollback, the compiled program itself runs no step after such a
    loss. So the host may notice the loss late, and never has to wait for a step.

    Attributes:
      rolled_back: whether a checkpoint was restored and the feed has to be reopened.
    """

    def __init__(self, fit: FitContext, queue: DispatchQueue) -> None:
        self._fit = fit
        self._queue = queue
        self.rolled_back = False
        self._polled = time.perf_counter()
        self._rollbacks: list[int] = []
        self._reported: tuple[int, int] | None = None

    @property
    def should_break(self) -> bool:
        """Whether the running epoch must not dispatch another step."""
        return self._fit.ending or self.rolled_back

    def poll(self) -> None:
        """Checks the last finished call, at most a few times a second."""
        now = time.perf_counter()
        early = now - self._polled < _SECONDS_BETWEEN_POLLS
        if early or self._fit.nonfinite == "ignore":
            return
        self._polled = now
        finished, _ = self._queue.finished
        if finished is not None and int(finished.bad) >= 0:
            self.check()

    def check(self) -> None:
        """Waits for all steps, and handles a loss that was not finite."""
        running = self._fit.loop.running
        if self._fit.nonfinite != "ignore" and running is not None:
            self.handle(*read(counts_of(running)))

    def handle(self, bad: Any, skipped: Any) -> None:
        """Handles the result of `counts_of`, once it is on the host."""
        fit, loop = self._fit, self._fit.loop
        handled = self.rolled_back or loop.outcome.failure == "nonfinite"
        if bad < 0 or fit.nonfinite == "ignore" or handled:
            return
        step = loop.step - loop.batch + int(bad) + 1
        where = f"step {step} (epoch {loop.epoch + 1}, batch {bad + 1})"
        if fit.nonfinite == "skip":
            self._report_skipped(int(skipped), where)
            return
        self._queue.wait_all()
        loop.batch = int(bad) + 1
        text = f"the loss is not finite at {where}"
        sentence = f"{text.capitalize()}."
        restored = self._restore_checkpoint()
        too_often = self._rollbacks.count(loop.step) > _MOST_ROLLBACKS
        if fit.nonfinite == "rollback" and restored and not too_often:
            _warn(
                f"{sentence} Rolled back to the checkpoint of step {loop.step}; "
                "training continues with the next batch."
            )
            self.rolled_back = True
            return
        loop.outcome = Outcome(text, "nonfinite")
        held = f"the checkpoint of step {loop.step}."
        if not restored:
            held = (
                "the state after that step. fit(run_dir=...) would restore the last "
                'checkpoint; Trainer(nonfinite="skip") skips such batches.'
            )
        _warn(f"{sentence} Training stopped; the trainer holds {held}")

    def _report_skipped(self, skipped: int, where: str) -> None:
        epoch = self._fit.loop.epoch
        if self._reported != (epoch, skipped):
            self._reported = (epoch, skipped)
            _warn(
                f"Skipped {skipped} batch{'es' if skipped > 1 else ''} of epoch "
                f"{epoch + 1}: the loss or a parameter was not finite, first at "
                f"{where}."
            )

    def _restore_checkpoint(self) -> bool:
        """Restores the last checkpoint; returns False without a run directory."""
        fit, loop = self._fit, self._fit.loop
        found = fit.session.last_checkpoint()
        if found is None:
            loop.step = int(read(fit.store.peek().step))
            return False
        state, epoch, running = found
        loop.step = int(read(state.step))
        fit.store.put(state)
        empty = fit.resolved.empty()
        running = running if epoch == loop.epoch and running is not None else empty
        # Batches between the checkpoint and the bad batch are not trained on again.
        skipped = np.int32(loop.batch - int(read(running.index)))
        loop.running = running.replace(
            bad=empty.bad, skipped=jax.device_put(skipped, running.skipped.sharding)
        )
        self._rollbacks.append(loop.step)
        return True


def counts_of(running: EpochAccumulators) -> tuple[Any, Any]:
    """Returns the index of the first bad batch, or -1, and how many were skipped."""
    return running.bad, running.skipped


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=2)
