"""The host loops: fit, eval, predict. They dispatch, and read as seldom as they can."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import Any

import jax
import numpy as np

from flaxfit._compile import Program, Running
from flaxfit._display import Display, Silent, epoch_display
from flaxfit._interrupt import Interrupt
from flaxfit._types import Batch, Logs, PyTree, StateHolder, TrainState
from flaxfit.callbacks.base import CallbackList, LoopState
from flaxfit.data.source import Source

# Steps dispatched ahead of the device. Enough to keep it busy; without a bound a
# slow device would have the batches of a whole epoch pile up in its memory.
_STEPS_IN_FLIGHT = 8


@dataclass(frozen=True)
class FitPlan:
    """What one `fit` is to do.

    Attributes:
      epochs: `range(initial_epoch, epochs)`.
      steps_per_epoch: steps of an epoch, None for one pass over the data.
      order: sorts logs into History's order.
      learning_rate: reads the current rate from an optimizer state, or None.
      validate: evaluates a state, or None without validation data.
      validates_at: whether to validate after an epoch.
    """

    epochs: range
    steps_per_epoch: int | None
    order: Callable[[Logs], Logs]
    learning_rate: Callable[[PyTree], Any]
    validate: Callable[[TrainState], dict[str, Any] | None] | None
    validates_at: Callable[[int], bool]


def fit_loop(
    loop: LoopState,
    holder: StateHolder,
    *,
    plan: FitPlan,
    train: Program,
    empty: Callable[[], Running],
    source: Source,
    callbacks: CallbackList,
    display: Display,
    interrupt: Interrupt,
) -> None:
    """Trains until the plan is done, a callback stops it, or Ctrl-C.

    `loop.history` holds the finished epochs; `holder` the state after the last
    finished step, whatever happens.
    """
    batches = _epochs_of(source, plan.steps_per_epoch)
    try:
        callbacks.call("on_train_begin", loop)
        for loop.epoch in plan.epochs:
            callbacks.call("on_epoch_begin", loop)
            finished = _fit_epoch(
                loop,
                holder,
                plan=plan,
                train=train,
                running=empty(),
                batches=next(batches),
                callbacks=callbacks,
                display=display,
                interrupt=interrupt,
            )
            if not finished or loop.stopped or interrupt.requested:
                break
    except BaseException as error:
        # The first error is the one to report; what follows from it is noted.
        loop.broken_off = True
        try:
            callbacks.end(loop)
        except Exception as later:
            error.add_note(f"then on_train_end failed: {later!r}")
        raise
    if interrupt.requested and not loop.stopped:
        loop.broken_off = True
        loop.stop("interrupted by Ctrl-C")
    callbacks.end(loop)


def _fit_epoch(
    loop: LoopState,
    holder: StateHolder,
    *,
    plan: FitPlan,
    train: Program,
    running: Running,
    batches: Iterator[Batch],
    callbacks: CallbackList,
    display: Display,
    interrupt: Interrupt,
) -> bool:
    """Trains one epoch; False if it was broken off."""
    if loop.stopped or interrupt.requested:
        return False
    begins = callbacks.has("on_train_batch_begin")
    ends = callbacks.has("on_train_batch_end")
    in_flight: deque[Any] = deque()
    title = f"Epoch {loop.epoch + 1}/{loop.epochs}"
    loop.batch = 0
    loop.set_logs({})
    with epoch_display(display, title, loop.steps_per_epoch) as shown:
        for batch in batches:
            if begins:
                callbacks.call("on_train_batch_begin", loop)
            # From here to `put` the state is the device's.
            with interrupt.shield():
                state, running, token = train(holder.take(), running, batch)
                holder.put(state)
            loop.step += 1
            loop.batch += 1
            shown["done"] = loop.batch
            _throttle(in_flight, token)
            if ends:
                loop.defer_logs(partial(_read_values, running, plan.order))
                callbacks.call("on_train_batch_end", loop)
            if display.due():
                shown["logs"], _ = read_logs(running, plan.order)
                display.update(loop.batch, shown["logs"])
            if loop.stopped or interrupt.requested:
                break
        # A callback's stop ends the epoch as its last step would; Ctrl-C breaks it off.
        if interrupt.requested:
            return False
        return _close_epoch(loop, holder, plan, running, callbacks, shown)


def _close_epoch(
    loop: LoopState,
    holder: StateHolder,
    plan: FitPlan,
    running: Running,
    callbacks: CallbackList,
    shown: dict[str, Any],
) -> bool:
    """Reads the epoch's values, validates, records; False if it was broken off."""
    rate = plan.learning_rate(holder.peek().opt_state)
    logs, rate = read_logs(running, plan.order, rate)
    shown["logs"] = logs
    loop.steps_per_epoch = loop.batch
    if plan.validate is not None and plan.validates_at(loop.epoch):
        loop.set_logs(logs)
        callbacks.call("on_test_begin", loop)
        values = plan.validate(holder.peek())
        if values is None:
            return False
        logs |= {f"val_{name}": value for name, value in values.items()}
        loop.set_logs(logs)
        callbacks.call("on_test_end", loop)
    if rate is not None:
        logs["learning_rate"] = rate
    loop.set_logs(logs)
    loop.history.append(loop.epoch, logs)
    callbacks.call("on_epoch_end", loop)
    loop.history.amend(loop.logs)
    shown.update(logs=loop.logs, finished=True)
    return True


