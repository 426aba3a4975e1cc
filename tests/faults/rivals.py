"""The same trials on what others save with, where it is installed.

Their loading into a model is part of a trial, so it starts a jax backend each time:
seconds rather than milliseconds, hence fewer trials. Only public functions are called,
with their defaults, as their documentation shows.
"""

import functools
import importlib.util
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from campaigns_crash import kill_at_each_call, kill_at_random
from campaigns_disk import full_disk, greedy_neighbour
from content import SMALL, Store, digest_of, state_of
from flax import serialization
from harness import Outcome, Tally, fresh

MODULES = ("keras", "keras.callbacks", "orbax.checkpoint", "flax.training.checkpoints")


def _quiet(function: Callable[..., Any]) -> Callable[..., Any]:
    """Their warnings are not what is counted here."""

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args)

    return wrapped


# Keras: the weights of a model are a function of the step.


@functools.cache
def _model(width: int) -> Any:
    import keras

    layers = [keras.Input((width,)), keras.layers.Dense(width)]
    model = keras.Sequential(layers)
    model.compile(optimizer="sgd", loss="mse")
    return model


def _weights(step: int, width: int) -> list[np.ndarray]:
    random = np.random.default_rng(step)
    kernel = random.random((width, width), np.float32)
    kernel[0, 0] = step
    return [kernel, random.random(width, np.float32)]


def _model_at(step: int, size: int) -> Any:
    width = int((size / 4) ** 0.5)
    model = _model(width)
    model.set_weights(_weights(step, width))
    return model


def _step_of(model: Any) -> int:
    kernel, bias = model.get_weights()
    step = int(kernel[0, 0])
    expected = _weights(step, len(bias))
    assert kernel.tobytes() == expected[0].tobytes(), "the kernel is another's"
    assert bias.tobytes() == expected[1].tobytes(), "the bias is another's"
    return step


@_quiet
def _save_backup(folder: Path, step: int, size: int) -> None:
    import keras

    callback = keras.callbacks.BackupAndRestore(str(folder / "backup"))
    callback.set_model(_model_at(step, size))
    callback.on_epoch_end(step - 1)
    (folder / "size").write_text(str(size))


@_quiet
def _newest_backup(folder: Path) -> int | None:
    import keras

    if not (folder / "backup").exists():
        return None
    model = _model_at(0, int((folder / "size").read_text()))
    callback = keras.callbacks.BackupAndRestore(str(folder / "backup"))
    callback.set_model(model)
    callback.on_train_begin()
    return _step_of(model)


@_quiet
def _save_keras(folder: Path, step: int, size: int) -> None:
    import keras

    callback = keras.callbacks.ModelCheckpoint(str(folder / "model.keras"))
    callback.set_model(_model_at(step, size))
    callback.on_epoch_begin(step - 1)
    callback.on_epoch_end(step - 1, {})


@_quiet
def _newest_keras(folder: Path) -> int | None:
    import keras

    path = folder / "model.keras"
    return _step_of(keras.saving.load_model(path)) if path.exists() else None


# Trees of arrays


@_quiet
def _save_flax(folder: Path, step: int, size: int) -> None:
    import flax
    from flax.training import checkpoints

    flax.config.update("flax_use_orbax_checkpointing", False)
    target = {"state": state_of(step, size), "step": step, "size": size}
    checkpoints.save_checkpoint(folder, target, step, keep=2)


@_quiet
def _newest_flax(folder: Path) -> int | None:
    from flax.training import checkpoints

    found = checkpoints.restore_checkpoint(folder, None)
    return None if found is None else _proved(found)


def _proved(found: Any) -> int:
    step, size = int(found["step"]), int(found["size"])
    assert digest_of(found["state"]) == digest_of(state_of(step, size)), "another's"
    return step


@functools.cache
def _manager(folder: Path) -> Any:
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    return ocp.CheckpointManager(folder / "orbax", options=options)


