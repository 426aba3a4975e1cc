"""Reads columns of pandas, polars and pyarrow tables as NumPy arrays, by narwhals.

This module knows no models; `table_binding` decides which columns are inputs.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import numpy as np

from flaxfit._core.errors import DataError, UsageTypeError
from flaxfit._core.lazy_types import comes_from
from flaxfit._core.types import HostArray
from flaxfit.data.datasets.columns import Name

# Matched by name, so that data without tables need not import narwhals (50 ms).
_TABLES = (
    ("pandas", "DataFrame"),
    ("polars", "DataFrame"),
    ("pyarrow", "Table", "RecordBatch"),
)
_COLUMNS = (
    ("pandas", "Series", "Index", "Categorical"),
    ("polars", "Series"),
    ("pyarrow", "Array", "ChunkedArray"),
)
_ONE_HOT = (
    "pd.get_dummies(df, columns=[{n}]) (polars: df.to_dummies({n}); pyarrow: "
    "pc.equal(table[{n}], value)) for a column of each value"
)
# The code to write if there is this problem with the column {n}.
_LINES: Mapping[str, str] = MappingProxyType(
    {
        "missing": "df = df.dropna() (polars: df.drop_nulls(); pyarrow: "
        "table.drop_null()), or fill the gaps, df[{n}].fillna(0)",
        "text": _ONE_HOT,
        "category": _ONE_HOT,
        "labels": "df[{n}] = df[{n}].astype('category') (polars: "
        "pl.col({n}).cast(pl.Categorical); pyarrow: table[{n}].dictionary_encode())",
        "date": "(df[{n}] - df[{n}].min()).dt.total_seconds() (pyarrow: "
        "pc.seconds_between(start, table[{n}]))",
        "object": "pd.to_numeric(df[{n}]) (polars: pl.col({n}).cast(pl.Float32); "
        "pyarrow: table[{n}].cast('float32')), or np.stack(np.asarray(df[{n}])) for a "
        "column of arrays",
    }
)
_KINDS = MappingProxyType(
    {
        "text": "text",
        "category": "a category, whose codes are not quantities",
        "date": "a point or a span of time",
        "object": "not plain numbers",
    }
)


class Column(NamedTuple):
    """One column of a table.

    Attributes:
      name: its name, or None.
      kind: `"number"`, `"category"`, `"text"`, `"date"` or `"object"`.
      dtype: the library's name of its dtype.
      values: `[rows]`: numbers, text, or the codes of a category. Empty for other kinds
        and if values are missing; NaN may be in it.
      categories: the names of the codes 0, 1, …
      missing: the first row without a value or with NaN, else None.
    """

    name: Name | None
    kind: str
    dtype: str
    values: HostArray
    categories: tuple[str, ...] = ()
    missing: int | None = None

    @property
    def where(self) -> str:
        """The column's name in error messages."""
        return "y" if self.name is None else f"the column {self.name!r}"

    def line(self, problem: str) -> str:
        """Returns the code that solves a problem of this column."""
        return _LINES[problem].format(n=repr("y" if self.name is None else self.name))


class Table(NamedTuple):
    """A table of any library; `kind` is e.g. `"pandas DataFrame"`."""

    kind: str
    names: tuple[Name, ...]
    column: Callable[[Name], Column]


def is_table(value: object) -> bool:
    """Whether a value is a table of pandas, polars or pyarrow."""
    return any(comes_from(value, *classes) for classes in _TABLES)


def is_column(value: object) -> bool:
    """Whether a value is a single column of pandas, polars or pyarrow."""
    return any(comes_from(value, *classes) for classes in _COLUMNS)


def is_lazy(value: object) -> bool:
    """Whether a value is a polars query or a pyarrow dataset, which holds no rows."""
    return comes_from(value, "polars", "LazyFrame") or (
        type(value).__module__.startswith("pyarrow._dataset")
        and hasattr(value, "to_batches")
    )


def refuse_lazy(value: Any) -> NoReturn:
    """Raises UsageTypeError for a query or dataset for which `is_lazy` is true."""
    polars = comes_from(value, "polars", "LazyFrame")
    raise UsageTypeError(
        f"a {type(value).__name__} holds no rows yet",
        write=f"{'df.collect()' if polars else 'dataset.to_table()'} for the table, or "
        "pass a function that yields tables of a batch each",
    )


def as_table(value: Any) -> Table:
    """Returns a table of any library as a `Table`.

    Raises:
      DataError: two columns have the same name, or a name is not text or an integer.
    """
    library = _library_of(value, _TABLES)
    names = value.schema.names if library == "pyarrow" else list(value.columns)
    kind = f"{library} {type(value).__name__}"
    for name in names:
        if not isinstance(name, str | int):
            raise DataError(
                f"the {kind} has a column named {name!r}",
                "Names are text or whole numbers",
                "df.columns = ['_'.join(map(str, c)) for c in df.columns]",
            )
    name, count = Counter(names).most_common(1)[0] if names else ("", 0)
    if count > 1:
        raise DataError(f"the {kind} has {count} columns named {name!r}", "Rename them")
    return Table(kind, tuple(names), lambda name: as_column(value[name], name))


