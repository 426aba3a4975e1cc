"""Threads and processes that work ahead: ordered, bounded, and gone afterwards."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import flax.linen as nn
import numpy as np
import psutil
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
def none_left(monkeypatch):
    monkeypatch.setattr(processes, "_IDLE_SECONDS", 10.0)
    yield
    gc.collect()  # the maps of a fit
    assert wait_until(lambda: not alive())


def alive():
    """The worker processes of this process."""
    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if any("popen_loky" in part for part in process.cmdline()):
                found.append(process.pid)
    return found


def with_pid(number):
    return number, os.getpid()


def wait_until(true, seconds=20):
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
        assert "in fail_at_five" in str(caught.value.__cause__)


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


def test_processes_are_used_again_and_end_with_the_map():
    mapped = OrderedMap(lambda number: (number, os.getpid()), processes=2)
    first, second = list(mapped(range(6))), list(mapped(range(6)))
    assert [number for number, _ in first] == list(range(6))
    pids = {pid for _, pid in first + second}
    assert os.getpid() not in pids
    assert len(alive()) == 2
    assert pids <= set(alive())
    del mapped
    assert wait_until(lambda: not alive())


def test_idle_processes_end_and_are_started_again(monkeypatch):
    monkeypatch.setattr(processes, "_IDLE_SECONDS", 1.0)
    mapped = OrderedMap(with_pid, processes=1)
    pids = set()
    for _ in range(2):
        numbers, [pid, *others] = zip(*mapped(range(3)), strict=True)
        assert numbers == (0, 1, 2)
        assert set(others) == {pid}
        pids.add(pid)
        assert wait_until(lambda: not alive())
        time.sleep(0.5)  # until loky has noticed, or it warns of the new one
    assert len(pids) == 2


def test_processes_end_in_the_middle_of_their_work():
    mapped = OrderedMap(
        lambda number: number if number < 2 else time.sleep(60), processes=2
    )
    results = mapped(range(10))
    assert [next(results), next(results)] == [0, 1]
    begun = time.monotonic()
    results.close()
    assert wait_until(lambda: not alive())
    assert time.monotonic() - begun < 10
    # And new ones come for the next pass.
    assert list(mapped([0, 1])) == [0, 1]


def test_two_passes_at_once_have_processes_of_their_own():
    mapped = OrderedMap(with_pid, processes=1)
    one, other = mapped(range(5)), mapped(range(5, 10))
    (first, pid), (second, other_pid) = next(one), next(other)
    assert [first, second] == [0, 5]
    assert pid != other_pid
    assert list(one) == [(number, pid) for number in range(1, 5)]
    assert list(other) == [(number, other_pid) for number in range(6, 10)]
    # Those of one of them are enough from now on.
    assert list(mapped([3])) == [(3, other_pid)]
    assert wait_until(lambda: alive() == [other_pid])


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


def test_a_process_that_is_killed():
    mapped = OrderedMap(lambda task: os.kill(os.getpid(), task), processes=2)
    with pytest.raises(RuntimeError, match=r"SIGKILL") as caught:
        list(mapped([signal.SIGKILL] * 3))
    assert "use fewer processes" in caught.value.__notes__[0]
    assert wait_until(lambda: not alive())


def test_results_before_the_death_of_a_process_come_first():
    def end_at_five(number):
        if number == 5:
            time.sleep(1)  # until all others are done
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    seen = []
    with pytest.raises(RuntimeError, match="SIGKILL"):
        for result in OrderedMap(end_at_five, processes=2)(range(100)):
            seen.append(result)
    assert seen == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("end", "told"), [(sys.exit, "SystemExit: 3"), (os._exit, r"EXIT\(3\)")]
)
def test_a_process_that_exits(end, told):
    mapped = OrderedMap(lambda task: end(task), processes=1)
    with pytest.raises(RuntimeError, match=told):
        list(mapped([3]))


def test_a_process_may_grow():
    grown = []

    def grow(number):
        grown.append(np.ones(100_000_000, np.uint8))
        time.sleep(0.3)  # loky looks once in a second
        return os.getpid()

    assert len(set(OrderedMap(grow, processes=1)(range(6)))) == 1


def test_processes_ignore_ctrl_c_from_their_first_moment():
    def mask(number):
        return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])

    assert list(OrderedMap(mask, processes=2)(range(4))) == [True] * 4
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_work_that_cannot_be_pickled():
    lock = threading.Lock()
    expected = r"processes=2: load and the items cannot be pickled .*threads=2"
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
    assert "sending a loaded batch back" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match="KeyError: 'gone'"):
        list(OrderedMap(locked, processes=1)([1]))


class Fragile:
    """It cannot be unpickled."""

    def __reduce__(self):
        return int, ("x",)


def test_work_that_cannot_be_unpickled():
    fragile = Fragile()
    with pytest.raises(ValueError, match="invalid literal") as caught:
        list(OrderedMap(lambda task: fragile, processes=1)([0]))
    assert "while a process unpickled load and the items" in caught.value.__notes__


def test_without_loky(monkeypatch):
    monkeypatch.setitem(sys.modules, "loky", None)
    with pytest.raises(ImportError, match="processes=2 needs loky: pip install loky"):
        list(OrderedMap(square, processes=2)([0]))


# How a program ends that has processes or threads at work.
_ENDING = """
import os, psutil, signal, sys, threading, time
from flaxfit.data.datasets.workers import OrderedMap

