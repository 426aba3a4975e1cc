"""Renders progress bars, epoch lines and tables. Reads nothing from the device."""

import contextlib
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

_SECONDS_BETWEEN_UPDATES = 0.1
_SEPARATOR = " \N{MIDDLE DOT} "
_ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
_TOTAL_KNOWN = "{desc} {bar:%d} {n_fmt}/{total_fmt} [{elapsed}<{remaining}%s{postfix}]"
_TOTAL_UNKNOWN = "{desc} {n_fmt} steps [{elapsed}%s{postfix}]"
_WIDE = 100  # columns from which the bar is longer and has the steps per second


class Display(Protocol):
    """Where the progress of a fit, an evaluation or a prediction goes."""

    def say(self, text: str) -> None:
        """Shows a line of text."""

    def begin(self, title: str, total: int | None) -> None:
        """Begins an epoch of `total` steps, None if unknown."""

    def note(self, text: str) -> None:
        """Shows a note beside the bar, until the next `update`."""

    def due(self) -> bool:
        """Whether it is time for an `update`: at most ten times a second."""

    def update(self, done: int, logs: Mapping[str, Any]) -> None:
        """Shows `done` steps and the values so far."""

    def end(self, done: int, logs: Mapping[str, Any], *, finished: bool) -> None:
        """Ends the epoch with its values; `finished` is False where it broke off."""


class Silent:
    """`verbose=0`: shows nothing."""

    def say(self, text: str) -> None:
        """Does nothing."""

    def begin(self, title: str, total: int | None) -> None:
        """Does nothing."""

    def note(self, text: str) -> None:
        """Does nothing."""

    def due(self) -> bool:
        """Never."""
        return False

    def update(self, done: int, logs: Mapping[str, Any]) -> None:
        """Does nothing."""

    def end(self, done: int, logs: Mapping[str, Any], *, finished: bool) -> None:
        """Does nothing."""


class EpochLine:
    """The line that remains of an epoch."""

    def __init__(self) -> None:
        self._title = ""
        self._began = 0.0
        self._rate: Any = None

    def begin(self, title: str) -> None:
        """Starts the clock."""
        self._title, self._began = title, time.perf_counter()

    def text(
        self, done: int, logs: Mapping[str, Any], finished: bool, columns: int = 0
    ) -> str:
        """Returns the line, shortened to `columns` if they are not 0.

        The learning rate is in it where it differs from that of the epoch before and
        there is room for it.
        """
        rate = logs.get("learning_rate")
        plain = {n: v for n, v in logs.items() if n != "learning_rate"}
        rated = plain if self._rate in (None, rate) else logs
        self._rate = rate
        title = self._title if finished else self._title + _SEPARATOR + "broken off"
        seconds = f"{time.perf_counter() - self._began:.1f} s"
        for chosen in (rated, plain):
            line = _joined(title, f"{done} steps", seconds, format_logs(chosen))
            if not columns or len(line) <= columns:
                return line
        for chosen in (rated, plain):
            line = _joined(title, seconds, _paired(chosen))
            if len(line) <= columns:
                return line
        return _shortened(line, columns)


class Lines(Silent):
    """`verbose=2`: one plain line per epoch, for files and logs."""

    def __init__(self) -> None:
        self._line = EpochLine()

    def say(self, text: str) -> None:
        """Prints the text."""
        print(_encodable(text), flush=True)

    def begin(self, title: str, total: int | None) -> None:
        """Starts the clock."""
        self._line.begin(title)

    def end(self, done: int, logs: Mapping[str, Any], *, finished: bool) -> None:
        """Prints the epoch's line."""
        self.say(self._line.text(done, logs, finished))


class Bar:
    """`verbose=1`: a tqdm bar, in a terminal or a notebook, that ends as a line."""

    def __init__(self) -> None:
        self._in_notebook = in_notebook()
        with warnings.catch_warnings():
            # Without ipywidgets tqdm says so and draws a text bar: good enough.
            warnings.simplefilter("ignore")
            if self._in_notebook:
                from tqdm.auto import tqdm
            else:
                from tqdm import tqdm
        self._tqdm = tqdm
        self._bar: Any = None
        self._last = 0.0
        self._line = EpochLine()

    def say(self, text: str) -> None:
        """Prints the text, broken between its parts where the terminal ends."""
        wrapped = _wrapped(_encodable(text), self._columns())
        self._tqdm.write(wrapped, file=sys.stdout)

    def begin(self, title: str, total: int | None) -> None:
        """Opens a bar."""
        self._line.begin(title)
        self._bar = self._tqdm(
            desc=title,
            total=total,
            unit="step",
            file=sys.stdout,
            dynamic_ncols=True,
            mininterval=_SECONDS_BETWEEN_UPDATES,
            leave=False,
            bar_format=self._format(total),
        )
        self._last = time.perf_counter()

    def note(self, text: str) -> None:
        """Shows the text in place of the values."""
        if self._bar is not None:
            self._bar.set_postfix_str(_encodable(text), refresh=True)

    def due(self) -> bool:
        """Whether a tenth of a second has gone by."""
        return time.perf_counter() - self._last >= _SECONDS_BETWEEN_UPDATES

    def update(self, done: int, logs: Mapping[str, Any]) -> None:
        """Redraws the bar."""
        self._last = time.perf_counter()
        self._bar.n = done
        self._bar.set_postfix_str(format_logs(logs), refresh=True)

    def end(self, done: int, logs: Mapping[str, Any], *, finished: bool) -> None:
        """Puts the epoch's line in the bar's place."""
        self._bar.close()
        self._bar = None
        self.say(self._line.text(done, logs, finished, self._columns()))

    def _columns(self) -> int:
        """Returns the terminal's width; 0 in a notebook, which wraps by itself."""
        return 0 if self._in_notebook else shutil.get_terminal_size().columns

    def _format(self, total: int | None) -> str | None:
        if self._in_notebook:
            return None  # tqdm's widget has a form of its own
        wide = self._columns() >= _WIDE
        rate = ", {rate_fmt}" if wide else ""
        if total is None:
            return _TOTAL_UNKNOWN % rate
        return _TOTAL_KNOWN % (20 if wide else 10, rate)


