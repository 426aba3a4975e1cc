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
from flaxfit.data.datasets.stream import NO_FACTS, Facts
from flaxfit.data.host.arrays import copy_host_arrays
from flaxfit.data.host.collate import collate
from flaxfit.data.host.padding import Padding


@dataclass(frozen=True)
class ExampleSet:
    """Examples of one kind of dataset, and what is done to each of them.

    Either `take` or `iterate` is there.

    Attributes:
      kind: what it is, in words: `"torch Dataset"`.
      length: the number of examples, None where only reading tells.
      take: rows `int64[n]` -> their items.
      take_batch: rows `int64[n]` -> them as a raw batch, for datasets of columns;
        used where nothing is done to single examples.
      iterate: pass -> its items, one after the other.
      one_shot: whether `iterate` goes on with the same iterator each time.
      endless: see `Stream`.
      load: item -> example, or None.
      threads: see `Examples`.
      processes: see `Examples`.
      collate: examples -> raw batch.
      padding: how examples of different length are padded, or None.
      buckets: the bucket of every example, `int64[length]`, where that is known.
      in_buckets: whether a batch holds examples of one bucket; else they keep their
        order, and a batch is padded for the longest one.
      order: the order of a pass, see `order_of_pass`.
      drawing: seed -> what to be inside of, again and again, while items are read:
        their draws are then a function of the seed. None where a library has no draws
        of its own. Several threads draw as they come.
      facts: what the dataset says of itself.
    """

    kind: str
    length: int | None = None
    take: Callable[[HostArray], Sequence[Any]] | None = None
    take_batch: Callable[[HostArray], Any] | None = None
    iterate: Callable[[int], Iterator[Any]] | None = None
    one_shot: bool = False
    endless: bool = False
    load: Callable[..., Any] | None = None
    threads: int = 0
    processes: int = 0
    collate: Callable[[Sequence[Any]], Any] = collate
    padding: Padding | None = None
    buckets: HostArray | None = None
    in_buckets: bool = True
    order: Callable[..., HostArray] = order_of_pass
    drawing: Callable[[Sequence[int]], AbstractContextManager[Any]] | None = None
    facts: Facts = field(default=NO_FACTS)

    def drawn(self, *seed: int) -> AbstractContextManager[Any]:
        """Returns what to be inside of while items are read; see `drawing`."""
        if self.drawing is None or self.threads > 1:
            return nullcontext()
        return self.drawing(seed)

    @property
    def by_index(self) -> bool:
        """Whether any of them can be had at once."""
        return self.take is not None or self.take_batch is not None

    @property
    def plan(self) -> HostArray | None:
        """The bucket of every example if batches are planned by them."""
        return self.buckets if self.in_buckets else None

    @property
    def sorts(self) -> bool:
        """Whether only what was loaded tells which batch it goes into."""
        several = self.padding is not None and self.padding.buckets > 1
        return several and self.in_buckets and self.buckets is None

    def part(self, start: int, stop: int) -> "ExampleSet":
        """Returns the examples from `start` up to `stop`, which are had by index."""
        return replace(
            self,
            length=stop - start,
            take=self.take and _Part(self.take, start),
            take_batch=self.take_batch and _Part(self.take_batch, start),
            buckets=None if self.buckets is None else self.buckets[start:stop],
        )


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
