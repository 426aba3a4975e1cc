"""A strict reader of msgpack as `flax.serialization` writes it.

It takes only what such files hold, builds nothing before it is paid for out of a
budget, and raises nothing but `CheckpointError`, whatever the bytes are.
"""

import struct
from typing import Any, NamedTuple, NoReturn, TypeAlias

import numpy as np

from flaxfit._core.errors import CheckpointError
from flaxfit._core.types import HostArray
from flaxfit.checkpoint.encoding import CHUNKED, DTYPES, MAX_DEPTH

SLACK = 40 * 2**20
"""What the reader may build of a file beyond the file's own size, in bytes."""

# What CPython takes for them, in bytes, rounded up.
_OBJECT, _ENTRY, _ARRAY = 64, 100, 256

_Head: TypeAlias = tuple[str, int, int]


class CutOffError(CheckpointError):
    """The bytes end before the value does."""


class _Shape(NamedTuple):
    """The fields of Flax's array before its data."""

    shape: tuple[int, ...]
    dtype: "np.dtype[Any]"


def _head_of(byte: int) -> _Head:
    """Returns kind, length of the number that follows, and the number if none does."""
    fixed = (
        (0x00, 0x80, "int"),
        (0x80, 0x90, "map"),
        (0x90, 0xA0, "array"),
        (0xA0, 0xC0, "str"),
    )
    for start, end, kind in fixed:
        if start <= byte < end:
            return kind, 0, byte - start
    if byte >= 0xE0:
        return "int", 0, byte - 0x100
    if 0xD4 <= byte <= 0xD8:
        return "ext", 0, 1 << (byte - 0xD4)
    by_byte = dict(
        [(0xC0, ("nil", 0, 0)), (0xC2, ("bool", 0, 0)), (0xC3, ("bool", 0, 1))]
        + [(0xC4 + i, ("bin", 1 << i, 0)) for i in range(3)]
        + [(0xC7 + i, ("ext", 1 << i, 0)) for i in range(3)]
        + [(0xCA + i, ("float", 4 << i, 0)) for i in range(2)]
        + [(0xCC + i, ("int", 1 << i, 0)) for i in range(4)]
        + [(0xD0 + i, ("signed", 1 << i, 0)) for i in range(4)]
        + [(0xD9 + i, ("str", 1 << i, 0)) for i in range(3)]
        + [(0xDC + i, ("array", 2 << i, 0)) for i in range(2)]
        + [(0xDE + i, ("map", 2 << i, 0)) for i in range(2)]
    )
    return by_byte.get(byte, ("unknown", 0, byte))


_HEADS: tuple[_Head, ...] = tuple(map(_head_of, range(256)))


