"""Saves and loads a TrainState as one file. Knows nothing of models.

The file is a msgpack map `{"meta": ..., "state": ..., "crc32": ...}`. Its `state` is in
the format of `flax.serialization`, so that Flax alone can read it too.
"""

import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxfit._core.errors import CheckpointError
from flaxfit._core.types import PyTree, TrainState
from flaxfit.checkpoint import corruption, disk, encoding, file_format
from flaxfit.checkpoint.encoding import joined
from flaxfit.checkpoint.file_format import Checkpoint
from flaxfit.checkpoint.msgpack_reader import SLACK
from flaxfit.checkpoint.restore import FIELDS

_FRONT = 2**16
_PIECE = 2**23
# How many bytes the reader may build for each leaf, see `msgpack_reader`.
_PER_LEAF = 1024


class Snapshot(NamedTuple):
    """A state on the host, ready to be written by any thread.

    Attributes:
      state: nested dicts with NumPy arrays, scalars and None in them; a typed key is
        `{"key_data": ..., "key_impl": ...}`.
      extra: other saved arrays, in the same form.
      leaves: a line for each leaf in the order of the file, such as
        `"float32[784,128] params/Dense_0/kernel"`, with a `~` before weak types.
      nbytes: the total size of the arrays.
    """

    state: dict[str, Any]
    extra: dict[str, Any]
    leaves: tuple[str, ...]
    nbytes: int


def snapshot(
    state: TrainState | Mapping[str, PyTree],
    extra: Mapping[str, PyTree] | None = None,
    *,
    copy: bool,
) -> Snapshot:
    """Moves a state to the host.

    Args:
      state: a `TrainState`, or some of its fields by name. Its leaves must be numeric
        arrays, scalars or typed PRNG keys.
      extra: more arrays, by name.
      copy: whether to copy the arrays, so that the snapshot stays valid when the
        state is donated to a step. Without a copy, write the snapshot before that.

    Raises:
      CheckpointError: something cannot be written; the error names its path.
    """
    fields = _fields(state)
    others = dict(extra or {})
    encoding.start_copies((fields, others))
    encoder = encoding.Encoder(copy=copy)
    encoded = encoder.encode(fields, ())
    more = encoder.encode(others, ("extra",)) if others else {}
    # The reader would refuse the file, which would exceed its memory budget.
    if len(encoder.leaves) * _PER_LEAF > encoder.nbytes + SLACK:
        raise CheckpointError(
            f"Cannot write {len(encoder.leaves):,} leaves of {encoder.nbytes:,} bytes "
            "in total: these are too many small leaves. Stack them into larger arrays"
        )
    return Snapshot(encoded, more, tuple(encoder.leaves), encoder.nbytes)


def check_writable(state_template: TrainState | Mapping[str, PyTree]) -> None:
    """Checks, without values, that a state can be written and read back.

    Args:
      state_template: a state of arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      CheckpointError: something cannot be written or read back; the error names its
        path.
    """
    fields = _fields(state_template)
    encoder = encoding.Encoder(abstract=True)
    encoded = encoder.encode(fields, ())
    written = {path for path, _ in encoding.leaves_of(encoded, ())}
    leaves, _ = jax.tree_util.tree_flatten_with_path(fields)
    wanted = {encoding.path_of(path) for path, _ in leaves}
    for path in sorted(written ^ wanted):
        where = "Flax but not jax" if path in written else "jax but not Flax"
        raise CheckpointError(
            f"Cannot write {joined(path)}: {where} has a leaf of this name, so it "
            "could not be read back. Keep it outside of the state"
        )


def _fields(state: TrainState | Mapping[str, PyTree]) -> dict[str, Any]:
    if isinstance(state, TrainState):
        return {name: getattr(state, name) for name in FIELDS}
    return dict(state)


def nonfinite_leaf(snapshot: Snapshot) -> str | None:
    """Returns the path of the first leaf that is not finite, None if all are.

    An infinity counts only in the parameters: one in the collections or the optimizer's
    state may be intended.
    """
    for field in ("params", "collections", "opt_state"):
        for path, leaf in encoding.leaves_of(snapshot.state.get(field), (field,)):
            if _is_nonfinite(leaf, infinite=field == "params"):
                return joined(path)
    return None


def _is_nonfinite(leaf: Any, *, infinite: bool) -> bool:
    if isinstance(leaf, (float, complex)):
        leaf = np.asarray(leaf)
    if not isinstance(leaf, np.ndarray) or not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return False
    small = leaf.dtype.kind == "V" or leaf.dtype.itemsize < 4
    with np.errstate(all="ignore"):
        for piece in file_format.pieces(leaf):
            values = piece.astype(np.float32) if small else piece
            # A finite sum has finite terms, and is faster than an array of bools.
            total = values.sum()
            if math.isfinite(total.real) and math.isfinite(total.imag):
                continue
            if (~np.isfinite(values) if infinite else np.isnan(values)).any():
                return True
    return False


def write(
    path: str | os.PathLike[str], snapshot: Snapshot, meta: Mapping[str, Any]
) -> None:
    """Writes a snapshot into one file, all of it or nothing.

    Args:
      path: the file; missing folders are created. An old file is replaced only when the
        new one is safe on the disk.
      snapshot: what `snapshot` returned.
      meta: `dict`, `list`, `str`, `bytes`, numbers, `bool` and `None`, in any
        nesting. A tuple comes back as a list. The writer adds "format" and "leaves".

    Raises:
      CheckpointError: something cannot be written, and the error names its path; or
        `path` is a folder.
      OSError: writing failed, for example because the disk is full.
    """
    name = os.fspath(path)
    if os.path.isdir(name):
        raise CheckpointError(
            f"{name!r} is a folder; give the file to write, for example "
            f"{os.path.join(name, 'run.msgpack')!r}"
        )
    described = encoding.encode_meta(meta, ("meta",))
    described |= {"format": file_format.FORMAT, "leaves": list(snapshot.leaves)}
    try:
        disk.replace_file(
            Path(name),
            lambda file: file_format.write(
                file, described, snapshot.state, snapshot.extra
            ),
        )
    except UnicodeEncodeError as err:
        raise CheckpointError(
            f"Cannot write the text {err.object!r}: it is not valid Unicode"
        ) from err


