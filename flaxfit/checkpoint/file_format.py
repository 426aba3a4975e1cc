"""The layout of a checkpoint file: its parts in order, and their checksums.

A file is a msgpack map of "meta", "state", perhaps "extra", and "crc32". Its "state" is
in the format of `flax.serialization`. This module knows neither folders nor templates.

The last four bytes are the CRC-32 of everything before them, also in future formats.
Before them is a table with the offset of the end of meta and of every leaf, and the
CRC-32 of the file up to that offset. One pass over the file computes all of them, and a
damaged leaf is found without interpreting damaged bytes.
"""

import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import msgpack
import numpy as np
from flax import serialization

from flaxfit._core.errors import CheckpointError
from flaxfit._core.types import HostArray
from flaxfit.checkpoint import corruption
from flaxfit.checkpoint.encoding import CHUNKED, NAMES, is_key_node
from flaxfit.checkpoint.msgpack_reader import SLACK, CutOffError, Reader

FORMAT = 1
_SMALL = 2**16
_PIECE = 2**20


class _NewerError(CheckpointError):
    """The file is intact, but its format is newer than this version."""


class Checkpoint(NamedTuple):
    """The content of a file: plain nested dicts with NumPy arrays."""

    path: str
    meta: dict[str, Any]
    state: dict[str, Any]
    extra: dict[str, Any]


