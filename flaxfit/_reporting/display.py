"""Renders progress bars, epoch lines and tables. Reads nothing from the device."""

import contextlib
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_SECONDS_BETWEEN_UPDATES = 0.1
_SEPARATOR = " \N{MIDDLE DOT} "
_ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
_TOTAL_KNOWN = "{desc} {bar:%d} {n_fmt}/{total_fmt} [{elapsed}<{remaining}%s{postfix}]"
_TOTAL_UNKNOWN = "{desc} {n_fmt} steps [{elapsed}%s{postfix}]"
_WIDE = 100  # from this many columns on, the bar is longer and shows steps per second


class Display:
    """Shows the progress of a fit, an evaluation or a prediction.

    This base class is `verbose=0` and shows nothing; subclasses override its methods.
    """

    def say(self, text: str) -> None:
        """Shows a line of text."""

    def begin(self, title: str, total: int | None) -> None:
        """Begins an epoch of `total` steps, None if unknown."""

    def note(self, text: str) -> None:
        """Shows a note beside the bar, until the next `update`."""

    def due(self) -> bool:
        """Whether it is time for an `update`: at most ten times a second."""
        return False

    def update(self, done: int, logs: Mapping[str, Any]) -> None:
        """Shows `done` steps and the values so far."""

    def end(self, done: int, logs: Mapping[str, Any], *, finished: bool) -> None:
        """Ends the epoch with its values; `finished` is False if it was interrupted."""


class EpochLine:
    """The line that stays on the screen after an epoch."""

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

        The line includes the learning rate if it has changed since the last epoch and
        if there is room.
        """
        rate = logs.get("learning_rate")
        plain = {n: v for n, v in logs.items() if n != "learning_rate"}
        rated = plain if self._rate in (None, rate) else logs
        self._rate = rate
        title = self._title if finished else self._title + _SEPARATOR + "interrupted"
        seconds = f"{time.perf_counter() - self._began:.1f} s"
        both, start = (rated, plain), _joined(title, f"{done} steps", seconds)
        long = [_joined(start, format_logs(chosen)) for chosen in both]
        short = [_joined(title, seconds, _paired(chosen)) for chosen in both]
        fits = (line for line in long + short if not columns or len(line) <= columns)
        return next(fits, None) or _shortened(short[-1], columns)


class Lines(Display):
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


class Bar(Display):
    """`verbose=1`: a tqdm bar, in a terminal or a notebook; at its end, a line."""

    def __init__(self) -> None:
        self._in_notebook = in_notebook()
        with warnings.catch_warnings():
            # Without ipywidgets, tqdm warns and draws a text bar, which is enough.
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
        """Prints the text, in lines no wider than the terminal."""
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
        """Whether a tenth of a second has passed."""
        return time.perf_counter() - self._last >= _SECONDS_BETWEEN_UPDATES

    def update(self, done: int, logs: Mapping[str, Any]) -> None:
        """Redraws the bar."""
        self._last = time.perf_counter()
        self._bar.n = done
        self.note(format_logs(logs))

    def end(self, done: int, logs: Mapping[str, Any], *, finished: bool) -> None:
        """Replaces the bar by the epoch's line."""
        self._bar.close()
        self._bar = None
        self.say(self._line.text(done, logs, finished, self._columns()))

    def _columns(self) -> int:
        """Returns the terminal's width; 0 in a notebook, which wraps by itself."""
        return 0 if self._in_notebook else shutil.get_terminal_size().columns

    def _format(self, total: int | None) -> str | None:
        if self._in_notebook:
            return None  # tqdm's widget has its own format
        wide = self._columns() >= _WIDE
        rate = ", {rate_fmt}" if wide else ""
        if total is None:
            return _TOTAL_UNKNOWN % rate
        return _TOTAL_KNOWN % (20 if wide else 10, rate)


def _encodable(text: str) -> str:
    """Replaces characters that stdout cannot encode, for which `print` would raise."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        plain = text.replace(_SEPARATOR, " | ").replace("\N{MULTIPLICATION SIGN}", "x")
        return plain.encode(encoding, "replace").decode(encoding)
    return text


def make_display(verbose: int | str) -> Display:
    """Returns the display for Keras's `verbose`.

    Args:
      verbose: 0 shows nothing, 1 a bar, 2 a line per epoch; `"auto"` a bar in a
        terminal or a notebook, and lines elsewhere.

    Raises:
      ValueError: another value.
    """
    if verbose == "auto":
        verbose = 1 if in_notebook() or sys.stdout.isatty() else 2
    if verbose not in (0, 1, 2):
        raise ValueError(f'verbose={verbose!r}: write 0, 1, 2 or "auto".')
    return (Display, Bar, Lines)[int(verbose)]()


def make_progress(verbose: int | str) -> Display:
    """Returns the display of `evaluate` and `predict`.

    It is the one of `make_display`, except that `"auto"` shows nothing outside of a
    terminal or a notebook.
    """
    display = make_display(verbose)
    return Display() if verbose == "auto" and isinstance(display, Lines) else display


@contextlib.contextmanager
def epoch_display(
    display: Display, title: str, total: int | None
) -> Iterator[dict[str, Any]]:
    """Begins an epoch and ends it, also after an error.

    Yields:
      A dict for the caller to update: the steps `done`, the `logs`, and `finished`.
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
    """Returns `"loss 0.1234 (val 0.2345) · …"`, which is shorter than `format_logs`."""
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
    """Returns the parts that fit; if not even the first one does, it is cut."""
    parts = line.split(_SEPARATOR)
    while len(parts) > 1 and len(_joined(*parts, _ELLIPSIS)) > columns:
        parts.pop()
    return _joined(*parts, _ELLIPSIS)[:columns]


def _wrapped(text: str, columns: int) -> str:
    """Breaks `text` at its separators into lines of at most `columns`."""
    lines = [""]
    for part in text.split(_SEPARATOR):
        longer = _joined(lines[-1], part)
        if columns and lines[-1] and len(longer) > columns:
            lines.append("  " + part)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def format_value(value: Any) -> str:
    """Returns a float with 4 decimals, or 4 digits if small or large; else the text."""
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-2 <= abs(value) < 1e4 else f"{value:.4g}"
    return str(value)


def format_bytes(size: float) -> str:
    """Returns e.g. `"1.5 MiB"`."""
    return _scaled(size, 1024, (" B", " KiB", " MiB", " GiB"))


def format_count(count: float) -> str:
    """Returns e.g. `"3.4 M"` for FLOPs and the like."""
    return _scaled(count, 1000, ("", " k", " M", " G", " T"))


def _scaled(value: float, factor: int, units: Sequence[str]) -> str:
    """Returns `value` in the largest of `units` in which it is at least 1."""
    power = 0
    while value >= factor and power < len(units) - 1:
        value /= factor
        power += 1
    return f"{value:.{1 if power else 0}f}{units[power]}"


def format_table(rows: Mapping[str, Any]) -> str:
    """Returns `name  value` lines with the values aligned."""
    width = max(map(len, rows), default=0)
    lines = []
    for name, value in rows.items():
        text = str(value).replace("\n", "\n" + " " * (width + 2))
        lines.append(f"{name:<{width}}  {text}")
    return "\n".join(lines)
