"""Ctrl-C as a flag: a step that has begun is finished, and its state kept."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self


class Interrupt:
    """Turns SIGINT into a flag while it is entered; a second one raises.

    A KeyboardInterrupt raised between a step that has consumed the state and the
    assignment of the new one would lose both. Off the main thread, or where SIGINT
    is ignored, nothing is touched. The old handler comes back at the end.
    """

    def __init__(self) -> None:
        self._count = 0
        self._shielded = False
        self._previous: Any = None

    @property
    def requested(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self._count > 0

    @property
    def insisted(self) -> bool:
        """Whether it was pressed again."""
        return self._count > 1

    @contextmanager
    def shield(self) -> Iterator[None]:
        """Keeps a second Ctrl-C out of what is inside; it raises right after."""
        self._shielded = True
        try:
            yield
        finally:
            self._shielded = False
        if self._count > 1:
            raise KeyboardInterrupt

    def __enter__(self) -> Self:
        handler = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread() and callable(handler):
            self._previous = handler
            signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *unused: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        del signum, frame
        self._count += 1
        if self._count > 1 and not self._shielded:
            raise KeyboardInterrupt
