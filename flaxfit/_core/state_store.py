"""The one owner of a `TrainState`, safe under donation and between threads."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flaxfit._core.types import TrainState, copy_state


class TrainStateStore:
    """Owns the current `TrainState` and keeps every state that was read from it valid.

    A train program consumes its input state, which is "donated" to it. A reader may
    keep a state, so the next `take` returns a copy. Threads may share a store: a data
    loader may predict with the model that is trained on its data.

    Attributes:
      lock: held while the state is replaced.
      version: how often the state was replaced.
    """

    def __init__(self, state: TrainState | None = None) -> None:
        self._state = state
        self._was_read = False
        self._borrowers = 0
        self._is_fresh = False
        self.version = 0
        self.lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, lock=threading.RLock())

    @property
    def has_trained(self) -> bool:
        """Whether there is a state that is not freshly initialized."""
        return self._state is not None and not self._is_fresh

    @property
    def empty(self) -> bool:
        """Whether there is no state yet."""
        return self._state is None

    def read(self) -> TrainState:
        """Returns the state; the caller may keep it."""
        with self.lock:
            self._was_read = True
            return self.peek()

    @contextmanager
    def borrow(self) -> Iterator[TrainState]:
        """Keeps the state valid inside the block, whatever other threads do."""
        with self.lock:
            self._borrowers += 1
            state = self.peek()
        try:
            yield state
        finally:
            with self.lock:
                self._borrowers -= 1

    def peek(self) -> TrainState:
        """Returns the state to a caller that neither keeps nor donates it."""
        assert self._state is not None
        return self._state

    def take(self) -> TrainState:
        """Returns a state that may be donated.

        The caller holds `lock` from here to `put`: in between, the arrays may be
        deleted, and other threads must not read them.
        """
        if self._was_read or self._borrowers:
            self.put(copy_state(self.peek()), fresh=self._is_fresh)
        return self.peek()

    def put(self, state: TrainState, *, fresh: bool = False) -> None:
        """Makes `state` the current one; the caller gives up its reference.

        Args:
          state: the state.
          fresh: whether it was just initialized, so that replacing it loses nothing.
        """
        with self.lock:
            self._state = state
            self._was_read = False
            self._is_fresh = fresh
            self.version += 1
