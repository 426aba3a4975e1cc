"""The host loop of a prediction; joins or splits the outputs."""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import numpy as np

from flaxfit._core.errors import DataError
from flaxfit._core.types import HostArray, PyTree, TrainState
from flaxfit._loops.feeder import Execution, open_pass
from flaxfit._loops.host_reads import read
from flaxfit._programs.chunks import Stack
from flaxfit._programs.program_cache import Outputs
from flaxfit._programs.resolve import ResolvedTask
from flaxfit._reporting.display import Display, epoch_display
from flaxfit.data.sources.base import BatchSource

Part: TypeAlias = tuple[PyTree, tuple[int, ...]]
"""The outputs of a call, NumPy arrays `[batches, batch, ...]` with their padding, and
how many rows of each batch are real."""


@dataclass(frozen=True)
class Prediction:
    """The prediction of one dataset.

    Attributes:
      resolved: the compiled programs.
      execution: how to run them.
      source: the inputs.
      outputs: the outputs of one batch.
      steps: the largest number of batches, None for all.
      sown: whether to predict the `intermediates` that the model sows.
    """

    resolved: ResolvedTask
    execution: Execution
    source: BatchSource
    outputs: Outputs
    steps: int | None = None
    sown: bool = False

    @property
    def examples(self) -> int | None:
        """The number of examples to predict, None if unknown before reading."""
        source, steps = self.source, self.steps
        if steps is None or source.num_examples is None:
            return source.num_examples
        if source.kind == "arrays":
            return min(source.num_examples, steps * source.batch_size)
        enough = source.num_batches is not None and steps >= source.num_batches
        return source.num_examples if enough else None

    def run(
        self, state: TrainState, *, copy: bool = False, display: Display | None = None
    ) -> Generator[Part]:
        """Yields the outputs of each call.

        Outputs are copied to the host while the next call runs, or while waiting for
        data. The state is only read. For `copy` see `open_pass`.
        """
        programs = self.resolved.programs
        predict = programs.intermediates if self.sown else programs.predict
        feed = open_pass(
            self.resolved,
            self.execution,
            self.source,
            steps=self.steps,
            copy=copy,
            bytes_per_output=self.outputs.nbytes,
        )
        display = display or Display()
        total = self.source.num_batches if self.steps is None else self.steps
        done, queue = 0, self.execution.queue(self.resolved)
        pending: Callable[[], Part] | None = None
        with (
            epoch_display(display, "Predicting", total) as shown,
            feed.epoch() as chunks,
        ):
            while True:
                if pending is not None and not chunks.ready:
                    yield pending()
                    pending = None
                chunk = next(chunks, None)
                if chunk is None:
                    break
                start = 0
                while start < chunk.batches:
                    steps = min(queue.steps_per_call, chunk.batches - start)
                    traces = predict.traces
                    outputs = predict(state, chunk.chunk, start, steps, done)
                    # Reading the previous call waits only for that one: the device
                    # already has this call.
                    if pending is not None:
                        yield pending()
                    compiled = predict.traces != traces
                    queue.submit(outputs, outputs, steps, compiled=compiled)
                    part = slice(start, start + steps)
                    single = programs.one_step_per_call
                    stacked = not single and isinstance(chunk.chunk, Stack)
                    pending = partial(
                        _read_outputs, outputs, chunk.examples[part], part, stacked
                    )
                    start += steps
                    done += steps
                    shown["done"] = done
                    if display.due():
                        display.update(done, {})
            if pending is not None:
                yield pending()
            shown["finished"] = True


def _read_outputs(
    outputs: PyTree, examples: tuple[int, ...], part: slice, stacked: bool
) -> Part:
    chosen = part if stacked else None  # leaf[None] adds the axis of the batches
    return jax.tree.map(lambda leaf: leaf[chosen], read(outputs)), examples


def join_batches(parts: Generator[Part], batched: Sequence[bool]) -> PyTree:
    """Joins the outputs of a prediction, without their padding.

    Args:
      parts: the outputs that `Prediction.run` yields.
      batched: for each leaf whether its first axis is the batch; others are stacked.

    Raises:
      DataError: the rows of two batches differ in shape.
    """
    columns: list[list[Any]] = [[] for _ in batched]
    structure = None
    with closing(parts):
        for outputs, examples in parts:
            leaves, structure = jax.tree.flatten(outputs)
            for column, leaf, is_batch in zip(columns, leaves, batched, strict=True):
                if is_batch and column and column[0].shape[1:] != leaf.shape[2:]:
                    before, now = list(column[0].shape[1:]), list(leaf.shape[2:])
                    raise DataError(
                        "predict joins the outputs of all batches, but their rows "
                        f"differ in shape: {before} and {now}. Write for outputs in "
                        "trainer.predict_batches(x), or pad all inputs to one length "
                        "with pad_to=128."
                    )
                if is_batch:
                    column += real_rows(leaf, examples)
                else:
                    column.append(leaf)
    return jax.tree.unflatten(structure, [np.concatenate(c) for c in columns])


def split_batches(parts: Generator[Part]) -> Generator[PyTree]:
    """Yields the outputs of each batch, arrays `[rows, ...]` without padding.

    They are copies: keeping one does not keep any other memory alive.
    """
    with closing(parts):
        for outputs, examples in parts:
            for number, rows in enumerate(examples):
                yield jax.tree.map(
                    lambda leaf, number=number, rows=rows: leaf[number, :rows].copy(),
                    outputs,
                )


def real_rows(leaf: HostArray, examples: tuple[int, ...]) -> list[HostArray]:
    """Returns outputs `[batches, batch, ...]` as pieces `[rows, ...]`, unpadded."""
    if sum(examples) == leaf.shape[0] * leaf.shape[1]:
        return [leaf.reshape(-1, *leaf.shape[2:])]
    return [one[:rows] for one, rows in zip(leaf, examples, strict=True)]
