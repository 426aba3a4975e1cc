"""Killed at any time, at any system call; the power fails; two at once (F1 F2 F3 F16).

F1, F2 and F3 take any `Store`: `rivals` runs the same trials on other libraries.
"""

import random
import shutil
import time
from pathlib import Path
from typing import Any

from content import (
    LARGE,
    ONE_FILE,
    OURS,
    SMALL,
    STEPS,
    STEPS_IN_THREAD,
    Store,
    leftovers,
    prove,
    save_loop,
    save_steps,
    state_of,
)
from harness import Child, Outcome, Tally, assert_clean, fresh
from power import disks_after, record
from tracing import Traced, file_calls

import flaxfit
from flaxfit import checkpoint
from flaxfit._runs import checkpoint_manager
from flaxfit.checkpoint.disk import lock_folder

_PER_FOLDER = 10


def f1_kill(trials: int, seed: int, folder: Path) -> Outcome:
    """kill -9 at a random time: one file, steps, steps by a thread; in turn."""
    tally = Tally()
    stores = (ONE_FILE, STEPS, STEPS_IN_THREAD)
    for i, store in enumerate(stores):
        share = len(range(i, trials, len(stores)))
        kill_at_random(tally, store, share, seed + i, folder / str(i))
    return tally.outcome()


def kill_at_random(
    tally: Tally,
    store: Store,
    trials: int,
    seed: int,
    folder: Path,
    fewest: int = 0,
) -> None:
    """Kills a loop of saves; the next trial goes on in the same folder, as found.

    Args:
      tally: where the trials are counted.
      store: what is killed.
      trials: so many.
      seed: of the chance.
      folder: one that is emptied where a state was lost, and now and then.
      fewest: saves that are left to finish before a kill.
    """
    chance = random.Random(seed)
    step = _PER_FOLDER
    for trial in range(trials):
        if trial % _PER_FOLDER == 0 or step < 0:
            step = 0
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        before, step = step, -1
        with tally.trial(f"{store.name}, trial {trial}"):
            child = Child(save_loop, store, folder, before + 1, LARGE)
            # Most saves are killed somewhere in the middle, some first ones too.
            child.await_acknowledged(fewest + chance.randrange(4))
            time.sleep(chance.random() * 0.08)
            child.kill()
            acknowledged = max(child.acknowledged, default=before)
            found = fresh(prove, store, folder, acknowledged)
            if store in OURS:
                fresh(_start_again, folder)
                assert fresh(prove, store, folder, found) == found
                assert not leftovers(folder), leftovers(folder)
            step = found


def _start_again(folder: Path) -> None:
    """What the next start does before anything else."""
    with checkpoint_manager.opened(folder):
        pass


def f2_kill_at_each_call(trials: int, seed: int, folder: Path) -> Outcome:
    """kill -9 at the system calls of a first save, an overwriting and a rotation.

    At every one where there are not more than `trials` of them.
    """
    tally = Tally()
    for store, before in ((ONE_FILE, 0), (ONE_FILE, 1), (STEPS, 0), (STEPS, 3)):
        place = folder / f"{store.name} {before}"
        kill_at_each_call(tally, store, before, trials, seed, place)
    return tally.outcome()


def kill_at_each_call(
    tally: Tally, store: Store, before: int, trials: int, seed: int, folder: Path
) -> None:
    """Kills save `before + 1` at its calls, at most `trials` of them, by chance.

    Args:
      tally: where the trials are counted.
      store: what is killed.
      before: how many saves there were before, which must not be lost.
      trials: at most so many.
      seed: of the chance.
      folder: one that does not exist yet.
    """
    template, work = folder / "template", folder / "work"
    template.mkdir(parents=True)
    fresh(_save_before, store, template, before)
    steps = range(before + 1, before + 2)
    for at in _drawn(_count_calls(store, template, steps, work), trials, seed):
        _copy(template, work)
        with tally.trial(f"{store.name}, save {before + 1}, call {at}"):
            traced = Traced(save_steps, store, work, steps, SMALL, warm=store.warm)
            name = _kill_at(traced, at)
            acknowledged = max(traced.child.acknowledged, default=before)
            found = fresh(prove, store, work, acknowledged)
            fresh(_save_next, store, work, found + 1)
            assert fresh(prove, store, work, found + 1) == found + 1, name
            assert store not in OURS or not leftovers(work), leftovers(work)


def _count_calls(store: Store, template: Path, steps: range, work: Path) -> int:
    """Returns how many calls a save makes that nobody kills."""
    _copy(template, work)
    traced = Traced(save_steps, store, work, steps, SMALL, warm=store.warm)
    calls = sum(1 for _ in traced.calls())
    traced.child.result()
    return calls


def _drawn(count: int, most: int, seed: int) -> list[int]:
    if count <= most:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), most))