def write(
    file: BinaryIO,
    meta: Mapping[str, Any],
    state: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> None:
    """Writes a file leaf by leaf; the arrays are not copied.

    `meta` holds msgpack's own types, `state` and `extra` nested dicts with NumPy
    arrays, scalars and None in them. An empty `extra` is left out of the file.
    """
    writer = _Writer(file)
    writer.add(corruption.START[1] if extra else corruption.START[0])
    writer.value(meta)
    writer.mark()
    writer.value("state")
    writer.tree(state)
    if extra:
        writer.value("extra")
        writer.tree(extra)
    writer.end()


class _Writer:
    """Writes a file and computes its checksums on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._pack = msgpack.Packer(strict_types=True, default=_pack_complex).pack
        self._map_head = msgpack.Packer().pack_map_header
        self._pending = bytearray()
        self._at = 0
        self._crc = 0
        self._table = bytearray()

    def add(self, raw: bytes) -> None:
        self._pending += raw

    def value(self, value: Any) -> None:
        self._pending += self._pack(value)

    def mark(self) -> None:
        """Adds the checksum up to here to the table."""
        self._flush()
        self._table += corruption.ENTRY.pack(self._at, self._crc)

    def tree(self, node: Any, *, marked: bool = True) -> None:
        """Writes nested dicts; if `marked`, adds a checksum after every leaf."""
        if isinstance(node, dict):
            inside = marked and not is_key_node(node)  # a key is one leaf
            self.add(self._map_head(len(node)))
            for name, child in node.items():
                self.value(name)
                self.tree(child, marked=inside)
            marked = marked and not inside
        elif not isinstance(node, np.ndarray):
            self.value(node)
            marked = marked and node is not None
        elif node.nbytes > serialization.MAX_CHUNK_SIZE:
            self.tree(_split(node), marked=False)
        else:
            self._array(node)
        if marked:
            self.mark()

    def end(self) -> None:
        self.add(corruption.TABLE + _head(_BIN, len(self._table)) + self._table)
        self.add(corruption.END)
        self._flush()
        self.add(self._crc.to_bytes(4, "big"))
        self._flush()

    def _array(self, array: HostArray) -> None:
        """Writes an array of any layout."""
        nbytes = array.nbytes
        inner = b"\x93" + self._pack(list(array.shape))
        inner += self._pack(NAMES[array.dtype]) + _head(_BIN, nbytes)
        self.add(_head(_EXT, len(inner) + nbytes) + b"\x01" + inner)
        if nbytes <= _SMALL:
            self.add(array.tobytes())
            return
        self._flush()
        for piece in pieces(array):
            self._put(piece.view(np.uint8).data)

    def _put(self, raw: Any) -> None:
        self._crc = zlib.crc32(raw, self._crc)
        self._file.write(raw)
        self._at += len(raw)

    def _flush(self) -> None:
        if self._pending:
            self._put(bytes(self._pending))
            self._pending.clear()


def _split(array: HostArray) -> dict[str, Any]:
    """Splits a large array as Flax does."""
    size = max(1, int(serialization.MAX_CHUNK_SIZE / array.dtype.itemsize))
    flat = array.reshape(-1)
    starts = enumerate(range(0, flat.size, size))
    return {
        CHUNKED: True,
        "shape": {str(i): length for i, length in enumerate(array.shape)},
        "chunks": {str(i): flat[start : start + size] for i, start in starts},
    }


def pieces(array: HostArray) -> Iterator[HostArray]:
    """Yields the elements in C order, in one-dimensional arrays of about 1 MiB.

    Small pieces stay in the processor's cache from one use to the next.
    """
    parts: Any = np.nditer(
        array,
        ("external_loop", "buffered", "zerosize_ok"),
        order="C",
        buffersize=_PIECE // array.dtype.itemsize,
    )
    yield from parts


# The first byte of each kind with a size of one byte; sizes of 2 and 4 have the next.
_BIN, _EXT = 0xC4, 0xC7


def _head(kind: int, size: int) -> bytes:
    """Returns the head of binary data or an extension, as msgpack writes it."""
    if kind == _EXT and size in (1, 2, 4, 8, 16):
        return bytes([0xD3 + size.bit_length()])
    for byte, width in enumerate((1, 2, 4), kind):
        if size < 1 << (8 * width):
            return bytes([byte]) + size.to_bytes(width, "big")
    raise OverflowError(f"{size} bytes in one piece")


def _pack_complex(value: Any) -> Any:
    if isinstance(value, complex):
        return msgpack.ExtType(2, msgpack.packb((value.real, value.imag)))
    return value


def read(data: bytes, path: str) -> Checkpoint:
    """Checks the checksum of a file, and returns its content.

    Besides the file's bytes, the reader may allocate the size of the file and
    `msgpack_reader.SLACK` more; it refuses a file that needs more before allocating it.

    Raises:
      CheckpointCorruptError: the file is damaged or cut off.
      CheckpointError: the file is of another kind, or its format is newer.
    """
    if not corruption.is_checkpoint(data):
        raise _foreign(data, path)
    if not corruption.is_intact(data):
        raise corruption.damage(data, path)
    reader = Reader(data)
    try:
        parts: dict[str, Any] = {}
        for i in range(reader.map_size()):
            name = reader.name()
            if i == 0 and name == "meta":
                parts["meta"] = _checked_format(reader.meta(), path)
            elif name == "crc32" and name not in parts:
                parts["crc32"] = reader.meta()
            elif name in ("state", "extra") and name not in parts:
                parts[name] = reader.state()
            else:
                raise CheckpointError(f"it has an unexpected part {name[:80]!r}")
        _check_end(reader, data)
        contents = [parts.get("meta"), parts.get("state"), parts.get("extra", {})]
        if not all(isinstance(part, dict) for part in contents):
            raise CheckpointError("its meta, state or extra is not a map")
    except _NewerError:
        raise
    except CheckpointError as err:
        raise CheckpointError(
            f"{path!r} has correct checksums, but was not written by flaxfit: {err}"
        ) from err
    return Checkpoint(path, *contents)


def read_front(data: bytes, size: int, path: str) -> dict[str, Any] | None:
    """Returns meta from the first bytes of a file, None if they do not hold all of it.

    `size` is the size of the whole file.

    Raises:
      CheckpointCorruptError: these bytes are damaged.
      CheckpointError: the format is newer.
    """
    reader = Reader(data, at=len(corruption.START[0]), budget=size + SLACK)
    try:
        meta = reader.meta()
        if not isinstance(meta, dict):
            raise CheckpointError("it is not a map")
    except CutOffError:
        return None
    except CheckpointError as err:
        found = f"its description cannot be read ({err.given})"
        raise corruption.error(path, found) from err
    return _checked_format(meta, path)


def read_plain(data: bytes, path: str) -> Any:
    """Returns the content of a file of plain `flax.serialization`.

    Raises:
      CheckpointError: the file is of another kind.
    """
    if known := corruption.looks_like(data):
        raise CheckpointError(
            f"{path!r} is not a checkpoint; it looks like {known}",
            "Expected a file written by trainer.save(path)",
        )
    if data and (0x90 <= data[0] < 0xA0 or data[0] in (0xDC, 0xDD)):
        raise _not_a_map(path, "list")
    reader = Reader(data)
    try:
        content = reader.state()
        _check_end(reader, data)
    except CheckpointError as err:
        raise CheckpointError(
            f"{path!r} cannot be read: its {len(data)} bytes are not a whole msgpack "
            f"file: {err} It is cut off, damaged, or not written by trainer.save(path)"
        ) from err
    return content


def _check_end(reader: Reader, data: bytes) -> None:
    if reader.at != len(data):
        raise CheckpointError(f"{len(data) - reader.at} bytes follow its end")


def _foreign(data: bytes, path: str) -> CheckpointError:
    """Returns the error for a file that flaxfit did not write."""
    try:
        content = read_plain(data, path)
    except CheckpointError as err:
        return err
    if not isinstance(content, dict):
        return _not_a_map(path, type(content).__name__)
    names = sorted(content)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return CheckpointError(
        f"{path!r} was not written by trainer.save(path): it holds "
        f"{[name[:40] for name in names[:8]]}{more}, as a file of plain "
        "flax.serialization.to_bytes does",
        write="flaxfit.load_params(path) for its parameters, or "
        "flax.serialization.from_bytes(target, data) for all of it",
    )


def _not_a_map(path: str, kind: str) -> CheckpointError:
    return CheckpointError(
        f"{path!r} is not a checkpoint: it holds a {kind}, not a map with 'meta' and "
        "'state'"
    )


def _checked_format(meta: Any, path: str) -> Any:
    """Returns `meta` unless a newer flaxfit has written it."""
    found = meta.get("format") if isinstance(meta, dict) else None
    if type(found) is int and found > FORMAT:
        raise _NewerError(
            f"{path!r} was written by a newer flaxfit (format {found}; this one reads "
            f"{FORMAT}): pip install -U flaxfit"
        )
    return meta
