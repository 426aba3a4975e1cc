"""A background thread that prepares the next chunks."""

import contextlib
import contextvars
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any, Self

import jax

from flaxfit._core.types import Batch
from flaxfit._loops.chunk_builder import ChunkBuilder, DeviceChunk

# How long `close` waits for a busy loader. Its thread ends when the loader returns.
_SECONDS_TO_END = 1.0
_SECONDS_BETWEEN_CHECKS = 0.1
# One transfer costs as much as reading several batches, so they are gathered.
_SECONDS_TO_GATHER = 0.02
_NOTE = (
    "The data was read ahead in a background thread; Trainer(model, prefetch=0) reads "
    "it in the caller's."
)


class _WakeEvent:
    """Wakes one waiting thread; if it is set already, `wait` returns at once.

    A bare lock survives Ctrl-C, unlike `threading.Condition`, whose interrupted `wait`
    may return without the lock that the `with` statement then releases.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        with contextlib.suppress(RuntimeError):  # set already
            self._lock.release()

    def wait(self, seconds: float = -1) -> None:
        self._lock.acquire(timeout=seconds)


class _CloseSignal:
    """Tells the thread to end, and wakes it when there is space for a chunk.

    It has no reference to the consumer: the finalizer that closes it must not keep the
    consumer alive.
    """

    def __init__(self) -> None:
        self.closed = False
        self.wake = _WakeEvent()

    def close(self) -> None:
        self.closed = True
        self.wake.set()


class _Worker:
    """The work of the thread, and everything that both threads share.

    `lock` protects the open chunk, which the consumer may take before it is full. The
    deque and the flags need no lock: each of their operations is atomic in CPython.
    """

    def __init__(
        self, items: Iterator[Batch], builder: ChunkBuilder, depth: int
    ) -> None:
        self._items = items
        self._depth = depth
        self.builder = builder
        self.chunks: deque[DeviceChunk] = deque()
        self.lock = threading.Lock()
        self.wake_consumer = _WakeEvent()
        self.ended = False
        # When the open chunk got its first item, when the last item was added, and the
        # time between the last two items.
        self._opened = 0.0
        self._added = 0.0
        self._interval = 0.0
        self.error: BaseException | None = None
        self.signal = _CloseSignal()

    def work(self) -> None:
        """Reads, gathers and sends all items, or until the consumer has closed."""
        error: BaseException | None = None
        try:
            for item in self._items:
                if not self._add(item):
                    return
        except BaseException as caught:
            error = caught
        finally:
            self._close_items()
        # `error` comes first: once `ended` is set, the consumer may read it.
        self.error, self.ended = error, True
        self.wake_consumer.set()

    def gathering_time(self) -> float:
        """Returns how long a partial chunk may still wait for items, in seconds."""
        if self._interval > _SECONDS_TO_GATHER / 2:
            return 0.0
        return self._opened + _SECONDS_TO_GATHER - time.monotonic()

    def _close_items(self) -> None:
        """Closes a generator in the thread that ran it: it may own resources there."""
        items, self._items = self._items, iter(())
        if isinstance(items, Generator):
            items.close()

    def _add(self, item: Batch) -> bool:
        """Adds an item and sends a full chunk; False once the consumer has closed."""
        builder = self.builder
        with self.lock:
            apart = not builder.empty and not builder.fits(item)
            closed = builder.close() if apart else None
        if apart and not self._send(closed):
            return False
        now = time.monotonic()
        with self.lock:
            opens = builder.empty
            if opens:
                self._opened = now
            self._interval, self._added = now - self._added, now
            builder.add(item)
            full = builder.full
            closed = builder.close() if full else None
        if full:
            return self._send(closed)
        if opens:
            self.wake_consumer.set()
        return not self.signal.closed

    def _send(self, closed: Any) -> bool:
        chunk = self.builder.send(closed)
        while len(self.chunks) >= self._depth and not self.signal.closed:
            self.signal.wake.wait()
        self.chunks.append(chunk)
        self.wake_consumer.set()
        return not self.signal.closed


class Prefetch:
    """Gathers and sends in a background thread, a bounded number of chunks ahead.

    A waiting consumer receives a partial chunk rather than wait for a full one: at
    once if items are slow, else after a moment in which more of them arrive. Items
    read before an error are delivered before it is raised. The thread ends with
    `close`, or when this object is garbage collected: Ctrl-C may come before `close`.

    Args:
      items: the batches; read in the thread.
      builder: gathers and sends them.
      depth: how many finished chunks may wait for the consumer.
      stopped: checked while the consumer waits; True ends its iteration.
    """

    def __init__(
        self,
        items: Iterator[Batch],
        builder: ChunkBuilder,
        depth: int,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        worker = _Worker(items, builder, depth)
        self._worker = worker
        self._stopped = stopped
        # Settings of jax and the name of the call are local to a thread: copy them.
        context = contextvars.copy_context()
        x64 = jax.config.jax_enable_x64  # type: ignore[attr-defined]
        device = jax.config.jax_default_device  # type: ignore[attr-defined]

        def work() -> None:
            with jax.enable_x64(x64), jax.default_device(device):
                worker.work()

        weakref.finalize(self, worker.signal.close).atexit = False
        self._thread = threading.Thread(
            target=context.run, args=(work,), name="flaxfit", daemon=True
        )
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether the next chunk is available without waiting."""
        return bool(self._worker.chunks)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> DeviceChunk:
        worker = self._worker
        while True:
            # Read before the deque, or a chunk appended in between would be lost.
            ended = worker.ended
            wait = _SECONDS_BETWEEN_CHECKS
            with worker.lock:
                closed = None
                if not worker.chunks and not worker.builder.empty:
                    wait = 0.0 if ended else worker.gathering_time()
                    closed = worker.builder.close() if wait <= 0 else None
            if closed is not None:
                return worker.builder.send(closed)
            if worker.chunks:
                chunk = worker.chunks.popleft()
                worker.signal.wake.set()
                return chunk
            if ended or self._stopped():
                self._finish(ended)
            worker.wake_consumer.wait(wait)

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
        """Ends the thread and frees the chunks it has prepared."""
        self._worker.signal.close()
        self._worker.chunks.clear()
        with contextlib.suppress(RuntimeError):  # closed by its own thread
            self._thread.join(_SECONDS_TO_END)
