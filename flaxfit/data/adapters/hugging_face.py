"""Adapters for Hugging Face datasets. Never imports `datasets` itself.

Columns of numbers and text are read from Arrow in their own dtypes; pictures and other
columns that must be decoded are read by `dataset.with_format("numpy")`. That format
converts numbers to `int64` and `float32`: `uint8` pixels would take eight times the
memory and not be scaled, missing integers would be NaN, and a batch would take 1.4 to
2.5 times as long (datasets 5.2, batches of 128).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any, NoReturn

import numpy as np

from flaxfit._core.errors import UsageTypeError, caller
from flaxfit._core.lazy_types import comes_from
from flaxfit._core.types import HostArray
from flaxfit.data.adapters.latest_reader import LATEST
from flaxfit.data.binding.binding import TARGET_NAMES
from flaxfit.data.datasets.example_dataset import ExampleSet, Loading, take_items
from flaxfit.data.datasets.stream import DatasetInfo
from flaxfit.data.host.arrays import call_text
from flaxfit.data.host.collate import collate

# With their modules, as other projects have classes of the same names.
_TABLE = "datasets.arrow_dataset.Dataset"
_STREAM = "datasets.iterable_dataset.IterableDataset"
_SPLITS = (
    "datasets.dataset_dict.DatasetDict",
    "datasets.dataset_dict.IterableDatasetDict",
)
_ARRAYS = ("numpy", "torch", "tensorflow", "jax")
_TABLES = ("arrow", "pandas", "polars")


def matches(x: Any) -> bool:
    """Whether `x` is a dataset of Hugging Face, or a dict of splits."""
    return _is(x, _TABLE, _STREAM, *_SPLITS)


def adapt(x: Any) -> ExampleSet:
    """Returns a dataset as examples: every row is a dict.

    A format or transform set by the user is kept, but rows of tables become dicts.

    Raises:
      UsageTypeError: several splits at once.
    """
    if _is(x, *_SPLITS):
        _refuse_splits(x)
    if _is(x, _STREAM):
        return ExampleSet(
            "Hugging Face IterableDataset",
            iterate=partial(_iterate, x),
            loading=Loading(collate=_collate),
            info=_info(x.features, x.column_names or ())
            if x.features
            else DatasetInfo(pictures=_begins_with_pictures(x)),
        )
    kind, columns = x.format["type"], x.format["columns"]
    if kind in _TABLES:  # whose rows are not dicts
        x = x.with_format(None, columns=columns)
    take_batch: Any = None
    if kind in _ARRAYS:
        take_batch = partial(_take_formatted, x)
    elif kind != "custom":
        take_batch = _take_columns(x, columns)
    info = _info(x.features, x.column_names if kind == "custom" else columns)
    if kind == "custom":  # the keys that a transform returns are unknown
        info = replace(info, keys=(), targets=None)
    return ExampleSet(
        "Hugging Face Dataset",
        len(x),
        partial(take_items, x),
        take_batch,
        loading=Loading(collate=_collate),
        info=info,
    )


def _is(x: Any, *names: str) -> bool:
    return any(f"{cls.__module__}.{cls.__name__}" in names for cls in type(x).__mro__)


def _refuse_splits(splits: Mapping[str, Any]) -> NoReturn:
    names = list(splits) or ["train"]
    train = "train" if "train" in splits else names[0]
    rest = [name for name in names if name != train]
    tests = [name for name in rest if name.startswith(("val", "dev", "test"))]
    held_out = (*tests, *rest, train)[0]
    if caller() != "fit":
        line = call_text(f'ds["{held_out}"]')
    elif rest:
        line = f'fit(ds["{train}"], validation_data=ds["{held_out}"])'
    else:
        line = f'fit(ds["{train}"])'
    raise UsageTypeError(
        f"a {type(splits).__name__} given to {caller()} holds several datasets: "
        f"{', '.join(names)}",
        write=line,
    )


def _info(features: Mapping[str, Any] | None, columns: Sequence[str]) -> DatasetInfo:
    known = {name: features[name] for name in columns} if features else {}
    classes = [name for name, f in known.items() if type(f).__name__ == "ClassLabel"]
    named = [name for name in TARGET_NAMES if name in columns]
    # `Binding` finds targets of a usual name; without one, use a single class label.
    target = (*named, *(classes if len(classes) == 1 else ()), None)[0]
    return DatasetInfo(
        keys=tuple(columns),
        targets=target if not named else None,
        class_names=tuple(known[target].names) if target in classes else (),
        pictures=any(type(f).__name__ == "Image" for f in known.values()),
    )


def _begins_with_pictures(dataset: Any) -> bool:
    """Whether the first example of a stream without features has a picture."""
    first = next(iter(dataset), None)
    values = first.values() if isinstance(first, Mapping) else ()
    return any(comes_from(value, "PIL", "Image") for value in values)


def _iterate(dataset: Any, pass_index: int) -> Iterator[Any]:
    if not _is_shuffled(dataset):
        return _Examples(dataset) if hasattr(dataset, "state_dict") else iter(dataset)
    # Not resumed by its state, which does not include the shuffle buffer.
    dataset.set_epoch(pass_index)
    return iter(dataset)


class _Examples(Iterator[Any]):
    """The examples of one pass of a stream that can save its position.

    The dataset only knows the position of its latest reader.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._iterator: Iterator[Any] | None = None
        self._start: Any = None
        self._token: object = None

    def __next__(self) -> Any:
        if self._iterator is not None:
            return next(self._iterator)
        LATEST[self._dataset] = self._token = object()
        self._iterator = iter(self._dataset)
        if self._start is None:
            return next(self._iterator)
        self._dataset.load_state_dict(self._start)
        try:
            return next(self._iterator)
        finally:
            self._dataset.load_state_dict({})  # else later passes would start there

    def get_state(self) -> Any:
        """Returns the stream's position; None if another reader has started since."""
        latest = LATEST.get(self._dataset) is self._token
        return self._dataset.state_dict() if latest else None

    def set_state(self, state: Any) -> None:
        """Sets the position at which the stream starts."""
        self._start, self._iterator = state, None


