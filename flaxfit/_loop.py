"""The host loops: fit and eval. They dispatch, and read as seldom as they can."""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import numpy as np

from flaxfit import checkpoint
from flaxfit._compile import Program, Running, shapes_of_call
from flaxfit._display import Display, epoch_display
from flaxfit._feed import Feed, Segments
from flaxfit._interrupt import Interrupt
from flaxfit._pace import Pace
from flaxfit._packing import Ready
from flaxfit._position import Position
from flaxfit._saving import Saver
from flaxfit._timing import Clock
from flaxfit._types import Logs, PyTree, StateHolder, TrainState
from flaxfit.callbacks.base import CallbackList, LoopState

Evaluate: TypeAlias = Callable[[TrainState], dict[str, Any] | None]

_SECONDS_BETWEEN_LOOKS = 0.25
_MOST_ROLLBACKS = 3  # to one checkpoint


@dataclass(frozen=True)
class FitPlan:
    """What one `fit` is to do.

    Attributes:
      epochs: `range(initial_epoch, epochs)`.
      train: the train program.
      running: an empty accumulator.
      open_feed: position -> where the batches come from.
      steps_per_call: steps of one call of the program, None to go by the clock.
      order: sorts logs into History's order.
      learning_rate: reads the current rate from an optimizer state, or None.
      validate: evaluates a state, or None without validation data.
      validates_at: whether to validate after an epoch.
      callbacks: whom to call.
      display: where the progress goes.
      interrupt: tells of Ctrl-C and SIGTERM.
      saver: writes the checkpoints that callbacks ask for.
      as_state: makes a state of what a snapshot or a file holds.
      nonfinite: what happens at a loss that is not finite; see `Trainer`.
      first_epoch: the epoch at which the data began.
      batch: the batches of the first epoch that were trained on in an earlier process.
      resume: called when all callbacks have begun.
      roll_back: returns state, epoch and accumulators of the last good checkpoint;
        None where there are none.
    """

    epochs: range
    train: Program
    running: Running
    open_feed: Callable[[Position], Feed]
    steps_per_call: int | None
    order: Callable[[Logs], Logs]
    learning_rate: Callable[[PyTree], Any]
    validate: Evaluate | None
    validates_at: Callable[[int], bool]
    callbacks: CallbackList
    display: Display
    interrupt: Interrupt
    saver: Saver
    as_state: Callable[[Any], TrainState]
    nonfinite: str
    first_epoch: int
    batch: int = 0
    resume: Callable[[LoopState], None] = lambda loop: None
    roll_back: Callable[[], tuple[TrainState, int, Running | None]] | None = None


def fit_loop(loop: LoopState, holder: StateHolder, plan: FitPlan) -> None:
    """Trains until the plan is done, a callback stops it, or Ctrl-C.

    `loop.history` holds the finished epochs; `holder` the state after the last
    finished step, whatever happens.
    """
    watch = _Watch(plan, Pace(plan.steps_per_call))
    try:
        plan.callbacks.call("on_train_begin", loop)
        plan.resume(loop)
        _save(loop, holder, watch)
        feed = plan.open_feed(
            Position(plan.epochs.start - plan.first_epoch, plan.batch)
        )
        for epoch in plan.epochs:
            if loop.stopped or plan.interrupt.requested:
                break
            loop.epoch = epoch
            loop.batch = plan.batch if epoch == plan.epochs.start else 0
            plan.callbacks.call("on_epoch_begin", loop)
            finished, feed = _fit_epoch(loop, holder, feed, watch)
            if not finished:
                break
    except BaseException as error:
        # The first error is the one to report; what follows from it is noted.
        loop.broken_off = True
        try:
            _end(loop, holder, watch)
        except Exception as later:
            error.add_note(f"then on_train_end failed: {later!r}")
        raise
    if plan.interrupt.requested and not loop.stopped:
        loop.broken_off = True
        loop.stop(plan.interrupt.reason)
    _end(loop, holder, watch)


def _end(loop: LoopState, holder: StateHolder, watch: "_Watch") -> None:
    try:
        watch.plan.callbacks.end(loop)
    finally:
        _save(loop, holder, watch)


def _fit_epoch(
    loop: LoopState, holder: StateHolder, feed: Feed, watch: "_Watch"
) -> tuple[bool, Feed]:
    """Trains one epoch.

    Returns:
      Whether it was finished, and the feed of the next one.
    """
    plan, pace, start = watch.plan, watch.pace, loop.batch
    if loop.running is None:
        loop.running = plan.running
    if loop.stopped or plan.interrupt.requested:
        return False, feed
    title = f"Epoch {loop.epoch + 1}/{loop.epochs}"
    loop.set_logs({})
    with epoch_display(plan.display, title, loop.steps_per_epoch) as shown:
        examples, whole = 0, False
        while not whole:
            pace.begin(loop.batch)
            with feed.epoch() as segments:
                for ready in timed(segments, pace, loop.clock):
                    examples += _fit_segment(loop, holder, ready, shown, watch)
                    if watch.breaks_off(loop):
                        break
            # A callback's stop ends the epoch as its last step would; Ctrl-C breaks it
            # off.
            if plan.interrupt.requested:
                watch.look(loop, holder)
                return False, feed
            pace.drain()
            values = _read_epoch(loop, holder, watch)
            if loop.broken_off:
                return False, feed
            whole = not watch.rolled_back
            if not whole:
                feed = watch.reopen(loop)
        closed = _close_epoch(loop, holder, *values, shown, watch)
        if closed:
            lap = loop.clock.lap()
            loop.history.timing.append(lap, loop.batch - start, examples)
            loop.running = None
            _save(loop, holder, watch)
        return closed, feed


