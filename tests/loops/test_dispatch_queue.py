"""Steps per call and calls under way, on a device and a clock that are made up."""

import itertools
import types

import numpy as np
import pytest

import flaxfit._loops.dispatch_queue
from flaxfit._loops.dispatch_queue import DispatchQueue


class Token:
    """What a call leaves: ready once the clock has come to its end."""

    def __init__(self, device, end):
        self.device, self.end = device, end

    def is_ready(self):
        return self.device.now >= self.end

    def block_until_ready(self):
        self.device.now = max(self.device.now, self.end)
        return self


class Device:
    """Runs one call after the other; a step takes `seconds`, a call `per_call` more."""

    def __init__(self, seconds, per_call=0.0):
        self.now = 100.0
        self.seconds, self.per_call = seconds, per_call
        self.free_at = 0.0
        self.tokens = []

    def call(self, steps, *, compiling=0.0):
        self.now += compiling + 1e-5  # what dispatch takes
        work = self.per_call + steps * self.seconds
        self.free_at = max(self.free_at, self.now) + work
        self.tokens.append(Token(self, self.free_at))
        return self.tokens[-1]

    @property
    def under_way(self):
        return sum(not token.is_ready() for token in self.tokens)


@pytest.fixture
def make_device(monkeypatch):
    def make(*args, **kwargs):
        device = Device(*args, **kwargs)
        clock = types.SimpleNamespace(perf_counter=lambda: device.now)
        monkeypatch.setattr(flaxfit._loops.dispatch_queue, "time", clock)
        return device

    return make


def drive(queue, device, calls, *, compile_first=True):
    """Makes calls as a loop would; returns the steps of each and the most under way."""
    steps, most = [], 0
    queue.begin()
    for number in range(calls):
        compiled = compile_first and number == 0
        steps.append(queue.steps_per_call)
        token = device.call(steps[-1], compiling=3.0 * compiled)
        queue.submit(token, sum(steps), steps[-1], compiled=compiled)
        most = max(most, device.under_way)
    return steps, most


def test_a_number_given_is_kept(make_device):
    for seconds in (1e-6, 1.0):
        steps, _ = drive(DispatchQueue(7), make_device(seconds), 8)
        assert steps == [7] * 8


def test_by_the_clock_a_call_comes_to_some_hundredths_of_a_second(make_device):
    queue = DispatchQueue()
    steps, _ = drive(queue, make_device(1e-3), 40)
    assert steps[0] == 1
    assert steps[-1] == pytest.approx(250, abs=5)
    for before, after in itertools.pairwise(steps):
        assert after <= 4 * before


def test_growth_is_bounded_as_a_first_guess_is_a_guess(make_device):
    steps, _ = drive(DispatchQueue(), make_device(1e-7), 12)
    grown = [s for i, s in enumerate(steps) if i == 0 or s != steps[i - 1]]
    assert grown[:4] == [1, 4, 16, 64]


def test_slow_steps_are_taken_one_by_one(make_device):
    steps, _ = drive(DispatchQueue(), make_device(0.5), 10)
    assert steps == [1] * 10


def test_steps_that_become_slow_shorten_the_calls_at_once(make_device):
    queue, device = DispatchQueue(), make_device(1e-4)
    fast, _ = drive(queue, device, 40)
    assert fast[-1] > 500
    device.seconds = 1e-2
    slow, _ = drive(queue, device, 20, compile_first=False)
    assert slow[-1] == pytest.approx(25, abs=3)


def test_a_call_that_was_compiled_says_nothing_about_time(make_device):
    queue, device = DispatchQueue(), make_device(1e-3)
    queue.begin()
    queue.submit(device.call(1, compiling=60.0), None, 1, compiled=True)
    queue.wait_all()
    assert queue.steps_per_call == 1
    queue.submit(device.call(1), None, 1, compiled=False)
    queue.wait_all()
    assert queue.steps_per_call == 4


@pytest.mark.parametrize(
    ("seconds", "most"), [(0.5, 2), (0.05, 3), (0.01, 8), (0.001, 8)]
)
def test_calls_run_ahead_of_the_device_but_not_far(make_device, seconds, most):
    _, under_way = drive(DispatchQueue(1), make_device(seconds), 60)
    # Dispatch takes its time, too: one more or less is no matter.
    assert under_way <= most
    assert under_way >= min(most, 2) - 1


def test_what_is_finished_can_be_had_without_waiting(make_device):
    device, queue = make_device(0.1), DispatchQueue(2)
    queue.begin()
    assert queue.finished == (None, 0)
    assert queue.idle
    queue.submit(device.call(2), "first", 2, compiled=False)
    queue.submit(device.call(2), "second", 2, compiled=False)
    now = device.now
    assert queue.finished == (None, 0)
    assert not queue.idle
    assert device.now == now  # nothing waited
    device.now = device.tokens[0].end
    assert not queue.idle  # looks, and notes the first
    assert queue.finished == ("first", 2)
    queue.wait_all()
    assert queue.finished == ("second", 4)
    assert device.now == device.tokens[-1].end
    assert queue.idle


def test_an_epoch_begins_anew_but_keeps_its_step(make_device):
    queue, device = DispatchQueue(), make_device(1e-3)
    drive(queue, device, 30)
    steps = queue.steps_per_call
    assert steps > 50
    queue.begin()
    assert (queue.finished, queue.steps_per_call, queue.idle) == (
        (None, 0),
        steps,
        True,
    )
    queue.submit(device.call(steps), "result", steps, compiled=False)
    queue.wait_all()
    assert queue.finished == ("result", steps)


def test_a_pause_between_calls_is_not_their_time(make_device):
    """A slow callback or loader must not make the calls shorter."""
    queue, device = DispatchQueue(), make_device(1e-3)
    queue.begin()
    for _ in range(30):
        steps = queue.steps_per_call
        queue.submit(device.call(steps), None, steps, compiled=False)
        queue.wait_all()
        device.now += 2.0
    assert queue.steps_per_call == pytest.approx(250, abs=5)


def test_it_follows_real_arrays():
    import jax.numpy as jnp

    queue = DispatchQueue()
    queue.begin()
    for _ in range(5):
        steps = queue.steps_per_call
        queue.submit({"a": jnp.ones(3)}, np.int32(1), steps, compiled=False)
    queue.wait_all()
    assert queue.idle
    assert queue.finished[1] >= 5
