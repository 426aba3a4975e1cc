"""A background thread that prepares what is needed next. Knows nothing of batches."""

import contextlib
import contextvars
import threading
from collections import deque
from collections.abc import Generator, Iterator
from typing import Any, Generic, Protocol, Self, TypeVar

import jax

Item = TypeVar("Item", contravariant=True)
Packed = TypeVar("Packed", covariant=True)

# How long `close` waits for a loader that is busy. Its thread ends as it comes back.
_SECONDS_TO_END = 1.0
_SECONDS_BETWEEN_LOOKS = 0.1
_NOTE = (
    "The data was read ahead in a background thread; Trainer(model, prefetch=0) reads "
    "it in yours."
)


class Packer(Protocol[Item, Packed]):
    """Packs items that follow each other into one parcel."""

    @property
    def empty(self) -> bool:
        """Whether nothing is packed."""

    @property
    def full(self) -> bool:
        """Whether no more goes in."""

    def takes(self, item: Item) -> bool:
        """Whether the item may join what is packed."""

    def add(self, item: Item) -> None:
        """Packs an item."""

    def close(self) -> Any:
        """Returns what is packed, and begins anew."""

    def send(self, closed: Any) -> Packed:
        """Makes a parcel of what `close` returned; it may take its time."""


class Prefetch(Generic[Item, Packed]):
    """Packs and sends in a background thread, a bounded number of parcels ahead.

    Whoever waits is given what there is, be it half a parcel. What was read before an
    error is handed out before it is raised.

    Args:
      items: what is packed; read in the thread.
      packer: how.
      depth: how many parcels may wait.
      stopped: asked while the consumer waits; True ends its iteration.
    """

    def __init__(
        self,
        items: Iterator[Item],
        packer: Packer[Item, Packed],
        depth: int,
        stopped: Any = lambda: False,
    ) -> None:
        self._items = items
        self._packer = packer
        self._depth = depth
        self._stopped = stopped
        self._parcels: deque[Packed] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._closed = False
        self._error: BaseException | None = None
        # Settings that belong to a thread come along.
        context = contextvars.copy_context()
        x64 = jax.config.jax_enable_x64  # type: ignore[attr-defined]
        device = jax.config.jax_default_device  # type: ignore[attr-defined]

        def work() -> None:
            with jax.enable_x64(x64), jax.default_device(device):
                self._work()

        self._thread = threading.Thread(
            target=context.run, args=(work,), name="flaxfit", daemon=True
        )
        self._thread.start()

    def _work(self) -> None:
        error: BaseException | None = None
        try:
            for item in self._items:
                if not self._pack(item):
                    return
        except BaseException as caught:
            error = caught
        finally:
            self._let_go()
        with self._changed:
            self._error, self._ended = error, True
            self._changed.notify_all()

    def _let_go(self) -> None:
        """Ends the loader in its own thread, where it may have something to close."""
        items, self._items = self._items, iter(())
        if isinstance(items, Generator):
            items.close()

    def _pack(self, item: Item) -> bool:
        """Packs an item, and sends what is full; False once nobody wants any more."""
        with self._changed:
            apart = not self._packer.empty and not self._packer.takes(item)
            closed = self._packer.close() if apart else None
        if apart and not self._send(closed):
            return False
        with self._changed:
            self._packer.add(item)
            full = self._packer.full
            closed = self._packer.close() if full else None
            self._changed.notify_all()
        return self._send(closed) if full else not self._closed

    def _send(self, closed: Any) -> bool:
        parcel = self._packer.send(closed)
        with self._changed:
            while len(self._parcels) >= self._depth and not self._closed:
                self._changed.wait()
            self._parcels.append(parcel)
            self._changed.notify_all()
        return not self._closed

    @property
    def ready(self) -> bool:
        """Whether the next parcel can be had without waiting."""
        return bool(self._parcels)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Packed:
        with self._changed:
            while not self._parcels:
                if not self._packer.empty:
                    closed = self._packer.close()
                    break
                if self._ended or self._stopped():
                    self._finish()
                self._changed.wait(_SECONDS_BETWEEN_LOOKS)
            else:
                parcel = self._parcels.popleft()
                self._changed.notify_all()
                return parcel
        return self._packer.send(closed)

    def _finish(self) -> None:
        error = self._error if self._ended else None
        if error is None:
            raise StopIteration
        if isinstance(error, Exception) and _NOTE not in getattr(
            error, "__notes__", ()
        ):
            error.add_note(_NOTE)
        raise error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread, and lets go of what it has made."""
        with self._changed:
            self._closed = True
            self._parcels.clear()
            self._changed.notify_all()
        with contextlib.suppress(RuntimeError):  # closed by its own thread
            self._thread.join(_SECONDS_TO_END)
