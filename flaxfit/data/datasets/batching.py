"""Groups single examples into batches, by random access or in sequence."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np

from flaxfit._core.types import HostArray
from flaxfit.data.datasets.example_dataset import ExampleSet
from flaxfit.data.datasets.shuffling import batches_of_pass, rows_of, seeded
from flaxfit.data.datasets.stream import (
    BatchForm,
    Open,
    PaddedTail,
    Stream,
    Wrapped,
    get_state,
    set_state,
)
from flaxfit.data.datasets.workers import OrderedMap
from flaxfit.data.host.arrays import copy_host_arrays
from flaxfit.data.host.padding import plan_buckets, raw_of


def stream_examples(
    examples: ExampleSet, batch_size: int, *, shuffle: bool, seed: Sequence[int]
) -> Stream:
    """Returns a stream of batches of examples.

    Args:
      examples: the examples.
      batch_size: rows of a batch; the last one may be shorter.
      shuffle: whether each pass has a new order, if there is random access.
      seed: determines the orders and the `rng` of `load`, together with the pass.
    """
    length, plan, padding = examples.length, examples.plan, examples.padding
    num_batches, rows = None, batch_size
    if length is not None:
        sizes = np.array([length]) if plan is None else np.bincount(plan)
        if examples.by_index:
            rows = min(batch_size, int(sizes.max()))
        if not examples.sorts:
            num_batches = int((-(-sizes // batch_size)).sum())
    if examples.by_index:
        open_pass = _passes_by_index(examples, batch_size, shuffle, seed)
    else:
        open_pass = _passes_in_order(examples, batch_size, seed)
    return Stream(
        examples.kind,
        open_pass,
        num_batches,
        length,
        one_shot=examples.one_shot,
        endless=examples.endless,
        seeks=examples.by_index and not examples.sorts,
        # The first batch may be the last, short one of its bucket.
        form=BatchForm(padding.buckets, rows) if padding else BatchForm(),
        info=examples.info,
    )


def _passes_by_index(
    examples: ExampleSet, batch_size: int, shuffle: bool, seed: Sequence[int]
) -> Open:
    total = examples.length
    assert total is not None
    # One for all passes, so that processes are reused.
    work = OrderedMap(
        partial(_batch_of_rows, examples),
        threads=examples.loading.threads,
        processes=examples.loading.processes,
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

    return open_pass


def _passes_in_order(
    examples: ExampleSet, batch_size: int, seed: Sequence[int]
) -> Open:
    iterate = examples.iterate
    assert iterate is not None

    def open_pass(pass_index: int, start: int) -> Iterator[Any]:
        del start
        here = (*seed, pass_index)
        drawing = examples.seeded(*here)

        def take(items: Iterator[Any]) -> Any:
            with drawing:
                return next(items)

        def make(task: tuple[Sequence[int], Sequence[Any], Any]) -> tuple[Any, Any]:
            rows, items, state = task
            return _batch_of_items(examples, here, rows, items), state

        with drawing:
            items = iterate(pass_index)
        if examples.drawing is not None:
            items = Wrapped(items, take)
        work = OrderedMap(make, threads=examples.loading.threads)
        return _sorted(examples, _Chunks(items, batch_size, work), batch_size)

    return open_pass


class _Chunks(Iterator[Any]):
    """Yields the result of `work` for each chunk of items.

    It has a state if the iterator of the items has one.

    Args:
      items: the items.
      size: the number of items in a chunk.
      work: `(numbers of the items, items, state after them)` -> `(result, state)`.
        Threads read ahead, so each chunk carries its own state.
    """

    def __init__(self, items: Iterator[Any], size: int, work: OrderedMap) -> None:
        self._items = items
        self._size = size
        self._work = work
        self._state: dict[str, Any] | None = None
        self._made = work(self._read(0))

    def _read(self, first: int) -> Iterator[tuple[Sequence[int], Sequence[Any], Any]]:
        while chunk := [
            copy_host_arrays(item) for item in islice(self._items, self._size)
        ]:
            after, state = first + len(chunk), get_state(self._items)
            if state is not None:
                state = {"items": state, "first": after}
            yield range(first, after), chunk, state
            first = after

    def __next__(self) -> Any:
        made, self._state = next(self._made)
        return made

    def get_state(self) -> dict[str, Any] | None:
        return self._state

    def set_state(self, state: Mapping[str, Any]) -> None:
        set_state(self._items, state["items"])
        self._made = self._work(self._read(state["first"]))


def _sorted(
    examples: ExampleSet, made: Iterator[Any], batch_size: int
) -> Iterator[Any]:
    """Returns batches: `made`, or its examples in buckets if loading decides these."""
    if not examples.sorts:
        return made
    assert examples.padding is not None
    return examples.padding.in_buckets(chain.from_iterable(made), batch_size)


def batch_of_rows(examples: ExampleSet, rows: HostArray) -> Any:
    """Returns the raw batch of `rows`, read by random access."""
    return raw_of(_batch_of_rows(examples.in_order(), ((0,), rows)))


def _batch_of_rows(
    examples: ExampleSet, task: tuple[tuple[int, ...], HostArray]
) -> Any:
    """Returns the batch of `(seed, rows)`; see `batches_of_pass` for the rows."""
    seed, coded = task
    rows, real = rows_of(coded)
    with examples.seeded(*seed, int(rows[0])):
        raw = _raw_batch(examples, seed, rows)
    return raw if real == len(rows) else PaddedTail(raw, real)


def _raw_batch(examples: ExampleSet, seed: tuple[int, ...], rows: HostArray) -> Any:
    if examples.take_batch and not (examples.loading.loads or examples.padding):
        return examples.take_batch(rows)
    assert examples.take is not None
    try:
        items = examples.take(rows)
    except Exception as error:
        error.add_note(f"while reading the items {', '.join(map(str, rows))}")
        raise
    return _batch_of_items(examples, seed, rows.tolist(), items)


def _batch_of_items(
    examples: ExampleSet,
    seed: tuple[int, ...],
    rows: Sequence[int],
    items: Sequence[Any],
) -> Any:
    """Returns the batch of items, or `(row, example)` pairs if they are yet to sort."""
    loaded = _loaded(examples, items, rows, seed)
    if examples.padding is None:
        return examples.loading.collate(loaded)
    if examples.sorts:
        return list(zip(rows, loaded, strict=True))
    return examples.padding.collate(loaded, rows)


def _loaded(
    examples: ExampleSet,
    items: Sequence[Any],
    rows: Sequence[int],
    seed: tuple[int, ...],
) -> Sequence[Any]:
    """Returns the examples of items; all functions share one `rng` per item."""
    if not examples.loading.loads:
        return items
    steps = list(zip(examples.loading.loads, examples.loading.draws, strict=True))
    any_draws, loaded = any(examples.loading.draws), []
    for row, item in zip(rows, items, strict=True):
        try:
            rng = seeded(*seed, row) if any_draws else None
            for load, draws in steps:
                item = load(item, rng=rng) if draws else load(item)
            loaded.append(copy_host_arrays(item))
        except Exception as error:
            error.add_note(f"while loading item {row}")
            raise
    return loaded
