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
    """Batches of someone else's making, whose shapes vary or have no common axis.

    Args:
      batches: an iterable of batches, a function that returns one, a loader.
      size: raw batch -> its number of examples, for batches such as graphs, whose
        inputs are arrays without a common first axis. Targets, weights and outputs
        hold one row per example; what only fills a batch up gets weight 0, and
        `predict` returns its rows too. On several devices, each has the whole batch.
      pad_to: the length to which rows are padded along their second axis, or ascending
        lengths, `[32, 64, 128]`: a batch is padded to the shortest that holds it, and
        the steps are compiled once for each of them. For loaders that pad every batch
        to its own longest row. All parts with such an axis need the same length; else
        name those to be padded, `{"tokens": 64}` or by position, `{0: 64}`. Where
        targets are padded, what is added weighs 0; padding of the loader's own is in
        its weights.
      pad_value: what is padded with, for all or by part.
      truncate: whether to cut off what is longer than the longest of `pad_to`.
      mask: the key under which the model is given `bool[batch, length]`, False for what
        was added, with batches that are dicts; `{key: part}` where parts differ.

    Raises:
      TypeError: arrays or single examples, or `size` is no function.
      ValueError: arguments that do not go together.

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
                f"Batches of a {type(self.batches).__name__}: it takes something that "
                "yields batches, for a single one Batches([batch], ...)."
            )

    @property
    def padding(self) -> Padding | None:
        """How the rows are padded, or None."""
        return as_padding(self.pad_to, self.pad_value, self.truncate, self.mask)


def open_batches(batches: Batches, adapted: Any) -> Stream:
    """Returns a user's `Batches` as a stream.

    Args:
      batches: what the user says.
      adapted: what they are made of, a `Stream` where their kind is known.

    Raises:
      TypeError: single examples, or nothing that yields batches.
    """
    is_list = isinstance(adapted, list)  # of batches, or empty
    if isinstance(adapted, tuple | Mapping | Batch) or (
        is_array(adapted) and not is_list
    ):
        raise TypeError(
            f"Batches of a {type(batches.batches).__name__}, which is arrays: it takes "
            f"something that yields batches. Write {call_text('x, y')} with the "
            "arrays, or Batches([batch], ...) with a single batch."
        )
    if isinstance(adapted, ExampleSet):
        raise TypeError(
            f"Batches of a {adapted.kind}, which holds single examples. Write "
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
