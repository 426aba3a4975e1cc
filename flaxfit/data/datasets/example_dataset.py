"""A dataset of single examples, and how they are loaded, padded and ordered."""

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
    """How items become examples, and how examples become a raw batch.

    Attributes:
      loads: functions item -> example, each applied to the result of the previous one.
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
        """Whether each of `loads` takes random numbers, by a parameter `rng`."""
        return tuple(map(_takes_rng, self.loads))


@dataclass(frozen=True)
class Bucketing:
    """How examples of different lengths are batched.

    Attributes:
      padding: how they are padded.
      buckets: the bucket of every example, `int64[length]`; None if unknown.
      sorted: whether each batch holds examples of one bucket; else examples keep their
        order, and a batch is padded to the bucket of its longest example.
    """

    padding: Padding
    buckets: HostArray | None = None
    sorted: bool = True


@dataclass(frozen=True)
class ExampleSet:
    """A dataset of single examples; one of `take`, `take_batch`, `iterate` is set.

    Attributes:
      kind: the kind of dataset in words: `"torch Dataset"`.
      length: the number of examples, None if unknown before reading.
      take: rows `int64[n]` -> their items.
      take_batch: rows `int64[n]` -> a raw batch of them, for datasets of columns; used
        if single examples are neither loaded nor padded.
      iterate: pass -> iterator over its items.
      one_shot: whether `iterate` returns the same iterator each time.
      endless: see `Stream`.
      loading: how items become examples.
      bucketing: how examples of different lengths are padded, or None.
      order: the order of a pass, see `order_of_pass`.
      drawing: seed -> a re-entrant context manager for reading items, in which their
        random draws depend on the seed only; None if the library draws nothing. Not
        used with several threads: their draws depend on no seed.
      info: metadata of the dataset.
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
        """Returns the context manager for reading items; see `drawing`."""
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
        """The bucket of every example if it decides the batches, else None."""
        found = self.bucketing
        return found.buckets if found is not None and found.sorted else None

    @property
    def sorts(self) -> bool:
        """Whether an example must be loaded to know which batch it belongs to."""
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
        """Returns the examples, batched in their order instead of by bucket."""
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

    If it also has `__getitems__`, as torch's datasets may, one call reads all rows.
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
    """Returns single rows of arrays in any nesting, each with the same nesting.

    The rows are copies: a function that changes its item does not change the arrays.
    """
    return [
        jax.tree.map(lambda leaf, row=row: copy_host_arrays(leaf[row]), nest)
        for row in rows.tolist()
    ]
