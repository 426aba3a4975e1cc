"""Binds columns of a table to inputs, targets and weights.

The first table determines the role of each column; later tables are read by the same
column names, in any order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from flaxfit._core.errors import DataError, did_you_mean
from flaxfit._core.lazy_types import comes_from
from flaxfit._core.types import Batch, CallSpec, HostArray, Inputs, PyTree
from flaxfit.data.binding.binding import (
    TARGET_NAMES,
    WEIGHT_NAMES,
    Binding,
    InMemoryData,
    listed,
)
from flaxfit.data.binding.dataframes import (
    Column,
    Table,
    as_column,
    as_table,
    is_column,
    is_table,
    labels,
    numbers,
)
from flaxfit.data.datasets.columns import Columns, Name, Part, names_in
from flaxfit.data.datasets.stream import NO_INFO, DatasetInfo
from flaxfit.data.host.arrays import as_host, narrow

_MOST_NAMES = 6

_Targets: TypeAlias = tuple[PyTree, Columns]
"""The targets, and their columns to remember."""


def holds_table(raw: Any) -> bool:
    """Whether data is a table, or a tuple or list whose first part is a table."""
    if isinstance(raw, tuple | list) and 1 <= len(raw) <= 3:
        raw = raw[0]
    return is_table(raw)


def read_table(raw: Any, binding: Binding, *, targets: bool = True) -> InMemoryData:
    """Reads data for which `holds_table` is true.

    Args:
      raw: the table, `(table, y)` or `(table, y, weights)`. Without `y`, the targets
        and weights are columns of the table.
      binding: how data is read, and how earlier tables were read.
      targets: False to read only the inputs.

    Returns:
      The examples; keep `info.columns` for later tables.

    Raises:
      DataError: a column is missing, not numeric or ambiguous, or the targets are
        among the inputs.
    """
    parts = tuple(raw) if isinstance(raw, tuple | list) else (raw,)
    x, y, weights = (*parts, None, None)[:3]
    table, whole = as_table(x), y is None
    known = binding.columns or Columns()
    taken = _target_names(table, binding, known, whole)
    if targets and whole and taken is not None:
        _require(table, taken, "its targets")
    weight = _weight_name(table, binding, known) if whole else None
    free = [n for n in table.names if n not in {*names_in(taken), weight}]
    parts_of = known.inputs
    if not callable(binding.inputs):
        if parts_of is None:
            parts_of = _choose(table, free, binding)
        _require(table, parts_of, "the model's inputs")
    inputs = _inputs(x, table, parts_of, binding)
    values, columns = None, Columns()
    if targets and not whole:
        refuse_other_order(x, y, "y")
        values, columns = _given_apart(y, inputs, binding, parts_of)
        _refuse_leak(table, y, values, parts_of)
    elif targets and taken is not None:
        values, columns = _from_table(table, taken, inputs, binding)
    if targets and weight is not None:
        weights = numbers(table.column(weight), floats=True)
    elif weights is not None:
        refuse_other_order(x, weights, "weights")
        weights = as_host(weights)
    used = {*names_in(parts_of), *names_in(taken), weight}
    unused = () if parts_of is None else [n for n in table.names if n not in used]
    return InMemoryData(
        Batch(inputs, values, weights if targets else None),
        DatasetInfo(
            unused=tuple(map(str, unused)),
            class_names=columns.class_names,
            columns=binding.columns or replace(columns, inputs=parts_of),
            table=_in_words(parts_of, columns.targets, weight),
        ),
    )


@dataclass
class TableReader:
    """Reads raw batches of tables with the same columns; see `read_table`."""

    binding: Binding
    targets: bool
    info: DatasetInfo = NO_INFO

    def __call__(self, raw: Any) -> Batch:
        """Returns a raw batch as a batch, and remembers its columns."""
        whole = read_table(raw, self.binding, targets=self.targets)
        self.binding = replace(self.binding, columns=whole.info.columns)
        self.info = whole.info
        return whole.batch

    def with_table_info(self, info: DatasetInfo) -> DatasetInfo:
        """Returns the metadata of a dataset, extended by that of its tables."""
        columns = self.binding.columns
        return replace(
            info,
            columns=columns,
            class_names=info.class_names or (columns.class_names if columns else ()),
            table=self.info.table,
            unused=self.info.unused or info.unused,
        )


def holds_column(raw: Any) -> bool:
    """Whether data is `(x, y)` or `(x, y, weights)` with a column or table for `y`."""
    if not isinstance(raw, tuple | list) or hasattr(raw, "_fields"):
        return False
    return 2 <= len(raw) <= 3 and (is_column(raw[1]) or is_table(raw[1]))


def read_column(raw: Any, binding: Binding) -> InMemoryData:
    """Reads arrays whose targets are a column or table; see `holds_column`.

    Raises:
      DataError: targets that are text, missing or of an unknown class.
    """
    x, y, weights = (*raw, None)[:3]
    refuse_inner_tables(x, "x")
    refuse_other_order(x, y, "y")
    refuse_other_order(x, weights, "weights")
    known = binding.columns
    batch = binding.split((as_host(x), None, as_host(weights)))
    parts = known.inputs if known else None
    values, columns = _given_apart(y, batch.inputs, binding, parts)
    info = DatasetInfo(class_names=columns.class_names, columns=known or columns)
    return InMemoryData(batch.replace(targets=values), info)


def refuse_inner_tables(data: Any, where: str) -> None:
    """Raises DataError for a table inside other data.

    Its columns would be read by order instead of by name.
    """
    if is_table(data):
        raise DataError(
            f"{where} holds a {type(data).__name__} inside a tuple, list or dict",
            "Give one table with all the columns, or arrays, df[['a', 'b']].to_numpy()",
            "Trainer(model, inputs={'left': ['a', 'b'], 'right': ['c']}) to name the "
            "columns of each input",
        )
    if isinstance(data, list):
        data = tuple(data) if data and is_table(data[0]) else ()
    values = data.values() if isinstance(data, Mapping) else data
    if isinstance(data, Mapping | tuple):
        for value in values:
            refuse_inner_tables(value, where)


def _target_names(
    table: Table, binding: Binding, known: Columns, whole: bool
) -> Part | Mapping[str, Part] | None:
    """Returns the columns of the targets; columns named by the user may not exist."""
    if known.targets is not None:
        return known.targets
    if binding.targets is not None:
        return _part(binding.targets)
    names = [n for n in TARGET_NAMES if n in table.names and whole]
    return next((n for n in names if n not in _sure_inputs(binding, known)), None)


def _weight_name(table: Table, binding: Binding, known: Columns) -> str | None:
    inputs = {*_sure_inputs(binding, known), *binding.call.names}
    names = (n for n in WEIGHT_NAMES if n in table.names and n not in inputs)
    return next(names, None)


def _sure_inputs(binding: Binding, known: Columns) -> set[Name]:
    """Returns the columns that earlier tables or the user say are inputs."""
    asked: Any = binding.inputs
    if isinstance(asked, Mapping):
        asked = tuple(map(_part, asked.values()))
    asked = None if asked is None or callable(asked) else _part(asked)
    return {*known.input_names, *names_in(asked)}


def _choose(
    table: Table, free: Sequence[Name], binding: Binding
) -> tuple[Part, ...] | dict[str, Part]:
    """Returns the columns of each input of the call, from the columns in `free`."""
    call, named_inputs = binding.call, binding.inputs
    if isinstance(named_inputs, Mapping):
        return {name: _part(columns) for name, columns in named_inputs.items()}
    if isinstance(named_inputs, str | int):
        return (named_inputs,)
    if named_inputs is not None:
        columns = tuple(named_inputs)  # type: ignore[arg-type]
        if _takes_one(call):
            return (columns,)
        by_name = all(name in call.names for name in columns)
        return {name: name for name in columns} if by_name else columns
    named = [name for name in call.names if name in free]
    complete = all(name in table.names for name in call.required)
    sequential = not call.names and call.var_positional  # nn.Sequential
    if call.var_keyword and complete and not sequential:
        return {str(name): name for name in (*call.required, *free)}
    if _takes_one(call):
        if free and (not named or list(free) == named[:1]):
            return (tuple(free),)
    elif complete and named:
        return {name: name for name in dict.fromkeys((*call.required, *named))}
    raise _unclear(table, free, named, call)


def _part(columns: Any) -> Part:
    return columns if isinstance(columns, str | int) else tuple(columns)


def _takes_one(call: CallSpec) -> bool:
    """Whether the call needs at most one input."""
    return not call.names or len(call.required) < 2


def _unclear(
    table: Table, free: Sequence[Name], named: Sequence[Name], call: CallSpec
) -> DataError:
    if not free:
        return DataError(
            f"the {table.kind} has no column left for the inputs: "
            f"{listed(table.names)} are targets or weights"
        )
    given = f"the {table.kind} has the columns {listed(free)}"
    if _takes_one(call):
        return DataError(
            f"{given}, and the model's call takes {listed(call.names)}",
            f"The input may be {named[0]!r} alone or all of these columns",
            f"Trainer(model, inputs={named[0]!r}) for that column, or "
            f"Trainer(model, inputs={list(free)!r}) for a matrix of all",
        )
    example = {name: free[i % len(free)] for i, name in enumerate(call.required)}
    return DataError(
        f"{given}; the model's call takes {listed(call.names)} and requires "
        f"{listed(call.required)}",
        write=f"Trainer(model, inputs={example!r}), with the columns of each input",
    )


def _require(table: Table, parts: Any, role: str) -> None:
    missing = [name for name in names_in(parts) if name not in table.names]
    if missing:
        near = did_you_mean(str(missing[0]), map(str, table.names))
        raise DataError(
            f"the {table.kind} has no column {', '.join(map(repr, missing))}, which "
            f"{'is' if len(missing) == 1 else 'are'} among {role}; it has "
            f"{listed(table.names)}.{near}",
            "Columns are matched by name, in any order; others are ignored",
        )


def _inputs(x: Any, table: Table, parts: Any, binding: Binding) -> Inputs:
    if callable(binding.inputs):
        made = binding.inputs(x)
        if isinstance(made, Mapping):
            return {name: _as_array(each) for name, each in made.items()}
        made = made if isinstance(made, tuple) else (made,)
        return binding.by_position(tuple(map(_as_array, made)))
    if isinstance(parts, Mapping):
        return {name: _values(table, p, floats=True) for name, p in parts.items()}
    return binding.by_position(tuple(_values(table, p, floats=True) for p in parts))


def _as_array(made: Any) -> Any:
    """Returns an input made by the user's function as an array."""
    if is_table(made):
        table = as_table(made)
        return _values(table, table.names, floats=True)
    return numbers(as_column(made)) if is_column(made) else as_host(made)


