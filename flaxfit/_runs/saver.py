"""Builds checkpoints during training and writes them in the background."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from queue import Queue
from threading import Thread
from typing import Any

import jax
import numpy as np

from flaxfit import checkpoint
from flaxfit._core.errors import CheckpointError
from flaxfit._core.types import PyTree, TrainState
from flaxfit.callbacks.base import CallbackList, LoopState, SaveRequest

# One is being written and one waits: more would only fill the memory.
_MOST_WAITING = 1
_TREE = "__tree__"
_STATE = "state"
_ARRAY = "array"


class BackgroundWriter:
    """One thread that runs jobs one by one, in the order they were submitted.

    An error of a job must not end the training: it is kept and becomes a warning.
    """

    def __init__(self) -> None:
        self._jobs: Queue[Callable[[], object] | None] = Queue(_MOST_WAITING)
        self._failures: list[str] = []
        self._thread: Thread | None = None

    def submit(self, job: Callable[[], object], name: str) -> None:
        """Queues a job; waits while too many others do.

        Args:
          job: the work.
          name: names it in the warning if it fails.
        """
        if self._thread is None:
            self._thread = Thread(target=self._work, name="flaxfit-writer", daemon=True)
            self._thread.start()
        self._jobs.put(partial(self._attempt, job, name))

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
        while True:
            job = self._jobs.get()
            try:
                if job is None:
                    return
                job()
            finally:
                self._jobs.task_done()

    def _attempt(self, job: Callable[[], object], name: str) -> None:
        try:
            job()
        except Exception as error:  # a full disk must not end the training
            self._failures.append(
                f"{name} failed: {error}. Earlier files are untouched, training "
                "continues, and the next save tries again."
            )


class Saver:
    """Builds the checkpoints that callbacks request.

    Args:
      writer: writes them.
      describe: (epoch, batch) -> metadata of the trainer and the fit.
    """

    def __init__(
        self, writer: BackgroundWriter, describe: Callable[[int, int], dict[str, Any]]
    ) -> None:
        self._writer = writer
        self._describe = describe
        self._leads = jax.process_index() == 0

    def save(self, loop: LoopState, state: TrainState, callbacks: CallbackList) -> None:
        """Copies the state to the host, once, and queues the requested files.

        Args:
          loop: the position of the training, and the requests.
          state: the state at that position.
          callbacks: their state is part of the checkpoint.
        """
        requests = loop.take_saves()
        if not self._leads:  # of several processes, one writes
            return
        meta, extra = self._content(loop, callbacks)
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
                self._writer.submit(job, f"Saving {request.path!r}")
        if not all(request.background for request in requests):
            self._writer.flush()
        self._writer.warn()

    def _content(
        self, loop: LoopState, callbacks: CallbackList
    ) -> tuple[dict[str, Any], dict[str, PyTree]]:
        """Returns all but the state: plain values, and arrays."""
        running = loop.running  # None between epochs
        trees: dict[str, PyTree] = {}
        states = pack(callbacks.states(), trees)
        extra: dict[str, PyTree] = {"callbacks": trees} if trees else {}
        if running is not None:
            extra["running"] = dict(enumerate(jax.tree.leaves(running)))
        epoch = loop.epoch + 1 if loop.epoch_is_over else loop.epoch
        batch = 0 if running is None else loop.batch
        meta = self._describe(epoch, batch)
        meta["loop"] |= {
            "step": loop.step,
            "epoch": epoch,
            "batch": batch,
            "steps_per_epoch": loop.steps_per_epoch,
            "stop_reason": None if loop.outcome.failure else loop.stop_reason,
            "callbacks": states,
            "history": loop.history.state_dict(),
        }
        return meta, extra


def _write(
    request: SaveRequest, snapshot: checkpoint.Snapshot, meta: Mapping[str, Any]
) -> None:
    try:
        if leaf := checkpoint.nonfinite_leaf(snapshot):
            raise CheckpointError(
                f"{leaf} is not finite, and such a state is not saved over a good one"
            )
        checkpoint.write(request.path, snapshot, meta)
    except Exception as error:
        request.failed(error)
        raise
    request.saved()


def pack(value: Any, trees: dict[str, PyTree]) -> Any:
    """Returns `value` with a name in place of every array and state.

    Args:
      value: the value of a `Callback.state_dict`.
      trees: receives the arrays and states by name.
    """
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
    """Reverses `pack`.

    Args:
      value: the result of `pack`.
      trees: the arrays, read from a file.
      as_state: makes a state from them.
    """
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
      saved: the arrays by number.
      empty: the accumulators that an epoch starts with.
    """
    leaves, structure = jax.tree.flatten(empty)
    found = [(saved or {}).get(str(index)) for index in range(len(leaves))]
    if len(saved or {}) != len(leaves) or any(
        value is None or value.shape != leaf.shape or value.dtype != leaf.dtype
        for value, leaf in zip(found, leaves, strict=True)
    ):
        return None
    placed = [
        jax.device_put(np.array(value), leaf.sharding)
        for value, leaf in zip(found, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, placed)
