"""Data of any kind -> `Batch`es of fixed shape: the one door.

`KINDS` lists, in the order they are tried, who recognizes a kind of dataset. Whatever
nobody recognizes is arrays, or iterates over batches.
"""

import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from flaxfit._errors import DataError
from flaxfit._types import Batch
from flaxfit.data import (
    files,
    grain,
    hugging_face,
    sliced,
    tables,
    tf_data,
    tfds,
    torch,
)
from flaxfit.data.arrays import (
    ArraySource,
    split_validation,
    train_rows,
    warn_if_sorted,
)
from flaxfit.data.batch import Binding, Whole
from flaxfit.data.batches import Batches, open_batches
from flaxfit.data.checks import (
    check_finite,
    check_lengths,
    check_values,
    check_weights,
)
from flaxfit.data.collate import looks_single
from flaxfit.data.example_set import (
    ExampleSet,
    batch_of_rows,
    stream_examples,
    take_items,
    take_rows,
)
from flaxfit.data.examples import Examples
from flaxfit.data.image_folder import ImageFiles, open_image_files
from flaxfit.data.iterables import from_iterable, length_of, peek
from flaxfit.data.padding import Padded, raw_of
from flaxfit.data.source import (
    Source,
    as_host,
    call_text,
    is_array,
    is_nest,
    narrow,
)
from flaxfit.data.stream import NO_FACTS, Facts, Stream
from flaxfit.data.stream_source import StreamSource
from flaxfit.data.table_batch import (
    TableReader,
    holds_column,
    holds_table,
    read_column,
    read_table,
    refuse_inner_tables,
    refuse_other_order,
)
from flaxfit.data.weights import ClassWeighting, apply_mask, with_weights

DEFAULT_BATCH_SIZE = 32
_FEW_LABELS = 32


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
      data_dir: where datasets by name lie; see `tfds.builder`.
      what: the method the data was given to, for messages.

    Raises:
      DataError: data that cannot be trained on; see `data/checks`.
      TypeError: data of an unknown kind.
      ValueError: arguments that do not go together.
    """
    weighting = None if class_weight is None else ClassWeighting(class_weight)
    x, y, sample_weight = _adapt_parts(x, y, sample_weight, what, data_dir)
    if _is_arrays(x, y, sample_weight, what):
        whole = _read_arrays(x, y, sample_weight, binding)
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
        x, batch_size, default_batch_size, multiple_of, shuffle, seed, what
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
    source.facts = reader.told(source.facts)
    check_finite(source.example)
    return source


def as_inputs_source(
    x: Any,
    *,
    binding: Binding,
    batch_size: int | None = None,
    default_batch_size: int | None = None,
    multiple_of: int = 1,
    check: Callable[[Batch], None] | None = None,
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
      check: called by `Source.check`, and with every batch of a dataset.
      data_dir: where datasets by name lie; see `tfds.builder`.
      what: the method the data was given to, for messages.

    Raises:
      DataError: data the model cannot be called with.
      TypeError: data of an unknown kind.
      ValueError: `batch_size` for a dataset, or a wrong one.
    """
    x = files.open_files(x)
    if sliced.recognizes(x) and _is_several_inputs(x, binding):
        x = (x,)
    x, *_ = _adapt_parts(x, None, None, what, data_dir)
    if _is_arrays(x, None, None, what):
        whole = _read_inputs(x, binding)
        rows = check_lengths(whole.batch)
        size = _checked_size(batch_size, default_batch_size, rows, multiple_of)
        data = narrow(whole.batch, keep_mapped=True)
        return ArraySource(data, size, check=check, facts=whole.facts)
    if isinstance(x, ExampleSet):
        x = replace(x, in_buckets=False)  # outputs come in the order of the inputs
    stream = _as_stream(x, batch_size, default_batch_size, multiple_of, False, (), what)
    binding = binding.guided_by(stream.facts or NO_FACTS)
    reader = TableReader(binding, targets=False)

    def read(raw: Any) -> Batch:
        if holds_table(raw_of(raw)):
            return reader(raw_of(raw))
        return _stream_inputs(as_host(raw_of(raw), but_device=True), binding)

    source = StreamSource(
        stream,
        read,
        check=check,
        what=what,
        multiple_of=multiple_of,
        structural=not callable(binding.inputs),
    )
    source.facts = reader.told(source.facts)
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
      DataError: data that cannot be trained on; see `data/checks`.
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
    if not _is_arrays(x, y, sample_weight, what):
        advice = (
            "pass the rest of the data as validation_data=(x_val, y_val)"
            if what == "validation_split"
            else "write x, y = next(iter(dataset)) for its first batch"
        )
        raise ValueError(f"{what} needs arrays here, not a {_kind(x)}: {advice}.")
    whole = _read_arrays(x, y, sample_weight, binding)
    data = whole.batch
    if class_weight is not None:
        data = ClassWeighting(class_weight)(data)
    data = with_weights(narrow(data))
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
    x, y, sample_weight = _adapt_parts(x, y, sample_weight, "fit", data_dir)
    if not isinstance(x, Stream | Batch) and not _is_arrays(x, y, sample_weight, "fit"):
        examples = x if isinstance(x, ExampleSet) else _examples_of(x, None, what)
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
    warn_if_sorted(narrow(binding.split(as_host(batch_of_rows(examples, few)))))
    return examples.part(0, train), examples.part(train, total)


