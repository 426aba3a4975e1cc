"""What flaxfit's reading of data costs, and what workers gain: tables of ratios.

    python tests/benchmarks/data.py
    python tests/benchmarks/data.py --quick --section prefetch,workers

Measured as in `run.py`: interleaved, medians, a ratio for each round. Needs Grain and
scikit-learn; TFDS for its row.
"""

import argparse
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import flax.linen as nn
import grain
import jax
import numpy as np
from race import race
from tables import Report, number, ratio, spread, watched

from flaxfit import Trainer
from flaxfit._core.types import CallSpec
from flaxfit._loops.feeder import Execution, _SequentialFeed
from flaxfit._programs.placement import find_placement
from flaxfit.data import tfds
from flaxfit.data.binding.binding import Binding
from flaxfit.data.datasets.workers import OrderedMap
from flaxfit.data.open import BatchOptions, batch_source, open_dataset

SECTIONS = ("prefetch", "workers", "fits")

_SECONDS_PER_ITEM = 20e-6
_SECONDS_TO_DECODE = 2e-3
_ITEMS_PER_TASK = 8
_BINDING = Binding(CallSpec(("x",), (), ("x",)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the sections asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only see that it works")
    parser.add_argument("--section", default=",".join(SECTIONS))
    parser.add_argument("--output", help="a file for the tables")
    given = parser.parse_args(arguments)
    chosen = given.section.split(",")
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"{', '.join(unknown)}: choose from {', '.join(SECTIONS)}")
    report = Report(sys.stdout)
    for name in SECTIONS:
        if name in chosen:
            _SECTION[name](report, quick=given.quick)
    if given.output:
        report.write(given.output)


def prefetch_section(report: Report, *, quick: bool) -> None:
    """Adds iterating over what the background thread prepares, and over the source.

    By hand: a loop that reads a batch and puts it on the device, as a loop has to.
    """
    report.section("Prefetch against the source alone, 20 µs per item")
    kinds: dict[str, Callable[[float], object]] = {
        "Python at work": _Work(0.1 * _SECONDS_PER_ITEM),
        "waiting": time.sleep,
    }
    rows = []
    for size in (32, 128):
        for name, spend in kinds.items():
            source = _Batches(256 if quick else 25_600, size, spend)
            seconds = race(
                {
                    "alone": partial(_drain, source),
                    "by hand": partial(_put, source),
                    "prefetch": _prefetching(source),
                },
                1 if quick else 15,
            )
            own, alone = seconds["prefetch"], seconds["alone"]
            by_hand = seconds["by hand"]
            rows.append(
                (
                    f"{name}, batches of {size}",
                    number(1e6 * median(alone) / len(source)),
                    number(1e6 * median(by_hand) / len(source)),
                    number(1e6 * median(own) / len(source)),
                    number(ratio(own, by_hand)),
                    number(ratio(own, alone)),
                    spread(own, alone),
                )
            )
    header = (
        "source",
        "alone, µs/batch",
        "by hand",
        "prefetch",
        "prefetch / by hand",
        "prefetch / alone",
        "range",
    )
    report.table(header, rows)


@dataclass(frozen=True)
class _Batches:
    """Batches of pictures, each item of which costs time."""

    items: int
    size: int
    spend: Callable[[float], object]

    def __len__(self) -> int:
        return self.items // self.size

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        rng = np.random.default_rng(0)
        x = rng.random((self.size, 28, 28), np.float32)
        y = np.arange(self.size) % 10
        for _ in range(len(self)):
            self.spend(self.size * _SECONDS_PER_ITEM)
            yield x.copy(), y.copy()


class _Work:
    """Python that computes for so many seconds, whatever else the machine does.

    Args:
      unit: seconds of what is done between two looks at nothing: the work is counted.
    """

    def __init__(self, unit: float) -> None:
        began, runs = time.thread_time(), 20_000
        for _ in range(runs):
            _compute(10)
        each = (time.thread_time() - began) / runs
        self._unit = unit
        self._count = max(1, round(10 * unit / each))

    def __call__(self, seconds: float) -> None:
        for _ in range(round(seconds / self._unit)):
            _compute(self._count)


def _compute(count: int) -> int:
    total = 0
    for value in range(count):
        total += value * value
    return total


def _put(items: Iterable[Any]) -> None:
    for item in items:
        put = jax.device_put(item, may_alias=False)
    jax.block_until_ready(put)


def _drain(items: Iterable[Any]) -> None:
    for _ in items:
        pass


def _prefetching(data: _Batches) -> Callable[[], None]:
    """Returns what reads a pass as `fit` does, and does nothing with it."""
    source = batch_source(open_dataset(data), _BINDING, BatchOptions())
    placement = find_placement()

    def run() -> None:
        feed = _SequentialFeed(
            iter([source.batches(1)]), placement, Execution(), source, lambda: False
        )
        with feed.epoch() as chunks:
            read = sum(chunk.batches for chunk in chunks)
        assert read == len(data)

    return run


def workers_section(report: Report, *, quick: bool) -> None:
    """Adds what two threads and two processes gain over one."""
    report.section("Workers, 2 ms of decoding per item")
    packed, tasks = _packed(_SECONDS_TO_DECODE), 2 if quick else 60
    work = _Work(0.05 * _SECONDS_TO_DECODE)
    decoders: dict[str, Callable[[], object]] = {
        "waiting": partial(time.sleep, _SECONDS_TO_DECODE),
        "zlib, which lets others work": partial(zlib.decompress, packed),
        "Python": partial(work, _SECONDS_TO_DECODE),
    }
    rows = []
    for name, decode in decoders.items():
        for kind in ("threads", "processes"):
            maps = {n: OrderedMap(_Task(decode), **{kind: n}) for n in (1, 2)}
            runners = {
                str(n): partial(_run_tasks, mapped, tasks) for n, mapped in maps.items()
            }
            for run in runners.values():
                run()  # processes stay
            seconds = race(runners, 1 if quick else 7)
            items = _ITEMS_PER_TASK * tasks
            rows.append(
                (
                    f"{name}, {kind}",
                    number(items / median(seconds["1"])),
                    number(items / median(seconds["2"])),
                    number(ratio(seconds["1"], seconds["2"])),
                    spread(seconds["1"], seconds["2"]),
                )
            )
    header = ("decoder", "1, items/s", "2, items/s", "1's time / 2's", "range")
    report.table(header, rows)


@dataclass(frozen=True)
class _Task:
    decode: Callable[[], object]

    def __call__(self, number: int) -> np.ndarray:
        for _ in range(_ITEMS_PER_TASK):
            self.decode()
        return np.full((_ITEMS_PER_TASK, 28, 28), number, np.float32)


def _run_tasks(mapped: OrderedMap, tasks: int) -> None:
    _drain(mapped(range(tasks)))


def _packed(seconds: float) -> bytes:
    """Returns what zlib takes about so long to unpack."""
    rng = np.random.default_rng(0)
    content = rng.integers(0, 16, 200_000, np.uint8).tobytes()
    packed = zlib.compress(content)
    began, runs = time.thread_time(), 20
    for _ in range(runs):
        zlib.decompress(packed)
    each = (time.thread_time() - began) / runs
    return zlib.compress(content * max(1, round(seconds / each)))


def fits_section(report: Report, *, quick: bool) -> None:
    """Adds fits from datasets against those from the same arrays."""
    from sklearn.datasets import load_digits

    report.section("Fits from datasets against arrays")
    images, labels = load_digits(return_X_y=True)
    if quick:
        images, labels = images[:160], labels[:160]
    times = 1 if quick else 8
    x = np.tile((images / 16).astype(np.float32), (times, 1))
    y = np.tile(labels.astype(np.int32), times)
    examples = grain.MapDataset.source(_Pairs(x, y)).seed(0).shuffle()
    no_threads = grain.ReadOptions(num_threads=0)
    datasets: dict[str, Any] = {
        "arrays": (x, y),
        "Grain, batches by index": examples.batch(32),
        "Grain, examples by index": examples,
        "Grain, batches in order": examples.to_iter_dataset(no_threads).batch(32),
    }
    report.say(f"{len(x)} digits of 8 by 8, batches of 32, a network of 64 units\n")
    _add_fits(report, datasets, len(x), rounds=1 if quick else 7)
    with TemporaryDirectory() as folder:
        _add_tfds(report, folder, quick)


class _Pairs:
    """A source for Grain."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        self._x, self._y = x, y

    def __len__(self) -> int:
        return len(self._x)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Any]:
        return self._x[index], self._y[index]


def _add_tfds(report: Report, folder: str, quick: bool) -> None:
    try:
        import tensorflow_datasets  # noqa: F401
    except ImportError:
        report.say("\nTFDS is not installed.")
        return
    sys.path.append(str(Path(__file__).parents[1]))
    from helpers.tfds_datasets import FewDigits, digits

    with watched():
        builder = FewDigits(data_dir=folder)
        builder.download_and_prepare(file_format="array_record")
    images, labels = digits("train")
    scaled = images.astype(np.float32) / 255
    report.say(f"\n{len(images)} of them as PNG in an array_record of TFDS\n")
    _add_fits(
        report,
        {
            "arrays": (scaled, labels),
            "TFDS by name": tfds("few_digits/train", data_dir=folder),
        },
        len(images),
        rounds=1 if quick else 7,
    )


def _add_fits(
    report: Report,
    datasets: dict[str, Any],
    examples: int,
    *,
    rounds: int,
) -> None:
    runners = {}
    for name, dataset in datasets.items():
        trainer = Trainer(nn.Sequential([_flat, nn.Dense(64), nn.relu, nn.Dense(10)]))
        size = {} if "batches" in name else {"batch_size": 32}
        fit = partial(trainer.fit, dataset, verbose=0, **size)
        fit()
        runners[name] = fit
    seconds = race(runners, rounds)
    rows = [
        (
            name,
            number(examples / median(found)),
            number(ratio(found, seconds["arrays"])),
            spread(found, seconds["arrays"]),
        )
        for name, found in seconds.items()
    ]
    report.table(("fit from", "examples/s", "its time / arrays'", "range"), rows)


def _flat(x: Any) -> Any:
    return x.reshape((len(x), -1))


_SECTION: dict[str, Callable[..., None]] = {
    "prefetch": prefetch_section,
    "workers": workers_section,
    "fits": fits_section,
}

if __name__ == "__main__":
    main()
