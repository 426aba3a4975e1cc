"""The host loop of an evaluation."""

from collections.abc import Callable
from typing import Any

from flaxfit._core.types import TrainState
from flaxfit._loops.context import Evaluate
from flaxfit._loops.feeder import Execution, open_pass, timed
from flaxfit._loops.host_reads import read_logs, show_progress
from flaxfit._programs.resolve import ResolvedTask
from flaxfit._reporting.display import Display, epoch_display
from flaxfit.data.sources.base import BatchSource


def make_evaluation(
    resolved: ResolvedTask,
    execution: Execution,
    source: BatchSource,
    *,
    steps: int | None,
    keep: bool = False,
    display: Display | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Evaluate:
    """Returns a function that evaluates a state on one dataset.

    The function only reads the state. It returns the values, or None if interrupted.

    Args:
      steps: the largest number of batches, None for all.
      keep: whether the function will be called several times.
      interrupted: checked before every call of the program.
    """
    program, order = resolved.programs.evaluate, resolved.task.order
    screen, empty = display or Display(), resolved.empty_eval()
    total = source.num_batches if steps is None else steps
    feed = open_pass(
        resolved, execution, source, steps=steps, keep=keep, stopped=interrupted
    )

    def evaluate(state: TrainState) -> dict[str, Any] | None:
        running, done, queue = empty, 0, execution.queue(resolved)
        with (
            epoch_display(screen, "Evaluating", total) as shown,
            feed.epoch() as chunks,
        ):
            for chunk in timed(chunks, queue, None):
                start = 0
                while start < chunk.batches:
                    if interrupted():
                        return None
                    steps = min(queue.steps_per_call, chunk.batches - start)
                    traces = program.traces
                    running = program(state, running, chunk.chunk, start, steps)
                    compiled = program.traces != traces
                    queue.submit(running.index, running, steps, compiled=compiled)
                    start += steps
                    done += steps
                    shown["done"] = done
                    if screen.due():
                        show_progress(screen, queue, order)
            if interrupted():
                return None
            shown.update(logs=read_logs(running, order), finished=True)
        return dict(shown["logs"])

    return evaluate
