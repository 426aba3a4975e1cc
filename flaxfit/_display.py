"""Numbers -> what a person sees: the bar, the line per epoch, tables. No device."""

import contextlib
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

_SECONDS_BETWEEN_UPDATES = 0.1


class Display(Protocol):
    """Where the progress of a fit, an evaluation or a prediction goes."""

    def say(self, text: str) -> None:
        """Shows a line of text."""

    def begin(self, title: str, total: int | None) -> None:
        """Begins an epoch of `total` steps, None if unknown."""

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

    def due(self) -> bool:
        """Never."""
        return False

    def update(self, done: int, logs: Mapping[str, Any]) -> None:
        """Does nothing."""

    def end(self, done: int, logs: Mapping[str, Any], *, finished: bool) -> None:
        """Does nothing."""


class Lines(Silent):
    """`verbose=2`: one plain line per epoch, for files and logs."""

    def __init__(self) -> None:
        self._title = ""
        self._began = 0.0

    def say(self, text: str) -> None:
        """Prints the text."""
        print(text, flush=True)

    def begin(self, title: str, total: int | None) -> None:
        """Starts the clock."""
        self._title, self._began = title, time.perf_counter()

    def end(self, done: int, logs: Mapping[str, Any], *, finished: bool) -> None:
        """Prints the epoch's line."""
        seconds = time.perf_counter() - self._began
        parts = [self._title, f"{done} steps", f"{seconds:.1f} s", format_logs(logs)]
        if not finished:
            parts.insert(1, "broken off")
        self.say(" · ".join(part for part in parts if part))


class Bar:
    """`verbose=1`: one tqdm bar per epoch, in a terminal or a notebook."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            # Without ipywidgets tqdm says so and draws a text bar: good enough.
            warnings.simplefilter("ignore")
            if in_notebook():
                from tqdm.auto import tqdm
            else:
                from tqdm import tqdm
        self._tqdm = tqdm
        self._bar: Any = None
        self._last = 0.0

    def say(self, text: str) -> None:
        """Prints the text above the bar."""
        self._tqdm.write(text, file=sys.stdout)

    def begin(self, title: str, total: int | None) -> None:
        """Opens a bar."""
        self._bar = self._tqdm(
            desc=title,
            total=total,
            unit="step",
            file=sys.stdout,
            dynamic_ncols=True,
            mininterval=_SECONDS_BETWEEN_UPDATES,
        )
        self._last = time.perf_counter()

    def due(self) -> bool:
        """Whether a tenth of a second has gone by."""
        return time.perf_counter() - self._last >= _SECONDS_BETWEEN_UPDATES

    def update(self, done: int, logs: Mapping[str, Any]) -> None:
        """Redraws the bar."""
        self._last = time.perf_counter()
        self._bar.n = done
        self._bar.set_postfix_str(format_logs(logs), refresh=True)

    def end(self, done: int, logs: Mapping[str, Any], *, finished: bool) -> None:
        """Closes the bar, which stays."""
        if finished:
            self._bar.total = done
        self.update(done, logs)
        self._bar.close()


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
    of their own where nobody watches."""
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
    return " · ".join(f"{name}: {format_value(value)}" for name, value in logs.items())


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
