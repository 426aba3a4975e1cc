"""A source that reads, checks and fills the raw batches of a `Stream`.

Nothing is lost by looking ahead: the first batch is read when the source is made,
and handed out again by the first pass.

A loader may fill one buffer again and again, while steps on the batches before are
still under way: batches are lent, and whoever keeps one copies it. The first one is
copied here.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from flaxfit._core.errors import DataError
from flaxfit._core.tree_specs import LeafSpec, diff, difference_lines
from flaxfit._core.types import Batch
from flaxfit.data.datasets.stream import (
    NO_FACTS,
    Facts,
    Filled,
    Stream,
    get_state,
    set_state,
)
from flaxfit.data.host.arrays import (
    as_host,
    call_text,
    copy_host_arrays,
    fill,
    named_leaves,
    narrow,
    on_device,
)
from flaxfit.data.host.checks import check_lengths, check_sized, check_weights
from flaxfit.data.host.weights import with_weights
from flaxfit.data.sources.fast_path import Recipe, learn

# Reading so long again is not noticed, and asking an iterator where it stands costs.
_SECONDS_BETWEEN_BOOKMARKS = 0.05


class StreamSource:
    """Batches made of the raw batches of a `Stream`.

    Args:
      stream: the raw batches.
      read: raw batch -> `Batch` of NumPy and jax arrays; `weights` may be None.
      unused: raw batch -> the keys of which nothing is read.
      check: called with every batch that is handed out, before it is filled up.
        Reading a device takes its time: values there are checked in the first batch,
        whose values stand in for them later on.
      what: the method the data was given to, for messages.
      steps: the number of steps asked for; an iterator that ends before it is an
        error.
      multiple_of: rounds the rows of a batch up, where the stream knows how many
        examples there are.
      structural: whether `read` looks at structure and names alone, so that it does
        the same with every batch.

    Raises:
      DataError: there is no batch, or the first one cannot be read.
      TypeError: a function that needs arguments or returns no iterable.
    """

    lends = True

    def __init__(
        self,
        stream: Stream,
        read: Callable[[Any], Batch],
        *,
        unused: Callable[[Any], tuple[str, ...]] = lambda raw: (),
        check: Callable[[Batch], None] | None = None,
        what: str = "fit",
        steps: int | None = None,
        multiple_of: int = 1,
        structural: bool = False,
    ) -> None:
        self.kind = stream.kind
        self.shapes = stream.shapes
        self.one_shot = stream.one_shot
        self.seeks = stream.seeks
        self.num_batches = stream.num_batches
        self.num_examples = stream.num_examples
        self.facts: Facts = stream.facts or NO_FACTS
        self._stream = stream
        self._read = read
        self.pad = True
        self._check = check
        self._what = what
        self._steps = steps
        self._warned = False
        # Of batches and of passes: callers that evaluate again start at 0 each time.
        self._handed_out = 0
        self._passes = 0
        self._mark: dict[str, Any] | None = None
        self._marked = -_SECONDS_BETWEEN_BOOKMARKS
        self._recipe: Recipe | None = None
        iterator = self._open(0, 0)
        try:
            raw = self._next(iterator, 0, 0)
        except StopIteration:
            raise DataError(
                f"no batches: the {self.kind} given to {what} yielded nothing. "
                f"{self._again()}"
            ) from None
        self._note(iterator, 0, 1)
        first = copy_host_arrays(self._converted(raw, 0, 0, to_host=True))
        plain = raw.raw if isinstance(raw, Filled) else raw
        self.unused = unused(plain)
        if structural and stream.size is None:
            self._recipe = learn(plain, read)
        self._signature = _signature(first)
        self._shapes = {self._shapes_of(first)}
        rows = max(len(first.weights), stream.batch_size or 0)
        known = stream.num_examples is not None
        self.batch_size = -(-rows // multiple_of) * multiple_of if known else rows
        self.example = fill(first, self.batch_size)
        # The batch, until the first pass takes it over. What lies on a device goes on
        # from there, as all later batches do.
        ahead = self._converted(raw, 0, 0) if on_device(raw) else first
        self._ahead: tuple[Iterator[Any], Batch] | None = (iterator, ahead)

    def check(self) -> None:
        """Checks the first batch; the others are checked as they come."""
        if self._check is not None:
            self._check(self.example)

    @property
    def bookmark(self) -> Mapping[str, Any] | None:
        """Where an iterator of its own state stood after a batch handed out lately.

        Plain values; `batches` reads on from there. None where there is no such state.
        """
        return self._mark

    def batches(
        self,
        pass_index: int,
        start: int = 0,
        bookmark: Mapping[str, Any] | None = None,
    ) -> Iterator[Batch]:
        """Yields the batches of one pass; the data decides the order.

        What comes before number `start` is read and left out, but by streams that
        seek.

        Args:
          pass_index: which pass.
          start: the number of the first batch.
          bookmark: of the same pass, at `start` or before.

        Raises:
          DataError: nothing is left, an iterator ends before the steps asked for, or
            a batch differs from the first one in structure, dtype or shape beyond
            the batch axis.
        """
        number, ahead, self._ahead = 0, self._ahead, None
        if bookmark is not None or ahead is None or pass_index or start:
            # What was noted is of another reading.
            self._mark, self._marked = None, -_SECONDS_BETWEEN_BOOKMARKS
        named = max(pass_index, self._passes)  # in messages
        self._passes += 1
        if bookmark is not None:
            iterator = self._open(pass_index, 0)
            set_state(iterator, bookmark["state"])
            number = bookmark["number"]
        elif ahead is not None and (self.one_shot or (pass_index, start) == (0, 0)):
            iterator, first = ahead
            number = 1
            if start == 0:
                yield self._finished(first, 0, named)
        else:
            number = start if self.seeks else 0
            iterator = self._open(pass_index, number)
        del ahead
        while number < start:
            try:
                self._next(iterator, number, named)
            except StopIteration:
                raise DataError(
                    f"the {self.kind} given to {self._what} ends after {number} "
                    f"batches, but {start} of them were trained on before this run "
                    f"was interrupted. {self._again()}"
                ) from None
            number += 1
        while True:
            try:
                raw = self._next(iterator, number, named)
            except StopIteration:
                break
            self._note(iterator, pass_index, number + 1)
            batch = self._made(raw)
            if batch is None:
                batch = self._converted(raw, number, named)
                self._compare(batch, f"batch {number} of pass {named}")
            yield self._finished(batch, number, named)
            number += 1
        # Whoever asks for so many steps reads no further: this is the end before it.
        short = self.one_shot and self._steps is not None
        if number == 0 or short:
            raise DataError(self._used_up(named))

    def _open(self, pass_index: int, start: int) -> Iterator[Any]:
        try:
            return self._stream.open(pass_index, start)
        except (DataError, TypeError):
            raise
        except Exception as error:
            error.add_note(f"while starting pass {pass_index} over the data")
            raise

    def _note(self, iterator: Iterator[Any], pass_index: int, number: int) -> None:
        """Notes where an iterator stands that has a state, now and then."""
        if self.seeks:
            return
        now = time.monotonic()
        if now - self._marked < _SECONDS_BETWEEN_BOOKMARKS:
            return
        self._marked = now
        state = get_state(iterator)
        if state is not None:
            self._mark = {"pass": pass_index, "number": number, "state": state}

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
        rows = None
        if isinstance(raw, Filled):
            raw, rows = raw
        try:
            given = as_host(self._read(raw), but_device=not to_host)
            size = self._checked_size(raw, given)
            batch = with_weights(narrow(given), size)
            if isinstance(batch.weights, np.ndarray):
                check_weights(batch.weights, all_zero=True)
            return batch if rows is None else self._without_fill(batch, rows)
        except DataError as error:
            raise DataError(f"batch {number} of pass {pass_index}: {error}") from error
        except Exception as error:
            error.add_note(f"while reading batch {number} of pass {pass_index}")
            raise

    def _made(self, raw: Any) -> Batch | None:
        """Returns a raw batch that is like the first one, else None."""
        if self._recipe is None:
            return None
        raw, rows = raw if isinstance(raw, Filled) else (raw, None)
        batch = self._recipe.make(raw)
        if batch is None or rows is None:
            return batch
        return self._without_fill(batch, rows)

    def _checked_size(self, raw: Any, batch: Batch) -> int:
        """Returns the examples of a batch whose arrays were checked."""
        if self._stream.size is None:
            return check_lengths(batch)
        return check_sized(batch, self._stream.size(raw))

    def _without_fill(self, batch: Batch, rows: int) -> Batch:
        """Returns the batch with weight 0 for its fill, or without it."""
        if not self.pad:
            real: Batch = jax.tree.map(lambda leaf: leaf[:rows], batch)
            return real
        weights = batch.weights.copy()  # it may be the loader's
        weights[rows:] = 0.0
        return batch.replace(weights=weights)

    def _finished(self, batch: Batch, number: int, pass_index: int) -> Batch:
        """Returns a batch checked and filled up."""
        place = f"batch {number} of pass {pass_index}"
        sized = self._stream.size is not None
        if self._check is not None:
            try:
                self._check(self._checkable(batch))
            except DataError as error:
                raise DataError(f"{place}: {error}") from error
        rows = len(batch.weights)
        if rows > self.batch_size and not sized:
            self._grow(place, rows)
        self._handed_out += 1
        return fill(batch, self.batch_size) if self.pad and not sized else batch

    def _compare(self, batch: Batch, place: str) -> None:
        """Compares a batch with the first one."""
        known = len(self._shapes)
        self._shapes.add(self._shapes_of(batch))
        alike = _signature(batch) == self._signature
        sized = self._stream.size is not None
        if not alike or (not sized and len(self._shapes) > self._stream.shapes):
            raise DataError(f"{place} {_difference(batch, self.example)}")
        if sized and len(self._shapes) > known:
            self._vary(place)

    def _shapes_of(self, batch: Batch) -> tuple[tuple[int, ...], ...]:
        """Returns the shapes that a program is compiled for, rows left out."""
        first = 0 if self._stream.size is not None else 1
        return tuple(leaf.shape[first:] for leaf in jax.tree.leaves(batch))

    def _checkable(self, batch: Batch) -> Batch:
        """Returns the batch with the first one's values for those on a device."""
        if on_device(batch.inputs):
            batch = batch.replace(inputs=self.example.inputs)
        if on_device((batch.targets, batch.weights)):
            first = self.example
            batch = batch.replace(targets=first.targets, weights=first.weights)
        return batch

    def _vary(self, place: str) -> None:
        if not self._warned:
            warnings.warn(
                f"{place} has other shapes than those before: every batch of new "
                "shapes compiles once more. Pad all of them to one shape, at weight 0 "
                "for what is padding.",
                UserWarning,
                stacklevel=2,
            )
            self._warned = True

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
        return self._stream.again or (
            "Pass something that can be read again and again: a list, a loader, or "
            f"the function that makes the batches, "
            f"{call_text(self._what, 'make_batches')} not "
            f"{call_text(self._what, 'make_batches()')}."
        )


def _signature(batch: Batch) -> tuple[Any, ...]:
    """Returns what must be the same for all batches."""
    leaves, structure = jax.tree.flatten(batch)
    return structure, [(leaf.ndim, leaf.dtype) for leaf in leaves]


def _difference(batch: Batch, first: Batch) -> str:
    """Says where two batches differ, both sides."""
    now, then = (
        {
            name: LeafSpec(("batch", *leaf.shape[1:]), str(leaf.dtype))
            for name, leaf in named_leaves(each)
        }
        for each in (batch, first)
    )
    lines = difference_lines(diff(then, now), "{path} is {given}, was {wanted}")
    different = lines or [f"the nesting is {_nesting(batch)}, was {_nesting(first)}"]
    return (
        f"differs from the first batch: {'; '.join(different)}. All batches need the "
        "same structure, dtypes and shapes beyond the batch axis: pad rows to one "
        "length and convert with .astype(...) where the batches are made."
    )


def _nesting(batch: Batch) -> str:
    return str(jax.tree.structure((batch.inputs, batch.targets)))
