"""Disks that are full, broken, read-only or gone (F4)."""

import errno
import os
import random
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from content import LARGE, ONE_FILE, SMALL, STEPS, Store, leftovers, prove, save_steps
from harness import Child, Outcome, Tally, fill, fresh, read_only, tmpfs
from tracing import Traced, file_calls

import flaxfit
from flaxfit.checkpoint.disk import probe

_ERRORS = (errno.EIO, errno.EDQUOT, errno.ENOSPC)
_STORES = (ONE_FILE, STEPS)
_REFUSED = OSError, flaxfit.CheckpointError


def f4_broken_disks(trials: int, seed: int, folder: Path) -> Outcome:
    """A full disk, a greedy neighbour, an error at each call, read-only, deleted."""
    tally = Tally()
    for i, store in enumerate(_STORES):
        place = folder / str(i)
        share = max(1, trials // 10)
        full_disk(tally, store, share, seed, place / "full")
        greedy_neighbour(tally, store, share, seed, place / "greedy")
        errors_at_each_call(tally, store, trials // 4, seed, place / "errors")
        deleted_at_each_call(tally, store, share, seed, place / "deleted")
        _read_only(tally, store, place / "read-only")
        _file_for_a_folder(tally, store, place)
    return tally.outcome()


def full_disk(
    tally: Tally, store: Store, trials: int, seed: int, folder: Path, size: int = LARGE
) -> None:
    """Little or nothing is free when a save begins; later there is room again.

    Args:
      tally: where the trials are counted.
      store: what saves.
      trials: so many, from no room at all to nearly enough.
      seed: of the chance.
      folder: where the disk is mounted.
      size: of a state, roughly.
    """
    chance = random.Random(seed)
    for trial in range(trials):
        free = int(size * 0.95 * trial / max(1, trials)) + chance.randrange(4096)

        def fill_disk(disk: Path, free: int = free) -> None:
            fill(disk / "neighbour", leave=free)

        _out_of_room(tally, store, f"{free} bytes left", folder, size, fill_disk)


def greedy_neighbour(
    tally: Tally, store: Store, trials: int, seed: int, folder: Path, size: int = LARGE
) -> None:
    """Somebody else fills the disk in the middle of a save, then frees it."""
    chance = random.Random(seed)
    for trial in range(trials):

        def start_to_fill(disk: Path, wait: float = chance.random() * 0.02) -> Child:
            return Child(_take_all, disk / "neighbour", wait)

        _out_of_room(tally, store, f"neighbour {trial}", folder, size, start_to_fill)


def _take_all(acknowledge: Callable[[int], None], path: Path, wait: float) -> None:
    """Takes every byte of the disk as soon as it is free, until it is killed."""
    time.sleep(wait)
    with open(path, "ab", buffering=0) as file:
        while True:
            try:
                file.write(bytes(2**16))
            except OSError:
                time.sleep(0.0005)


def _out_of_room(
    tally: Tally,
    store: Store,
    label: str,
    folder: Path,
    size: int,
    take_room: Callable[[Path], Child | None],
) -> None:
    """Two saves with room, one with less, one with room again."""
    with tally.trial(f"{store.name}, {label}"), tmpfs(folder, int(size * 4.5)) as disk:
        run = disk / "run"
        run.mkdir()
        Child(save_steps, store, run, range(1, 3), size).result()
        neighbour = take_room(disk)
        child = Child(_try_to_save, store, run, 3, size)
        try:
            refused = child.result()
        finally:
            if neighbour is not None:
                neighbour.kill()
        acknowledged = max(child.acknowledged, default=2)
        fresh(prove, store, run, acknowledged)
        assert store not in _STORES or not leftovers(run), (refused, leftovers(run))
        (disk / "neighbour").unlink(missing_ok=True)
        child = Child(_try_to_save, store, run, 4, size)
        assert child.result() == "", "no save once there was room again"
        assert fresh(prove, store, run, 4) == 4


def _try_to_save(
    acknowledge: Callable[[int], None], store: Store, folder: Path, step: int, size: int
) -> str:
    """Returns why nothing was saved, or an empty text."""
    warnings.simplefilter("ignore")
    try:
        store.save(folder, step, size)
    except Exception as err:
        if store in _STORES and not isinstance(err, _REFUSED):
            raise
        return str(err) or repr(err)
    acknowledge(step)
    return ""


def _save_two(
    acknowledge: Callable[[int], None], store: Store, folder: Path, first: int
) -> None:
    """One save that may fail, and one in the same process that must not."""
    _try_to_save(acknowledge, store, folder, first, SMALL)
    store.save(folder, first + 1, SMALL)
    acknowledge(first + 1)


def errors_at_each_call(
    tally: Tally, store: Store, trials: int, seed: int, folder: Path
) -> None:
    """EIO, EDQUOT, ENOSPC at each call of a third save that has to do with its files.

    Args:
      tally: where the trials are counted.
      store: what saves.
      trials: at most so many, by chance.
      seed: of the chance.
      folder: one that does not exist yet.
    """
    count = _count_file_calls(store, folder / "counted")
    cases = [(at, error) for at in range(count) for error in _ERRORS]
    random.Random(seed).shuffle(cases)
    for at, error in sorted(cases[:trials]):
        run = folder / f"{at} {error}"
        run.mkdir()
        fresh(save_steps, _ignore, store, run, range(1, 3), SMALL)
        with tally.trial(f"{store.name}, {errno.errorcode[error]} at file call {at}"):
            traced = Traced(_save_two, store, run, 3)
            failed = ""
            for index, call in enumerate(file_calls(traced, run)):
                if index == at:
                    failed = call.name
                    traced.fail(error)
            assert failed
            traced.child.result()
            assert fresh(prove, store, run, 4) == 4, failed
            assert not leftovers(run), (failed, leftovers(run))


def deleted_at_each_call(
    tally: Tally, store: Store, trials: int, seed: int, folder: Path
) -> None:
    """The folder is deleted in the middle of a save; the next one makes it again."""
    count = _count_file_calls(store, folder / "counted")
    cases = random.Random(seed).sample(range(count), min(count, trials))
    for at in sorted(cases):
        run = folder / str(at)
        run.mkdir()
        fresh(save_steps, _ignore, store, run, range(1, 3), SMALL)
        with tally.trial(f"{store.name}, deleted at file call {at}"):
            traced = Traced(_save_two, store, run, 3)
            for index, _ in enumerate(file_calls(traced, run)):
                if index == at:
                    shutil.rmtree(run)
            traced.child.result()
            assert fresh(prove, store, run, 4) == 4


def _count_file_calls(store: Store, run: Path) -> int:
    run.mkdir(parents=True)
    fresh(save_steps, _ignore, store, run, range(1, 3), SMALL)
    traced = Traced(save_steps, store, run, range(3, 4), SMALL)
    count = sum(1 for _ in file_calls(traced, run))
    traced.child.result()
    return count


def _ignore(step: int) -> None:
    del step


def _read_only(tally: Tally, store: Store, folder: Path) -> None:
    """The disk has become read-only, as Linux makes it after an error."""
    with (
        tally.trial(f"{store.name}, a read-only disk"),
        tmpfs(folder, LARGE * 4) as disk,
    ):
        run = disk / "run"
        run.mkdir()
        fresh(save_steps, _ignore, store, run, range(1, 3), SMALL)
        with read_only(disk):
            refused = Child(_try_to_save, store, run, 3, SMALL).result()
            assert os.strerror(errno.EROFS) in refused, refused
            fresh(prove, store, run, 2)
            _assert_probe_refuses(run)
        fresh(save_steps, _ignore, store, run, range(3, 4), SMALL)
        assert fresh(prove, store, run, 3) == 3
        probe(run)


def _file_for_a_folder(tally: Tally, store: Store, folder: Path) -> None:
    """A file stands where the folder should be."""
    with tally.trial(f"{store.name}, a file for a folder"):
        run = folder / "file"
        run.write_text("mine")
        assert Child(_try_to_save, store, run, 1, SMALL).result()
        _assert_probe_refuses(run)
        assert run.read_text() == "mine"
        run.unlink()
        fresh(save_steps, _ignore, store, run, range(1, 2), SMALL)
        assert fresh(prove, store, run, 1) == 1


def _assert_probe_refuses(folder: Path) -> None:
    try:
        probe(folder)
    except flaxfit.CheckpointError as err:
        assert str(folder) in str(err), err
    else:
        raise AssertionError("probe found nothing")
