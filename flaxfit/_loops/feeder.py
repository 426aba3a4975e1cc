"""Feeds chunks to the device ahead of the steps that need them."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import count, islice
from typing import Protocol

import numpy as np

from flaxfit._core.types import Batch, HostArray
from flaxfit._loops.chunk_builder import ChunkBuilder, DeviceChunk
from flaxfit._loops.dispatch_queue import DispatchQueue
from flaxfit._loops.prefetch import Prefetch
from flaxfit._programs.chunks import (
    Chunk,
    DeviceDataset,
    Stack,
    order_capacity,
    stack_capacity,
)
from flaxfit._programs.placement import Placement
from flaxfit._programs.resolve import ResolvedTask
from flaxfit._reporting.timing import Clock
from flaxfit.data.datasets.shuffling import rows_of
from flaxfit.data.sources.array_source import ArraySource
from flaxfit.data.sources.base import BatchSource
from flaxfit.data.sources.position import IteratorCheckpoints, Position, epochs_of

# Row counts are rounded up to a multiple of an eighth of a power of two, so that
# datasets of nearly the same size share one compiled program.
_ROUNDING_BITS = 4


@dataclass(frozen=True)
class Execution:
    """How a trainer runs its steps; no option changes a result beyond rounding.

    Attributes:
      steps_per_call: steps of one call of the train program, None to tune them by
        timing.
      device_data: the share of the free device memory that data may take.
      prefetch: how many chunks a background thread prepares ahead; 0 for no thread.
    """

    steps_per_call: int | None = None
    device_data: float = 0.25
    prefetch: int = 2

    def queue(self, resolved: ResolvedTask) -> DispatchQueue:
        """Returns the queue for the calls of the programs."""
        single = resolved.programs.one_step_per_call
        return DispatchQueue(1 if single else self.steps_per_call)


class Chunks(Protocol):
    """The chunks of one epoch, in order."""

    @property
    def ready(self) -> bool:
        """Whether the next chunk is available without waiting."""

    def __iter__(self) -> Iterator[DeviceChunk]: ...

    def __next__(self) -> DeviceChunk: ...


class Feed(Protocol):
    """Provides a loop with chunks, epoch by epoch."""

    def epoch(self) -> AbstractContextManager[Chunks]:
        """Returns the chunks of the next epoch; leaving the context ends its thread."""


def open_feed(
    resolved: ResolvedTask,
    execution: Execution,
    source: BatchSource,
    *,
    epochs: int,
    steps: int | None,
    position: Position = Position(),  # noqa: B008
    bookmarks: IteratorCheckpoints | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Feed:
    """Returns the feed of a fit: `epochs` epochs from `position` on.

    Args:
      steps: batches of an epoch, from repeated passes; None for one pass.
      bookmarks: saved iterator states, for data that cannot start at a given batch.
      stopped: True ends the wait for data.
    """
    placement = resolved.placement
    if isinstance(source, ArraySource) and source.pad and source.in_memory:
        rows = placement.rounded(_rounded(source.num_examples))
        size = source.nbytes * rows // source.num_examples
        if how := placement.room_for(size, execution.device_data):
            data = placement.put_data(source.padded(rows), how)
            capacity = order_capacity(source.batch_size, execution.steps_per_call)
            orders = _RowOrders(source, epochs, steps, position)
            return _DirectFeed(
                lambda: _ordered_chunks(
                    resolved, data, orders, capacity, source.counted
                )
            )
    batches = epochs_of(source, steps, position, bookmarks)
    return _SequentialFeed(batches, placement, execution, source, stopped)


def open_pass(
    resolved: ResolvedTask,
    execution: Execution,
    source: BatchSource,
    *,
    steps: int | None,
    keep: bool = False,
    copy: bool = False,
    bytes_per_output: int = 0,
    stopped: Callable[[], bool] = lambda: False,
) -> Feed:
    """Returns the feed of an evaluation or prediction: the batches in order.

    Each epoch of the feed starts at the beginning of the data.

    Args:
      steps: the largest number of batches, None for all.
      keep: whether the data is read several times, so that it may stay on the device.
      copy: whether chunks must be copies, because the caller may write into the
        source's arrays before the chunks are used.
      bytes_per_output: size of a batch's outputs on the device.
      stopped: True ends the wait for data.
    """
    placement = resolved.placement
    if not (isinstance(source, ArraySource) and source.in_memory and source.pad):
        passes = (islice(source.batches(0), steps) for _ in count())
        return _SequentialFeed(
            passes, placement, execution, source, stopped, bytes_per_output
        )
    size = source.nbytes // source.num_examples * source.batch_size
    capacity = stack_capacity(max(size, bytes_per_output), execution.steps_per_call)
    fits = placement.room_for(source.nbytes, execution.device_data) == "whole"
    return _DirectFeed(
        lambda: _stacks_of(source, placement, capacity, steps, copy=keep or copy),
        keep=keep and fits,
    )


def first_chunk(feed: Feed) -> Chunk:
    """Returns the first chunk of an epoch."""
    with feed.epoch() as chunks:
        return next(iter(chunks)).chunk


class _RowOrders:
    """The row numbers of the batches of each epoch, from repeated passes.

    An order is `int32[batches, batch]` of row numbers, see `DeviceDataset`. An epoch
    may end within a pass; the next epoch then takes the rest of that pass.
    """

    def __init__(
        self, source: ArraySource, epochs: int, steps: int | None, position: Position
    ) -> None:
        self._source = source
        self._epochs = epochs
        self._length = source.num_batches if steps is None else steps
        self._done = position.batch
        first, start = position.in_passes(steps, source.num_batches)
        self._passes = count(first)
        self._rest = self._next_pass()[start:]

    def epoch(self) -> Iterator[HostArray]:
        """Yields the orders of the next epoch, pass by pass."""
        left, self._done = self._length - self._done, 0
        while left > 0:
            if not len(self._rest):
                self._rest = self._next_pass()
            taken, self._rest = self._rest[:left], self._rest[left:]
            left -= len(taken)
            yield taken
        self._epochs -= 1
        if self._epochs > 0 and not len(self._rest):
            # Shuffle for the next epoch while the device still computes this one.
            self._rest = self._next_pass()

    def _next_pass(self) -> HostArray:
        return self._source.order(next(self._passes))


def _ordered_chunks(
    resolved: ResolvedTask,
    data: Batch,
    orders: _RowOrders,
    capacity: int,
    counted: HostArray | None,
) -> Iterator[DeviceChunk]:
    """Yields the chunks of an epoch of data that is on the device.

    Only the order of the rows is sent to the device.
    """
    placement = resolved.placement
    # A single call takes an order from the host as fast as from the device, but each
    # of many calls would transfer the order again.
    put_order = resolved.programs.one_step_per_call or len(placement.devices) > 1
    for whole in orders.epoch():
        for first in range(0, len(whole), capacity):
            rows = whole[first : first + capacity]
            # Always of full capacity: another shape would compile another program.
            order = np.zeros((capacity, rows.shape[1]), np.int32)
            order[: len(rows)] = rows
            chunk: Chunk = DeviceDataset(data, order)
            if put_order:
                chunk = placement.put_chunk(chunk)
            real = rows >= 0
            if counted is not None:
                real &= counted[rows_of(rows)[0]]
            examples = np.count_nonzero(real, axis=1)
            yield DeviceChunk(chunk, len(rows), tuple(examples.tolist()))


def _stacks_of(
    source: ArraySource,
    placement: Placement,
    capacity: int,
    steps: int | None,
    copy: bool,
) -> Iterator[DeviceChunk]:
    """Yields stacks of batches in order, one at a time while the device computes.

    Without `copy` a stack may share the user's memory: the caller then has to finish
    the pass before returning to the user.
    """
    batches = source.num_batches if steps is None else min(steps, source.num_batches)
    for first in range(0, batches, capacity):
        number = min(capacity, batches - first)
        stacked, examples = source.stack(first, number, capacity, own=copy)
        yield DeviceChunk(placement.put_chunk(Stack(stacked)), number, examples)


class _DirectFeed:
    """Builds chunks in the calling thread, when they are needed.

    Args:
      chunks: yields the chunks of the next epoch.
      keep: whether the chunks of the first epoch stay on the device for later epochs.
    """

    def __init__(
        self, chunks: Callable[[], Iterator[DeviceChunk]], keep: bool = False
    ) -> None:
        self._chunks = chunks
        self._keep = keep
        self._kept: list[DeviceChunk] | None = None

    def epoch(self) -> AbstractContextManager[Chunks]:
        if self._kept is not None:
            return nullcontext(_Direct(iter(self._kept)))
        return nullcontext(_Direct(self._recorded() if self._keep else self._chunks()))

    def _recorded(self) -> Iterator[DeviceChunk]:
        kept = []
        for chunk in self._chunks():
            kept.append(chunk)
            yield chunk
        self._kept = kept


@dataclass(frozen=True)
class _SequentialFeed:
    """Gathers, stacks and transfers batches as they arrive."""

    epochs: Iterator[Iterator[Batch]]
    placement: Placement
    execution: Execution
    source: BatchSource
    stopped: Callable[[], bool]
    bytes_per_output: int = 0

    def epoch(self) -> AbstractContextManager[Chunks]:
        batches, prefetch = next(self.epochs), self.execution.prefetch
        builder = ChunkBuilder(
            self.placement,
            # Only batches of one length can be stacked, and stacking reads ahead.
            self.source.pad and prefetch > 0,
            self.execution.steps_per_call,
            self.bytes_per_output,
            self.source.reuses_buffers,
        )
        if prefetch == 0:
            return nullcontext(_Direct(_one_by_one(batches, builder)))
        return Prefetch(batches, builder, prefetch, self.stopped)


def _one_by_one(
    batches: Iterator[Batch], builder: ChunkBuilder
) -> Iterator[DeviceChunk]:
    for batch in batches:
        builder.add(batch)
        yield builder.send(builder.close())


class _Direct:
    """Chunks that are built in the calling thread."""

    ready = True

    def __init__(self, chunks: Iterator[DeviceChunk]) -> None:
        self._chunks = chunks

    def __iter__(self) -> Iterator[DeviceChunk]:
        return self._chunks

    def __next__(self) -> DeviceChunk:
        return next(self._chunks)


def _rounded(rows: int) -> int:
    unit = 2 ** max(0, rows.bit_length() - _ROUNDING_BITS)
    return -(-rows // unit) * unit


def timed(
    chunks: Chunks, queue: DispatchQueue, clock: Clock | None
) -> Iterator[DeviceChunk]:
    """Yields the chunks; measures the waits in which the device had nothing to do."""
    while True:
        if not chunks.ready:
            # Otherwise the wait for data would count as time of the calls in flight.
            queue.wait_all()
        busy, began = queue.seconds_left, time.perf_counter()
        was_idle = queue.idle
        chunk = next(chunks, None)
        if clock is not None and queue.idle:
            waited = time.perf_counter() - began - (0.0 if was_idle else busy)
            clock.move(max(0.0, waited), "waiting_for_data")
        if chunk is None:
            return
        yield chunk
