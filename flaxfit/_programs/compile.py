"""The only file that calls `jax.jit`; counts traces and donates buffers."""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from flaxfit._core.types import Array, Average, Batch, Logs, PyTree, Sum, TrainState
from flaxfit._programs.chunks import Chunk, batch_at
from flaxfit._programs.placement import Placement
from flaxfit._programs.steps import EvalStep, InitStep, PredictStep, TrainStep

# Primitives that run the user's Python on the host, where it can fail.
_HOST_CALLBACKS = frozenset(
    {"pure_callback", "io_callback", "debug_callback", "debug_print"}
)
_CONVOLUTION = "conv_general_dilated"
Step = TypeVar("Step", bound=Callable[..., Any])
NoteTrace: TypeAlias = Callable[..., None]
"""A program's function calls this with its arguments, to record that it is traced."""


class EpochAccumulators(flax.struct.PyTreeNode):
    """The accumulators of one epoch, on the device.

    Attributes:
      index: `int32[]`, the number of batches in `logs`.
      logs: the accumulators of these batches; meaningless while `index` is 0.
      bad: `int32[]`, the position in the epoch of the first bad batch, -1 if none; see
        `nonfinite` of `compile_programs`.
      skipped: `int32[]`, the number of batches of the epoch that are not in `logs`.
    """

    index: Array
    logs: Logs
    bad: Array
    skipped: Array


class CompileListener(Protocol):
    """Is notified of the compiles of all programs inside `listening`."""

    def compiling(self, program: "Program") -> None:
        """Called when a program is about to be compiled."""

    def compiled(self, program: "Program", seconds: float) -> None:
        """Called after the compile, and after the first call's dispatch, if any."""


_LISTENER: ContextVar[CompileListener | None] = ContextVar("listener", default=None)


@contextlib.contextmanager
def listening(listener: CompileListener | None) -> Iterator[None]:
    """Reports compiles in the `with` block to `listener`; None turns reports off."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


class Program:
    """A jitted function that counts its traces.

    Args:
      name: shown to the user, e.g. `"train step"`.
      function: takes a `NoteTrace` before the arguments of a call, and passes them to
        it. (A wrapper that did this would add a frame to every traceback.)
      wait: whether a call blocks until its results are ready.
      **options: passed to `jax.jit`.

    Attributes:
      name: as given.
      traces: the number of traces so far, one per compile.
      signatures: the shapes of the arguments of the last two traces.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        *,
        wait: bool = False,
        **options: Any,
    ) -> None:
        self.name = name
        self.traces = 0
        self.signatures: tuple[Any, ...] = ()
        self._wait = wait
        # Does not count traces. `analyze` needs a function of its own: jit caches
        # traces by function, and a call that reused its trace would not be counted.
        self._function = partial(function, lambda *args: None)
        self._has_options = options.get("compiler_options") is not None
        self._options = options
        self._jitted = jax.jit(partial(function, self._note_trace), **options)

    def _note_trace(self, *args: Any) -> None:
        if any(map(_is_traced, jax.tree.leaves(args))):  # not under disable_jit
            self.traces += 1
            self.signatures = (*self.signatures[-1:], shapes_of_call(*args))
            if listener := _LISTENER.get():
                listener.compiling(self)

    def __call__(self, *args: Any) -> Any:
        """Runs the program; returns before it has finished unless `wait` was set."""
        if self._has_options and any(map(_is_traced, jax.tree.leaves(args))):
            # jit refuses compiler options inside another jit.
            return self._function(*args)
        traces, started = self.traces, time.perf_counter()
        result = self._jitted(*args)
        if self.traces != traces and (listener := _LISTENER.get()):
            listener.compiled(self, time.perf_counter() - started)
        return jax.block_until_ready(result) if self._wait else result

    def compile(self, *args: Any) -> float:
        """Compiles for these arguments without running; returns the seconds taken."""
        traces, started = self.traces, time.perf_counter()
        self._jitted.lower(*args).compile()
        seconds = time.perf_counter() - started
        if self.traces != traces and (listener := _LISTENER.get()):
            listener.compiled(self, seconds)
        return seconds

    def analyze(self, *args: Any) -> dict[str, float]:
        """Compiles ahead of time and returns the FLOPs and bytes of one call.

        Keys: `flops`, and `bytes`, the device memory of arguments, results and
        temporaries, with donated buffers counted once. A key is missing if the backend
        does not report it.
        """
        compiled = jax.jit(self._function, **self._options).lower(*args).compile()
        memory = compiled.memory_analysis()
        found = {"flops": (compiled.cost_analysis() or {}).get("flops")}
        if memory is not None:
            found["bytes"] = (
                memory.argument_size_in_bytes
                + memory.output_size_in_bytes
                + memory.temp_size_in_bytes
                - memory.alias_size_in_bytes
            )
        return {
            name: float(value) for name, value in found.items() if value is not None
        }

    def flops(self, shapes: Any) -> float | None:
        """Returns the FLOPs of one step, None if the backend does not report them.

        Nothing is compiled.

        Args:
          shapes: the arguments of a call, from `shapes_of_call`.
        """
        lowered = jax.jit(self._function, **self._options).lower(*shapes)
        cost = lowered.cost_analysis() or {}
        return float(cost["flops"]) if "flops" in cost else None

    def __deepcopy__(self, memo: Any) -> "Program":
        return self  # compiled code may be shared

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """Compiles in the `with` block are neither counted nor reported."""
        before = self.traces, self.signatures
        try:
            with listening(None):
                yield
        finally:
            self.traces, self.signatures = before


