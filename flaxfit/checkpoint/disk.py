"""Writes to the file system: atomic replacement and locks.

It knows nothing of the files' content. Nothing else in flaxfit opens a file to write.
"""

import contextlib
import os
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from flaxfit._core.errors import CheckpointError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

_BUFFER = 2**20
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.tmp", re.DOTALL)
_LOCK = ".lock"


def replace_file(target: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replaces `target` by what `write` writes, all of it or nothing.

    If `target` is a link, the file it points to is replaced. Missing folders are
    created.

    Args:
      target: the file; an old one stays until the new one is safe on the disk.
      write: called with a file open for writing. If it raises, the old file stays and
        the new one is removed.
    """
    target = Path(os.path.realpath(target))
    _make_folder(target.parent)
    temporary, file = _open_temporary(target)
    try:
        with file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to report
            remove(temporary)
        raise
    _sync_folder(target.parent)
    remove_stale(target.parent, target.name)


def remove_stale(folder: Path, name: str | None = None) -> None:
    """Removes the temporary files of writers that died.

    A writer holds a lock on its file, which ends with its process; on a system without
    locks, nothing is removed. `name` is the file that was to be replaced, None for any.
    """
    for path in sorted(folder.glob(".*.tmp")):
        match = _TEMPORARY.fullmatch(path.name)
        if match is None or name not in (None, match["name"]):
            continue
        # Another process may be removing it, or it may belong to another user.
        with contextlib.suppress(OSError), open(path, "r+b") as file:
            if _try_lock(file):
                remove(path)


def remove(path: Path) -> None:
    """Removes a file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Locks `folder` for this process.

    On a system without locks, nothing is locked.

    Raises:
      CheckpointError: the lock is held already.
    """
    _make_folder(folder)
    # Not "w": the file must not be emptied before it is locked.
    with open(folder / _LOCK, "a+b") as file:
        if _try_lock(file) is False:
            file.seek(0)
            holder = file.read(20).decode("ascii", "replace") or "unknown"
            whose = "this process" if holder == str(os.getpid()) else "another process"
            raise CheckpointError(
                f"The folder {str(folder)!r} is being written by {whose} (pid "
                f"{holder})",
                "Wait for it to end, or give another folder",
            )
        file.truncate(0)
        file.write(str(os.getpid()).encode())
        file.flush()
        try:
            yield
        finally:
            _unlock(file)


def probe(folder: Path) -> None:
    """Creates `folder`, writes a test file into it, and removes that file.

    Raises:
      CheckpointError: nothing can be written there; the error gives the reason.
    """
    try:
        _make_folder(folder)
        path = folder / f".probe.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with open(path, "xb") as file:
                file.write(b"flaxfit")
        finally:
            remove(path)
    except OSError as err:
        raise CheckpointError(
            f"Nothing can be written into {str(folder)!r}: {err.strerror or err}"
        ) from err


def _open_temporary(target: Path) -> tuple[Path, BinaryIO]:
    """Returns a new file beside `target`, locked if the system has locks."""
    while True:
        path = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        file = open(path, "xb", buffering=_BUFFER)
        try:
            _try_lock(file)
            # Before it was locked, another process may have removed it as stale.
            if os.name != "posix" or os.fstat(file.fileno()).st_nlink:
                return path, file
        except BaseException:
            file.close()
            remove(path)
            raise
        file.close()


def _make_folder(folder: Path) -> None:
    """Creates `folder` and the folders above it, each synced to the disk."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    """Syncs the names in `folder` to the disk."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(file: BinaryIO) -> bool | None:
    """Returns whether `file` is now locked, None if there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # Some network file systems have no locks.
        return None
    return True


def _unlock(file: BinaryIO) -> None:
    # Closing is not enough: a forked child that has the descriptor keeps the lock.
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(file.fileno(), fcntl.LOCK_UN)


def append(path: Path, data: bytes) -> None:
    """Appends `data` to a file in one call, without an fsync; meant for logs."""
    with open(path, "ab", buffering=0) as file:
        file.write(data)
