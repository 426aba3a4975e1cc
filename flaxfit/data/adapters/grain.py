"""Adapters for Grain's datasets, loaders and iterators.

The passes over a `MapDataset` are those of its `repeat()`: each has its own order and
random numbers. Other datasets are iterated over once per pass.
"""

import json
import re
import weakref
from collections.abc import Iterator, Sequence, Sized
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from flaxfit._core.errors import DataError, caller
from flaxfit._core.lazy_types import comes_from
from flaxfit._core.types import HostArray
from flaxfit.data.datasets.example_dataset import ExampleSet, Loading
from flaxfit.data.datasets.iterables import begins_single, begun, examples_in
from flaxfit.data.datasets.shuffling import order_of_pass
from flaxfit.data.datasets.stream import Stream, get_state, set_state
from flaxfit.data.host.collate import looks_single

# As many threads as Grain's default. Its default buffer of 500 elements would fill the
# memory, as elements may be whole batches.
_THREADS = 16
_BATCHES_AHEAD = 16

# Grain's `repeat()` has the length `sys.maxsize`, and a `batch` or slice after it has a
# fraction of that. No real dataset is this long.
_LONGEST = 2**40

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")

_FLAGS = (
    "Grain's processes read absl's command line flags. In a program without absl, "
    "first run: from absl import flags; flags.FLAGS.mark_as_parsed()"
)

_ITERATORS = ("DatasetIterator", "DataLoaderIterator")


def matches(x: object) -> bool:
    """Whether `x` is a dataset, loader or iterator of Grain."""
    kinds = ("MapDataset", "IterDataset", "DataLoader", *_ITERATORS)
    return comes_from(x, "grain", *kinds)


def adapt(x: Any) -> Stream | ExampleSet:
    """Returns a dataset as batches or as examples, in Grain's order.

    Its transformations decide between the two, or else its first element, which is
    read.
    """
    if comes_from(x, "grain", *_ITERATORS):
        return _in_order(Stream("grain iterator", lambda *unused: x, one_shot=True))
    endless, batched = _is_endless(x), _is_batched(x)
    if not comes_from(x, "grain", "MapDataset"):
        kind = "DataLoader" if comes_from(x, "grain", "DataLoader") else "IterDataset"
        stream = Stream(f"grain {kind}", lambda *unused: iter(x), endless=endless)
        return _in_order(stream, batched=batched)
    length = len(x)
    if length == 0 or endless or _has_gaps(x):
        stream = Stream("grain MapDataset", partial(_open_map, x), endless=endless)
        return _in_order(stream, batched=batched)
    batches = Stream(
        "grain MapDataset", partial(_open_at, x), num_batches=length, seeks=True
    )
    if batched:
        return batches
    examples = ExampleSet(
        "grain MapDataset of examples",
        length,
        partial(_take, x),
        order=partial(_order_of_pass, length),
        loading=Loading(threads=_THREADS),
    )
    return examples if begins_single(x) else replace(batches, examples=examples)


def _is_endless(x: Any) -> bool:
    """Whether a dataset certainly has no end."""
    if comes_from(x, "grain", "DataLoader"):
        # There is no public way to ask a loader for its sampler.
        sampler = getattr(x, "_sampler", None)
        return isinstance(sampler, Sized) and len(sampler) > _LONGEST
    if comes_from(x, "grain", "MapDataset"):
        return len(x) > _LONGEST
    if not type(x).__module__.startswith("grain.") or "Limit" in type(x).__name__:
        return False
    if str(x) == "RepeatIterDataset(num_epochs=None)":
        return True
    return bool(x.parents) and all(map(_is_endless, x.parents))


def _is_batched(x: Any) -> bool:
    """Whether a dataset certainly makes batches itself."""
    name = type(x).__name__
    if "FlatMap" in name:
        return False
    return "Batch" in name or any(map(_is_batched, getattr(x, "parents", ())))


def _has_gaps(x: Any) -> bool:
    """Whether a `MapDataset` has gaps: elements that are None, as after `filter`."""
    if type(x).__name__ == "FilterMapDataset":
        return True
    return any(map(_has_gaps, x.parents)) or (x[0] is None)


