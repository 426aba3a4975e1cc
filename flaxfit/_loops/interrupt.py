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
        self._count = 0
        self._shielded = False
        self._previous: dict[int, Any] = {}
        self._signal = signal.SIGINT

    @property
    def requested(self) -> bool:
        """Whether Ctrl-C was pressed, or SIGTERM came."""
        return self._count > 0

    @property
    def insisted(self) -> bool:
        """Whether it came again."""
        return self._count > 1

    @property
    def terminated(self) -> bool:
        """Whether SIGTERM came: the process is to end."""
        return self.requested and self._signal == signal.SIGTERM

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
        if self._count > 1:
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
        self._count += 1
        # Ctrl-C after SIGTERM does not take the end of the process back.
        if self._signal != signal.SIGTERM:
            self._signal = signal.Signals(signum)
        if self._count > 1 and not self._shielded:
            self._raise()

    def _raise(self) -> None:
        raise SystemExit(TERMINATED) if self.terminated else KeyboardInterrupt
