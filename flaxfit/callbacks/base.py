"""The callback contract: the hooks, and the `LoopState` that each receives."""

import inspect
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import jax

from flaxfit._core.arrays import copy_array, strongly_typed
from flaxfit._core.errors import UsageError, UsageTypeError, did_you_mean
from flaxfit._core.state_store import TrainStateStore
from flaxfit._core.tree_specs import diff, difference_lines, specs_of
from flaxfit._core.types import TrainState
from flaxfit._core.validation import integer
from flaxfit._reporting.history import History
from flaxfit._reporting.timing import Clock


class SaveRequest(NamedTuple):
    """A checkpoint to write; see `LoopState.save`."""

    path: str
    weights_only: bool
    background: bool
    saved: Callable[[], object]
    failed: Callable[[Exception], object]


class Outcome(NamedTuple):
    """How a fit ends.

    Attributes:
      stop_reason: the argument of `stop`, None if it was not called.
      failure: `"interrupted"` by an error or Ctrl-C, `"nonfinite"` for a loss that is
        not finite, else None.
    """

    stop_reason: str | None = None
    failure: Literal["interrupted", "nonfinite"] | None = None


class LoopState:
    """The progress of one `fit`: its only mutable object, local to the call.

    A callback may read everything, call `stop`, add to `logs` in `on_epoch_end`,
    and assign `state`.

    Attributes:
      epoch: the current epoch, from 0.
      epochs: the epoch at which `fit` ends.
      step: optimizer steps finished, over all fits of the trainer.
      batch: batches finished in this epoch.
      steps_per_epoch: batches of an epoch, None while that is unknown.
      history: the `History` so far; in `on_epoch_end` it holds this epoch.
      log_names: the names `logs` will have at an epoch's end, known before step 1.
      outcome: whether and why the fit ends early; final in `on_train_end`.
      running: the accumulators of the running epoch, None between epochs.
    """

    def __init__(
        self,
        store: TrainStateStore,
        *,
        history: History,
        step: int,
        epoch: int,
        epochs: int,
        steps_per_epoch: int | None,
        log_names: Sequence[str],
    ) -> None:
        self.history = history
        self.step = step
        self.epoch = epoch
        self.batch = 0
        self.epochs = epochs
        self.steps_per_epoch = steps_per_epoch
        self.log_names = tuple(log_names)
        self.outcome = Outcome()
        self.running: Any = None
        self._store = store
        self._logs: dict[str, Any] | Callable[[], dict[str, Any]] = {}
        self._saves: list[SaveRequest] = []

    @property
    def state(self) -> TrainState:
        """The state after the last finished step; you may keep it."""
        return self._store.read()

    @state.setter
    def state(self, state: TrainState) -> None:
        self._store.put(own_state(state, self._store.peek()))

    @property
    def logs(self) -> dict[str, Any]:
        """Name -> float; in a batch hook, the means of the epoch so far.

        Reading it in a batch hook waits for the device; not reading it is free.
        """
        if callable(self._logs):
            self._logs = self._logs()
        return self._logs

    def set_logs(self, logs: dict[str, Any]) -> None:
        """Sets the logs to values that have been read."""
        self._logs = logs

    def defer_logs(self, read: Callable[[], dict[str, Any]]) -> None:
        """Sets the logs to the result of `read`, called on the first access."""
        self._logs = read

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        weights_only: bool = False,
        background: bool = True,
        saved: Callable[[], object] = lambda: None,
        failed: Callable[[Exception], object] = lambda error: None,
    ) -> None:
        """Requests a checkpoint; it is written after all callbacks have run.

        The file holds the whole training: state, position in the data, history, and the
        state of every callback. `fit(resume=path)` continues from it. A state that is
        not finite is not written. A checkpoint that cannot be written gives a warning,
        and training continues.

        Args:
          path: the file; an old one stays until the new one is safe on the disk.
          weights_only: whether only parameters and collections are written.
          background: whether training continues once the state is copied to the host;
            files are written one after the other.
          saved: called when the file is safe, in the thread that wrote it.
          failed: called with the reason if it could not be written.
        """
        request = SaveRequest(os.fspath(path), weights_only, background, saved, failed)
        self._saves.append(request)

    def take_saves(self) -> list[SaveRequest]:
        """Returns the requested checkpoints, and forgets them."""
        saves, self._saves = self._saves, []
        return saves

    @property
    def has_saves(self) -> bool:
        """Whether a checkpoint is requested."""
        return bool(self._saves)

    def stop(self, reason: str = "a callback asked for it") -> None:
        """Ends the fit after the current step; `reason` is shown and recorded."""
        self.outcome = self.outcome._replace(stop_reason=reason)

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self.stop_reason is not None

    @property
    def stop_reason(self) -> str | None:
        """The argument of `stop`, None if it was not called."""
        return self.outcome.stop_reason

    @property
    def epoch_is_over(self) -> bool:
        """Whether the history holds the current epoch."""
        return self.history.epoch[-1:] == [self.epoch]

    @property
    def clock(self) -> Clock:
        """Measures how the time is spent, for `history.timing`.

        Write files inside `with loop.clock.phase("saving")`, as `trainer.save` does.
        """
        return self.history.timing.clock