def _copy(template: Path, work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(template, work)


def _kill_at(traced: Traced, at: int) -> str | None:
    """Kills at call `at`; returns its name, or None where there is none such."""
    for call in traced.calls():
        if call.index == at:
            traced.kill()
            return call.name
    return None


def _save_before(store: Store, folder: Path, steps: int) -> None:
    for step in range(1, steps + 1):
        store.save(folder, step, SMALL)


def _save_next(store: Store, folder: Path, step: int) -> None:
    _start_again(folder)
    store.save(folder, step, SMALL)


def f3_power_loss(trials: int, seed: int, folder: Path) -> Outcome:
    """The power fails after every file operation; only what was synced is certain."""
    tally = Tally()
    for store in (ONE_FILE, STEPS):
        lose_power(tally, store, trials, seed, folder / store.name)
    lose_power(tally, _in_new_folders(ONE_FILE), trials, seed, folder / "new folders")
    return tally.outcome()


def lose_power(tally: Tally, store: Store, most: int, seed: int, folder: Path) -> None:
    """Each disk that each moment could leave, at most `most` of them per moment."""
    root = folder / "disk"
    root.mkdir(parents=True)
    traced = Traced(save_steps, store, root, range(1, 6), SMALL)
    operations = record(traced, root)
    traced.child.result()
    arguments = store, most, seed, folder, operations
    tally.add(fresh(_lose_power, *arguments, timeout=3600))


def _lose_power(
    store: Store, most: int, seed: int, folder: Path, operations: list[Any]
) -> Tally:
    tally = Tally()
    chance = random.Random(seed)
    for moment in range(len(operations) + 1):
        disks, acknowledged = disks_after(operations[:moment], most, chance)
        for number, disk in enumerate(disks):
            with tally.trial(f"{store.name}, moment {moment}, disk {number}"):
                work = folder / "work"
                shutil.rmtree(work, ignore_errors=True)
                disk.write(work)
                prove(store, work, acknowledged)
    return tally


def _in_new_folders(store: Store) -> Store:
    """The same store in folders that its first save has to make."""

    def save(folder: Path, step: int, size: int) -> None:
        store.save(folder / "a" / "b", step, size)

    def newest(folder: Path) -> int | None:
        return store.newest(folder / "a" / "b")

    return Store(f"{store.name} in new folders", save, newest)


def f16_two_at_once(trials: int, seed: int, folder: Path) -> Outcome:
    """A reader beside a writer; a kill between commit and delete; a second writer."""
    tally = Tally()
    readers = max(1, trials * 2 // 3)
    # Large files take long to write; small ones are removed while they are looked for.
    pairs = ((ONE_FILE, LARGE // 4), (STEPS, LARGE // 4), (STEPS, SMALL))
    for i, (store, size) in enumerate(pairs):
        share = len(range(i, readers, len(pairs)))
        _read_while_written(tally, store, size, share, folder / f"r{i}")
    for before in range(2, 5):
        _kill_before_delete(tally, before, folder / f"d{before}")
    for i in range(max(1, trials // 10)):
        _second_writer(tally, seed + i, folder / f"w{i}")
    return tally.outcome()


def _read_while_written(
    tally: Tally, store: Store, size: int, reads: int, folder: Path
) -> None:
    folder.mkdir(parents=True)
    writer = Child(save_loop, store, folder, 1, size)
    writer.await_acknowledged(1)
    counted = fresh(_read_often, store, folder, reads)
    assert writer.status is None
    writer.kill()
    assert writer.acknowledged[-1] > 2, "the writer did not write meanwhile"
    tally.add(counted)


def _read_often(store: Store, folder: Path, reads: int) -> Tally:
    tally, last, read = Tally(), 1, 0
    deadline = time.monotonic() + 60
    # On a busy machine the writer may need a while until it is at it.
    while read < reads or (last < 3 and time.monotonic() < deadline):
        with tally.trial(f"{store.name}, read {read}"):
            last = prove(store, folder, last)
        read += 1
    return tally


def _kill_before_delete(tally: Tally, before: int, folder: Path) -> None:
    """Kills at each removal of a finished file: the new one must be there already."""
    folder.mkdir(parents=True)
    fresh(_save_before, STEPS, folder, before)
    traced = Traced(save_steps, STEPS, folder, range(before + 1, before + 2), SMALL)
    killed = False
    for call in file_calls(traced, folder):
        if call.name.startswith("unlink") and not killed:
            traced.kill()
            killed = True
    with tally.trial(f"killed before deleting, {before} before"):
        assert killed, "nothing was deleted"
        assert fresh(prove, STEPS, folder, before + 1) == before + 1


def _second_writer(tally: Tally, seed: int, folder: Path) -> None:
    """One holds the folder; a second is told so; after a kill it is free again."""
    folder.mkdir(parents=True)
    with tally.trial(f"second writer {seed}"):
        first = Child(_hold, folder)
        first.await_acknowledged(1)
        message = fresh(_try_to_hold, folder)
        assert str(first.pid) in message and str(folder) in message, message
        first.kill()
        assert fresh(_try_to_hold, folder) == "held"


def _hold(acknowledge: Any, folder: Path) -> None:
    with lock_folder(folder):
        acknowledge(1)
        time.sleep(60)


def _try_to_hold(folder: Path) -> str:
    try:
        with lock_folder(folder):
            return "held"
    except flaxfit.CheckpointError as err:
        return str(err)


def saves_without_a_backend(trials: int, seed: int, folder: Path) -> Outcome:
    """Writing and reading start no jax backend."""
    del trials, seed
    tally = Tally()
    with tally.trial("a save and a load"):
        path = folder / "run.msgpack"
        checkpoint.save(path, state_of(1), {"step": 1, "size": SMALL, "digest": ""})
        checkpoint.load(path)
        assert_clean()
    return tally.outcome()
