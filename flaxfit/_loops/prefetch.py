"""A background thread that prepares the next items. Knows nothing of batches."""

import contextlib
import contextvars
import threading
import time
import weakref
from collections import deque
from collections.abc import Generator, Iterator
from typing import Any, Generic, Protocol, Self, TypeVar

import jax

Item = TypeVar("Item", contravariant=True)
Packed = TypeVar("Packed", covariant=True)

# How long `close` waits for a loader that is busy. Its thread ends as it comes back.
_SECONDS_TO_END = 1.0
_SECONDS_BETWEEN_LOOKS = 0.1
# To send a parcel costs as much as to read many a batch.
_SECONDS_TO_GATHER = 0.02
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


class _Bell:
    """Wakes one thread that waits; rung before, it does not wait at all.

    A lock alone, which Ctrl-C leaves as it is, unlike `threading.Condition`, whose
    `wait` may be left without the lock it has to give back.
    """

    def __init__(self) -> None:
        self._silent = threading.Lock()
        self._silent.acquire()

    def ring(self) -> None:
        with contextlib.suppress(RuntimeError):  # rung already
            self._silent.release()

    def wait(self, seconds: float = -1) -> None:
        self._silent.acquire(timeout=seconds)


class _Room:
    """Room for parcels, until nobody wants them any more.

    It knows nothing of the rest, so that what waits for the consumer's end to stop the
    thread does not keep the consumer.
    """

    def __init__(self) -> None:
        self.closed = False
        self.bell = _Bell()

    def close(self) -> None:
        self.closed = True
        self.bell.ring()


class _Worker(Generic[Item, Packed]):
    """What the thread does, and what both threads share."""

    def __init__(
        self, items: Iterator[Item], packer: Packer[Item, Packed], depth: int
    ) -> None:
        self._items = items
        self._depth = depth
        self.packer = packer
        self.parcels: deque[Packed] = deque()
        self.lock = threading.Lock()
        self.something = _Bell()
        self.ended = False
        # When the half parcel was begun, and the time between its last two items.
        self.begun = 0.0
        self.pace = 0.0
        self._added = 0.0
        self.error: BaseException | None = None
        self.room = _Room()

    def work(self) -> None:
        """Reads, packs and sends until all is read, or nobody wants any more."""
        error: BaseException | None = None
        try:
            for item in self._items:
                if not self._pack(item):
                    return
        except BaseException as caught:
            error = caught
        finally:
            self._let_go()
        self.error, self.ended = error, True
        self.something.ring()

    def gathers(self) -> float:
        """Returns how long a half parcel may still wait for more, in seconds."""
        if self.pace > _SECONDS_TO_GATHER / 2:
            return 0.0
        return self.begun + _SECONDS_TO_GATHER - time.monotonic()

    def _let_go(self) -> None:
        """Ends the loader in its own thread, where it may have something to close."""
        items, self._items = self._items, iter(())
        if isinstance(items, Generator):
            items.close()

    def _pack(self, item: Item) -> bool:
        """Packs an item, and sends what is full; False once nobody wants any more."""
        packer = self.packer
        with self.lock:
            apart = not packer.empty and not packer.takes(item)
            closed = packer.close() if apart else None
        if apart and not self._send(closed):
            return False
        now = time.monotonic()
        with self.lock:
            begins = packer.empty
            if begins:
                self.begun = now
            self.pace, self._added = now - self._added, now
            packer.add(item)
            full = packer.full
            closed = packer.close() if full else None
        if full:
            return self._send(closed)
        if begins:
            self.something.ring()
        return not self.room.closed

    def _send(self, closed: Any) -> bool:
        parcel = self.packer.send(closed)
        while len(self.parcels) >= self._depth and not self.room.closed:
            self.room.bell.wait()
        self.parcels.append(parcel)
        self.something.ring()
        return not self.room.closed


class Prefetch(Generic[Item, Packed]):
    """Packs and sends in a background thread, a bounded number of parcels ahead.

    Whoever waits is given what there is, be it half a parcel: at once if items are
    slow, else after a moment in which more of them come. What was read before an
    error is handed out before it is raised. The thread ends with `close`, or when this
    object is garbage: Ctrl-C may come before anyone can close it.

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
        worker = _Worker(items, packer, depth)
        self._worker = worker
        self._stopped = stopped
        # Settings that belong to a thread come along.
        context = contextvars.copy_context()
        x64 = jax.config.jax_enable_x64  # type: ignore[attr-defined]
        device = jax.config.jax_default_device  # type: ignore[attr-defined]

        def work() -> None:
            with jax.enable_x64(x64), jax.default_device(device):
                worker.work()

        weakref.finalize(self, worker.room.close).atexit = False
        self._thread = threading.Thread(
            target=context.run, args=(work,), name="flaxfit", daemon=True
        )
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether the next parcel can be had without waiting."""
        return bool(self._worker.parcels)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Packed:
        worker = self._worker
        while True:
            ended = worker.ended  # before looking: nothing comes after it
            wait = _SECONDS_BETWEEN_LOOKS
            with worker.lock:
                closed = None
                if not worker.parcels and not worker.packer.empty:
                    wait = 0.0 if ended else worker.gathers()
                    closed = worker.packer.close() if wait <= 0 else None
            if closed is not None:
                return worker.packer.send(closed)
            if worker.parcels:
                parcel = worker.parcels.popleft()
                worker.room.bell.ring()
                return parcel
            if ended or self._stopped():
                self._finish(ended)
            worker.something.wait(wait)

    def _finish(self, ended: bool) -> None:
        error = self._worker.error if ended else None
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
        self._worker.room.close()
        self._worker.parcels.clear()
        with contextlib.suppress(RuntimeError):  # closed by its own thread
            self._thread.join(_SECONDS_TO_END)