class Callback:
    """Base of all callbacks: override the hooks you need.

    Order of the hooks; each runs for all callbacks in the order of the list:

        on_train_begin
          on_epoch_begin
            on_train_batch_begin, on_train_batch_end   every `every_steps` steps
            on_test_begin, on_test_end                 around a validation
          on_epoch_end                                 logs also hold val_… values
        on_train_end                                   always, also after an error

    An error in a hook ends the fit and reaches the caller; the trainer then holds
    the last finished step.

    Attributes:
      log_names: the names that this callback adds to `loop.logs` in `on_epoch_end`,
        so that others may monitor them.
      every_steps: how often the batch hooks run: at every step whose number,
        `loop.step`, is a multiple of it. With 1, the default, that is every step, and
        steps are no longer run several at once. With None the loop decides: after each
        call, which takes as many steps as fit into a quarter of a second.
      every_seconds: if set, replaces `every_steps`: the batch hooks run when this many
        seconds have passed since the last time.

    A callback with a state returns it from `state_dict`. The state is part of every
    checkpoint, and is loaded when the training is resumed.
    """

    log_names: tuple[str, ...] = ()
    every_steps: int | None = 1
    every_seconds: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of this callback, to be part of a checkpoint.

        Values may be numbers, strings, bools, None, bytes, arrays, `TrainState`s, and
        dicts and lists of them.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `state_dict`; called after `on_train_begin`.

        Arrays come back as NumPy arrays, tuples as lists.
        """

    def on_train_begin(self, loop: LoopState) -> None:
        """Called once, before the first step is compiled; check arguments here."""

    def on_epoch_begin(self, loop: LoopState) -> None:
        """Called before the first step of every epoch."""

    def on_train_batch_begin(self, loop: LoopState) -> None:
        """Called before a step; see `every_steps`."""

    def on_train_batch_end(self, loop: LoopState) -> None:
        """Called after a step; see `every_steps`."""

    def on_test_begin(self, loop: LoopState) -> None:
        """Called before a validation."""

    def on_test_end(self, loop: LoopState) -> None:
        """Called after a validation; `loop.logs` holds its values."""

    def on_epoch_end(self, loop: LoopState) -> None:
        """Called at the end of an epoch, after its validation."""

    def on_train_end(self, loop: LoopState) -> None:
        """Called once at the end of the fit, also after an error."""


HOOKS = tuple(name for name in vars(Callback) if name.startswith("on_"))
_BATCH_HOOKS = ("on_train_batch_begin", "on_train_batch_end")


class CallbackList:
    """Calls the hooks of those callbacks that override them.

    Raises:
      ValueError: an `every_steps` that is not a positive whole number.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = tuple(callbacks)
        self._hooks = {
            name: tuple(c for c in callbacks if overrides(c, name)) for name in HOOKS
        }
        per_step = [c for name in _BATCH_HOOKS for c in self._hooks[name]]
        self._intervals = tuple({_interval(callback) for callback in per_step} - {0})
        self._seconds = {id(c): c.every_seconds for c in per_step if c.every_seconds}
        self._last_times = dict.fromkeys(self._seconds, time.monotonic())

    @property
    def log_names(self) -> tuple[str, ...]:
        """The names of the logs that the callbacks add."""
        return tuple(name for c in self._callbacks for name in c.log_names)

    def has(self, hook: str) -> bool:
        """Whether any callback overrides `hook`."""
        return bool(self._hooks[hook])

    def steps_to_hook(self, step: int) -> int | None:
        """Returns the steps from `step` to the next one at which a batch hook runs."""
        return min((n - step % n for n in self._intervals), default=None)

    def call(self, hook: str, loop: LoopState) -> None:
        """Calls `hook` of all callbacks; a batch hook only if it is due.

        The first error is raised, with a note that names the callback.
        """
        for callback in self._hooks[hook]:
            if hook in _BATCH_HOOKS:
                if not self._has_turn(callback, loop.step):
                    continue
                if hook == "on_train_batch_end" and id(callback) in self._seconds:
                    self._last_times[id(callback)] = time.monotonic()
            with loop.clock.phase("callbacks"), _named(callback, hook):
                getattr(callback, hook)(loop)

    def has_turn(self, hook: str, step: int) -> bool:
        """Whether a batch hook of any callback is due after `step`."""
        return any(self._has_turn(callback, step) for callback in self._hooks[hook])

    def _has_turn(self, callback: Callback, step: int) -> bool:
        seconds = self._seconds.get(id(callback))
        if seconds is not None:
            return time.monotonic() - self._last_times[id(callback)] >= seconds
        return step % (_interval(callback) or 1) == 0

    def settings(self) -> list[dict[str, Any]]:
        """Returns the kind of every callback, and its public plain attributes.

        Raises:
          TypeError: a `state_dict` that is not a dict.
        """
        return [
            {"kind": type(c).__name__, "settings": _settings(c)}
            for c in self._callbacks
        ]

    def states(self) -> list[dict[str, Any]]:
        """Returns the kind and the state of every callback."""
        return [
            {"kind": type(c).__name__, "state": _state_of(c)} for c in self._callbacks
        ]

    def load_states(self, saved: Sequence[Mapping[str, Any]]) -> list[str]:
        """Loads the result of `states` into callbacks of the same kinds.

        Returns:
          A line for each new callback that has a state, and for each saved state
          without a callback.
        """
        left, notes = list(saved), []
        for callback in self._callbacks:
            kind = type(callback).__name__
            found = next((entry for entry in left if entry["kind"] == kind), None)
            if found is not None:
                left.remove(found)
                if found["state"]:
                    with _named(callback, "load_state_dict"):
                        callback.load_state_dict(found["state"])
            elif _state_of(callback):
                notes.append(f"{kind} was not there before: it starts fresh")
        return notes + [
            f"{entry['kind']} is no longer there: its state is lost"
            for entry in left
            if entry["state"]
        ]

    def end(self, loop: LoopState) -> None:
        """Calls `on_train_end` of all callbacks, then raises their first error."""
        errors: list[Exception] = []
        for callback in self._hooks["on_train_end"]:
            try:
                timed = loop.clock.phase("callbacks")
                with timed, _named(callback, "on_train_end"):
                    callback.on_train_end(loop)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]


