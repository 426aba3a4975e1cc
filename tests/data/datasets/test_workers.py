"""Threads and processes that work ahead: ordered, bounded, and gone afterwards."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import flax.linen as nn
import numpy as np
import pytest

from flaxfit import Trainer
from flaxfit.data import Examples
from flaxfit.data.datasets import processes
from flaxfit.data.datasets.workers import OrderedMap

WAYS = [{}, {"threads": 3}, {"processes": 2}]


def square(number):
    return number * number


def fail_at_five(number):
    if number == 5:
        error = ValueError("broken")
        error.add_note("while loading item 5")
        raise error
    return number


def workers_alive():
    return [t for t in threading.enumerate() if t.name.startswith("flaxfit-worker")]


@pytest.fixture(autouse=True)
def started(monkeypatch):
    """Every process that a test starts."""
    found = []
    popen = subprocess.Popen

    def start(*arguments, **options):
        found.append(popen(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(processes.subprocess, "Popen", start)
    monkeypatch.setattr(processes, "_SECONDS_OF_REST", 2.0)
    yield found
    assert wait_until(lambda: not alive(found))


def alive(started):
    return [process for process in started if process.poll() is None]


def wait_until(true, seconds=10):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_results_come_in_order(how):
    mapped = OrderedMap(square, **how)
    for _ in range(2):
        assert list(mapped(range(20))) == [n * n for n in range(20)]
    assert list(mapped([])) == []


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_an_error_comes_after_the_results_before_it(how):
    seen = []
    with pytest.raises(ValueError, match="broken") as caught:
        for result in OrderedMap(fail_at_five, **how)(range(20)):
            seen.append(result)
    assert seen == [0, 1, 2, 3, 4]
    assert caught.value.__notes__[0] == "while loading item 5"
    if "processes" in how:
        # The line that failed, which this process's traceback does not have.
        assert "fail_at_five" in caught.value.__notes__[-1]


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_an_error_of_the_tasks_comes_after_their_results(how):
    def tasks():
        yield from range(4)
        raise OSError("unreadable")

    seen = []
    with pytest.raises(OSError, match="unreadable"):
        for result in OrderedMap(square, **how)(tasks()):
            seen.append(result)
    assert seen == [0, 1, 4, 9]


@pytest.mark.parametrize("how", WAYS[1:], ids=str)
def test_no_more_than_twice_as_many_tasks_are_taken_ahead(how):
    taken = []

    def tasks():
        for number in range(50):
            taken.append(number)
            yield number

    results = OrderedMap(square, **how)(tasks())
    for done in range(5):
        next(results)
        assert len(taken) <= done + 2 * next(iter(how.values()))
    results.close()


def test_threads_work_at_the_same_time():
    together = threading.Barrier(3)  # nobody passes alone

    def meet(number):
        together.wait(10)
        return number

    assert list(OrderedMap(meet, threads=3)(range(6))) == list(range(6))


def test_threads_end_and_what_waits_is_called_off():
    begun = []
    go = threading.Event()

    def work(number):
        begun.append(number)
        go.wait(10)
        return number

    results = OrderedMap(work, threads=2)(range(100))
    consumer = threading.Thread(target=next, args=(results,))
    consumer.start()
    assert wait_until(lambda: len(begun) == 2)
    go.set()
    consumer.join(10)
    results.close()
    assert wait_until(lambda: not workers_alive())
    assert len(begun) <= 6


def test_processes_are_used_again_and_end_with_the_map(started):
    mapped = OrderedMap(lambda number: (number, os.getpid()), processes=2)
    first, second = list(mapped(range(6))), list(mapped(range(6)))
    assert [number for number, _ in first] == list(range(6))
    assert {pid for _, pid in first} == {pid for _, pid in second}
    assert os.getpid() not in dict(first).values()
    assert len(alive(started)) == 2
    del mapped
    assert not alive(started)


def test_processes_rest_but_not_for_ever(started, monkeypatch):
    monkeypatch.setattr(processes, "_SECONDS_OF_REST", 0.05)
    mapped = OrderedMap(square, processes=1)
    for passes in 1, 2:
        assert list(mapped(range(3))) == [0, 1, 4]
        assert wait_until(lambda: not alive(started))
        assert len(started) == passes


def test_processes_end_in_the_middle_of_their_work(started):
    mapped = OrderedMap(
        lambda number: number if number < 2 else time.sleep(60), processes=2
    )
    results = mapped(range(10))
    assert [next(results), next(results)] == [0, 1]
    begun = time.monotonic()
    results.close()
    assert time.monotonic() - begun < 10
    assert not alive(started)
    # And new ones come for the next pass.
    assert list(mapped([0, 1])) == [0, 1]


def test_two_passes_at_once_have_processes_of_their_own(started):
    mapped = OrderedMap(square, processes=1)
    one, other = mapped(range(5)), mapped(range(5, 10))
    assert [next(one), next(other)] == [0, 25]
    assert list(one) == [1, 4, 9, 16]
    assert list(other) == [36, 49, 64, 81]
    # Those of one of them are enough from now on.
    assert len(started) == 2
    assert list(mapped([3])) == [9]
    assert len(started) == 2


def test_a_process_does_not_take_the_accelerator():
    def platform(task):
        del task
        import jax

        return os.environ["JAX_PLATFORMS"], jax.default_backend()

    assert list(OrderedMap(platform, processes=1)([0])) == [("cpu", "cpu")]


def test_what_is_printed_and_read_in_a_process_is_no_result(capfd):
    def talk(number):
        print("loading", number)
        return number, sys.stdin.read()

    assert list(OrderedMap(talk, processes=1)([7])) == [(7, "")]
    assert "loading 7" in capfd.readouterr().err


def test_a_process_that_is_killed(started):
    mapped = OrderedMap(lambda task: os.kill(os.getpid(), task), processes=2)
    with pytest.raises(RuntimeError, match=r"killed by SIGKILL.*write fewer processes"):
        list(mapped([signal.SIGKILL] * 3))
    assert not alive(started)


def test_a_process_that_exits():
    mapped = OrderedMap(lambda task: sys.exit(task), processes=1)
    with pytest.raises(RuntimeError, match="ended with exit code 3"):
        list(mapped([3]))


def test_work_that_cannot_be_pickled():
    lock = threading.Lock()
    expected = r"processes=2: load and the items .* cannot be pickled .*threads=2"
    with pytest.raises(TypeError, match=expected):
        list(OrderedMap(lambda task: lock, processes=2)([0]))


def test_results_and_errors_that_cannot_be_pickled():
    def locked(number):
        if number:
            error = KeyError("gone")
            error.lock = threading.Lock()
            raise error
        return threading.Lock()

    with pytest.raises(TypeError, match="cannot pickle") as caught:
        list(OrderedMap(locked, processes=1)([0]))
    assert "sending what was loaded back" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match="KeyError: 'gone'"):
        list(OrderedMap(locked, processes=1)([1]))


def test_without_cloudpickle(monkeypatch):
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    with pytest.raises(ImportError, match=r'pip install "flaxfit\[data\]"'):
        list(OrderedMap(square, processes=2)([0]))


# How a program ends that has processes or threads at work.
_ENDING = """
import os, signal, sys, threading, time
from flaxfit.data.datasets.workers import OrderedMap

