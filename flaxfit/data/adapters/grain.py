"""Adapters for Grain's datasets, loaders and iterators.

A pass over a `MapDataset` is what its own `repeat()` makes of it: shuffled anew, random
maps drawn anew. Of all others, each pass is what iterating over them gives.
"""

import json
import re
import weakref
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from flaxfit._core.errors import DataError, caller
from flaxfit._core.lazy_types import comes_from
from flaxfit._core.types import HostArray
from flaxfit.data.datasets.example_dataset import ExampleSet, Loading
from flaxfit.data.datasets.shuffling import order_of_pass
from flaxfit.data.datasets.stream import Stream, get_state, set_state
from flaxfit.data.host.collate import looks_single

# As many as Grain takes by itself, for sources that wait. They prepare whole batches,
# of which its buffer of 500 would fill the memory.
_THREADS = 16
_BATCHES_AHEAD = 16

# Grain's `repeat()` says `sys.maxsize`, of which a `batch` or a slice after it takes a
# part. Nobody waits for so many.
_LONGEST = 2**40

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")

_FLAGS = (
    "Grain's own processes ask for command line flags. In a program that is none of "
    "absl's, write before: from absl import flags; flags.FLAGS.mark_as_parsed()"
)

_ITERATORS = ("DatasetIterator", "DataLoaderIterator")


def matches(x: object) -> bool:
    """Whether something is a dataset, a loader or an iterator of Grain."""
    kinds = ("MapDataset", "IterDataset", "DataLoader", *_ITERATORS)
    return comes_from(x, "grain", *kinds)


def adapt(x: Any) -> Stream | ExampleSet:
    """Returns its batches; or its examples, in its own order.

    Which of both they are its transformations tell, or its first element, which is
    read.

    Args:
      x: what `matches` says is Grain's.
    """
    if comes_from(x, "grain", *_ITERATORS):
        stream = Stream("grain iterator", lambda *unused: x, one_shot=True)
        return _in_order(stream)
    if not comes_from(x, "grain", "MapDataset"):
        kind = "DataLoader" if comes_from(x, "grain", "DataLoader") else "IterDataset"
        stream = Stream(f"grain {kind}", lambda *unused: iter(x))
        dataset = getattr(x, "_dataset", x)  # of a loader
        stream = replace(stream, endless=_is_endless(x))
        return _in_order(stream, batched=_is_batched(dataset))
    length = len(x)
    if length == 0 or length > _LONGEST or _has_gaps(x):
        stream = Stream("grain MapDataset", partial(_open_map, x))
        stream = replace(stream, endless=length > _LONGEST)
        return _in_order(stream, batched=_is_batched(x))
    batches = Stream(
        "grain MapDataset", partial(_open_at, x), num_batches=length, seeks=True
    )
    if _is_batched(x):
        return batches
    examples = ExampleSet(
        "grain MapDataset of examples",
        length,
        _Take(x),
        order=partial(_order_of_pass, length),
        loading=Loading(threads=_THREADS),
    )
    try:
        single = looks_single(x[0])
    except Exception as error:
        error.add_note("while reading item 0")
        raise
    return examples if single else replace(batches, examples=examples)


def _is_endless(x: Any) -> bool:
    """Whether a dataset has no end; False where that is not certain."""
    if comes_from(x, "grain", "DataLoader"):
        sampler = getattr(x, "_sampler", None)
        return isinstance(sampler, Sized) and len(sampler) > _LONGEST
    if comes_from(x, "grain", "MapDataset"):
        return len(x) > _LONGEST
    if not type(x).__module__.startswith("grain.") or "Limit" in type(x).__name__:
        return False
    if type(x).__name__ == "RepeatIterDataset" and x._num_epochs is None:
        return True
    return bool(x.parents) and all(map(_is_endless, x.parents))


def _is_batched(x: Any) -> bool:
    """Whether a dataset makes batches itself; False where that is not certain."""
    name = type(x).__name__
    if "FlatMap" in name:
        return False
    return "Batch" in name or any(map(_is_batched, getattr(x, "parents", ())))


def _has_gaps(x: Any) -> bool:
    """Whether a `MapDataset` has None in places, as its `filter` leaves them."""
    if type(x).__name__ == "FilterMapDataset":
        return True
    return any(map(_has_gaps, x.parents)) or (x[0] is None)


def _open_map(x: Any, pass_index: int, start: int) -> Iterator[Any]:
    """Opens a `MapDataset` whose elements have no number: it has gaps, or no end."""
    return iter(_part(x, pass_index, start).to_iter_dataset(_read_options()))


def _open_at(x: Any, pass_index: int, start: int) -> Iterator[Any]:
    """Yields the batches of a `MapDataset`, from any of them on."""
    if start == len(x):
        return
    part = _part(x, pass_index, start)
    iterator = iter(part.to_iter_dataset(_read_options(), allow_nones=True))
    try:
        for index, batch in enumerate(iterator, pass_index * len(x) + start):
            yield _there(batch, index)
    finally:
        _close(iterator)