def _state_of(callback: Callback) -> dict[str, Any]:
    state: Any = callback.state_dict()
    if not isinstance(state, dict):
        raise UsageTypeError(
            f"{type(callback).__name__}.state_dict returned a {type(state).__name__}",
            "It has to return a dict",
            'return {"best": self.best}',
        )
    return state


def _settings(callback: Callback) -> dict[str, Any]:
    """Returns the public attributes that are plain values and not in the state."""
    state = _state_of(callback)
    return {
        name: value
        for name, value in vars(callback).items()
        if not name.startswith("_")
        and name not in state
        and (value is None or isinstance(value, bool | int | float | str))
    }


def _interval(callback: Callback) -> int:
    """Returns `every_steps`; 0 if it is None or `every_seconds` is set."""
    every = callback.every_steps
    if every is None or callback.every_seconds is not None:
        return 0
    name = f"{type(callback).__name__}.every_steps"
    return integer(name, every, write=f"{name}=1, or None for the loop's choice")


def overrides(callback: Callback, hook: str) -> bool:
    """Whether `callback` overrides `hook`."""
    method = getattr(callback, hook)
    return getattr(method, "__func__", method) is not getattr(Callback, hook)


@contextmanager
def _named(callback: Callback, hook: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f"raised by the callback {type(callback).__name__}.{hook}")
        raise


