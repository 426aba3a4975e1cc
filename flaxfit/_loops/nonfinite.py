"""Detects non-finite losses without blocking on the device."""

import time
import warnings
from typing import Any

import jax
import numpy as np

from flaxfit._core.types import StateHolder
from flaxfit._loops.context import FitPlan
from flaxfit._loops.dispatch_queue import Pace
from flaxfit._loops.feeder import Feed
from flaxfit._loops.host_reads import read
from flaxfit._programs.compile import EpochAccumulators
from flaxfit.callbacks.base import LoopState
from flaxfit.data.sources.position import Position

_SECONDS_BETWEEN_LOOKS = 0.25
_MOST_ROLLBACKS = 3  # to one checkpoint


class Watch:
    """Looks out for a loss that is not finite, without waiting for any step.

    The program itself ends the call that such a loss is in, and runs no further ones,
    so that there is time.
    """

    def __init__(self, plan: FitPlan, pace: Pace) -> None:
        self.plan = plan
        self.pace = pace
        self.rolled_back = False
        self._looked = time.perf_counter()
        self._rollbacks: list[int] = []
        self._told: tuple[int, int] | None = None

    def breaks_off(self, loop: LoopState) -> bool:
        """Whether to train on no further batch for now."""
        return loop.stopped or self.plan.interrupt.requested or self.rolled_back

    def glance(self, loop: LoopState, holder: StateHolder) -> None:
        """Looks at the last finished call, if it is some time since the last look."""
        now = time.perf_counter()
        if self.plan.nonfinite == "ignore" or now - self._looked < (
            _SECONDS_BETWEEN_LOOKS
        ):
            return
        self._looked = now
        finished, _ = self.pace.finished
        if finished is not None and int(finished.bad) >= 0:
            self.look(loop, holder)

    def look(self, loop: LoopState, holder: StateHolder) -> None:
        """Waits for all steps, and deals with a loss that was not finite."""
        if self.plan.nonfinite != "ignore" and loop.running is not None:
            self.settle(loop, holder, *read(counts_of(loop.running)))

    def settle(self, loop: LoopState, holder: StateHolder, bad: Any, out: Any) -> None:
        """Deals with what the accumulators say.

        Args:
          loop: where the training stands.
          holder: the state.
          bad: the number of the first batch whose loss was not finite, or -1.
          out: how many batches were left out.
        """
        if bad < 0 or self.rolled_back or loop.nonfinite:
            return
        step = loop.step - loop.batch + int(bad) + 1
        where = f"step {step} (epoch {loop.epoch + 1}, batch {bad + 1})"
        if self.plan.nonfinite == "skip":
            if self._told != (loop.epoch, int(out)):
                self._told = (loop.epoch, int(out))
                _warn(
                    f"{out} batch{'es' if out > 1 else ''} of epoch {loop.epoch + 1} "
                    "left out: the loss or a parameter was not finite, first at "
                    f"{where}."
                )
            return
        self.pace.drain()
        loop.batch = int(bad) + 1
        text = f"the loss is not finite at {where}"
        back = self._go_back(loop, holder)
        often = self._rollbacks.count(loop.step) > _MOST_ROLLBACKS
        if self.plan.nonfinite == "rollback" and back and not often:
            _warn(
                f"{text[0].upper()}{text[1:]}. Back to the checkpoint of step "
                f"{loop.step}; the training goes on with the next batch."
            )
            self.rolled_back = True
            return
        loop.nonfinite = loop.broken_off = True
        loop.stop(text)
        _warn(
            f"{text[0].upper()}{text[1:]}. Training stopped; the trainer holds "
            + (
                f"the checkpoint of step {loop.step}."
                if back
                else "what came of that step. With fit(run_dir=...) it would go back "
                'to the last checkpoint; Trainer(nonfinite="skip") leaves such batches '
                "out."
            )
        )

    def _go_back(self, loop: LoopState, holder: StateHolder) -> bool:
        """Puts the last good checkpoint back; False where there is none."""
        if self.plan.roll_back is None:
            loop.step = int(read(holder.peek().step))
            return False
        state, epoch, running = self.plan.roll_back()
        loop.step = int(read(state.step))
        with holder.lock:
            holder.put(state)
        merged = self.plan.running
        if epoch == loop.epoch and running is not None:
            merged = running
        out = np.int32(loop.batch - int(read(merged.index)))
        loop.running = merged.replace(
            bad=self.plan.running.bad,
            skipped=jax.device_put(out, merged.skipped.sharding),
        )
        self._rollbacks.append(loop.step)
        return True

    def reopen(self, loop: LoopState) -> Feed:
        """Returns the data from the batch on after the one that was left out."""
        self.rolled_back = False
        epoch = loop.epoch - self.plan.first_epoch
        return self.plan.open_feed(Position(epoch, loop.batch))


def counts_of(running: EpochAccumulators) -> tuple[Any, Any]:
    """Returns the number of the first bad batch, or -1, and how many were left out."""
    return running.bad, running.skipped


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=2)
