"""The only file that calls `jax.jit`; counts traces and donates buffers."""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from flaxfit._core.types import (
    Array,
    Average,
    Batch,
    Inputs,
    Logs,
    PyTree,
    Sum,
    TrainState,
)
from flaxfit._programs.chunks import Chunk, batch_at
from flaxfit._programs.placement import Placement
from flaxfit._programs.steps import EvalStep, InitStep, PredictStep, TrainStep

# Primitives that run the user's Python on the host, where it can fail.
_HOST_CALLBACKS = frozenset(
    {"pure_callback", "io_callback", "debug_callback", "debug_print"}
)
_CONVOLUTION = "conv_general_dilated"
Step = TypeVar("Step", bound=Callable[..., Any])


class EpochAccumulators(flax.struct.PyTreeNode):
    """What accumulates on the device while an epoch runs.

    Attributes:
      index: `int32[]`, batches so far.
      logs: the accumulators over them; meaningless while `index` is 0.
      bad: `int32[]`, the number in the epoch of the first batch whose loss was not
        finite, -1 while there was none.
      skipped: `int32[]`, batches of the epoch that are not in `logs`.
    """

    index: Array
    logs: Logs
    bad: Array
    skipped: Array


class CompileListener(Protocol):
    """Who is told of compiles while `listening`."""

    def compiling(self, program: "Program") -> None:
        """Called when a program is about to be compiled."""

    def compiled(self, program: "Program", seconds: float) -> None:
        """Called when it was, and its first call was dispatched."""


_LISTENER: ContextVar[CompileListener | None] = ContextVar("listener", default=None)


