"""Two processes that train together, one of which dies or sees another folder (F18).

jax itself ends the processes that are left when the first one is gone; what counts is
what lies in the folder, and that both go on from the same step.
"""

import os
import random
import shutil
import signal
import socket
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from harness import Child, ChildError, Outcome, SkippedError, Tally, fresh
from training import (
    EPOCHS,
    STEPS,
    STEPS_PER_EPOCH,
    Case,
    Net,
    Press,
    Presser,
    Result,
    assert_same,
    fit,
    use_cache,
)

from flaxfit import CheckpointError, LambdaCallback, checkpoint

_CASE = Case("plain", Net(dropout=0.3))
_SECONDS = 60.0  # longer is a hang
_HEARTBEAT = 4


def f18_two_processes(trials: int, seed: int, folder: Path) -> Outcome:
    """One dies before, in or after a save; both see other folders; both resume."""
    tally, chance, cache = Tally(), random.Random(seed), folder / "cache"
    wanted = fresh(_alone, folder / "whole", cache)
    together = _together(_trains, folder / "both", cache)
    if any(isinstance(value, ChildError) for value in together):
        raise SkippedError(f"jax.distributed does not start here: {together}")
    with tally.trial("nobody dies"):
        _assert_all_are(together, wanted)
    with tally.trial("one writes"):
        _assert_one_wrote(folder / "both")
    for trial in range(trials):
        run = folder / f"run {trial}"
        moment = _MOMENTS[trial % len(_MOMENTS)]
        victim = trial % 2
        with tally.trial(f"process {victim} dies {moment}"):
            _one_dies(run, cache, wanted, victim, moment, chance)
        shutil.rmtree(run, ignore_errors=True)
    for check in (_other_folders, _other_steps):
        with tally.trial(check.__name__.strip("_").replace("_", " ")):
            check(folder / check.__name__, cache)
    return tally.outcome()


def _alone(run: Path, cache: Path) -> Result:
    use_cache(cache)
    return fit(_CASE, run)