def adapt(x: Any, *, what: str, data_dir: str | os.PathLike[str] | None = None) -> Any:
    """Returns a dataset as an `ExampleSet` or a `Stream`; other data as it is.

    Args:
      x: whatever holds the data.
      what: the method it was given to, for messages.
      data_dir: where datasets by name lie.

    Raises:
      TypeError, ValueError, DataError: a dataset that cannot be read as it is.
    """
    for recognizes, as_dataset in KINDS:
        if recognizes(x):
            return as_dataset(x, what=what, data_dir=data_dir)
    return x


def _adapt_parts(
    x: Any,
    y: Any,
    sample_weight: Any,
    what: str,
    data_dir: str | os.PathLike[str] | None,
) -> tuple[Any, Any, Any]:
    """Returns data that was given in parts, with the arrays of files opened.

    If one of its arrays is read by slices, all of it is one `ExampleSet`.
    """
    x, y, sample_weight = map(files.open_files, (x, y, sample_weight))
    parts = (x, y, sample_weight)
    if any(map(sliced.recognizes, parts)) and not _is_batch_list(x, y):
        return sliced.gathered(*parts), None, None
    return adapt(x, what=what, data_dir=data_dir), y, sample_weight


def _open_examples(
    examples: Examples, *, what: str, data_dir: str | os.PathLike[str] | None
) -> ExampleSet:
    """Returns what a user's `Examples` are made of, with what is done to them.

    Raises:
      TypeError: they come in batches already.
      ValueError: processes for examples that have no index.
    """
    items = adapt(examples.items, what=what, data_dir=data_dir)
    if isinstance(items, Stream) and items.examples is not None:
        items = items.examples
    if isinstance(items, Stream):
        raise TypeError(
            f"Examples(...) of a {items.kind}, which yields whole batches. Give what "
            "the batches are made of, or the batches themselves to "
            f"{call_text(what, 'batches')}."
        )
    if not isinstance(items, ExampleSet):
        items = _example_set(items, what)
    if examples.processes and not items.by_index:
        raise ValueError(
            f"Examples(..., processes={examples.processes}) of a {items.kind}: "
            "processes need items by index, with len(items) and items[0]. Write "
            f"threads={examples.processes}."
        )
    return examples.applied_to(items)


def _open_batches(
    batches: Batches, *, what: str, data_dir: str | os.PathLike[str] | None
) -> Stream:
    """Returns a user's `Batches`; see `open_batches`."""
    adapted = adapt(batches.batches, what=what, data_dir=data_dir)
    return open_batches(batches, adapted, what)


def _example_set(items: Any, what: str) -> ExampleSet:
    if tables.is_table(items):
        rows = tables.plain_columns(items)
        return ExampleSet("Examples of a table", len(items), take_rows(rows))
    if is_nest(items) and not isinstance(items, list):
        arrays = as_host(items)
        return ExampleSet(
            "Examples of arrays", check_lengths(arrays), take_rows(arrays)
        )
    if hasattr(items, "__getitem__") and length_of(items) is not None:
        kind = f"{type(items).__name__} of examples"
        return ExampleSet(kind, length_of(items), take_items(items))
    return _examples_in(from_iterable(items, what))


def _examples_in(stream: Stream) -> ExampleSet:
    """Returns the examples that a stream yields one by one."""
    return ExampleSet(
        f"{stream.kind} of examples",
        stream.num_batches,
        iterate=partial(_iterate, stream),
        one_shot=stream.one_shot,
    )


def _iterate(stream: Stream, pass_index: int) -> Iterator[Any]:
    return stream.open(pass_index, 0)