def _open_map(x: Any, pass_index: int, start: int) -> Iterator[Any]:
    """Opens a `MapDataset` that has gaps, or no end."""
    return iter(_part(x, pass_index, start).to_iter_dataset(_read_options()))


def _open_at(x: Any, pass_index: int, start: int) -> Iterator[Any]:
    """Yields the batches of a pass over a `MapDataset`, from batch `start` on."""
    if start == len(x):
        return
    part = _part(x, pass_index, start)
    iterator = iter(part.to_iter_dataset(_read_options(), allow_nones=True))
    try:
        for index, batch in enumerate(iterator, pass_index * len(x) + start):
            yield _not_none(batch, index)
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
        # A part of a split has the same examples in every pass: those of the first.
        return order_of_pass(total, pass_index, shuffle=shuffle, seed=seed)
    # Indices beyond the length continue with the next pass of `repeat()`.
    return np.arange(length) + pass_index * length


def _take(dataset: Any, rows: HostArray) -> list[Any]:
    items = []
    for index in rows.tolist():
        try:
            items.append(_not_none(dataset[index], index))
        except Exception as error:
            error.add_note(f"while reading item {index}")
            raise
    return items


def _not_none(element: Any, index: int) -> Any:
    if element is None:
        raise DataError(
            f"element {index} of the grain MapDataset is None. Grain leaves it out, so "
            "the number of examples is unknown",
            write="dataset.filter(lambda element: element is not None), or "
            "dataset.to_iter_dataset()",
        )
    return element


def _in_order(stream: Stream, *, batched: bool = False) -> Stream | ExampleSet:
    """Returns a dataset without random access, as batches or as examples.

    Args:
      stream: the elements; `open` returns iterators of Grain.
      batched: whether it certainly makes batches; if not, the first element decides.

    Raises:
      DataError: there is no first element.
    """
    opens, one_shot = stream.open, stream.one_shot

    def open_pass(pass_index: int, start: int) -> _Reader:
        return _Reader(opens(pass_index, start), close=not one_shot)

    stream = replace(stream, open=open_pass)
    if batched:
        return stream
    reader = open_pass(0, 0)
    first = reader.peek()
    if first is None:
        raise DataError(
            f"no examples: the {stream.kind} given to {caller()} yielded nothing."
        )
    stream = begun(stream, reader)
    examples = examples_in(stream)
    return examples if looks_single(first) else replace(stream, examples=examples)


class _Reader(Iterator[Any]):
    """Wraps an iterator of Grain, and ends its threads and processes.

    Args:
      iterator: the iterator of Grain.
      close: whether to close it when this object is deleted; False for the user's own.
    """

    def __init__(self, iterator: Iterator[Any], *, close: bool) -> None:
        self._iterator = iterator
        self._ahead: list[Any] = []
        if close:
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

    def __next__(self) -> Any:
        return self._ahead.pop() if self._ahead else next(self._iterator)

    def get_state(self) -> Any:
        return get_state(self._iterator)

    def set_state(self, state: Any) -> None:
        self._ahead.clear()
        if isinstance(state, bytes):
            state = _with_local_addresses(state, self._iterator)
        set_state(self._iterator, state)


def _with_local_addresses(state: bytes, iterator: Any) -> bytes:
    """Returns the state of a loader's iterator with the addresses of this process.

    Grain refuses a state in which the `repr` of the source or sampler differs. The
    default `repr` contains the object's address, which differs in every process.
    """
    saved, local = json.loads(state), json.loads(iterator.get_state())
    for name in ("data_source", "sampler"):
        one, other = saved.get(name), local.get(name)
        if isinstance(one, str) and isinstance(other, str):
            if _ADDRESS.sub("", one) == _ADDRESS.sub("", other):
                saved[name] = other
    return json.dumps(saved).encode()


def _close(iterator: Any) -> None:
    if hasattr(iterator, "close"):
        iterator.close()
