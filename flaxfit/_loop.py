"""The host loops: fit, eval, predict. They dispatch, and read as seldom as they can."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import numpy as np

from flaxfit._compile import Program, Running, shapes_of_call
from flaxfit._display import Display, epoch_display
from flaxfit._feed import Feed, Segments
from flaxfit._interrupt import Interrupt
from flaxfit._pace import Pace
from flaxfit._packing import Ready
from flaxfit._segments import Stack
from flaxfit._timing import Clock
from flaxfit._types import Logs, PyTree, StateHolder, TrainState
from flaxfit.callbacks.base import CallbackList, LoopState

Evaluate: TypeAlias = Callable[[TrainState], dict[str, Any] | None]


@dataclass(frozen=True)
class FitPlan:
    """What one `fit` is to do.

    Attributes:
      epochs: `range(initial_epoch, epochs)`.
      train: the train program.
      running: an empty accumulator.
      feed: where the batches come from.
      steps_per_call: steps of one call of the program, None to go by the clock.
      order: sorts logs into History's order.
      learning_rate: reads the current rate from an optimizer state, or None.
      validate: evaluates a state, or None without validation data.
      validates_at: whether to validate after an epoch.
      callbacks: whom to call.
      display: where the progress goes.
      interrupt: tells of Ctrl-C.
    """

    epochs: range
    train: Program
    running: Running
    feed: Feed
    steps_per_call: int | None
    order: Callable[[Logs], Logs]
    learning_rate: Callable[[PyTree], Any]
    validate: Evaluate | None
    validates_at: Callable[[int], bool]
    callbacks: CallbackList
    display: Display
    interrupt: Interrupt


def fit_loop(loop: LoopState, holder: StateHolder, plan: FitPlan) -> None:
    """Trains until the plan is done, a callback stops it, or Ctrl-C.

    `loop.history` holds the finished epochs; `holder` the state after the last
    finished step, whatever happens.
    """
    pace = Pace(plan.steps_per_call)
    try:
        plan.callbacks.call("on_train_begin", loop)
        for loop.epoch in plan.epochs:
            plan.callbacks.call("on_epoch_begin", loop)
            finished = _fit_epoch(loop, holder, plan, pace)
            if not finished or loop.stopped or plan.interrupt.requested:
                break
    except BaseException as error:
        # The first error is the one to report; what follows from it is noted.
        loop.broken_off = True
        try:
            plan.callbacks.end(loop)
        except Exception as later:
            error.add_note(f"then on_train_end failed: {later!r}")
        raise
    if plan.interrupt.requested and not loop.stopped:
        loop.broken_off = True
        loop.stop("interrupted by Ctrl-C")
    plan.callbacks.end(loop)


def _fit_epoch(loop: LoopState, holder: StateHolder, plan: FitPlan, pace: Pace) -> bool:
    """Trains one epoch; False if it was broken off."""
    if loop.stopped or plan.interrupt.requested:
        return False
    title = f"Epoch {loop.epoch + 1}/{loop.epochs}"
    loop.batch = 0
    loop.set_logs({})
    with epoch_display(plan.display, title, loop.steps_per_epoch) as shown:
        running, examples = plan.running, 0
        pace.begin()
        with plan.feed.epoch() as segments:
            for ready in timed(segments, pace, loop.clock):
                running, done = _fit_segment(
                    loop, holder, plan, pace, ready, running, shown
                )
                examples += done
                if loop.stopped or plan.interrupt.requested:
                    break
        # A callback's stop ends the epoch as its last step would; Ctrl-C breaks it off.
        if plan.interrupt.requested:
            return False
        pace.drain()
        closed = _close_epoch(loop, holder, plan, running, shown)
        if closed:
            loop.history.timing.append(loop.clock.lap(), loop.batch, examples)
        return closed


def _fit_segment(
    loop: LoopState,
    holder: StateHolder,
    plan: FitPlan,
    pace: Pace,
    ready: Ready,
    running: Running,
    shown: dict[str, Any],
) -> tuple[Running, int]:
    """Trains on the batches of a segment, several in one call.

    Returns:
      The accumulators, and the examples that were trained on.
    """
    callbacks, start = plan.callbacks, 0
    while start < ready.batches:
        if callbacks.has("on_train_batch_begin"):
            callbacks.call("on_train_batch_begin", loop)
            pace.distract()
        left = ready.batches - start
        count = min(pace.steps, left, callbacks.steps_to_hook(loop.step) or left)
        traces = plan.train.traces
        running = _call(loop, holder, plan, ready, running, start, count)
        pace.follow(running.index, running, count, compiled=plan.train.traces != traces)
        start += count
        shown["done"] = loop.batch
        if callbacks.has("on_train_batch_end"):
            if callbacks.steps_to_hook(loop.step) is None:
                pace.drain()  # a hook at every call: its time is not the device's
            loop.defer_logs(partial(_read_values, running, plan.order))
            callbacks.call("on_train_batch_end", loop)
            pace.distract()
        if plan.display.due():
            _update(plan.display, pace, plan.order)
        if loop.stopped or plan.interrupt.requested:
            break
    return running, sum(ready.examples[:start])


def _call(
    loop: LoopState,
    holder: StateHolder,
    plan: FitPlan,
    ready: Ready,
    running: Running,
    start: int,
    count: int,
) -> Running:
    """Dispatches `count` steps from batch `start` on."""
    timing = loop.history.timing
    if timing.flops_per_step is None:
        shapes = shapes_of_call(holder.peek(), running, ready.segment, start, count)
        timing.flops_per_step = partial(plan.train.flops, shapes)
    # Between `take` and `put` the state is the device's.
    with plan.interrupt.shield(), holder.lock:
        state, running = plan.train(holder.take(), running, ready.segment, start, count)
        holder.put(state)
    loop.step += count
    loop.batch += count
    return running


def _close_epoch(
    loop: LoopState,
    holder: StateHolder,
    plan: FitPlan,
    running: Running,
    shown: dict[str, Any],
) -> bool:
    """Reads the epoch's values, validates, records; False if it was broken off."""
    rate = plan.learning_rate(holder.peek().opt_state)
    logs, rate = read_logs(running, plan.order, rate)
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
    loop.history.append(loop.epoch, logs)
    plan.callbacks.call("on_epoch_end", loop)
    loop.history.amend(loop.logs)
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


