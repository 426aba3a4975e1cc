"""Training faults: the rows of the scoreboard, and what their campaigns share.

`run.py` lists `FAULTS` beside those of `registry`. Most campaigns compare a run that
was broken with one that was not: every bit of the state, the history, and what the
callbacks found. `Case` is a training, `Result` what came of it.
"""

import os
import signal
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from registry import Fault

import flaxfit
from flaxfit import Callback, EarlyStopping, LoopState, Trainer
from flaxfit.trainer.compilation_cache import use_compilation_cache

FAULTS = (
    Fault("F1b", "kill -9 at any time of a training that saves each step",
          "training_signals:f1_kill_a_training", 3, 100),
    Fault("F6", "Ctrl-C at any time",
          "training_signals:f6_ctrl_c", 10, 400),
    Fault("F7", "SIGTERM at any time, in compile, eval and save",
          "training_signals:f7_sigterm", 2, 100),
    Fault("F8", "interrupted after each step of three epochs",
          "training_resume:f8_interrupted_everywhere", 1, 24),
    Fault("F9", "the loss becomes infinite at some step",
          "training_errors:f9_nonfinite", 6, 30),
    Fault("F10", "out of memory",
          "training_errors:f10_out_of_memory", 2, 10),
    Fault("F11", "the user's code raises",
          "training_errors:f11_exceptions", 1, 2),
    Fault("F12", "data that cannot be trained on",
          "training_errors:f12_data", 0, 0),
    Fault("F18", "two processes, one of which dies",
          "training_processes:f18_two_processes", 2, 50),
    Fault("F19b", "each step saved while the next one runs in its memory",
          "training_resume:f19_each_step_saved", 9, 200),
    Fault("F20", "resumed ten times, when finished, with other arguments",
          "training_resume:f20_resumed", 0, 0),
)  # fmt: skip

CACHE = "FLAXFIT_FAULTS_CACHE"
BATCH, EPOCHS, ROWS = 4, 3, 24
STEPS_PER_EPOCH = ROWS // BATCH
STEPS = EPOCHS * STEPS_PER_EPOCH


def data(rows: int = ROWS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose first column is their number, and three classes."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, 4)).astype(np.float32)
    x[:, 0] = np.arange(rows)
    return x, random.integers(0, 3, rows).astype(np.int32)


class Net(nn.Module):
    """One layer, and a note of which rows it was trained on, how often, in order."""

    dropout: float = 0.0
    norm: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool):
        counts = self.variable("seen", "counts", jnp.zeros, (ROWS,), jnp.int32)
        order = self.variable("seen", "order", jnp.zeros, (), jnp.uint32)
        if train and not self.is_initializing():
            rows = x[:, 0].astype(jnp.int32) % ROWS
            counts.value = counts.value.at[rows].add(1)
            # Each row weighs as much as its place: another order is another number.
            weights = np.arange(1, len(x) + 1, dtype=np.uint32)
            number = (weights * rows.astype(jnp.uint32)).sum()
            order.value = order.value * jnp.uint32(31) + number
        x = x / jnp.asarray([ROWS, 1, 1, 1], x.dtype)[None]
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(3, param_dtype=self.dtype)(x)


