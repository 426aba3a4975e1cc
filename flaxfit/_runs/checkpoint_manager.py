"""Scans, verifies and prunes a folder of checkpoints. Needs no index."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from flaxfit import checkpoint
from flaxfit._core.errors import CheckpointCorruptError, CheckpointError
from flaxfit.checkpoint import disk

BEST = "best.msgpack"
HISTORY = "history.json"
LOG = "log.jsonl"
_STEPS = "step-*.msgpack"
# With only one, damage to it would lose the run.
_KEEP = 2


def step_file(folder: Path, step: int) -> Path:
    """Returns the path of the checkpoint of a step."""
    return folder / f"step-{step:010d}.msgpack"


def newest(folder: Path) -> checkpoint.Checkpoint | None:
    """Returns the intact checkpoint of the highest step, None without any.

    Damaged checkpoints are passed over with a warning. The step is taken from the
    content of a file, not from its name.

    Raises:
      CheckpointError: there are checkpoints, and none of them can be read.
    """
    while True:
        found, damaged, vanished = _scan(folder)
        if found is not None:
            return found
        if damaged:
            raise CheckpointError(
                f"Of the {len(damaged)} checkpoints in {os.fspath(folder)!r} none can "
                'be read. fit(..., resume="never") starts over, and moves them into a '
                f"subfolder; the last error was: {damaged[-1]}"
            )
        if not vanished:
            return None
        # Their writer has removed all of them meanwhile, and has written newer ones.


def _scan(folder: Path) -> tuple[checkpoint.Checkpoint | None, list[str], bool]:
    """Returns the newest readable checkpoint, errors, and whether a file vanished."""
    candidates: list[tuple[int, bool, Path]] = []
    damaged: list[str] = []
    vanished = False
    for file in sorted(folder.glob("*.msgpack")):
        try:
            meta = checkpoint.read_meta(file)
            step = resumable_step(meta)
            # `meta` is not verified yet: a damaged step would sort the file wrongly.
            named = step is not None and file == step_file(folder, step)
            if not named and (step is None or file.match(_STEPS)):
                checkpoint.verify(file)
        except CheckpointError as error:
            vanished |= not _passed_over(file, error, damaged)
            continue
        if step is not None:
            candidates.append((step, file.match(_STEPS), file))
    for *_, file in sorted(candidates, reverse=True):
        try:
            return checkpoint.load(file), damaged, vanished
        except CheckpointError as error:
            vanished |= not _passed_over(file, error, damaged)
    return None, damaged, vanished


def resumable_step(meta: dict[str, Any]) -> int | None:
    """Returns the step of a checkpoint that can be resumed, else None."""
    loop = meta.get("loop")
    if not isinstance(loop, dict) or meta.get("contents") == "weights":
        return None
    step = loop.get("step")
    return step if isinstance(step, int) else None


def _passed_over(file: Path, error: CheckpointError, damaged: list[str]) -> bool:
    """Warns of a file that cannot be read; returns False if it is gone."""
    if not file.exists():
        return False
    damaged.append(str(error))
    kind = "damaged" if isinstance(error, CheckpointCorruptError) else "unreadable"
    warnings.warn(
        f"{os.fspath(file)!r} is {kind} and passed over: {error}",
        UserWarning,
        stacklevel=4,
    )
    return True


def prune(folder: Path) -> None:
    """Removes all but the checkpoints of the two highest steps.

    Called when the newest is safe on the disk, so that one is always left.
    """
    for file in sorted(folder.glob(_STEPS))[:-_KEEP]:
        disk.remove(file)


def set_aside(folder: Path) -> None:
    """Moves the files of an earlier run into `old-1`, `old-2`, …, with a warning."""
    others = [folder / name for name in (HISTORY, LOG)]
    files = [*folder.glob("*.msgpack"), *filter(Path.exists, others)]
    if not files:
        return
    asides = (folder / f"old-{number}" for number in count(1))
    aside = next(path for path in asides if not path.exists())
    aside.mkdir()
    for file in files:
        os.replace(file, aside / file.name)
    warnings.warn(
        f"The run that was in {os.fspath(folder)!r} is now in {os.fspath(aside)!r}.",
        UserWarning,
        stacklevel=3,
    )


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[None]:
    """Locks a run's folder, and removes temporary files of killed processes.

    Raises:
      CheckpointError: the folder is already locked, or it cannot be written to.
    """
    disk.probe(folder)
    with disk.lock_folder(folder):
        disk.remove_stale(folder)
        yield
