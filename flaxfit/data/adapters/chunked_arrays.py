"""Adapts arrays that are read by slices: zarr, HDF5, tensorstore, dask.

These arrays may be larger than memory, or remote: only the rows of a batch are read. An
array stored in chunks of several rows is read in whole chunks. The latest chunks are
kept in a window, within which rows are shuffled.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from flaxfit._core.errors import DataError, UsageError
from flaxfit._core.lazy_types import comes_from
from flaxfit._core.tree_specs import describe
from flaxfit._core.types import Batch, HostArray
from flaxfit.data.binding.binding import WEIGHT_NAMES
from flaxfit.data.datasets.example_dataset import ExampleSet, take_rows
from flaxfit.data.datasets.shuffling import order_of_pass, seeded
from flaxfit.data.host.arrays import as_host, is_array
from flaxfit.data.host.checks import check_lengths

# The size of the window.
_WINDOW_BYTES = 2**27
# Smaller chunks are read several at a time.
_BLOCK_BYTES = 2**18
# Beside a larger array, one below this size is read as a whole: mostly labels.
_SMALL_BYTES = 2**24
_IN_MEMORY = frozenset(
    "cupy jax jaxlib numpy pandas polars pyarrow scipy tensorflow torch".split()
)


def is_sliced(value: Any) -> bool:
    """Whether a value is an array that must be read by slices."""
    if isinstance(value, np.ndarray | jax.Array | np.generic | type):
        return False
    if not all(hasattr(value, name) for name in ("shape", "dtype", "__getitem__")):
        return False
    packages = {cls.__module__.split(".")[0] for cls in type(value).__mro__}
    return not (packages & _IN_MEMORY or hasattr(value, "__dlpack__"))


def matches(x: Any) -> bool:
    """Whether `x` is an array read by slices, or a nesting with one in it."""
    if comes_from(x, "zarr", "Group"):
        return True
    if isinstance(x, Mapping):
        return any(map(matches, x.values()))
    if isinstance(x, tuple | list) and not is_array(x):
        return any(map(matches, x))
    return is_sliced(x)


def adapt(x: Any) -> ExampleSet:
    """Returns the rows of arrays, in any nesting, as examples.

    Raises:
      DataError: arrays of different length, or of a dtype that cannot be trained on;
        checked before rows are read.
    """
    nest = _as_nest(x)
    length = check_lengths(_specs(nest))
    leaves, structure = jax.tree.flatten(nest, is_leaf=is_array)
    leaves = _with_small_ones_read([as_leaf(leaf) for leaf in leaves])
    sliced = [leaf for leaf in leaves if is_sliced(leaf)]
    block, window = _layout_of(sliced)
    rows = _Rows(leaves, structure, block, window)
    kind = _kind_of(sliced[0])
    if block > 1 and length > window:
        kind = f"{kind} in windows of {window:,} rows"
    return ExampleSet(
        kind,
        length,
        take=rows.singly,
        take_batch=rows,
        order=partial(_order_of_pass, block=block, window=window),
    )


def gathered(x: Any, y: Any, sample_weight: Any) -> ExampleSet:
    """Returns arrays that were passed as separate arguments as one dataset.

    Raises:
      DataError: see `adapt`.
      UsageError: weights are given twice.
    """
    if y is not None:
        x = (x, y) if sample_weight is None else (x, y, sample_weight)
    elif sample_weight is not None:
        x = _as_nest(x)
        by_name = isinstance(x, Mapping)
        parts = x if isinstance(x, tuple) and not hasattr(x, "_fields") else (x,)
        if len(parts) > 2 or (by_name and any(name in x for name in WEIGHT_NAMES)):
            raise UsageError(
                "sample_weight is given twice: as an argument and inside the data",
                "Leave one of them out.",
            )
        x = (
            {**x, WEIGHT_NAMES[1]: sample_weight}
            if by_name
            else (*(*parts, None)[:2], sample_weight)
        )
    return adapt(x)


def as_leaf(value: Any) -> Any:
    """Returns a value as a NumPy array; an array read by slices stays as it is."""
    return value if is_sliced(value) else as_host(value)


def dtype_of(array: Any) -> np.dtype[Any]:
    """Returns the NumPy dtype of an array.

    Raises:
      TypeError: NumPy has no such dtype.
    """
    return np.dtype(getattr(array.dtype, "numpy_dtype", array.dtype))


def rows_of_chunk(array: Any) -> int:
    """Returns the number of rows in a chunk; 1 if unknown."""
    chunks = getattr(array, "chunks", None)
    if chunks is None and hasattr(array, "chunk_layout"):  # of tensorstore
        chunks = array.chunk_layout.read_chunk.shape
    if not chunks:
        return 1
    # dask lists the rows of every chunk.
    rows = max(chunks[0]) if isinstance(chunks[0], Sequence) else chunks[0]
    return max(1, min(int(rows or 1), int(array.shape[0])))


class _Rows:
    """Takes rows of arrays, with a cache of the latest blocks.

    Args:
      leaves: the arrays, at least one of which is read by slices.
      structure: how they are nested.
      block, window: see `_layout_of`.
    """

    def __init__(
        self, leaves: list[Any], structure: Any, block: int, window: int
    ) -> None:
        self._leaves = leaves
        self._sliced = [leaf for leaf in leaves if is_sliced(leaf)]
        self._structure = structure
        self._block_rows = block
        self._window = window
        self._blocks: OrderedDict[int, list[HostArray]] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled without the cache and its lock.
        return _Rows, (self._leaves, self._structure, self._block_rows, self._window)

    def __call__(self, rows: HostArray) -> Any:
        """Returns these rows of all arrays, nested as they are."""
        read = iter(
            self._by_block(rows)
            if self._block_rows > 1
            else [_by_run(array, rows) for array in self._sliced]
        )
        columns = [
            next(read) if is_sliced(leaf) else leaf[rows] for leaf in self._leaves
        ]
        return jax.tree.unflatten(self._structure, columns)

    def singly(self, rows: HostArray) -> Sequence[Any]:
        """Returns these rows one by one."""
        return take_rows(self(rows), np.arange(len(rows)))

    def _by_block(self, rows: HostArray) -> list[HostArray]:
        block = self._block_rows
        columns = [
            np.empty((len(rows), *array.shape[1:]), dtype_of(array))
            for array in self._sliced
        ]
        places = np.argsort(rows, kind="stable")
        numbers, starts = np.unique(rows[places] // block, return_index=True)
        asked = dict(zip(numbers.tolist(), np.split(places, starts[1:]), strict=True))
        with self._lock:
            # Cached blocks come first, as reading others may remove them.
            for number in sorted(asked, key=lambda number: number not in self._blocks):
                # A single row is copied by its number: a list of one takes longer.
                at = asked[number] if len(asked[number]) > 1 else asked[number][0]
                for column, part in zip(columns, self._block(number), strict=True):
                    column[at] = part[rows[at] - number * block]
        return columns

    def _block(self, number: int) -> list[HostArray]:
        if number in self._blocks:
            self._blocks.move_to_end(number)
            return self._blocks[number]
        start = number * self._block_rows
        stop = start + self._block_rows
        found = [
            _read(array, start, min(stop, array.shape[0])) for array in self._sliced
        ]
        self._blocks[number] = found
        if len(self._blocks) * self._block_rows > self._window:
            self._blocks.popitem(last=False)
        return found


def _by_run(array: Any, rows: HostArray) -> HostArray:
    """Returns rows of an array, with one slice for each run of adjacent rows."""
    sought, places = np.unique(rows, return_inverse=True)
    runs = np.split(sought, np.flatnonzero(np.diff(sought) > 1) + 1)
    parts = [_read(array, int(run[0]), int(run[-1]) + 1) for run in runs]
    found = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return found[places]


def _read(array: Any, start: int, stop: int) -> HostArray:
    try:
        part = np.asarray(array[start:stop])
    except Exception as error:
        error.add_note(
            f"while reading the rows {start} to {stop - 1} of a {_kind_of(array)}"
        )
        raise
    if part.shape != (stop - start, *array.shape[1:]):
        raise DataError(
            f"a {_kind_of(array)} of shape {tuple(array.shape)} returned "
            f"{describe(part)} for its rows {start} to {stop - 1}."
        )
    return part


def _order_of_pass(
    total: int,
    pass_index: int,
    *,
    shuffle: bool,
    seed: Sequence[int],
    block: int,
    window: int,
) -> HostArray:
    """Returns the rows of one pass, `int64[total]`.

    If not all blocks fit into a window, the blocks are shuffled, and then the rows of
    each window of blocks. A full shuffle would read a block for nearly every row.
    """
    if not shuffle or block == 1 or total <= window:
        return order_of_pass(total, pass_index, shuffle=shuffle, seed=seed)
    random = seeded(*seed, pass_index)
    firsts = random.permutation(-(-total // block)) * block
    windows = []
    for start in range(0, len(firsts), window // block):
        chosen = firsts[start : start + window // block]
        rows = (chosen[:, None] + np.arange(block)).reshape(-1)
        windows.append(random.permutation(rows[rows < total]))
    return np.concatenate(windows)


def _layout_of(arrays: Sequence[Any]) -> tuple[int, int]:
    """Returns the number of rows in a block, which is read at once, and in the window.

    A block of 1 row means that only the rows of a batch are read.
    """
    row_bytes = sum(_nbytes(array) // max(array.shape[0], 1) for array in arrays)
    largest = max(arrays, key=_nbytes)
    chunk = rows_of_chunk(largest)
    if chunk == 1:
        return 1, 1
    block = chunk * max(1, _BLOCK_BYTES // max(row_bytes * chunk, 1))
    window = block * max(1, _WINDOW_BYTES // max(row_bytes * block, 1))
    return block, window


def _with_small_ones_read(leaves: list[Any]) -> list[Any]:
    most = max(map(_nbytes, filter(is_sliced, leaves)))
    return [
        _read(leaf, 0, leaf.shape[0])
        if is_sliced(leaf) and _nbytes(leaf) < min(most, _SMALL_BYTES)
        else leaf
        for leaf in leaves
    ]


def _nbytes(array: Any) -> int:
    return dtype_of(array).itemsize * math.prod(map(int, array.shape))


def _specs(nest: Any) -> Any:
    """Returns shapes and dtypes in the same nesting, as a `Batch` if it is a tuple."""
    # A dict may have text that is not used; the first batch is checked for it.
    spec_of = partial(_spec_of, named=isinstance(nest, Mapping))
    specs = jax.tree.map(spec_of, nest, is_leaf=is_array)
    if not isinstance(specs, tuple) or hasattr(specs, "_fields") or len(specs) > 3:
        return specs
    x, y, weights = (*specs, None, None)[:3]
    return Batch((x,), y, weights)


def _spec_of(leaf: Any, named: bool) -> Any:
    leaf = as_leaf(leaf)
    if not is_sliced(leaf):
        return leaf
    try:
        dtype = dtype_of(leaf)
    except TypeError as error:
        raise DataError(
            f"a {_kind_of(leaf)} has the dtype {leaf.dtype!r}",
            "Expected a dtype of NumPy.",
        ) from error
    if named and dtype.kind in "OSUT":
        dtype = np.dtype(np.float32)
    return jax.ShapeDtypeStruct(tuple(map(int, leaf.shape)), dtype)


def _as_nest(x: Any) -> Any:
    """Returns the nesting with mappings and groups of arrays as dicts."""
    if comes_from(x, "zarr", "Group"):
        return dict(x.arrays())
    if isinstance(x, Mapping):
        return {key: _as_nest(part) for key, part in x.items()}
    if isinstance(x, tuple | list) and not is_array(x):
        parts = map(_as_nest, x)
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    return x


def _kind_of(array: Any) -> str:
    package = type(array).__module__.split(".")[0]
    name = type(array).__name__
    return name if package == "__main__" else f"{package} {name}"