@_quiet
def _save_orbax(folder: Path, step: int, size: int) -> None:
    import orbax.checkpoint as ocp

    state = serialization.to_state_dict(state_of(step, size))
    tree = {"state": state, "step": step, "size": size}
    _manager(folder).save(step, args=ocp.args.StandardSave(tree))
    _manager(folder).wait_until_finished()


@_quiet
def _newest_orbax(folder: Path) -> int | None:
    import orbax.checkpoint as ocp

    manager = _manager(folder)
    step = manager.latest_step()
    if step is None:
        return None
    return _proved(manager.restore(step, args=ocp.args.StandardRestore()))


def _store(name: str, save: Any, newest: Any) -> Store:
    """A store that has saved once before its system calls are counted."""

    def warm() -> None:
        folder = Path(tempfile.mkdtemp())
        save(folder, 1, SMALL)
        shutil.rmtree(folder)

    return Store(name, save, newest, warm)


STORES = {
    "Keras backup": _store("Keras BackupAndRestore", _save_backup, _newest_backup),
    "Keras .keras": _store("Keras ModelCheckpoint", _save_keras, _newest_keras),
    "flax": _store("flax.training.checkpoints", _save_flax, _newest_flax),
    "orbax": _store("orbax CheckpointManager", _save_orbax, _newest_orbax),
}


def installed() -> dict[str, str]:
    """The names of `STORES`, each with the module it needs, that can be had here."""
    needs = {"Keras backup": "keras", "Keras .keras": "keras", "orbax": "orbax"}
    modules = {name: needs.get(name, "flax") for name in STORES}
    return {n: m for n, m in modules.items() if importlib.util.find_spec(m)}


# Campaigns


def killed(trials: int, seed: int, folder: Path, name: str) -> Outcome:
    """F1; at least one save has finished."""
    tally = Tally()
    kill_at_random(tally, STORES[name], trials, seed, folder / "run", fewest=1)
    return tally.outcome()


def killed_at_calls(trials: int, seed: int, folder: Path, name: str) -> Outcome:
    """F2 at calls of a second save drawn by chance."""
    tally = Tally()
    kill_at_each_call(tally, STORES[name], 1, trials, seed, folder / "run")
    return tally.outcome()


def out_of_room(trials: int, seed: int, folder: Path, name: str) -> Outcome:
    """F4, of it the full disk and the greedy neighbour."""
    tally = Tally()
    full_disk(tally, STORES[name], (trials + 1) // 2, seed, folder / "full")
    greedy_neighbour(tally, STORES[name], trials // 2, seed, folder / "greedy")
    return tally.outcome()


def damaged(trials: int, seed: int, folder: Path, name: str) -> Outcome:
    """F5, of it flipped bits, cut ends and zeroed pages of the newest state."""
    return fresh(_damaged, trials, seed, folder, name, timeout=3600)


def _damaged(trials: int, seed: int, folder: Path, name: str) -> Outcome:
    tally, chance, store = Tally(), random.Random(seed), STORES[name]
    for step in (1, 2):
        store.save(folder, step, 2**17)
    newest = store.newest(folder)
    assert newest == 2
    path = _largest_of_newest(folder, name)
    whole = path.read_bytes()
    for trial in range(trials):
        data = bytearray(whole)
        at = chance.randrange(len(data))
        if trial % 7 < 5:
            data[at] ^= 1 << chance.randrange(8)
        elif trial % 7 == 5:
            del data[at:]
        else:
            data[at : at + 4096] = bytes(len(data[at : at + 4096]))
        path.write_bytes(data)
        with tally.trial(f"{store.name}, damage {trial}"):
            assert store.newest(folder) in (1, 2)
    return tally.outcome()


def _largest_of_newest(folder: Path, name: str) -> Path:
    if name == "orbax":
        folder = folder / "orbax" / "2"
    elif name == "flax":
        return folder / "checkpoint_2"
    files = [path for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)
