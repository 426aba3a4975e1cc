"""Tells a damaged checkpoint from another kind of file, and locates the damage.

It relies on checksums, and never on bytes that may be wrong.
"""

import struct
import zlib
from itertools import pairwise
from types import MappingProxyType

from flaxfit._core.errors import CheckpointCorruptError, CheckpointError
from flaxfit.checkpoint.msgpack_reader import Reader

START = (b"\x83\xa4meta", b"\x84\xa4meta")
TABLE = b"\xa5crc32\x82\xa6leaves"
END = b"\xa5whole\xce"
ENTRY = struct.Struct("<QI")
ADVICE = "Use an older checkpoint, or copy the file again from an intact one."
_FOREIGN = MappingProxyType(
    {
        b"\x80\x02": "a Python pickle",
        b"\x80\x03": "a Python pickle",
        b"\x80\x04": "a Python pickle",
        b"\x80\x05": "a Python pickle",
        b"PK\x03\x04": "a zip file (as .keras, .npz and PyTorch's files are)",
        b"\x89HDF": "an HDF5 file",
        b"\x93NUMPY": "a .npy file",
        b"version https://git-lfs": "a Git LFS pointer: run `git lfs pull`",
        b"<": "an HTML or XML page: a download that failed",
        b"{": "a JSON file",
    }
)


def is_checkpoint(data: bytes) -> bool:
    """Whether `data` is a file of flaxfit, intact or damaged."""
    cut = bool(data) and any(start.startswith(data) for start in START)
    # If the first bytes are damaged, the last ones may still identify the file.
    return cut or data.startswith(START) or data[-len(END) - 4 : -4] == END


def is_intact(data: bytes) -> bool:
    """Whether the last four bytes are the checksum of all others."""
    stored = int.from_bytes(data[-4:], "big")
    return len(data) > 4 and zlib.crc32(memoryview(data)[:-4]) == stored


def looks_like(data: bytes) -> str | None:
    """Returns the kind of another program's file, None if unknown."""
    if data and not data.strip(b"\0"):
        return "nothing: all its bytes are zero, as after a crash or on a full disk"
    return next((k for start, k in _FOREIGN.items() if data.startswith(start)), None)


def damage(data: bytes, path: str) -> CheckpointCorruptError:
    """Returns the error that says where a file of flaxfit is damaged."""
    checksums = "its checksums themselves are damaged"
    table_at = data.rfind(TABLE)
    reader = Reader(data, at=table_at + len(TABLE))
    try:
        table = reader.meta() if table_at >= 0 else None
    except CheckpointError:
        table = None
    end = reader.at + len(END) + 4
    if table is None or end > len(data):
        if data[-len(END) - 4 : -4] == END:
            return error(path, checksums)
        cut = f"it is cut off after {len(data):,} bytes"
        return error(path, cut)
    if end < len(data) and is_intact(data[:end]):
        return error(path, f"{len(data) - end} bytes follow its end")
    marks = [(0, 0)]
    if isinstance(table, bytes) and len(table) % ENTRY.size == 0:
        marks += ENTRY.iter_unpack(table)
    ends = [at for at, _ in marks]
    if len(marks) < 2 or ends != sorted(ends) or ends[-1] > table_at:
        return error(path, checksums)
    view = memoryview(data)
    bad = [
        i
        for i, ((start, before), (stop, after)) in enumerate(pairwise(marks))
        if zlib.crc32(view[start:stop], before) != after
    ]
    if not bad or zlib.crc32(view[: ends[-1]]) == marks[-1][1]:
        return error(path, checksums)
    if bad[0] == 0:
        return error(path, "its description does not match its checksum")
    leaf = _leaf(data, bad[0] - 1)
    more = f", and {len(bad) - 1} more do not either" if len(bad) > 1 else ""
    span = f"bytes {ends[bad[0]]:,} to {ends[bad[0] + 1]:,}"
    found = f"leaf {leaf} ({span}) does not match its checksum{more}"
    return error(path, found, leaf)


def _leaf(data: bytes, index: int) -> str:
    """Returns the path of a leaf from the description, which is intact."""
    try:
        leaves = Reader(data, at=len(START[0])).meta()["leaves"]
        return str(leaves[index]).partition(" ")[2]
    except (CheckpointError, LookupError, TypeError):
        return f"number {index + 1}"


def error(path: str, found: str, leaf: str | None = None) -> CheckpointCorruptError:
    """Returns the error for a damaged file."""
    text = f"{path!r} is damaged: {found}. {ADVICE}"
    return CheckpointCorruptError(text, path=path, leaf=leaf)
