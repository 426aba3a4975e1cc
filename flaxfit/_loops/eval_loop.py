"""The host loop of an evaluation."""

from collections.abc import Callable
from typing import Any

from flaxfit._core.types import TrainState
from flaxfit._loops.feeder import Execution, open_pass, timed
from flaxfit._loops.host_reads import read_logs, show_progress
from flaxfit._programs.resolve import ResolvedTask
from flaxfit._reporting.display import Display, Silent, epoch_display
from flaxfit.data.sources.base import BatchSource


class Evaluation:
    """The evaluation of one dataset, for any number of states.

    Args:
      resolved: the compiled programs.
      execution: how to run them.
      source: the data.
      steps: the largest number of batches, None for all.
      keep: whether it will be called several times.
      display: shows the progress.
      interrupted: checked before every call.
    """

    def __init__(
        self,
        resolved: ResolvedTask,
        execution: Execution,
        source: BatchSource,
        *,
        steps: int | None,
        keep: bool = False,
        display: Display | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self._resolved = resolved
        self._execution = execution
        self._empty = resolved.empty_eval()
        self._total = source.num_batches if steps is None else steps
        self._display = display or Silent()
        self._interrupted = interrupted
        self._feed = open_pass(
            resolved, execution, source, steps=steps, keep=keep, stopped=interrupted
        )

    def __call__(self, state: TrainState) -> dict[str, Any] | None:
        """Returns the values over the data, or None if interrupted.

        Args:
          state: the state to evaluate; it is only read.
        """
        evaluate, order = self._resolved.programs.evaluate, self._resolved.task.order
        display, running = self._display, self._empty
        done, queue = 0, self._execution.queue(self._resolved)
        with (
            epoch_display(display, "Evaluating", self._total) as shown,
            self._feed.epoch() as chunks,
        ):
            for chunk in timed(chunks, queue, None):
                start = 0
                while start < chunk.batches:
                    if self._interrupted():
                        return None
                    steps = min(queue.steps_per_call, chunk.batches - start)
                    traces = evaluate.traces
                    running = evaluate(state, running, chunk.chunk, start, steps)
                    compiled = evaluate.traces != traces
                    queue.submit(running.index, running, steps, compiled=compiled)
                    start += steps
                    done += steps
                    shown["done"] = done
                    if display.due():
                        show_progress(display, queue, order)
            if self._interrupted():
                return None
            shown.update(logs=read_logs(running, order), finished=True)
        return dict(shown["logs"])
