"""A source that reads, checks and pads the raw batches of a `Stream`.

The first batch is read when the source is made; the first pass still yields it.

A loader may reuse one buffer while earlier steps still run. So a batch is only valid
until the next one is read, and a consumer that keeps it must copy it. The first batch
is copied here.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from flaxfit._core.errors import DataError, caller
from flaxfit._core.tree_specs import LeafSpec, diff, difference_lines
from flaxfit._core.types import Batch
from flaxfit.data.datasets.stream import (
    NO_INFO,
    BatchForm,
    DatasetInfo,
    Stream,
    set_state,
)
from flaxfit.data.host.arrays import (
    as_host,
    copy_host_arrays,
    fill,
    named_leaves,
    on_device,
)
from flaxfit.data.sources.position import IteratorMark
from flaxfit.data.sources.stream_reader import END, StreamReader, parted, place_of


class StreamSource:
    """Batches made from the raw batches of a `Stream`.

    Args:
      stream: the raw batches.
      read: raw batch -> `Batch` of NumPy and jax arrays, see `as_host`; `weights` may
        be None.
      describe: first raw batch -> metadata of the data.
      steps: the number of steps requested; an iterator that ends before is an error.
      multiple_of: the rows of a batch are rounded up to a multiple of it, if the stream
        knows the number of examples.
      structural: whether `read` depends on structure and names only, and so treats
        every batch alike.

    Raises:
      DataError: there is no batch, or the first one cannot be read.
      TypeError: a function that returns no iterable.
    """

    reuses_buffers = True

    def __init__(
        self,
        stream: Stream,
        read: Callable[[Any], Batch],
        *,
        describe: Callable[[Any], DatasetInfo] = lambda raw: NO_INFO,
        steps: int | None = None,
        multiple_of: int = 1,
        structural: bool = False,
    ) -> None:
        self.pad = True
        self._reader = StreamReader(stream, read)
        self._check: Callable[[Batch], None] | None = None
        self._steps = steps
        # Counts over all passes, for messages: each evaluation restarts at pass 0.
        self._yielded = self._passes = 0
        self._mark = IteratorMark(stream)
        iterator = self._reader.open(0, 0)
        place = place_of(0, 0)
        given = self._reader.next(iterator, place)
        if given is END:
            raise DataError(
                f"no batches: the {self.kind} given to {caller()} yielded nothing",
                self._reader.reusable(),
            )
        self._mark.note(iterator, 0, 1)
        raw, rows = parted(given)
        # Arrays on a device stay there, as in all later batches.
        ahead = self._mask_padding(self._reader.convert(raw, place, first=True), rows)
        first = copy_host_arrays(as_host(ahead))
        self.info = describe(raw)
        if structural:
            self._reader.learn(raw)
        size = max(len(first.weights), stream.form.batch_size or 0)
        if stream.num_examples is not None:
            size = -(-size // multiple_of) * multiple_of
        self.batch_size = size
        self.example = fill(first, size)
        self._likeness = _Likeness(stream.form, first, self.example)
        # The first batch, until the first pass yields it.
        ahead = ahead if on_device(ahead) else first
        self._ahead: tuple[Iterator[Any], Batch] | None = (iterator, ahead)

    @property
    def kind(self) -> str:
        """The kind of data in words."""
        return self._reader.stream.kind

    @property
    def shapes(self) -> int:
        """The number of shapes that batches may have beyond the batch axis."""
        return self._reader.stream.form.shapes

    @property
    def one_shot(self) -> bool:
        """Whether the stream can be read only once."""
        return self._reader.stream.one_shot

    @property
    def seeks(self) -> bool:
        """Whether a pass can start at any batch without reading earlier ones."""
        return self._reader.stream.seeks

    @property
    def num_batches(self) -> int | None:
        """Batches in one pass, None if unknown before reading."""
        return self._reader.stream.num_batches

    @property
    def num_examples(self) -> int | None:
        """Examples in one pass without padding, None if unknown before reading."""
        return self._reader.stream.num_examples

    @property
    def bookmark(self) -> Mapping[str, Any] | None:
        """The latest saved state of an iterator, as plain values; see `IteratorMark`.

        `batches` continues from it. None if the iterator has no state.
        """
        return self._mark.latest

    def check(self, check_values: Callable[[Batch], None]) -> None:
        """Checks the first batch now, and later ones before they are padded.

        Reading back from a device takes time, so arrays there are only checked in the
        first batch.
        """
        check_values(self.example)
        self._check = check_values

    def batches(
        self, pass_index: int, start: int = 0, bookmark: Mapping[str, Any] | None = None
    ) -> Iterator[Batch]:
        """Yields the batches of one pass, in the order of the stream.

        Batches before `start`, or from the bookmark to `start`, are read and skipped,
        unless the stream seeks.

        Raises:
          DataError: the pass has no batch, an iterator ends before the requested steps,
            or a batch differs from the first one in structure, dtype or shape beyond
            the batch axis.
        """
        number, ahead, self._ahead = 0, self._ahead, None
        if bookmark is not None or ahead is None or pass_index or start:
            self._mark.reset()  # the saved state belongs to a different pass
        named = max(pass_index, self._passes)  # in messages
        self._passes += 1
        if bookmark is not None:
            iterator = self._reader.open(pass_index, 0)
            set_state(iterator, bookmark["state"])
            number = bookmark["number"]
        elif ahead is not None and (self.one_shot or (pass_index, start) == (0, 0)):
            iterator, batch = ahead
            number = 1
            if start == 0:
                yield self._finished(batch, place_of(0, named))
        else:
            number = start if self.seeks else 0
            iterator = self._reader.open(pass_index, number)
        del ahead  # else the first batch would stay in memory for the whole pass
        self._reader.skip(iterator, number, start, named)
        number = max(number, start)
        while True:
            place = place_of(number, named)
            given = self._reader.next(iterator, place)
            if given is END:
                break
            self._mark.note(iterator, pass_index, number + 1)
            raw, rows = parted(given)
            made = self._reader.made_like_first(raw)
            if made is None:
                made = self._reader.convert(raw, place)
                self._likeness.compare(made, place)
            batch = self._mask_padding(made, rows)
            yield self._finished(batch, place)
            number += 1
        # A caller with a step limit stops earlier: here the iterator has run out.
        if number == 0 or (self.one_shot and self._steps is not None):
            raise self._used_up(named)

    def _mask_padding(self, batch: Batch, rows: int | None) -> Batch:
        """Returns the batch with weight 0 after row `rows`; cut there if not padded."""
        if rows is None:
            return batch
        if not self.pad:
            real: Batch = jax.tree.map(lambda leaf: leaf[:rows], batch)
            return real
        weights = batch.weights
        if isinstance(weights, jax.Array):
            return batch.replace(weights=weights.at[rows:].set(0.0))
        weights = weights.copy()  # the array may be the loader's
        weights[rows:] = 0.0
        return batch.replace(weights=weights)

    def _finished(self, batch: Batch, place: str) -> Batch:
        """Returns a batch after its checks, padded."""
        if self._check is not None:
            try:
                self._check(self._on_host(batch))
            except DataError as error:
                raise DataError(f"{place}: {error}") from error
        self._yielded += 1
        if self._reader.stream.form.size is not None:
            return batch
        rows = len(batch.weights)
        if rows > self.batch_size:
            if self.pad:
                self._likeness.warn_of_growth(place, rows, self.batch_size)
            self.batch_size = rows
        return fill(batch, self.batch_size) if self.pad else batch

    def _on_host(self, batch: Batch) -> Batch:
        """Returns the batch with arrays on a device replaced by those of the first."""
        first = self.example
        if on_device(batch.inputs):
            batch = batch.replace(inputs=first.inputs)
        if on_device((batch.targets, batch.weights)):
            batch = batch.replace(targets=first.targets, weights=first.weights)
        return batch

    def _used_up(self, pass_index: int) -> DataError:
        steps = f" ({self._steps} steps were asked for)" if self._steps else ""
        if self.one_shot:
            given = (
                f"the iterator given to {self._reader.caller} is used up, after "
                f"{self._yielded} batches in all, but more are needed{steps}"
            )
        else:
            given = (
                f"no batches in pass {pass_index}: the {self.kind} given to "
                f"{self._reader.caller} yielded nothing this time{steps}"
            )
        return DataError(given, self._reader.reusable())


class _Likeness:
    """Compares batches with the first one; `example` is the first one, padded."""

    def __init__(self, form: BatchForm, first: Batch, example: Batch) -> None:
        self._form = form
        self._example = example
        self._signature = _signature(first)
        self._shapes = {self._shapes_of(first)}
        self._warned = False

    def compare(self, batch: Batch, place: str) -> None:
        """Checks a batch; warns of new shapes if any shapes are allowed.

        Raises:
          DataError: the batch differs from the first one.
        """
        known, sized = len(self._shapes), self._form.size is not None
        self._shapes.add(self._shapes_of(batch))
        alike = _signature(batch) == self._signature
        if not alike or (not sized and len(self._shapes) > self._form.shapes):
            raise DataError(f"{place} {_difference(batch, self._example)}")
        if sized and len(self._shapes) > known:
            self._warn(
                f"{place} has other shapes than earlier batches: each new shape "
                "compiles once more. Pad all batches to the same shapes, and give "
                "padding weight 0."
            )

    def warn_of_growth(self, place: str, rows: int, before: int) -> None:
        """Warns once of a batch that is larger than all earlier ones."""
        self._warn(
            f"{place} has {rows} rows, earlier batches had {before}: each larger batch "
            "compiles once more. Let the first batch be the largest, or yield batches "
            "of one size."
        )

    def _warn(self, text: str) -> None:
        if not self._warned:
            warnings.warn(text, UserWarning, stacklevel=2)
            self._warned = True

    def _shapes_of(self, batch: Batch) -> tuple[tuple[int, ...], ...]:
        """Returns the shapes a program is compiled for, without the batch axis."""
        first = 0 if self._form.size is not None else 1
        return tuple(leaf.shape[first:] for leaf in jax.tree.leaves(batch))


def _signature(batch: Batch) -> tuple[Any, ...]:
    """Returns the structure, axes and dtypes, which all batches must share."""
    leaves, structure = jax.tree.flatten(batch)
    return structure, [(leaf.ndim, leaf.dtype) for leaf in leaves]


def _difference(batch: Batch, first: Batch) -> str:
    """Returns text that says how a batch differs from the first one."""
    now, then = (
        {
            name: LeafSpec(("batch", *leaf.shape[1:]), str(leaf.dtype))
            for name, leaf in named_leaves(each)
        }
        for each in (batch, first)
    )
    lines = difference_lines(diff(then, now), "{path} is {given}, was {wanted}")
    nestings = [str(jax.tree.structure((b.inputs, b.targets))) for b in (batch, first)]
    different = lines or [f"the nesting is {nestings[0]}, was {nestings[1]}"]
    return (
        f"differs from the first batch: {'; '.join(different)}. All batches need the "
        "same structure, dtypes and shapes beyond the batch axis: pad rows to one "
        "length and convert with .astype(...) where the batches are made."
    )
