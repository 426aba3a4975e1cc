"""The host loop of a prediction; joins or splits the outputs."""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial
from typing import Any, TypeAlias

import jax
import numpy as np

from flaxfit._core.errors import DataError
from flaxfit._core.types import HostArray, PyTree, TrainState
from flaxfit._loops.dispatch_queue import Pace
from flaxfit._loops.feeder import Feed
from flaxfit._loops.host_reads import read
from flaxfit._programs.chunks import Stack
from flaxfit._programs.compile import Program
from flaxfit._reporting.display import Display, epoch_display

Part: TypeAlias = tuple[PyTree, tuple[int, ...]]
"""The outputs of a call, NumPy arrays `[batches, batch, ...]` with the fill still in
them, and how many rows of each batch are real."""


def predict_loop(
    state: TrainState,
    *,
    predict: Program,
    single: bool,
    feed: Feed,
    total: int | None,
    steps_per_call: int | None,
    display: Display,
) -> Generator[Part]:
    """Yields the outputs of call after call.

    They are read while the next calls run, or while the data is waited for.

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
    before: Callable[[], Part] | None = None
    with (
        epoch_display(display, "Predicting", total) as shown,
        feed.epoch() as segments,
    ):
        while True:
            if before is not None and not segments.ready:
                yield before()
                before = None
            ready = next(segments, None)
            if ready is None:
                break
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
) -> Part:
    chosen = part if stacked else None  # leaf[None] adds the axis
    return jax.tree.map(lambda leaf: leaf[chosen], read(outputs)), examples


def join_batches(parts: Generator[Part], batched: Sequence[bool]) -> PyTree:
    """Joins the outputs of `predict_loop`, without their fill.

    Args:
      parts: what `predict_loop` yields.
      batched: for each leaf whether its first axis is the batch; others are stacked.

    Raises:
      DataError: rows of different shapes.
    """
    columns: list[list[Any]] = [[] for _ in batched]
    structure = None
    with closing(parts):
        for outputs, examples in parts:
            leaves, structure = jax.tree.flatten(outputs)
            for column, leaf, is_batch in zip(columns, leaves, batched, strict=True):
                if is_batch and column and column[0].shape[1:] != leaf.shape[2:]:
                    raise DataError(_unlike_rows(column[0].shape[1:], leaf.shape[2:]))
                if is_batch:
                    column += real_rows(leaf, examples)
                else:
                    column.append(leaf)
    return jax.tree.unflatten(structure, [np.concatenate(c) for c in columns])


def split_batches(parts: Generator[Part]) -> Generator[PyTree]:
    """Yields the outputs of each batch, arrays `[rows, ...]` without its fill.

    They are copies: whoever keeps one keeps nothing else alive.
    """
    with closing(parts):
        for outputs, examples in parts:
            for number, rows in enumerate(examples):
                yield jax.tree.map(
                    lambda leaf, number=number, rows=rows: leaf[number, :rows].copy(),
                    outputs,
                )


def real_rows(leaf: HostArray, examples: tuple[int, ...]) -> list[HostArray]:
    """Returns pieces of outputs `[batches, batch, ...]`: their rows without fill."""
    if sum(examples) == leaf.shape[0] * leaf.shape[1]:
        return [leaf.reshape(-1, *leaf.shape[2:])]
    return [one[:rows] for one, rows in zip(leaf, examples, strict=True)]


def _unlike_rows(before: tuple[int, ...], now: tuple[int, ...]) -> str:
    return (
        "predict joins the outputs of all batches, and their rows differ in shape: "
        f"{list(before)} and {list(now)}. Write for outputs in "
        "trainer.predict_batches(x), or pad all inputs to one length, pad_to=128."
    )
