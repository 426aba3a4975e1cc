"""The host loop of a fit. It dispatches steps and rarely reads from the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import numpy as np

from flaxfit import checkpoint
from flaxfit._loops.chunk_builder import DeviceChunk
from flaxfit._loops.context import FitContext
from flaxfit._loops.dispatch_queue import DispatchQueue
from flaxfit._loops.feeder import Feed, timed
from flaxfit._loops.host_reads import as_values, read, read_logs, show_progress
from flaxfit._loops.nonfinite import NonFiniteGuard, counts_of
from flaxfit._programs.compile import shapes_of_call
from flaxfit._reporting.display import epoch_display
from flaxfit.callbacks.base import Outcome

_OUT_OF_MEMORY = (
    "The device ran out of memory; the trainer holds the state before this step. Write "
    "a smaller batch_size= in fit, with Trainer(accumulate_steps=2) for updates from "
    "as many examples, or Trainer(device_data=0) to keep the data on the host."
)


def fit_loop(fit: FitContext) -> None:
    """Trains until all epochs are done, or a callback, a bad loss or a signal ends it.

    Even after an error, `fit.loop.history` holds the finished epochs, and `fit.store`
    the state after the last finished step, or one that a callback or a rollback put.
    """
    loop, epochs = fit.loop, fit.data.epochs
    queue = fit.execution.queue(fit.resolved)
    guard = NonFiniteGuard(fit, queue)
    try:
        # `on_train_begin` resets the callbacks, so their saved state is loaded after.
        fit.callbacks.call("on_train_begin", loop)
        fit.session.resume(loop)
        _save(fit, queue, guard)
        first_batch = fit.session.origin.batch
        feed = fit.open_feed(epochs.start, first_batch)
        for epoch in epochs:
            if fit.ending:
                break
            loop.epoch = epoch
            loop.batch = first_batch if epoch == epochs.start else 0
            fit.callbacks.call("on_epoch_begin", loop)
            finished, feed = train_epoch(fit, feed, queue, guard)
            if not finished:
                break
    except BaseException as error:
        # Report this error; a later one of `on_train_end` becomes a note.
        loop.outcome = loop.outcome._replace(failure="interrupted")
        try:
            _end(fit, queue, guard)
        except Exception as later:
            error.add_note(f"then on_train_end failed: {later!r}")
        raise
    if fit.interrupt.requested and not loop.stopped:
        loop.outcome = Outcome(fit.interrupt.reason, "interrupted")
    _end(fit, queue, guard)


def train_epoch(
    fit: FitContext, feed: Feed, queue: DispatchQueue, guard: NonFiniteGuard
) -> tuple[bool, Feed]:
    """Trains one epoch.

    Returns:
      Whether the epoch was finished, and the feed for the next one.
    """
    loop, start = fit.loop, fit.loop.batch
    if loop.running is None:
        loop.running = fit.resolved.empty()
    if fit.ending:
        return False, feed
    title = f"Epoch {loop.epoch + 1}/{loop.epochs}"
    loop.set_logs({})
    with epoch_display(fit.display, title, loop.steps_per_epoch) as shown:
        counted: list[int] = []  # examples of each batch
        complete = False
        while not complete:  # again after each rollback
            queue.begin(loop.batch)
            with feed.epoch() as chunks:
                for chunk in timed(chunks, queue, loop.clock):
                    done = 0
                    while done < chunk.batches and not guard.should_break:
                        done += dispatch(fit, chunk, done, queue, guard)
                        shown["done"] = loop.batch
                    counted += chunk.examples[:done]
                    if guard.should_break:
                        break
            # After a callback's stop the epoch is closed as usual, after a signal not.
            if fit.interrupt.requested:
                guard.check()
                return False, feed
            queue.wait_all()
            values = _read_epoch(fit, guard)
            if loop.outcome.failure:
                return False, feed
            complete = not guard.rolled_back
            if not complete:
                guard.rolled_back = False
                del counted[loop.batch - start :]
                feed = fit.open_feed(loop.epoch, loop.batch)
        closed = _close_epoch(fit, *values, shown)
        if closed:
            timing = loop.history.timing
            examples = sum(counted[: loop.batch - start])
            timing.append(timing.clock.lap(), loop.batch - start, examples)
            loop.running = None
            _save(fit, queue, guard)
        return closed, feed


def dispatch(
    fit: FitContext,
    chunk: DeviceChunk,
    start: int,
    queue: DispatchQueue,
    guard: NonFiniteGuard,
) -> int:
    """Trains on batches of a chunk, from `start` on, in one call; runs batch hooks.

    Returns:
      The number of steps taken.
    """
    loop, train, callbacks = fit.loop, fit.resolved.programs.train, fit.callbacks
    if callbacks.has("on_train_batch_begin"):
        callbacks.call("on_train_batch_begin", loop)
        queue.ignore_timing()
    left = chunk.batches - start
    steps = min(queue.steps_per_call, left, callbacks.steps_to_hook(loop.step) or left)
    traces = train.traces
    # Between `take` and `put` the state belongs to the device: a signal handler must
    # not raise, and no other thread may read.
    with (
        fit.interrupt.shield(),
        fit.store.lock,
        _new_shapes(fit, chunk, start, steps) as are_new,
    ):
        state, running = train(
            fit.store.take(), loop.running, chunk.chunk, start, steps
        )
        if are_new:
            jax.block_until_ready(running)
        fit.store.put(state)
        loop.running = running
        loop.step += steps
        loop.batch += steps
    queue.submit(running.index, running, steps, compiled=train.traces != traces)
    guard.poll()
    _call_hooks(fit, queue)
    if loop.has_saves:
        _save(fit, queue, guard)
        queue.ignore_timing()
    if fit.display.due():
        show_progress(fit.display, queue, fit.resolved.task.order)
    return steps


def _call_hooks(fit: FitContext, queue: DispatchQueue) -> None:
    """Calls `on_train_batch_end` of the callbacks that are due."""
    loop, callbacks = fit.loop, fit.callbacks
    if not callbacks.has_turn("on_train_batch_end", loop.step):
        return
    if callbacks.steps_to_hook(loop.step) is None:
        # A hook runs after every call: without this wait, calls would go untimed and
        # stay short.
        queue.wait_all()
    loop.defer_logs(partial(read_logs, loop.running, fit.resolved.task.order))
    callbacks.call("on_train_batch_end", loop)
    queue.ignore_timing()


@contextmanager
def _new_shapes(
    fit: FitContext, chunk: DeviceChunk, start: int, steps: int
) -> Iterator[bool]:
    """Yields whether the call has new shapes; if so, keeps a copy of the state.

    A call with new shapes may run out of memory. The program has consumed the state by
    then, so only the copy can be put back. The caller waits for the call inside this
    context, so that the error is raised here and not by a later call.
    """
    loop, train, timing = fit.loop, fit.resolved.programs.train, fit.loop.history.timing
    # Cheaper than the whole signature, which this asks for at every call.
    size = tuple(leaf.shape for leaf in jax.tree.leaves(chunk.chunk))
    if size in fit.sizes:
        yield False
        return
    fit.sizes.add(size)
    shapes = shapes_of_call(fit.store.peek(), loop.running, chunk.chunk, start, steps)
    if timing.flops_per_step is None:
        timing.flops_per_step = partial(train.flops, shapes)
    if shapes[:3] in [known[:3] for known in train.signatures]:
        yield False
        return
    kept = checkpoint.snapshot(fit.store.peek(), copy=True).state
    try:
        yield True
    except Exception as error:
        try:
            fit.store.put(fit.session.as_state(kept))
        except Exception as later:  # report the first error
            error.add_note(f"then the state could not be put back: {later!r}")
        if "RESOURCE_EXHAUSTED" in str(error):
            error.add_note(_OUT_OF_MEMORY)
        raise


def _read_epoch(
    fit: FitContext, guard: NonFiniteGuard
) -> tuple[dict[str, Any], float | None]:
    """Returns the epoch's values and the learning rate, in one read of the device."""
    running, task = fit.loop.running, fit.resolved.task
    rate = task.optimizer.learning_rate(fit.store.peek().opt_state)
    counts, merged, logs, rate = read(
        (counts_of(running), running.index, running.logs, rate)
    )
    guard.handle(*counts)
    # After a rollback, or if all batches were skipped, there is nothing to average.
    values = as_values(logs, task.order) if merged else {}
    return values, None if rate is None else float(np.real(rate))


