"""The background thread: order, bound, errors, and that it always ends."""

import contextvars
import threading
import time
import traceback

import numpy as np
import pytest

import flaxfit.data.prefetch
from flaxfit.data.prefetch import Prefetch


def threads():
    return [t for t in threading.enumerate() if t.name == "flaxfit"]


def wait_until(condition, seconds=5.0):
    end = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < end, "waited in vain"
        time.sleep(0.002)


def counting(made, upto=None):
    """A maker that notes every item it makes."""

    def make(hungry):
        number = 0
        while upto is None or number < upto:
            made.append(number)
            yield number
            number += 1

    return make


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_everything_comes_in_order_and_the_end_stays_the_end(depth):
    with Prefetch(counting([], 20), depth) as items:
        assert list(items) == list(range(20))
        assert list(items) == []
        with pytest.raises(StopIteration):
            next(items)
    assert threads() == []


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_the_queue_is_bounded(depth):
    made = []
    with Prefetch(counting(made), depth) as items:
        for taken in range(6):
            # As many as the queue holds, and one in the hand of the thread.
            wait_until(lambda taken=taken: len(made) == taken + depth + 1)
            time.sleep(0.02)
            assert len(made) == taken + depth + 1
            assert next(items) == taken
    assert threads() == []
    assert len(made) <= 6 + depth + 2


def test_ready_tells_whether_there_is_something():
    gate = threading.Event()

    def make(hungry):
        gate.wait(5)
        yield 1

    with Prefetch(make, 1) as items:
        assert not items.ready
        gate.set()
        wait_until(lambda: items.ready)
        assert next(items) == 1
        wait_until(lambda: items.ready)  # the end can be had at once, too
        assert list(items) == []


def test_an_error_comes_after_what_was_made_before_it_with_its_traceback():
    def broken_loader(hungry):
        yield from (1, 2)
        raise OSError("disk gone")

    taken = []
    with Prefetch(broken_loader, 5) as items:
        with pytest.raises(OSError, match="disk gone") as caught:
            for item in items:
                taken.append(item)
        assert taken == [1, 2]
        frames = [f.name for f in traceback.extract_tb(caught.value.__traceback__)]
        assert "broken_loader" in frames
        assert [n for n in caught.value.__notes__ if "prefetch=0" in n] == [
            flaxfit.data.prefetch._NOTE
        ]
        with pytest.raises(OSError, match="disk gone"):  # and again, noted once
            next(items)
        assert len(caught.value.__notes__) == 1
    assert threads() == []


def test_an_interrupt_in_the_thread_is_raised_without_a_note():
    def make(hungry):
        yield 1
        raise KeyboardInterrupt

    with Prefetch(make, 2) as items:
        assert next(items) == 1
        with pytest.raises(KeyboardInterrupt) as caught:
            next(items)
    assert not getattr(caught.value, "__notes__", [])


def test_hungry_tells_that_the_consumer_waits():
    answers, gate = [], threading.Event()

    def make(hungry):
        answers.append(hungry())
        yield "first"
        while not hungry():
            time.sleep(0.001)
        answers.append(True)
        yield "second"
        gate.wait(5)
        answers.append(hungry())

    with Prefetch(make, 1) as items:
        wait_until(lambda: items.ready)
        assert next(items) == "first"
        assert next(items) == "second"
        gate.set()
        wait_until(lambda: len(answers) == 3)
    assert answers == [False, True, False]


def test_a_consumer_that_was_told_to_stop_waits_no_longer(monkeypatch):
    monkeypatch.setattr(flaxfit.data.prefetch, "_SECONDS_BETWEEN_LOOKS", 0.01)
    gate, stopped = threading.Event(), threading.Event()

    def make(hungry):
        yield 1
        gate.wait(5)
        yield 2

    with Prefetch(make, 1, stopped.is_set) as items:
        assert next(items) == 1
        threading.Timer(0.05, stopped.set).start()
        began = time.perf_counter()
        assert list(items) == []
        assert time.perf_counter() - began < 2
        gate.set()
    assert threads() == []


def test_what_is_ready_comes_even_after_a_stop():
    with Prefetch(counting([], 3), 3, lambda: True) as items:
        wait_until(lambda: items._queue.full())
        assert [next(items), next(items)] == [0, 1]


@pytest.mark.parametrize("taken", [0, 3])
def test_close_ends_an_endless_maker_and_its_generator(taken):
    ended = []

    def make(hungry):
        try:
            while True:
                yield 0
        finally:
            ended.append(threading.current_thread().name)

    with Prefetch(make, 2) as items:
        for _ in range(taken):
            next(items)
        wait_until(lambda: items._queue.full())
    assert threads() == []
    assert ended == ["flaxfit"]
    items.close()  # twice is fine


def test_close_does_not_wait_forever_for_a_busy_loader(monkeypatch):
    monkeypatch.setattr(flaxfit.data.prefetch, "_SECONDS_TO_END", 0.05)
    gate, made = threading.Event(), []

    def make(hungry):
        gate.wait(10)
        made.append(1)
        yield 1
        made.append(2)
        yield 2

    began = time.perf_counter()
    with Prefetch(make, 2):
        pass
    assert time.perf_counter() - began < 2
    assert len(threads()) == 1  # it cannot be ended while it is busy,
    gate.set()
    wait_until(lambda: not threads())  # and ends as soon as it comes back
    assert made == [1]


def test_settings_of_the_calling_thread_come_along():
    setting = contextvars.ContextVar("setting", default="default")
    setting.set("mine")

    def make(hungry):
        yield setting.get()
        yield np.geterr()["divide"]
        yield threading.current_thread().daemon

    with np.errstate(divide="raise"), Prefetch(make, 3) as items:
        assert list(items) == ["mine", "raise", True]