def _as_stream(
    x: Any,
    batch_size: int | None,
    default_batch_size: int | None,
    multiple_of: int,
    shuffle: bool,
    seed: Sequence[int],
    what: str,
) -> Stream:
    """Returns a dataset as raw batches.

    Raises:
      ValueError: `batch_size` for what comes in batches.
    """
    if not isinstance(x, ExampleSet | Stream):
        x = _examples_of(x, batch_size, what) or from_iterable(x, what)
        if isinstance(x, Stream) and default_batch_size is not None:
            # After a fit that made batches of examples, others may come as examples.
            first, x = peek(x)
            if first is not None and looks_single(first):
                x = _examples_in(x)
    if isinstance(x, ExampleSet):
        if x.length == 0:
            raise DataError(
                f"no examples: the {x.kind} given to {what} has the length 0. Pass at "
                "least one."
            )
        size = _checked_size(batch_size, default_batch_size, x.length, multiple_of)
        return stream_examples(x, size, shuffle=shuffle, seed=seed)
    _refuse_batch_size(batch_size, what)
    return x if x.seeded is None else replace(x, open=x.seeded(seed))


def _examples_of(x: Any, batch_size: int | None, what: str) -> ExampleSet | None:
    """Returns single examples that come by index or, if asked for, in a stream.

    None for batches. Which of both they are the first one tells.
    """
    by_index = hasattr(x, "__getitem__") and length_of(x)
    if by_index and not isinstance(x, Mapping) and looks_single(x[0]):
        return _example_set(x, what)
    if batch_size is None or by_index:
        return None
    examples = _example_set(x, what)

    def iterate(pass_index: int) -> Iterator[Any]:
        assert examples.iterate is not None
        for number, item in enumerate(examples.iterate(pass_index)):
            if number == 0 and not looks_single(item):
                _refuse_batch_size(batch_size, what)
            yield item

    return replace(examples, iterate=iterate)


def _is_arrays(x: Any, y: Any, sample_weight: Any, what: str) -> bool:
    """Whether the data is arrays; False for a dataset, which has its targets inside.

    Raises:
      TypeError: no data, a name, or a tuple that holds something else than arrays.
      ValueError: `y` or `sample_weight` beside data that has its own.
    """
    if x is None or isinstance(x, bytes):
        arrays = "x" if what.startswith("predict") else "x, y"
        raise TypeError(
            f"{call_text(what, repr(x))} gives no data. Write "
            f"{call_text(what, arrays)} with arrays, {call_text(what, repr('mnist'))} "
            "for a dataset by name, or pass an iterable of batches."
        )
    name = "y" if y is not None else "sample_weight"
    given = y is not None or sample_weight is not None
    if isinstance(x, Batch | Whole):
        if given:
            raise ValueError(f"a Batch has its {name} inside: write {what}(batch).")
        return True
    if tables.is_table(x) or is_array(x):
        return True
    if not _is_batch_list(x, y) and is_nest(x):
        return True
    if given:
        raise ValueError(
            f"{name} is given beside a {_kind(x)}, which yields whole batches "
            f"of its own. Let it yield (x, y, weights) and write "
            f"{call_text(what, 'dataset')}."
        )
    if isinstance(x, ExampleSet | Stream):
        return False
    if isinstance(x, Mapping) or (isinstance(x, tuple) and len(x) <= 3):
        parts = x.values() if isinstance(x, Mapping) else x
        raise TypeError(
            f"a {type(x).__name__} of "
            f"{', '.join(type(part).__name__ for part in parts) or 'nothing'}: a dict "
            "or tuple is read as one dataset, {name: array}, (x, y) or (x, y, "
            "weights), arrays in any nesting. For several batches pass a list of them."
        )
    return False


def _kind(x: Any) -> str:
    return x.kind if isinstance(x, ExampleSet | Stream) else type(x).__name__


def _is_batch_list(x: Any, y: Any) -> bool:
    """Whether `x` lists batches: a list of tuples, dicts or lists of arrays."""
    if not isinstance(x, list | tuple) or hasattr(x, "_fields"):
        return False
    # A tuple of two or three is one dataset, ((a, b), y) as well as ((a, b), (c, d)).
    if isinstance(x, tuple) and (len(x) <= 3 or y is not None):
        return False
    return bool(x) and all(_is_nested(part) for part in x)


def _is_several_inputs(x: Any, binding: Binding) -> bool:
    """Whether a tuple given to `predict` has one input in each of its parts."""
    plain = isinstance(x, tuple | list) and not hasattr(x, "_fields")
    if not plain or _is_nested(x[0]) or callable(binding.inputs):
        return False
    return binding.takes_several


def _is_nested(value: Any) -> bool:
    nested = isinstance(value, tuple | list | Mapping | Batch)
    return (nested and not is_array(value)) or tables.is_table(value)


