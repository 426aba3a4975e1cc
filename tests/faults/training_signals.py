"""Killed, interrupted and terminated at any time (F1 F6 F7).

Those that fork run in a process without a backend; each child has its own.
"""

import contextlib
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
from harness import Child, Outcome, Tally, fresh
from training import (
    CASES,
    STEPS,
    STEPS_PER_EPOCH,
    Case,
    Keeper,
    Net,
    Press,
    Presser,
    Result,
    assert_same,
    assert_same_state,
    caught,
    data,
    fit,
    use_cache,
)

from flaxfit import LambdaCallback, checkpoint

_CASES = (
    Case("plain", Net(dropout=0.3), arguments={"validation_data": data(8, seed=1)}),
    next(case for case in CASES if case.name == "early stopping"),
    next(case for case in CASES if case.name == "accumulation"),
)


def _fit(case: Case, run_dir: Path | None, cache: Path) -> Result:
    """The line that is run again and again: each time with the same callbacks."""
    use_cache(cache)
    return fit(
        case,
        run_dir,
        LambdaCallback(on_train_batch_end=lambda loop: None),
        save_every=1,
    )


# F1


def f1_kill_a_training(trials: int, seed: int, folder: Path) -> Outcome:
    """kill -9 while each step is saved; a fresh process ends as if nothing was."""
    tally, chance, cache = Tally(), random.Random(seed), folder / "cache"
    for number, case in enumerate(_CASES):
        share = range(number, trials, len(_CASES))
        if not share:
            continue
        wanted = fresh(_fit, case, folder / f"whole {number}", cache)
        for trial in share:
            run = folder / f"run {trial}"
            with tally.trial(f"{case.name}, trial {trial}"):
                kills = _killed(case, run, cache, chance, len(wanted.epochs))
                found = fresh(_fit, case, run, cache)
                assert_same(found, wanted)
                assert not list(run.glob("*.tmp*")), f"left over after {kills} kills"
            shutil.rmtree(run, ignore_errors=True)
    return tally.outcome()


def _killed(
    case: Case, run: Path, cache: Path, chance: random.Random, epochs: int
) -> int:
    """Kills one or two processes of a run, each after some steps; returns how many."""
    kills = chance.choice((1, 1, 2))
    for _ in range(kills):
        child = Child(_acknowledging, case, run, cache)
        child.await_acknowledged(chance.randrange(epochs * STEPS_PER_EPOCH))
        time.sleep(chance.random() * 0.01)
        child.kill()
    return kills


def _acknowledging(
    acknowledge: Callable[[int], None], case: Case, run: Path, cache: Path
) -> None:
    use_cache(cache)
    told = LambdaCallback(on_train_batch_end=lambda loop: acknowledge(loop.step))
    fit(case, run, told, save_every=1)


# F6

_EPOCHS = 300


def f6_ctrl_c(trials: int, seed: int, folder: Path) -> Outcome:
    """Ctrl-C at a random time, now and then twice, also while it compiles."""
    return fresh(_f6, trials, seed, folder, timeout=36_000)


def _f6(trials: int, seed: int, folder: Path) -> Outcome:
    use_cache(folder / "cache")
    tally, chance = Tally(), random.Random(seed)
    case = Case("long", Net(dropout=0.3), arguments={"epochs": _EPOCHS})
    keeper, trainer, start = Keeper(), case.trainer(), []
    begin = LambdaCallback(on_train_begin=lambda loop: start.append(loop.state))
    fit(case, None, begin, keeper, trainer=trainer)
    handler, returned = signal.getsignal(signal.SIGINT), 0
    for trial in range(trials):
        anew, twice = trial % 4 == 3, trial % 5 == 4
        if anew:
            trainer = case.trainer()
        else:
            trainer.state = start[0]
        seconds = chance.random() * (0.4 if anew else 0.03)
        again = chance.random() * 0.004 if twice else None
        with tally.trial(f"after {seconds:.4f} s, again after {again}"):
            reason = _pressed(case, trainer, seconds, again)
            returned += reason == "interrupted by Ctrl-C"
            assert reason == "interrupted by Ctrl-C" or twice or reason == "raised"
            assert signal.getsignal(signal.SIGINT) is handler
            if trainer.step or not anew:
                assert_same_state(trainer.state, keeper.leaves[trainer.step])
            before = trainer.step
            fit(case, None, trainer=trainer, epochs=1)
            assert trainer.step == before + STEPS_PER_EPOCH
    with tally.trial("most of them came while it trained"):
        assert returned >= trials // 3, returned
    with tally.trial("the second one ends"):
        _assert_second_ends(case)
    return tally.outcome()


def _pressed(case: Case, trainer: Any, seconds: float, again: float | None) -> Any:
    """Fits with a signal on the way; returns why it ended, "raised" for an error."""

    def press() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGINT)
        if again is not None:
            time.sleep(again)
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    reason: Any = "raised"
    try:
        # Before `fit` has begun, or after its end, it is the user's.
        try:
            thread.start()
            reason = fit(case, None, trainer=trainer).reason
        finally:
            thread.join()
    except KeyboardInterrupt:
        with contextlib.suppress(KeyboardInterrupt):
            thread.join()
    return reason