def load(number):
    if number > 1:
        time.sleep(60)
    return os.getpid()

results = OrderedMap(load, {how})(range(10))
print(next(results), next(results), flush=True)
{end}
"""


def has_ended(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


READING = "threading.Thread(target=list, args=(results,), daemon=True).start()"
INTERRUPT = "os.kill(os.getpid(), signal.SIGINT); next(results)"


@pytest.mark.parametrize(
    ("how", "end", "code"),
    [
        ("processes=2", "raise SystemExit(3)", 3),
        ("processes=2", INTERRUPT, -signal.SIGINT),
        ("processes=2", "os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("processes=2", READING, 0),
        ("threads=2", INTERRUPT, -signal.SIGINT),
        ("threads=2", "", 0),
    ],
)
def test_a_program_ends_at_once_and_leaves_nothing(how, end, code, tmp_path):
    # No `if __name__ == "__main__"`, and its functions are in no module.
    script = tmp_path / "script.py"
    script.write_text(_ENDING.format(how=how, end=end))
    begun = time.monotonic()
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert time.monotonic() - begun < 40
    assert done.returncode == code, done.stderr
    pids = {int(pid) for pid in done.stdout.split()}
    if how == "processes=2":
        assert len(pids) == 2
        assert wait_until(lambda: all(map(has_ended, pids)))


def decode(item, rng):
    shifted = np.full(4, item, np.float32) + rng.random(dtype=np.float32)
    return shifted, np.float32([item])


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("how", WAYS[1:], ids=str)
def test_fit_is_the_same_by_threads_and_processes(how, prefetch, started):
    def losses(**ways):
        trainer = Trainer(nn.Dense(1), loss="mse", seed=3, prefetch=prefetch)
        examples = Examples(list(range(10)), decode, **ways)
        history = trainer.fit(examples, batch_size=4, epochs=3, verbose=0)
        return history.history["loss"]

    assert losses(**how) == losses()
    assert wait_until(lambda: not workers_alive() and not alive(started))


@pytest.mark.parametrize("how", WAYS[1:], ids=str)
def test_an_error_while_fitting_names_the_item(how, started):
    def load(item):
        if item == 17:
            raise ValueError("broken picture")
        return np.zeros(2, np.float32), np.zeros(1, np.float32)

    trainer = Trainer(nn.Dense(1), loss="mse")
    with pytest.raises(ValueError, match="broken picture") as caught:
        trainer.fit(Examples(list(range(20)), load, **how), batch_size=4, verbose=0)
    assert "while loading item 17" in caught.value.__notes__
    caught = None
    assert wait_until(lambda: not workers_alive() and not alive(started))


def test_an_interrupted_fit_leaves_no_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import gc, os, signal, subprocess, threading, time
            import flax.linen as nn, numpy as np
            from flaxfit import Trainer
            from flaxfit.data import Examples
            from flaxfit.data.datasets import processes

            processes._SECONDS_OF_REST = 0.1
            started, popen = [], subprocess.Popen

            def start(*arguments, **options):
                started.append(popen(*arguments, **options))
                return started[-1]

            subprocess.Popen = start

            def load(item):
                return np.ones(2, np.float32), np.zeros(1, np.float32)

            trainer = Trainer(nn.Dense(1), loss="mse")
            examples = Examples(list(range(64)), load, processes=2)
            threading.Timer(3, os.kill, (os.getpid(), signal.SIGINT)).start()
            history = trainer.fit(examples, epochs=10**6, batch_size=8, verbose=0)
            gc.collect()
            time.sleep(1)
            print(len(started) > 1, sum(each.poll() is None for each in started))
            """
        )
    )
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["True", "0"], done.stderr
