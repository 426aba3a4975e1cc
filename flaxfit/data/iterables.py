"""Batches that someone else makes: loaders, lists of batches, generators.

Nothing is lost by looking ahead: the first batch is read when the source is made,
and handed out again by the first pass.

A loader may fill one buffer again and again, while steps on the batches before are
still under way: what is its own memory is copied as it comes. jax arrays cannot change,
and go on as they are.
"""

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import jax
import numpy as np

from flaxfit._errors import DataError
from flaxfit._types import Batch, PyTree
from flaxfit.data.checks import check_lengths, check_weights
from flaxfit.data.source import (
    as_host,
    call_text,
    fill,
    is_array,
    named_leaves,
    narrow,
)
from flaxfit.data.weights import with_weights


class IterableSource:
    """Batches read from an iterable, an iterator or a generator function.

    Args:
      data: something to iterate over, or a function without arguments that returns
        it anew for each pass. An iterator (`iter(data) is data`) serves one pass.
      read: raw batch -> `Batch` of NumPy and jax arrays; `weights` may be None.
      unused: raw batch -> the keys of which nothing is read.
      check: called with every batch that is handed out, before it is filled up.
        Reading a device takes its time: values there are checked in the first batch,
        whose values stand in for them later on.
      what: the method the data was given to, for messages.
      steps: the number of steps asked for; an iterator that ends before it is an
        error.

    Raises:
      DataError: there is no batch, or the first one cannot be read.
      TypeError: a function that needs arguments or returns no iterable.
    """

    num_examples = None

    def __init__(
        self,
        data: Any,
        read: Callable[[Any], Batch],
        *,
        unused: Callable[[Any], tuple[str, ...]] = lambda raw: (),
        check: Callable[[Batch], None] | None = None,
        what: str = "fit",
        steps: int | None = None,
    ) -> None:
        self.kind = kind_of(data)
        self.one_shot = self.kind == "iterator"
        self.num_batches = None if self.one_shot else _length(data)
        self._data = data
        self._read = read
        self.pad = True
        self._check = check
        self._what = what
        self._steps = steps
        self._warned = False
        # Of batches and of passes: callers that evaluate again start at 0 each time.
        self._handed_out = 0
        self._passes = 0
        iterator = self._open(0)
        try:
            raw = self._next(iterator, 0, 0)
        except StopIteration:
            raise DataError(
                f"no batches: the {self.kind} given to {what} yielded nothing. "
                f"{self._again()}"
            ) from None
        first = self._converted(raw, 0, 0, to_host=True)
        self.unused = unused(raw)
        self._signature = _signature(first)
        self.batch_size = len(first.weights)
        self.example = first
        # The batch and the pass it belongs to, until a pass takes them over. What lies
        # on a device goes on from there, as all later batches do.
        ahead = self._converted(raw, 0, 0) if _on_device(raw) else first
        self._ahead: tuple[Iterator[Any], Batch] | None = (iterator, ahead)

    def check(self) -> None:
        """Checks the first batch; the others are checked as they come."""
        if self._check is not None:
            self._check(self.example)

    def batches(self, pass_index: int, start: int = 0) -> Iterator[Batch]:
        """Yields the batches of one pass; the data decides the order.

        What comes before number `start` is read and left out: there is no other way
        to get past it.

        Raises:
          DataError: nothing is left, an iterator ends before the steps asked for, or
            a batch differs from the first one in structure, dtype or shape beyond
            the batch axis.
        """
        number, pass_index = 0, self._passes
        self._passes += 1
        if self._ahead is not None:
            (iterator, first), self._ahead = self._ahead, None
            number = 1
            if start == 0:
                yield self._finished(first, 0, pass_index)
        else:
            iterator = self._open(pass_index)
        while number < start:
            try:
                self._next(iterator, number, pass_index)
            except StopIteration:
                raise DataError(
                    f"the {self.kind} given to {self._what} ends after {number} "
                    f"batches, but {start} of them were trained on before this run "
                    f"was interrupted. {self._again()}"
                ) from None
            number += 1
        while True:
            try:
                raw = self._next(iterator, number, pass_index)
            except StopIteration:
                break
            batch = self._converted(raw, number, pass_index)
            yield self._finished(batch, number, pass_index)
            number += 1
        # Whoever asks for so many steps reads no further: this is the end before it.
        short = self.one_shot and self._steps is not None
        if number == 0 or short:
            raise DataError(self._used_up(pass_index))

    def _open(self, pass_index: int) -> Iterator[Any]:
        if self.one_shot:
            # Not iter() of it: some iterators have nothing but __next__.
            return cast(Iterator[Any], self._data)
        try:
            if self.kind == "iterable":
                return _iterate(self._data)
            made = self._data()
        except Exception as error:
            error.add_note(f"while starting pass {pass_index} over the data")
            raise
        whole = is_array(made) or isinstance(made, tuple | Mapping | Batch)
        if whole or not isinstance(made, Iterable):
            raise TypeError(
                f"the function given to {self._what} returned a "
                f"{type(made).__name__}; it must return an iterable of batches, or "
                "yield them: def make_batches(): yield x, y. Arrays are given "
                f"directly: {call_text(self._what, 'x, y')}."
            )
        return iter(made)

    def _next(self, iterator: Iterator[Any], number: int, pass_index: int) -> Any:
        try:
            return next(iterator)
        except StopIteration:
            raise
        except Exception as error:
            error.add_note(f"while reading batch {number} of pass {pass_index}")
            if "already executing" in str(error):
                error.add_note(
                    "A fit before this one still reads from it in the background. "
                    "Wait for it, or write Trainer(model, prefetch=0)."
                )
            raise

    def _converted(
        self, raw: Any, number: int, pass_index: int, *, to_host: bool = False
    ) -> Batch:
        """Returns a raw batch with weights, checked but not filled."""
        try:
            given = as_host(self._read(raw), but_device=not to_host)
            check_lengths(given)
            batch = with_weights(narrow(given))
            if isinstance(batch.weights, np.ndarray):
                check_weights(batch.weights, all_zero=True)
            return _owned(batch, given)
        except DataError as error:
            raise DataError(f"batch {number} of pass {pass_index}: {error}") from error
        except Exception as error:
            error.add_note(f"while reading batch {number} of pass {pass_index}")
            raise

    def _finished(self, batch: Batch, number: int, pass_index: int) -> Batch:
        """Returns a batch compared with the first one, checked and filled up."""
        place = f"batch {number} of pass {pass_index}"
        if _signature(batch) != self._signature:
            raise DataError(f"{place} {_difference(batch, self.example)}")
        if self._check is not None:
            try:
                self._check(self._checkable(batch))
            except DataError as error:
                raise DataError(f"{place}: {error}") from error
        rows = len(batch.weights)
        if rows > self.batch_size:
            self._grow(place, rows)
        self._handed_out += 1
        return fill(batch, self.batch_size) if self.pad else batch

    def _checkable(self, batch: Batch) -> Batch:
        """Returns the batch with the first one's values for those on a device."""
        if _on_device(batch.inputs):
            batch = batch.replace(inputs=self.example.inputs)
        if _on_device((batch.targets, batch.weights)):
            first = self.example
            batch = batch.replace(targets=first.targets, weights=first.weights)
        return batch

    def _grow(self, place: str, rows: int) -> None:
        if not self._warned and self.pad:
            warnings.warn(
                f"{place} has {rows} rows, the ones before had {self.batch_size}: "
                "every larger batch compiles once more. Let the first batch be the "
                "largest, or yield batches of one size.",
                UserWarning,
                stacklevel=2,
            )
            self._warned = True
        self.batch_size = rows

    def _used_up(self, pass_index: int) -> str:
        asked = f" ({self._steps} steps were asked for)" if self._steps else ""
        if self.one_shot:
            return (
                f"the iterator given to {self._what} is used up, after "
                f"{self._handed_out} batches in all, but there is more to do{asked}. "
                f"{self._again()}"
            )
        return (
            f"no batches in pass {pass_index}: the {self.kind} given to {self._what} "
            f"yielded nothing this time{asked}. {self._again()}"
        )

    def _again(self) -> str:
        if self.kind == "generator function":
            return "The function must make a new iterable each time it is called."
        return (
            "Pass something that can be read again and again: a list, a loader, or "
            f"the function that makes the batches, "
            f"{call_text(self._what, 'make_batches')} not "
            f"{call_text(self._what, 'make_batches()')}."
        )


