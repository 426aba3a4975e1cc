"""A run that is broken off and goes on is the run that was not (F8 F19 F20)."""

import contextlib
import functools
import io
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from content import digest_of
from harness import Outcome, Tally, fresh
from training import (
    BATCH,
    CASES,
    EPOCHS,
    ROWS,
    STEPS,
    STEPS_PER_EPOCH,
    Case,
    Net,
    Press,
    Presser,
    Result,
    assert_same,
    assert_same_state,
    caught,
    fit,
    interrupted,
    leaves_of,
    use_cache,
    warned,
)

from flaxfit import CheckpointError, EarlyStopping, LambdaCallback, Trainer, checkpoint

# F8

_HOOKS = (
    [
        Press(0, "on_train_begin"),
        Press(0, "on_epoch_begin"),
        Press(STEPS_PER_EPOCH, "on_test_begin"),
        Press(STEPS_PER_EPOCH, "on_test_end"),
        Press(STEPS_PER_EPOCH, "on_epoch_begin"),
    ],
    [
        Press(4, "on_train_batch_begin"),
        Press(STEPS_PER_EPOCH, "on_epoch_end"),
    ],
)
_IN_HOOKS = ("early stopping",)


def f8_interrupted_everywhere(trials: int, seed: int, folder: Path) -> Outcome:
    """Ctrl-C after each step, and in each hook.

    With fewer trials than steps: at so many steps of one and the same run.
    """
    return fresh(_f8, trials, seed, folder, timeout=36_000)


def _f8(trials: int, seed: int, folder: Path) -> Outcome:
    use_cache(folder / "cache")
    tally, chance = Tally(), random.Random(seed)
    for case in CASES:
        wanted = fit(case, None)
        _assert_each_row_once_an_epoch(case, wanted)
        steps = len(wanted.epochs) * case.steps
        moments = [Press(k) for k in range(1, steps + 1)]
        hooks = _HOOKS if case.name in _IN_HOOKS else ()
        drawn = [sorted(chance.sample(moments, min(trials, steps)))]
        runs = drawn if trials < steps else [[press] for press in moments]
        runs += hooks if trials < steps else [[p] for run in hooks for p in run]
        for presses in runs:
            _try(tally, case, wanted, presses, folder / "run")
    return tally.outcome()


def _try(
    tally: Tally, case: Case, wanted: Result, presses: Sequence[Press], folder: Path
) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    moments = ", ".join(f"step {p.step} {p.hook}" for p in presses)
    with tally.trial(f"{case.name}, interrupted at {moments}"):
        assert_same(interrupted(case, folder, presses), wanted)


def _assert_each_row_once_an_epoch(case: Case, wanted: Result) -> None:
    """What was counted in the state counts: no row was trained on twice or never."""
    if (case.rows, case.steps) != (ROWS, STEPS_PER_EPOCH) or case.callbacks():
        return
    counts = np.frombuffer(wanted.leaves[".collections['seen']['counts']"][2], np.int32)
    assert set(counts.tolist()) == {EPOCHS}, counts


# F19

_WIDTH = 2**12


def f19_each_step_saved(trials: int, seed: int, folder: Path) -> Outcome:
    """Each of `trials` steps saves; the files are the states at those steps."""
    return fresh(_f19, trials, seed, folder, timeout=3600)


def _f19(trials: int, seed: int, folder: Path) -> Outcome:
    tally, digests = Tally(), {}
    arguments = {"epochs": 1, "steps_per_epoch": trials, "save_every": 1}
    case = Case("wide", nn.Dense(_WIDTH), lambda: {"seed": seed}, arguments)

    def keep(loop):
        digests[loop.step] = _digest(loop.state)

    fit(case, folder / "a", LambdaCallback(on_train_batch_end=keep))
    before: list[Any] = []

    def save(loop):
        with tally.trial(f"the memory of step {loop.step - 1}"):
            assert all(leaf.is_deleted() for leaf in before), "it is not used again"
        before[:] = jax.tree.leaves(loop._store.peek().params)
        loop.save(folder / f"{loop.step}.msgpack")

    fit(case, folder / "b", LambdaCallback(on_train_batch_end=save))
    for step, digest in digests.items():
        with tally.trial(f"the file of step {step}"):
            found = checkpoint.load(folder / f"{step}.msgpack")
            assert found.state["step"] == step
            assert _digest(found.state) == digest
    return tally.outcome()


