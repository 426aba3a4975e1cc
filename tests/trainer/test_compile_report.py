"""What is said of compiles: once per program, and why there was another."""

import re

import flax.linen as nn
import jax
import numpy as np
import pytest

from flaxfit import Trainer
from flaxfit._core.types import Batch
from flaxfit._programs.chunks import DeviceDataset, Stack
from flaxfit._programs.compile import Program, listening, noting
from flaxfit._reporting.display import Display
from flaxfit._reporting.timing import Clock
from flaxfit.trainer.compile_report import CompileReport, recompile_reason

SECONDS = r"\d+\.\d s"


class Mean(nn.Module):
    """Takes sequences of any length."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x).mean(1)


def data(rows=16, length=8, dtype=np.float32):
    return np.ones((rows, length, 2), dtype), np.zeros(rows, np.int32)


def said(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if "compil" in line]


def batch(rows=8, length=8, dtype=np.float32):
    x, y = data(rows, length, dtype)
    return Batch((x,), y, np.ones(rows, np.float32))


def stacked(one, count):
    return Stack(jax.tree.map(lambda leaf: np.stack([leaf] * count), one))


# ------------------------------------------------------------ whole phases


def test_each_program_is_said_once_and_a_retrace_with_its_cause(capsys):
    trainer = Trainer(Mean())
    trainer.fit(*data(), batch_size=8, validation_data=data(), epochs=2, verbose=2)
    first, second = said(capsys)
    assert re.fullmatch(f"compiling train step… {SECONDS}", first)
    assert re.fullmatch(f"compiling eval step… {SECONDS}", second)

    trainer.fit(*data(), batch_size=8, validation_data=data(), verbose=2)
    assert said(capsys) == []

    trainer.fit(*data(length=12), batch_size=8, verbose=2)
    (line,) = said(capsys)
    assert re.fullmatch(
        rf"compiling train step again… {SECONDS}: "
        r"x is float32\[8,12,2\], was float32\[8,8,2\]",
        line,
    )

    trainer.fit(*data(rows=160, length=12), batch_size=8, verbose=2)
    (line,) = said(capsys)
    assert line.endswith(
        ": the data is 160 rows on the device, was 16 rows on the device"
    )
    assert trainer.compiles["train"] == 3


def test_evaluate_and_predict_say_it_where_they_show_a_bar(capsys):
    trainer = Trainer(Mean())
    trainer.evaluate(*data(), batch_size=8, verbose=1)
    trainer.predict(data()[0], batch_size=8, verbose=1)
    out = capsys.readouterr().out
    for program in ("eval step", "predict step"):
        assert len(re.findall(f"compiling {program}… {SECONDS}", out)) == 1
    trainer.evaluate(*data(), batch_size=8, verbose=1)
    trainer.predict(data()[0], batch_size=8, verbose=0)
    assert said(capsys) == []


def test_a_loader_s_larger_batch_is_said_with_both_shapes(capsys):
    def batches():
        yield data(4)
        yield data(6)

    trainer = Trainer(Mean())
    with pytest.warns(UserWarning, match="has 6 rows"):
        trainer.fit(batches, verbose=2)
    first, again = said(capsys)
    assert re.fullmatch(f"compiling train step… {SECONDS}", first)
    assert "x is float32[6,8,2], was float32[4,8,2]" in again
    assert "y is int32[6], was int32[4]" in again


def test_verbose_0_says_nothing(capsys):
    Trainer(Mean()).fit(*data(), batch_size=8, verbose=0)
    assert capsys.readouterr().out == ""


# --------------------------------------------------------------- the parts


@pytest.mark.parametrize(
    ("before", "now", "why"),
    [
        (batch(), batch(rows=6), r"^x is float32\[6,8,2\], was float32\[8,8,2\]; "),
        (
            batch(),
            batch(dtype=np.uint8),
            r"^x is uint8\[8,8,2\], was float32\[8,8,2\]$",
        ),
        (batch(), stacked(batch(), 5), "^the data is 5 batches, was one batch$"),
        (stacked(batch(), 5), stacked(batch(), 7), "^the data is 7 batches, was 5 "),
        (
            DeviceDataset(batch(rows=1500), np.zeros((4, 8), np.int32)),
            DeviceDataset(batch(rows=2000), np.zeros((4, 8), np.int32)),
            "^the data is 2,000 rows on the device, was 1,500 rows on the device$",
        ),
        (
            DeviceDataset(batch(rows=16), np.zeros((4, 8), np.int32)),
            DeviceDataset(batch(rows=16), np.zeros((4, 2), np.int32)),
            r"^x is float32\[2,8,2\], was float32\[8,8,2\]; .*weights",
        ),
        (
            batch(),
            batch().replace(weights=np.ones((8, 8), np.float32)),
            r"^weights is float32\[8,8\], was float32\[8\]$",
        ),
        (batch(), batch(), "^the devices or the state changed$"),
    ],
)
def test_the_cause_is_named_with_both_sides(before, now, why):
    program = Program("train step", lambda state, chunk: None)
    assert recompile_reason(program) is None
    program.signatures = (("state", before),)
    assert recompile_reason(program) is None
    program.signatures = (("state", before), ("state", now))
    assert re.search(why, recompile_reason(program))


def test_a_batch_with_one_more_input_is_named():
    program = Program("train step", lambda chunk: None)
    one, two = batch(), batch()
    two = two.replace(inputs=(two.inputs[0], two.inputs[0]))
    program.signatures = ((one,), (two,))
    assert "missing" in recompile_reason(program)


class Shown(Display):
    def __init__(self):
        self.lines, self.notes = [], []

    def say(self, text):
        self.lines.append(text)

    def note(self, text):
        self.notes.append(text)


def test_time_of_compiles_is_counted_as_such():
    display, clock = Shown(), Clock()
    program = Program("train step", noting(lambda batch: batch.weights.sum()))
    init = Program("init", noting(lambda batch: batch.weights.sum() + 1))
    with listening(CompileReport(display, clock)):
        with clock.phase("evaluating"):
            program(batch())
            program(batch())
            init(batch())
    seconds = clock.lap()
    assert seconds["compiling"] > 0
    assert seconds["evaluating"] >= 0
    assert display.notes == ["compiling train step…", "compiling init…"]
    assert len(display.lines) == 1  # of init only a note: nobody waits for long
    program(batch(rows=3))  # nobody listens any more
    assert (len(display.lines), program.traces) == (1, 2)