def _values(table: Table, part: Part, *, floats: bool) -> HostArray:
    """Returns a column `[rows]`, or a matrix `[rows, columns]`.

    With `floats`, a matrix of integers becomes `float32` too.
    """
    if not isinstance(part, tuple):
        return numbers(table.column(part))
    columns = [numbers(table.column(name), floats=floats) for name in part]
    if not columns:
        return np.empty((0, 0), np.float32)
    whole = not floats and all(column.dtype.kind in "iub" for column in columns)
    return np.stack(columns, axis=1, dtype=None if whole else np.float32)


def _from_table(table: Table, names: Any, inputs: Inputs, binding: Binding) -> _Targets:
    """Returns targets that are columns of `table`: that of the inputs, or a table y."""
    known = binding.columns
    if not isinstance(names, tuple | Mapping):
        return _one_column(table.column(names), names, inputs, binding)
    if known is None or known.targets is None:
        outputs = _outputs(binding, inputs)
        if isinstance(outputs, Mapping):
            names = {
                name: (name,) if _is_column(outputs.get(name)) else name
                for name in names
            }
    if isinstance(names, Mapping):
        by_name = {k: _values(table, part, floats=False) for k, part in names.items()}
        return by_name, Columns(targets=names)
    return _values(table, names, floats=False), Columns(targets=names)


