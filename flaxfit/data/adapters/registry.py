"""The registry of dataset kinds: recognizes data and picks its adapter.

`KINDS` lists them in the order they are tried. Whatever nobody recognizes is arrays,
or iterates over batches or examples.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from flaxfit.data.adapters import (
    chunked_arrays,
    grain,
    hugging_face,
    npy_files,
    tf_data,
    tfds,
    torch,
)
from flaxfit.data.adapters.image_folder import ImageFiles, open_image_files
from flaxfit.data.binding import dataframes
from flaxfit.data.binding.in_memory import is_batch_list
from flaxfit.data.datasets.batches import Batches, open_batches
from flaxfit.data.datasets.example_dataset import ExampleSet, take_items, take_rows
from flaxfit.data.datasets.examples import Examples
from flaxfit.data.datasets.iterables import from_iterable, length_of
from flaxfit.data.datasets.stream import Stream
from flaxfit.data.host.arrays import as_host, call_text, is_nest
from flaxfit.data.host.checks import check_lengths
from flaxfit.data.host.collate import looks_single


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


def adapt_parts(
    x: Any,
    y: Any,
    sample_weight: Any,
    what: str,
    data_dir: str | os.PathLike[str] | None,
) -> tuple[Any, Any, Any]:
    """Returns data that was given in parts, with the arrays of files opened.

    If one of its arrays is read by slices, all of it is one `ExampleSet`.
    """
    x, y, sample_weight = map(npy_files.open_files, (x, y, sample_weight))
    parts = (x, y, sample_weight)
    if any(map(chunked_arrays.recognizes, parts)) and not is_batch_list(x, y):
        return chunked_arrays.gathered(*parts), None, None
    return adapt(x, what=what, data_dir=data_dir), y, sample_weight


def examples_of(x: Any, batch_size: int | None, what: str) -> ExampleSet | None:
    """Returns single examples that come by index or, if asked for, in a stream.

    None for batches. Which of both they are the first one tells.
    """
    by_index = hasattr(x, "__getitem__") and length_of(x)
    if by_index and not isinstance(x, Mapping):
        try:
            single = looks_single(x[0])
        except Exception as error:
            error.add_note("while reading item 0")
            raise
        if single:
            return _example_set(x, what)
    if batch_size is None or by_index:
        return None
    examples = _example_set(x, what)

    def iterate(pass_index: int) -> Iterator[Any]:
        assert examples.iterate is not None
        for number, item in enumerate(examples.iterate(pass_index)):
            if number == 0 and not looks_single(item):
                refuse_batch_size(batch_size, what, guessed=True)
            yield item

    return replace(examples, iterate=iterate)


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
    if dataframes.is_table(items):
        rows = dataframes.plain_columns(items)
        return ExampleSet("Examples of a table", len(items), take_rows(rows))
    if is_nest(items) and not isinstance(items, list):
        arrays = as_host(items)
        return ExampleSet(
            "Examples of arrays", check_lengths(arrays), take_rows(arrays)
        )
    if hasattr(items, "__getitem__") and length_of(items) is not None:
        kind = f"{type(items).__name__} of examples"
        return ExampleSet(kind, length_of(items), take_items(items))
    return examples_in(from_iterable(items, what))


def examples_in(stream: Stream) -> ExampleSet:
    """Returns the examples that a stream yields one by one."""
    return ExampleSet(
        f"{stream.kind} of examples",
        stream.num_batches,
        iterate=partial(_iterate, stream),
        one_shot=stream.one_shot,
    )


def _iterate(stream: Stream, pass_index: int) -> Iterator[Any]:
    return stream.open(pass_index, 0)


def refuse_batch_size(batch_size: Any, what: str, *, guessed: bool) -> None:
    """Refuses the size of batches that are made already.

    Args:
      batch_size: what was given; None is not refused.
      what: the method it was given to, for messages.
      guessed: whether only the looks of an item say that it is a batch.

    Raises:
      ValueError: a size is given.
    """
    if batch_size is None:
        return
    argument = "batch_size"
    if what == "validation_data":
        argument = "validation_batch_size"
    reason, way_out = "yields batches of its own", ""
    if guessed:
        reason = "yields batches, as it seems: all parts of an item have one length"
        way_out = (
            " If its items are single examples, write "
            f"{call_text(what, 'Examples(dataset)')}, with pad_to= where they differ "
            "in length."
        )
    raise ValueError(
        f"{argument}={batch_size!r} is given, but your iterable {reason}. Set their "
        f"size where they are made, and write {call_text(what, 'dataset')}.{way_out}"
    )


# (whether it is of the kind, what makes a dataset of it), in the order they are tried.
KINDS: tuple[tuple[Callable[[Any], bool], Callable[..., Any]], ...] = (
    (lambda x: isinstance(x, Examples), _open_examples),
    (lambda x: isinstance(x, Batches), _open_batches),
    (dataframes.is_lazy, dataframes.refuse_lazy),
    (lambda x: isinstance(x, ImageFiles), open_image_files),
    (grain.recognizes, grain.as_dataset),
    # Before torch, whose IterableDataset its streams are too.
    (hugging_face.recognizes, hugging_face.as_dataset),
    (torch.recognizes, torch.as_dataset),
    (tf_data.recognizes, tf_data.as_dataset),
    (npy_files.recognizes, npy_files.as_dataset),
    (tfds.recognizes, tfds.as_dataset),
    (
        lambda x: not isinstance(x, list) and chunked_arrays.recognizes(x),
        chunked_arrays.as_dataset,
    ),
)