@contextlib.contextmanager
def listening(listener: CompileListener) -> Iterator[None]:
    """Tells `listener` of every compile inside."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


class Program:
    """A jitted function that counts how often it was traced.

    Attributes:
      name: what it is to a user, e.g. `"train step"`.
      traces: the number of traces so far, one per compile.
      signatures: the shapes of the arguments of the last two traces.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        *,
        donate_argnums: tuple[int, ...] = (),
        out_shardings: Any = None,
        wait: bool = False,
        compiler_options: dict[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.traces = 0
        self.signatures: tuple[Any, ...] = ()
        self._wait = wait
        self._function = function
        self._has_options = compiler_options is not None

        def traced(*args: Any) -> Any:
            if any(map(_is_traced, jax.tree.leaves(args))):  # not under disable_jit
                self.traces += 1
                self.signatures = (*self.signatures[-1:], shapes_of_call(*args))
                if listener := _LISTENER.get():
                    listener.compiling(self)
            return function(*args)

        self._options: dict[str, Any] = {
            "donate_argnums": donate_argnums,
            "compiler_options": compiler_options,
        }
        if out_shardings is not None:
            self._options["out_shardings"] = out_shardings
        self._jitted = jax.jit(traced, **self._options)

    def __call__(self, *args: Any) -> Any:
        """Runs the program; dispatch is asynchronous unless it must be waited for."""
        if self._has_options and any(map(_is_traced, jax.tree.leaves(args))):
            return self._function(*args)  # inside another program there are no options
        traces, started = self.traces, time.perf_counter()
        result = self._jitted(*args)
        if self.traces != traces and (listener := _LISTENER.get()):
            listener.compiled(self, time.perf_counter() - started)
        return jax.block_until_ready(result) if self._wait else result

    def compile(self, *args: Any) -> float:
        """Compiles for such arguments without running; returns the seconds it took."""
        traces, started = self.traces, time.perf_counter()
        self._jitted.lower(*args).compile()
        seconds = time.perf_counter() - started
        if self.traces != traces and (listener := _LISTENER.get()):
            listener.compiled(self, seconds)
        return seconds

    def analyze(self, *args: Any) -> dict[str, float]:
        """Compiles ahead of time and returns FLOPs and bytes of one call.

        Keys: `flops`, and `bytes` of device memory: arguments, results and
        temporaries, donated ones counted once. What the backend does not tell is
        absent.
        """
        # Of its own, as what is traced here would later be no trace that counts.
        compiled = jax.jit(self._function, **self._options).lower(*args).compile()
        cost = compiled.cost_analysis() or {}
        memory = compiled.memory_analysis()
        found = {"flops": cost.get("flops")}
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
        """Returns the FLOPs of one step, None if the backend does not tell.

        Nothing is compiled.

        Args:
          shapes: of a call, by `shapes_of_call`.
        """
        lowered = jax.jit(self._function, **self._options).lower(*shapes)
        cost = lowered.cost_analysis() or {}
        return float(cost["flops"]) if "flops" in cost else None

    def __deepcopy__(self, memo: Any) -> "Program":
        return self  # compiled code may be shared

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """Leaves what is compiled inside uncounted, and tells nobody."""
        before = self.traces, self.signatures
        token = _LISTENER.set(None)
        try:
            yield
        finally:
            _LISTENER.reset(token)
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

    The first three that loop take a chunk and run its batches
    `start … start + count - 1`: one compile serves any number of steps. Where
    `one_step_per_call`, `count` has to be 1.

    Attributes:
      init: `(rng, inputs, variables) -> state`.
      train: `(state, running, chunk, start, count) -> (state, running)`; the state
        is donated.
      step: `(state, batch) -> (state, logs)`, nothing donated: the public step.
      evaluate: `(state, running, chunk, start, count) -> running`.
      predict: `(state, chunk, start, count, first) -> outputs`; `[capacity, ...]`
        of a `Stack` unless `one_step_per_call`. `first` is the number of the batch
        `start`.
      intermediates: the same for the sown `intermediates`.
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


def compile_programs(
    steps: Steps,
    placement: Placement,
    *,
    calls_host: bool,
    convolves: bool,
    nonfinite: str = "ignore",
) -> Programs:
    """Returns the programs; nothing is compiled before its first call.

    Args:
      steps: the pure functions.
      placement: the devices; the state stays on them as it is.
      calls_host: whether a step calls back into Python. An error there surfaces
        after the call, when a donated state would be gone: such steps donate
        nothing, are waited for, and run one by one.
      convolves: whether there are convolutions. For a CPU, XLA brings them into the
        form that is fast only outside of loops; inside they take many times as long.
      nonfinite: what a batch does whose loss is NaN or infinite: `"ignore"` nothing;
        `"stop"` and `"rollback"` end the call with it; `"skip"` leaves it out, as well
        as one that makes a parameter so.
    """
    on_cpu = placement.devices[0].platform == "cpu"
    one_step_per_call = calls_host or (convolves and on_cpu)
    # It runs once: the time is better spent otherwise, and the bits are the same.
    run_once = {"xla_backend_optimization_level": 1} if on_cpu else None

    def train(
        state: TrainState,
        running: EpochAccumulators,
        chunk: Chunk,
        start: Any,
        count: Any,
    ) -> tuple[TrainState, EpochAccumulators]:
        def step(
            index: Any, carry: tuple[TrainState, EpochAccumulators]
        ) -> tuple[TrainState, EpochAccumulators]:
            state, logs = steps.train(carry[0], batch_at(chunk, index))
            after = state, _accumulate(carry[1], logs)
            return _guarded(nonfinite, carry, after, logs)

        if one_step_per_call or isinstance(chunk, Batch):
            return step(start, (state, running))
        if nonfinite not in ("stop", "rollback"):
            return jax.lax.fori_loop(start, start + count, step, (state, running))

        def goes_on(carry: tuple[Any, tuple[TrainState, EpochAccumulators]]) -> Any:
            return (carry[0] < start + count) & (carry[1][1].bad < 0)

        def one_more(
            carry: tuple[Any, tuple[TrainState, EpochAccumulators]],
        ) -> tuple[Any, tuple[TrainState, EpochAccumulators]]:
            return carry[0] + 1, step(*carry)

        first = jnp.asarray(start, jnp.int32), (state, running)
        return jax.lax.while_loop(goes_on, one_more, first)[1]

    def evaluate(
        state: TrainState,
        running: EpochAccumulators,
        chunk: Chunk,
        start: Any,
        count: Any,
    ) -> EpochAccumulators:
        def step(index: Any, running: EpochAccumulators) -> EpochAccumulators:
            batch = batch_at(chunk, index)
            return _accumulate(running, steps.evaluate(state, batch, running.index))

        if one_step_per_call or isinstance(chunk, Batch):
            return step(start, running)
        return jax.lax.fori_loop(start, start + count, step, running)

    whole = placement.replicated
    return Programs(
        init=Program(
            "init", steps.init, out_shardings=whole, compiler_options=run_once
        ),
        train=Program(
            "train step",
            train,
            donate_argnums=() if calls_host else (0,),
            out_shardings=whole,
            wait=calls_host,
        ),
        step=Program("train step", steps.train),
        evaluate=Program("eval step", evaluate, out_shardings=whole),
        predict=Program(
            "predict step", _over_segment(steps.predict, one_step_per_call)
        ),
        intermediates=Program(
            "predict step", _over_segment(steps.intermediates, one_step_per_call)
        ),
        gradient=Program("gradient", steps.gradient),
        one_step_per_call=one_step_per_call,
    )


def _over_segment(step: PredictStep, one_step_per_call: bool) -> Callable[..., PyTree]:
    def predict(
        state: TrainState, chunk: Chunk, start: Any, count: Any, first: Any
    ) -> PyTree:
        def outputs_at(index: Any) -> PyTree:
            inputs: Inputs = batch_at(chunk, index).inputs
            return step(state, inputs, jnp.int32(first + index - start))

        if one_step_per_call or isinstance(chunk, Batch):
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
            return after  # what a running begins with is their neutral element
        # Chosen by index: not every metric has one.
        return jax.tree.map(lambda new, old: jnp.where(first, new, old), log, after)

    return running.replace(
        index=running.index + 1,
        logs={name: merged(log, running.logs[name]) for name, log in logs.items()},
    )


def _guarded(
    nonfinite: str,
    before: tuple[TrainState, EpochAccumulators],
    after: tuple[TrainState, EpochAccumulators],
    logs: Logs,
) -> tuple[TrainState, EpochAccumulators]:
    """Returns `after` with a note of a loss that is not finite; see `nonfinite`.

    Only `"skip"` chooses between the two: that takes a pass over the state, and XLA
    then rounds an update otherwise than without, in the last bit.
    """
    if nonfinite == "ignore":
        return after
    (old, running), (new, _) = before, after
    good = _all_finite(logs.get("loss"))
    number = running.index + running.skipped
    if nonfinite == "skip":
        good &= _all_finite(new.params)
        # The next batch gets random numbers of its own.
        before = old.replace(step=new.step), running
        after = jax.tree.map(
            lambda new, old: (
                jax.lax.select(jnp.broadcast_to(good, new.shape), new, old)
                if new.ndim
                else jax.lax.select(good, new, old)
            ),
            after,
            before,
        )
    state, chosen = after
    return state, chosen.replace(
        bad=jnp.where(good | (running.bad >= 0), running.bad, number),
        skipped=running.index + running.skipped + 1 - chosen.index,
    )


def _all_finite(tree: PyTree) -> Array:
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    numbers = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in numbers]
    return jnp.all(jnp.array([True, *finite]))