def _digest(state: Any) -> str:
    names = ("step", "params", "collections", "opt_state")
    of = state.__getitem__ if isinstance(state, dict) else state.__getattribute__
    return digest_of(jax.device_get({name: of(name) for name in names}))


# F20


def f20_resumed(trials: int, seed: int, folder: Path) -> Outcome:
    """Each way to go on with a run, once."""
    del trials, seed
    return fresh(_f20, folder, timeout=3600)


def _f20(folder: Path) -> Outcome:
    use_cache(folder / "cache")
    tally = Tally()
    for check in _WAYS:
        name = check.__name__.strip("_")
        with tally.trial(name.replace("_", " ")):
            check(folder / name)
    return tally.outcome()


_PLAIN = Case("plain", Net(dropout=0.3))
_STOPPING = next(case for case in CASES if case.name == "early stopping")
_MIDDLE = Press(STEPS_PER_EPOCH + 2)


@functools.cache
def _whole(epochs: int = EPOCHS) -> Result:
    """What comes of `_PLAIN` that nobody breaks off."""
    return fit(_PLAIN, None, epochs=epochs)


def _steps(done: list[int]) -> LambdaCallback:
    return LambdaCallback(on_train_batch_end=lambda loop: done.append(loop.step))


def _broken_off(folder: Path, press: Press = _MIDDLE) -> None:
    """Leaves the run of `_PLAIN` as a Ctrl-C leaves it."""
    assert fit(_PLAIN, folder, Presser(press)).reason == "interrupted by Ctrl-C"


def _after_one_epoch(folder: Path) -> None:
    fit(_PLAIN, folder, epochs=1)


def _said(*args: Any, **arguments: Any) -> tuple[Result, str]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        found = fit(*args, verbose=2, **arguments)
    return found, out.getvalue()


def _ten_times_in_a_row(folder: Path) -> None:
    presses = [Press(k) for k in (1, 2, 3, 5, 6, 7, 11, 12, 13, 17)]
    assert_same(interrupted(_PLAIN, folder, presses), _whole())


def _finished_and_started_again(folder: Path) -> None:
    wanted, done = fit(_PLAIN, folder), []
    files = {f.name: f.read_bytes() for f in folder.glob("*.msgpack")}
    for _ in range(2):
        assert_same(fit(_PLAIN, folder, _steps(done)), wanted)
    assert not done
    assert files == {f.name: f.read_bytes() for f in folder.glob("*.msgpack")}


def _stopped_early_and_started_again(folder: Path) -> None:
    done: list[int] = []
    wanted = fit(_STOPPING, folder, _steps(done))
    assert wanted.reason is not None
    done.clear()
    for _ in range(2):
        assert_same(fit(_STOPPING, folder, _steps(done)), wanted)
    assert not done


def _in_the_same_trainer(folder: Path) -> None:
    trainer, wanted = _PLAIN.trainer(), _whole()
    fit(_PLAIN, folder, Presser(_MIDDLE), trainer=trainer)
    assert_same(fit(_PLAIN, folder, trainer=trainer), wanted)
    assert_same(fit(_PLAIN, folder, trainer=trainer), wanted)


def _more_epochs(folder: Path) -> None:
    fit(_PLAIN, folder)
    assert_same(fit(_PLAIN, folder, epochs=5), _whole(5))


def _more_epochs_from_the_middle(folder: Path) -> None:
    _broken_off(folder)
    assert_same(fit(_PLAIN, folder, epochs=4), _whole(4))


def _fewer_epochs(folder: Path) -> None:
    wanted = fit(_PLAIN, folder)
    assert_same(fit(_PLAIN, folder, epochs=2), wanted)


def _a_schedule_for_more_epochs(folder: Path) -> None:
    case = next(case for case in CASES if case.name == "schedule")
    fit(case, folder, epochs=2)
    found, said = _said(case, folder, epochs=4)
    rates = found.history["learning_rate"]
    whole = fit(case, None, epochs=4).history["learning_rate"]
    assert "epochs was 2, is 4" in said, said
    assert rates[1] < 0.002 and rates[2:] == whole[2:], (rates, whole)


