"""Adapts iterables of ready-made batches: lists, loaders and generators."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

from flaxfit._core.errors import caller
from flaxfit._core.types import Batch
from flaxfit.data.datasets.example_dataset import ExampleSet
from flaxfit.data.datasets.stream import Stream, has_state
from flaxfit.data.host.arrays import call_text, is_array
from flaxfit.data.host.collate import looks_single

UNDERSTOOD = (
    "arrays of NumPy and jax in any nesting, (x, y), (x, y, weights) and dicts of "
    "them; .npy and .npz files by path; arrays read by slices, of zarr or HDF5; tables "
    "of pandas, polars and pyarrow; TensorFlow Datasets, by name too; datasets and "
    "loaders of Grain, torch, Hugging Face and tf.data; flaxfit.data.image_folder, "
    "Examples and Batches; anything with len(x) and x[0]; iterables of batches, "
    "functions that return one, and iterators"
)


def from_iterable(data: Any) -> Stream:
    """Returns the batches of an iterable, an iterator or a generator function.

    Args:
      data: an iterable, or a function without arguments that returns a new one for
        each pass. An iterator (`iter(data) is data`) serves one pass.

    Raises:
      TypeError: another object, or a function that needs arguments.
    """
    iterates, is_class = hasattr(data, "__iter__"), isinstance(data, type)
    if not is_class and hasattr(data, "__next__"):
        # Checked before iter(): some iterators only have __next__.
        if not iterates or iter(data) is data:
            return Stream("iterator", lambda *unused: data, one_shot=True)
    if not is_class and iterates and not isinstance(data, Sequence):
        return Stream("iterable", lambda *unused: iter(data), length_of(data))
    if not is_class and hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        return Stream("iterable", _ByIndex(data), len(data), seeks=True)
    _check_function(data)
    return Stream(
        "generator function",
        partial(_call, data),
        reuse_advice="The function must make a new iterable each time it is called.",
    )


def peek(stream: Stream) -> tuple[Any, Stream]:
    """Returns the first raw batch, and a stream that still yields it.

    The batch is None for an empty stream, or if the iterator can save its position.
    """
    iterator = stream.open(0, 0)
    first = None
    if not has_state(iterator):
        first = next(iterator, None)
        iterator = iterator if first is None else chain([first], iterator)
    return first, begun(stream, iterator)


def begun(stream: Stream, iterator: Iterator[Any]) -> Stream:
    """Returns the stream with an iterator that is already open for its first pass."""
    opened = [iterator]

    def open_pass(pass_index: int, start: int) -> Iterator[Any]:
        reusable = opened and (stream.one_shot or (pass_index, start) == (0, 0))
        if not reusable:
            opened.clear()
            return stream.open(pass_index, start)
        return opened[0] if stream.one_shot else opened.pop()

    return replace(stream, open=open_pass)


def examples_in(stream: Stream) -> ExampleSet:
    """Returns the examples that a stream yields one by one."""
    return ExampleSet(
        f"{stream.kind} of examples",
        stream.num_batches,
        iterate=lambda pass_index: stream.open(pass_index, 0),
        one_shot=stream.one_shot,
        endless=stream.endless,
    )


def begins_single(data: Any) -> bool:
    """Whether item 0 of data with random access looks like a single example."""
    try:
        return looks_single(data[0])
    except Exception as error:
        error.add_note("while reading item 0")
        raise


class _ByIndex:
    """Opens passes over batches with random access.

    Keras's sequences shuffle in `on_epoch_end`: it is called once per finished pass.
    """

    def __init__(self, data: Any) -> None:
        self._data = data
        self._ended = 0

    def __call__(self, pass_index: int, start: int) -> Iterator[Any]:
        data = self._data
        if hasattr(data, "on_epoch_end"):
            while self._ended < pass_index:
                data.on_epoch_end()
                self._ended += 1
        # Not iter(): a sequence of batches need not raise IndexError at its end.
        return (data[index] for index in range(start, len(data)))


def _call(function: Callable[[], Any], *unused: int) -> Iterator[Any]:
    made = function()
    whole = is_array(made) or isinstance(made, tuple | Mapping | Batch)
    if whole or not isinstance(made, Iterable):
        raise TypeError(
            f"the function given to {caller()} returned a "
            f"{type(made).__name__}; it must return an iterable of batches, or "
            "yield them: def make_batches(): yield x, y. Pass arrays directly: "
            f"{call_text('x, y')}."
        )
    return iter(made)


def _check_function(data: Any) -> None:
    if not callable(data):
        raise TypeError(
            f"Unsupported data type {type(data).__name__}. Supported: {UNDERSTOOD}."
        )
    try:
        inspect.signature(data).bind()
    except ValueError:
        pass  # A builtin without a signature: the call itself will fail.
    except TypeError as error:
        name = getattr(data, "__name__", type(data).__name__)
        raise TypeError(
            f"{name} is called without arguments for each pass, but it requires "
            f"arguments ({error}). Write lambda: {name}(...) with them."
        ) from error


def length_of(data: Any) -> int | None:
    """Returns the number of items, None if unknown, as for many loaders."""
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None
