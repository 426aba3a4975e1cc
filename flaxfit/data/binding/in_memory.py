"""Reads arrays and tables in memory as one batch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from flaxfit._core.errors import DataError, caller
from flaxfit._core.types import Batch
from flaxfit.data.binding import dataframes
from flaxfit.data.binding.binding import Binding, InMemoryData, has_fields
from flaxfit.data.binding.table_binding import (
    holds_column,
    holds_table,
    read_column,
    read_table,
    refuse_inner_tables,
    refuse_other_order,
)
from flaxfit.data.datasets.example_dataset import ExampleSet
from flaxfit.data.datasets.stream import DatasetInfo, Stream
from flaxfit.data.host.arrays import as_host, call_text, is_array, is_nest, narrow
from flaxfit.data.host.checks import check_lengths
from flaxfit.data.host.weights import ClassWeighting, with_weights


@dataclass(frozen=True, eq=False)
class Arrays:
    """Arrays or tables in memory, not yet bound to inputs and targets.

    Attributes:
      x: the data as the user passed it, or the result of reading it.
      y: targets.
      sample_weight: weights.
    """

    x: Any
    y: Any = None
    sample_weight: Any = None

    kind: ClassVar[str] = "arrays"
    one_shot: ClassVar[bool] = False
    endless: ClassVar[bool] = False


def is_arrays(x: Any, y: Any, sample_weight: Any) -> bool:
    """Whether the data is arrays; False for a dataset, which contains its targets.

    Raises:
      TypeError: no data, bytes, or a tuple or dict that does not hold arrays.
      ValueError: `y` or `sample_weight` together with data that contains its own.
    """
    if x is None or isinstance(x, bytes):
        arrays = "x" if caller().startswith("predict") else "x, y"
        raise TypeError(
            f"{call_text(repr(x))} gives no data. Write "
            f"{call_text(arrays)} with arrays, {call_text(repr('mnist'))} "
            "for a dataset by name, or pass an iterable of batches."
        )
    name = "y" if y is not None else "sample_weight"
    given = y is not None or sample_weight is not None
    if isinstance(x, Batch | InMemoryData):
        if given:
            raise ValueError(f"a Batch contains its {name}: write {caller()}(batch).")
        return True
    if dataframes.is_table(x) or is_array(x):
        return True
    if not is_batch_list(x, y) and is_nest(x):
        return True
    if given:
        kind = x.kind if isinstance(x, ExampleSet | Stream) else type(x).__name__
        raise ValueError(
            f"{name} is given together with a {kind}, which must contain its targets "
            "and weights itself. Let its items be (x, y), (x, y, weights) or dicts, "
            f"and write {call_text('dataset')}; a single column of a dataset becomes "
            "an array by np.asarray(column)."
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


def is_batch_list(x: Any, y: Any) -> bool:
    """Whether `x` is a list of batches, which are tuples, dicts, tables or lists."""
    if not isinstance(x, list | tuple) or hasattr(x, "_fields"):
        return False
    # A tuple of two or three is one dataset: both ((a, b), y) and ((a, b), (c, d)).
    if isinstance(x, tuple) and (len(x) <= 3 or y is not None):
        return False
    return bool(x) and all(_is_nested(part) or has_fields(part) for part in x)


def is_several_inputs(x: Any, binding: Binding) -> bool:
    """Whether each part of a tuple or list given to `predict` is one input."""
    plain = isinstance(x, tuple | list) and not hasattr(x, "_fields")
    if not plain or _is_nested(x[0]) or callable(binding.inputs):
        return False
    return binding.takes_several


def _is_nested(value: Any) -> bool:
    nested = isinstance(value, tuple | list | Mapping | Batch)
    return (nested and not is_array(value)) or dataframes.is_table(value)


def read_arrays(
    arrays: Arrays, binding: Binding, class_weight: Mapping[Any, float] | None = None
) -> InMemoryData:
    """Returns all examples; `weights` is None if they have no weights."""
    x, y, sample_weight = arrays.x, arrays.y, arrays.sample_weight
    raw = x if y is None else (x, y)
    if isinstance(x, InMemoryData):
        whole = x
    elif holds_table(raw):
        whole = read_table(raw, binding)
    elif holds_column(raw):
        whole = read_column(raw, binding)
    else:
        refuse_inner_tables(raw, "x")
        unused = binding.unused(x) if y is None else ()
        info = DatasetInfo(columns=binding.columns, unused=unused)
        whole = InMemoryData(binding.split(as_host(raw)), info)
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
    if class_weight is not None:
        data = ClassWeighting(class_weight)(data)
    return replace(whole, batch=data)


def read_inputs(x: Any, binding: Binding) -> InMemoryData:
    """Reads arrays or a table given to `predict`."""
    if holds_table(x):
        return read_table(x, binding, targets=False)
    refuse_inner_tables(x, "x")
    raw = as_host(x)
    apart = isinstance(raw, list) and not callable(binding.inputs)
    if is_several_inputs(raw, binding):
        batch = Batch(binding.bind(raw), None, None)
    elif apart and len(raw) > 1 and not _is_nested(raw[0]):
        raise DataError(
            f"a list of {len(raw)} arrays for a model with one input. For a list of "
            "examples write np.stack(x); for (x, y) a tuple; for batches iter(batches)."
        )
    else:
        batch = stream_inputs(raw, binding)
    return InMemoryData(batch, DatasetInfo(columns=binding.columns))


def stream_inputs(raw: Any, binding: Binding) -> Batch:
    """Returns a raw batch with its inputs only."""
    try:
        inputs = binding.split(raw).inputs
    except DataError:
        if not has_fields(raw):
            raise
        # It has no keys with names of the call, so it may be one input as a whole.
        inputs = binding.bind(raw)
    return Batch(inputs, None, None)