def predict_loop(
    state: TrainState,
    *,
    predict: Program,
    single: bool,
    feed: Feed,
    total: int | None,
    steps_per_call: int | None,
    display: Display,
) -> Iterator[tuple[PyTree, tuple[int, ...]]]:
    """Yields `(outputs, examples)` per call: NumPy arrays `[batches, batch, ...]`, the
    fill still in them, and how many rows of each batch are real.

    Outputs are read while the next calls run.

    Args:
      state: the state to predict with; it is only read.
      predict: the predict program.
      single: whether a call of it runs one batch.
      feed: where the batches come from.
      total: how many there are, None if that is not known.
      steps_per_call: batches of one call of the program, None to go by the clock.
      display: shows the progress.
    """
    done, pace = 0, Pace(steps_per_call)
    before: Callable[[], tuple[PyTree, tuple[int, ...]]] | None = None
    with (
        epoch_display(display, "Predicting", total) as shown,
        feed.epoch() as segments,
    ):
        for ready in segments:
            start = 0
            while start < ready.batches:
                count = min(pace.steps, ready.batches - start)
                traces = predict.traces
                outputs = predict(state, ready.segment, start, count, done)
                if before is not None:
                    yield before()
                pace.follow(outputs, outputs, count, compiled=predict.traces != traces)
                stacked = not single and isinstance(ready.segment, Stack)
                part = slice(start, start + count)
                before = partial(
                    _read_outputs, outputs, ready.examples[part], part, stacked
                )
                start += count
                done += count
                shown["done"] = done
                if display.due():
                    display.update(done, {})
        if before is not None:
            yield before()
        shown["finished"] = True


def _read_outputs(
    outputs: PyTree, examples: tuple[int, ...], part: slice, stacked: bool
) -> tuple[PyTree, tuple[int, ...]]:
    chosen = part if stacked else None  # leaf[None] adds the axis
    return jax.tree.map(lambda leaf: leaf[chosen], read(outputs)), examples


def join_batches(
    parts: Iterator[tuple[PyTree, tuple[int, ...]]], batched: Sequence[bool]
) -> PyTree:
    """Joins the outputs of `predict_loop`, without their fill.

    Args:
      parts: what `predict_loop` yields.
      batched: for each leaf whether its first axis is the batch; others are stacked.
    """
    columns: list[list[Any]] = [[] for _ in batched]
    structure = None
    for outputs, examples in parts:
        leaves, structure = jax.tree.flatten(outputs)
        for column, leaf, is_batch in zip(columns, leaves, batched, strict=True):
            if not is_batch:
                column.append(leaf)
            elif sum(examples) == leaf.shape[0] * leaf.shape[1]:
                column.append(leaf.reshape(-1, *leaf.shape[2:]))
            else:
                column += [one[:n] for one, n in zip(leaf, examples, strict=True)]
    return jax.tree.unflatten(structure, [np.concatenate(c) for c in columns])


def read(tree: PyTree) -> PyTree:
    """Copies device values to the host: the one place of the loops that waits."""
    return jax.device_get(tree)


def read_logs(
    running: Running, order: Callable[[Logs], Logs], rate: Any = None
) -> tuple[dict[str, Any], float | None]:
    """Returns the values of the accumulators as floats, and the rate, in one read."""
    logs, rate = read((running.logs, rate))
    with np.errstate(divide="ignore", invalid="ignore"):
        values = {name: as_number(log.compute()) for name, log in order(logs).items()}
    return values, None if rate is None else float(np.real(rate))


def _read_values(running: Running, order: Callable[[Logs], Logs]) -> dict[str, Any]:
    return read_logs(running, order)[0]


def as_number(value: Any) -> Any:
    """Returns a float, or a list of floats of a metric that has several values."""
    array = np.asarray(value)
    return float(array) if array.ndim == 0 else array.tolist()
