"""Losses that are not finite, too little memory, errors, wrong data (F9 to F12)."""

import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from harness import Outcome, Tally, fresh
from training import (
    BATCH,
    EPOCHS,
    STEPS,
    STEPS_PER_EPOCH,
    Case,
    Keeper,
    Net,
    Result,
    assert_same,
    assert_same_state,
    caught,
    data,
    fit,
    leaves_of,
    use_cache,
    warned,
)

from flaxfit import Callback, LambdaCallback, Trainer, checkpoint

# F9

_TOO_FAR = 1e30  # its square is infinite in float32
_LAYER = nn.Dense(1)


def f9_nonfinite(trials: int, seed: int, folder: Path) -> Outcome:
    """The loss of step k is infinite: in each mode, with and without saves."""
    return fresh(_f9, trials, seed, folder, timeout=3600)


def _f9(trials: int, seed: int, folder: Path) -> Outcome:
    use_cache(folder / "cache")
    tally, chance = Tally(), np.random.default_rng(seed)
    table = Keeper()
    _train_on(range(STEPS), folder / "whole", table)
    for trial in range(trials):
        bad = int(chance.integers(1, STEPS + 1)) if trial else 1
        check = (_stops, _skips, _rolls_back)[trial % 3]
        often = trial % 2 == 0
        run = folder / f"run {trial}"
        name = check.__name__.strip("_")
        with tally.trial(f"{name} at step {bad}, {'each step' if often else ''} saved"):
            check(bad, run, table, {"save_every": 1} if often else {})
            _assert_all_finite(run)
        shutil.rmtree(run, ignore_errors=True)
    for mode in ("stop", "skip", "rollback"):
        with tally.trial(f"host reads, {mode}"):
            _assert_reads_do_not_grow(mode, folder / f"reads {mode}")
    return tally.outcome()


