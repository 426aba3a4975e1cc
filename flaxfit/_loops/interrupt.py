"""Turns SIGINT and SIGTERM into flags, so that a running step can finish."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

TERMINATED = 128 + signal.SIGTERM  # the exit status a shell reports for it


class Interrupt:
    """Turns SIGINT and SIGTERM into flags while it is entered; a second one raises.

    A KeyboardInterrupt raised between a step that has consumed the state and the
    assignment of the new one would lose both. Off the main thread, or where a signal
    is ignored, nothing is touched. The old handlers come back at the end.

    After SIGTERM, leaving raises `SystemExit(143)`; a handler that was set before
    for it is called first, and decides if it does not return.
    """

    def __init__(self) -> None:
        self._received: list[int] = []
        self._shielded = False
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether Ctrl-C was pressed, or SIGTERM came."""
        return bool(self._received)

    @property
    def insisted(self) -> bool:
        """Whether it came again."""
        return len(self._received) > 1

    @property
    def terminated(self) -> bool:
        """Whether SIGTERM came, perhaps with Ctrl-C: the process is to end."""
        return signal.SIGTERM in self._received

    @property
    def reason(self) -> str:
        """What ended the training, for people."""
        return f"interrupted by {'SIGTERM' if self.terminated else 'Ctrl-C'}"

    @contextmanager
    def shield(self) -> Iterator[None]:
        """Keeps a second signal out of what is inside; it raises right after."""
        self._shielded = True
        try:
            yield
        finally:
            self._shielded = False
        if self.insisted:
            self._raise()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                by_default = number == signal.SIGTERM and handler is signal.SIG_DFL
                if callable(handler) or by_default:
                    self._previous[number] = handler
                    signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self.terminated and kind is not SystemExit:
            if callable(self._previous[signal.SIGTERM]):
                signal.raise_signal(signal.SIGTERM)
            raise SystemExit(TERMINATED)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        del frame
        self._received.append(signum)
        if self.insisted and not self._shielded:
            self._raise()

    def _raise(self) -> None:
        raise SystemExit(TERMINATED) if self.terminated else KeyboardInterrupt
