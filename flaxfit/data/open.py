"""Opens data of any kind: `open_dataset` finds its kind, `batch_source` reads it.

Between these calls, the caller can inspect the `Dataset` and refuse, say, an iterator
or endless data before any batch is read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from flaxfit._core import validation
from flaxfit._core.errors import DataError, UsageError, caller
from flaxfit._core.types import Batch
from flaxfit.data.adapters import chunked_arrays, npy_files
from flaxfit.data.adapters.registry import (
    adapt_parts,
    examples_of,
    from_registered,
    refuse_batch_size,
)
from flaxfit.data.binding.binding import Binding, InMemoryData
from flaxfit.data.binding.in_memory import (
    Arrays,
    is_arrays,
    is_several_inputs,
    read_arrays,
    read_inputs,
    stream_inputs,
)
from flaxfit.data.binding.table_binding import TableReader, holds_table
from flaxfit.data.datasets.batching import batch_of_rows, stream_examples
from flaxfit.data.datasets.example_dataset import ExampleSet
from flaxfit.data.datasets.iterables import examples_in, from_iterable, peek
from flaxfit.data.datasets.stream import DatasetInfo, Stream
from flaxfit.data.host.arrays import as_host, narrow
from flaxfit.data.host.checks import check_lengths, check_values, check_weights
from flaxfit.data.host.collate import looks_single
from flaxfit.data.host.padding import PaddedBatch, raw_of
from flaxfit.data.host.weights import ClassWeighting, apply_mask, with_weights
from flaxfit.data.sources.array_source import (
    ArraySource,
    split_validation,
    train_rows,
    warn_if_sorted,
)
from flaxfit.data.sources.base import BatchSource
from flaxfit.data.sources.stream_source import StreamSource

DEFAULT_BATCH_SIZE = 32
_FEW_LABELS = 32

Dataset = Arrays | ExampleSet | Stream
"""Opened data: arrays or tables in memory, single examples, or batches."""


@dataclass(frozen=True)
class BatchOptions:
    """How a dataset is batched.

    Attributes:
      batch_size: rows of a batch, at most the number of examples.
      default_batch_size: rows if `batch_size` is None, even if there are fewer
        examples: the batch size of compiled programs. None for 32, or the number of
        examples if smaller.
      multiple_of: the rows are rounded up to a multiple of it, for several devices.
      shuffle: whether each pass has a new order; no effect on ready-made batches.
      seed: determines the order, together with the number of the pass.
      class_weight: class -> weight, for a single target; other classes have weight 1.
      steps: the number of batches requested; an iterator that ends before is an error.
      inputs_only: whether targets and weights are dropped, as for a prediction.
    """

    batch_size: int | None = None
    default_batch_size: int | None = None
    multiple_of: int = 1
    shuffle: bool = False
    seed: Sequence[int] = (0,)
    class_weight: Mapping[Any, float] | None = None
    steps: int | None = None
    inputs_only: bool = False

    def size(self, examples: int | None) -> int:
        """Returns the rows of a batch, given the number of examples, None if unknown.

        Raises:
          ValueError: `batch_size` is not an integer of at least 1.
        """
        rows = self.default_batch_size
        if self.batch_size is not None or rows is None:
            wanted = DEFAULT_BATCH_SIZE if self.batch_size is None else self.batch_size
            validates = caller() == "validation_data"
            name = "validation_batch_size" if validates else "batch_size"
            line = f"{name}={DEFAULT_BATCH_SIZE}"
            rows = validation.integer(name, wanted, write=line)
            # With more rows, every batch would be padded with copies, and BatchNorm
            # would count examples twice.
            rows = rows if examples is None else min(rows, examples)
        return -(-rows // self.multiple_of) * self.multiple_of


def open_dataset(
    x: Any, y: Any = None, sample_weight: Any = None, *, batch_size: int | None = None
) -> Dataset:
    """Returns data as a `Dataset`; reads at most the first item of most kinds.

    Args:
      x: arrays in any nesting, `(x, y)`, `(x, y, weights)`, a dict of arrays, a table,
        a `Batch`, or a dataset: see `UNDERSTOOD`. A tuple of up to three parts is one
        dataset, a list of tuples, dicts or tables is a list of batches.
      y: targets, any nesting of arrays; only with arrays.
      sample_weight: `float[examples]` or, one for every element of the targets,
        `float[examples, ...]`; only with arrays.
      batch_size: the user's batch size: if given, an iterable yields single examples.

    Raises:
      TypeError: data of an unknown kind.
      ValueError: arguments that cannot be combined.
      DataError: data that cannot be opened.
    """
    x, y, sample_weight = adapt_parts(x, y, sample_weight)
    if is_arrays(x, y, sample_weight):
        return Arrays(x, y, sample_weight)
    if isinstance(x, ExampleSet | Stream):
        return x
    examples = examples_of(x, batch_size)
    if examples is not None:
        return examples
    stream = from_iterable(x)
    return replace(stream, examples=examples_in(stream))


def open_inputs(x: Any, binding: Binding, *, batch_size: int | None = None) -> Dataset:
    """Returns data for a prediction as a `Dataset`; see `open_dataset`.

    If the model takes several inputs, a tuple of arrays is these inputs; else it is
    `(x, y)` or `(x, y, weights)`.
    """
    x = npy_files.open_files(from_registered(x))
    if chunked_arrays.matches(x) and is_several_inputs(x, binding):
        x = (x,)
    dataset = open_dataset(x, batch_size=batch_size)
    if isinstance(dataset, ExampleSet):
        # Outputs must have the order of the inputs.
        return dataset.in_order()
    return dataset


def batch_source(
    dataset: Dataset, binding: Binding, options: BatchOptions
) -> BatchSource:
    """Returns a source of the batches of a dataset, after reading the first one.

    Raises:
      DataError: data that cannot be trained on; see `data/host/checks.py`.
      ValueError: an invalid `batch_size`, or one for ready-made batches.
    """
    if isinstance(dataset, Arrays):
        return _array_source(dataset, binding, options)
    stream = _as_stream(dataset, options)
    binding = binding.guided_by(stream.info)
    reader = TableReader(binding, targets=not options.inputs_only)
    weights = options.class_weight
    weighting = None if weights is None else ClassWeighting(weights)
    split = binding.split
    if options.inputs_only:
        split = partial(stream_inputs, binding=binding)

    def read(raw: Any) -> Batch:
        plain = raw_of(raw)
        if holds_table(plain):
            batch = reader(plain)
        else:
            batch = split(as_host(plain, but_device=True))
        if isinstance(raw, PaddedBatch) and not options.inputs_only:
            return apply_mask(batch, binding.targets_of(raw.real), weighting)
        return batch if weighting is None else weighting(batch)

    def describe(raw: Any) -> DatasetInfo:
        unused = () if options.inputs_only else binding.unused(raw_of(raw))
        info = replace(stream.info, unused=unused)
        return reader.with_table_info(info)

    source = StreamSource(
        stream,
        read,
        describe=describe,
        # A prediction may end early; `steps` is only its maximum.
        steps=None if options.inputs_only else options.steps,
        multiple_of=options.multiple_of,
        structural=not callable(binding.inputs),
    )
    if not options.inputs_only:
        check_weights(source.example.weights)
        check_values(source.example)
    return source


def one_batch(
    dataset: Dataset,
    binding: Binding,
    class_weight: Mapping[Any, float] | None = None,
    *,
    keep_mapped: bool = False,
) -> InMemoryData:
    """Returns data in memory as one batch on the host, with weights and no padding.

    Args:
      dataset: arrays, a table, or a stream of a single batch.
      binding: how a raw batch is read.
      class_weight: see `BatchOptions`.
      keep_mapped: whether memory-mapped arrays stay mapped.

    Raises:
      DataError: data that cannot be trained on; see `data/host/checks.py`.
      ValueError: a dataset of examples, or of several batches.
    """
    if not isinstance(dataset, Arrays):
        batches = dataset if isinstance(dataset, Stream) else None
        if batches is None or batches.examples or batches.num_batches != 1:
            raise UsageError(
                f"{caller()} takes one batch of arrays, not a dataset ({dataset.kind})",
                write="x, y = next(iter(dataset)) for its first batch",
            )
        source = batch_source(dataset, binding, BatchOptions(class_weight=class_weight))
        return InMemoryData(source.example, source.info)
    whole = read_arrays(dataset, binding, class_weight)
    data = with_weights(narrow(whole.batch, keep_mapped=keep_mapped))
    check_weights(data.weights, all_zero=True)
    check_values(data)
    return replace(whole, batch=data)


def split_dataset(
    dataset: Dataset, fraction: float, binding: Binding
) -> tuple[Dataset, Dataset]:
    """Splits off the last `fraction` of the examples, before any shuffling.

    Returns `(train, validation)`, both of the kind of the dataset.

    Raises:
      ValueError: `fraction` is out of range or leaves one side empty, or the dataset is
        neither arrays nor examples with random access.
    """
    if isinstance(dataset, ExampleSet) and dataset.by_index:
        return _split_examples(dataset, fraction, binding)
    if not isinstance(dataset, Arrays):
        raise UsageError(
            "validation_split needs arrays or examples with random access, not a "
            f"dataset ({dataset.kind}): write validation_data=(x_val, y_val)"
        )
    # Memory-mapped files are read later, batch by batch.
    whole = one_batch(dataset, binding, keep_mapped=True)
    train, validation = split_validation(whole.batch, fraction)
    return Arrays(replace(whole, batch=train)), Arrays(replace(whole, batch=validation))


def _split_examples(
    examples: ExampleSet, fraction: float, binding: Binding
) -> tuple[ExampleSet, ExampleSet]:
    total = examples.length
    assert total is not None
    train = train_rows(total, fraction)
    # Reading all labels would take too long; a few, far apart, show the order as well.
    few = np.linspace(0, total - 1, min(total, _FEW_LABELS)).astype(np.int64)
    binding = binding.guided_by(examples.info)
    warn_if_sorted(
        narrow(binding.split(as_host(batch_of_rows(examples, few)))),
        "Give validation_data=, or shuffle the dataset in advance: "
        "ds.shuffle(seed=0), torch.utils.data.Subset(ds, order), or the list of items.",
    )
    return examples.part(0, train), examples.part(train, total)


def _array_source(
    arrays: Arrays, binding: Binding, options: BatchOptions
) -> ArraySource:
    if options.inputs_only:
        whole = read_inputs(arrays.x, binding)
        size = options.size(check_lengths(whole.batch))
        data = narrow(whole.batch, keep_mapped=True)
        return ArraySource(data, size, info=whole.info)
    whole = read_arrays(arrays, binding, options.class_weight)
    data = whole.batch
    if data.weights is not None:
        check_weights(data.weights)
    size = options.size(len(jax.tree.leaves(data)[0]))
    source = ArraySource(
        data, size, shuffle=options.shuffle, seed=options.seed, info=whole.info
    )
    source.check(check_values)
    check_values(source.example)
    return source


def _as_stream(dataset: ExampleSet | Stream, options: BatchOptions) -> Stream:
    """Returns a dataset as a stream of raw batches.

    Raises:
      ValueError: `batch_size` for ready-made batches.
      DataError: a dataset without examples.
    """
    if isinstance(dataset, Stream):
        if dataset.examples is None or options.default_batch_size is None:
            return _ready_batches(dataset, options)
        # After a fit on single examples, later data may be single examples too.
        first, dataset = peek(dataset)
        if first is None or not looks_single(first):
            return _ready_batches(dataset, options)
        dataset = examples_in(dataset)
    if dataset.length == 0:
        raise DataError(
            f"no examples: the {dataset.kind} given to {caller()} has the length 0. "
            "Pass at least one."
        )
    size = options.size(dataset.length)
    return stream_examples(dataset, size, shuffle=options.shuffle, seed=options.seed)


def _ready_batches(stream: Stream, options: BatchOptions) -> Stream:
    guessed = stream.examples is not None
    refuse_batch_size(options.batch_size, guessed=guessed)
    if stream.seeded is None:
        return stream
    return replace(stream, open=stream.seeded(options.seed))