def _is_shuffled(dataset: Any) -> bool:
    """Whether `shuffle` was called on a stream, so that each pass has its own order.

    `set_epoch` would also reorder the shards of a stream that was not shuffled. As
    there is no public way to ask, this reads private attributes of `datasets`; a stream
    without them counts as shuffled.
    """
    links = [getattr(dataset, "_ex_iterable", None)]
    for link in links:
        if link is None or "Shuffle" in type(link).__name__:
            return True
        inner = getattr(link, "ex_iterable", None)
        links += getattr(link, "ex_iterables", [] if inner is None else [inner])
    return False


def _collate(examples: Sequence[Any]) -> Any:
    """Returns a raw batch; columns may have missing values, as objects."""
    first = examples[0]
    dicts = all(isinstance(each, Mapping) for each in examples)
    if not dicts or any(each.keys() != first.keys() for each in examples):
        return collate(examples)
    return {key: _column([each[key] for each in examples]) for key in first}


def _column(values: Sequence[Any]) -> Any:
    if all(value is not None for value in values):
        return collate(values)
    column = np.empty(len(values), object)
    column[:] = values
    return column


def _take_formatted(dataset: Any, rows: HostArray) -> Any:
    return dataset[rows.tolist()]


def _take_columns(dataset: Any, names: Sequence[str]) -> Callable[[HostArray], Any]:
    """Returns a function that reads rows by columns, numbers and text from Arrow."""
    schema = dataset.features.arrow_schema
    plain = [name for name in names if _is_plain(schema.field(name).type)]
    decoded = [name for name in names if name not in plain]
    return partial(
        _read_columns,
        tuple(names),
        dataset.with_format("arrow", columns=plain) if plain else None,
        dataset.with_format("numpy", columns=decoded) if decoded else None,
    )


def _read_columns(
    names: tuple[str, ...], plain: Any, decoded: Any, rows: HostArray
) -> dict[str, HostArray]:
    columns: dict[str, HostArray] = {}
    if plain is not None:
        table = plain[rows.tolist()]
        columns = {n: _as_array(table[n].combine_chunks()) for n in table.column_names}
    if decoded is not None:
        columns |= decoded[rows.tolist()]
    return {name: columns[name] for name in names}


def _is_plain(arrow_type: Any) -> bool:
    """Whether an Arrow type is numbers or text, or lists of them."""
    types = import_module("pyarrow").types
    while True:
        if hasattr(arrow_type, "storage_type"):
            arrow_type = arrow_type.storage_type
        elif _is_list(arrow_type):
            arrow_type = arrow_type.value_type
        else:
            return not (types.is_nested(arrow_type) or types.is_dictionary(arrow_type))


def _is_list(arrow_type: Any) -> bool:
    types = import_module("pyarrow").types
    kinds = types.is_list, types.is_large_list, types.is_fixed_size_list
    return any(is_kind(arrow_type) for is_kind in kinds)


def _as_array(column: Any) -> HostArray:
    """Returns an Arrow column as an array `[rows, ...]`.

    It is an array of objects if lists differ in length or values are missing; None
    stands for a missing value.
    """
    if hasattr(column, "storage"):
        column = column.storage
    missing, rows = column.null_count, len(column)
    if not _is_list(column.type):
        array: HostArray = column.to_numpy(zero_copy_only=False)
        if not missing or array.dtype == object:
            return array
        # With NaN for missing values, integers would be floats in this batch.
        array = array.astype(object)
    else:
        values = _as_array(column.flatten())
        lengths = column.value_lengths().fill_null(0).to_numpy()
        if (lengths == lengths[0]).all() and not missing:
            return values.reshape(rows, int(lengths[0]), *values.shape[1:])
        array = np.empty(rows, object)
        array[:] = np.split(values, np.cumsum(lengths)[:-1])
    if missing:
        array[column.is_null().to_numpy(zero_copy_only=False)] = None
    return array
