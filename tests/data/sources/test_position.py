"""Where a fit stands in its data: every position is found again, exactly."""

import itertools

import numpy as np
import pytest
from helpers.sources import as_source

from flaxfit._core.types import CallSpec
from flaxfit.data.binding.binding import Binding
from flaxfit.data.sources import position
from flaxfit.data.sources.position import IteratorCheckpoints, Position, epochs_of

BINDING = Binding(CallSpec(("x",), (), ("x",)))
LENGTH = 5


class Reader:
    """An iterator that tells where it stands, in an order that only it knows."""

    def __init__(self, made, length=LENGTH):
        self._made, self._next, self._length = made, 0, length

    def __iter__(self):
        return self

    def __next__(self):
        if self._next == self._length:
            raise StopIteration
        self._next += 1
        self._made.append(self._next)
        number = self._next * 7 % 11
        return np.full((2, 1), number, np.float32), np.zeros(2, np.int32)

    def get_state(self):
        return {"next": self._next}

    def set_state(self, state):
        self._next = state["next"]


class Loader:
    """Makes a reader for each pass, and has no length."""

    def __init__(self):
        self.made = []

    def __iter__(self):
        return Reader(self.made)


def source_of(data):
    return as_source(data, binding=BINDING)


def read(epochs, count):
    """The number in each batch of so many epochs."""
    return [
        [int(batch.inputs[0][0, 0]) for batch in batches]
        for batches in itertools.islice(epochs, count)
    ]


def stopped_at(source, steps, position):
    """Reads up to a position, as a fit does that looks ahead; returns its bookmark."""
    bookmarks = IteratorCheckpoints(source)
    epochs = epochs_of(source, steps, Position(), bookmarks)
    for _ in range(position.epoch):
        list(next(epochs))
    ahead = iter(next(epochs))
    list(itertools.islice(ahead, position.batch + 2))
    return bookmarks.at(position)


@pytest.fixture(params=[0.0, 60.0], ids=["every batch noted", "the first batch noted"])
def seconds(request, monkeypatch):
    monkeypatch.setattr(position, "_SECONDS_BETWEEN_MARKS", request.param)
    return request.param


@pytest.mark.parametrize(
    ("steps", "epoch", "batch"),
    [
        (steps, epoch, batch)
        for steps in (None, 3, 7)
        for epoch in range(3)
        for batch in range(min(steps or 4, 4))
    ],
)
def test_every_position_goes_on_with_what_was_to_come(steps, epoch, batch, seconds):
    whole = read(epochs_of(source_of(Loader()), steps, Position()), 4)
    position = Position(epoch, batch)
    mark = stopped_at(source_of(Loader()), steps, position)
    source = source_of(Loader())
    bookmarks = IteratorCheckpoints(source, mark)
    rest = read(epochs_of(source, steps, position, bookmarks), 4 - epoch)
    assert rest == [whole[epoch][batch:], *whole[epoch + 1 :]]


def test_a_bookmark_saves_the_reading_of_what_was_trained_on(monkeypatch):
    monkeypatch.setattr(position, "_SECONDS_BETWEEN_MARKS", 0.0)
    mark = stopped_at(source_of(Loader()), None, Position(0, 4))
    assert mark["state"] == {"next": 4}
    loader = Loader()
    source = source_of(loader)
    loader.made.clear()  # of the first batch, which is always read
    epochs = epochs_of(source, None, Position(0, 4), IteratorCheckpoints(source, mark))
    assert read(epochs, 1) == [[5 * 7 % 11]]
    assert loader.made == [5]


@pytest.mark.parametrize("batch", [1, 4])
def test_an_iterator_used_once_goes_on_as_well(batch, seconds):
    whole = read(epochs_of(source_of(Reader([], 9)), 9, Position()), 1)[0]
    mark = stopped_at(source_of(Reader([], 9)), 9, Position(0, batch))
    source = source_of(Reader([], 9))
    epochs = epochs_of(source, 9, Position(0, batch), IteratorCheckpoints(source, mark))
    assert read(epochs, 1) == [whole[batch:]]


def test_without_a_state_there_is_no_bookmark():
    source = source_of(lambda: iter([next(Reader([]))] * 3))
    assert stopped_at(source, None, Position(1, 1)) is None


class Marked:
    """A source whose every batch has a bookmark."""

    def __init__(self):
        self.number = 0

    @property
    def bookmark(self):
        self.number += 1
        return {"pass": 0, "number": self.number, "state": self.number}


def test_bookmarks_of_an_endless_epoch_are_bounded_and_stay_exact():
    bookmarks = IteratorCheckpoints(Marked())
    for batch in range(1, 5001):
        bookmarks.note(Position(0, batch))
    assert len(bookmarks._marks) <= 512
    for asked in (7, 2600, 4999, 5000):
        found = bookmarks.at(Position(0, asked))
        assert found["batch"] <= asked and found["number"] == found["batch"]
    assert asked - found["batch"] < 10  # those of late are all there
    assert bookmarks.at(Position(0, 6)) is None


@pytest.mark.parametrize("steps", [None, 3, 7])
@pytest.mark.parametrize("first", [1, 4, 9, 11])
@pytest.mark.parametrize("more", [1, 2, 5])
def test_a_second_resume_goes_on_with_what_was_to_come(steps, first, more, seconds):
    """Neither the batch read ahead nor those left out say where the fit stands."""
    length = steps or LENGTH
    whole = np.concatenate(read(epochs_of(source_of(Loader()), steps, Position()), 9))
    position = Position(*divmod(first, length))
    source = source_of(Loader())
    bookmarks = IteratorCheckpoints(
        source, stopped_at(source_of(Loader()), steps, position)
    )
    epochs = epochs_of(source, steps, position, bookmarks)
    ahead = itertools.chain.from_iterable(itertools.islice(epochs, 4))
    numbers = [int(batch.inputs[0][0, 0]) for batch in itertools.islice(ahead, more)]
    assert numbers == whole[first : first + more].tolist()
    later = Position(*divmod(first + more, length))
    again = source_of(Loader())
    epochs = epochs_of(
        again, steps, later, IteratorCheckpoints(again, bookmarks.at(later))
    )
    rest = np.concatenate(read(epochs, 2))
    start = first + more
    assert rest.tolist() == whole[start : start + len(rest)].tolist()


@pytest.mark.parametrize("steps", [None, 40])
def test_going_back_again_and_again_forgets_what_was_read_ahead(steps, seconds):
    """A rollback reads again in the same process, from before what was noted last."""
    numbers = [(number + 1) * 7 % 11 for number in range(40)]
    source = source_of(lambda: Reader([], 40))
    bookmarks = IteratorCheckpoints(source)
    list(itertools.islice(next(epochs_of(source, steps, Position(), bookmarks)), 30))
    bookmarks.at(Position(0, 8))  # a checkpoint
    for bad in (10, 16, 20):
        epochs = epochs_of(source, steps, Position(0, bad + 1), bookmarks)
        batches = list(itertools.islice(next(epochs), 12))
        found = [int(batch.inputs[0][0, 0]) for batch in batches]
        assert found == numbers[bad + 1 : bad + 13]
