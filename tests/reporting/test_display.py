import io
import re
import sys
import time

import flax.linen as nn
import numpy as np
import pytest

from flaxfit import Trainer
from flaxfit._reporting import display
from flaxfit._reporting.history import History

X = np.zeros((40, 3), np.float32)
Y = np.zeros(40, np.int32)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def fit(verbose, epochs=2):
    Trainer(nn.Dense(3)).fit(
        X, Y, batch_size=8, epochs=epochs, validation_data=(X, Y), verbose=verbose
    )


def test_not_a_terminal_gets_one_line_per_epoch(capsys):
    fit("auto")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Dense · 12 params · collections: none · rngs: none")
    assert lines[1].startswith(
        "loss: softmax_cross_entropy_with_integer_labels (int32 targets, 3 outputs)"
    )
    assert lines[1].endswith("adam 0.001 · 1 \N{MULTIPLICATION SIGN} cpu")
    assert re.fullmatch(r"compiling train step… \d+\.\d s", lines[2])
    assert re.fullmatch(r"compiling eval step… \d+\.\d s", lines[3])
    assert [line.split(" · ")[0] for line in lines[4:]] == ["Epoch 1/2", "Epoch 2/2"]
    assert "5 steps" in lines[4] and "val_loss: " in lines[4]


def test_silence(capsys):
    fit(0)
    trainer = Trainer(nn.Dense(3))
    trainer.evaluate(X, Y)
    trainer.predict(X)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_terminal_gets_one_bar_per_epoch(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    fit("auto")
    text = terminal.getvalue()
    assert "0/5" in text  # the bar of an epoch, drawn over by the epoch's line
    shown = text.replace("\r", "\n").splitlines()
    lines = [line for line in shown if line.startswith("Epoch") and "val_" in line]
    assert [line.split(" · ")[0] for line in lines] == ["Epoch 1/2", "Epoch 2/2"]


def test_a_bar_is_due_at_most_ten_times_a_second(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    bar = display.Bar()
    bar.begin("Epoch 1/1", 100)
    due, started = 0, time.perf_counter()
    while time.perf_counter() - started < 0.35:
        if bar.due():
            due += 1
            bar.update(due, {"loss": 1.0})
    bar.end(100, {}, finished=True)
    assert 1 <= due <= 4


def test_a_broken_off_epoch_says_so(capsys):
    with display.epoch_display(display.Lines(), "Epoch 1/1", 5) as shown:
        shown["done"] = 3
    assert "Epoch 1/1 · interrupted · 3 steps" in capsys.readouterr().out


def test_verbose_is_checked():
    with pytest.raises(ValueError, match='write 0, 1, 2 or "auto"'):
        display.make_display(3)


def test_notebook_is_recognised_without_importing_ipython(monkeypatch):
    assert not display.in_notebook()

    class Shell:
        kernel = object()

    class Module:
        @staticmethod
        def get_ipython():
            return Shell()

    monkeypatch.setitem(sys.modules, "IPython", Module)
    assert display.in_notebook()
    assert isinstance(display.make_display("auto"), display.Bar)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0010000000475, "0.001"), (0.123456, "0.1235"), (1.0, "1.0000"), (3e5, "3e+05")],
)
def test_values(value, text):
    assert display.format_value(value) == text


def test_units():
    assert display.format_bytes(1536) == "1.5 KiB"
    assert display.format_bytes(12) == "12 B"
    assert display.format_bytes(5 * 2**40) == "5120.0 GiB"
    assert display.format_count(12) == "12"
    assert display.format_count(3_400_000) == "3.4 M"
    assert display.format_count(2e15) == "2000.0 T"
    assert display.format_table({"a": 1, "long": "x\ny"}) == "a     1\nlong  x\n      y"


def make_history():
    history = History(params={"epochs": 3})
    history.append(0, {"loss": 3.0})
    history.append(1, {"loss": 2.0, "val_loss": 2.5, "late": 1.0})
    history.amend({"loss": 1.5, "extra": 7.0})
    history.append(2, {"loss": 1.0, "late": 2.0})
    return history


def test_history_knows_the_epoch_of_every_value():
    history = make_history()
    assert history.history == {
        "loss": [3.0, 1.5, 1.0],
        "val_loss": [2.5],
        "late": [1.0, 2.0],
        "extra": [7.0],
    }
    assert (history.epoch, history.val_epoch) == ([0, 1, 2], [1])
    frame = history.to_pandas()
    assert frame["val_loss"].isna().tolist() == [True, False, True]
    assert frame["late"].tolist()[1:] == [1.0, 2.0]
    assert repr(history) == "History(3 epochs: loss=1, val_loss=2.5, late=2, extra=7)"
    assert "<td>2.5</td>" in history._repr_html_()


def test_history_plots_training_and_validation_together():
    figure = make_history().plot()
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["loss", "late", "extra"]
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert list(lines) == ["training", "validation"]
    assert lines["validation"].get_xdata().tolist() == [2]
    with pytest.raises(ValueError, match="no epoch was finished"):
        History().plot()


def test_an_odd_locale_ends_no_training(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    fit("auto")
    sys.stdout.flush()
    text = raw.getvalue().decode("ascii")
    assert "adam 0.001 | 1 x cpu" in text
    assert "Epoch 2/2 | 5 steps" in text


def test_an_odd_locale_ends_no_training_with_a_bar(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    bar = display.Bar()
    bar.begin("Epoch 1/1", 5)
    bar.update(3, {"loss": 1.0, "accuracy": 0.5})
    bar.end(5, {}, finished=True)
    sys.stdout.flush()
    assert "loss: 1.0000 | accuracy: 0.5000" in raw.getvalue().decode("ascii")
