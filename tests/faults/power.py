"""What is left on a disk when the power fails, out of the calls a save really made.

The model: the content of a file is certain up to its last fsync, the names in a folder
up to the folder's last fsync. Of everything later any subset may be there: names
appear, move and vanish in any order, a file is as it was, empty, cut in half, whole,
or as long as it should be and full of zeros.
"""

import ctypes
import itertools
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import NamedTuple

from tracing import Call, Traced, paths_of

_ROOT = 0
_KNOWN = frozenset(
    "read close dup dup2 dup3 mmap write pwrite64 writev open openat creat mkdir "
    "mkdirat rename renameat renameat2 unlink unlinkat rmdir fsync fdatasync "
    "truncate ftruncate".split()
)


class Created(NamedTuple):
    """A new file, or folder, has a name."""

    identity: int
    folder: int
    name: str
    is_folder: bool


class Written(NamedTuple):
    identity: int
    offset: int
    data: bytes


class Cut(NamedTuple):
    identity: int
    size: int


class Synced(NamedTuple):
    identity: int


class Moved(NamedTuple):
    identity: int
    folder: int
    old: str
    new: str


class Removed(NamedTuple):
    identity: int
    folder: int
    name: str


class Acknowledged(NamedTuple):
    step: int


Operation = Created | Written | Cut | Synced | Moved | Removed | Acknowledged


class Disk(NamedTuple):
    """Folders and files as they are found after the power is back."""

    folders: tuple[str, ...]
    files: dict[str, bytes]

    def write(self, root: Path) -> None:
        """Makes them below `root`, which does not exist."""
        for name in ("", *self.folders):
            (root / name).mkdir(parents=True)
        for name, data in self.files.items():
            (root / name).write_bytes(data)


# Recording


class _Recorder:
    """Turns the calls of a process into operations on files below a folder."""

    def __init__(self, traced: Traced, root: Path) -> None:
        self.operations: list[Operation] = []
        self._traced = traced
        self._root = Path(os.path.realpath(root))
        # By the system's number, which may be given to another file later.
        self._identities = {os.stat(self._root).st_ino: _ROOT}
        self._count = 0

    def note(self, call: Call) -> None:
        """Notes what `call`, which is about to be made, does."""
        first = call.arguments[0]
        if call.name == "write" and first == self._traced.child.acknowledgements:
            data = self._traced.memory(call.arguments[1], 8)
            self.operations.append(Acknowledged(int.from_bytes(data, "little")))
            return
        paths = paths_of(self._traced, call)
        if not any(self._is_below(path) for path in paths):
            return
        assert call.name in _KNOWN, f"the model of a disk has no {call.name}"
        name = call.name.removesuffix("at2").removesuffix("at")
        getattr(self, f"_{name}")(call, *paths)

    def _is_below(self, path: Path) -> bool:
        return path == self._root or self._root in path.parents

    def _open(self, call: Call, path: Path) -> None:
        flags = call.arguments[2 if call.name == "openat" else 1]
        if call.name == "creat":
            flags = os.O_CREAT | os.O_TRUNC
        was_there = path.exists()
        if self._traced.returned() < 0:
            return
        if not was_there:
            self._new(path, is_folder=False)
        elif flags & os.O_TRUNC:
            self.operations.append(Cut(self._identity(path), 0))

    _creat = _open

    def _mkdir(self, call: Call, path: Path) -> None:
        del call
        if self._traced.returned() == 0:
            self._new(path, is_folder=True)

    def _new(self, path: Path, is_folder: bool) -> None:
        self._count += 1
        self._identities[path.stat().st_ino] = self._count
        folder = self._identity(path.parent)
        self.operations.append(Created(self._count, folder, path.name, is_folder))

    def _write(self, call: Call, path: Path) -> None:
        descriptor, address, _, offset = call.arguments[:4]
        if call.name != "pwrite64":
            offset = self._position(descriptor)
        pieces = [(address, 2**62)]
        if call.name == "writev":
            pieces = self._vector(address, call.arguments[2])
        left = self._traced.returned()
        identity = self._identity(Path(f"/proc/{self._traced.pid}/fd/{descriptor}"))
        for start, size in pieces:
            data = self._traced.memory(start, min(size, left)) if left > 0 else b""
            self.operations.append(Written(identity, offset, data))
            offset, left = offset + len(data), left - len(data)
        del path

    _pwrite64 = _writev = _write

    def _position(self, descriptor: int) -> int:
        lines = Path(f"/proc/{self._traced.pid}/fdinfo/{descriptor}").read_text()
        fields = dict(line.split(":", 1) for line in lines.splitlines() if ":" in line)
        if int(fields["flags"], 8) & os.O_APPEND:
            return os.stat(f"/proc/{self._traced.pid}/fd/{descriptor}").st_size
        return int(fields["pos"])

    def _vector(self, address: int, count: int) -> list[tuple[int, int]]:
        data = self._traced.memory(address, 16 * count)
        numbers = (ctypes.c_uint64 * (2 * count)).from_buffer_copy(data)
        return list(zip(numbers[::2], numbers[1::2], strict=True))

    def _truncate(self, call: Call, path: Path) -> None:
        if call.name == "ftruncate":
            path = Path(f"/proc/{self._traced.pid}/fd/{call.arguments[0]}")
        if self._traced.returned() == 0:
            self.operations.append(Cut(self._identity(path), call.arguments[1]))

    _ftruncate = _truncate

    def _fsync(self, call: Call, path: Path) -> None:
        del path
        link = Path(f"/proc/{self._traced.pid}/fd/{call.arguments[0]}")
        if self._traced.returned() == 0:
            self.operations.append(Synced(self._identity(link)))

    _fdatasync = _fsync

    def _rename(self, call: Call, old: Path, new: Path) -> None:
        del call
        identity = self._identity(old)
        assert old.parent == new.parent, "the model of a disk has one folder per move"
        if self._traced.returned() == 0:
            folder = self._identity(old.parent)
            self.operations.append(Moved(identity, folder, old.name, new.name))

    def _unlink(self, call: Call, path: Path) -> None:
        del call
        identity = self._identity(path) if path.exists() else None
        if self._traced.returned() == 0 and identity is not None:
            folder = self._identity(path.parent)
            self.operations.append(Removed(identity, folder, path.name))

    _rmdir = _unlink

    def _identity(self, path: Path) -> int:
        return self._identities[os.stat(path).st_ino]


