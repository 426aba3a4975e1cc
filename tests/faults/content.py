"""States whose arrays are a function of their step, and stores that keep them.

`Store` is what the campaigns break: flaxfit's single file, its folder of steps, and, to
see that the campaigns can fail at all, writers without care. `rivals` has more.
"""

import hashlib
import os
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import serialization

from flaxfit import checkpoint
from flaxfit._core.types import TrainState
from flaxfit._runs import checkpoint_manager

SMALL, LARGE = 2**14, 2**22


def state_of(step: int, size: int = SMALL) -> TrainState:
    """A state of about `size` bytes whose every byte is a function of `step`."""
    random = np.random.default_rng(step)
    width = max(8, int(size / 16) // 64 * 64)

    def array(*shape: int) -> np.ndarray:
        return random.random(shape, np.float32)

    params = {
        "dense_0": {"kernel": array(width), "bias": array(16)},
        "dense_1": {"kernel": array(width // 64, 64), "bias": array(3)},
    }
    return TrainState(
        step=np.int32(step),
        params=params,
        collections={"batch_stats": {"norm": {"mean": array(16)}}},
        opt_state=({"count": np.int32(step), "mu": array(width), "nu": array(width)},),
        rng=random.integers(2**32, size=2, dtype=np.uint32),
    )


def meta_of(step: int, size: int) -> dict[str, Any]:
    """What stands beside a state: enough to make it again."""
    digest = digest_of(state_of(step, size))
    # What a run's folder goes by is the step in "loop".
    return {"loop": {"step": step}, "step": step, "size": size, "digest": digest}


def digest_of(state: Any) -> str:
    """A digest of the names, dtypes, shapes and bytes of a state, or of a file's."""
    digest = hashlib.blake2b(digest_size=16)
    for name, leaf in sorted(_leaves(serialization.to_state_dict(state))):
        array = np.asarray(leaf)
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def step_of(found: Any) -> int:
    """Returns the step of a `Checkpoint` after proving every byte of it.

    Raises:
      AssertionError: it is not what was saved at that step.
    """
    step, size = found.meta["step"], found.meta["size"]
    digest = digest_of(found.state)
    assert digest == found.meta["digest"], f"step {step} is not what was saved"
    assert digest == digest_of(state_of(step, size)), f"step {step} is another's"
    return int(step)


def _leaves(node: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(node, Mapping):
        return [x for k, v in node.items() for x in _leaves(v, f"{path}/{k}")]
    return [(path, node)]


class Store(NamedTuple):
    """Something that keeps the newest state in a folder.

    Attributes:
      name: for people.
      save: `(folder, step, size)`; on return that step is acknowledged.
      newest: `(folder) -> step | None`, proved by content, with no cleaning up
        before; raises where a state is damaged or cannot be read.
      warm: called in a process before its system calls are counted.
    """

    name: str
    save: Callable[[Path, int, int], None]
    newest: Callable[[Path], int | None]
    warm: Callable[[], None] = lambda: None


def _save_file(folder: Path, step: int, size: int) -> None:
    state, meta = state_of(step, size), meta_of(step, size)
    checkpoint.save(folder / "run.msgpack", state, meta)


def _newest_file(folder: Path) -> int | None:
    path = folder / "run.msgpack"
    return step_of(checkpoint.load(path)) if path.exists() else None


def _save_step(folder: Path, step: int, size: int) -> None:
    snapshot = checkpoint.snapshot(state_of(step, size), copy=True)
    checkpoint.write(
        checkpoint_manager.step_file(folder, step), snapshot, meta_of(step, size)
    )
    checkpoint_manager.prune(folder)


def _save_step_in_thread(folder: Path, step: int, size: int) -> None:
    worker = threading.Thread(target=_save_step, args=(folder, step, size))
    worker.start()
    worker.join()


def _newest_step(folder: Path) -> int | None:
    found = checkpoint_manager.newest(folder)
    return None if found is None else step_of(found)


def _save_carelessly(folder: Path, step: int, size: int) -> None:
    data = serialization.to_bytes(_careless(step, size))
    (folder / "naive.bin").write_bytes(data)


def _save_unsynced(folder: Path, step: int, size: int) -> None:
    data = serialization.to_bytes(_careless(step, size))
    (folder / "naive.tmp").write_bytes(data)
    os.replace(folder / "naive.tmp", folder / "naive.bin")


def _newest_careless(folder: Path) -> int | None:
    if not (folder / "naive.bin").exists():
        return None
    read = serialization.msgpack_restore((folder / "naive.bin").read_bytes())
    assert digest_of(read) == digest_of(_careless(read["meta"]["step"], read["size"]))
    return read["meta"]["step"]


def _careless(step: int, size: int) -> dict[str, Any]:
    return {"meta": {"step": step}, "size": size, "state": state_of(step, size)}


ONE_FILE = Store("one file", _save_file, _newest_file)
STEPS = Store("a folder of steps", _save_step, _newest_step)
STEPS_IN_THREAD = Store("steps, by a thread", _save_step_in_thread, _newest_step)
OURS = (ONE_FILE, STEPS, STEPS_IN_THREAD)
IN_PLACE = Store("written in place", _save_carelessly, _newest_careless)
UNSYNCED = Store("renamed, not synced", _save_unsynced, _newest_careless)


def save_loop(
    acknowledge: Callable[[int], None],
    store: Store,
    folder: Path,
    first: int,
    size: int,
) -> None:
    """Saves `first`, `first + 1`, ... until it is killed."""
    step = first
    while True:
        store.save(folder, step, size)
        acknowledge(step)
        step += 1


def save_steps(
    acknowledge: Callable[[int], None],
    store: Store,
    folder: Path,
    steps: range,
    size: int,
) -> None:
    """Saves each of `steps`."""
    for step in steps:
        store.save(folder, step, size)
        acknowledge(step)


def prove(store: Store, folder: Path, acknowledged: int) -> int:
    """What a fresh process finds; raises unless that is `acknowledged` or newer."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = store.newest(folder) or 0
    assert found >= acknowledged, f"step {acknowledged} was lost; found {found}"
    return found


def leftovers(folder: Path) -> list[str]:
    """The files in `folder` that nobody will ever read."""
    return sorted(p.name for p in folder.rglob("*") if "tmp" in p.name)