class _Watch:
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
            self.settle(loop, holder, *read(_counts(loop.running)))

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


def _counts(running: Running) -> tuple[Any, Any]:
    return running.bad, running.skipped


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=2)


def _save(loop: LoopState, holder: StateHolder, watch: _Watch) -> None:
    """Takes the checkpoints that callbacks have asked for."""
    if not loop.has_saves:
        return
    with loop.clock.phase("saving"):
        watch.pace.drain()
        watch.look(loop, holder)
        if watch.rolled_back or loop.nonfinite:
            loop.take_saves()  # of a state that is no more, or not worth it
        elif loop.has_saves:
            plan = watch.plan
            plan.saver.serve(loop, holder.peek(), loop.running, plan.callbacks)


def _fit_segment(
    loop: LoopState,
    holder: StateHolder,
    ready: Ready,
    shown: dict[str, Any],
    watch: _Watch,
) -> int:
    """Trains on the batches of a segment, several in one call.

    Returns:
      The examples that were trained on.
    """
    plan, pace, start = watch.plan, watch.pace, 0
    callbacks = plan.callbacks
    while start < ready.batches:
        if callbacks.has("on_train_batch_begin"):
            callbacks.call("on_train_batch_begin", loop)
            pace.distract()
        left = ready.batches - start
        count = min(pace.steps, left, callbacks.steps_to_hook(loop.step) or left)
        traces = plan.train.traces
        running = _call(loop, holder, plan, ready, start, count)
        pace.follow(running.index, running, count, compiled=plan.train.traces != traces)
        start += count
        shown["done"] = loop.batch
        watch.glance(loop, holder)
        if callbacks.has_turn("on_train_batch_end", loop.step):
            if callbacks.steps_to_hook(loop.step) is None:
                pace.drain()  # a hook at every call: its time is not the device's
            loop.defer_logs(partial(_read_values, running, plan.order))
            callbacks.call("on_train_batch_end", loop)
            pace.distract()
        if loop.has_saves:
            _save(loop, holder, watch)
            pace.distract()
        if plan.display.due():
            _update(plan.display, pace, plan.order)
        if watch.breaks_off(loop):
            break
    return sum(ready.examples[:start])


def _call(
    loop: LoopState,
    holder: StateHolder,
    plan: FitPlan,
    ready: Ready,
    start: int,
    count: int,
) -> Running:
    """Dispatches `count` steps from batch `start` on."""
    timing, running, is_new = loop.history.timing, loop.running, False
    if timing.flops_per_step is None:
        shapes = shapes_of_call(holder.peek(), running, ready.segment, start, count)
        timing.flops_per_step = partial(plan.train.flops, shapes)
        is_new = shapes[:3] not in [known[:3] for known in plan.train.signatures]
    kept = _keeping(holder, plan) if is_new else nullcontext()
    # Between `take` and `put` the state is the device's.
    with plan.interrupt.shield(), holder.lock, kept:
        state, running = plan.train(holder.take(), running, ready.segment, start, count)
        if is_new:
            jax.block_until_ready(running)
        holder.put(state)
        loop.running = running
        loop.step += count
        loop.batch += count
    return running


@contextmanager
def _keeping(holder: StateHolder, plan: FitPlan) -> Iterator[None]:
    """Keeps the state of a call of new shapes, which may find the memory too small.

    The program is given the state's memory, and does not give it back when it fails.
    """
    kept = checkpoint.snapshot(holder.peek(), copy=True).state
    try:
        yield
    except Exception as error:
        holder.put(plan.as_state(kept))
        if "RESOURCE_EXHAUSTED" in str(error):
            error.add_note(
                "The memory is too small for this step; the trainer holds the state "
                "before it. Write a smaller batch_size= in fit, and "
                "Trainer(accumulate_steps=2) for updates of the same size, or "
                "Trainer(device_data=0) to leave the data on the host."
            )
        raise


