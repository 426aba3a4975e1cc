"""Processes that are really killed, disks that are really full, and what they prove.

A campaign is one function `(trials, seed, folder) -> Outcome`. It runs in a clean
process: one that has imported flaxfit, but started no jax backend and no thread, so
that `os.fork` is safe and a trial costs milliseconds instead of the import of jax.
`Server` is that process; pytest, which has a backend running, asks it by name:

    with Server() as server:
        outcome = server.run("campaigns_crash:f1_kill", 20, 0, folder)

Inside of a campaign:

    tally = Tally()
    with tally.trial("killed after 3 ms"):      # an exception is a lost trial
        child = Child(save_loop, folder)        # forked; acknowledges what it saved
        child.await_acknowledged(1)
        child.kill()                            # SIGKILL
        step = fresh(newest, folder)            # by a process that knows nothing
        assert step >= max(child.acknowledged)
    return tally.outcome()

A child may start a jax backend (train something): its parent has none.
Knows nothing of flaxfit.
"""

import contextlib
import ctypes
import importlib
import json
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_ACKNOWLEDGEMENT = struct.Struct("<q")
_DIE_WITH_PARENT = 1
_PRELOADED = ("flaxfit", "flaxfit.checkpoint", "optax", "content")


@dataclass(frozen=True)
class Outcome:
    """What a campaign found.

    Attributes:
      trials: how often something was broken.
      survived: how often nothing was lost.
      details: one text for each trial that was lost.
      skipped: why nothing could be tried here; empty where it was.
    """

    trials: int
    survived: int
    details: tuple[str, ...] = ()
    skipped: str = ""


class SkippedError(Exception):
    """This machine does not allow the fault to be made."""


class Tally:
    """Counts trials; an exception inside of one is a trial that was lost."""

    def __init__(self) -> None:
        self.trials = 0
        self.details: list[str] = []

    @contextlib.contextmanager
    def trial(self, label: str) -> Iterator[None]:
        """Counts what happens inside as one trial."""
        self.trials += 1
        try:
            yield
        except SkippedError:
            raise
        except Exception as err:
            at = traceback.extract_tb(err.__traceback__)[-1]
            where = f"{Path(at.filename).name}:{at.lineno}"
            text = f"{type(err).__name__}: {err} ({where})"
            if isinstance(err, ChildError):
                text = str(err).strip().splitlines()[-1]
            self.details.append(f"{label}: {text}")

    def add(self, other: "Tally") -> None:
        """Takes over what was counted elsewhere, for example in a child."""
        self.trials += other.trials
        self.details += other.details

    def outcome(self) -> Outcome:
        survived = self.trials - len(self.details)
        return Outcome(self.trials, survived, tuple(self.details))


# Processes


class ChildError(AssertionError):
    """A child ended with an exception; the text is its traceback."""


class Child:
    """A forked process that runs `function(acknowledge, *args)`.

    `acknowledge(number)` returns once the number is in a pipe, which outlives the
    process: what was acknowledged before a kill is known for certain.

    Args:
      function: what it returns, or raises, is what `result` returns, or raises.
      args: its further arguments.
      prepare: called in the child first, for example to be traced.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *args: Any,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self.acknowledged: list[int] = []
        self._data = b""
        self._reader, writer = os.pipe()
        self._result, result = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            _run_child(function, args, writer, result, prepare)
        self.status: int | None = None
        self.acknowledgements = writer  # The child's descriptor, for who traces it.
        os.close(writer)
        os.close(result)

    def await_acknowledged(self, count: int, timeout: float = 60.0) -> None:
        """Returns once `count` numbers have been acknowledged, or the child ended."""
        deadline = time.monotonic() + timeout
        while len(self.acknowledged) < count and self._read(deadline):
            pass

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Sends a signal and waits for the end, then reads what was acknowledged."""
        if self.status is None:
            os.kill(self.pid, signum)
        self.join()

    def join(self, timeout: float = 120.0) -> int:
        """Waits for the end; returns the status as `os.waitpid` does."""
        deadline = time.monotonic() + timeout
        while self._read(deadline):
            pass
        self.reap()
        assert self.status is not None
        return self.status

    def reap(self, status: int | None = None) -> None:
        """Notes a status that somebody else waited for, or waits for it."""
        if self.status is None:
            self.status = os.waitpid(self.pid, 0)[1] if status is None else status
        while self._reader >= 0 and self._read(time.monotonic() + 60):
            pass

    def result(self, timeout: float = 120.0) -> Any:
        """Waits for the end; returns what the function returned.

        Raises:
          ChildError: the function raised, or the process was killed.
        """
        with open(self._result, "rb", closefd=False) as file:
            data = file.read() if self._ends(self._result, timeout) else b""
        self.join(timeout)
        os.close(self._result)
        if not data:
            raise ChildError(f"the child ended with status {self.status}")
        kind, value = pickle.loads(data)
        if kind == "raised":
            raise ChildError(value)
        return value

    def _ends(self, descriptor: int, timeout: float) -> bool:
        if select.select([descriptor], [], [], timeout)[0]:
            return True
        os.kill(self.pid, signal.SIGKILL)
        return False

    def _read(self, deadline: float) -> bool:
        """Reads some acknowledgements; returns whether there may be more."""
        if self._reader < 0:
            return False
        left = max(0.0, deadline - time.monotonic())
        if not select.select([self._reader], [], [], left)[0]:
            os.kill(self.pid, signal.SIGKILL)
            raise TimeoutError(f"child {self.pid} did not go on; it has been killed")
        data = os.read(self._reader, 2**16)
        self._data += data
        size = _ACKNOWLEDGEMENT.size
        while len(self._data) >= size:
            self.acknowledged.append(_ACKNOWLEDGEMENT.unpack(self._data[:size])[0])
            self._data = self._data[size:]
        if not data:
            os.close(self._reader)
            self._reader = -1
        return bool(data)