class Reader:
    """Reads values one after the other.

    Args:
      data: the bytes; arrays are views into them.
      at: where to begin.
      budget: how many bytes may be built, counted as CPython takes them.

    Attributes:
      at: where the next value begins.
    """

    def __init__(self, data: bytes, *, at: int = 0, budget: int | None = None) -> None:
        self._data = data
        self._budget = len(data) + SLACK if budget is None else budget
        self.at = at

    def map_size(self) -> int:
        """Reads the head of a map."""
        kind, size = self._head()
        if kind != "map":
            self._refuse(f"a {kind}, not a map")
        return size

    def name(self) -> str:
        """Reads a string."""
        kind, size = self._head()
        if kind != "str":
            self._refuse(f"a name that is a {kind}")
        return self._text(size)

    def state(self, depth: int = 0) -> Any:
        """Reads nested maps with arrays, scalars, strings and nil in them."""
        kind, size = self._head()
        if kind == "map":
            content = self._map(size, depth, self.state)
            return self._joined(content) if CHUNKED in content else content
        if kind == "ext":
            return self._extension(size)
        if kind == "array":
            self._refuse("a list where Flax writes none")
        return self._scalar(kind, size)

    def meta(self, depth: int = 0) -> Any:
        """Reads nested maps and lists with scalars, strings, bytes and nil in them."""
        kind, size = self._head()
        if kind == "map":
            return self._map(size, depth, self.meta)
        if kind == "array":
            self._check_nested(size, depth)
            self._pay(_OBJECT + 8 * size)
            return [self.meta(depth + 1) for _ in range(size)]
        if kind == "ext":
            self._refuse("an array in the description")
        return self._scalar(kind, size)

    def _map(self, size: int, depth: int, read: Any) -> dict[str, Any]:
        self._check_nested(2 * size, depth)
        self._pay(_OBJECT + _ENTRY * size)
        content: dict[str, Any] = {}
        for _ in range(size):
            name = self.name()
            if name in content:
                self._refuse(f"the name {name[:80]!r} twice")
            content[name] = read(depth + 1)
        return content

    def _scalar(self, kind: str, size: int) -> Any:
        if kind == "str":
            return self._text(size)
        if kind == "bin":
            self._check_there(size)
            self._pay(_OBJECT + size)
            return self._take(size)
        if kind == "nil":
            return None
        if kind == "bool":
            return bool(size)
        if kind in ("int", "float"):
            self._pay(32)
            return size
        return self._refuse(f"an unknown kind of value ({kind} {size})")

    def _extension(self, size: int) -> Any:
        code = self._take(1)[0]
        end = self.at + size
        if end > len(self._data):
            self._cut()
        if code == 2:
            value: Any = self._complex()
        elif code in (1, 3):
            value = self._array()
            if code == 3:
                if value.shape:
                    self._refuse("a scalar that has a shape")
                value = value[()]
        else:
            self._refuse(f"an extension type {code} that Flax does not write")
        if self.at != end:
            self._refuse(f"an array of {size} bytes that says otherwise inside")
        return value

    def _complex(self) -> complex:
        self._pay(_OBJECT)
        parts = [self._head() for _ in range(3)]
        if [kind for kind, _ in parts] != ["array", "float", "float"]:
            self._refuse("a complex number that is none")
        if parts[0][1] != 2:
            self._refuse("a complex number that is none")
        return complex(parts[1][1], parts[2][1])

    def _array(self) -> HostArray:
        self._pay(_ARRAY)
        shape, dtype = self._shape()
        kind, size = self._head()
        count = dtype.itemsize
        for length in shape:
            count *= length
        if kind != "bin" or size != count:
            self._refuse(f"an array {dtype}{list(shape)} of {size} bytes")
        start = self.at
        self._skip(size)
        try:
            # An offset at the very end is out of range for NumPy, empty or not.
            offset = start if size else 0
            return np.ndarray(shape, dtype, self._data, offset)
        except (ValueError, TypeError) as err:
            return self._refuse(f"an array {dtype}{list(shape)[:8]}: {err}")

    def _shape(self) -> _Shape:
        if self._head() != ("array", 3):
            self._refuse("an array without shape, dtype and data")
        kind, ndim = self._head()
        if kind != "array" or ndim > 64:
            self._refuse("an array without a shape")
        lengths = [self._head() for _ in range(ndim)]
        if any(kind != "int" or length < 0 for kind, length in lengths):
            self._refuse("a shape that is none")
        kind, size = self._head()
        if kind not in ("str", "bin") or size > 40:
            self._refuse("a dtype that is none")
        name = self._take(size).decode("ascii", "replace")
        if name not in DTYPES:
            self._refuse(f"the dtype {name!r}, which jax does not have")
        return _Shape(tuple(length for _, length in lengths), DTYPES[name])

    def _joined(self, content: dict[str, Any]) -> HostArray:
        """Puts together an array that Flax has split."""
        shape = self._numbered(content.get("shape"))
        chunks = self._numbered(content.get("chunks"))
        whole = (
            content.keys() == {CHUNKED, "shape", "chunks"}
            and content[CHUNKED] is True
            and all(type(n) is int and n >= 0 for n in shape)
            and bool(chunks)
            and all(isinstance(c, np.ndarray) and c.ndim == 1 for c in chunks)
        )
        if not whole or len({c.dtype for c in chunks}) > 1:
            self._refuse("a split array that is none")
        size = 1
        for length in shape:
            size *= length
        if size != sum(c.size for c in chunks) or len(shape) > 64:
            self._refuse("a split array whose parts do not make it up")
        self._pay(_ARRAY + size * chunks[0].dtype.itemsize)
        try:
            joined: HostArray = np.concatenate(chunks).reshape(shape)
        except ValueError as err:
            return self._refuse(f"a split array: {err}")
        return joined

    def _numbered(self, content: Any) -> list[Any]:
        """Returns the values of a tuple as Flax writes it."""
        if not isinstance(content, dict):
            self._refuse("a split array that is none")
        if list(content) != [str(i) for i in range(len(content))]:
            self._refuse("a split array whose parts are not in order")
        return list(content.values())

    def _head(self) -> tuple[str, Any]:
        """Returns kind and length of the next value, or kind and value of a number."""
        at, data = self.at, self._data
        if at >= len(data):
            self._cut()
        kind, width, number = _HEADS[data[at]]
        self.at = at + 1
        if not width:
            return kind, number
        raw = self._take(width)
        if kind == "float":
            return kind, struct.unpack(">f" if width == 4 else ">d", raw)[0]
        if kind == "signed":
            return "int", int.from_bytes(raw, "big", signed=True)
        return kind, int.from_bytes(raw, "big")

    def _text(self, size: int) -> str:
        self._check_there(size)
        self._pay(_OBJECT + size)
        raw = self._take(size)
        if not raw.isascii():
            self._pay(3 * size)  # One wide character widens all of a string.
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return self._refuse("a string that is no UTF-8")

    def _take(self, size: int) -> bytes:
        start = self.at
        self._skip(size)
        return self._data[start : self.at]

    def _skip(self, size: int) -> None:
        self._check_there(size)
        self.at += size

    def _pay(self, size: int) -> None:
        self._budget -= size
        if self._budget < 0:
            self._refuse("more small values than a file of its size should hold")

    def _check_nested(self, smallest: int, depth: int) -> None:
        if depth > MAX_DEPTH:
            self._refuse(f"values nested more than {MAX_DEPTH} deep")
        self._check_there(smallest)

    def _check_there(self, size: int) -> None:
        if size > len(self._data) - self.at:
            self._cut()

    def _cut(self) -> NoReturn:
        raise CutOffError(f"the bytes end in the middle, at {len(self._data)}")

    def _refuse(self, found: str) -> NoReturn:
        raise CheckpointError(f"at byte {self.at} it holds {found}")
