"""The host loop of a fit. It dispatches steps and rarely reads from the device."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import jax
import numpy as np

from flaxfit import checkpoint
from flaxfit._core.types import StateHolder
from flaxfit._loops.chunk_builder import Ready
from flaxfit._loops.context import FitPlan
from flaxfit._loops.dispatch_queue import Pace
from flaxfit._loops.feeder import Feed, timed
from flaxfit._loops.host_reads import as_values, read, read_logs, show_progress
from flaxfit._loops.nonfinite import Watch, counts_of
from flaxfit._programs.compile import EpochAccumulators, shapes_of_call
from flaxfit._reporting.display import epoch_display
from flaxfit.callbacks.base import LoopState
from flaxfit.data.sources.position import Position


def fit_loop(loop: LoopState, holder: StateHolder, plan: FitPlan) -> None:
    """Trains until the plan is done, a callback stops it, or Ctrl-C.

    `loop.history` holds the finished epochs; `holder` the state after the last
    finished step, whatever happens.
    """
    watch = Watch(plan, Pace(plan.steps_per_call))
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


def _end(loop: LoopState, holder: StateHolder, watch: Watch) -> None:
    try:
        watch.plan.callbacks.end(loop)
    finally:
        _save(loop, holder, watch)


def _fit_epoch(
    loop: LoopState, holder: StateHolder, feed: Feed, watch: Watch
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


def _save(loop: LoopState, holder: StateHolder, watch: Watch) -> None:
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
    watch: Watch,
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
            loop.defer_logs(partial(read_logs, running, plan.order))
            callbacks.call("on_train_batch_end", loop)
            pace.distract()
        if loop.has_saves:
            _save(loop, holder, watch)
            pace.distract()
        if plan.display.due():
            show_progress(plan.display, pace, plan.order)
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
) -> EpochAccumulators:
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
    loop: LoopState, holder: StateHolder, watch: Watch
) -> tuple[dict[str, Any], float | None]:
    """Returns the epoch's values and the learning rate, in one read."""
    plan, running = watch.plan, loop.running
    rate = plan.learning_rate(holder.peek().opt_state)
    merged = running.index
    (bad, out), merged, logs, rate = read(
        (counts_of(running), merged, running.logs, rate)
    )
    if plan.nonfinite != "ignore":
        watch.settle(loop, holder, bad, out)
    # After going back, or leaving out, there may be nothing to take a mean of.
    values = as_values(logs, plan.order) if merged else {}
    return values, None if rate is None else float(np.real(rate))


def _close_epoch(
    loop: LoopState,
    holder: StateHolder,
    logs: dict[str, Any],
    rate: float | None,
    shown: dict[str, Any],
    watch: Watch,
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
