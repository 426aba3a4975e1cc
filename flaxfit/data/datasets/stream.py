"""The contract of a dataset kind: raw batches, pass after pass.

A new kind is one file with a function that returns a `Stream`, or an `ExampleSet` if
examples still have to be batched, and a row of `KINDS` in `adapters/registry.py`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from flaxfit.data.datasets.columns import Columns

Open: TypeAlias = Callable[[int, int], Iterator[Any]]
"""`(pass, start) -> raw batches of that pass, from batch number start on`."""


@dataclass(frozen=True)
class BatchForm:
    """The shapes of the batches of a stream.

    Attributes:
      shapes: the number of shapes that batches may have beyond the batch axis. One
        program is compiled for each.
      batch_size: the rows that batches are padded to, None for as many as the first
        batch has.
      size: raw batch -> its number of examples, for inputs without a common batch axis,
        else None. These batches are not padded and may have any shapes.
    """

    shapes: int = 1
    batch_size: int | None = None
    size: Callable[[Any], int] | None = None


@dataclass(frozen=True)
class DatasetInfo:
    """Metadata of a dataset, from the dataset itself or from reading it.

    Attributes:
      keys: the keys of an example, if it is a dict and they are known.
      inputs: the key or keys of the inputs, used unless the user names others or `keys`
        has every parameter that the model's call requires.
      targets: the key or keys of the targets, used unless the user names others.
      class_names: the names of the classes 0, 1, … of the target.
      pictures: whether the `uint8` inputs are images, which the model receives as
        `float32` between 0 and 1.
      columns: how the columns of later tables are read.
      table: the role of each column of a table, as text; empty for other data.
      unused: the keys or columns that are neither input nor target nor weight.
      shuffles: whether a torch loader draws its batches in random order.
      assumed_split: the error message of evaluation and prediction if `train` was
        opened because no split was named; else empty.
    """

    keys: tuple[str, ...] = ()
    inputs: str | tuple[str, ...] | None = None
    targets: str | tuple[str, ...] | None = None
    class_names: tuple[str, ...] = ()
    pictures: bool = False
    columns: Columns | None = None
    table: str = ""
    unused: tuple[str, ...] = ()
    shuffles: bool = False
    assumed_split: str = ""


NO_INFO = DatasetInfo()


@dataclass(frozen=True)
class Stream:
    """Raw batches of one kind of dataset.

    Attributes:
      kind: the kind of dataset in words: `"torch DataLoader"`.
      open: see `Open`; `start` is always 0 if the stream does not seek.
      num_batches: batches in a pass, None if unknown before reading.
      num_examples: examples in a pass, None if unknown before reading.
      one_shot: whether the stream can be read only once; `open` then returns the same
        iterator every time.
      endless: whether the stream is known to have no end.
      seeks: whether `open` can start at any batch without reading the earlier ones.
      form: the shapes of the batches.
      seeded: seed -> a replacement of `open` whose random draws depend on seed and pass
        only; None if flaxfit's seed has no effect on the data.
      examples: the same data as single examples, if its items must be read to know
        whether they are batches or examples; else None.
      reuse_advice: what to write if the data is used up; empty for the usual advice.
      info: metadata of the dataset.
    """

    kind: str
    open: Open
    num_batches: int | None = None
    num_examples: int | None = None
    one_shot: bool = False
    endless: bool = False
    seeks: bool = False
    form: BatchForm = BatchForm()
    seeded: Callable[[Sequence[int]], Open] | None = None
    examples: Any = None
    reuse_advice: str = ""
    info: DatasetInfo = NO_INFO


class PaddedTail(NamedTuple):
    """The last raw batch of a pass, filled up with the first rows of the pass.

    Attributes:
      raw: the batch, with these rows at its end.
      rows: how many of its rows are real.
    """

    raw: Any
    rows: int


class Wrapped(Iterator[Any]):
    """Takes the items of an iterator by a function; forwards all other attributes.

    Args:
      iterator: the iterator to wrap.
      take: iterator -> its next item.
    """

    def __init__(self, iterator: Iterator[Any], take: Callable[[Any], Any]) -> None:
        self._iterator = iterator
        self._take = take

    def __next__(self) -> Any:
        return self._take(self._iterator)

    def __getattr__(self, name: str) -> Any:
        if name == "_iterator":  # while it is copied
            raise AttributeError(name)
        # For the methods that save its position, if it has them.
        return getattr(self._iterator, name)


def has_state(iterator: Any) -> bool:
    """Whether an iterator can save its position, as those of Grain and torchdata."""
    return _methods(iterator) is not None


def get_state(iterator: Any) -> Any:
    """Returns an iterator's position as plain values, None if it has no such state."""
    methods = _methods(iterator)
    state = methods and getattr(iterator, methods[0])()
    return state if _is_plain(state) else None


def set_state(iterator: Any, state: Any) -> None:
    """Moves an iterator to the position that `get_state` returned."""
    methods = _methods(iterator)
    if methods is None:
        raise TypeError(f"a {type(iterator).__name__} cannot restore a saved position")
    getattr(iterator, methods[1])(state)


def _methods(iterator: Any) -> tuple[str, str] | None:
    for pair in (("get_state", "set_state"), ("state_dict", "load_state_dict")):
        if all(callable(getattr(iterator, name, None)) for name in pair):
            return pair
    return None


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | bytes)
