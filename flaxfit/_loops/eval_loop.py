"""The host loop of an evaluation."""

from collections.abc import Callable
from typing import Any

from flaxfit._core.types import Logs, TrainState
from flaxfit._loops.dispatch_queue import Pace
from flaxfit._loops.feeder import Feed, timed
from flaxfit._loops.host_reads import read_logs, show_progress
from flaxfit._programs.compile import EpochAccumulators, Program
from flaxfit._reporting.display import Display, epoch_display


def eval_loop(
    state: TrainState,
    *,
    evaluate: Program,
    running: EpochAccumulators,
    feed: Feed,
    total: int | None,
    steps_per_call: int | None,
    order: Callable[[Logs], Logs],
    display: Display,
    interrupted: Callable[[], bool],
) -> dict[str, Any] | None:
    """Returns the values over the data, or None if `interrupted`.

    Args:
      state: the state to evaluate; it is only read.
      evaluate: the eval program.
      running: an empty accumulator.
      feed: where the batches come from.
      total: how many there are, None if that is not known.
      steps_per_call: batches of one call of the program, None to go by the clock.
      order: sorts logs into History's order.
      display: shows the progress.
      interrupted: asked before every call.
    """
    done, pace = 0, Pace(steps_per_call)
    with (
        epoch_display(display, "Evaluating", total) as shown,
        feed.epoch() as segments,
    ):
        for ready in timed(segments, pace, None):
            start = 0
            while start < ready.batches:
                if interrupted():
                    return None
                count = min(pace.steps, ready.batches - start)
                traces = evaluate.traces
                running = evaluate(state, running, ready.segment, start, count)
                start += count
                done += count
                shown["done"] = done
                pace.follow(
                    running.index, running, count, compiled=evaluate.traces != traces
                )
                if display.due():
                    show_progress(display, pace, order)
        if interrupted():
            return None
        shown.update(logs=read_logs(running, order), finished=True)
    return dict(shown["logs"])