class Steps(NamedTuple):
    """The pure functions that the programs are made of."""

    init: InitStep
    train: TrainStep
    evaluate: EvalStep
    predict: PredictStep
    intermediates: PredictStep
    gradient: Callable[[TrainState, Batch], tuple[Array, PyTree]]


class Programs(NamedTuple):
    """All programs of a trainer, one per phase.

    A program that takes a chunk runs its batches `start … start + count - 1`: one
    compile serves any number of steps. With `one_step_per_call`, `count` must be 1.

    Attributes:
      init: `(rng, inputs, variables) -> state`.
      train: `(state, running, chunk, start, count) -> (state, running)`; the state
        is donated.
      step: `(state, batch) -> (state, logs)`, the public step; nothing is donated.
      evaluate: `(state, running, chunk, start, count) -> running`.
      predict: `(state, chunk, start, count, first) -> outputs`. For a `Stack` they are
        `[capacity, ...]`, unless `one_step_per_call`. `first` is the number in the
        pass of the batch at `start`.
      intermediates: like `predict`, for the sown `intermediates`.
      gradient: `(state, batch) -> (loss, gradients)`, for `check`.
      one_step_per_call: whether a call runs exactly one step.
    """

    init: Program
    train: Program
    step: Program
    evaluate: Program
    predict: Program
    intermediates: Program
    gradient: Program
    one_step_per_call: bool


class Preflight(NamedTuple):
    """The result of tracing a step, before anything is compiled.

    Holds the shapes of its logs, whether it calls back into Python, and whether it
    contains convolutions.
    """

    logs: PyTree
    calls_host: bool
    convolves: bool


