"""Reads the raw batches of a `Stream`; errors name the batch."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from flaxfit._core.errors import DataError, caller, calling
from flaxfit._core.types import Batch
from flaxfit.data.datasets.stream import PaddedTail, Stream
from flaxfit.data.host.arrays import call_text, narrow
from flaxfit.data.host.checks import check_lengths, check_sized, check_weights
from flaxfit.data.host.weights import with_weights
from flaxfit.data.sources.fast_path import BatchTemplate, learn

END = object()


class StreamReader:
    """Opens passes over a `Stream`, and converts its raw batches.

    Args:
      stream: the raw batches.
      read: raw batch -> `Batch` of NumPy and jax arrays, see `as_host`; `weights` may
        be None.
    """

    def __init__(self, stream: Stream, read: Callable[[Any], Batch]) -> None:
        self.stream = stream
        # Kept, because later passes are read in a thread, or during another call.
        self.caller = caller()
        self._read = read
        self._template: BatchTemplate | None = None

    def learn(self, raw: Any) -> None:
        """Makes `made_like_first` convert batches of the same form as `raw`."""
        if self.stream.form.size is None:
            self._template = learn(raw, self._read)

    def made_like_first(self, raw: Any) -> Batch | None:
        """Returns the batch, None if `convert` and a comparison are needed."""
        return None if self._template is None else self._template.make(raw)

    def open(self, pass_index: int, start: int) -> Iterator[Any]:
        """Returns the raw batches of a pass, from batch number `start` on."""
        try:
            with calling(self.caller):
                return self.stream.open(pass_index, start)
        except (DataError, TypeError):
            raise
        except Exception as error:
            error.add_note(f"while starting pass {pass_index} over the data")
            raise

    def next(self, iterator: Iterator[Any], place: str) -> Any:
        """Returns the next raw batch, or `END`."""
        try:
            # Later passes are read outside the call that the data was passed to.
            with calling(self.caller):
                return next(iterator, END)
        except Exception as error:
            error.add_note(f"while reading {place}")
            if "already executing" in str(error):
                error.add_note(
                    "An earlier fit still reads from this generator in the background. "
                    "Wait for the fit to end, or write Trainer(model, prefetch=0)."
                )
            raise

    def convert(self, raw: Any, place: str, *, first: bool = False) -> Batch:
        """Returns a raw batch with weights, checked but not padded."""
        try:
            given = self._read(raw)
            size = self.stream.form.size
            rows = (
                check_lengths(given) if size is None else check_sized(given, size(raw))
            )
            batch = with_weights(narrow(given), rows)
            # Weights on a device are read back for the first batch only.
            if first or isinstance(batch.weights, np.ndarray):
                check_weights(np.asarray(batch.weights), all_zero=True)
            return batch
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        except Exception as error:
            error.add_note(f"while reading {place}")
            raise

    def skip(
        self, iterator: Iterator[Any], number: int, start: int, pass_index: int
    ) -> None:
        """Reads and drops the batches from `number` up to `start`, exclusive.

        Raises:
          DataError: the pass ends before.
        """
        for skipped in range(number, start):
            if self.next(iterator, place_of(skipped, pass_index)) is END:
                raise DataError(
                    f"the {self.stream.kind} given to {self.caller} ends after "
                    f"{skipped} batches, but {start} were trained on before this run "
                    "was interrupted",
                    self.reusable(),
                )

    def reusable(self) -> str:
        """Returns the advice for data that can be read only once."""
        with calling(self.caller):
            function, iterator = call_text("make_batches"), call_text("make_batches()")
        return self.stream.reuse_advice or (
            "Pass data that can be read repeatedly: a list, a loader, or the function "
            f"that makes the batches, {function} not {iterator}."
        )


def place_of(number: int, pass_index: int) -> str:
    """Returns the name of a batch in messages."""
    return f"batch {number} of pass {pass_index}"


def parted(given: Any) -> tuple[Any, int | None]:
    """Returns a raw batch, and the number of its real rows, None for all."""
    return given if isinstance(given, PaddedTail) else (given, None)