def fresh(function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> Any:
    """Returns what `function(*args)` returns in a process that knows nothing.

    Raises:
      ChildError: with the traceback, where it raised.
    """
    return Child(_without_acknowledge, function, args).result(timeout)


def _without_acknowledge(
    acknowledge: Callable[[int], None], function: Callable[..., Any], args: Any
) -> Any:
    del acknowledge
    return function(*args)


def _run_child(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    writer: int,
    result: int,
    prepare: Callable[[], None] | None,
) -> None:
    """The whole life of a child. Never returns."""
    with contextlib.suppress(
        OSError, AttributeError
    ):  # Linux: it dies with its parent.
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)

    def acknowledge(number: int) -> None:
        os.write(writer, _ACKNOWLEDGEMENT.pack(number))

    try:
        if prepare is not None:
            prepare()
        value = ("returned", function(acknowledge, *args))
    except BaseException:
        value = ("raised", traceback.format_exc())
    try:
        with open(result, "wb") as file:
            file.write(pickle.dumps(value))
    finally:
        # Neither exit handlers nor buffers: they belong to the parent.
        os._exit(0 if value[0] == "returned" else 1)


# Disks


@contextlib.contextmanager
def tmpfs(folder: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes, mounted at `folder`.

    Raises:
      SkippedError: it cannot be mounted: it takes root, and not every container.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as err:
        raise SkippedError(f"cannot mount a tmpfs here: {err}") from err
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


@contextlib.contextmanager
def read_only(mounted: Path) -> Iterator[None]:
    """Makes a file system of `tmpfs` read-only for the time inside."""
    for_root = ["mount", "-o", "remount,ro", str(mounted)]
    subprocess.run(for_root, check=True, capture_output=True)
    try:
        yield
    finally:
        for_root[2] = "remount,rw"
        subprocess.run(for_root, check=True, capture_output=True)


def fill(path: Path, leave: int = 0) -> None:
    """Fills the disk of `path` with zeros until about `leave` bytes are left."""
    block = b"\0" * 4096
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        status = os.statvfs(path.parent)
        for _ in range(max(0, status.f_bavail * status.f_bsize - leave) // 4096):
            file.write(block)


# The clean process


class Server:
    """A process without a jax backend that runs campaigns, each in a fork of it.

    Args:
      preload: modules to import before the first fork, beyond flaxfit.
      environment: variables to set.
    """

    def __init__(
        self, preload: tuple[str, ...] = (), environment: dict[str, str] | None = None
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "import harness; harness.serve()", *preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=HERE,
            text=True,
            start_new_session=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent.parent)]),
                # A thread of OpenBLAS would make every fork unsafe.
                "OPENBLAS_NUM_THREADS": "1",
                "OMP_NUM_THREADS": "1",
                "JAX_PLATFORMS": "cpu",
                **(environment or {}),
            },
        )

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *unused: Any) -> None:
        self.close()

    def run(
        self, campaign: str, trials: int, seed: int, folder: Path, timeout: float = 900
    ) -> Outcome:
        """Runs `module:function` in a fork and returns its outcome.

        Raises:
          ChildError: the campaign itself failed, or took longer than `timeout`
            seconds.
        """
        request = [campaign, trials, seed, str(folder)]
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            self.close()
            raise ChildError(f"{campaign} did not end within {timeout} s")
        line = self._process.stdout.readline()
        if not line:
            raise ChildError(f"the server died of {campaign}")
        answer = json.loads(line)
        if "error" in answer:
            raise ChildError(answer["error"])
        return Outcome(**{**answer, "details": tuple(answer["details"])})

    def close(self) -> None:
        """Ends the server and all it has forked."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


def serve() -> None:
    """The server's side of `Server`: one line of JSON in, one out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in (*_PRELOADED, *sys.argv[1:]):
        importlib.import_module(name)
    assert_clean()
    for line in sys.stdin:
        campaign, trials, seed, folder = json.loads(line)
        try:
            arguments = campaign, trials, seed, folder
            answer = asdict(fresh(run_campaign, *arguments, timeout=1e5))
        except ChildError as err:
            answer = {"error": str(err)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def run_campaign(campaign: str, trials: int, seed: int, folder: str) -> Outcome:
    """Runs `module:function[:argument]` here; warnings are errors, as in pytest."""
    warnings.simplefilter("error")
    module, function, *more = campaign.split(":")
    try:
        found = getattr(importlib.import_module(module), function)
        return found(trials, seed, Path(folder), *more)
    except SkippedError as err:
        return Outcome(0, 0, (), str(err))


def backend_started() -> bool:
    """Whether jax has started a backend in this process."""
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized()


def assert_clean() -> None:
    """Raises where a fork of this process would not be safe."""
    assert not backend_started(), "importing flaxfit started a jax backend"