def compile_programs(
    steps: Steps, placement: Placement, traced: Preflight, *, nonfinite: str
) -> Programs:
    """Returns the programs; each is compiled at its first call.

    Args:
      steps: the pure functions.
      placement: the devices; each holds the whole state.
      traced: the preflight of the train step, or of the predict step without targets.
      nonfinite: how a batch with a NaN or infinite loss is handled: `"ignore"` does
        nothing; `"stop"` and `"rollback"` end the call after it; `"skip"` leaves it
        out, and also a batch that makes a parameter NaN or infinite.
    """
    on_cpu = placement.devices[0].platform == "cpu"
    # On CPUs, XLA uses its fast convolutions only outside of loops; inside they take
    # about ten times as long. And if a callback into Python failed in a loop, the
    # results of all its steps would be lost.
    calls_host = traced.calls_host
    single = calls_host or (traced.convolves and on_cpu)
    # `init` runs once, so compiling fast is worth more than running fast; the results
    # are the same to the last bit.
    run_once = {"xla_backend_optimization_level": 1} if on_cpu else None
    whole = placement.replicated
    return Programs(
        init=Program(
            "init", noting(steps.init), out_shardings=whole, compiler_options=run_once
        ),
        train=Program(
            "train step",
            _train_loop(steps.train, single, nonfinite),
            # An error in a callback into Python is raised after the dispatch, when a
            # donated state is gone. So nothing is donated, and the call blocks.
            donate_argnums=() if calls_host else (0,),
            out_shardings=whole,
            wait=calls_host,
        ),
        step=Program("train step", noting(steps.train)),
        evaluate=Program(
            "eval step", _eval_loop(steps.evaluate, single), out_shardings=whole
        ),
        predict=Program("predict step", _predict_loop(steps.predict, single)),
        intermediates=Program(
            "predict step", _predict_loop(steps.intermediates, single)
        ),
        gradient=Program("gradient", noting(steps.gradient)),
        one_step_per_call=single,
    )


