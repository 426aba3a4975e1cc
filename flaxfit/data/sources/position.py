"""Positions of a fit in its data, and saved iterator states."""

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain, count, islice, repeat
from typing import Any, NamedTuple

from flaxfit._core.types import Batch
from flaxfit.data.datasets.stream import Stream, get_state
from flaxfit.data.sources.base import BatchSource

_MOST_BOOKMARKS = 512
# Saving iterator state is not free; replaying up to 50 ms of data is not noticeable.
_SECONDS_BETWEEN_MARKS = 0.05


class Position(NamedTuple):
    """Where a fit stands in its data.

    Attributes:
      epoch: the epochs of the fit that are over.
      batch: the batches of the running epoch that were trained on.
    """

    epoch: int = 0
    batch: int = 0

    def in_passes(self, steps: int | None, length: int | None) -> tuple[int, int]:
        """Returns the pass over the data, and the batch of it to continue with.

        Args:
          steps: batches of an epoch that does not go by passes, else None.
          length: batches of a pass, None if that is unknown.
        """
        if steps is None:
            return self.epoch, self.batch
        return divmod(self.epoch * steps + self.batch, length or sys.maxsize)


class IteratorMark:
    """The state of an iterator, saved now and then while a source reads it.

    Args:
      stream: what is read; if it seeks, no state is needed.

    Attributes:
      latest: `{"pass": …, "number": …, "state": …}`, the state after that many batches;
        None where the iterator has none.
    """

    def __init__(self, stream: Stream) -> None:
        self._seeks = stream.seeks
        self.reset()

    def reset(self) -> None:
        """Forgets the state; the next batch saves it again."""
        self.latest: dict[str, Any] | None = None
        self._saved_at = -_SECONDS_BETWEEN_MARKS

    def note(self, iterator: Iterator[Any], pass_index: int, number: int) -> None:
        """Saves the state after `number` batches, if enough time has passed."""
        now = time.monotonic()
        if self._seeks or now - self._saved_at < _SECONDS_BETWEEN_MARKS:
            return
        self._saved_at = now
        state = get_state(iterator)
        if state is not None:
            self.latest = {"pass": pass_index, "number": number, "state": state}


class IteratorCheckpoints:
    """Where an iterator that has a state of its own stood, at positions of a fit.

    The data is read ahead of the steps in another thread, so its state now is not that
    of the last batch trained on. States are noted now and then: from one of them on,
    the batches up to a position are read again, and left out.

    Args:
      source: the data.
      saved: what `at` returned in an earlier process.
    """

    def __init__(
        self, source: BatchSource, saved: Mapping[str, Any] | None = None
    ) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._latest: Mapping[str, Any] | None = None
        self._marks: list[tuple[Position, Mapping[str, Any]]] = []
        if saved is not None:
            self._marks.append((Position(saved["epoch"], saved["batch"]), saved))

    def note(self, position: Position) -> None:
        """Notes where the source stands; called after each batch, as it is read."""
        mark = self._source.bookmark
        if mark is None or mark is self._latest:
            return
        self._latest = mark
        with self._lock:
            self._marks.append((position, mark))
            if len(self._marks) > _MOST_BOOKMARKS:
                # Those in the past are seldom needed: it only is further from there.
                del self._marks[1 : _MOST_BOOKMARKS // 2 : 2]

    def leave_out(self) -> None:
        """Takes no note of where the source stands: it is at no position of the fit."""
        self._latest = self._source.bookmark

    def begin(self, position: Position) -> dict[str, Any] | None:
        """Returns `at(position)`, from where the data is read again.

        What was noted beyond it, by a reading ahead that is over, is forgotten.
        """
        with self._lock:
            self._marks = [mark for mark in self._marks if mark[0] <= position]
        return self.at(position)

    def at(self, position: Position) -> dict[str, Any] | None:
        """Returns the last bookmark up to a position, None where there is none.

        Those before it are forgotten: a fit does not go back beyond a checkpoint.
        """
        with self._lock:
            past = sum(where <= position for where, _ in self._marks)
            if not past:
                return None
            del self._marks[: past - 1]
            where, mark = self._marks[0]
        return {**mark, "epoch": where.epoch, "batch": where.batch}


def epochs_of(
    source: BatchSource,
    steps: int | None,
    position: Position,
    bookmarks: IteratorCheckpoints | None = None,
) -> Iterator[Iterator[Batch]]:
    """Yields the batches of each epoch: a pass each, or `steps` of endless passes.

    Args:
      source: the data.
      steps: batches of an epoch, from endless passes; None for one pass.
      position: where to begin.
      bookmarks: how to get there, and where to note how to get there again.
    """
    bookmarks = bookmarks or IteratorCheckpoints(source)
    mark = bookmarks.begin(position)
    first, start = position.in_passes(steps, source.num_batches)
    skipped = 0
    if steps is None:
        if mark is not None and mark["epoch"] != position.epoch:
            mark = None  # a pass begins, as any other
    elif mark is not None:
        first, start = mark["pass"], mark["number"]
        since = (position.epoch - mark["epoch"]) * steps
        skipped = since + position.batch - mark["batch"]
    elif source.num_batches is None and not source.one_shot:
        # Only reading tells where a pass of unknown length ends; an iterator has but
        # one.
        start, skipped = 0, start
    passes = chain(
        [source.batches(first, start, mark)], map(source.batches, count(first + 1))
    )
    epochs: Iterator[Iterator[Batch]] = passes
    if steps is not None:
        endless = chain.from_iterable(passes)
        for _ in islice(endless, skipped):
            bookmarks.leave_out()
        lengths = chain([steps - position.batch], repeat(steps))
        epochs = map(partial(islice, endless), lengths)
    starts = chain([position], map(Position, count(position.epoch + 1)))
    yield from map(partial(_noting, bookmarks), starts, epochs)


def _noting(
    bookmarks: IteratorCheckpoints, position: Position, batches: Iterator[Batch]
) -> Iterator[Batch]:
    """Yields the batches of an epoch, the first of them after `position`."""
    for number, batch in enumerate(batches, position.batch + 1):
        bookmarks.note(Position(position.epoch, number))
        yield batch