class Case(NamedTuple):
    """A training that a fault is to be tried on.

    Attributes:
      name: for people.
      model: a module.
      options: returns arguments of `Trainer`.
      arguments: of `fit`, beside the data.
      callbacks: makes them.
      rows: of the data.
      batches: whether the data is a function that returns batches.
    """

    name: str
    model: Any = Net()
    options: Callable[[], Mapping[str, Any]] = dict
    arguments: Mapping[str, Any] = {}
    callbacks: Callable[[], list[Callback]] = list
    rows: int = ROWS
    batches: bool = False

    def trainer(self, **changes: Any) -> Trainer:
        """A trainer that nobody has trained."""
        options = {"learning_rate": 0.1, "metrics": ["accuracy"], "devices": 1}
        return Trainer(self.model, **{**options, **self.options(), **changes})

    def data(self) -> tuple[Any, ...]:
        """What `fit` is given first."""
        x, y = data(self.rows)
        if not self.batches:
            return x, y
        return (partial(_batches, x, y),)

    @property
    def steps(self) -> int:
        """The steps of an epoch."""
        return self.arguments.get("steps_per_epoch") or -(-self.rows // BATCH)


def _batches(x: np.ndarray, y: np.ndarray) -> Any:
    for start in range(0, len(x), BATCH):
        yield x[start : start + BATCH], y[start : start + BATCH]


class Result(NamedTuple):
    """What came of a training.

    Attributes:
      leaves: path -> dtype, shape and bytes of each array of the state.
      history: name -> values.
      epochs: the epochs of the history.
      reason: why it ended early.
      callbacks: what the callbacks found, by number and name.
    """

    leaves: dict[str, tuple[str, tuple[int, ...], bytes]]
    history: dict[str, list[float]]
    epochs: list[int]
    reason: str | None
    callbacks: dict[str, Any]


def result_of(trainer: Trainer, history: flaxfit.History, callbacks: Any) -> Result:
    """What there is to compare after a fit."""
    found = {
        f"{number}.{name}": value
        for number, callback in enumerate(callbacks)
        for name, value in vars(callback).items()
        if not name.startswith("_")
    }
    return Result(
        leaves_of(trainer.state),
        history.history,
        history.epoch,
        history.stop_reason,
        found,
    )


def leaves_of(state: Any) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The bytes of every array of a state."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        name = jax.tree_util.keystr(path)
        found[name] = str(array.dtype), array.shape, array.tobytes()
    return found


def assert_same(found: Result, wanted: Result) -> None:
    """Raises where a bit differs; the message names what."""
    assert found.leaves.keys() == wanted.leaves.keys()
    differ = [n for n, leaf in found.leaves.items() if leaf != wanted.leaves[n]]
    assert not differ, f"{len(differ)} arrays differ: {differ[:4]}"
    for name in Result._fields[1:]:
        one, other = getattr(found, name), getattr(wanted, name)
        assert one == other, f"{name}: {one} is not {other}"


def assert_same_state(state: Any, wanted: Mapping[str, Any]) -> None:
    """Raises where an array of a state differs from `leaves_of` another."""
    found = leaves_of(state)
    assert found.keys() == wanted.keys()
    differ = [name for name, leaf in found.items() if leaf != wanted[name]]
    assert not differ, f"{len(differ)} arrays differ: {differ[:4]}"


class Press(NamedTuple):
    """When a signal is sent.

    Attributes:
      step: in the first hook called `hook` after so many steps.
      hook: the hook.
    """

    step: int
    hook: str = "on_train_batch_end"


class Presser(Callback):
    """Sends its own process a signal at a moment, once."""

    def __init__(self, press: Press | None, signum: int = signal.SIGINT) -> None:
        self._press = press
        self._signum = signum

    def _at(self, hook: str, loop: LoopState) -> None:
        if self._press == Press(loop.step, hook):
            self._press = None
            os.kill(os.getpid(), self._signum)

    def on_train_begin(self, loop):
        self._at("on_train_begin", loop)

    def on_epoch_begin(self, loop):
        self._at("on_epoch_begin", loop)

    def on_train_batch_begin(self, loop):
        self._at("on_train_batch_begin", loop)

    def on_train_batch_end(self, loop):
        self._at("on_train_batch_end", loop)

    def on_test_begin(self, loop):
        self._at("on_test_begin", loop)

    def on_test_end(self, loop):
        self._at("on_test_end", loop)

    def on_epoch_end(self, loop):
        self._at("on_epoch_end", loop)

    def on_train_end(self, loop):
        self._at("on_train_end", loop)


class Keeper(Callback):
    """Keeps the bytes of the state after each step."""

    def __init__(self) -> None:
        self._leaves: dict[int, Any] = {}

    @property
    def leaves(self) -> dict[int, Any]:
        """Step -> `leaves_of` the state."""
        return self._leaves

    def on_train_begin(self, loop):
        self._leaves[loop.step] = leaves_of(loop.state)

    def on_train_batch_end(self, loop):
        self._leaves[loop.step] = leaves_of(loop.state)


def fit(
    case: Case,
    run_dir: Path | None,
    *more: Callback,
    trainer: Trainer | None = None,
    **arguments: Any,
) -> Result:
    """Trains as the case says, as one line of a user's script would.

    Args:
      case: the training.
      run_dir: its folder.
      *more: further callbacks.
      trainer: None for a fresh one.
      **arguments: of `fit`, in place of those of the case.
    """
    trainer = case.trainer() if trainer is None else trainer
    callbacks = case.callbacks()
    options = {"batch_size": BATCH, "epochs": EPOCHS, "verbose": 0, **case.arguments}
    if case.batches:
        del options["batch_size"]
    history = trainer.fit(
        *case.data(),
        callbacks=[*callbacks, *more],
        run_dir=run_dir,
        **{**options, **arguments},
    )
    return result_of(trainer, history, callbacks)


def interrupted(case: Case, run_dir: Path, presses: Sequence[Press]) -> Result:
    """Trains with a Ctrl-C at each moment, each time on in a fresh trainer."""
    for press in presses:
        trainer = case.trainer()
        found = fit(case, run_dir, Presser(press), trainer=trainer)
        assert found.reason == "interrupted by Ctrl-C", (press, found.reason)
        # A step that has begun is finished.
        step = press.step + (press.hook == "on_train_batch_begin")
        assert trainer.step == step, (press, trainer.step)
    return fit(case, run_dir, Presser(None))


def use_cache(folder: Path) -> None:
    """Keeps compiled programs; for processes that end after a campaign.

    Args:
      folder: where, unless the environment names one for several campaigns.
    """
    use_compilation_cache(os.environ.get(CACHE, folder))


def caught(kind: type[Exception], function: Callable[..., Any], *args: Any) -> Any:
    """Returns the exception that `function(*args)` raises, a `kind`."""
    try:
        function(*args)
    except kind as err:
        return err
    raise AssertionError(f"no {kind.__name__} was raised")


def warned(function: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Returns what `function` returns, and the texts of its warnings."""
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        value = function()
    assert all(issubclass(r.category, UserWarning) for r in records), records
    return value, [str(record.message) for record in records]


def _tx(make: Callable[[], Any]) -> Callable[[], Mapping[str, Any]]:
    return lambda: {"optimizer": make(), "learning_rate": None}


def _plateau() -> Any:
    reduce = optax.contrib.reduce_on_plateau(patience=1, factor=0.5, rtol=0.2)
    return optax.chain(optax.sgd(0.5), reduce)


def _validated(rows: int = 8) -> dict[str, Any]:
    return {"validation_data": data(rows, seed=1)}


def _stopping() -> list[Callback]:
    return [EarlyStopping(patience=2)]


CASES = (
    Case("dropout", Net(dropout=0.3)),
    Case("in order", arguments={"shuffle": False}),
    Case("batch norm", Net(norm=True), arguments=_validated()),
    Case("schedule", options=lambda: {
        "learning_rate": lambda total_steps:
            optax.cosine_decay_schedule(0.1, total_steps)}),
    Case("plateau", options=_tx(_plateau)),
    Case("early stopping", arguments={**_validated(), "epochs": 6},
         callbacks=_stopping),
    Case("schedule free", options=_tx(
        lambda: optax.contrib.schedule_free_adamw(0.1, warmup_steps=4))),
    Case("average of updates", options=_tx(
        lambda: optax.chain(optax.adam(0.1), optax.ema(0.9)))),
    Case("lbfgs", options=_tx(lambda: optax.lbfgs(0.1))),
    Case("accumulation", options=lambda: {"accumulate_steps": 2}),
    Case("epochs across passes", arguments={"steps_per_epoch": 4}),
    Case("sample weights", arguments={
        "sample_weight": np.linspace(0, 2, ROWS).astype(np.float32)}),
    Case("bfloat16", Net(dtype=jnp.bfloat16)),
    Case("last batch shorter", rows=22),
    Case("function of batches", batches=True),
)  # fmt: skip
