"""Single examples, put into batches: by index in any order, or one after the other."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import Any

import jax

from flaxfit._types import HostArray
from flaxfit.data.collate import collate
from flaxfit.data.order import order_of_pass, seeded
from flaxfit.data.stream import NO_FACTS, Facts, Stream
from flaxfit.data.workers import ordered_map


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
      load: item -> example, or None.
      threads: see `Examples`.
      processes: see `Examples`.
      collate: examples -> raw batch.
      facts: what the dataset says of itself.
    """

    kind: str
    length: int | None = None
    take: Callable[[HostArray], Sequence[Any]] | None = None
    take_batch: Callable[[HostArray], Any] | None = None
    iterate: Callable[[int], Iterator[Any]] | None = None
    one_shot: bool = False
    load: Callable[..., Any] | None = None
    threads: int = 0
    processes: int = 0
    collate: Callable[[Sequence[Any]], Any] = collate
    facts: Facts = field(default=NO_FACTS)

    @property
    def by_index(self) -> bool:
        """Whether any of them can be had at once."""
        return self.take is not None or self.take_batch is not None

    def part(self, start: int, stop: int) -> "ExampleSet":
        """Returns the examples from `start` up to `stop`, which are had by index."""
        return replace(
            self,
            length=stop - start,
            take=self.take and _Part(self.take, start),
            take_batch=self.take_batch and _Part(self.take_batch, start),
        )


@dataclass(frozen=True)
class _Part:
    take: Callable[[HostArray], Any]
    start: int

    def __call__(self, rows: HostArray) -> Any:
        return self.take(rows + self.start)


def stream_examples(
    examples: ExampleSet, batch_size: int, *, shuffle: bool, seed: Sequence[int]
) -> Stream:
    """Returns examples in batches.

    Args:
      examples: the examples.
      batch_size: rows of a batch; the last one may be shorter.
      shuffle: whether each pass has an order of its own, where they have indices.
      seed: decides the orders and the `rng` of `load`, with the index of the pass.
    """
    if not examples.by_index:
        return _stream_in_order(examples, batch_size, seed)
    total = examples.length
    assert total is not None

    def open_pass(pass_index: int, start: int) -> Iterator[Any]:
        order = order_of_pass(total, pass_index, shuffle=shuffle, seed=seed)
        tasks = [
            order[first : first + batch_size]
            for first in range(start * batch_size, total, batch_size)
        ]
        return ordered_map(
            _ByIndex(examples, (*seed, pass_index)),
            tasks,
            threads=examples.threads,
            processes=examples.processes,
        )

    return Stream(
        examples.kind,
        open_pass,
        num_batches=math.ceil(total / batch_size),
        num_examples=total,
        seeks=True,
        facts=examples.facts,
    )


def _stream_in_order(
    examples: ExampleSet, batch_size: int, seed: Sequence[int]
) -> Stream:
    iterate = examples.iterate
    assert iterate is not None

    def open_pass(pass_index: int, start: int) -> Iterator[Any]:
        del start
        items = iterate(pass_index)
        chunks = iter(lambda: list(islice(items, batch_size)), [])
        tasks = zip(count(0, batch_size), chunks, strict=False)
        return ordered_map(
            _InOrder(examples, (*seed, pass_index)), tasks, threads=examples.threads
        )

    length = examples.length
    return Stream(
        examples.kind,
        open_pass,
        num_batches=None if length is None else math.ceil(length / batch_size),
        num_examples=length,
        one_shot=examples.one_shot,
        facts=examples.facts,
    )


def batch_of_rows(examples: ExampleSet, rows: HostArray) -> Any:
    """Returns the raw batch of some rows, which are had by index."""
    return _ByIndex(examples, (0,))(rows)


@dataclass(frozen=True)
class _ByIndex:
    """Makes the batch of some rows; a class so that processes can be given it."""

    examples: ExampleSet
    seed: tuple[int, ...]

    def __call__(self, rows: HostArray) -> Any:
        examples = self.examples
        if examples.take_batch is not None and examples.load is None:
            return examples.take_batch(rows)
        assert examples.take is not None
        try:
            items = examples.take(rows)
        except Exception as error:
            error.add_note(f"while reading the items {', '.join(map(str, rows))}")
            raise
        return examples.collate(_loaded(examples, items, rows.tolist(), self.seed))


@dataclass(frozen=True)
class _InOrder:
    """Makes the batch of items that were read."""

    examples: ExampleSet
    seed: tuple[int, ...]

    def __call__(self, task: tuple[int, Sequence[Any]]) -> Any:
        first, items = task
        rows = range(first, first + len(items))
        return self.examples.collate(_loaded(self.examples, items, rows, self.seed))


def _loaded(
    examples: ExampleSet,
    items: Sequence[Any],
    rows: Sequence[int],
    seed: tuple[int, ...],
) -> Sequence[Any]:
    """Returns the examples of some items."""
    load = examples.load
    if load is None:
        return items
    draws = takes_rng(load)
    loaded = []
    for row, item in zip(rows, items, strict=True):
        try:
            loaded.append(load(item, rng=seeded(*seed, row)) if draws else load(item))
        except Exception as error:
            error.add_note(f"while loading item {row}")
            raise
    return loaded


@dataclass(frozen=True)
class Chain:
    """One function after the other, each with `rng` if it wants it."""

    first: Callable[..., Any]
    second: Callable[..., Any]

    def __call__(self, item: Any, rng: Any = None) -> Any:
        for load in (self.first, self.second):
            item = load(item, rng=rng) if takes_rng(load) else load(item)
        return item


def takes_rng(load: Callable[..., Any]) -> bool:
    """Whether a function wants random numbers: it has a parameter `rng`."""
    if isinstance(load, Chain):
        return takes_rng(load.first) or takes_rng(load.second)
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
                found.append(self.items[index])
            except Exception as error:
                error.add_note(f"while reading item {index}")
                raise
        return found


def take_rows(nest: Any) -> Callable[[HostArray], Sequence[Any]]:
    """Returns what takes rows of arrays in any nesting, each nested as they are."""
    return _RowTaker(nest)


@dataclass(frozen=True)
class _RowTaker:
    nest: Any

    def __call__(self, rows: HostArray) -> Sequence[Any]:
        return [
            jax.tree.map(lambda leaf, row=row: leaf[row], self.nest)
            for row in rows.tolist()
        ]