def _one_column(
    column: Column, name: Name | None, inputs: Inputs, binding: Binding
) -> _Targets:
    """Returns one column of targets as `[rows]`, or `[rows, 1]` if the output is."""
    known = binding.columns
    values, class_names = labels(column, known.class_names if known else ())
    axis = known.target_axis if known else _is_column(_outputs(binding, inputs))
    values = values[:, None] if axis else values
    return values, Columns(None, name, axis, class_names)


def _given_apart(y: Any, inputs: Inputs, binding: Binding, parts: Any) -> _Targets:
    """Returns targets that are passed separately from the inputs."""
    if is_table(y):
        table, known = as_table(y), binding.columns and binding.columns.targets
        names: Any = table.names if known is None else known
        if len(table.names) == 1 and not isinstance(known, tuple | Mapping):
            names = table.names[0]
        _require(table, names, "its targets")
        values, columns = _from_table(table, names, inputs, binding)
    elif is_column(y):
        column = as_column(y)
        values, columns = _one_column(column, column.name, inputs, binding)
    else:
        values = as_host(y)
        return values, Columns(target_axis=_is_column(values))
    # The input of this name is another column: later tables must not use it as target.
    clash = {*names_in(parts)} & {*names_in(columns.targets)}
    return values, replace(columns, targets=None) if clash else columns


