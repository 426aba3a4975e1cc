"""Numbers -> Markdown, on the screen and in a file."""

import contextlib
import io
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO


class Report:
    """What has been said so far, on the screen at once and for a file at the end."""

    def __init__(self, screen: TextIO) -> None:
        self._screen = screen
        self._lines: list[str] = []

    def say(self, text: str = "") -> None:
        """Adds a line or a paragraph."""
        self._lines.append(text)
        print(text, file=self._screen, flush=True)

    def section(self, title: str) -> None:
        """Adds a heading."""
        self.say(f"\n## {title}\n")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Adds a table: text to the left, numbers to the right."""
        rules = ["---", *("---:" for _ in header[1:])]
        for row in (header, rules, *rows):
            self.say("| " + " | ".join(row) + " |")

    def write(self, path: str | Path) -> None:
        """Writes everything said to a file."""
        Path(path).write_text("\n".join(self._lines) + "\n", encoding="utf-8")


class Terminal(io.TextIOBase):
    """A terminal that nobody looks at: progress bars are drawn, then dropped."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        """Says it is one, so that bars behave as they do before a person."""
        return True

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, text: str) -> int:
        """Takes anything."""
        return len(text)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Within it, whatever is printed goes to a `Terminal`."""
    terminal = Terminal()
    with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
        yield


def number(value: float | None, digits: int = 3) -> str:
    """Returns a number with so many digits that mean something, `-` for None."""
    if value is None:
        return "-"
    if value == 0 or abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def ratio(rival: Sequence[float], own: Sequence[float]) -> float:
    """Returns the median over the rounds of rival time / own time."""
    return statistics.median(r / o for r, o in zip(rival, own, strict=True))


def spread(rival: Sequence[float], own: Sequence[float]) -> str:
    """Returns the smallest and largest ratio of any round."""
    found = sorted(r / o for r, o in zip(rival, own, strict=True))
    return f"{number(found[0])} to {number(found[-1])}"