def as_column(value: Any, name: Name | None = None) -> Column:
    """Returns a column of any library as a `Column`, called `name` or by its own."""
    import narwhals.stable.v2 as nw

    library = _library_of(value, _COLUMNS)
    if library == "pandas":
        import pandas as pd

        value = pd.Series(value)
    elif comes_from(value, "pyarrow", "Array"):
        import pyarrow as pa

        value = pa.chunked_array([value])
    series = nw.from_native(value, series_only=True)
    if name is None and isinstance(series.name, str | int) and series.name != "":
        name = series.name
    dtype = str(value.type if library == "pyarrow" else value.dtype)
    missing = np.asarray(series.is_null().to_numpy(), bool)
    # The dtype of a column without any value says nothing about its kind.
    empty = len(missing) > 0 and bool(missing.all())
    kind = "number" if empty else _kind_of(series)
    values: HostArray = np.empty(0)
    names: tuple[str, ...] = ()
    if not missing.any():
        if kind == "category":
            values, names = _codes_of(value, library)
        elif kind in ("number", "text"):
            values = series.to_numpy()
    if values.dtype.kind == "f" and len(values):
        missing = np.isnan(values)
    row = int(np.argmax(missing)) if missing.any() else None
    return Column(name, kind, dtype, values, names, row)


def plain_columns(value: Any) -> dict[Name, HostArray]:
    """Returns the columns of a table as arrays of any dtype."""
    return {name: np.asarray(value[name]) for name in as_table(value).names}


def numbers(column: Column, *, floats: bool = False) -> HostArray:
    """Returns a column of numbers, as `float32` with `floats`, else in its own dtype.

    Raises:
      DataError: the column is not numeric, or a row has no finite number.
    """
    if column.kind != "number":
        raise DataError(
            f"{column.where} is {_KINDS[column.kind]} ({column.dtype})",
            "Only numbers can be trained on",
            f"{column.line(column.kind)}; Trainer(model, inputs=[...]) to leave it "
            f"out; or Trainer(model, targets={column.name!r}) to predict it",
        )
    _refuse_missing(column)
    values = column.values
    with np.errstate(over="ignore"):
        result = values.astype(np.float32) if floats else values
    if result.dtype.kind == "f" and not np.isfinite(result).all():
        row = int(np.argmin(np.isfinite(result)))
        raise DataError(
            f"{column.where} holds {values[row]} at row {row}: float32 ends at 3.4e38, "
            "and infinity makes the loss NaN",
            "Drop these rows or replace the values",
        )
    return result


def labels(
    column: Column, known: tuple[str, ...] = ()
) -> tuple[HostArray, tuple[str, ...]]:
    """Returns a column of targets, and the names of its classes if it has any.

    Args:
      column: numbers, or a category, whose codes are returned.
      known: the class names of the codes 0, 1, … if they are fixed already. With it,
        text is read as class names.

    Raises:
      DataError: text or other values, a row without a value, or an unknown class.
    """
    _refuse_missing(column)
    if column.kind == "category":
        codes, names = column.values, column.categories
    elif column.kind == "text" and known:
        found, codes = np.unique(column.values.astype(str), return_inverse=True)
        names = tuple(found.tolist())
    elif column.kind == "text":
        raise DataError(
            f"{column.where} is text ({column.dtype})",
            "Targets are numbers or a category",
            column.line("labels"),
        )
    elif known and all(name.lstrip("-").isdigit() for name in known):
        raise DataError(
            f"{column.where} is {column.dtype}, but this trainer was trained on the "
            f"category {', '.join(known)}: a number could be its value or its code",
            write=column.line("labels"),
        )
    else:
        return numbers(column), ()
    if not known or known == names:
        return codes.astype(np.int32), known or names
    places = np.array([known.index(n) if n in known else -1 for n in names], np.int32)
    codes = places[codes]
    if len(codes) and codes.min() < 0:
        raise DataError(
            f"{column.where} holds a class at row {np.argmin(codes)} that this "
            f"trainer was not trained on; it knows {', '.join(known)}. Classes here: "
            f"{', '.join(names)}"
        )
    return codes, known


def _refuse_missing(column: Column) -> None:
    if column.missing is not None:
        raise DataError(
            f"{column.where} has no value at row {column.missing} (missing or NaN), "
            "which would make the loss NaN",
            write=column.line("missing"),
        )


def _library_of(value: object, kinds: tuple[tuple[str, ...], ...]) -> str:
    return next(kind[0] for kind in kinds if comes_from(value, *kind))


def _kind_of(series: Any) -> str:
    import narwhals.stable.v2 as nw

    dtype = series.dtype
    if isinstance(dtype, nw.Categorical | nw.Enum):
        return "category"
    if dtype == nw.Boolean or dtype.is_float():
        return "number"
    if dtype.is_integer():
        return "object" if dtype in (nw.Int128, nw.UInt128) else "number"
    if dtype.is_temporal():
        return "date"
    if dtype == nw.Unknown and series.to_numpy().dtype.kind in "biuf":
        return "number"  # pandas's sparse arrays
    return "text" if dtype == nw.String else "object"


def _codes_of(series: Any, library: str) -> tuple[HostArray, tuple[str, ...]]:
    """Returns the codes of a category without missing values, and their names.

    narwhals has no access to the codes: looking every value up takes 0.2 to 4 s for a
    million rows, so this asks the libraries.
    """
    if library == "pandas":
        category = series.astype("category").cat
        return category.codes.to_numpy(), tuple(map(str, category.categories))
    if library == "polars":
        import polars as pl

        if not isinstance(series.dtype, pl.Enum):
            # A Categorical's codes depend on all columns the process has seen.
            series = series.cast(pl.String)
            series = series.cast(pl.Enum(series.unique().sort()))
        names = tuple(series.dtype.categories.to_list())
        return series.to_physical().to_numpy(), names
    column = series.unify_dictionaries().combine_chunks()
    return np.asarray(column.indices), tuple(map(str, column.dictionary.to_pylist()))
