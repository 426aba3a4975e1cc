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
    """The position of a fit in its data.

    Attributes:
      epoch: the number of finished epochs of the fit.
      batch: the number of batches of the running epoch that were trained on.
    """

    epoch: int = 0
    batch: int = 0

    def in_passes(self, steps: int | None, length: int | None) -> tuple[int, int]:
        """Returns the pass over the data, and the number of its next batch.

        Args:
          steps: batches of an epoch, None if an epoch is a pass.
          length: batches of a pass, None if unknown.
        """
        if steps is None:
            return self.epoch, self.batch
        return divmod(self.epoch * steps + self.batch, length or sys.maxsize)


class IteratorMark:
    """The state of an iterator, saved from time to time while a source reads it.

    Args:
      stream: the stream of the source; if it seeks, no state is needed.

    Attributes:
      latest: `{"pass": …, "number": …, "state": …}`, the state after `number` batches
        of the pass; None if there is no saved state.
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
    """Saved states of a data iterator, each with its position in the fit.

    Another thread reads ahead of the steps, so the iterator's current state is not that
    of the last batch trained on. States are therefore noted from time to time. A
    position is reached from the last state before it: batches between are skipped.

    Args:
      source: the data.
      saved: the result of `at` in an earlier process.
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
        """Notes the source's bookmark, if it is new; called after each batch read."""
        mark = self._source.bookmark
        if mark is None or mark is self._latest:
            return
        self._latest = mark
        with self._lock:
            self._marks.append((position, mark))
            if len(self._marks) > _MOST_BOOKMARKS:
                # Older marks are seldom needed; without one, more batches are skipped.
                del self._marks[1 : _MOST_BOOKMARKS // 2 : 2]

    def leave_out(self) -> None:
        """Ignores the source's current bookmark: a skipped batch has no position."""
        self._latest = self._source.bookmark

    def begin(self, position: Position) -> dict[str, Any] | None:
        """Returns `at(position)`, to read the data again from there.

        Marks beyond it, which an earlier run noted while reading ahead, are dropped.
        """
        with self._lock:
            self._marks = [mark for mark in self._marks if mark[0] <= position]
        return self.at(position)

    def at(self, position: Position) -> dict[str, Any] | None:
        """Returns the last bookmark up to a position, or None.

        Earlier ones are dropped: a fit does not go back before a checkpoint.
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
    """Yields an iterator over the batches of each epoch.

    Args:
      source: the data.
      steps: batches of an epoch, from one pass after the other; None for one pass.
      position: where to begin.
      bookmarks: saved states, to reach the position; new ones are noted in it.
    """
    bookmarks = bookmarks or IteratorCheckpoints(source)
    mark = bookmarks.begin(position)
    first, start = position.in_passes(steps, source.num_batches)
    skipped = 0
    if steps is None:
        if mark is not None and mark["epoch"] != position.epoch:
            mark = None  # the position is in a later pass
    elif mark is not None:
        first, start = mark["pass"], mark["number"]
        since = (position.epoch - mark["epoch"]) * steps
        skipped = since + position.batch - mark["batch"]
    elif source.num_batches is None and not source.one_shot:
        # The end of a pass of unknown length must be found by reading; an iterator has
        # only one pass.
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
    """Yields the batches of an epoch from `position` on, and notes bookmarks."""
    for number, batch in enumerate(batches, position.batch + 1):
        bookmarks.note(Position(position.epoch, number))
        yield batch