def _another_batch_size(folder: Path) -> None:
    _after_one_epoch(folder)
    done: list[int] = []
    run = lambda: fit(_PLAIN, folder, _steps(done), batch_size=2 * BATCH)  # noqa: E731
    found, texts = warned(run)
    assert any("batch_size was 4, is 8" in text for text in texts), texts
    assert found.epochs == [0, 1, 2] and len(done) == STEPS_PER_EPOCH, done
    _refused_in_the_middle(folder / "b", "batch_size was 4, is 8", batch_size=8)


def _refused_in_the_middle(folder: Path, text: str, **arguments: Any) -> None:
    _broken_off(folder)
    before = sorted(f.name for f in folder.iterdir())
    error = caught(CheckpointError, lambda: fit(_PLAIN, folder, **arguments))
    assert text in str(error) and "middle of an epoch" in str(error), error
    assert sorted(f.name for f in folder.iterdir()) == before
    assert_same(fit(_PLAIN, folder), _whole())


def _another_seed(folder: Path) -> None:
    _after_one_epoch(folder)
    other = lambda: fit(_PLAIN, folder, trainer=_PLAIN.trainer(seed=5))  # noqa: E731
    found, texts = warned(other)
    assert any("seed was 0, is 5" in text for text in texts), texts
    wanted = _whole()
    assert found.history["loss"][0] == wanted.history["loss"][0]
    assert found.history["loss"][1] != wanted.history["loss"][1]
    _broken_off(folder / "b")
    trainer = _PLAIN.trainer(seed=5)
    error = caught(CheckpointError, lambda: fit(_PLAIN, folder / "b", trainer=trainer))
    assert "seed was 0, is 5" in str(error), error


def _other_data(folder: Path) -> None:
    _after_one_epoch(folder)
    longer = _PLAIN._replace(rows=ROWS + 8)
    found, texts = warned(lambda: fit(longer, folder))
    assert any("examples was 24, is 32" in text for text in texts), texts
    assert found.epochs == [0, 1, 2]
    _broken_off(folder / "b")
    error = caught(CheckpointError, lambda: fit(longer, folder / "b"))
    assert "examples was 24, is 32" in str(error), error


def _another_learning_rate(folder: Path) -> None:
    _broken_off(folder)
    trainer = _PLAIN.trainer(learning_rate=1e-30)
    kept = Trainer.load(folder, _PLAIN.model, devices=1).variables["params"]
    found, said = _said(_PLAIN, folder, trainer=trainer)
    assert "learning_rate was 0.1, is 1e-30" in said, said
    jax.tree.map(np.testing.assert_array_equal, trainer.variables["params"], kept)
    assert found.history["learning_rate"][1:] == [np.float32(1e-30)] * 2


def _must_and_never(folder: Path) -> None:
    error = caught(CheckpointError, lambda: fit(_PLAIN, folder, resume="must"))
    assert "there is no checkpoint" in str(error), error
    _broken_off(folder)
    wanted = _whole()
    assert_same(fit(_PLAIN, folder, resume="must"), wanted)
    done: list[int] = []
    never = lambda: fit(_PLAIN, folder, _steps(done), resume="never")  # noqa: E731
    found, texts = warned(never)
    assert_same(found, wanted)
    assert len(done) == STEPS and len(texts) == 1 and "old-1" in texts[0], texts
    assert (folder / "old-1" / "history.json").exists()


def _from_a_path(folder: Path) -> None:
    _broken_off(folder / "a")
    wanted = _whole()
    file = max((folder / "a").glob("step-*.msgpack"))
    before = file.read_bytes()
    assert_same(fit(_PLAIN, folder / "b", resume=file), wanted)
    assert_same(fit(_PLAIN, folder / "c", resume=str(folder / "a")), wanted)
    assert_same(fit(_PLAIN, None, resume=file), wanted)
    assert file.read_bytes() == before
    assert_same(fit(_PLAIN, folder / "b"), wanted)


def _an_older_file_of_the_same_folder(folder: Path) -> None:
    fit(_PLAIN, folder)
    older = min(folder.glob("step-*.msgpack"))
    error = caught(CheckpointError, lambda: fit(_PLAIN, folder, resume=older))
    assert "is newer" in str(error), error
    max(folder.glob("step-*.msgpack")).unlink()
    (folder / "best.msgpack").unlink()
    assert_same(fit(_PLAIN, folder, resume=older), _whole())