def _together(function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function` returns in each of two processes, or the error it raised."""
    children = _start(True, function, *args)
    deadline = time.monotonic() + _SECONDS
    return [_value(child, deadline) for child in children]


def _start(together: bool, function: Callable[..., Any], *args: Any) -> list[Child]:
    """Starts two processes; with `together` each waits for the other at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = port, together, function, *args
    return [Child(_joined, number, *given) for number in range(2)]


def _value(child: Child, deadline: float) -> Any:
    try:
        return child.result(max(1.0, deadline - time.monotonic()))
    except ChildError as err:
        return err


def _joined(
    acknowledge: Callable[[int], None],
    number: int,
    port: int,
    together: bool,
    function: Callable[..., Any],
    *args: Any,
) -> Any:
    # jax and gloo write pages of what is meant to happen here.
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        2,
        number,
        initialization_timeout=30,
        heartbeat_timeout_seconds=_HEARTBEAT,
        shutdown_timeout_seconds=20,
    )
    value = function(acknowledge, number, *args)
    if together:
        jax.distributed.shutdown()  # the first one to end would end the other
    return value


def _trains(
    acknowledge: Callable[[int], None],
    number: int,
    run: Path,
    cache: Path,
    death: tuple[int, str, int] | None = None,
) -> tuple[int, Result]:
    """Trains; the victim dies at a moment. Returns where it began, and the result."""
    use_cache(cache / f"{number}")
    began: list[int] = []
    callbacks = [LambdaCallback(on_epoch_begin=lambda loop: began.append(loop.step))]
    if death is not None and death[0] == number:
        callbacks.append(_dying(*death[1:]))
    told = LambdaCallback(on_train_batch_end=lambda loop: acknowledge(loop.step))
    found = fit(_CASE, run, *callbacks, told, save_every=1)
    return (began or [STEPS])[0], found


_MOMENTS = ("before a save", "in a save", "after a save", "at any time")


def _dying(moment: str, step: int) -> Any:
    """A callback after which the process dies, around the save of a step."""
    if moment == "before a save":
        return Presser(Press(step), signal.SIGKILL)
    if moment == "at any time":
        return LambdaCallback()
    write, replace, count = checkpoint.write, os.replace, []

    def counted(*args: Any, **kwargs: Any) -> None:
        count.append(0)
        write(*args, **kwargs)
        if len(count) > step:
            os.kill(os.getpid(), signal.SIGKILL)

    def replaced(*args: Any, **kwargs: Any) -> None:
        if len(count) > step:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*args, **kwargs)

    checkpoint.write = counted
    if moment == "in a save":
        os.replace = replaced
    # A process that does not write dies at the same step.
    if jax.process_index():
        return Presser(Press(step), signal.SIGKILL)
    return LambdaCallback()


def _one_dies(
    run: Path,
    cache: Path,
    wanted: Result,
    victim: int,
    moment: str,
    chance: random.Random,
) -> None:
    step = chance.randrange(1, STEPS)
    children = _start(False, _trains, run, cache, (victim, moment, step))
    if moment == "at any time":
        children[victim].await_acknowledged(step)
        time.sleep(chance.random() * 0.01)
        children[victim].kill()
    deadline = time.monotonic() + _SECONDS
    found = [_value(child, deadline) for child in children]
    assert time.monotonic() < deadline, "it hung"
    assert isinstance(found[victim], ChildError) or moment == "at any time"
    if victim == 1:  # the first one goes on alone
        assert not isinstance(found[0], ChildError), str(found[0])[-500:]
        assert_same(found[0][1], wanted)
    for file in run.glob("*.msgpack"):
        checkpoint.load(file)
    _assert_all_are(_together(_trains, run, cache), wanted)
    _assert_one_wrote(run)


def _assert_all_are(found: list[Any], wanted: Result) -> None:
    for value in found:
        assert not isinstance(value, ChildError), str(value)[-500:]
    (one, result), (other, second) = found
    assert one == other, f"one began at step {one}, the other at {other}"
    assert_same(result, wanted)
    assert_same(second, wanted)


def _assert_one_wrote(run: Path) -> None:
    lines = (run / "log.jsonl").read_text().splitlines()
    ends = [line for line in lines if '"event": "end"' in line]
    starts = [line for line in lines if '"event": "start"' in line]
    assert len(starts) == 1 and ends, lines
    files = sorted(f.name for f in run.glob("step-*"))
    last = [STEPS - 1, STEPS]
    assert files == [f"step-{step:010d}.msgpack" for step in last], files


def _refused(
    acknowledge: Callable[[int], None], number: int, runs: list[Path], cache: Path
) -> str:
    del acknowledge
    use_cache(cache / f"{number}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fit(_CASE, runs[number])
        except CheckpointError as err:
            return str(err)
    return "it trained"


def _prepared(run: Path, cache: Path, epochs: int) -> None:
    use_cache(cache)
    fit(_CASE, run, epochs=epochs)


def _other_folders(folder: Path, cache: Path) -> None:
    """The first process sees a run, the second an empty folder."""
    fresh(_prepared, folder / "a", cache, 1)
    _assert_refused([folder / "a", folder / "b"], cache, f"[{STEPS_PER_EPOCH}, -1]")


def _other_steps(folder: Path, cache: Path) -> None:
    """The second sees an older state of the folder."""
    fresh(_prepared, folder / "a", cache, EPOCHS)
    fresh(_prepared, folder / "b", cache, 1)
    runs = [folder / "a", folder / "b"]
    _assert_refused(runs, cache, f"[{STEPS}, {STEPS_PER_EPOCH}]")


def _assert_refused(runs: list[Path], cache: Path, words: str) -> None:
    before = {f: f.read_bytes() for run in runs for f in run.glob("*.msgpack")}
    for text in _together(_refused, runs, cache):
        assert "different steps" in str(text) and words in str(text), str(text)[-300:]
    for file, content in before.items():
        assert file.read_bytes() == content