def load(number):
    if number > 1:
        time.sleep(60)
    return number

results = OrderedMap(load, {how})(range(10))
assert [next(results), next(results)] == [0, 1]
print(*[child.pid for child in psutil.Process().children()], flush=True)
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
        assert len(pids) >= 2  # with those that track loky's semaphores
        assert wait_until(lambda: all(map(has_ended, pids)))


def decode(item, rng):
    shifted = np.full(4, item, np.float32) + rng.random(dtype=np.float32)
    return shifted, np.float32([item])


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("how", WAYS[1:], ids=str)
def test_fit_is_the_same_by_threads_and_processes(how, prefetch):
    def losses(**ways):
        trainer = Trainer(nn.Dense(1), loss="mse", seed=3, prefetch=prefetch)
        examples = Examples(list(range(10)), decode, **ways)
        history = trainer.fit(examples, batch_size=4, epochs=3, verbose=0)
        return history.history["loss"]

    assert losses(**how) == losses()
    gc.collect()
    assert wait_until(lambda: not workers_alive() and not alive())


@pytest.mark.parametrize("how", WAYS[1:], ids=str)
def test_an_error_while_fitting_names_the_item(how):
    def load(item):
        if item == 17:
            raise ValueError("broken picture")
        return np.zeros(2, np.float32), np.zeros(1, np.float32)

    trainer = Trainer(nn.Dense(1), loss="mse")
    with pytest.raises(ValueError, match="broken picture") as caught:
        trainer.fit(Examples(list(range(20)), load, **how), batch_size=4, verbose=0)
    assert "while loading item 17" in caught.value.__notes__
    caught = None
    assert wait_until(lambda: not workers_alive() and not alive())


def test_an_interrupted_fit_leaves_no_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import gc, os, psutil, signal, threading, time
            import flax.linen as nn, numpy as np
            from flaxfit import Trainer
            from flaxfit.data import Examples

            def is_worker(process):
                try:
                    return "popen_loky" in "".join(process.cmdline())
                except psutil.NoSuchProcess:  # it has ended, or is a zombie
                    return False

            def workers():
                return sum(map(is_worker, psutil.Process().children()))

            def interrupt():
                time.sleep(3)
                print(workers())
                os.kill(os.getpid(), signal.SIGINT)

            def load(item):
                return np.ones(2, np.float32), np.zeros(1, np.float32)

            trainer = Trainer(nn.Dense(1), loss="mse")
            examples = Examples(list(range(64)), load, processes=2)
            threading.Thread(target=interrupt).start()
            history = trainer.fit(examples, epochs=10**6, batch_size=8, verbose=0)
            gc.collect()
            time.sleep(1)
            print(workers())
            """
        )
    )
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["2", "0"], done.stderr


@pytest.mark.parametrize("threads", [0, 2])
def test_a_function_that_runs_out_of_items_ends_no_pass(threads):
    work = OrderedMap(lambda task: next(iter(())), threads=threads)
    with pytest.raises(RuntimeError, match="StopIteration"):
        list(work([1, 2]))