def _two_at_once(folder: Path) -> None:
    errors: list[Exception] = []

    def second(loop):
        errors.append(caught(CheckpointError, lambda: fit(_PLAIN, folder)))

    found = fit(_PLAIN, folder, LambdaCallback(on_epoch_end=second))
    assert len(errors) == EPOCHS and str(folder) in str(errors[0]), errors
    assert_same(found, _whole())
    assert_same(fit(_PLAIN, folder), found)


def _a_trainer_of_another_training(folder: Path) -> None:
    _broken_off(folder)
    trainer = _PLAIN.trainer()
    fit(_PLAIN, None, trainer=trainer, epochs=1)
    state = trainer.state
    error = caught(ValueError, lambda: fit(_PLAIN, folder, trainer=trainer))
    assert str(folder) in str(error), error
    assert_same_state(trainer.state, leaves_of(state))
    assert_same(fit(_PLAIN, folder), _whole())


def _the_newest_is_damaged(folder: Path) -> None:
    _broken_off(folder)
    newest, wanted = max(folder.glob("step-*.msgpack")), _whole()
    whole = newest.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:-9] + b"\x00" * 9):
        work = folder.with_name("damaged work")
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder, work)
        (work / newest.name).write_bytes(damaged)
        found, texts = warned(lambda work=work: fit(_PLAIN, work))
        assert len(texts) == 1 and newest.name in texts[0], texts
        assert_same(found, wanted)


def _all_are_damaged(folder: Path) -> None:
    _broken_off(folder)
    for file in folder.glob("*.msgpack"):
        file.write_bytes(file.read_bytes()[:100])
    run = lambda: caught(CheckpointError, lambda: fit(_PLAIN, folder))  # noqa: E731
    error, texts = warned(run)
    assert "none can be read" in str(error) and texts, error
    found, texts = warned(lambda: fit(_PLAIN, folder, resume="never"))
    assert_same(found, _whole())


def _stopping_again_and_again(folder: Path) -> None:
    wanted = fit(_STOPPING, None)
    steps = len(wanted.epochs) * STEPS_PER_EPOCH
    presses = [Press(k) for k in range(2, steps + 1, 5)]
    assert_same(interrupted(_STOPPING, folder, presses), wanted)
    assert_same(fit(_STOPPING, folder, Presser(None)), wanted)


def _more_patience_afterwards(folder: Path) -> None:
    fit(_STOPPING, folder)
    case = _STOPPING._replace(callbacks=lambda: [EarlyStopping(patience=9)])
    done: list[int] = []
    found, said = _said(case, folder, _steps(done))
    assert "callbacks" in said and found.epochs == [*range(6)], (said, found.epochs)
    assert done


def _what_lies_in_the_folder(folder: Path) -> None:
    _broken_off(folder)
    wanted = fit(_PLAIN, folder)
    names = sorted(f.name for f in folder.iterdir() if f.suffix)
    steps = [f"step-{k:010d}.msgpack" for k in (STEPS - STEPS_PER_EPOCH, STEPS)]
    assert names == ["best.msgpack", "history.json", "log.jsonl", *steps], names
    told = json.loads((folder / "history.json").read_text())
    assert (told["values"], told["epoch"]) == (wanted.history, wanted.epochs)
    lines = (folder / "log.jsonl").read_text().splitlines()
    events = [json.loads(line)["event"] for line in lines]
    assert events == "start epoch end resume epoch epoch end".split(), events
    trainer = Trainer.load(folder, _PLAIN.model, devices=1)
    assert_same_state(trainer.state, wanted.leaves)


_WAYS = (
    _ten_times_in_a_row,
    _finished_and_started_again,
    _stopped_early_and_started_again,
    _in_the_same_trainer,
    _more_epochs,
    _more_epochs_from_the_middle,
    _fewer_epochs,
    _a_schedule_for_more_epochs,
    _another_batch_size,
    _another_seed,
    _other_data,
    _another_learning_rate,
    _must_and_never,
    _from_a_path,
    _an_older_file_of_the_same_folder,
    _two_at_once,
    _a_trainer_of_another_training,
    _the_newest_is_damaged,
    _all_are_damaged,
    _stopping_again_and_again,
    _more_patience_afterwards,
    _what_lies_in_the_folder,
)
