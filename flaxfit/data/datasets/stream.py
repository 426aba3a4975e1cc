"""The contract of a dataset kind: raw batches, pass after pass.

A new kind is one file with a function that returns a `Stream`, or an `ExampleSet` where
batches have to be made first, and one line in `kinds`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from flaxfit.data.datasets.columns import Columns

Open: TypeAlias = Callable[[int, int], Iterator[Any]]
"""`(pass, start) -> raw batches of that pass from number start on`."""


@dataclass(frozen=True)
class BatchForm:
    """The shapes of the batches of a stream.

    Attributes:
      shapes: how many shapes batches may have besides their rows, 1 where all are
        alike. A program is compiled for each.
      batch_size: the rows batches are padded to, None for those of the first batch.
      size: raw batch -> its number of examples, where inputs are nested arrays without
        a common batch axis. Such batches stay as they are, whatever their shapes.
    """

    shapes: int = 1
    batch_size: int | None = None
    size: Callable[[Any], int] | None = None


@dataclass(frozen=True)
class DatasetInfo:
    """What a dataset says of itself.

    Attributes:
      keys: those of an example, where it is a dict and they are known.
      inputs: the key or keys of its inputs, used unless the user or the names of the
        model's call say otherwise.
      targets: the key or keys of its targets, likewise.
      class_names: the names of the classes 0, 1, … of its target.
      pictures: whether its `uint8` inputs are pictures, which the model is given as
        `float32` between 0 and 1.
      columns: what the columns of tables are read as from here on.
      table: which columns of a table were read as what, in words; empty for others.
      unused: the keys or columns that are neither input nor target nor weight.
      shuffles: whether batches come in another order than the dataset's.
      assumed_split: the error for evaluation and prediction where no split was named
        and `train` was taken; empty where one was.
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
      open: see `Open`; where the stream does not seek, `start` is 0.
      num_batches: batches of a pass, None where only reading tells.
      num_examples: examples of a pass, None where only reading tells.
      one_shot: whether it can be read only once; `open` then returns the same
        iterator again.
      endless: whether it is known to have no end.
      seeks: whether `open` can start anywhere without reading what comes before.
      form: the shapes of the batches.
      seeded: seed -> what to open in place of `open`, where the draws of a pass are a
        function of seed and pass; None where the data alone decides.
      examples: the same data as single examples, where only its items tell whether
        they are batches; else None.
      again: what to write where it is used up; empty for the usual advice.
      info: what the dataset says about itself.
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
    again: str = ""
    info: DatasetInfo = NO_INFO


class PaddedTail(NamedTuple):
    """A raw batch that is filled up with rows of other batches, as arrays are.

    Attributes:
      raw: the batch.
      rows: how many of its rows are no fill.
    """

    raw: Any
    rows: int


class Wrapped(Iterator[Any]):
    """An iterator whose items are taken by a function; in all else it is that iterator.

    Args:
      iterator: the iterator.
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
        # Where it stands, if it tells.
        return getattr(self._iterator, name)


def has_state(iterator: Any) -> bool:
    """Whether an iterator tells where it stands, as Grain's or torchdata's do."""
    return _methods(iterator) is not None


def get_state(iterator: Any) -> Any:
    """Returns where an iterator stands, in plain values; None if it does not tell."""
    methods = _methods(iterator)
    state = methods and getattr(iterator, methods[0])()
    return state if _is_plain(state) else None


def set_state(iterator: Any, state: Any) -> None:
    """Sets an iterator to a state that `get_state` returned."""
    methods = _methods(iterator)
    if methods is None:
        raise TypeError(f"a {type(iterator).__name__} cannot be set to a state")
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