def _part(x: Any, pass_index: int, start: int) -> Any:
    length = len(x)
    if length > _LONGEST or length == 0:
        return x
    first = pass_index * length
    return x.repeat(None)[first + start : first + length]


def _read_options() -> Any:
    import grain

    return grain.ReadOptions(_THREADS, _BATCHES_AHEAD)


def _order_of_pass(
    length: int, total: int, pass_index: int, *, shuffle: bool, seed: Sequence[int]
) -> HostArray:
    """Returns the rows of a pass, in Grain's own order; see `order_of_pass`."""
    if total < length:
        # One side of a split, which has to keep its examples: those of the first pass.
        return order_of_pass(total, pass_index, shuffle=shuffle, seed=seed)
    # Beyond its length, a MapDataset goes on as its repeat() does.
    return np.arange(length) + pass_index * length


@dataclass(frozen=True)
class _Take:
    dataset: Any

    def __call__(self, rows: HostArray) -> list[Any]:
        return [self._item(index) for index in rows.tolist()]

    def _item(self, index: int) -> Any:
        try:
            return _there(self.dataset[index], index)
        except Exception as error:
            error.add_note(f"while reading item {index}")
            raise


def _there(element: Any, index: int) -> Any:
    if element is None:
        raise DataError(
            f"element {index} of the grain MapDataset is None, which Grain leaves out. "
            "Then nobody knows how many there are: drop it with "
            "dataset.filter(lambda element: element is not None), or write "
            "dataset.to_iter_dataset()."
        )
    return element


def _in_order(stream: Stream, *, batched: bool = False) -> Stream | ExampleSet:
    """Returns what is read one after the other as what it is: batches or examples.

    Args:
      stream: how it is read; `open` returns iterators that have a state.
      batched: whether it is known to make batches.

    Raises:
      DataError: there is nothing, so that nobody knows of what.
    """
    passes = _Passes(stream)
    stream = replace(stream, open=passes)
    if batched:
        return stream
    first = passes.peek()
    if first is None:
        raise DataError(
            f"no examples: the {stream.kind} given to {caller()} yielded nothing."
        )
    examples = ExampleSet(
        f"{stream.kind} of examples",
        iterate=passes,
        one_shot=stream.one_shot,
        endless=stream.endless,
    )
    return examples if looks_single(first) else replace(stream, examples=examples)


class _Passes:
    """Iterators over a dataset, the first of which may have read its first element."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._first: _Reader | None = None

    def peek(self) -> Any:
        """Returns the first element, which is still yielded; None if there is none."""
        self._first = self._open(0)
        return self._first.peek()

    def __call__(self, pass_index: int, start: int = 0) -> "_Reader":
        del start
        first = self._first
        if first is not None and self._stream.one_shot:
            return first
        self._first = None
        return self._open(pass_index) if first is None or pass_index else first

    def _open(self, pass_index: int) -> "_Reader":
        iterator = self._stream.open(pass_index, 0)
        return _Reader(iterator, own=not self._stream.one_shot)


class _Reader:
    """An iterator of Grain that ends its threads and processes when it is let go.

    Args:
      iterator: Grain's.
      own: whether nobody else has it.
    """

    def __init__(self, iterator: Iterator[Any], *, own: bool) -> None:
        self._iterator = iterator
        self._ahead: list[Any] = []
        if own:
            weakref.finalize(self, _close, iterator).atexit = False

    def peek(self) -> Any:
        """Returns the first element, which is still yielded; None if there is none."""
        try:
            self._ahead.append(next(self._iterator))
        except StopIteration:
            return None
        except Exception as error:
            error.add_note("while reading the first element of the data")
            if type(error).__name__ == "UnparsedFlagAccessError":
                error.add_note(_FLAGS)
            raise
        return self._ahead[0]

    def __iter__(self) -> "_Reader":
        return self

    def __next__(self) -> Any:
        return self._ahead.pop() if self._ahead else next(self._iterator)

    def get_state(self) -> Any:
        return get_state(self._iterator)

    def set_state(self, state: Any) -> None:
        self._ahead.clear()
        if isinstance(state, bytes):
            state = _at_home(state, self._iterator)
        set_state(self._iterator, state)


def _at_home(state: bytes, iterator: Any) -> bytes:
    """Returns the state of a loader's iterator, with this process's addresses.

    Grain compares the `repr` of source and sampler, where most classes have one that
    holds the address of the object.
    """
    saved, own = json.loads(state), json.loads(iterator.get_state())
    for name in ("data_source", "sampler"):
        told = saved.get(name), own.get(name)
        if all(isinstance(each, str) for each in told):
            if _ADDRESS.sub("", told[0]) == _ADDRESS.sub("", told[1]):
                saved[name] = told[1]
    return json.dumps(saved).encode()


def _close(iterator: Any) -> None:
    if hasattr(iterator, "close"):
        iterator.close()