def kind_of(data: Any) -> str:
    """Returns `"iterator"`, `"iterable"` or `"generator function"`.

    Raises:
      TypeError: it is none of these, or a function that needs arguments.
    """
    if hasattr(data, "__next__") and not isinstance(data, type):
        if not hasattr(data, "__iter__") or iter(data) is data:
            return "iterator"
    if _is_iterable(data):
        return "iterable"
    if not callable(data):
        raise TypeError(
            f"a {type(data).__name__} is no data. Understood are arrays in any "
            "nesting with or without y, (x, y) and (x, y, weights), a dict of "
            "arrays, an iterable of batches, a function that yields batches, and an "
            "iterator over batches."
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


def _iterate(data: Any) -> Iterator[Any]:
    if hasattr(data, "__iter__"):
        return iter(data)
    # Not iter(): a sequence of batches need not raise IndexError at its end.
    return (data[index] for index in range(len(data)))


def _length(data: Any) -> int | None:
    """Returns the number of batches if the data knows it; many loaders do not."""
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def _owned(batch: Batch, given: Batch) -> Batch:
    """Returns the batch with copies of NumPy arrays that `given` has too."""
    theirs = {id(leaf) for leaf in jax.tree.leaves(given)}
    copied: Batch = jax.tree.map(
        lambda leaf: (
            leaf.copy() if isinstance(leaf, np.ndarray) and id(leaf) in theirs else leaf
        ),
        batch,
    )
    return copied


def _on_device(nest: PyTree) -> bool:
    return any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nest))


def _signature(batch: Batch) -> tuple[Any, ...]:
    """Returns what must be the same for all batches."""
    leaves, structure = jax.tree.flatten(batch)
    return structure, [(leaf.shape[1:], leaf.dtype) for leaf in leaves]


def _difference(batch: Batch, first: Batch) -> str:
    """Says where two batches differ, both sides."""
    now, then = (
        {name: _kind_of_rows(leaf) for name, leaf in named_leaves(each)}
        for each in (batch, first)
    )
    different = [
        f"{name} is {now.get(name, 'missing')}, was {then.get(name, 'missing')}"
        for name in {**then, **now}
        if now.get(name) != then.get(name)
    ] or [f"the nesting is {_nesting(batch)}, was {_nesting(first)}"]
    return (
        f"differs from the first batch: {'; '.join(different)}. All batches need the "
        "same structure, dtypes and shapes beyond the batch axis: pad rows to one "
        "length and convert with .astype(...) where the batches are made."
    )


def _kind_of_rows(leaf: np.ndarray[Any, Any]) -> str:
    return f"{leaf.dtype}[{', '.join(['batch', *map(str, leaf.shape[1:])])}]"


def _nesting(batch: Batch) -> str:
    return str(jax.tree.structure((batch.inputs, batch.targets)))
