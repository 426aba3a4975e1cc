"""Compiles the programs for a dataset before the dataset is used."""

import numpy as np

from flaxfit._core.types import Batch, TrainState
from flaxfit._loops.feeder import Execution, first_chunk, open_feed, open_pass
from flaxfit._programs.placement import has_rows
from flaxfit._programs.resolve import ResolvedTask
from flaxfit.data.datasets.stream import BatchForm, Stream
from flaxfit.data.sources.array_source import ArraySource
from flaxfit.data.sources.base import BatchSource
from flaxfit.data.sources.stream_source import StreamSource


def compile_ahead(
    resolved: ResolvedTask,
    execution: Execution,
    source: BatchSource,
    state: TrainState,
    *,
    bytes_per_output: int,
    epochs: int,
    steps: int | None,
) -> dict[str, float]:
    """Compiles the programs for this data; returns the seconds by phase."""
    programs, placement = resolved.programs, resolved.placement
    rows = placement.rounded(source.batch_size)
    weights = np.ones(len(source.example.weights), np.float32)
    inputs = Batch(source.example.inputs, None, weights)
    training = open_feed(resolved, execution, source, epochs=epochs, steps=steps)
    examples = open_pass(
        resolved, execution, _source_of(source.example, rows), steps=None
    )
    unlabelled = open_pass(
        resolved,
        execution,
        _source_of(inputs, rows),
        steps=None,
        bytes_per_output=bytes_per_output,
    )
    return {
        "train": programs.train.compile(
            state, resolved.empty(), first_chunk(training), 0, 0
        ),
        "eval": programs.evaluate.compile(
            state, resolved.empty_eval(), first_chunk(examples), 0, 0
        ),
        "predict": programs.predict.compile(state, first_chunk(unlabelled), 0, 0, 0),
    }


def _source_of(batch: Batch, rows: int) -> BatchSource:
    """Returns one batch as a source whose batches have this number of `rows`."""
    if has_rows(batch):
        return ArraySource(batch, rows)
    stream = Stream(
        "batch",
        lambda *unused: iter([batch]),
        form=BatchForm(size=lambda batch: len(batch.weights)),
    )
    return StreamSource(stream, lambda batch: batch)