def _epochs_of(source: Source, steps: int | None) -> Iterator[Iterator[Batch]]:
    """Yields the batches of each epoch: a pass each, or `steps` of endless passes."""
    if steps is None:
        for index in count():
            yield source.batches(index)
    endless = (batch for index in count() for batch in source.batches(index))
    while True:
        yield islice(endless, steps)


def eval_loop(
    state: TrainState,
    *,
    evaluate: Program,
    running: Running,
    source: Source,
    steps: int | None,
    order: Callable[[Logs], Logs],
    display: Display | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Returns the values over the data, or None if `interrupted`.

    Args:
      state: the state to evaluate; it is only read.
      evaluate: the eval program.
      running: an empty accumulator.
      source: the data, read from its beginning.
      steps: at most so many batches, None for all.
      order: sorts logs into History's order.
      display: shows the progress.
      interrupted: asked before every batch.
    """
    display = display or Silent()
    in_flight: deque[Any] = deque()
    total = source.num_batches if steps is None else steps
    with epoch_display(display, "Evaluating", total) as shown:
        for done, batch in enumerate(islice(source.batches(0), steps), 1):
            if interrupted():
                return None
            running, token = evaluate(state, running, batch)
            _throttle(in_flight, token)
            shown["done"] = done
            if display.due():
                display.update(done, read_logs(running, order)[0])
        shown.update(logs=read_logs(running, order)[0], finished=True)
    return dict(shown["logs"])


def _throttle(in_flight: deque[Any], token: Any) -> None:
    in_flight.append(token)
    if len(in_flight) > _STEPS_IN_FLIGHT:
        jax.block_until_ready(in_flight.popleft())


def predict_loop(
    state: TrainState,
    *,
    predict: Program,
    source: Source,
    steps: int | None,
    display: Display,
) -> Iterator[tuple[PyTree, int]]:
    """Yields `(outputs, rows)` per batch as NumPy arrays, the fill still in them.

    One batch of outputs is on the device at a time. `rows` counts the real rows.
    """
    total = source.num_batches if steps is None else steps
    with epoch_display(display, "Predicting", total) as shown:
        for done, batch in enumerate(islice(source.batches(0), steps), 1):
            outputs = read(predict(state, batch.inputs, np.int32(done - 1)))
            rows = int(np.count_nonzero(batch.weights))
            shown["done"] = done
            if display.due():
                display.update(done, {})
            yield outputs, rows
        shown["finished"] = True


def join_batches(
    parts: Iterator[tuple[PyTree, int]], batched: Sequence[bool]
) -> PyTree:
    """Joins the outputs of `predict_loop`, without their fill.

    Args:
      parts: what `predict_loop` yields.
      batched: for each leaf whether its first axis is the batch; others are stacked.
    """
    columns: list[list[Any]] = [[] for _ in batched]
    structure = None
    for outputs, rows in parts:
        leaves, structure = jax.tree.flatten(outputs)
        for column, leaf, is_batch in zip(columns, leaves, batched, strict=True):
            column.append(leaf[:rows] if is_batch else leaf)
    joined = [
        np.concatenate(column) if is_batch else np.stack(column)
        for column, is_batch in zip(columns, batched, strict=True)
    ]
    return jax.tree.unflatten(structure, joined)


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
    return values, None if rate is None else float(rate)


def _read_values(running: Running, order: Callable[[Logs], Logs]) -> dict[str, Any]:
    return read_logs(running, order)[0]


def as_number(value: Any) -> Any:
    """Returns a float, or a list of floats of a metric that has several values."""
    array = np.asarray(value)
    return float(array) if array.ndim == 0 else array.tolist()
