"""Opens `.npy` files as memory maps, and reads `.npz` files into memory.

Data that does not fit into memory should be stored as `.npy` files or as zarr.
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
    """Whether `x` is the path of a `.npy` or `.npz` file, or a loaded `.npz` file."""
    return isinstance(x, np.lib.npyio.NpzFile) or (
        isinstance(x, str | Path) and str(x).endswith(SUFFIXES)
    )


def adapt(x: Any) -> Any:
    """Returns the arrays of a file.

    A `.npy` file is memory-mapped: its rows are read when they are needed. A `.npz`
    file is read as a whole.

    Returns:
      The array of a `.npy` file; for a `.npz` file, a dict of its arrays by name. If
      they have no names, as after `np.savez(path, x, y)`, a tuple, or the only array.

    Raises:
      DataError: the file does not exist, is damaged, holds Python objects or no array,
        or arrays of different length.
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
        if not zipfile.is_zipfile(path):  # NumPy would load it as a pickle
            raise zipfile.BadZipFile("it is not an archive of arrays")
        # Opened here, as NumPy would leave the file open after an error.
        with open(path, "rb") as file, np.load(file) as loaded:
            members = _members(loaded)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        # NumPy's messages for a member of a `.npz` file, and for a `.npy` file.
        if str(error).startswith(("Object arrays", "Array can't be memory-mapped")):
            raise DataError(
                f"{path!r} holds Python objects: loading them could run code from the "
                "file",
                "Expected arrays of numbers; pad rows to one length.",
                "np.save(path, np.stack(rows))",
            ) from error
        save = "np.save(path, x)" if suffix == ".npy" else "np.savez(path, x=x, y=y)"
        raise DataError(
            f"{path!r} cannot be read as a {suffix} file: {error}", write=save
        ) from error
    return _arranged(path, members)


def _members(loaded: Any) -> dict[str, HostArray]:
    # An archive may hold other files, which NumPy returns as bytes.
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
            "Pass the arrays that belong together.",
            f"data = np.load({path!r}); fit(data[{next(iter(members))!r}], ...)",
        )
    if list(members) == [f"arr_{number}" for number in range(len(members))]:
        arrays = tuple(members.values())
        return arrays if len(arrays) > 1 else arrays[0]
    return members
