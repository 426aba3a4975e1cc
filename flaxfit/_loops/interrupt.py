"""Turns SIGINT and SIGTERM into flags, so that a running step can finish."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

TERMINATED = 128 + signal.SIGTERM  # the exit status that a shell reports


class Interrupt:
    """Turns SIGINT and SIGTERM into flags while entered; a second signal raises.

    A KeyboardInterrupt after a step has consumed the state, and before the new state is
    assigned, would lose both. Off the main thread, or for an ignored signal, nothing
    changes. Leaving restores the old handlers.

    After SIGTERM, leaving raises `SystemExit(143)`. An earlier handler of SIGTERM is
    called first and may raise something else.
    """

    def __init__(self) -> None:
        self._received: list[int] = []
        self._shielded = False
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal was received."""
        return bool(self._received)

    @property
    def insisted(self) -> bool:
        """Whether a second signal was received."""
        return len(self._received) > 1

    @property
    def terminated(self) -> bool:
        """Whether SIGTERM was received, so that the process has to end."""
        return signal.SIGTERM in self._received

    @property
    def reason(self) -> str:
        """The `stop_reason` of an interrupted fit."""
        return f"interrupted by {'SIGTERM' if self.terminated else 'Ctrl-C'}"

    @contextmanager
    def shield(self) -> Iterator[None]:
        """Delays the exception of a second signal until the block has ended."""
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