def as_callbacks(callbacks: Any) -> list[Callback]:
    """Returns a list of callbacks from one, several or None.

    Raises:
      TypeError: a class, or an object that is not a `Callback`.
    """
    given = [callbacks] if isinstance(callbacks, Callback) else callbacks or []
    for callback in given if isinstance(given, Iterable) else [given]:
        if isinstance(callback, type):
            name = callback.__name__
            raise UsageTypeError(f"callbacks holds the class {name}", write=f"{name}()")
        if not isinstance(callback, Callback):
            raise UsageTypeError(
                f"callbacks holds a {type(callback).__name__}",
                "Expected a subclass of flaxfit.Callback",
                "LambdaCallback(on_epoch_end=function) for a function",
            )
        _check_hooks(callback)
    return list(given)


def _check_hooks(callback: Callback) -> None:
    """Raises for hooks that do not exist or that take Keras's arguments."""
    kind = type(callback).__name__
    for name in dir(callback):
        if not name.startswith("on_") or not callable(getattr(callback, name)):
            continue
        if name not in HOOKS:
            raise UsageTypeError(
                f"{kind}.{name} is not a hook.{did_you_mean(name, HOOKS)}",
                f"The hooks are {', '.join(HOOKS)}",
            )
        if not _takes_loop(getattr(callback, name)):
            raise UsageTypeError(
                f"{kind}.{name} has to take one argument, the LoopState",
                write=f"def {name}(self, loop) and use loop.epoch, loop.logs",
            )


def _takes_loop(hook: Callable[..., Any]) -> bool:
    try:
        signature = inspect.signature(hook)
    except ValueError:  # A builtin, such as print.
        return True
    try:
        signature.bind(None)
    except TypeError:
        return False
    # Keras's (epoch, logs=None) would be given the LoopState as `epoch`.
    return "logs" not in signature.parameters


def own_state(new: TrainState, like: TrainState) -> TrainState:
    """Returns a copy, in new buffers, of a state that replaces another.

    Args:
      new: the user's state; arrays of any library, dicts or FrozenDicts.
      like: the state to replace, or its shapes.

    Raises:
      TypeError: `new` is not a `TrainState`.
      ValueError: anything differs; the error names every path that does.
    """
    if not isinstance(new, TrainState):
        raise UsageTypeError(
            f"state must be a TrainState, got {type(new).__name__}",
            write="trainer.state = trainer.state.replace(params=...)",
        )
    if found := diff(specs_of(like), specs_of(new)):
        lines = difference_lines(found, "  {path}: is {wanted}, given {given}")
        raise UsageError(
            "The assigned state does not fit the model:\n" + "\n".join(lines)
        )
    # Keep the structure of `like`: a FrozenDict would recompile everything.
    copied: TrainState = jax.tree.map(
        lambda one, leaf: copy_array(strongly_typed(leaf, one.dtype), one),
        like,
        jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(new)),
    )
    return copied
