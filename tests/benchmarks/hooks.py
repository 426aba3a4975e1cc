"""What callbacks cost: a logger and a checkpoint against none."""

import json
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from flaxfit_rival import FlaxfitFit
from race import race
from tables import Report, number, ratio, spread
from workloads import Workload

from flaxfit import Callback, LoopState, ModelCheckpoint

_NONE = "none"
_HEADER = (
    "callbacks",
    "steps/s",
    "ms/epoch",
    "its time / none's",
    "range over rounds",
)


class Logger(Callback):
    """Writes a line of JSON after every epoch."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_epoch_end(self, loop: LoopState) -> None:
        """Writes."""
        with self._path.open("a") as file:
            file.write(json.dumps({"epoch": loop.epoch, **loop.logs}) + "\n")


def hooks_section(
    report: Report, workloads: Sequence[Workload], *, rounds: int
) -> None:
    """Adds the section."""
    report.section("Callbacks: a logger and a checkpoint every epoch")
    for workload in workloads:
        with TemporaryDirectory() as folder:
            _add_table(report, workload, Path(folder), rounds)


def _add_table(report: Report, workload: Workload, folder: Path, rounds: int) -> None:
    file = folder / "last.msgpack"
    logger, checkpoint = Logger(folder / "log.jsonl"), ModelCheckpoint(file)
    waiting = ModelCheckpoint(folder / "waited.msgpack", background=False)
    sets: dict[str, list[Callback]] = {
        _NONE: [],
        "logger": [logger],
        "checkpoint": [checkpoint],
        "checkpoint, waited for": [waiting],
        "both": [logger, checkpoint],
    }
    fits = {
        name: FlaxfitFit(workload, callbacks=callbacks)
        for name, callbacks in sets.items()
    }
    for fit in fits.values():
        fit.train(1)
    epochs = workload.epochs
    seconds = race({n: partial(f.train, epochs) for n, f in fits.items()}, rounds)
    size = file.stat().st_size
    report.say(
        f"**{workload.title}**: {workload.steps} steps an epoch, a checkpoint of "
        f"{number(size / 1e6)} MB\n"
    )
    rows = [
        (
            name,
            number(epochs * workload.steps / statistics.median(times)),
            number(1e3 * statistics.median(times) / epochs),
            number(ratio(times, seconds[_NONE])),
            spread(times, seconds[_NONE]),
        )
        for name, times in seconds.items()
    ]
    report.table(_HEADER, rows)
    report.say()
