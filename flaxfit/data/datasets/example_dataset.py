"""A dataset of single examples and the operations applied to each of them."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax

from flaxfit._core.types import HostArray
from flaxfit.data.datasets.shuffling import order_of_pass
from flaxfit.data.datasets.stream import NO_INFO, DatasetInfo
from flaxfit.data.host.arrays import copy_host_arrays
from flaxfit.data.host.collate import collate
from flaxfit.data.host.padding import Padding


@dataclass(frozen=True)
class Loading:
    """How items become examples, and examples a batch.

    Attributes:
      load: item -> example, None to take items as they are.
      threads: see `Examples`.
      processes: see `Examples`.
      collate: examples -> raw batch.
    """

    load: Callable[..., Any] | None = None
    threads: int = 0
    processes: int = 0
    collate: Callable[[Sequence[Any]], Any] = collate


@dataclass(frozen=True)
class Bucketing:
    """How examples of different lengths are padded.

    Attributes:
      padding: the padding of a batch.
      buckets: the bucket of every example, `int64[length]`, where that is known.
      sorted: whether a batch holds examples of one bucket; else they keep their order,
        and a batch is padded for the longest one.
    """

    padding: Padding
    buckets: HostArray | None = None
    sorted: bool = True

    @property
    def plan(self) -> HostArray | None:
        """The bucket of every example if batches are planned by them."""
        return self.buckets if self.sorted else None

    @property
    def needs_loading(self) -> bool:
        """Whether an example has to be loaded to know its bucket."""
        return self.padding.buckets > 1 and self.sorted and self.buckets is None


@dataclass(frozen=True)
class ExampleSet:
    """A dataset of single examples; has `take`, `take_batch` or `iterate`.

    Attributes:
      kind: the kind of dataset in words: `"torch Dataset"`.
      length: the number of examples, None where only reading tells.
      take: rows `int64[n]` -> their items.
      take_batch: rows `int64[n]` -> a raw batch of them, for datasets of columns; used
        where single examples are neither loaded nor padded.
      iterate: pass -> its items in order.
      one_shot: whether `iterate` continues the same iterator each time.
      endless: see `Stream`.
      loading: how items become batches.
      bucketing: how examples of different lengths are padded, or None.
      order: the order of a pass, see `order_of_pass`.
      drawing: seed -> a re-entrant context manager under which items are read: their
        random draws are then a function of the seed. None where a library draws
        nothing itself. With several threads the draws follow no seed.
      info: what the dataset says about itself.
    """

    kind: str
    length: int | None = None
    take: Callable[[HostArray], Sequence[Any]] | None = None
    take_batch: Callable[[HostArray], Any] | None = None
    iterate: Callable[[int], Iterator[Any]] | None = None
    one_shot: bool = False
    endless: bool = False
    loading: Loading = Loading()
    bucketing: Bucketing | None = None
    order: Callable[..., HostArray] = order_of_pass
    drawing: Callable[[Sequence[int]], AbstractContextManager[Any]] | None = None
    info: DatasetInfo = field(default=NO_INFO)

    def seeded(self, *seed: int) -> AbstractContextManager[Any]:
        """Returns the context manager under which items are read; see `drawing`."""
        if self.drawing is None or self.loading.threads > 1:
            return nullcontext()
        return self.drawing(seed)

    @property
    def by_index(self) -> bool:
        """Whether examples have random access."""
        return self.take is not None or self.take_batch is not None

    @property
    def plan(self) -> HostArray | None:
        """The bucket of every example if batches are planned by them."""
        return None if self.bucketing is None else self.bucketing.plan

    @property
    def sorts(self) -> bool:
        """Whether an example has to be loaded to know its batch."""
        return self.bucketing is not None and self.bucketing.needs_loading

    def part(self, start: int, stop: int) -> "ExampleSet":
        """Returns the examples from `start` up to `stop`; needs random access."""
        bucketing = self.bucketing
        if bucketing is not None and bucketing.buckets is not None:
            bucketing = replace(bucketing, buckets=bucketing.buckets[start:stop])
        return replace(
            self,
            length=stop - start,
            take=self.take and _Part(self.take, start),
            take_batch=self.take_batch and _Part(self.take_batch, start),
            bucketing=bucketing,
        )

    def in_order(self) -> "ExampleSet":
        """Returns the examples without sorting them by their length."""
        if self.bucketing is None:
            return self
        return replace(self, bucketing=replace(self.bucketing, sorted=False))


@dataclass(frozen=True)
class _Part:
    take: Callable[[HostArray], Any]
    start: int

    def __call__(self, rows: HostArray) -> Any:
        return self.take(rows + self.start)


@dataclass(frozen=True)
class Chain:
    """One function after the other, each with `rng` if it wants it."""

    first: Callable[..., Any]
    second: Callable[..., Any]

    @cached_property
    def draws(self) -> tuple[bool, bool]:
        """Which of the two want it."""
        return takes_rng(self.first), takes_rng(self.second)

    def __call__(self, item: Any, rng: Any = None) -> Any:
        for load, draws in zip((self.first, self.second), self.draws, strict=True):
            item = load(item, rng=rng) if draws else load(item)
        return item


def takes_rng(load: Callable[..., Any]) -> bool:
    """Whether a function wants random numbers: it has a parameter `rng`."""
    if isinstance(load, Chain):
        return any(load.draws)
    try:
        return "rng" in inspect.signature(load).parameters
    except ValueError:  # a builtin without a signature
        return False


def take_items(items: Any) -> Callable[[HostArray], Sequence[Any]]:
    """Returns what takes rows of anything with `__getitem__`.

    `__getitems__`, where it is there, is asked for several at once.
    """
    return _Taker(items)


@dataclass(frozen=True)
class _Taker:
    items: Any

    def __call__(self, rows: HostArray) -> Sequence[Any]:
        indices = rows.tolist()
        if hasattr(self.items, "__getitems__"):
            taken: Sequence[Any] = self.items.__getitems__(indices)
            return taken
        found = []
        for index in indices:
            try:
                found.append(copy_host_arrays(self.items[index]))
            except Exception as error:
                error.add_note(f"while reading item {index}")
                raise
        return found


def take_rows(nest: Any) -> Callable[[HostArray], Sequence[Any]]:
    """Returns what takes rows of arrays in any nesting, each nested as they are.

    They are copies: a function that changes its item leaves the arrays as they are.
    """
    return _RowTaker(nest)


@dataclass(frozen=True)
class _RowTaker:
    nest: Any

    def __call__(self, rows: HostArray) -> Sequence[Any]:
        return [
            jax.tree.map(lambda leaf, row=row: copy_host_arrays(leaf[row]), self.nest)
            for row in rows.tolist()
        ]
