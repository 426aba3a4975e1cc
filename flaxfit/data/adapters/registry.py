"""The registry of dataset kinds: matches data and picks its adapter.

`KINDS` lists them in the order they are tried. All other data is arrays, or an iterable
of batches or examples.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from flaxfit._core.errors import UsageError, UsageTypeError, caller
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
from flaxfit.data.datasets.iterables import (
    begins_single,
    examples_in,
    from_iterable,
    length_of,
)
from flaxfit.data.datasets.stream import Stream
from flaxfit.data.host.arrays import as_host, call_text, is_nest
from flaxfit.data.host.checks import check_lengths
from flaxfit.data.host.collate import looks_single


def register_adapter(
    matches: Callable[[Any], bool], adapt: Callable[[Any], Any]
) -> None:
    """Adds a kind of data to those that `fit`, `evaluate` and `predict` take.

    Registered kinds are tried before the built-in ones, the latest first. The data is
    passed as one argument, `fit(corpus)`, and contains its targets.

    Args:
      matches: data -> whether it is of this kind. It is called for all data, so it must
        be fast and must not raise.
      adapt: data -> the data as a known kind: arrays, `Examples`, `Batches`, anything
        with `len(x)` and `x[0]`, an iterable of batches, or a function that returns
        one.

    Raises:
      TypeError: an argument that is not a function.

    Example:
      `register_adapter(lambda x: isinstance(x, Corpus), lambda x: Examples(x.lines))`
    """
    for name, function in (("matches", matches), ("adapt", adapt)):
        if not callable(function):
            raise UsageTypeError(
                f"Got {name}={function!r}",
                "Expected a function of the data",
                "register_adapter(lambda x: isinstance(x, Corpus), lambda x: x.pairs)",
            )
    _REGISTERED.insert(0, (matches, adapt))


def adapt(x: Any) -> Any:
    """Returns a dataset as an `ExampleSet`, a `Stream` or arrays; other data unchanged.

    Raises:
      TypeError, ValueError, DataError: a dataset that cannot be read as it is.
    """
    x = from_registered(x)
    for matches, translate in KINDS:
        if matches(x):
            return translate(x)
    return x


def from_registered(x: Any) -> Any:
    """Returns data of a registered kind as data of a built-in one."""
    for matches, translate in _REGISTERED:
        if not _is_of(matches, x):
            continue
        translated = translate(x)
        if _is_of(matches, translated):
            raise UsageError(
                f"The adapter registered for {type(x).__name__} returned its argument, "
                "or data of the same kind",
                "Return data of another, known kind",
            )
        return from_registered(translated)
    return x


def _is_of(matches: Callable[[Any], bool], x: Any) -> bool:
    try:
        return bool(matches(x))
    except Exception as error:
        error.add_note(f"while asking a registered adapter about {type(x)}")
        raise


def adapt_parts(x: Any, y: Any, sample_weight: Any) -> tuple[Any, Any, Any]:
    """Returns `(x, y, sample_weight)` with files opened and `x` adapted.

    If one of them is or holds an array that is read by slices (zarr, HDF5), the three
    become one `ExampleSet`, returned as `(examples, None, None)`.
    """
    parts = (from_registered(x), y, sample_weight)
    x, y, sample_weight = map(npy_files.open_files, parts)
    parts = (x, y, sample_weight)
    if any(map(chunked_arrays.matches, parts)) and not is_batch_list(x, y):
        return chunked_arrays.gathered(*parts), None, None
    return adapt(x), y, sample_weight


def examples_of(x: Any, batch_size: int | None) -> ExampleSet | None:
    """Returns the single examples that `x` holds, None if its first item is a batch.

    A stream is taken for single examples only if there is a `batch_size`.
    """
    by_index = hasattr(x, "__getitem__") and length_of(x)
    if by_index and not isinstance(x, Mapping) and begins_single(x):
        return _example_set(x)
    if batch_size is None or by_index:
        return None
    examples = _example_set(x)

    def iterate(pass_index: int) -> Iterator[Any]:
        assert examples.iterate is not None
        for number, item in enumerate(examples.iterate(pass_index)):
            if number == 0 and not looks_single(item):
                refuse_batch_size(batch_size, guessed=True)
            yield item

    return replace(examples, iterate=iterate)


def _open_examples(examples: Examples) -> ExampleSet:
    """Returns the items of a user's `Examples`, with their arguments applied.

    Raises:
      TypeError: the items are batches.
      ValueError: processes for items without random access.
    """
    items = adapt(examples.items)
    if isinstance(items, Stream) and items.examples is not None:
        items = items.examples
    if isinstance(items, Stream):
        raise TypeError(
            f"Examples(...) of a {items.kind}, which yields whole batches. Pass the "
            "dataset before batching, or pass the batches directly: "
            f"{call_text('batches')}."
        )
    if not isinstance(items, ExampleSet):
        items = _example_set(items)
    if examples.processes and not items.by_index:
        raise ValueError(
            f"Examples(..., processes={examples.processes}) of a {items.kind}: "
            "processes need items with random access, len(items) and items[0]. Write "
            f"threads={examples.processes}."
        )
    return examples.applied_to(items)


def _example_set(items: Any) -> ExampleSet:
    if dataframes.is_table(items):
        rows = dataframes.plain_columns(items)
        return ExampleSet("Examples of a table", len(items), partial(take_rows, rows))
    if is_nest(items) and not isinstance(items, list):
        arrays = as_host(items)
        return ExampleSet(
            "Examples of arrays", check_lengths(arrays), partial(take_rows, arrays)
        )
    if hasattr(items, "__getitem__") and length_of(items) is not None:
        kind = f"{type(items).__name__} of examples"
        return ExampleSet(kind, length_of(items), partial(take_items, items))
    return examples_in(from_iterable(items))


def refuse_batch_size(batch_size: Any, *, guessed: bool) -> None:
    """Refuses a batch size for ready-made batches.

    Args:
      batch_size: the argument; None is not refused.
      guessed: whether the data is taken for batches because of the shapes of an item.

    Raises:
      ValueError: `batch_size` is not None.
    """
    if batch_size is None:
        return
    validates = caller() == "validation_data"
    argument = "validation_batch_size" if validates else "batch_size"
    reason, advice = "yields batches of its own", ""
    if guessed:
        reason = "seems to yield batches: all parts of an item have one length"
        advice = (
            " If its items are single examples, write "
            f"{call_text('Examples(dataset)')}, with pad_to= if they differ in length."
        )
    raise ValueError(
        f"{argument}={batch_size!r} is given, but your iterable {reason}. Set the size "
        f"where the batches are made, and write {call_text('dataset')}.{advice}"
    )


_REGISTERED: list[tuple[Callable[[Any], bool], Callable[[Any], Any]]] = []

# (matches, adapt) of each kind, in the order they are tried.
KINDS: tuple[tuple[Callable[[Any], bool], Callable[..., Any]], ...] = (
    (lambda x: isinstance(x, Examples), _open_examples),
    (lambda x: isinstance(x, Batches), lambda x: open_batches(x, adapt(x.batches))),
    (dataframes.is_lazy, dataframes.refuse_lazy),
    (lambda x: isinstance(x, ImageFiles), open_image_files),
    (grain.matches, grain.adapt),
    # Before torch: its streams are also instances of torch's IterableDataset.
    (hugging_face.matches, hugging_face.adapt),
    (torch.matches, torch.adapt),
    (tf_data.matches, tf_data.adapt),
    (npy_files.matches, npy_files.adapt),
    (tfds.matches, tfds.adapt),
    (
        lambda x: not isinstance(x, list) and chunked_arrays.matches(x),
        chunked_arrays.adapt,
    ),
)
