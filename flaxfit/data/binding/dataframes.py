"""Columns of pandas, polars and pyarrow tables as NumPy arrays.

Knows their libraries, each of which is imported only for a table of its own, and
nothing of models: which columns are inputs is the business of `table_binding`.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import numpy as np

from flaxfit._core.errors import DataError
from flaxfit._core.lazy_types import comes_from
from flaxfit._core.types import HostArray
from flaxfit.data.datasets.columns import Name

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
# What to write, by library and by what is wrong.
_LINES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "pandas": {
            "missing": "df = df.dropna(), or, of numbers, {c}.fillna(0)",
            "text": "pd.get_dummies(df, columns=[{n}]) for a column of each value, or "
            "{c}.astype('category').cat.codes for an nn.Embed",
            "category": "pd.get_dummies(df, columns=[{n}]) for a column of each value, "
            "or {c}.cat.codes for an nn.Embed",
            "labels": "df[{n}] = {c}.astype('category')",
            "date": "({c} - {c}.min()).dt.total_seconds()",
            "object": "pd.to_numeric({c}), or np.stack({c}) for a column of arrays",
        },
        "polars": {
            "missing": "df = df.drop_nulls(), or df.fill_null(0); for NaN "
            "df.drop_nans() or df.fill_nan(0)",
            "text": "df.to_dummies({n}) for a column of each value",
            "category": "df.to_dummies({n}) for a column of each value",
            "labels": "df.with_columns({c}.cast(pl.Categorical))",
            "date": "({c} - {c}.min()).dt.total_seconds()",
            "object": "{c}.cast(pl.Float32), or np.stack(df[{n}]) for a column of "
            "arrays",
        },
        "pyarrow": {
            "missing": "table = table.drop_null(), or pc.fill_null({c}, 0)",
            "text": "pc.equal({c}, value) for a column of each value",
            "category": "pc.equal({c}, value) for a column of each value",
            "labels": "{c}.dictionary_encode()",
            "date": "pc.seconds_between(start, {c})",
            "object": "{c}.cast('float32'), or np.stack({c}.to_pylist()) for a column "
            "of arrays",
        },
    }
)
_WORDS = MappingProxyType(
    {
        "text": "text",
        "category": "a category, whose codes are no quantity",
        "date": "a point or a span of time",
        "object": "no plain numbers",
    }
)


class Column(NamedTuple):
    """One column of a table.

    Attributes:
      name: its name, None where it has none.
      library: that it comes from: `"pandas"`.
      kind: `"number"`, `"category"`, `"text"`, `"date"` or `"object"`.
      dtype: what its library calls its dtype.
      values: `[rows]`: numbers, the codes of a category (-1 for none), else whatever
        is there. Empty where numbers are missing.
      categories: the names of the codes 0, 1, …
      missing: the first row without a value, None where all have one.
    """

    name: Name | None
    library: str
    kind: str
    dtype: str
    values: HostArray
    categories: tuple[str, ...] = ()
    missing: int | None = None

    @property
    def where(self) -> str:
        """How an error names it."""
        return "y" if self.name is None else f"the column {self.name!r}"

    def line(self, wrong: str) -> str:
        """Returns what to write against what is wrong with it."""
        name = repr("y" if self.name is None else self.name)
        cell = {"pandas": f"df[{name}]", "polars": f"pl.col({name})"}
        text = _LINES[self.library][wrong]
        return text.format(n=name, c=cell.get(self.library, f"table[{name}]"))


class Table(NamedTuple):
    """A table of any library.

    Attributes:
      kind: what it is, in words: `"pandas DataFrame"`.
      names: its columns.
      column: name -> `Column`.
    """

    kind: str
    names: tuple[Name, ...]
    column: Callable[[Name], Column]


def is_table(value: object) -> bool:
    """Whether a value is a table of one of the three libraries."""
    return any(comes_from(value, *classes) for classes in _TABLES)


def is_column(value: object) -> bool:
    """Whether a value is a single column of one of them."""
    return any(comes_from(value, *classes) for classes in _COLUMNS)


def is_lazy(value: object) -> bool:
    """Whether a value is a query of polars, or files of pyarrow, that was not run."""
    return comes_from(value, "polars", "LazyFrame") or (
        type(value).__module__.startswith("pyarrow._dataset")
        and hasattr(value, "to_batches")
    )


def refuse_lazy(value: Any, **unused: Any) -> NoReturn:
    """Refuses what `is_lazy`.

    Raises:
      TypeError: always.
    """
    del unused
    if not comes_from(value, "polars", "LazyFrame"):
        raise TypeError(
            f"a pyarrow {type(value).__name__} holds no rows yet. Write "
            "dataset.to_table() for the table, or for one that is too large for memory "
            "a function that yields parts of it, dataset.to_batches."
        )
    raise TypeError(
        f"a polars {type(value).__name__} is a query, and holds no rows yet. Write "
        "df.collect() for the table, or for one that is too large for memory a "
        "function that yields parts of it."
    )


def as_table(value: Any) -> Table:
    """Returns a table that `is_table`.

    Raises:
      DataError: two columns of one name, or names that are no text.
    """
    library = type(value).__module__.split(".")[0]
    if comes_from(value, "pandas", "DataFrame"):
        library, names = "pandas", value.columns.tolist()
    elif comes_from(value, "polars", "DataFrame"):
        library, names = "polars", value.columns
    else:
        library, names = "pyarrow", value.schema.names
    kind = f"{library} {type(value).__name__}"
    for name in names:
        if not isinstance(name, str | int):
            raise DataError(
                f"the {kind} has a column named {name!r}; names are text or whole "
                "numbers. Write df.columns = ['_'.join(map(str, c)) for c in "
                "df.columns], or names of your own."
            )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(
            f"the {kind} has {names.count(twice)} columns named {twice!r}: which one "
            "is meant cannot be told. Rename them."
        )
    return Table(kind, tuple(names), lambda name: as_column(value[name], name))


def as_column(value: Any, name: Name | None = None) -> Column:
    """Returns a column that `is_column`; `name` None for the one it has itself."""
    if any(comes_from(value, *classes) for classes in _COLUMNS[:1]):
        return _of_pandas(value, name)
    if comes_from(value, "polars", "Series"):
        return _of_polars(value, name)
    return _of_pyarrow(value, name)


def plain_columns(value: Any) -> dict[Name, HostArray]:
    """Returns the columns of a table as arrays, whatever they hold."""
    return {name: np.asarray(value[name]) for name in as_table(value).names}


def numbers(column: Column, *, floats: bool = False) -> HostArray:
    """Returns a column of numbers.

    Args:
      column: the column.
      floats: as `float32`; else in the dtype it has.

    Raises:
      DataError: it holds something else, or a row has no number.
    """
    if column.kind != "number":
        raise DataError(
            f"{column.where} is {_WORDS[column.kind]} ({column.dtype}): only numbers "
            f"can be trained on. Leave it out, Trainer(model, inputs=[...]), or write "
            f"{column.line(column.kind)}. If it is what is to be predicted, say so: "
            f"Trainer(model, targets={column.name!r})."
        )
    _refuse_missing(column)
    values = column.values
    with np.errstate(over="ignore"):
        kept = values.astype(np.float32) if floats else values
    if kept.dtype.kind == "f" and not np.isfinite(kept).all():
        row = int(np.argmin(np.isfinite(kept)))
        raise DataError(
            f"{column.where} holds {values[row]} at row {row}: float32 ends at 3.4e38, "
            "and an infinite number makes the loss and then every parameter NaN. Drop "
            "such rows or replace the values."
        )
    return kept


def labels(
    column: Column, known: tuple[str, ...] = ()
) -> tuple[HostArray, tuple[str, ...]]:
    """Returns a column of targets, and the names of its classes if it has any.

    Args:
      column: numbers, or a category, of which the codes are returned.
      known: the names of the classes 0, 1, … in the codes that are wanted. Text is
        then taken for such names.

    Raises:
      DataError: other values, a row without one, or a class that is not known.
    """
    _refuse_missing(column)
    if column.kind == "category":
        codes, names = column.values, column.categories
    elif column.kind == "text" and known:
        found, codes = np.unique(column.values.astype(str), return_inverse=True)
        names = tuple(found.tolist())
    elif column.kind == "text":
        raise DataError(
            f"{column.where} is text ({column.dtype}), and targets are numbers or a "
            f"category. Write {column.line('labels')}."
        )
    elif known and all(name.lstrip("-").isdigit() for name in known):
        raise DataError(
            f"{column.where} is {column.dtype}, and the classes this trainer was "
            f"trained on are the category {', '.join(known)}: a number could be its "
            f"value or its code. Write {column.line('labels')}."
        )
    else:
        return numbers(column), ()
    if not known or known == names:
        return codes.astype(np.int32), known or names
    places = np.array([known.index(n) if n in known else -1 for n in names], np.int32)
    codes = places[codes]
    if len(codes) and codes.min() < 0:
        row = int(np.argmin(codes))
        raise DataError(
            f"{column.where} holds a class at row {row} that is none of those this "
            f"trainer was trained on: {', '.join(known)}. Classes here: "
            f"{', '.join(names)}."
        )
    return codes, known


def _refuse_missing(column: Column) -> None:
    if column.missing is not None:
        raise DataError(
            f"{column.where} has no value at row {column.missing} (missing or NaN): "
            f"it would make the loss NaN. Write {column.line('missing')}."
        )


def _of_pandas(series: Any, name: Name | None) -> Column:
    import pandas as pd

    series = pd.Series(series)
    dtype, types = series.dtype, pd.api.types
    if name is None:
        name = series.name if isinstance(series.name, str | int) else None
    make = _maker(name, "pandas", dtype, np.asarray(series.isna(), bool))
    if str(dtype).startswith("dictionary<"):
        series = series.astype("category")
    if isinstance(series.dtype, pd.CategoricalDtype):
        categories = tuple(map(str, series.cat.categories))
        return make("category", series.cat.codes.to_numpy(), categories)
    if types.is_bool_dtype(dtype) or types.is_numeric_dtype(dtype):
        own = getattr(dtype, "numpy_dtype", getattr(dtype, "subtype", dtype))
        if np.dtype(own).kind in "biuf":
            return make("number", lambda: series.to_numpy(dtype=own))
    if dtype.kind in "mM":
        return make("date", series.to_numpy())
    kind = "text" if types.infer_dtype(series, skipna=True) == "string" else "object"
    return make(kind, series.to_numpy())


def _of_polars(series: Any, name: Name | None) -> Column:
    import polars as pl

    dtype = series.dtype
    make = _maker(
        name or series.name or None, "polars", dtype, series.is_null().to_numpy()
    )
    if isinstance(dtype, pl.Enum):
        codes = series.to_physical().cast(pl.Int64).fill_null(-1).to_numpy()
        return make("category", codes, tuple(dtype.categories.to_list()))
    if isinstance(dtype, pl.Categorical):
        # Its own codes depend on whatever other columns the process has seen.
        present = series.cast(pl.String).fill_null("")
        names, codes = np.unique(present.to_numpy().astype(str), return_inverse=True)
        return make("category", codes, tuple(names.tolist()))
    if dtype == pl.Boolean or (dtype.is_numeric() and not dtype.is_decimal()):
        return make("number", series.to_numpy)
    if dtype.is_temporal():
        return make("date", series.to_numpy())
    return make("text" if dtype == pl.String else "object", series.to_numpy())


def _of_pyarrow(column: Any, name: Name | None) -> Column:
    import pyarrow as pa

    kinds, dtype = pa.types, column.type
    missing = np.asarray(column.is_null())
    make = _maker(name, "pyarrow", dtype, missing)
    if kinds.is_dictionary(dtype):
        if isinstance(column, pa.ChunkedArray):
            column = column.unify_dictionaries()
            empty = pa.array([], dtype)
            column = pa.concat_arrays(column.chunks) if column.num_chunks else empty
        codes = np.asarray(column.indices.fill_null(-1))
        return make("category", codes, tuple(map(str, column.dictionary.to_pylist())))
    if kinds.is_boolean(dtype) or kinds.is_integer(dtype) or kinds.is_floating(dtype):
        return make("number", lambda: np.asarray(column))
    if kinds.is_temporal(dtype):
        return make("date", np.asarray(column))
    text = kinds.is_string(dtype) or kinds.is_large_string(dtype)
    return make("text" if text else "object", np.asarray(column))


def _maker(
    name: Name | None, library: str, dtype: Any, missing: HostArray
) -> Callable[..., Column]:
    """Returns a function of kind, values (or what reads them) and categories."""

    def make(kind: str, values: Any, categories: tuple[str, ...] = ()) -> Column:
        absent = missing
        if callable(values):
            values = np.empty(0) if absent.any() else values()
            if values.dtype.kind == "f" and len(values):
                absent = np.isnan(values)
        row = int(np.argmax(absent)) if absent.any() else None
        return Column(name, library, kind, str(dtype), values, categories, row)

    return make