def _close_epoch(
    fit: FitContext, logs: dict[str, Any], rate: float | None, shown: dict[str, Any]
) -> bool:
    """Validates and records the epoch; False if a signal interrupted the validation."""
    loop, data, callbacks = fit.loop, fit.data, fit.callbacks
    shown["logs"] = logs
    if not loop.stopped:  # else the epoch may be shorter than it would have been
        loop.steps_per_epoch = loop.batch
    if data.validate is not None and data.validates_at(loop.epoch):
        loop.set_logs(logs)
        callbacks.call("on_test_begin", loop)
        with loop.clock.phase("evaluating"):
            values = data.validate(fit.store.peek())
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


def _save(fit: FitContext, queue: DispatchQueue, guard: NonFiniteGuard) -> None:
    """Writes the checkpoints that callbacks have requested."""
    loop = fit.loop
    if not loop.has_saves:
        return
    with loop.clock.phase("saving"):
        queue.wait_all()
        guard.check()
        if guard.rolled_back or loop.outcome.failure == "nonfinite":
            # The state was rolled back or is non-finite: drop the requests.
            loop.take_saves()
        elif loop.has_saves:
            fit.session.save(loop, fit.store.peek())


def _end(fit: FitContext, queue: DispatchQueue, guard: NonFiniteGuard) -> None:
    try:
        fit.callbacks.end(fit.loop)
    finally:
        _save(fit, queue, guard)
