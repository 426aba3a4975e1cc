"""The background thread: order, bound, errors, and that it always ends."""

import contextvars
import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
import tracemalloc
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

import flaxfit._loops.prefetch
from flaxfit._loops.prefetch import Prefetch


def threads():
    return [t for t in threading.enumerate() if t.name == "flaxfit"]


def wait_until(condition, seconds=5.0):
    end = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < end, "waited in vain"
        time.sleep(0.002)


class Tuples:
    """Packs items into tuples of at most `size`, those of one sign together."""

    def __init__(self, size=1):
        self.size, self.packed = size, []

    @property
    def empty(self):
        return not self.packed

    @property
    def full(self):
        return len(self.packed) == self.size

    def fits(self, item):
        return (item < 0) == (self.packed[0] < 0)

    def add(self, item):
        self.packed.append(item)

    def close(self):
        closed, self.packed = self.packed, []
        return closed

    def send(self, closed):
        return tuple(closed)


def counting(made, upto=None):
    """Items, each of them noted as it is read."""
    number = 0
    while upto is None or number < upto:
        made.append(number)
        yield number
        number += 1


def flat(parcels):
    return [item for parcel in parcels for item in parcel]


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_everything_comes_in_order_and_the_end_stays_the_end(depth, size):
    with Prefetch(counting([], 200), Tuples(size), depth) as parcels:
        found = list(parcels)
        assert flat(found) == list(range(200))
        assert max(map(len, found)) <= size
        assert list(parcels) == []
        with pytest.raises(StopIteration):
            next(parcels)
    assert threads() == []


@pytest.mark.parametrize("pause", [0.0, 0.001])
def test_nothing_is_lost_or_turned_round_between_the_two_threads(pause):
    """The consumer takes half parcels while the thread packs the next ones."""
    rng = np.random.default_rng(0)

    def items():
        for number in range(400):
            if rng.uniform() < 0.2:
                time.sleep(0.0005)
            yield number if number % 50 < 25 else -number

    with Prefetch(items(), Tuples(7), 2) as parcels:
        found = []
        for parcel in parcels:
            found.append(parcel)
            time.sleep(pause)
    assert [abs(item) for item in flat(found)] == list(range(400))
    for parcel in found:  # what did not fit together came apart
        assert len({item < 0 for item in parcel}) == 1
        assert 1 <= len(parcel) <= 7


def test_who_waits_gathers_what_comes_fast(monkeypatch):
    """Sending every item by itself costs more than reading it."""

    def items(pause):
        for number in range(20):
            time.sleep(pause)
            yield number

    # The first item goes at once, and the rest with the end.
    monkeypatch.setattr(flaxfit._loops.prefetch, "_SECONDS_TO_GATHER", 60.0)
    with Prefetch(items(0.001), Tuples(100), 2) as parcels:
        found = list(parcels)
    assert flat(found) == list(range(20))
    assert len(found) <= 2
    # Of slow items, nobody waits for a second one.
    monkeypatch.setattr(flaxfit._loops.prefetch, "_SECONDS_TO_GATHER", 0.002)
    with Prefetch(items(0.01), Tuples(100), 2) as parcels:
        assert flat(parcels) == list(range(20))


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 3])
def test_the_parcels_that_wait_are_bounded(depth, size):
    made = []
    with Prefetch(counting(made), Tuples(size), depth) as parcels:
        for taken in range(5):
            # As many as may wait, and one in the hand of the thread.
            most = (taken + depth + 1) * size
            wait_until(lambda most=most: len(made) == most)
            time.sleep(0.02)
            assert len(made) == most
            assert next(parcels) == tuple(range(taken * size, (taken + 1) * size))
    assert threads() == []
    assert len(made) <= (5 + depth + 2) * size


def test_whoever_waits_is_given_half_a_parcel():
    gate = threading.Event()

    def items():
        yield from (1, 2)
        gate.wait(5)
        yield 3

    with Prefetch(items(), Tuples(100), 1) as parcels:
        wait_until(lambda: len(parcels._worker.builder.packed) == 2)
        assert not parcels.ready
        assert next(parcels) == (1, 2)
        gate.set()
        assert next(parcels) == (3,)
        assert list(parcels) == []


def test_ready_tells_whether_there_is_something():
    gate = threading.Event()

    def items():
        gate.wait(5)
        yield 1

    with Prefetch(items(), Tuples(), 1) as parcels:
        assert not parcels.ready
        gate.set()
        wait_until(lambda: parcels.ready)
        assert next(parcels) == (1,)


def test_an_error_comes_after_what_was_made_before_it_with_its_traceback():
    def broken_loader():
        yield from (1, 2, 3)
        raise OSError("disk gone")

    taken = []
    with Prefetch(broken_loader(), Tuples(2), 5) as parcels:
        with pytest.raises(OSError, match="disk gone") as caught:
            for parcel in parcels:
                taken.append(parcel)
        assert flat(taken) == [1, 2, 3]
        frames = [f.name for f in traceback.extract_tb(caught.value.__traceback__)]
        assert "broken_loader" in frames
        assert caught.value.__notes__ == [flaxfit._loops.prefetch._NOTE]
        with pytest.raises(OSError, match="disk gone"):  # and again, noted once
            next(parcels)
        assert len(caught.value.__notes__) == 1
    assert threads() == []


def test_an_error_in_packing_is_raised_as_well():
    class Broken(Tuples):
        def send(self, closed):
            raise MemoryError("no room")

    with Prefetch(counting([], 5), Broken(), 2) as parcels:
        with pytest.raises(MemoryError, match="no room"):
            list(parcels)
    assert threads() == []


