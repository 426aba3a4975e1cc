"""One process watched at every system call: killed there, or told that it failed.

By ptrace, so it does not matter how the code under test reaches the file system. Linux
on x86-64 and arm64 only; `harness.SkippedError` elsewhere, and where a container
forbids it.
"""

import ctypes
import functools
import os
import platform
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from harness import Child, SkippedError

_TRACEME, _SYSCALL, _SETOPTIONS = 0, 24, 0x4200
_GETREGSET, _SETREGSET, _GET_SYSCALL_INFO = 0x4204, 0x4205, 0x420E
_GOOD_STOPS, _EXIT_KILL = 0x1, 0x100000
_STOP = signal.SIGTRAP | 0x80
_ENTRY = 1
_GENERAL_REGISTERS, _ARM_SYSTEM_CALL = 1, 0x404
_AT_FDCWD = -100

# Those that can change what is on the disk, or that make descriptors of files.
_NUMBERS = {
    "x86_64": {
        0: "read", 1: "write", 2: "open", 3: "close", 18: "pwrite64", 20: "writev",
        74: "fsync", 75: "fdatasync", 76: "truncate", 77: "ftruncate", 82: "rename",
        83: "mkdir", 84: "rmdir", 85: "creat", 86: "link", 87: "unlink",
        88: "symlink", 257: "openat", 258: "mkdirat", 263: "unlinkat",
        264: "renameat", 265: "linkat", 266: "symlinkat", 285: "fallocate",
        296: "pwritev", 316: "renameat2", 328: "pwritev2", 326: "copy_file_range",
        40: "sendfile", 162: "sync", 306: "syncfs", 32: "dup", 33: "dup2",
        292: "dup3", 9: "mmap",
    },
    "aarch64": {
        63: "read", 64: "write", 57: "close", 68: "pwrite64", 66: "writev",
        82: "fsync", 83: "fdatasync", 45: "truncate", 46: "ftruncate", 34: "mkdirat",
        37: "linkat", 35: "unlinkat", 36: "symlinkat", 56: "openat", 38: "renameat",
        47: "fallocate", 70: "pwritev", 276: "renameat2", 287: "pwritev2",
        285: "copy_file_range", 71: "sendfile", 81: "sync", 267: "syncfs", 23: "dup",
        24: "dup3", 222: "mmap",
    },
}  # fmt: skip


class Call(NamedTuple):
    """One system call a process is about to make.

    Attributes:
      index: how many it made before, since it was stopped first.
      name: its name where it has to do with files, else its number as a text.
      arguments: the six numbers.
    """

    index: int
    name: str
    arguments: tuple[int, ...]


