"""A background thread that prepares what is needed next. Knows nothing of batches."""

import contextlib
import contextvars
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, Self, TypeVar

Item = TypeVar("Item")

# How long `close` waits for a loader that is busy. It ends as soon as it comes back.
_SECONDS_TO_END = 1.0
_SECONDS_BETWEEN_LOOKS = 0.1
_NOTE = (
    "The data was read ahead in a background thread; Trainer(model, prefetch=0) reads "
    "it in yours."
)


class Prefetch(Generic[Item]):
    """Iterates in a background thread, a bounded number of items ahead.

    What was made before an error is handed out before it is raised.

    Args:
      make: `(hungry) -> iterator`; it runs in the thread. `hungry()` tells whether
        the consumer waits, so that half of something is better than nothing.
      depth: how many finished items may wait.
      stopped: asked while the consumer waits; True ends its iteration.
    """

    def __init__(
        self,
        make: Callable[[Callable[[], bool]], Iterator[Item]],
        depth: int,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self._stopped = stopped
        self._queue: queue.Queue[Item | _End] = queue.Queue(depth)
        self._closed = threading.Event()
        self._waiting = False
        self._end: _End | None = None
        # Settings that belong to a thread, such as numpy.errstate, come along.
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._work, make), name="flaxfit", daemon=True
        )
        self._thread.start()

    def _work(self, make: Callable[[Callable[[], bool]], Iterator[Item]]) -> None:
        end = _End(None)
        try:
            for item in make(lambda: self._waiting):
                self._queue.put(item)
                if self._closed.is_set():
                    break
        except BaseException as error:
            end = _End(error)
        if not self._closed.is_set():
            self._queue.put(end)

    @property
    def ready(self) -> bool:
        """Whether the next item can be had without waiting."""
        return not self._queue.empty()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Item:
        item = self._end or self._get()
        if not isinstance(item, _End):
            return item
        self._end = item
        if item.error is None:
            raise StopIteration
        if isinstance(item.error, Exception) and _NOTE not in getattr(
            item.error, "__notes__", ()
        ):
            item.error.add_note(_NOTE)
        raise item.error

    def _get(self) -> "Item | _End":
        with contextlib.suppress(queue.Empty):
            return self._queue.get_nowait()
        self._waiting = True
        try:
            while not self._stopped():
                with contextlib.suppress(queue.Empty):
                    return self._queue.get(timeout=_SECONDS_BETWEEN_LOOKS)
            return _End(None)
        finally:
            self._waiting = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread, and lets go of what it has made."""
        self._closed.set()
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        self._thread.join(_SECONDS_TO_END)


class _End:
    """Stands behind the last item."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error
