"""Opens `.npy` and `.npz` files by path, memory-mapped where possible."""

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flaxfit._core.errors import DataError
from flaxfit._core.types import HostArray

SUFFIXES = (".npy", ".npz")
# Of a member of a zip file, before its name: where the lengths of name and extra are.
_LOCAL_HEADER_BYTES = 30
_HEADER_READERS = (
    ((1, 0), np.lib.format.read_array_header_1_0),
    ((2, 0), np.lib.format.read_array_header_2_0),
)


def matches(x: Any) -> bool:
    """Whether `x` is the path of such a file, or what `np.load` made of an `.npz`."""
    return isinstance(x, np.lib.npyio.NpzFile) or (
        isinstance(x, str | Path) and str(x).endswith(SUFFIXES)
    )


def adapt(x: Any) -> Any:
    """Returns the arrays of a file.

    What lies in the file as it is in memory is mapped, and read row by row as it is
    needed; members that are compressed are read as a whole.

    Args:
      x: see `matches`.

    Returns:
      The array of an `.npy`. Of an `.npz` a dict of its arrays by name; those without
      names, as `np.savez(path, x, y)` writes, are a tuple.

    Raises:
      DataError: there is no such file, it is damaged, or holds no numbers.
    """
    if not isinstance(x, np.lib.npyio.NpzFile):
        return _read_path(os.fspath(x))
    path = getattr(x.zip, "filename", None)
    if path is not None and os.path.isfile(path):
        return _read_path(path, ".npz")
    return _arranged("the .npz file", {name: _loaded(x, name) for name in x.files})


def open_files(nest: Any) -> Any:
    """Returns the nesting with the arrays of files in place of their paths.

    Args:
      nest: anything; tuples and mappings are looked into.
    """
    if matches(nest):
        return adapt(nest)
    if isinstance(nest, tuple) and any(map(_holds_file, nest)):
        parts = map(open_files, nest)
        return type(nest)(*parts) if hasattr(nest, "_fields") else tuple(parts)
    if isinstance(nest, Mapping) and any(map(_holds_file, nest.values())):
        return {key: open_files(part) for key, part in nest.items()}
    return nest


def _holds_file(nest: Any) -> bool:
    if isinstance(nest, tuple):
        return any(map(_holds_file, nest))
    if isinstance(nest, Mapping):
        return any(map(_holds_file, nest.values()))
    return matches(nest)


def _read_path(path: str, suffix: str = "") -> Any:
    if not os.path.isfile(path):
        raise DataError(
            f"there is no file {path!r} (the working directory is {os.getcwd()})."
        )
    suffix = suffix or os.path.splitext(path)[1]
    try:
        if suffix == ".npz":
            return _arranged(path, _read_members(path))
        with open(path, "rb") as file:
            mapped = _mapped(path, file, os.path.getsize(path))
        return np.load(path, allow_pickle=False) if mapped is None else mapped
    except DataError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path!r} cannot be read as an {suffix} file: {error}. Write it again, "
            f"{'np.savez(path, x=x, y=y)' if suffix == '.npz' else 'np.save(path, x)'}."
        ) from error


def _read_members(path: str) -> dict[str, HostArray]:
    members = {}
    with open(path, "rb") as file, _opened(file) as loaded:
        for info in loaded.zip.infolist():
            name = info.filename.removesuffix(".npy")
            if name == info.filename:
                continue
            mapped = None
            if info.compress_type == zipfile.ZIP_STORED:
                start = _start_of(file, info)
                file.seek(start)
                mapped = _mapped(path, file, start + info.file_size)
            members[name] = _loaded(loaded, name) if mapped is None else mapped
    return members


def _opened(file: BinaryIO) -> Any:
    """Returns what reads the members of a file."""
    # Not by its path: where that fails, NumPy leaves the file open.
    loaded = np.load(file, allow_pickle=False)
    if not isinstance(loaded, np.lib.npyio.NpzFile):
        raise zipfile.BadZipFile("it is no archive of arrays")
    return loaded


def _start_of(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Returns where the bytes of a member begin."""
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER_BYTES)
    if len(header) < _LOCAL_HEADER_BYTES or header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no member where {info.filename} should be")
    name, extra = struct.unpack("<2H", header[26:30])
    return info.header_offset + _LOCAL_HEADER_BYTES + name + extra


def _mapped(path: str, file: BinaryIO, end: int) -> HostArray | None:
    """Returns the array at the file's position; None for one that has to be loaded.

    Args:
      path: of the file.
      file: the file, where the array's own header begins.
      end: where the array ends.
    """
    version = np.lib.format.read_magic(file)
    readers = [read for known, read in _HEADER_READERS if known == version]
    if not readers:
        return None
    shape, fortran_order, dtype = readers[0](file)
    _refuse_objects(path, dtype)
    start, size = file.tell(), math.prod(shape) * dtype.itemsize
    if end - start != size:
        raise ValueError(f"{end - start} bytes in place of {size}")
    if not size:
        return np.empty(shape, dtype)
    order: Any = "F" if fortran_order else "C"
    return np.memmap(path, dtype, "r", start, shape, order)


def _loaded(loaded: Any, name: str) -> HostArray:
    try:
        array: HostArray = loaded[name]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        _refuse_objects(name, np.dtype(object))
        raise
    _refuse_objects(name, array.dtype)
    return array


def _refuse_objects(name: str, dtype: Any) -> None:
    if dtype.hasobject:
        raise DataError(
            f"{name!r} holds Python objects, which are not read from a file: loading "
            "them would run code that is in it. Save arrays of numbers, "
            "np.save(path, np.stack(rows)); rows of different length padded to one."
        )


def _arranged(path: str, members: dict[str, HostArray]) -> Any:
    if not members:
        raise DataError(f"{path!r} holds no array.")
    lengths = {name: a.shape[0] for name, a in members.items() if a.ndim}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name}: {rows}" for name, rows in lengths.items())
        first = next(iter(members))
        raise DataError(
            f"{path!r} holds arrays of different length, {listed}: which of them are "
            f"the data? Write data = np.load({path!r}), and pass on those that belong "
            f"together: fit(data[{first!r}], ...)."
        )
    if list(members) == [f"arr_{number}" for number in range(len(members))]:
        arrays = tuple(members.values())
        return arrays if len(arrays) > 1 else arrays[0]
    return members