def _assert_second_ends(case: Case) -> None:
    def press(loop):
        if loop.step == 8:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    trainer = case.trainer()
    try:
        fit(case, None, LambdaCallback(on_train_batch_end=press), trainer=trainer)
    except KeyboardInterrupt:
        assert trainer.step == 8
        return
    raise AssertionError("the second Ctrl-C did not end it")


# F7


def f7_sigterm(trials: int, seed: int, folder: Path) -> Outcome:
    """SIGTERM at a random time and at certain ones: saved, status 143, resumed."""
    tally, chance, cache = Tally(), random.Random(seed), folder / "cache"
    case = _CASES[0]
    wanted = fresh(_fit, case, folder / "whole", cache)
    moments: list[Any] = [chance.random() * 0.6 for _ in range(trials)]
    for number, moment in enumerate([*_MOMENTS, *moments]):
        run = folder / f"run {number}"
        with tally.trial(f"at {moment}"):
            child = Child(_terminated, case, run, cache, moment)
            if isinstance(moment, float):
                child.await_acknowledged(1)
                time.sleep(moment)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGTERM)
            status = os.waitstatus_to_exitcode(child.join())
            ended = isinstance(moment, float) and status == 0
            assert ended or status == 143, status
            assert_same(fresh(_fit, case, run, cache), wanted)
    for check in (_a_handler_of_the_user, _off_the_main_thread, _outside_of_fit):
        with tally.trial(check.__name__.strip("_").replace("_", " ")):
            fresh(check, folder / check.__name__, cache)
    return tally.outcome()


_MOMENTS = ("compile", "test", "before writing", "after writing")


def _terminated(
    acknowledge: Callable[[int], None], case: Case, run: Path, cache: Path, moment: Any
) -> None:
    use_cache(cache)
    began = LambdaCallback(on_train_begin=lambda loop: acknowledge(loop.step))
    callbacks = [began]
    if moment == "compile":
        case = case._replace(model=_TerminatingNet(Net(dropout=0.3)))
    elif moment == "test":
        callbacks.append(Presser(Press(STEPS_PER_EPOCH, "on_test_begin"), _TERM))
    try:
        with _terminated_while(moment):
            fit(case, run, *callbacks)
    except SystemExit as err:
        os._exit(err.code)


_TERM = signal.SIGTERM


@contextlib.contextmanager
def _terminated_while(moment: Any) -> Iterator[None]:
    """Sends SIGTERM around the second file that is written, from that thread."""
    write, count = checkpoint.write, 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2 and moment == "before writing":
            os.kill(os.getpid(), _TERM)
        value = write(*args, **kwargs)
        if count == 2 and moment == "after writing":
            os.kill(os.getpid(), _TERM)
        return value

    checkpoint.write = counted
    try:
        yield
    finally:
        checkpoint.write = write


class _Traced:
    count = 0


class _TerminatingNet(nn.Module):
    """Asks for the end of its process while it is traced for training."""

    net: nn.Module

    def setup(self):
        self.inner = nn.share_scope(self, self.net)

    def __call__(self, x, train: bool):
        if train and not self.is_initializing():
            _Traced.count += 1
            if _Traced.count == 2:
                os.kill(os.getpid(), _TERM)
        return self.net(x, train)


def _a_handler_of_the_user(folder: Path, cache: Path) -> None:
    use_cache(cache)
    calls: list[int] = []

    def handler(signum, frame):
        calls.append(signum)

    signal.signal(_TERM, handler)
    error: BaseException | None = None
    try:
        fit(_CASES[0], folder, Presser(Press(8), _TERM))
    except SystemExit as err:
        error = err
    assert isinstance(error, SystemExit) and error.code == 143, error
    assert calls == [_TERM] and signal.getsignal(_TERM) is handler, calls
    assert max(f.name for f in folder.glob("step-*")) == "step-0000000008.msgpack"


def _off_the_main_thread(folder: Path, cache: Path) -> None:
    use_cache(cache)
    numbers = (signal.SIGINT, _TERM)
    before, seen = [signal.getsignal(n) for n in numbers], []
    look = LambdaCallback(
        on_epoch_end=lambda loop: seen.append([signal.getsignal(n) for n in numbers])
    )
    thread = threading.Thread(target=lambda: fit(_CASES[0], folder, look))
    thread.start()
    thread.join()
    assert len(seen) == STEPS // STEPS_PER_EPOCH and all(s == before for s in seen)


def _outside_of_fit(folder: Path, cache: Path) -> None:
    use_cache(cache)
    numbers = (signal.SIGINT, _TERM)
    before, seen = [signal.getsignal(n) for n in numbers], []
    look = LambdaCallback(
        on_epoch_end=lambda loop: seen.append([signal.getsignal(n) for n in numbers])
    )
    fit(_CASES[0], folder, look)
    assert all(now != then for s in seen for now, then in zip(s, before, strict=True))
    assert [signal.getsignal(n) for n in numbers] == before
    caught(ValueError, lambda: fit(_CASES[0], folder, epochs=0))
    assert [signal.getsignal(n) for n in numbers] == before
