"""The only place that jits: what is compiled, what it donates, how often it traced."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from flaxfit._steps import EvalStep, InitStep, PredictStep, TrainStep
from flaxfit._types import Array, Batch, Logs, PyTree, TrainState

# Primitives that run the user's Python on the host, where it can fail.
_HOST_CALLBACKS = frozenset(
    {"pure_callback", "io_callback", "debug_callback", "debug_print"}
)


class Running(flax.struct.PyTreeNode):
    """What accumulates on the device while an epoch runs.

    Attributes:
      index: `int32[]`, batches so far.
      logs: the accumulators over them; meaningless while `index` is 0.
    """

    index: Array
    logs: Logs


class Program:
    """A jitted function that counts how often it was traced.

    Attributes:
      traces: the number of traces so far, one per compile.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        donate_argnums: tuple[int, ...] = (),
        wait: bool = False,
    ) -> None:
        self.traces = 0
        self._wait = wait

        def traced(*args: Any) -> Any:
            self.traces += 1
            return function(*args)

        self._jitted = jax.jit(traced, donate_argnums=donate_argnums)

    def __call__(self, *args: Any) -> Any:
        """Runs the program; dispatch is asynchronous unless it must be waited for."""
        result = self._jitted(*args)
        return jax.block_until_ready(result) if self._wait else result

    def analyze(self, *args: Any) -> dict[str, float]:
        """Compiles ahead of time and returns FLOPs and bytes of one call.

        Keys: `flops`, and `bytes` of device memory: arguments, results and
        temporaries, donated ones counted once. What the backend does not tell is
        absent.
        """
        traces = self.traces
        compiled = self._jitted.lower(*args).compile()
        self.traces = traces
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


class Programs(NamedTuple):
    """All programs of a trainer, one per phase.

    Attributes:
      init: `(rng, inputs, variables) -> state`.
      train: `(state, running, batch) -> (state, running, token)`; state and running
        are donated, `token` is ready when the step is.
      step: `(state, batch) -> (state, logs)`, nothing donated: the public step.
      evaluate: `(state, running, batch) -> (running, token)`; running is donated.
      predict: `(state, inputs, index) -> outputs`.
      intermediates: the same for the sown `intermediates`.
      gradient: `(state, batch) -> (loss, gradients)`, for `check`.
    """

    init: Program
    train: Program
    step: Program
    evaluate: Program
    predict: Program
    intermediates: Program
    gradient: Program


def compile_programs(
    *,
    init: InitStep,
    train_step: TrainStep,
    eval_step: EvalStep,
    predict_step: PredictStep,
    intermediates_step: PredictStep,
    gradient: Callable[[TrainState, Batch], tuple[Array, PyTree]],
    calls_host: bool,
) -> Programs:
    """Returns the programs; nothing is compiled before its first call.

    Args:
      calls_host: whether a step calls back into Python. An error there surfaces
        after the call, when a donated state would be gone: such steps donate
        nothing and are waited for.
    """

    def train(
        state: TrainState, running: Running, batch: Batch
    ) -> tuple[TrainState, Running, Array]:
        state, logs = train_step(state, batch)
        running = _accumulate(running, logs)
        return state, running, running.index + 0

    def evaluate(
        state: TrainState, running: Running, batch: Batch
    ) -> tuple[Running, Array]:
        running = _accumulate(running, eval_step(state, batch, running.index))
        return running, running.index + 0

    return Programs(
        init=Program(init),
        train=Program(
            train, donate_argnums=() if calls_host else (0, 1), wait=calls_host
        ),
        step=Program(train_step),
        evaluate=Program(evaluate, donate_argnums=(1,)),
        predict=Program(predict_step),
        intermediates=Program(intermediates_step),
        gradient=Program(gradient),
    )


def _accumulate(running: Running, logs: Logs) -> Running:
    # Chosen by index and not merged into an empty one: not every metric has one.
    first = running.index == 0
    merged = {name: running.logs[name].merge(log) for name, log in logs.items()}
    chosen = jax.tree.map(lambda new, old: jnp.where(first, new, old), logs, merged)
    return Running(running.index + 1, chosen)


def empty_running(logs: PyTree) -> Running:
    """Returns the start of an epoch for `logs` of these shapes."""
    index, zeros = jax.device_put(
        (np.int32(0), jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), logs)),
        may_alias=False,
    )
    return Running(index, zeros)


class Preflight(NamedTuple):
    """What abstract traces of a step say, before anything is compiled.

    Attributes:
      logs: the logs' shapes.
      calls_host: whether the step calls back into Python.
    """

    logs: PyTree
    calls_host: bool


def preflight(step: Callable[..., Any], *args: Any) -> Preflight:
    """Traces `step(*args)`, the logs its last or only result, without computing.

    Args:
      step: a train step `-> (state, logs)` or an eval step `-> logs`.
      *args: arrays or shapes.
    """
    jaxpr, shapes = jax.make_jaxpr(step, return_shape=True)(*args)
    logs = shapes[1] if isinstance(shapes, tuple) else shapes
    names = {eqn.primitive.name for eqn in _equations(jaxpr.jaxpr)}
    return Preflight(logs, bool(names & _HOST_CALLBACKS))


def _equations(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)