def _outputs(binding: Binding, inputs: Inputs) -> PyTree:
    """Returns the shapes of the model's outputs, None if they are unknown."""
    return None if binding.outputs is None else binding.outputs(narrow(inputs))


def _is_column(output: Any) -> bool:
    shape: tuple[int, ...] = getattr(output, "shape", ())
    return len(shape) == 2 and shape[1] == 1


def _refuse_leak(table: Table, y: Any, target: PyTree, parts: Any) -> None:
    """Raises DataError if an input column has the name and values of the targets."""
    if not isinstance(target, np.ndarray) or target.size != len(target):
        return
    suspects: set[Any] = set(TARGET_NAMES)
    if any(comes_from(y, lib, "Series", "DataFrame") for lib in ("pandas", "polars")):
        suspects |= {getattr(y, "name", None), *getattr(y, "columns", ())}
    flat = target.reshape(-1)
    for name in names_in(parts):
        if name in suspects and np.array_equal(table.column(name).values, flat):
            raise DataError(
                f"the column {name!r} of x equals y: the model would see its target",
                write=f"fit(df) with Trainer(model, targets={name!r}), or leave the "
                f"column out of x, df.drop(columns={name!r})",
            )


def refuse_other_order(x: Any, y: Any, name: str) -> None:
    """Raises DataError if the pandas indexes have the same rows in another order."""
    framed = [comes_from(each, "pandas", "Series", "DataFrame") for each in (x, y)]
    if not all(framed) or len(x) != len(y) or x.index.equals(y.index):
        return
    if x.index.is_unique and y.index.is_unique and x.index.isin(y.index).all():
        row = int(np.argmin(np.asarray(x.index == y.index)))
        raise DataError(
            f"{name} has the rows of x in another order: row {row} is "
            f"{x.index[row]!r} in x and {y.index[row]!r} in {name}",
            write=f"{name}.loc[x.index], or {name}.to_numpy() if their order is right",
        )


def _in_words(inputs: Any, targets: Any, weight: Name | None) -> str:
    """Returns the role of each column as text: `"a, b, c · targets: d"`."""
    names = [str(name) for name in names_in(inputs)]
    more = f", … ({len(names)})" if len(names) > _MOST_NAMES else ""
    parts = [", ".join(names[:_MOST_NAMES]) + more]
    if targets is not None:
        parts.append(f"targets: {listed(names_in(targets))}")
    if weight is not None:
        parts.append(f"weights: {weight}")
    return " · ".join(filter(None, parts))