def record(traced: Traced, root: Path) -> list[Operation]:
    """Runs a traced child to its end; returns what it did to the files below `root`."""
    recorder = _Recorder(traced, root)
    for call in traced.calls():
        recorder.note(call)
    return recorder.operations


# Replaying


@dataclass
class _File:
    is_folder: bool = False
    certain: bytes = b""
    content: bytearray = field(default_factory=bytearray)
    dirty: bool = False

    def possible(self) -> list[bytes]:
        """Every content that could be found, the last certain one first."""
        if not self.dirty:
            return [self.certain]
        now, half = bytes(self.content), len(self.content) // 2
        mixed = now[:half] + self.certain[half:]
        return list(
            dict.fromkeys([self.certain, b"", now[:half], mixed, bytes(len(now)), now])
        )


class _Machine:
    """Files and names, with what is certain of them, at one moment."""

    def __init__(self) -> None:
        self.files = {_ROOT: _File(is_folder=True)}
        self.certain: dict[int, dict[str, int]] = {_ROOT: {}}
        self.pending: dict[int, list[Operation]] = {_ROOT: []}
        self.acknowledged = 0

    def apply(self, operation: Operation) -> None:
        match operation:
            case Acknowledged(step):
                self.acknowledged = step
            case Created(identity, folder, _, is_folder):
                self.files[identity] = _File(is_folder)
                self.certain[identity], self.pending[identity] = {}, []
                self.pending[folder].append(operation)
            case Moved(_, folder, _, _) | Removed(_, folder, _):
                self.pending[folder].append(operation)
            case Written(identity, offset, data):
                file = self.files[identity]
                file.content.extend(bytes(max(0, offset - len(file.content))))
                file.content[offset : offset + len(data)] = data
                file.dirty = True
            case Cut(identity, size):
                file = self.files[identity]
                file.content[size:] = bytes(max(0, size - len(file.content)))
                file.dirty = True
            case Synced(identity):
                file = self.files[identity]
                file.certain, file.dirty = bytes(file.content), False
                _rename_all(self.certain[identity], self.pending[identity])
                self.pending[identity] = []

    def choices(self) -> list[tuple[str, int, Sequence[object]]]:
        """What is uncertain: names by folder, contents by file, with all values."""
        found: list[tuple[str, int, Sequence[object]]] = []
        for folder, operations in self.pending.items():
            if operations:
                found.append(("names", folder, list(_subsets(operations))))
        for identity, file in self.files.items():
            if file.dirty:
                found.append(("content", identity, file.possible()))
        return found

    def disk(self, chosen: dict[tuple[str, int], object]) -> Disk:
        """The disk on which the uncertain came out as `chosen`."""
        folders: list[str] = []
        files: dict[str, bytes] = {}

        def walk(folder: int, prefix: str) -> None:
            names = dict(self.certain[folder])
            _rename_all(names, chosen.get(("names", folder), ()))  # type: ignore
            for name, identity in names.items():
                path = f"{prefix}{name}"
                if self.files[identity].is_folder:
                    folders.append(path)
                    walk(identity, f"{path}/")
                else:
                    certain = self.files[identity].certain
                    content = chosen.get(("content", identity), certain)
                    files[path] = content  # type: ignore

        walk(_ROOT, "")
        return Disk(tuple(folders), files)


def disks_after(
    operations: Sequence[Operation], most: int, chance: random.Random
) -> tuple[list[Disk], int]:
    """Returns the disks these operations may leave, and what was acknowledged.

    All of them where they are not more than `most`, else so many drawn by chance.
    """
    machine = _Machine()
    for operation in operations:
        machine.apply(operation)
    choices = machine.choices()
    keys = [(kind, identity) for kind, identity, _ in choices]
    values = [options for _, _, options in choices]
    if prod(map(len, values)) <= most:
        chosen = list(itertools.product(*values))
    else:
        chosen = [tuple(chance.choice(v) for v in values) for _ in range(most)]
    disks = [machine.disk(dict(zip(keys, c, strict=True))) for c in chosen]
    distinct = {(d.folders, tuple(sorted(d.files.items()))): d for d in disks}
    return list(distinct.values()), machine.acknowledged


def _rename_all(names: dict[str, int], operations: Sequence[Operation]) -> None:
    """Changes the names of a folder as the operations say, those that happened."""
    for operation in operations:
        match operation:
            case Created(identity, _, name, _):
                names[name] = identity
            case Moved(identity, _, old, new):
                if names.get(old) == identity:
                    del names[old]
                names[new] = identity
            case Removed(identity, _, name):
                if names.get(name) == identity:
                    del names[name]


def _subsets(operations: Sequence[Operation]) -> Iterator[tuple[Operation, ...]]:
    for size in range(len(operations) + 1):
        yield from itertools.combinations(operations, size)