def save(
    path: str | os.PathLike[str],
    state: TrainState | Mapping[str, PyTree],
    meta: Mapping[str, Any],
    *,
    extra: Mapping[str, PyTree] | None = None,
) -> None:
    """Writes `state`, `meta` and `extra` into one file; see `snapshot` and `write`."""
    write(path, snapshot(state, extra, copy=False), meta)


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads a file that `save` wrote; pass its `state` to `restore`.

    The arrays are views into the file's bytes. Whatever the file contains, the reader
    allocates at most the size of the file and 40 MiB more.

    Raises:
      CheckpointCorruptError: the file is damaged or cut off; the error says where.
      CheckpointError: the file is missing or not a checkpoint; the message says what
        it looks like.
    """
    name = os.fspath(path)
    return file_format.read(read_bytes(name), name)


def read_meta(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the description at the front of a file, however long that is.

    This does not check the checksum; `verify` does.

    Raises:
      CheckpointCorruptError: the description is damaged or cut off.
      CheckpointError: the file is missing or not a checkpoint.
    """
    name = os.fspath(path)
    length = _FRONT
    while True:
        data, size = _read_some(name, length)
        if not data.startswith(corruption.START):
            return file_format.read(read_bytes(name), name).meta  # raises, and says why
        meta = file_format.read_front(data, size, name)
        if meta is not None:
            return meta
        if length >= size:
            raise corruption.damage(data, name)
        length *= 8


def verify(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Checks the checksum of a file, in little memory, and returns its meta.

    Raises:
      CheckpointCorruptError: the file is damaged or cut off; the error says where.
      CheckpointError: the file is missing or not a checkpoint.
    """
    name = os.fspath(path)
    meta = read_meta(name)
    crc, last = 0, b""
    try:
        with open(name, "rb") as file:
            while piece := file.read(_PIECE):
                # The last four bytes are the checksum of the bytes before them.
                piece = last + piece
                crc = zlib.crc32(memoryview(piece)[:-4], crc)
                last = piece[-4:]
    except OSError as err:
        raise _unreadable(name, err) from err
    if crc.to_bytes(4, "big") != last:
        raise corruption.damage(read_bytes(name), name)
    return meta


def load_params(path: str | os.PathLike[str]) -> PyTree:
    """Reads the parameters of a checkpoint or of a file of plain Flax.

    Args:
      path: a file of flaxfit, or `flax.serialization.to_bytes` of a tree of
        parameters, of `{"params": ..., "batch_stats": ...}` or of a `TrainState`.

    Returns:
      Nested dicts with NumPy arrays, which are copies.

    Raises:
      CheckpointCorruptError: the file was written by flaxfit and is damaged.
      CheckpointError: the file is missing, or of another kind.
    """
    return load_variables(path)["params"]


def load_variables(path: str | os.PathLike[str]) -> dict[str, PyTree]:
    """Reads the variables that `module.apply` takes; see `load_params`.

    Returns:
      `{"params": ..., "collections": {"batch_stats": ...}}`; a file of plain parameters
      has no collections.
    """
    name = os.fspath(path)
    data = read_bytes(name)
    collections: dict[str, PyTree] = {}
    if corruption.is_checkpoint(data):
        content: Any = file_format.read(data, name).state
        collections = content.get("collections", {})
        content = content.get("params")
    else:
        content = file_format.read_plain(data, name)
    # Some programs keep all variables in the params of their TrainState.
    while isinstance(content, dict) and isinstance(content.get("params"), dict):
        others = content.keys() - {"params", "opt_state", "tx"}
        collections |= {n: content[n] for n in others if isinstance(content[n], dict)}
        content = content["params"]
    leaves = dict(encoding.leaves_of(content, ()))
    foreign = [
        path
        for path, leaf in leaves.items()
        if getattr(leaf, "dtype", None) not in encoding.NAMES
    ]
    if foreign or not leaves or not isinstance(content, dict):
        what = joined(foreign[0]) if foreign else "its content"
        raise CheckpointError(
            f"{name!r} holds no parameters: {what} is not an array",
            "Expected nested dicts of arrays, alone or under 'params'",
        )
    variables: dict[str, PyTree] = jax.tree.map(
        np.array, {"params": content, "collections": collections}
    )
    return variables


def read_bytes(name: str) -> bytes:
    """Returns the bytes of a file; raises CheckpointError if it cannot be read."""
    return _read_some(name, None)[0]


def _read_some(name: str, length: int | None) -> tuple[bytes, int]:
    """Returns the first `length` bytes of a file, None for all, and its size."""
    if os.path.isdir(name):
        raise CheckpointError(f"{name!r} is a folder; give the file that was saved")
    try:
        with open(name, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return file.read(-1 if length is None else length), size
    except FileNotFoundError as err:
        raise CheckpointError(f"There is no file {name!r}") from err
    except (OSError, MemoryError, ValueError) as err:
        raise _unreadable(name, err) from err


def _unreadable(name: str, err: BaseException) -> CheckpointError:
    return CheckpointError(f"{name!r} cannot be read: {err or type(err).__name__}")
