"""`Batches`: options for batches whose shapes differ."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from flaxfit._core.types import Batch
from flaxfit.data.datasets.example_dataset import ExampleSet
from flaxfit.data.datasets.iterables import from_iterable
from flaxfit.data.datasets.stream import BatchForm, Open, Stream, Wrapped
from flaxfit.data.host.arrays import call_text, is_array
from flaxfit.data.host.padding import PaddedBatch, Padding
from flaxfit.data.host.padding_arguments import as_padding


@dataclass(frozen=True, eq=False)
class Batches:
    """Ready-made batches whose shapes vary, or whose inputs have no common axis.

    Args:
      batches: an iterable of batches, a function that returns one, or a loader.
      size: raw batch -> its number of examples, for batches such as graphs, whose
        inputs are arrays without a common first axis. Targets, weights and outputs
        have one row per example. Give examples that are padding weight 0; `predict`
        returns their rows too. With several devices, each has the whole batch.
      pad_to: the length that rows are padded to along their second axis, or several
        in ascending order, `[32, 64, 128]`: a batch is padded to the shortest that
        fits, and the steps are compiled once per length. For loaders that pad every
        batch to its longest row. All parts with a second axis must have the same
        length; else name the parts to pad, `{"tokens": 64}` or by position, `{0: 64}`.
        Padding added to targets has weight 0; the loader's own padding needs weights
        from the loader.
      pad_value: the value to pad with, for all parts or by part.
      truncate: whether to cut off rows at the longest length of `pad_to`, instead of
        raising an error.
      mask: for batches that are dicts, the key under which the model receives
        `bool[batch, length]`, False for added padding; `{key: part}` if parts differ
        in length.

    Raises:
      TypeError: arrays or single examples, or `size` is not a function.
      ValueError: arguments that cannot be combined.

    Example:
      >>> import flax.linen as nn, jax, numpy as np
      >>> from flaxfit import Trainer
      >>> from flaxfit.data import Batches
      >>> class SumOfNodes(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, graph):
      ...         nodes, graph_of_node = graph
      ...         return jax.ops.segment_sum(nn.Dense(1)(nodes), graph_of_node, 2)
      >>> graph = np.ones((5, 3), np.float32), np.array([0, 0, 1, 1, 1])
      >>> batches = Batches([(graph, np.ones((2, 1)))], size=lambda raw: len(raw[1]))
      >>> Trainer(SumOfNodes()).fit(batches, verbose=0).trainer.predict(batches).shape
      (2, 1)
    """

    batches: Any
    size: Callable[[Any], int] | None = None
    pad_to: Any = None
    pad_value: Any = 0
    truncate: bool = False
    mask: str | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Checks the arguments."""
        if self.size is not None and not callable(self.size):
            raise TypeError(
                f"size={self.size!r}: expected a function of a batch that returns its "
                "number of examples, size=lambda batch: len(batch[1])."
            )
        if (self.size is None) == (self.padding is None):
            raise ValueError(
                "Batches takes either size=, for inputs without a common axis, or "
                "pad_to=, for rows of different length; other batches need neither."
            )
        whole = isinstance(self.batches, tuple | Mapping | Batch)
        if whole or (is_array(self.batches) and len(self.batches)):
            raise TypeError(
                f"Batches(...) of a {type(self.batches).__name__}: expected an "
                "iterable of batches. For a single batch write Batches([batch], ...)."
            )

    @property
    def padding(self) -> Padding | None:
        """How the rows are padded, or None."""
        return as_padding(self.pad_to, self.pad_value, self.truncate, self.mask)


def open_batches(batches: Batches, adapted: Any) -> Stream:
    """Returns a user's `Batches` as a stream.

    Args:
      batches: the user's arguments.
      adapted: `batches.batches`, as a `Stream` if an adapter knows its kind.

    Raises:
      TypeError: single examples or arrays, or data that yields no batches.
    """
    is_list = isinstance(adapted, list)  # of batches, or empty
    if isinstance(adapted, tuple | Mapping | Batch) or (
        is_array(adapted) and not is_list
    ):
        raise TypeError(
            f"Batches(...) of a {type(batches.batches).__name__}, which holds arrays: "
            f"expected an iterable of batches. Write {call_text('x, y')} with the "
            "arrays, or Batches([batch], ...) with a single batch."
        )
    if isinstance(adapted, ExampleSet):
        raise TypeError(
            f"Batches(...) of a {adapted.kind}, which holds single examples. Write "
            f"{call_text('Examples(dataset, pad_to=...)')}."
        )
    stream = adapted if isinstance(adapted, Stream) else from_iterable(adapted)
    if batches.size is not None:
        return replace(stream, form=BatchForm(size=batches.size), num_examples=None)
    padding, seeded = batches.padding, stream.seeded
    assert padding is not None
    return replace(
        stream,
        open=_padded(stream.open, padding),
        seeded=seeded and (lambda seed: _padded(seeded(seed), padding)),
        form=replace(stream.form, shapes=padding.buckets),
    )


def _padded(open_pass: Open, padding: Padding) -> Open:
    def take(iterator: Iterator[Any]) -> PaddedBatch:
        return padding.pad_batch(next(iterator))

    return lambda pass_index, start: Wrapped(open_pass(pass_index, start), take)
