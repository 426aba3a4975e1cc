"""Steps per second of `fit` against every rival: the main table."""

import math
import statistics
from collections.abc import Sequence
from functools import partial

import jax
from flaxfit_rival import FlaxfitFit
from floor import copy_probe, cost_of_step, matmul_probe
from keras_rival import KerasFit
from race import race
from rivals import GuideLoop, Rival, numpy_loop, resident_loop, scan_loop
from tables import Report, number, ratio, spread
from workloads import Workload

OWN = "flaxfit `fit`"
_FLOOR = "(d) the floor"
_HEADER = (
    "trained by",
    "µs/step",
    "its time / flaxfit's",
    "range over rounds",
    "loss of epoch 1",
    "metric of epoch 1",
)


def make_rivals(workload: Workload, *, with_keras: bool) -> dict[str, Rival]:
    """Returns everyone who trains, in the order they run in."""
    rivals: dict[str, Rival] = {
        OWN: FlaxfitFit(workload),
        "(a) guide's loop, `float(loss)` each step": GuideLoop(workload),
        "(b) best loop, data on the device": resident_loop(workload),
        "(b') jit loop fed by NumPy": numpy_loop(workload),
        "(e) an epoch in one `lax.scan`": scan_loop(workload),
    }
    if with_keras:
        rivals["(c) Keras `fit`"] = KerasFit(workload)
        rivals["(c) Keras `fit`, steps_per_execution=32"] = KerasFit(workload, 32)
    return rivals


def speed_table(
    report: Report, workload: Workload, *, rounds: int, with_keras: bool, quick: bool
) -> None:
    """Measures a workload and adds its table."""
    dtype = "bfloat16" if workload.name == "resnet" else "float32"
    rivals = make_rivals(workload, with_keras=with_keras)
    firsts = {name: rival.train(1, shuffle=False) for name, rival in rivals.items()}
    check_agreement(workload, firsts)
    for rival in rivals.values():
        rival.train(1)  # whatever is slow only once, and not in the first epoch
    matmul, copy = matmul_probe(dtype, quick), copy_probe(quick)
    runners = {name: partial(r.train, workload.epochs) for name, r in rivals.items()}
    seconds = race({**runners, "matmul": matmul.run, "copy": copy.run}, rounds)

    cost = cost_of_step(workload)
    flop_rates = [matmul.amount / s for s in seconds.pop("matmul")]
    byte_rates = [copy.amount / s for s in seconds.pop("copy")]
    steps = workload.epochs * workload.steps
    seconds[_FLOOR] = [
        steps * cost.seconds(flops, bytes_)
        for flops, bytes_ in zip(flop_rates, byte_rates, strict=True)
    ]
    _add_rows(report, workload, seconds, firsts)
    own_rate = steps * cost.flops / statistics.median(seconds[OWN])
    report.say(
        f"\n{number(cost.flops / 1e6)} MFLOP a step: flaxfit {number(own_rate / 1e9)} "
        f"GFLOP/s of {number(statistics.median(flop_rates) / 1e9)} in {dtype} matrix "
        f"products, {number(100 * own_rate / statistics.median(flop_rates))} %. "
        f"{number(cost.bytes / 1e6)} MB a step; copies run at "
        f"{number(statistics.median(byte_rates) / 1e9)} GB/s."
    )


def _add_rows(
    report: Report,
    workload: Workload,
    seconds: dict[str, list[float]],
    firsts: dict[str, tuple[float, float]],
) -> None:
    steps = workload.epochs * workload.steps
    rounds = len(seconds[OWN])
    report.say(
        f"**{workload.title}**: {workload.steps} steps an epoch, {workload.epochs} "
        f"epochs a measurement, {rounds} rounds\n"
    )
    rows = []
    for name, times in seconds.items():
        first = firsts.get(name, (None, None))
        rows.append(
            (
                name,
                number(1e6 * statistics.median(times) / steps),
                number(ratio(times, seconds[OWN])),
                spread(times, seconds[OWN]),
                number(first[0], 5),
                number(first[1], 4),
            )
        )
    report.table(_HEADER, rows)


def check_agreement(workload: Workload, firsts: dict[str, tuple[float, float]]) -> None:
    """Refuses to compare those who did not do the same work.

    All have begun from the same parameters, and taken the batches in the same order.

    Raises:
      RuntimeError: the losses or metrics of the first epoch lie apart.
    """
    expected = firsts[OWN]
    tolerance = workload.tolerance
    # A metric may be close to 0: an accuracy of 0.01 is near one of 0.02.
    slack = {"loss": 0.0, workload.metric: tolerance}
    for name, found in firsts.items():
        for (what, near), a, b in zip(slack.items(), expected, found, strict=True):
            if not math.isclose(a, b, rel_tol=tolerance, abs_tol=near):
                raise RuntimeError(
                    f"{workload.title}: {what} of the first epoch is {a} with {OWN} "
                    f"and {b} with {name}: they did not do the same work."
                )


def speed_section(
    report: Report,
    workloads: Sequence[Workload],
    *,
    rounds: int,
    with_keras: bool,
    quick: bool,
) -> None:
    """Adds the section."""
    report.section("Training: steps per second")
    for workload in workloads:
        speed_table(report, workload, rounds=rounds, with_keras=with_keras, quick=quick)
        report.say()
        jax.clear_caches()