def _rows(bad: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """One row of batches for every step; the target of one row of step `bad` is far."""
    x, _ = data(STEPS * BATCH)
    x = x / np.float32(STEPS * BATCH)
    y = x.sum(1, keepdims=True).astype(np.float32)
    if bad is not None:
        y[(bad - 1) * BATCH + 1] = _TOO_FAR
    return x, y


def _train_on(
    batches: Any,
    run: Path | None,
    *callbacks: Callback,
    bad: int | None = None,
    mode: str = "stop",
    **arguments: Any,
) -> tuple[Trainer, Any]:
    """Trains once on each of `batches`, in order."""
    x, y = _rows(bad)
    rows = np.concatenate([np.arange(b * BATCH, (b + 1) * BATCH) for b in batches])
    count = len(batches)
    epochs = EPOCHS if count == STEPS else 1
    trainer = Trainer(_LAYER, learning_rate=0.1, devices=1, nonfinite=mode)
    history = trainer.fit(
        x[rows], y[rows], batch_size=BATCH, shuffle=False, verbose=0, run_dir=run,
        epochs=epochs, steps_per_epoch=count // epochs, callbacks=[*callbacks],
        **arguments,
    )  # fmt: skip
    return trainer, history


def _assert_named(texts: list[str], bad: int) -> None:
    epoch, batch = divmod(bad - 1, STEPS_PER_EPOCH)
    where = f"step {bad} (epoch {epoch + 1}, batch {batch + 1})"
    assert len(texts) == 1 and where in texts[0], (where, texts)


def _assert_same_weights(trainer: Trainer, other: Trainer) -> None:
    """All but the step, which counts batches that were left out."""
    one, two = (t.state.replace(step=t.state.step * 0) for t in (trainer, other))
    assert_same_state(one, leaves_of(two))


def _assert_history_finite(history: Any) -> None:
    values = [v for values in history.history.values() for v in values]
    assert np.isfinite(values).all(), history.history


def _stops(bad: int, run: Path, table: Keeper, saves: dict[str, Any]) -> None:
    (trainer, history), texts = warned(
        lambda: _train_on(range(STEPS), run, bad=bad, **saves)
    )
    _assert_named(texts, bad)
    last = (bad - 1) // STEPS_PER_EPOCH * STEPS_PER_EPOCH
    assert trainer.step == (bad - 1 if saves else last), trainer.step
    assert_same_state(trainer.state, table.leaves[trainer.step])
    assert history.epoch == [*range((bad - 1) // STEPS_PER_EPOCH)]
    assert f"step {bad} " in history.stop_reason, history.stop_reason
    _assert_history_finite(history)
    # With whole data, the same line goes on, and ends as if nothing had been.
    trainer, history = _train_on(range(STEPS), run, **saves)
    assert_same_state(trainer.state, table.leaves[STEPS])


def _skips(bad: int, run: Path, table: Keeper, saves: dict[str, Any]) -> None:
    (trainer, history), texts = warned(
        lambda: _train_on(range(STEPS), run, bad=bad, mode="skip", **saves)
    )
    _assert_named(texts, bad)
    good = [step for step in range(STEPS) if step != bad - 1]
    wanted, _ = _train_on(good, None, mode="skip")
    _assert_same_weights(trainer, wanted)
    assert (trainer.step, history.epoch) == (STEPS, [0, 1, 2])
    _assert_history_finite(history)


def _rolls_back(bad: int, run: Path, table: Keeper, saves: dict[str, Any]) -> None:
    (trainer, history), texts = warned(
        lambda: _train_on(range(STEPS), run, bad=bad, mode="rollback", **saves)
    )
    _assert_named(texts, bad)
    last = (bad - 1) // STEPS_PER_EPOCH * STEPS_PER_EPOCH
    back = bad - 1 if saves else last
    assert f"checkpoint of step {back};" in texts[0], texts
    good = [step for step in range(STEPS) if not back <= step < bad]
    wanted, _ = _train_on(good, None, mode="rollback" if run is None else "stop")
    assert_same_state(trainer.state, leaves_of(wanted.state))
    assert history.epoch == [0, 1, 2]
    _assert_history_finite(history)


def _assert_all_finite(run: Path) -> None:
    files = [*run.glob("*.msgpack")]
    assert files
    for file in files:
        for leaf in jax.tree.leaves(checkpoint.load(file).state):
            array = np.asarray(leaf)
            if array.dtype.kind == "f":
                assert np.isfinite(array).all(), file.name


def _assert_reads_do_not_grow(mode: str, run: Path) -> None:
    original, counts = jax.device_get, []

    def counted(tree: Any) -> Any:
        counts[-1] += 1
        return original(tree)

    jax.device_get = counted
    try:
        for number, size in enumerate((BATCH, 2 * BATCH)):
            counts.append(0)
            trainer = Trainer(_LAYER, devices=1, nonfinite=mode)
            trainer.fit(*_rows(), batch_size=size, verbose=0, run_dir=run / f"{number}")
    finally:
        jax.device_get = original
    assert counts[0] == counts[1] > 0, counts


# F10

_SIDE = 2**20


class _Hungry(nn.Module):
    """With more rows than `BATCH` it takes more memory than can be addressed."""

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(4)(x)
        if x.shape[0] > BATCH:
            shape = (x.shape[0], _SIDE, _SIDE)
            wide = jnp.broadcast_to(h[:, :1, None], shape)
            h = h + jnp.sort(jnp.sin(wide), axis=2)[:, 0, :4]
        return nn.Dense(3)(h)


def f10_out_of_memory(trials: int, seed: int, folder: Path) -> Outcome:
    """A batch too large: the error says so, and the trainer is as it was before."""
    return fresh(_f10, trials, seed, folder, timeout=600)


def _f10(trials: int, seed: int, folder: Path) -> Outcome:
    tally = Tally()
    x, y = data(64, seed)
    for trial in range(trials):
        with tally.trial(f"trial {trial}"):
            trainer = Trainer(_Hungry(), learning_rate=0.1, devices=1)
            if trial % 2:
                trainer.fit(x, y, batch_size=BATCH, verbose=0)
            before = trainer.step
            run = folder / f"run {trial}"
            error = caught(
                Exception,
                lambda t=trainer, run=run: t.fit(
                    x, y, batch_size=64, verbose=0, run_dir=run
                ),
            )
            text = "\n".join([str(error), *getattr(error, "__notes__", ())])
            assert "RESOURCE_EXHAUSTED" in text, text
            assert "batch_size=" in text, f"no word of what to do: {text}"
            assert trainer.step == before
            trainer.evaluate(x, y, batch_size=BATCH, verbose=0)
            trainer.fit(x, y, batch_size=BATCH, verbose=0)
            assert trainer.step == before + 64 // BATCH
        with tally.trial(f"trial {trial}, a later batch"):
            before, small = trainer.step, (x[:BATCH], y[:BATCH])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a batch that is larger
                error = caught(
                    Exception,
                    lambda t=trainer, small=small: t.fit(
                        [small, small, (x, y)], verbose=0
                    ),
                )
            text = "\n".join([str(error), *getattr(error, "__notes__", ())])
            assert "RESOURCE_EXHAUSTED" in text and "batch_size=" in text, text
            assert trainer.step == before + 2
            trainer.fit(x, y, batch_size=BATCH, verbose=0)
            assert trainer.step == before + 2 + 64 // BATCH
    return tally.outcome()


# F11

_AT = 9  # a step within the second epoch


def f11_exceptions(trials: int, seed: int, folder: Path) -> Outcome:
    """What the user wrote raises; the error arrives, and nothing is lost.

    Each once; with two or more trials also while each step is saved.
    """
    del seed
    return fresh(_f11, trials, folder, timeout=3600)


def _f11(trials: int, folder: Path) -> Outcome:
    use_cache(folder / "cache")
    tally, case = Tally(), Case("in order", Net(dropout=0.3), batches=True)
    case = case._replace(arguments={"validation_data": data(8, seed=1)})
    wanted = fit(case, None)
    hooks = [name for name in vars(Callback) if name.startswith("on_")]
    for save_every in (None, 1)[:trials]:
        for hook in hooks:
            run = folder / f"{hook} {save_every}"
            with tally.trial(f"{hook}, save_every={save_every}"):
                _raises_in_a_hook(case, wanted, run, hook, save_every)
        for name, check in _PLACES.items():
            with tally.trial(f"{name}, save_every={save_every}"):
                check(case, wanted, folder / f"{name} {save_every}", save_every)
    return tally.outcome()


class _Failing(Callback):
    """Raises in one hook, once so many steps are done."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self._fail)
        self._hook = hook

    def _fail(self, loop: Any) -> None:
        first = self._hook in ("on_train_begin",)
        if first or loop.step >= _AT:
            raise ZeroDivisionError("mine")


def _raises_in_a_hook(
    case: Case, wanted: Result, run: Path, hook: str, save_every: int | None
) -> None:
    ended: list[int] = []
    end = LambdaCallback(on_train_end=lambda loop: ended.append(loop.step))
    trainer = case.trainer()
    error = caught(
        ZeroDivisionError,
        lambda: fit(
            case, run, _Failing(hook), end, trainer=trainer, save_every=save_every
        ),
    )
    assert str(error) == "mine"
    notes = " ".join(error.__notes__)
    assert f"_Failing.{hook}" in notes, notes
    assert len(ended) == 1
    _assert_goes_on(case, wanted, run, trainer, save_every)


def _assert_goes_on(
    case: Case, wanted: Result, run: Path, trainer: Trainer, save_every: Any
) -> None:
    """The trainer works, and the run ends as if nothing had been."""
    assert_same(fit(case, run, save_every=save_every), wanted)
    step = trainer.step
    fit(case, None, trainer=trainer, epochs=1)
    assert trainer.step == step + STEPS_PER_EPOCH


def _loader(case: Case, wanted: Result, run: Path, save_every: Any) -> None:
    passes: list[int] = []

    def batches() -> Iterator[Any]:
        passes.append(0)
        for number, batch in enumerate(case.data()[0]()):
            if len(passes) == 3 and number == 2:  # the first look, and an epoch
                raise OSError("disk gone")
            yield batch

    trainer = case.trainer()
    error = caught(OSError, lambda: _fit_data(case, trainer, batches, run, save_every))
    assert str(error) == "disk gone"
    assert "batch 2" in " ".join(error.__notes__), error.__notes__
    _assert_goes_on(case, wanted, run, trainer, save_every)


def _fit_data(
    case: Case, trainer: Trainer, batches: Any, run: Path, save_every: Any
) -> None:
    trainer.fit(
        batches, epochs=EPOCHS, run_dir=run, save_every=save_every, verbose=0,
        **case.arguments,
    )  # fmt: skip


def _bad_batch(case: Case, wanted: Result, run: Path, save_every: Any) -> None:
    passes: list[int] = []

    def batches() -> Iterator[Any]:
        passes.append(0)
        for number, (x, y) in enumerate(case.data()[0]()):
            yield (x[:, :2] if len(passes) == 3 and number == 2 else x), y

    trainer = case.trainer()
    error = caught(
        ValueError, lambda: _fit_data(case, trainer, batches, run, save_every)
    )
    text = str(error) + " ".join(getattr(error, "__notes__", ()))
    assert "batch 2" in text, text
    _assert_goes_on(case, wanted, run, trainer, save_every)


def _traced(what: str) -> Callable[..., None]:
    """A loss or a metric that raises when it is traced."""

    def fail(outputs: Any, targets: Any) -> Any:
        raise ZeroDivisionError("mine")

    def check(case: Case, wanted: Result, run: Path, save_every: Any) -> None:
        trainer = case.trainer(**{what: [fail] if what == "metrics" else fail})
        error = caught(
            ZeroDivisionError,
            lambda: fit(case, run, trainer=trainer, save_every=save_every),
        )
        assert str(error) == "mine"
        assert_same(fit(case, run, save_every=save_every), wanted)

    return check


def _save(case: Case, wanted: Result, run: Path, save_every: Any) -> None:
    """Writing fails twice: warnings, and then it works again."""
    write, count = checkpoint.write, []

    def failing(*args: Any, **kwargs: Any) -> None:
        count.append(0)
        if len(count) in (3, 4):
            raise OSError("no room")
        write(*args, **kwargs)

    checkpoint.write = failing
    try:
        found, texts = warned(lambda: fit(case, run, save_every=save_every))
    finally:
        checkpoint.write = write
    assert_same(found, wanted)
    assert len(texts) == 2 and all("no room" in text for text in texts), texts


def _state_dict(case: Case, wanted: Result, run: Path, save_every: Any) -> None:
    """What a callback remembers cannot be written: said before the first step."""

    class Remembers(Callback):
        def state_dict(self):
            return {"it": object()}

    trainer = case.trainer()
    error: Any = None
    try:
        _, texts = warned(
            lambda: fit(case, run, Remembers(), trainer=trainer, save_every=save_every)
        )
    except Exception as err:
        error, texts = err, []
    assert error is not None or texts, "it was not said"
    shutil.rmtree(run, ignore_errors=True)
    assert_same(fit(case, run, save_every=save_every), wanted)


_PLACES = {
    "loader": _loader,
    "batch of another shape": _bad_batch,
    "loss": _traced("loss"),
    "metric": _traced("metrics"),
    "save": _save,
    "state_dict": _state_dict,
}


# F12


def f12_data(trials: int, seed: int, folder: Path) -> Outcome:
    """Each wrong data once: an error before step 1 that says what is wrong."""
    del trials, seed
    return fresh(_f12, folder, timeout=3600)


def _f12(folder: Path) -> Outcome:
    use_cache(folder / "cache")
    tally, case = Tally(), Case("plain", nn.Dense(3))
    wanted = fit(case, None)
    run = folder / "run"
    for name, (given, words) in _wrong_data().items():
        trainer = case.trainer()
        with tally.trial(name):
            size = {"batch_size": BATCH} if len(given) == 2 else {}
            error = caught(
                Exception,
                lambda given=given, t=trainer, size=size: t.fit(
                    *given, **size, epochs=EPOCHS, verbose=0, run_dir=run
                ),
            )
            text = str(error) + " ".join(getattr(error, "__notes__", ()))
            assert isinstance(error, ValueError | TypeError), repr(error)
            assert all(word in text for word in words), text
            assert trainer.step == 0
            assert not list(run.glob("*.msgpack")), "something was saved"
            fit(case, None, trainer=trainer, epochs=1)
    with tally.trial("the folder afterwards"):
        assert_same(fit(case, run), wanted)
    return tally.outcome()


def _wrong_data() -> dict[str, tuple[tuple[Any, ...], tuple[str, ...]]]:
    x, y = data()
    ragged = [[1.0, 2.0], [1.0]] * 12
    nan, far = x.copy(), x.copy()
    nan[5, 2], far[3, 1] = np.nan, np.inf
    negative, large, gap = y.copy(), y.copy(), y.astype(np.float32)
    negative[3], large[3], gap[3] = -1, 3, np.nan
    words = np.array(["a"] * len(x))
    return {
        "empty": ((x[:0], y[:0]), ()),
        "lengths differ": ((x, y[:-1]), ("24", "23")),
        "no targets": ((x,), ()),
        "nan in the inputs": ((nan, y), ("5",)),
        "infinity in the inputs": ((far, y), ("3",)),
        "nan in the targets": ((x, gap), ()),
        "label too large": ((x, large), ("3",)),
        "label negative": ((x, negative), ("-1",)),
        "labels as texts": ((x, words), ()),
        "inputs as texts": ((np.array([["a"] * 4] * len(x)), y), ()),
        "objects": ((x.astype(object), y), ("object",)),
        "ragged": ((ragged, y), ()),
        "a scalar": ((np.float32(1), y), ()),
        "None": ((None,), ("None",)),
        "a number": ((3,), ("int",)),
        "a text": (("data.csv",), ("data.csv",)),
        "one batch in place of batches": (([],), ()),
        "an empty iterable": ((lambda: iter(()),), ()),
        "an iterator for three epochs": ((iter([(x[:4], y[:4])]),), ("iterator",)),
        "batches of three things too many": (([(x[:4], y[:4], y[:4], y[:4])],), ()),
        "batches of objects": (([(object(), y[:4])],), ()),
        "batch whose lengths differ": (([(x[:4], y[:3])],), ("4", "3")),
        "a dict without targets": (({"a": x},), ()),
        "columns of another length": (({"a": x, "b": y[:3]},), ()),
        "targets of another rank": ((x, np.zeros((24, 2, 2), np.float32)), ()),
    }