def _read_epoch(
    loop: LoopState, holder: StateHolder, watch: _Watch
) -> tuple[dict[str, Any], float | None]:
    """Returns the epoch's values and the learning rate, in one read."""
    plan, running = watch.plan, loop.running
    rate = plan.learning_rate(holder.peek().opt_state)
    merged = running.index
    (bad, out), merged, logs, rate = read(
        (_counts(running), merged, running.logs, rate)
    )
    if plan.nonfinite != "ignore":
        watch.settle(loop, holder, bad, out)
    values, rate = as_values(logs, rate, plan.order)
    # After going back, or leaving out, there may be nothing to take a mean of.
    return values if merged else {}, rate


def _close_epoch(
    loop: LoopState,
    holder: StateHolder,
    logs: dict[str, Any],
    rate: float | None,
    shown: dict[str, Any],
    watch: _Watch,
) -> bool:
    """Validates and records; False if it was broken off."""
    plan = watch.plan
    shown["logs"] = logs
    loop.steps_per_epoch = loop.batch
    if plan.validate is not None and plan.validates_at(loop.epoch):
        loop.set_logs(logs)
        plan.callbacks.call("on_test_begin", loop)
        with loop.clock.phase("evaluating"):
            values = plan.validate(holder.peek())
        if values is None:
            return False
        logs |= {f"val_{name}": value for name, value in values.items()}
        loop.set_logs(logs)
        plan.callbacks.call("on_test_end", loop)
    if rate is not None:
        logs["learning_rate"] = rate
    loop.set_logs(logs)
    loop.epoch_is_closing = True
    loop.history.append(loop.epoch, logs)
    plan.callbacks.call("on_epoch_end", loop)
    loop.history.amend(loop.logs)
    loop.epoch_is_closing = False
    shown.update(logs=loop.logs, finished=True)
    return True


def timed(segments: Segments, pace: Pace, clock: Clock | None) -> Iterator[Ready]:
    """Yields the segments; waiting for one counts once the device has nothing to do."""
    while True:
        if not segments.ready:
            pace.drain()
        busy, began = pace.seconds_left, time.perf_counter()
        was_idle = pace.idle
        ready = next(segments, None)
        if clock is not None and pace.idle:
            waited = time.perf_counter() - began - (0.0 if was_idle else busy)
            clock.move(max(0.0, waited), "waiting_for_data")
        if ready is None:
            return
        yield ready


def _update(display: Display, pace: Pace, order: Callable[[Logs], Logs]) -> None:
    running, done = pace.finished
    if running is not None:
        display.update(done, read_logs(running, order)[0])


def eval_loop(
    state: TrainState,
    *,
    evaluate: Program,
    running: Running,
    feed: Feed,
    total: int | None,
    steps_per_call: int | None,
    order: Callable[[Logs], Logs],
    display: Display,
    interrupted: Callable[[], bool],
) -> dict[str, Any] | None:
    """Returns the values over the data, or None if `interrupted`.

    Args:
      state: the state to evaluate; it is only read.
      evaluate: the eval program.
      running: an empty accumulator.
      feed: where the batches come from.
      total: how many there are, None if that is not known.
      steps_per_call: batches of one call of the program, None to go by the clock.
      order: sorts logs into History's order.
      display: shows the progress.
      interrupted: asked before every call.
    """
    done, pace = 0, Pace(steps_per_call)
    with (
        epoch_display(display, "Evaluating", total) as shown,
        feed.epoch() as segments,
    ):
        for ready in timed(segments, pace, None):
            start = 0
            while start < ready.batches:
                if interrupted():
                    return None
                count = min(pace.steps, ready.batches - start)
                traces = evaluate.traces
                running = evaluate(state, running, ready.segment, start, count)
                start += count
                done += count
                shown["done"] = done
                pace.follow(
                    running.index, running, count, compiled=evaluate.traces != traces
                )
                if display.due():
                    _update(display, pace, order)
        if interrupted():
            return None
        shown.update(logs=read_logs(running, order)[0], finished=True)
    return dict(shown["logs"])


def read(tree: PyTree) -> PyTree:
    """Copies device values to the host: the one place of the loops that waits."""
    return jax.device_get(tree)


def read_logs(
    running: Running, order: Callable[[Logs], Logs], rate: Any = None
) -> tuple[dict[str, Any], float | None]:
    """Returns the values of the accumulators as floats, and the rate, in one read."""
    logs, rate = read((running.logs, rate))
    return as_values(logs, rate, order)


def as_values(
    logs: Logs, rate: Any, order: Callable[[Logs], Logs]
) -> tuple[dict[str, Any], float | None]:
    """Returns the values of accumulators on the host as floats, and the rate."""
    with np.errstate(divide="ignore", invalid="ignore"):
        values = {name: as_number(log.compute()) for name, log in order(logs).items()}
    return values, None if rate is None else float(np.real(rate))


def _read_values(running: Running, order: Callable[[Logs], Logs]) -> dict[str, Any]:
    return read_logs(running, order)[0]


def as_number(value: Any) -> Any:
    """Returns a float, or a list of floats of a metric that has several values."""
    array = np.asarray(value)
    return float(array) if array.ndim == 0 else array.tolist()