class _Info(ctypes.Structure):
    """`struct ptrace_syscall_info` at the entry of a call."""

    _fields_ = (
        ("op", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("instruction", ctypes.c_uint64),
        ("stack", ctypes.c_uint64),
        ("number", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6),
    )


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class Traced:
    """A child that is stopped at each of its system calls.

    Args:
      function: as `Child` takes it; run from its first system call on under watch.
      args: its arguments.
      warm: called in the child before it is watched.

    Raises:
      SkippedError: this machine does not allow it.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *args: Any,
        warm: Callable[[], None] = lambda: None,
    ) -> None:
        machine = platform.system(), platform.machine()
        if machine[0] != "Linux" or machine[1] not in _NUMBERS:
            raise SkippedError(f"no tracing on {' '.join(machine)}")
        self._names = _NUMBERS[platform.machine()]
        self.child = Child(function, *args, prepare=partial(_let_be_traced, warm))
        self.pid = self.child.pid
        _, status = os.waitpid(self.pid, 0)
        if not os.WIFSTOPPED(status):
            self.child.reap(status)
            raise SkippedError("ptrace is not permitted here")
        _ptrace(_SETOPTIONS, self.pid, 0, _GOOD_STOPS | _EXIT_KILL)

    def calls(self) -> Iterator[Call]:
        """Yields each call at its entry, before it has any effect, until the end."""
        index = 0
        while self._next_stop():
            info = self._info()
            if info.op != _ENTRY:
                continue
            name = self._names.get(info.number, str(info.number))
            yield Call(index, name, tuple(info.arguments))
            if self.child.status is not None:
                return
            index += 1

    def kill(self) -> None:
        """SIGKILL where it stands: the call it is about to make is not made."""
        os.kill(self.pid, signal.SIGKILL)
        while True:
            _, status = os.waitpid(self.pid, 0)
            if not os.WIFSTOPPED(status):
                break
        self.child.reap(status)

    def fail(self, errno: int) -> None:
        """Makes the call it is about to make fail with `errno`, without effect."""
        self._set_number(-1)
        if self._next_stop():
            self._set_result(-errno)

    def returned(self) -> int:
        """Lets the call it is about to make happen; returns what it returned."""
        if not self._next_stop():
            return 0
        number = self._info().number  # At the exit of a call: its result.
        return ctypes.c_int64(number).value

    def memory(self, address: int, size: int) -> bytes:
        """Reads the memory of the process."""
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as file:
            file.seek(address)
            return file.read(size)

    def text(self, address: int) -> str:
        """Reads a C string of the process."""
        data = b""
        while b"\0" not in data:
            place = address + len(data)
            data += self.memory(place, min(256, 4096 - place % 4096))
        return os.fsdecode(data.split(b"\0")[0])

    def path_of(self, descriptor: int, name: int | None = None) -> Path | None:
        """Returns the path a descriptor, and a C string below it, stand for."""
        number = ctypes.c_int32(descriptor & 0xFFFFFFFF).value
        link = "cwd" if number == _AT_FDCWD else f"fd/{number}"
        text = "" if name is None else self.text(name)
        if os.path.isabs(text):
            return Path(os.path.normpath(text))
        try:
            base = os.readlink(f"/proc/{self.pid}/{link}")
        except OSError:
            return None
        if not base.startswith("/"):
            return None
        return Path(os.path.normpath(os.path.join(base, text)))

    def _next_stop(self) -> bool:
        """Goes on to the next entry or exit; False once the process has ended."""
        deliver = 0
        while True:
            _ptrace(_SYSCALL, self.pid, 0, deliver)
            _, status = os.waitpid(self.pid, 0)
            if not os.WIFSTOPPED(status):
                self.child.reap(status)
                return False
            if os.WSTOPSIG(status) == _STOP:
                return True
            deliver = os.WSTOPSIG(status)

    def _info(self) -> _Info:
        info = _Info()
        size = ctypes.sizeof(info)
        _ptrace(_GET_SYSCALL_INFO, self.pid, size, ctypes.addressof(info))
        return info

    def _set_number(self, number: int) -> None:
        if platform.machine() == "aarch64":
            value = ctypes.c_int32(number)
            vector = _Vector(ctypes.addressof(value), ctypes.sizeof(value))
            where = ctypes.addressof(vector)
            _ptrace(_SETREGSET, self.pid, _ARM_SYSTEM_CALL, where)
        else:
            self._set_register(15, number)  # orig_rax

    def _set_result(self, value: int) -> None:
        self._set_register(0 if platform.machine() == "aarch64" else 10, value)

    def _set_register(self, index: int, value: int) -> None:
        registers = (ctypes.c_uint64 * 64)()
        vector = _Vector(ctypes.addressof(registers), ctypes.sizeof(registers))
        where = ctypes.addressof(vector)
        _ptrace(_GETREGSET, self.pid, _GENERAL_REGISTERS, where)
        registers[index] = value & (2**64 - 1)
        _ptrace(_SETREGSET, self.pid, _GENERAL_REGISTERS, where)


def file_calls(traced: Traced, folder: Path) -> Iterator[Call]:
    """Yields the calls that touch a file in `folder`, or folders above it by name."""
    for call in traced.calls():
        if any(_within(path, folder) for path in paths_of(traced, call)):
            yield call


def paths_of(traced: Traced, call: Call) -> list[Path]:
    """Returns the files a call is about; none for calls that only read."""
    one, two, three, four, *_ = call.arguments
    if call.name in ("write", "pwrite64", "writev", "pwritev", "pwritev2", "fsync",
                     "fdatasync", "ftruncate", "fallocate", "sendfile"):  # fmt: skip
        found = [traced.path_of(one)]
    elif call.name == "copy_file_range":
        found = [traced.path_of(three)]
    elif call.name in ("open", "creat", "truncate", "mkdir", "rmdir", "unlink"):
        found = [traced.path_of(_AT_FDCWD, one)]
    elif call.name in ("rename", "link"):
        found = [traced.path_of(_AT_FDCWD, one), traced.path_of(_AT_FDCWD, two)]
    elif call.name in ("openat", "mkdirat", "unlinkat"):
        found = [traced.path_of(one, two)]
    elif call.name in ("renameat", "renameat2", "linkat"):
        found = [traced.path_of(one, two), traced.path_of(three, four)]
    else:
        found = []
    return [path for path in found if path is not None]


def _within(path: Path, folder: Path) -> bool:
    return path == folder or folder in path.parents


def _let_be_traced(warm: Callable[[], None]) -> None:
    """In the child: asks to be traced and stops until the parent is ready."""
    warm()
    _ptrace(_TRACEME, 0, 0, 0)
    os.kill(os.getpid(), signal.SIGSTOP)


def _ptrace(request: int, pid: int, address: int, data: int) -> int:
    result = _library().ptrace(request, pid, address, data)
    if result == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"ptrace({request:#x}): {os.strerror(error)}")
    return int(result)


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.ptrace.restype = ctypes.c_long
    number, pointer = ctypes.c_long, ctypes.c_void_p
    library.ptrace.argtypes = [number, number, pointer, pointer]
    return library