def empty_accumulators(logs: PyTree, placement: Placement) -> EpochAccumulators:
    """Returns the start of an epoch for `logs` of these shapes."""
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), logs)
    numbers: Any = np.array([0, -1, 0], np.int32)
    empty = EpochAccumulators(numbers[0], zeros, numbers[1], numbers[2])
    running: EpochAccumulators = jax.device_put(empty, placement.replicated)
    return running


def _is_traced(leaf: Any) -> bool:
    return isinstance(leaf, jax.core.Tracer)


def shapes_of_call(*args: Any) -> tuple[Any, ...]:
    """Returns the arguments of a call with shapes in place of arrays."""

    def shape(leaf: Any) -> Any:
        if isinstance(leaf, int):
            return leaf
        weak = getattr(leaf, "weak_type", False)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=weak)

    shapes: tuple[Any, ...] = jax.tree.map(shape, args)
    return shapes


class Preflight(NamedTuple):
    """What abstract traces of a step say, before anything is compiled.

    Attributes:
      logs: the logs' shapes.
      calls_host: whether the step calls back into Python.
      convolves: whether there are convolutions in it.
    """

    logs: PyTree
    calls_host: bool
    convolves: bool


def traced_once(step: Step) -> Step:
    """Returns the step, to be traced once for all programs of one form of batches."""
    cached: Any = jax.jit(step, inline=True)
    return cached


def preflight(step: Callable[..., Any], *args: Any) -> Preflight:
    """Traces `step(*args)`, the logs its last or only result, without computing.

    Args:
      step: a train step `-> (state, logs)`, an eval step `-> logs`, or any other.
      *args: arrays or shapes.
    """
    jaxpr, shapes = jax.make_jaxpr(step, return_shape=True)(*args)
    logs = shapes[1] if isinstance(shapes, tuple) else shapes
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
