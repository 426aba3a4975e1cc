"""Feeds chunks to the device ahead of the steps that need them."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count, islice
from typing import Protocol

import numpy as np

from flaxfit._core.types import Batch, HostArray
from flaxfit._loops.chunk_builder import Ready, SegmentPacker
from flaxfit._loops.dispatch_queue import Pace
from flaxfit._loops.prefetch import Prefetch
from flaxfit._programs.chunks import (
    Chunk,
    DeviceDataset,
    Stack,
    order_capacity,
    stack_capacity,
)
from flaxfit._programs.placement import Placement
from flaxfit._reporting.timing import Clock
from flaxfit.data.datasets.shuffling import rows_of
from flaxfit.data.sources.array_source import ArraySource
from flaxfit.data.sources.base import Source
from flaxfit.data.sources.position import Bookmarks, Position, epochs_of

# Rows are rounded up to an eighth of a power of two: data of nearly the same size then
# shares one compiled program.
_ROUNDING_BITS = 4


@dataclass(frozen=True)
class Execution:
    """How a trainer runs its steps; none of it changes a result beyond rounding.

    Attributes:
      steps_per_call: steps of one call of the train program, None to go by the clock.
      device_data: the share of the free device memory that data may take.
      prefetch: how many segments a background thread prepares ahead; 0 for none.
    """

    steps_per_call: int | None = None
    device_data: float = 0.25
    prefetch: int = 2

    def per_call(self, *, single: bool) -> int | None:
        """Returns the steps of a call of a program that may only run single ones."""
        return 1 if single else self.steps_per_call


class Segments(Protocol):
    """The segments of one epoch, in order."""

    @property
    def ready(self) -> bool:
        """Whether the next one can be had without waiting."""

    def __iter__(self) -> Iterator[Ready]: ...

    def __next__(self) -> Ready: ...


class Feed(Protocol):
    """Where a loop gets its segments from."""

    def epoch(self) -> AbstractContextManager[Segments]:
        """Returns the segments of the next epoch; leaving it ends its thread."""


def open_feed(
    source: Source,
    placement: Placement,
    execution: Execution,
    *,
    epochs: int,
    steps: int | None,
    single: bool,
    position: Position = Position(),  # noqa: B008
    bookmarks: Bookmarks | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Feed:
    """Returns the feed of a fit.

    Args:
      source: the data.
      placement: the devices.
      execution: how to run.
      epochs: how many epochs there will be from `position` on.
      steps: batches of an epoch, from endless passes; None for one pass.
      single: whether every call takes one step.
      position: where to begin.
      bookmarks: of data whose position is no number.
      stopped: whether to wait no longer.
    """
    if isinstance(source, ArraySource) and source.pad and source.in_memory:
        rows = placement.rounded(_rounded(source.num_examples))
        size = source.nbytes * rows // source.num_examples
        if how := placement.room_for(size, execution.device_data):
            data = placement.put_data(source.padded(rows), how)
            capacity = order_capacity(source.batch_size, execution.steps_per_call)
            return _ResidentFeed(
                source, data, placement, capacity, epochs, steps, single, position
            )
    batches = epochs_of(source, steps, position, bookmarks)
    return _StreamFeed(batches, placement, execution, source, stopped)


def open_pass(
    source: Source,
    placement: Placement,
    execution: Execution,
    *,
    steps: int | None,
    keep: bool = False,
    own: bool = False,
    bytes_per_output: int = 0,
    stopped: Callable[[], bool] = lambda: False,
) -> Feed:
    """Returns the feed of an evaluation or prediction: batches in their order.

    Args:
      source: the data; each epoch of the feed starts at its beginning.
      placement: the devices.
      execution: how to run.
      steps: at most so many batches.
      keep: whether it will be read again and again, so that it may stay on the
        device.
      own: whether what is read must be copies, as the caller goes on in between and
        may write into its arrays.
      bytes_per_output: what a batch leaves on the device.
      stopped: whether to wait no longer.
    """
    if not (isinstance(source, ArraySource) and source.in_memory and source.pad):
        passes = (islice(source.batches(0), steps) for _ in count())
        return _StreamFeed(
            passes, placement, execution, source, stopped, bytes_per_output
        )
    size = source.nbytes // source.num_examples * source.batch_size
    capacity = stack_capacity(max(size, bytes_per_output), execution.steps_per_call)
    feed = _PassFeed(source, placement, capacity, steps, own=keep or own)
    fits = placement.room_for(source.nbytes, execution.device_data) == "whole"
    return _KeptFeed(feed) if keep and fits else feed


def first_segment(feed: Feed) -> Chunk:
    """Returns the first segment of an epoch."""
    with feed.epoch() as segments:
        return next(iter(segments)).segment


class _ResidentFeed:
    """All examples lie on the device; an epoch sends the order of their rows."""

    def __init__(
        self,
        source: ArraySource,
        data: Batch,
        placement: Placement,
        capacity: int,
        epochs: int,
        steps: int | None,
        single: bool,
        position: Position,
    ) -> None:
        self._source = source
        self._data = data
        self._placement = placement
        self._capacity = capacity
        self._epochs = epochs
        self._steps = source.num_batches if steps is None else steps
        # One call takes an order from the host as fast as from the device; many calls
        # would each bring it there.
        self._put_order = single or len(placement.devices) > 1
        self._counted = source.counted
        self._passes, start = position.in_passes(steps, source.num_batches)
        self._order = self._next_order()[start:]
        self._done = position.batch

    def epoch(self) -> AbstractContextManager[Segments]:
        return nullcontext(_AtHand(self._segments()))

    def _segments(self) -> Iterator[Ready]:
        left, self._done = self._steps - self._done, 0
        while left > 0:
            if not len(self._order):
                self._order = self._next_order()
            chosen = self._order[: min(left, self._capacity)]
            self._order = self._order[len(chosen) :]
            left -= len(chosen)
            order = np.zeros((self._capacity, chosen.shape[1]), np.int32)
            order[: len(chosen)] = chosen
            segment: Chunk = DeviceDataset(self._data, order)
            if self._put_order:
                segment = self._placement.put_chunk(segment)
            real = chosen >= 0
            if self._counted is not None:
                real &= self._counted[rows_of(chosen)[0]]
            examples = np.count_nonzero(real, axis=1)
            yield Ready(segment, len(chosen), tuple(examples.tolist()))
        self._epochs -= 1
        if self._epochs > 0 and not len(self._order):
            # While the device still computes.
            self._order = self._next_order()

    def _next_order(self) -> HostArray:
        self._passes += 1
        return self._source.order(self._passes - 1)


class _PassFeed:
    """Arrays in their order, stack by stack while the device computes.

    Those that are not kept may be the user's own memory: the pass is over before its
    caller goes on.
    """

    def __init__(
        self,
        source: ArraySource,
        placement: Placement,
        capacity: int,
        steps: int | None,
        *,
        own: bool,
    ) -> None:
        self._source = source
        self._placement = placement
        self._capacity = capacity
        self._own = own
        self._batches = source.num_batches
        if steps is not None:
            self._batches = min(steps, self._batches)

    def epoch(self) -> AbstractContextManager[Segments]:
        return nullcontext(_AtHand(self._segments()))

    def _segments(self) -> Iterator[Ready]:
        for first in range(0, self._batches, self._capacity):
            number = min(self._capacity, self._batches - first)
            batches, examples = self._source.stack(
                first, number, self._capacity, own=self._own
            )
            yield Ready(self._placement.put_chunk(Stack(batches)), number, examples)


class _StreamFeed:
    """Batches are gathered, stacked and transferred as they come."""

    def __init__(
        self,
        epochs: Iterator[Iterator[Batch]],
        placement: Placement,
        execution: Execution,
        source: Source,
        stopped: Callable[[], bool],
        bytes_per_output: int = 0,
    ) -> None:
        self._epochs = epochs
        self._placement = placement
        self._execution = execution
        self._stopped = stopped
        self._bytes_per_output = bytes_per_output
        self._lent = source.lends
        # Batches of other lengths are no stack, nor is there one without reading ahead.
        self._stacks = source.pad and execution.prefetch > 0

    def epoch(self) -> AbstractContextManager[Segments]:
        batches = next(self._epochs)
        packer = SegmentPacker(
            self._placement,
            self._stacks,
            self._execution.steps_per_call,
            self._bytes_per_output,
            self._lent,
        )
        if self._execution.prefetch == 0:
            return nullcontext(_AtHand(_one_by_one(batches, packer)))
        return Prefetch(batches, packer, self._execution.prefetch, self._stopped)


def _one_by_one(batches: Iterator[Batch], packer: SegmentPacker) -> Iterator[Ready]:
    for batch in batches:
        packer.add(batch)
        yield packer.send(packer.close())


class _KeptFeed:
    """What the first epoch read stays on the device for the next ones."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._kept: list[Ready] | None = None

    @contextmanager
    def epoch(self) -> Iterator[Segments]:
        if self._kept is not None:
            yield _AtHand(iter(self._kept))
            return
        with self._feed.epoch() as segments:
            recording = _Recording(segments)
            yield recording
        if recording.complete:
            self._kept = recording.kept


class _AtHand:
    """Segments that are made in the calling thread."""

    ready = True

    def __init__(self, segments: Iterator[Ready]) -> None:
        self._segments = segments

    def __iter__(self) -> Iterator[Ready]:
        return self

    def __next__(self) -> Ready:
        return next(self._segments)


class _Recording:
    """Segments, each of them noted as it goes by."""

    def __init__(self, segments: Segments) -> None:
        self._segments = segments
        self.kept: list[Ready] = []
        self.complete = False

    @property
    def ready(self) -> bool:
        return self._segments.ready

    def __iter__(self) -> Iterator[Ready]:
        return self

    def __next__(self) -> Ready:
        try:
            segment = next(self._segments)
        except StopIteration:
            self.complete = True
            raise
        self.kept.append(segment)
        return segment


def _rounded(rows: int) -> int:
    unit = 2 ** max(0, rows.bit_length() - _ROUNDING_BITS)
    return -(-rows // unit) * unit


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