def _read_arrays(x: Any, y: Any, sample_weight: Any, binding: Binding) -> Whole:
    """Returns all examples; `weights` is None where none are given."""
    whole = x if isinstance(x, Whole) else _read(x, y, binding)
    data = whole.batch
    if sample_weight is not None:
        if data.weights is not None:
            raise ValueError(
                "sample_weight is given twice: as an argument and inside the data. "
                "Leave one of them out."
            )
        refuse_other_order(x, sample_weight, "sample_weight")
        data = data.replace(weights=as_host(sample_weight))
    check_lengths(data)
    data = narrow(data, keep_mapped=True)
    data = data if data.weights is None else with_weights(data)
    return replace(whole, batch=data)


def _read(x: Any, y: Any, binding: Binding) -> Whole:
    """Reads arrays or a table, with their targets."""
    raw = x if y is None else (x, y)
    if holds_table(raw):
        return read_table(raw, binding)
    if holds_column(raw):
        return read_column(raw, binding)
    refuse_inner_tables(raw, "x")
    unused = binding.unused(x) if y is None else ()
    return Whole(binding.split(as_host(raw)), unused, Facts(columns=binding.columns))


def _read_inputs(x: Any, binding: Binding) -> Whole:
    """Reads arrays or a table given to `predict`."""
    if holds_table(x):
        return read_table(x, binding, targets=False)
    refuse_inner_tables(x, "x")
    return Whole(
        _whole_inputs(as_host(x), binding), facts=Facts(columns=binding.columns)
    )


def _whole_inputs(raw: Any, binding: Binding) -> Batch:
    """Reads arrays given to `predict`."""
    if _is_several_inputs(raw, binding):
        return Batch(binding.bind(raw), None, None)
    apart = isinstance(raw, list) and not callable(binding.inputs)
    if apart and len(raw) > 1 and not _is_nested(raw[0]):
        raise DataError(
            f"a list of {len(raw)} arrays for a model with one input. For a list of "
            "examples write np.stack(x); for (x, y) a tuple; for batches "
            "iter(batches)."
        )
    return _stream_inputs(raw, binding)


def _stream_inputs(raw: Any, binding: Binding) -> Batch:
    """Reads a raw batch for its inputs alone."""
    if isinstance(raw, Mapping) or hasattr(raw, "_asdict"):
        try:
            inputs = binding.split(raw).inputs
        except DataError:
            # Not a batch with names for the call: then it is one input as it is.
            inputs = binding.bind(raw)
    else:
        inputs = binding.split(raw).inputs
    return Batch(inputs, None, None)


def _checked_size(
    batch_size: Any, default: int | None, examples: int | None, multiple_of: int
) -> int:
    """Returns the rows of a batch, never more than there are examples, if known."""
    if batch_size is None and default is not None:
        return -(-default // multiple_of) * multiple_of
    try:
        size = operator.index(DEFAULT_BATCH_SIZE if batch_size is None else batch_size)
    except TypeError:
        size = 0
    if size < 1 or isinstance(batch_size, bool):
        raise ValueError(
            f"batch_size={batch_size!r}: expected a whole number of at least 1, e.g. "
            f"batch_size={DEFAULT_BATCH_SIZE}."
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


def _refuse_batch_size(batch_size: Any, what: str) -> None:
    if batch_size is not None:
        argument = "batch_size"
        if what == "validation_data":
            argument = "validation_batch_size"
        raise ValueError(
            f"{argument}={batch_size!r} is given, but your iterable yields batches of "
            "its own: set their size where they are made, and write "
            f"{call_text(what, 'dataset')}."
        )


# (whether it is of the kind, what makes a dataset of it), in the order they are tried.
KINDS: tuple[tuple[Callable[[Any], bool], Callable[..., Any]], ...] = (
    (lambda x: isinstance(x, Examples), _open_examples),
    (lambda x: isinstance(x, Batches), _open_batches),
    (tables.is_lazy, tables.refuse_lazy),
    (lambda x: isinstance(x, ImageFiles), open_image_files),
    (grain.recognizes, grain.as_dataset),
    # Before torch, whose IterableDataset its streams are too.
    (hugging_face.recognizes, hugging_face.as_dataset),
    (torch.recognizes, torch.as_dataset),
    (tf_data.recognizes, tf_data.as_dataset),
    (files.recognizes, files.as_dataset),
    (tfds.recognizes, tfds.as_dataset),
    (lambda x: not isinstance(x, list) and sliced.recognizes(x), sliced.as_dataset),
)
