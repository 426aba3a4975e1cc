"""Opens data of any kind as a source of fixed-shape batches."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from flaxfit._core import validation
from flaxfit._core.errors import DataError
from flaxfit._core.types import Batch
from flaxfit.data.adapters import chunked_arrays, npy_files
from flaxfit.data.adapters.registry import (
    adapt_parts,
    examples_in,
    examples_of,
    refuse_batch_size,
)
from flaxfit.data.binding.binding import Binding, Whole
from flaxfit.data.binding.in_memory import (
    is_arrays,
    is_several_inputs,
    kind_text,
    read_arrays,
    read_inputs,
    stream_inputs,
)
from flaxfit.data.binding.table_binding import TableReader, holds_table
from flaxfit.data.datasets.batches import Batches
from flaxfit.data.datasets.batching import batch_of_rows, stream_examples
from flaxfit.data.datasets.example_dataset import ExampleSet
from flaxfit.data.datasets.iterables import from_iterable, peek
from flaxfit.data.datasets.stream import NO_FACTS, Stream
from flaxfit.data.host.arrays import as_host, narrow
from flaxfit.data.host.checks import (
    check_finite,
    check_lengths,
    check_values,
    check_weights,
)
from flaxfit.data.host.collate import looks_single
from flaxfit.data.host.padding import Padded, raw_of
from flaxfit.data.host.weights import ClassWeighting, apply_mask, with_weights
from flaxfit.data.sources.array_source import (
    ArraySource,
    split_validation,
    train_rows,
    warn_if_sorted,
)
from flaxfit.data.sources.base import Source
from flaxfit.data.sources.stream_source import StreamSource

DEFAULT_BATCH_SIZE = 32
_FEW_LABELS = 32
_JOINED = ("predict", "predict_intermediates")  # of all outputs


def as_source(
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    binding: Binding,
    batch_size: int | None = None,
    default_batch_size: int | None = None,
    multiple_of: int = 1,
    shuffle: bool = False,
    seed: Sequence[int] = (0,),
    class_weight: Mapping[Any, float] | None = None,
    steps: int | None = None,
    check: Callable[[Batch], None] | None = None,
    refuse: Callable[[ExampleSet | Stream], None] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    what: str = "fit",
) -> Source:
    """Makes a source of batches of whatever holds the data.

    Args:
      x: arrays in any nesting, `(x, y)`, `(x, y, weights)`, a dict of arrays, a
        table, a `Batch`, or a dataset: an iterable of batches, a function that yields
        them, an iterator. A tuple is one dataset, a list of tuples, dicts or tables is
        a list of batches.
      y: targets, any nesting of arrays; only with arrays.
      sample_weight: `float[examples]` or, one for every element of the targets,
        `float[examples, ...]`; only with arrays.
      binding: how a raw batch is read.
      batch_size: rows of a batch, but never more than there are; only for arrays.
      default_batch_size: what programs are compiled for already: rows of a batch of
        arrays if `batch_size` is None, even if there are fewer. None for 32, but
        never more than there are.
      multiple_of: rounds the rows of a batch of arrays up, for the devices.
      shuffle: whether arrays come in a new order each pass; a dataset shuffles
        itself.
      seed: decides the order, together with the index of the pass.
      class_weight: class to weight, for one target; a missing class weighs 1.
      steps: the number of steps asked for; an iterator that ends before it is an
        error.
      check: called by `Source.check`, and with every batch of a dataset.
      refuse: called with a dataset before anything is read of it; raises.
      data_dir: where datasets by name lie; see `tfds.builder`.
      what: the method the data was given to, for messages.

    Raises:
      DataError: data that cannot be trained on; see `data/host/checks`.
      TypeError: data of an unknown kind.
      ValueError: arguments that do not go together.
    """
    weighting = None if class_weight is None else ClassWeighting(class_weight)
    x, y, sample_weight = adapt_parts(x, y, sample_weight, what, data_dir)
    if is_arrays(x, y, sample_weight, what):
        whole = read_arrays(x, y, sample_weight, binding)
        data = whole.batch
        if weighting is not None:
            data = weighting(data)
        if data.weights is not None:
            check_weights(data.weights)
        size = _checked_size(
            batch_size, default_batch_size, len(jax.tree.leaves(data)[0]), multiple_of
        )
        source: Source = ArraySource(
            data,
            size,
            shuffle=shuffle,
            seed=seed,
            check=check,
            unused=whole.unused,
            facts=whole.facts,
        )
        check_values(with_weights(data))
        check_values(source.example)
        return source
    stream = _as_stream(
        x, batch_size, default_batch_size, multiple_of, shuffle, seed, refuse, what
    )
    if stream.endless and steps is None:
        raise DataError(_endless_text(stream, what))
    binding = binding.guided_by(stream.facts or NO_FACTS)
    reader = TableReader(binding)

    def read(raw: Any) -> Batch:
        if holds_table(raw_of(raw)):
            batch = reader(raw_of(raw))
        else:
            batch = binding.split(as_host(raw_of(raw), but_device=True))
        if isinstance(raw, Padded):
            return apply_mask(batch, binding.targets_of(raw.real), weighting)
        return batch if weighting is None else weighting(batch)

    source = StreamSource(
        stream,
        read,
        unused=lambda raw: reader.unused or binding.unused(raw_of(raw)),
        check=check,
        what=what,
        steps=steps,
        multiple_of=multiple_of,
        structural=not callable(binding.inputs),
    )
    source.facts = reader.with_table_info(source.facts)
    check_finite(source.example)
    return source


def as_inputs_source(
    x: Any,
    *,
    binding: Binding,
    batch_size: int | None = None,
    default_batch_size: int | None = None,
    multiple_of: int = 1,
    steps: int | None = None,
    check: Callable[[Batch], None] | None = None,
    refuse: Callable[[ExampleSet | Stream], None] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    what: str = "predict",
) -> Source:
    """Makes a source of inputs: no targets, weights 1 for rows and 0 for fill.

    Args:
      x: what `as_source` takes; targets and weights are dropped. A tuple of arrays
        is the inputs of a model that takes several, else `(x, y)` or
        `(x, y, weights)`.
      binding: how a raw batch is read.
      batch_size: rows of a batch, but never more than there are; only for arrays.
      default_batch_size: what programs are compiled for already: rows of a batch of
        arrays if `batch_size` is None, even if there are fewer. None for 32, but
        never more than there are.
      multiple_of: rounds the rows of a batch of arrays up, for the devices.
      steps: the number of batches asked for.
      check: called by `Source.check`, and with every batch of a dataset.
      refuse: called with a dataset before anything is read of it; raises.
      data_dir: where datasets by name lie; see `tfds.builder`.
      what: the method the data was given to, for messages.

    Raises:
      DataError: data the model cannot be called with.
      TypeError: data of an unknown kind.
      ValueError: `batch_size` for a dataset, or a wrong one.
    """
    x = npy_files.open_files(x)
    if chunked_arrays.recognizes(x) and is_several_inputs(x, binding):
        x = (x,)
    x, *_ = adapt_parts(x, None, None, what, data_dir)
    if is_arrays(x, None, None, what):
        whole = read_inputs(x, binding)
        rows = check_lengths(whole.batch)
        size = _checked_size(batch_size, default_batch_size, rows, multiple_of)
        data = narrow(whole.batch, keep_mapped=True)
        return ArraySource(data, size, check=check, facts=whole.facts)
    if isinstance(x, ExampleSet):
        x = replace(x, in_buckets=False)  # outputs come in the order of the inputs
    stream = _as_stream(
        x, batch_size, default_batch_size, multiple_of, False, (), refuse, what
    )
    if stream.endless and steps is None and what in _JOINED:
        raise DataError(_endless_text(stream, what))
    binding = binding.guided_by(stream.facts or NO_FACTS)
    reader = TableReader(binding, targets=False)

    def read(raw: Any) -> Batch:
        if holds_table(raw_of(raw)):
            return reader(raw_of(raw))
        return stream_inputs(as_host(raw_of(raw), but_device=True), binding)

    source = StreamSource(
        stream,
        read,
        check=check,
        what=what,
        multiple_of=multiple_of,
        structural=not callable(binding.inputs),
    )
    source.facts = reader.with_table_info(source.facts)
    return source


def as_whole(
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    binding: Binding,
    class_weight: Mapping[Any, float] | None = None,
    what: str = "fit",
) -> Whole:
    """Returns arrays, or a table, as one `Batch` on the host, with weights, unfilled.

    Takes what `as_source` takes for arrays, or `Batches` of a single one; `as_source`
    takes the result as `x`.

    Raises:
      DataError: data that cannot be trained on; see `data/host/checks`.
      TypeError: data of an unknown kind.
      ValueError: arguments that do not go together, or a dataset.
    """
    if isinstance(x, Batches):
        source = as_source(
            x, y, sample_weight, binding=binding, class_weight=class_weight, what=what
        )
        if source.num_batches != 1:
            raise ValueError(
                f"{what} takes one batch: write Batches([batch], size=...) with it."
            )
        return Whole(source.example, source.unused, source.facts)
    if not is_arrays(x, y, sample_weight, what):
        advice = (
            "pass the rest of the data as validation_data=(x_val, y_val)"
            if what == "validation_split"
            else "write x, y = next(iter(dataset)) for its first batch"
        )
        raise ValueError(f"{what} needs arrays here, not a {kind_text(x)}: {advice}.")
    whole = read_arrays(x, y, sample_weight, binding)
    data = whole.batch
    if class_weight is not None:
        data = ClassWeighting(class_weight)(data)
    # Of a file only the rows that are asked for are ever read.
    data = with_weights(narrow(data, keep_mapped=what == "validation_split"))
    check_weights(data.weights, all_zero=True)
    check_values(data)
    return replace(whole, batch=data)


def split_data(
    x: Any,
    y: Any,
    sample_weight: Any,
    fraction: float,
    *,
    binding: Binding,
    data_dir: str | os.PathLike[str] | None = None,
) -> tuple[Any, Any]:
    """Splits the last `fraction` of the examples off, before any shuffling.

    Args:
      x: arrays, or examples that are had by index.
      y: targets, for arrays.
      sample_weight: for arrays.
      fraction: between 0 and 1, both excluded.
      binding: how a raw batch is read.
      data_dir: where datasets by name lie.

    Returns:
      `(train, validation)`, each of which `as_source` takes as `x`.

    Raises:
      ValueError: `fraction` is out of range or leaves one side empty, or the data
        comes in batches or one after the other.
    """
    what = "validation_split"
    x, y, sample_weight = adapt_parts(x, y, sample_weight, "fit", data_dir)
    if not isinstance(x, Stream | Batch) and not is_arrays(x, y, sample_weight, "fit"):
        examples = x if isinstance(x, ExampleSet) else examples_of(x, None, what)
        if examples is not None and examples.by_index:
            return split_examples(examples, fraction, binding)
    whole = as_whole(x, y, sample_weight, binding=binding, what=what)
    train, validation = split_validation(whole.batch, fraction)
    return replace(whole, batch=train), replace(whole, batch=validation)


def split_examples(
    examples: ExampleSet, fraction: float, binding: Binding
) -> tuple[ExampleSet, ExampleSet]:
    """Returns the first examples and the last `fraction` of them."""
    total = examples.length
    assert total is not None
    train = train_rows(total, fraction)
    # All labels would have to be read to know; a few, far apart, tell as well.
    few = np.linspace(0, total - 1, min(total, _FEW_LABELS)).astype(np.int64)
    binding = binding.guided_by(examples.facts)
    warn_if_sorted(
        narrow(binding.split(as_host(batch_of_rows(examples, few)))),
        "Give validation_data= of its own, or shuffle the dataset where it is made: "
        "ds.shuffle(seed=0), torch.utils.data.Subset(ds, order), or the list of items.",
    )
    return examples.part(0, train), examples.part(train, total)


def _as_stream(
    x: Any,
    batch_size: int | None,
    default_batch_size: int | None,
    multiple_of: int,
    shuffle: bool,
    seed: Sequence[int],
    refuse: Callable[[ExampleSet | Stream], None] | None,
    what: str,
) -> Stream:
    """Returns a dataset as raw batches.

    Raises:
      ValueError: `batch_size` for what comes in batches.
    """
    is_plain = not isinstance(x, ExampleSet | Stream)
    if is_plain:
        x = examples_of(x, batch_size, what) or from_iterable(x, what)
    if refuse is not None:
        refuse(x)
    if is_plain:
        if isinstance(x, Stream) and default_batch_size is not None:
            # After a fit that made batches of examples, others may come as examples.
            first, x = peek(x)
            if first is not None and looks_single(first):
                x = examples_in(x)
    if isinstance(x, ExampleSet):
        if x.length == 0:
            raise DataError(
                f"no examples: the {x.kind} given to {what} has the length 0. Pass at "
                "least one."
            )
        size = _checked_size(batch_size, default_batch_size, x.length, multiple_of)
        return stream_examples(x, size, shuffle=shuffle, seed=seed)
    guessed = is_plain or x.examples is not None
    refuse_batch_size(batch_size, what, guessed=guessed)
    return x if x.seeded is None else replace(x, open=x.seeded(seed))


def _checked_size(
    batch_size: Any, default: int | None, examples: int | None, multiple_of: int
) -> int:
    """Returns the rows of a batch, never more than there are examples, if known."""
    if batch_size is None and default is not None:
        return -(-default // multiple_of) * multiple_of
    size = validation.integer(
        "batch_size",
        DEFAULT_BATCH_SIZE if batch_size is None else batch_size,
        write=f"batch_size={DEFAULT_BATCH_SIZE}",
    )
    # More would fill every batch up, and BatchNorm would count rows twice.
    size = size if examples is None else min(size, examples)
    return -(-size // multiple_of) * multiple_of


def _endless_text(stream: Stream, what: str) -> str:
    argument = {
        "fit": "steps_per_epoch",
        "compile": "steps_per_epoch",
        "validation_data": "validation_steps",
    }.get(what, "steps")
    return (
        f"the {stream.kind} given to {what} has no end: write {argument}=100 for 100 "
        "batches, or leave the repeat() out where the dataset is made."
    )
