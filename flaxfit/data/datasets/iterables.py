"""Adapts iterables of ready-made batches: lists, loaders and generators."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, cast

from flaxfit._core.errors import caller
from flaxfit._core.types import Batch
from flaxfit.data.datasets.stream import Stream, has_state
from flaxfit.data.host.arrays import call_text, is_array

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
      data: something to iterate over, or a function without arguments that returns
        it again for each pass. An iterator (`iter(data) is data`) serves one pass.

    Raises:
      TypeError: another object, or a function that needs arguments.
    """
    kind = kind_of(data)
    if kind == "iterator":
        # Not iter() of it: some iterators have nothing but __next__.
        return Stream(kind, lambda *unused: cast(Iterator[Any], data), one_shot=True)
    if kind == "generator function":
        return Stream(
            kind,
            partial(_call, data),
            again="The function must make a new iterable each time it is called.",
        )
    if hasattr(data, "__iter__") and not isinstance(data, Sequence):
        return Stream(kind, lambda *unused: iter(data), length_of(data))
    return Stream(kind, _ByIndex(data), len(data), seeks=True)


def peek(stream: Stream) -> tuple[Any, Stream]:
    """Returns the first raw batch, and the stream that still yields it.

    None for an empty stream, and for one whose iterator has a state to be asked for.
    """
    iterator = stream.open(0, 0)
    opened = [iterator]
    first = None
    if not has_state(iterator):
        first = next(iterator, None)
        opened = [iterator if first is None else chain([first], iterator)]

    def open_pass(pass_index: int, start: int) -> Iterator[Any]:
        reusable = opened and (stream.one_shot or (pass_index, start) == (0, 0))
        if not reusable:
            return stream.open(pass_index, start)
        return opened[0] if stream.one_shot else opened.pop()

    return first, replace(stream, open=open_pass)


class _ByIndex:
    """Opens passes over batches with random access.

    Those of Keras shuffle in `on_epoch_end`: it is called as often as passes are over.
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
            "yield them: def make_batches(): yield x, y. Arrays are given "
            f"directly: {call_text('x, y')}."
        )
    return iter(made)


def kind_of(data: Any) -> str:
    """Returns `"iterator"`, `"iterable"` or `"generator function"`.

    Raises:
      TypeError: another object, or a function that needs arguments.
    """
    if hasattr(data, "__next__") and not isinstance(data, type):
        if not hasattr(data, "__iter__") or iter(data) is data:
            return "iterator"
    if _is_iterable(data):
        return "iterable"
    if not callable(data):
        raise TypeError(
            f"Unsupported data type {type(data).__name__}. Supported: {UNDERSTOOD}."
        )
    try:
        inspect.signature(data).bind()
    except ValueError:
        pass  # A builtin without a signature: calling it will tell.
    except TypeError as error:
        name = getattr(data, "__name__", type(data).__name__)
        raise TypeError(
            f"{name} is called without arguments for each pass, but it needs some "
            f"({error}). Write lambda: {name}(...) with its arguments."
        ) from error
    return "generator function"


def _is_iterable(data: Any) -> bool:
    if isinstance(data, type):
        return False
    by_index = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    return hasattr(data, "__iter__") or by_index


def length_of(data: Any) -> int | None:
    """Returns the number of items if the data knows it; many loaders do not."""
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None
