"""A run that is broken off and goes on is the run that was not (F8 F19 F20)."""

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from harness import Outcome, Tally, fresh
from training import (
    BATCH,
    CASES,
    EPOCHS,
    ROWS,
    STEPS,
    STEPS_PER_EPOCH,
    Case,
    Keeper,
    Net,
    Press,
    Presser,
    Result,
    assert_same,
    caught,
    data,
    fit,
    interrupted,
    leaves_of,
    use_cache,
    warned,
)

from flaxfit import CheckpointError, LambdaCallback, Trainer, checkpoint

_HOOKS = (
    Press(0, "on_train_begin"),
    Press(0, "on_epoch_begin"),
    Press(7, "on_train_batch_begin"),
    Press(STEPS_PER_EPOCH, "on_test_begin"),
    Press(STEPS_PER_EPOCH, "on_test_end"),
    Press(STEPS_PER_EPOCH, "on_epoch_end"),
    Press(STEPS_PER_EPOCH, "on_epoch_begin"),
    Press(STEPS, "on_epoch_end"),
)


def f8_interrupted_everywhere(trials: int, seed: int, folder: Path) -> Outcome:
    """Ctrl-C after each step, and in each hook; `trials` moments for each case."""
    return fresh(_f8, trials, seed, folder, timeout=36_000)


def _f8(trials: int, seed: int, folder: Path) -> Outcome:
    use_cache(folder / "cache")
    tally, chance = Tally(), random.Random(seed)
    for case in CASES:
        wanted = fit(case, None)
        steps = _steps_of(wanted)
        assert steps > STEPS_PER_EPOCH
        moments = sorted(chance.sample(range(1, steps + 1), min(trials, steps)))
        if trials < STEPS:
            # One run that is interrupted again and again.
            _try(tally, case, wanted, [Press(k) for k in moments], folder / "run")
            continue
        for k in range(1, steps + 1):
            _try(tally, case, wanted, [Press(k)], folder / "run")
    for number in (2, 5):
        case, wanted = CASES[number], fit(CASES[number], None)
        if trials < STEPS:
            _try(tally, case, wanted, _HOOKS[:-1], folder / "run")
            continue
        for press in _HOOKS:
            _try(tally, case, wanted, [press], folder / "run")
    return tally.outcome()


def _steps_of(result: Result) -> int:
    """The steps of all of its epochs; a best state that came back is of fewer."""
    order = len(result.epochs)
    return order * STEPS_PER_EPOCH if ".step" in result.leaves else 0


def _try(
    tally: Tally, case: Case, wanted: Result, presses: Any, folder: Path
) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with tally.trial(f"{case.name}, {[tuple(press) for press in presses]}"):
        assert_same(interrupted(case, folder, presses), wanted)