def _encodable(text: str) -> str:
    """Returns the text in what stdout can write; an odd locale ends no training."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        plain = text.replace(" \N{MIDDLE DOT} ", " | ").replace(
            "\N{MULTIPLICATION SIGN}", "x"
        )
        return plain.encode(encoding, "replace").decode(encoding)
    return text


def make_display(verbose: int | str) -> Display:
    """Returns the display for Keras's `verbose`.

    Args:
      verbose: 0 nothing, 1 a bar, 2 a line per epoch, `"auto"` a bar where someone
        watches (a terminal, a notebook) and lines elsewhere.

    Raises:
      ValueError: anything else.
    """
    if verbose == "auto":
        verbose = 1 if in_notebook() or sys.stdout.isatty() else 2
    if verbose not in (0, 1, 2):
        raise ValueError(f'verbose={verbose!r}: write 0, 1, 2 or "auto".')
    return Silent() if verbose == 0 else Bar() if verbose == 1 else Lines()


def make_progress(verbose: int | str) -> Display:
    """Returns the display of `evaluate` and `predict`: as `make_display`, but no lines
    where the output is not a terminal or notebook."""
    display = make_display(verbose)
    return Silent() if verbose == "auto" and isinstance(display, Lines) else display


@contextlib.contextmanager
def epoch_display(
    display: Display, title: str, total: int | None
) -> Iterator[dict[str, Any]]:
    """Opens an epoch and closes it whatever happens.

    Yields a dict to be filled with `done` and `logs`; an error breaks it off.
    """
    shown: dict[str, Any] = {"done": 0, "logs": {}, "finished": False}
    display.begin(title, total)
    try:
        yield shown
    finally:
        display.end(shown["done"], shown["logs"], finished=shown["finished"])


def in_notebook() -> bool:
    """Whether this runs in Jupyter or Colab, without importing IPython."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


def format_logs(logs: Mapping[str, Any]) -> str:
    """Returns `"loss: 0.1234 · accuracy: 0.9876"`."""
    return _joined(*(f"{name}: {format_value(value)}" for name, value in logs.items()))


def _paired(logs: Mapping[str, Any]) -> str:
    """Returns `"loss 0.1234 (val 0.2345) · …"`: less wide than `format_logs`."""
    parts = []
    for name, value in logs.items():
        validated = logs.get(f"val_{name}")
        if name.startswith("val_") and name.removeprefix("val_") in logs:
            continue
        after = "" if validated is None else f" (val {format_value(validated)})"
        parts.append(f"{name} {format_value(value)}{after}")
    return _joined(*parts)


def _joined(*parts: str) -> str:
    return _SEPARATOR.join(part for part in parts if part)


def _shortened(line: str, columns: int) -> str:
    """Returns as many whole parts as fit, the first cut if it alone does not."""
    parts = line.split(_SEPARATOR)
    while len(parts) > 1 and len(_joined(*parts, _ELLIPSIS)) > columns:
        parts.pop()
    return _joined(*parts, _ELLIPSIS)[:columns]


def _wrapped(text: str, columns: int) -> str:
    """Returns `text` in lines of at most `columns`, broken at separators only."""
    lines = [""]
    for part in text.split(_SEPARATOR):
        longer = _joined(lines[-1], part)
        if columns and lines[-1] and len(longer) > columns:
            lines.append("  " + part)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def format_value(value: Any) -> str:
    """Returns a number in four significant digits, anything else as text."""
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-2 <= abs(value) < 1e4 else f"{value:.4g}"
    return str(value)


def format_bytes(size: float) -> str:
    """Returns e.g. `"1.5 MiB"`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError  # pragma: no cover


def format_count(count: float) -> str:
    """Returns e.g. `"3.4 M"` for FLOPs and the like."""
    for unit in ("", " k", " M", " G", " T"):
        if count < 1000 or unit == " T":
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    raise AssertionError  # pragma: no cover


def format_table(rows: Mapping[str, Any]) -> str:
    """Returns `name  value` lines with the values aligned."""
    width = max(map(len, rows), default=0)
    lines = []
    for name, value in rows.items():
        text = str(value).replace("\n", "\n" + " " * (width + 2))
        lines.append(f"{name:<{width}}  {text}")
    return "\n".join(lines)