def noting(step: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function for `Program` that runs `step` once, without a loop."""

    def run(note_trace: NoteTrace, *args: Any) -> Any:
        note_trace(*args)
        return step(*args)

    return run


class _Carry(NamedTuple):
    index: Any
    state: TrainState
    running: EpochAccumulators


def _train_loop(train_step: TrainStep, single: bool, nonfinite: str) -> Any:
    ends_at_nonfinite = nonfinite in ("stop", "rollback")

    def train(
        note_trace: NoteTrace,
        state: TrainState,
        running: EpochAccumulators,
        chunk: Chunk,
        start: Any,
        count: Any,
    ) -> tuple[TrainState, EpochAccumulators]:
        note_trace(state, running, chunk, start, count)
        first = _Carry(jnp.asarray(start, jnp.int32), state, running)
        if single or isinstance(chunk, Batch):
            return _record(nonfinite, first, *train_step(state, batch_at(chunk, start)))

        def cond(carry: _Carry) -> Any:
            more = carry.index < start + count
            return more & (carry.running.bad < 0) if ends_at_nonfinite else more

        # `count` is traced, not static: a loop with a static bound would be compiled
        # again for every number of steps.
        last = jax.lax.while_loop(
            cond,
            lambda carry: _Carry(
                carry.index + 1,
                *_record(
                    nonfinite,
                    carry,
                    *train_step(carry.state, batch_at(chunk, carry.index)),
                ),
            ),
            first,
        )
        return last.state, last.running

    return train


def _eval_loop(eval_step: EvalStep, single: bool) -> Any:
    def evaluate(
        note_trace: NoteTrace,
        state: TrainState,
        running: EpochAccumulators,
        chunk: Chunk,
        start: Any,
        count: Any,
    ) -> EpochAccumulators:
        note_trace(state, running, chunk, start, count)

        def add(index: Any, running: EpochAccumulators) -> EpochAccumulators:
            batch = batch_at(chunk, index)
            return _accumulate(running, eval_step(state, batch, running.index))

        if single or isinstance(chunk, Batch):
            return add(start, running)
        return jax.lax.fori_loop(start, start + count, add, running)

    return evaluate


def _predict_loop(predict_step: PredictStep, single: bool) -> Any:
    def predict(
        note_trace: NoteTrace,
        state: TrainState,
        chunk: Chunk,
        start: Any,
        count: Any,
        first: Any,
    ) -> PyTree:
        note_trace(state, chunk, start, count, first)

        def outputs_at(index: Any) -> PyTree:
            number = jnp.int32(first + index - start)
            return predict_step(state, batch_at(chunk, index).inputs, number)

        if single or isinstance(chunk, Batch):
            return outputs_at(start)
        capacity = jax.tree.leaves(chunk)[0].shape[0]
        empty = jax.tree.map(
            lambda leaf: jnp.zeros((capacity, *leaf.shape), leaf.dtype),
            jax.eval_shape(outputs_at, start),
        )

        def write(index: Any, written: PyTree) -> PyTree:
            return jax.tree.map(
                lambda all_, one: all_.at[index].set(one), written, outputs_at(index)
            )

        return jax.lax.fori_loop(start, start + count, write, empty)

    return predict


def _accumulate(running: EpochAccumulators, logs: Logs) -> EpochAccumulators:
    first = running.index == 0

    def merged(log: Any, before: Any) -> Any:
        after = before.merge(log)
        if isinstance(log, Average | Sum):
            return after  # merging with the zeros of an empty accumulator adds nothing
        # Merging zeros may change other metrics, so the first batch replaces them.
        return jax.tree.map(lambda new, old: jnp.where(first, new, old), log, after)

    return running.replace(
        index=running.index + 1,
        logs={name: merged(log, running.logs[name]) for name, log in logs.items()},
    )


def _record(
    nonfinite: str, before: _Carry, state: TrainState, logs: Logs
) -> tuple[TrainState, EpochAccumulators]:
    """Returns the state and the accumulators after a step.

    A loss that is not finite is recorded; see `nonfinite` of `compile_programs`.
    """
    old, running = before.state, before.running
    after = state, _accumulate(running, logs)
    if nonfinite == "ignore":
        return after
    good = _all_finite(logs.get("loss"))
    number = running.index + running.skipped
    if nonfinite == "skip":
        # Parameters are checked only here: selecting reads the whole state again, and
        # makes XLA round an update differently in the last bit.
        good &= _all_finite(state.params)
        # The step still counts, so that the next batch gets other random numbers.
        kept = old.replace(step=state.step), running
        after = jax.tree.map(
            lambda new, old: (
                jax.lax.select(jnp.broadcast_to(good, new.shape), new, old)
                if new.ndim
                else jax.lax.select(good, new, old)
            ),
            after,
            kept,
        )
    state, chosen = after
    return state, chosen.replace(
        bad=jnp.where(good | (running.bad >= 0), running.bad, number),
        skipped=number + 1 - chosen.index,
    )


def _all_finite(tree: PyTree) -> Array:
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    numbers = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in numbers]
    return jnp.all(jnp.array([True, *finite]))


def empty_accumulators(logs: PyTree, placement: Placement) -> EpochAccumulators:
    """Returns the accumulators that an epoch starts with, for the shapes `logs`."""
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), logs)
    numbers: Any = np.array([0, -1, 0], np.int32)
    empty = EpochAccumulators(numbers[0], zeros, numbers[1], numbers[2])
    return jax.device_put(empty, placement.replicated)


def _is_traced(leaf: Any) -> bool:
    return isinstance(leaf, jax.core.Tracer)


def shapes_of_call(*args: Any) -> tuple[Any, ...]:
    """Returns the arguments of a call, with each array replaced by its shape."""

    def shape(leaf: Any) -> Any:
        if isinstance(leaf, int):
            return leaf
        weak = getattr(leaf, "weak_type", False)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=weak)

    return jax.tree.map(shape, args)


def traced_once(step: Step) -> Step:
    """Returns the step; programs that use it share one trace per batch shape."""
    cached: Any = jax.jit(step, inline=True)
    return cached


def preflight(step: Callable[..., Any], *args: Any) -> Preflight:
    """Traces `step(*args)` without running it.

    Args:
      step: a train step `-> (state, logs)`, an eval step `-> logs` or a predict step.
      *args: arrays or shapes.
    """
    jaxpr, shapes = jax.make_jaxpr(step, return_shape=True)(*args)
    logs = shapes[1] if isinstance(shapes, tuple) and len(shapes) == 2 else shapes
    names = {eqn.primitive.name for eqn in _equations(jaxpr.jaxpr)}
    return Preflight(logs, bool(names & _HOST_CALLBACKS), _CONVOLUTION in names)


def _equations(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)
