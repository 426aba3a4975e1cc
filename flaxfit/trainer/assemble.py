"""Wires programs, data feeders and loops together."""

from collections.abc import Callable, Generator
from functools import partial

import numpy as np

from flaxfit._core.types import Batch, TrainState
from flaxfit._loops.context import Evaluate, FitPlan
from flaxfit._loops.eval_loop import eval_loop
from flaxfit._loops.feeder import Execution, Feed, first_segment, open_feed, open_pass
from flaxfit._loops.interrupt import Interrupt
from flaxfit._loops.predict_loop import Part, predict_loop
from flaxfit._programs.placement import has_rows
from flaxfit._programs.program_cache import Outputs
from flaxfit._programs.resolve import ResolvedTask
from flaxfit._reporting.display import Display, Silent
from flaxfit._runs.session import Run
from flaxfit.callbacks.base import CallbackList
from flaxfit.data.datasets.stream import Stream
from flaxfit.data.sources.array_source import ArraySource
from flaxfit.data.sources.base import Source
from flaxfit.data.sources.position import Bookmarks, Position
from flaxfit.data.sources.stream_source import StreamSource


def plan_fit(
    resolved: ResolvedTask,
    execution: Execution,
    source: Source,
    validation: Source | None,
    run: Run,
    *,
    epochs: int,
    steps: int | None,
    validation_steps: int | None,
    validates_at: Callable[[int], bool],
    callbacks: CallbackList,
    display: Display,
    interrupt: Interrupt,
    as_state: Callable[..., TrainState],
    nonfinite: str,
) -> FitPlan:
    """Returns what a fit is to do; see `Trainer.fit` and `FitPlan`."""
    origin, empty = run.origin, resolved.empty()
    end = max(epochs, origin.first_epoch)

    def interrupted() -> bool:
        return interrupt.requested

    def open_data(position: Position) -> Feed:
        return open_training(
            resolved,
            execution,
            source,
            epochs=end - origin.first_epoch - position.epoch,
            steps=steps,
            position=position,
            bookmarks=run.bookmarks,
            stopped=interrupted,
        )

    validate = None
    if validation is not None:
        validate = make_evaluate(
            resolved,
            execution,
            validation,
            steps=validation_steps,
            keep=True,
            interrupted=interrupted,
        )
    return FitPlan(
        epochs=range(origin.epoch, epochs),
        train=resolved.programs.train,
        running=empty,
        open_feed=open_data,
        steps_per_call=execution.per_call(single=resolved.programs.one_step_per_call),
        order=resolved.task.order,
        learning_rate=resolved.task.optimizer.learning_rate,
        validate=validate,
        validates_at=validates_at,
        callbacks=callbacks,
        display=display,
        interrupt=interrupt,
        saver=run.saver,
        as_state=as_state,
        nonfinite=nonfinite,
        first_epoch=origin.first_epoch,
        batch=origin.batch,
        resume=partial(
            run.resume, callbacks=callbacks, running=empty, as_state=as_state
        ),
        roll_back=run.roll_back(empty, as_state),
    )


def open_training(
    resolved: ResolvedTask,
    execution: Execution,
    source: Source,
    *,
    epochs: int,
    steps: int | None,
    position: Position = Position(),  # noqa: B008
    bookmarks: Bookmarks | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Feed:
    """Returns the feed of a fit; see `open_feed`."""
    return open_feed(
        source,
        resolved.placement,
        execution,
        epochs=epochs,
        steps=steps,
        single=resolved.programs.one_step_per_call,
        position=position,
        bookmarks=bookmarks,
        stopped=stopped,
    )


def make_evaluate(
    resolved: ResolvedTask,
    execution: Execution,
    source: Source,
    *,
    steps: int | None,
    keep: bool = False,
    display: Display | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Evaluate:
    """Returns `state -> values`, None where it was interrupted.

    Args:
      resolved: the parts of the trainer.
      execution: how to run.
      source: the data.
      steps: at most so many batches.
      keep: whether it will be evaluated again and again.
      display: shows the progress.
      interrupted: asked before every call.
    """
    programs, running = resolved.programs, resolved.empty_eval()
    feed = open_pass(
        source,
        resolved.placement,
        execution,
        steps=steps,
        keep=keep,
        stopped=interrupted,
    )

    def evaluate(state: TrainState) -> dict[str, object] | None:
        return eval_loop(
            state,
            evaluate=programs.evaluate,
            running=running,
            feed=feed,
            total=source.num_batches if steps is None else steps,
            steps_per_call=execution.per_call(single=programs.one_step_per_call),
            order=resolved.task.order,
            display=display or Silent(),
            interrupted=interrupted,
        )

    return evaluate


def open_prediction(
    resolved: ResolvedTask,
    execution: Execution,
    source: Source,
    state: TrainState,
    *,
    outputs: Outputs,
    steps: int | None,
    sown: bool = False,
    own: bool = False,
    display: Display | None = None,
) -> Generator[Part]:
    """Returns the outputs for all inputs, call by call.

    Args:
      resolved: the parts of the trainer.
      execution: how to run.
      source: the data.
      state: what to predict with; it is only read.
      outputs: what is predicted for a batch.
      steps: at most so many batches.
      sown: whether to predict what the model sows.
      own: see `open_pass`.
      display: shows the progress.
    """
    programs = resolved.programs
    return predict_loop(
        state,
        predict=programs.intermediates if sown else programs.predict,
        single=programs.one_step_per_call,
        feed=open_pass(
            source,
            resolved.placement,
            execution,
            steps=steps,
            own=own,
            bytes_per_output=outputs.nbytes,
        ),
        total=source.num_batches if steps is None else steps,
        steps_per_call=execution.per_call(single=programs.one_step_per_call),
        display=display or Silent(),
    )


def compile_ahead(
    resolved: ResolvedTask,
    execution: Execution,
    source: Source,
    state: TrainState,
    *,
    outputs: Outputs,
    epochs: int,
    steps: int | None,
) -> dict[str, float]:
    """Compiles for this data; returns the seconds of every phase."""
    programs, placement = resolved.programs, resolved.placement
    rows = placement.rounded(source.batch_size)
    weights = np.ones(len(source.example.weights), np.float32)
    inputs = Batch(source.example.inputs, None, weights)
    training = open_training(resolved, execution, source, epochs=epochs, steps=steps)
    examples = open_pass(
        _source_of(source.example, rows), placement, execution, steps=None
    )
    unlabelled = open_pass(
        _source_of(inputs, rows),
        placement,
        execution,
        steps=None,
        bytes_per_output=outputs.nbytes,
    )
    return {
        "train": programs.train.compile(
            state, resolved.empty(), first_segment(training), 0, 0
        ),
        "eval": programs.evaluate.compile(
            state, resolved.empty_eval(), first_segment(examples), 0, 0
        ),
        "predict": programs.predict.compile(state, first_segment(unlabelled), 0, 0, 0),
    }


def _source_of(batch: Batch, rows: int) -> Source:
    """Returns one batch as a source of batches of `rows`."""
    if has_rows(batch):
        return ArraySource(batch, rows)
    stream = Stream(
        "batch", lambda *unused: iter([batch]), size=lambda batch: len(batch.weights)
    )
    return StreamSource(stream, lambda batch: batch)
