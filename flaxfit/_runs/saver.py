"""Builds checkpoints during training and writes them in the background."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from queue import Queue
from threading import Thread
from typing import Any

import jax
import numpy as np

from flaxfit import checkpoint
from flaxfit._core.errors import CheckpointError
from flaxfit._core.types import PyTree, TrainState
from flaxfit.callbacks.base import SaveRequest

# One file is being written and one waits: more would only fill the memory.
_MOST_WAITING = 1
_TREE = "__tree__"
_STATE = "state"
_ARRAY = "array"


class BackgroundWriter:
    """One thread that runs jobs one by one, in the order they were submitted.

    An error of a job must not end the training: it is kept and becomes a warning.
    """

    def __init__(self) -> None:
        self._jobs: Queue[tuple[Callable[[], object], str] | None] = Queue(
            _MOST_WAITING
        )
        self._failures: list[str] = []
        self._thread: Thread | None = None

    def submit(self, job: Callable[[], object], name: str) -> None:
        """Queues a job; waits while the queue is full.

        Args:
          job: the work.
          name: names the job in the warning if it fails.
        """
        if self._thread is None:
            self._thread = Thread(target=self._work, name="flaxfit-writer", daemon=True)
            self._thread.start()
        self._jobs.put((job, name))

    def flush(self) -> None:
        """Waits for all jobs, and warns of those that failed."""
        self._jobs.join()
        self.warn()

    def close(self) -> None:
        """Finishes all jobs, and ends the thread."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None
        self.warn()

    def warn(self) -> None:
        """Warns of the jobs that failed since the last time."""
        failures, self._failures = self._failures, []
        for failure in failures:
            warnings.warn(failure, UserWarning, stacklevel=2)

    def _work(self) -> None:
        while entry := self._jobs.get():
            job, name = entry
            try:
                job()
            except Exception as error:  # a full disk must not end the training
                self._failures.append(
                    f"{name} failed: {error}. Earlier files are untouched, training "
                    "continues, and the next save tries again."
                )
            finally:
                self._jobs.task_done()
            # Otherwise the last file's state would stay in memory until the next job.
            del entry, job
        self._jobs.task_done()


def submit_saves(
    writer: BackgroundWriter,
    requests: Sequence[SaveRequest],
    state: TrainState,
    meta: Mapping[str, Any],
    extra: Mapping[str, PyTree],
) -> None:
    """Copies a state to the host and queues the requested files.

    Every file holds `meta`; files of the whole state hold the arrays of `extra` too.
    """
    for weights_only in (False, True):
        chosen = [r for r in requests if r.weights_only is weights_only]
        if not chosen:
            continue
        kept: Any = state
        if weights_only:
            kept = {"params": state.params, "collections": state.collections}
            meta, extra = {**meta, "contents": "weights"}, {}
        snapshot = checkpoint.snapshot(kept, extra, copy=True)
        for request in chosen:
            job = partial(_write, request, snapshot, meta)
            writer.submit(job, f"Saving {request.path!r}")
    if not all(request.background for request in requests):
        writer.flush()
    writer.warn()


def _write(
    request: SaveRequest, snapshot: checkpoint.Snapshot, meta: Mapping[str, Any]
) -> None:
    try:
        if leaf := checkpoint.nonfinite_leaf(snapshot):
            raise CheckpointError(
                f"{leaf} is not finite, and such a state is never saved"
            )
        checkpoint.write(request.path, snapshot, meta)
    except Exception as error:
        request.failed(error)
        raise
    request.saved()


def pack(value: Any, trees: dict[str, PyTree]) -> Any:
    """Replaces each array and state in a `state_dict` by its name in `trees`."""
    if isinstance(value, TrainState | jax.Array | np.ndarray):
        name = str(len(trees))
        trees[name] = value
        return {_TREE: [_STATE if isinstance(value, TrainState) else _ARRAY, name]}
    if isinstance(value, Mapping):
        return {key: pack(item, trees) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [pack(item, trees) for item in value]
    return value


def unpack(
    value: Any, trees: Mapping[str, PyTree], as_state: Callable[[Any], TrainState]
) -> Any:
    """Reverses `pack`; `as_state` makes a state from arrays read from a file."""
    if isinstance(value, Mapping):
        if value.keys() == {_TREE}:
            kind, name = value[_TREE]
            return as_state(trees[name]) if kind == _STATE else trees[name]
        return {key: unpack(item, trees, as_state) for key, item in value.items()}
    if isinstance(value, list):
        return [unpack(item, trees, as_state) for item in value]
    return value


def restore_running(saved: Mapping[str, Any] | None, empty: PyTree) -> PyTree | None:
    """Returns the accumulators of a file, None if they belong to other metrics.

    Args:
      saved: the arrays, by the number of the leaf.
      empty: the accumulators that an epoch starts with.
    """
    leaves, structure = jax.tree.flatten(empty)
    wanted = {str(index): leaf for index, leaf in enumerate(leaves)}
    saved = saved or {}
    if saved.keys() != wanted.keys() or any(
        value is None or value.shape != leaf.shape or value.dtype != leaf.dtype
        for value, leaf in zip(map(saved.get, wanted), leaves, strict=True)
    ):
        return None
    placed = [
        jax.device_put(np.array(saved[index]), leaf.sharding)
        for index, leaf in wanted.items()
    ]
    return jax.tree.unflatten(structure, placed)
