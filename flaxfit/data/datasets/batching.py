"""Groups single examples into batches, by random access or in sequence."""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy as np

from flaxfit._core.types import HostArray
from flaxfit.data.datasets.example_dataset import ExampleSet, takes_rng
from flaxfit.data.datasets.shuffling import batches_of_pass, rows_of, seeded
from flaxfit.data.datasets.stream import (
    BatchForm,
    Open,
    PaddedTail,
    Stream,
    get_state,
    set_state,
)
from flaxfit.data.datasets.workers import OrderedMap
from flaxfit.data.host.arrays import copy_host_arrays
from flaxfit.data.host.padding import plan_buckets, raw_of


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

    loading = examples.loading
    # One for all passes: processes stay from one to the next.
    work = OrderedMap(
        _AnyPass(examples), threads=loading.threads, processes=loading.processes
    )

    def open_pass(pass_index: int, start: int) -> Iterator[Any]:
        order = examples.order(total, pass_index, shuffle=shuffle, seed=seed)
        if examples.sorts:
            tasks = np.split(order, range(batch_size, total, batch_size))
        elif examples.plan is None:
            tasks = list(batches_of_pass(order, batch_size)[start:])
        else:
            tasks = plan_buckets(order, examples.plan, batch_size)[start:]
        made = work(((*seed, pass_index), rows) for rows in tasks)
        return _sorted(examples, made, batch_size)

    sizes = np.array([total]) if examples.plan is None else np.bincount(examples.plan)
    return replace(
        _stream(examples, open_pass, min(batch_size, int(sizes.max()))),
        num_batches=None if examples.sorts else int((-(-sizes // batch_size)).sum()),
        num_examples=total,
        seeks=not examples.sorts,
    )


def _stream_in_order(
    examples: ExampleSet, batch_size: int, seed: Sequence[int]
) -> Stream:
    iterate = examples.iterate
    assert iterate is not None

    def open_pass(pass_index: int, start: int) -> Iterator[Any]:
        del start
        work = _InOrder(examples, (*seed, pass_index))
        drawing = examples.seeded(*seed, pass_index)
        with drawing:
            items = iterate(pass_index)
        if examples.drawing is not None:
            items = _Drawn(items, drawing)
        made = _Chunks(
            items,
            batch_size,
            OrderedMap(work, threads=examples.loading.threads),
        )
        return _sorted(examples, made, batch_size)

    length = examples.length
    unknown = length is None or examples.sorts
    return replace(
        _stream(examples, open_pass, batch_size),
        num_batches=None if unknown else math.ceil((length or 0) / batch_size),
        num_examples=length,
        one_shot=examples.one_shot,
        endless=examples.endless,
    )


class _Drawn:
    """Takes items inside of a context; in all else it is their iterator."""

    def __init__(
        self, items: Iterator[Any], drawing: AbstractContextManager[Any]
    ) -> None:
        self._items = items
        self._drawing = drawing

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        with self._drawing:
            return next(self._items)

    def __getattr__(self, name: str) -> Any:
        # Where it stands, if it tells.
        return getattr(self._items, name)


class _Chunks:
    """What is made of chunks of items; it has a state if the items' iterator has one.

    Args:
      items: the items.
      size: how many are a chunk.
      work: what is done to `(number of the first item, items)`.
    """

    def __init__(self, items: Iterator[Any], size: int, work: OrderedMap) -> None:
        self._items = items
        self._size = size
        self._work = work
        self._state: dict[str, Any] | None = None
        self._begin(0)

    def _begin(self, first: int) -> None:
        # Threads read ahead: where the items stood after each chunk not handed out yet.
        self._states: deque[dict[str, Any] | None] = deque()
        self._made = self._work(self._read(first, self._states))

    def _read(
        self, first: int, states: deque[dict[str, Any] | None]
    ) -> Iterator[tuple[int, Sequence[Any]]]:
        while chunk := [
            copy_host_arrays(item) for item in islice(self._items, self._size)
        ]:
            state = get_state(self._items)
            after = first + len(chunk)
            states.append(None if state is None else {"items": state, "first": after})
            yield first, chunk
            first = after

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        made = next(self._made)
        self._state = self._states.popleft()
        return made

    def get_state(self) -> dict[str, Any] | None:
        return self._state

    def set_state(self, state: Mapping[str, Any]) -> None:
        set_state(self._items, state["items"])
        self._begin(state["first"])


def _stream(examples: ExampleSet, open_pass: Open, batch_size: int) -> Stream:
    bucketing = examples.bucketing
    return Stream(
        examples.kind,
        open_pass,
        form=BatchForm()
        if bucketing is None
        # The first batch may be the short one of a bucket.
        else BatchForm(bucketing.padding.buckets, batch_size),
        info=examples.info,
    )


def _sorted(
    examples: ExampleSet, made: Iterator[Any], batch_size: int
) -> Iterator[Any]:
    """Returns batches, made of what was loaded where only that tells the bucket."""
    if not examples.sorts:
        return made
    assert examples.bucketing is not None
    return examples.bucketing.padding.in_buckets(chain.from_iterable(made), batch_size)


def batch_of_rows(examples: ExampleSet, rows: HostArray) -> Any:
    """Returns the raw batch of some rows, by random access."""
    return raw_of(_ByIndex(examples.in_order(), (0,))(rows))


@dataclass(frozen=True)
class _AnyPass:
    """Makes the batch of some rows in a pass; a class, to be given to processes."""

    examples: ExampleSet

    def __call__(self, task: tuple[tuple[int, ...], HostArray]) -> Any:
        seed, rows = task
        return _ByIndex(self.examples, seed)(rows)


@dataclass(frozen=True)
class _ByIndex:
    """Makes the batch of some rows."""

    examples: ExampleSet
    seed: tuple[int, ...]

    def __call__(self, coded: HostArray) -> Any:
        rows, real = rows_of(coded)
        with self.examples.seeded(*self.seed, int(rows[0])):
            raw = self._batch(rows)
        return raw if real == len(rows) else PaddedTail(raw, real)

    def _batch(self, rows: HostArray) -> Any:
        examples = self.examples
        single = examples.loading.load is not None or examples.bucketing is not None
        if examples.take_batch is not None and not single:
            return examples.take_batch(rows)
        assert examples.take is not None
        try:
            items = examples.take(rows)
        except Exception as error:
            error.add_note(f"while reading the items {', '.join(map(str, rows))}")
            raise
        return _made(examples, items, rows.tolist(), self.seed)


@dataclass(frozen=True)
class _InOrder:
    """Makes the batch of items that were read."""

    examples: ExampleSet
    seed: tuple[int, ...]

    def __call__(self, task: tuple[int, Sequence[Any]]) -> Any:
        first, items = task
        rows = range(first, first + len(items))
        return _made(self.examples, items, rows, self.seed)


def _made(
    examples: ExampleSet,
    items: Sequence[Any],
    rows: Sequence[int],
    seed: tuple[int, ...],
) -> Any:
    """Returns the batch of some items, or `(row, example)` of each to be sorted."""
    loaded = _loaded(examples, items, rows, seed)
    if examples.bucketing is None:
        return examples.loading.collate(loaded)
    if examples.sorts:
        return list(zip(rows, loaded, strict=True))
    return examples.bucketing.padding.collate(loaded, rows)


def _loaded(
    examples: ExampleSet,
    items: Sequence[Any],
    rows: Sequence[int],
    seed: tuple[int, ...],
) -> Sequence[Any]:
    """Returns the examples of some items."""
    load = examples.loading.load
    if load is None:
        return items
    draws = takes_rng(load)
    loaded = []
    for row, item in zip(rows, items, strict=True):
        try:
            made = load(item, rng=seeded(*seed, row)) if draws else load(item)
            loaded.append(copy_host_arrays(made))
        except Exception as error:
            error.add_note(f"while loading item {row}")
            raise
    return loaded