def test_an_interrupt_in_the_thread_is_raised_without_a_note():
    def items():
        yield 1
        raise KeyboardInterrupt

    with Prefetch(items(), Tuples(), 2) as parcels:
        assert next(parcels) == (1,)
        with pytest.raises(KeyboardInterrupt) as caught:
            next(parcels)
    assert not getattr(caught.value, "__notes__", [])


def test_a_consumer_that_was_told_to_stop_waits_no_longer(monkeypatch):
    monkeypatch.setattr(flaxfit._loops.prefetch, "_SECONDS_BETWEEN_CHECKS", 0.01)
    gate, stopped = threading.Event(), threading.Event()

    def items():
        yield 1
        gate.wait(5)
        yield 2

    with Prefetch(items(), Tuples(), 1, stopped.is_set) as parcels:
        assert next(parcels) == (1,)
        threading.Timer(0.05, stopped.set).start()
        began = time.perf_counter()
        assert list(parcels) == []
        assert time.perf_counter() - began < 2
        gate.set()
    assert threads() == []


def test_what_is_ready_comes_even_after_a_stop():
    with Prefetch(counting([], 3), Tuples(), 2, lambda: True) as parcels:
        wait_until(lambda: len(parcels._worker.chunks) == 2)
        assert [next(parcels), next(parcels)] == [(0,), (1,)]


@pytest.mark.parametrize("taken", [0, 3])
def test_close_ends_an_endless_loader_and_its_generator(taken):
    ended = []

    def items():
        try:
            while True:
                yield 0
        finally:
            ended.append(True)

    parcels = Prefetch(items(), Tuples(), 2)
    with parcels:
        for _ in range(taken):
            next(parcels)
        wait_until(lambda: len(parcels._worker.chunks) == 2)
    assert threads() == []
    assert ended == [True]  # whoever still holds the parcels holds no open file
    parcels.close()  # twice is fine


def test_close_does_not_wait_forever_for_a_busy_loader(monkeypatch):
    monkeypatch.setattr(flaxfit._loops.prefetch, "_SECONDS_TO_END", 0.05)
    gate, made = threading.Event(), []

    def items():
        gate.wait(10)
        made.append(1)
        yield 1
        made.append(2)
        yield 2

    began = time.perf_counter()
    with Prefetch(items(), Tuples(), 2):
        pass
    assert time.perf_counter() - began < 2
    assert len(threads()) == 1  # it cannot be ended while it is busy,
    gate.set()
    wait_until(lambda: not threads())  # and ends as soon as it comes back
    assert made == [1]


def test_settings_of_the_calling_thread_come_along():
    setting = contextvars.ContextVar("setting", default=0)
    setting.set(5)
    seen = []

    def items():
        seen.append(np.geterr()["divide"])
        seen.append(jax.config.jax_default_device)
        yield setting.get()

    device = jax.local_devices()[3]
    with np.errstate(divide="raise"), jax.default_device(device):
        with Prefetch(items(), Tuples(), 3) as parcels:
            assert list(parcels) == [(5,)]
    assert seen == ["raise", device]


# ------------------------------------------------------------------- starts and stops


class Alarm:
    """Ctrl-C at any moment: a KeyboardInterrupt in the main thread, by a real timer."""

    def __init__(self, seconds):
        self._seconds, self._armed = seconds, False

    def _ring(self, signum, frame):
        if self._armed:
            raise KeyboardInterrupt

    def __enter__(self):
        self._before = signal.signal(signal.SIGALRM, self._ring)
        self._armed = True
        signal.setitimer(signal.ITIMER_REAL, self._seconds)

    def __exit__(self, *unused):
        self._armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before)


def start_and_stop(rng):
    """Reads a loader that may be slow or break off, as far as one likes; says why."""
    fails, slow = rng.choice([None, None, rng.randrange(40)]), rng.random() < 0.2

    def loader():
        for number in range(rng.randrange(1, 60)):
            if number == fails:
                raise OSError("broken")
            if slow:
                time.sleep(0.0003)
            yield np.full(1000, number)

    leaves_at = rng.choice([None, rng.randrange(30)])
    seconds = rng.uniform(1e-5, 0.003) if rng.random() < 0.4 else 60.0
    packer = Tuples(rng.choice([1, 3, 16]))
    packer.fits = lambda item: True
    try:
        with Alarm(seconds), Prefetch(loader(), packer, rng.choice([1, 2, 4])) as found:
            for number, _ in enumerate(found):
                if number == leaves_at:
                    return "left"
        return "read"
    except OSError:
        return "error"
    except KeyboardInterrupt:
        return "interrupt"


def campaign():
    """Returns how a thousand of them ended, and the bytes by which memory grew."""
    rng = random.Random(0)
    ends = Counter(start_and_stop(rng) for _ in range(200))
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    ends += Counter(start_and_stop(rng) for _ in range(800))
    gc.collect()
    wait_until(lambda: not any(thread.is_alive() for thread in threads()))
    return dict(ends), tracemalloc.get_traced_memory()[0] - before


def test_a_thousand_starts_and_stops_leave_no_thread_and_no_memory():
    """In a process of its own: what measures coverage is no friend of interrupts."""
    code = "import json, test_prefetch as t; print(json.dumps(t.campaign()))"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COV")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    ends, grown = json.loads(done.stdout)
    assert ends.keys() == {"left", "read", "error", "interrupt"}
    assert sum(ends.values()) == 1000 and min(ends.values()) >= 20
    assert grown < 400_000  # CPython keeps threads interrupted as they start
