"""A dataset of single examples and the operations applied to each of them."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
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
    """How items become examples, and examples a raw batch.

    Attributes:
      loads: item -> example, each applied to what the one before returned.
      threads: see `Examples`.
      processes: see `Examples`.
      collate: examples -> raw batch.
    """

    loads: tuple[Callable[..., Any], ...] = ()
    threads: int = 0
    processes: int = 0
    collate: Callable[[Sequence[Any]], Any] = collate

    @cached_property
    def draws(self) -> tuple[bool, ...]:
        """Which of `loads` want random numbers: those with a parameter `rng`."""
        return tuple(map(_takes_rng, self.loads))


@dataclass(frozen=True)
class Bucketing:
    """How examples of different lengths are put together.

    Attributes:
      padding: how they are padded.
      buckets: the bucket of every example, `int64[length]`, where that is known.
      sorted: whether a padded batch holds examples of one bucket; else they keep their
        order, and a batch is padded for the longest one.
    """

    padding: Padding
    buckets: HostArray | None = None
    sorted: bool = True


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
      loading: how items become examples.
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
    info: DatasetInfo = NO_INFO

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
    def padding(self) -> Padding | None:
        """How examples are padded, or None."""
        return None if self.bucketing is None else self.bucketing.padding

    @property
    def plan(self) -> HostArray | None:
        """The bucket of every example if batches are planned by them."""
        found = self.bucketing
        return found.buckets if found is not None and found.sorted else None

    @property
    def sorts(self) -> bool:
        """Whether an example has to be loaded to know its batch."""
        found = self.bucketing
        if found is None or found.padding.buckets == 1:
            return False
        return found.sorted and found.buckets is None

    def part(self, start: int, stop: int) -> "ExampleSet":
        """Returns the examples from `start` up to `stop`; needs random access."""
        bucketing = self.bucketing
        if bucketing is not None and bucketing.buckets is not None:
            bucketing = replace(bucketing, buckets=bucketing.buckets[start:stop])
        return replace(
            self,
            length=stop - start,
            take=self.take and partial(_take_from, self.take, start),
            take_batch=self.take_batch and partial(_take_from, self.take_batch, start),
            bucketing=bucketing,
        )

    def in_order(self) -> "ExampleSet":
        """Returns the examples without sorting them by their length."""
        bucketing = self.bucketing and replace(self.bucketing, sorted=False)
        return replace(self, bucketing=bucketing)


def _take_from(take: Callable[[HostArray], Any], start: int, rows: HostArray) -> Any:
    return take(rows + start)


def _takes_rng(load: Callable[..., Any]) -> bool:
    try:
        return "rng" in inspect.signature(load).parameters
    except ValueError:  # a builtin without a signature
        return False


def take_items(items: Any, rows: HostArray) -> Sequence[Any]:
    """Returns rows of anything with `__getitem__`.

    `__getitems__`, where it is there, is asked for several at once.
    """
    indices = rows.tolist()
    if hasattr(items, "__getitems__"):
        taken: Sequence[Any] = items.__getitems__(indices)
        return taken
    found = []
    for index in indices:
        try:
            found.append(copy_host_arrays(items[index]))
        except Exception as error:
            error.add_note(f"while reading item {index}")
            raise
    return found


def take_rows(nest: Any, rows: HostArray) -> Sequence[Any]:
    """Returns rows of arrays in any nesting, each nested as they are.

    They are copies: a function that changes its item leaves the arrays as they are.
    """
    return [
        jax.tree.map(lambda leaf, row=row: copy_host_arrays(leaf[row]), nest)
        for row in rows.tolist()
    ]
