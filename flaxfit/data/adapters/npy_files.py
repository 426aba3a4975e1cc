"""Opens `.npy` files, memory-mapped, and `.npz` files, which are read into memory.

Data that does not fit into memory is better stored as `.npy` files or as zarr.
"""

import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flaxfit._core.errors import DataError
from flaxfit._core.types import HostArray

SUFFIXES = (".npy", ".npz")


def matches(x: Any) -> bool:
    """Whether `x` is the path of such a file, or what `np.load` made of an `.npz`."""
    return isinstance(x, np.lib.npyio.NpzFile) or (
        isinstance(x, str | Path) and str(x).endswith(SUFFIXES)
    )


def adapt(x: Any) -> Any:
    """Returns the arrays of a file.

    An `.npy` is memory-mapped: its rows are read as they are needed. An `.npz` is read
    as a whole.

    Returns:
      The array of an `.npy`. Of an `.npz` a dict of its arrays by name; those without
      names, as `np.savez(path, x, y)` writes, are a tuple.

    Raises:
      DataError: there is no such file, it is damaged, or holds no numbers.
    """
    if isinstance(x, np.lib.npyio.NpzFile):
        return _arranged("the .npz file", _members(x))
    return _read_path(os.fspath(x))


def open_files(nest: Any) -> Any:
    """Returns a nesting of tuples and mappings with arrays in place of file paths."""
    if matches(nest):
        return adapt(nest)
    if not _holds_file(nest):
        return nest
    if isinstance(nest, Mapping):
        return {key: open_files(part) for key, part in nest.items()}
    parts = map(open_files, nest)
    return type(nest)(*parts) if hasattr(nest, "_fields") else tuple(parts)


def _holds_file(nest: Any) -> bool:
    if isinstance(nest, tuple | Mapping):
        parts = nest.values() if isinstance(nest, Mapping) else nest
        return any(map(_holds_file, parts))
    return matches(nest)


def _read_path(path: str) -> Any:
    if not os.path.isfile(path):
        raise DataError(
            f"there is no file {path!r} (the working directory is {os.getcwd()})"
        )
    suffix = os.path.splitext(path)[1]
    try:
        if suffix == ".npy":
            return np.lib.format.open_memmap(path, mode="r")
        if not zipfile.is_zipfile(path):  # NumPy would take it for a pickle
            raise zipfile.BadZipFile("it is no archive of arrays")
        # Not by its path: where that fails, NumPy leaves the file open.
        with open(path, "rb") as file, np.load(file) as loaded:
            members = _members(loaded)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        # NumPy's words for a member of an archive, and for a file of its own.
        if str(error).startswith(("Object arrays", "Array can't be memory-mapped")):
            raise DataError(
                f"{path!r} holds Python objects: loading them would run code of the "
                "file",
                "Expected arrays of numbers; pad rows of different length to one.",
                "np.save(path, np.stack(rows))",
            ) from error
        save = "np.save(path, x)" if suffix == ".npy" else "np.savez(path, x=x, y=y)"
        raise DataError(
            f"{path!r} cannot be read as an {suffix} file: {error}", write=save
        ) from error
    return _arranged(path, members)


def _members(loaded: Any) -> dict[str, HostArray]:
    # An archive may hold other files, which are read as bytes.
    members = {name: loaded[name] for name in loaded.files}
    return {n: each for n, each in members.items() if isinstance(each, np.ndarray)}


def _arranged(path: str, members: dict[str, HostArray]) -> Any:
    if not members:
        raise DataError(f"{path!r} holds no array")
    lengths = {name: a.shape[0] for name, a in members.items() if a.ndim}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name}: {rows}" for name, rows in lengths.items())
        raise DataError(
            f"{path!r} holds arrays of different length, {listed}",
            "Give those that belong together.",
            f"data = np.load({path!r}); fit(data[{next(iter(members))!r}], ...)",
        )
    if list(members) == [f"arr_{number}" for number in range(len(members))]:
        arrays = tuple(members.values())
        return arrays if len(arrays) > 1 else arrays[0]
    return members
