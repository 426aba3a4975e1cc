"""Peak memory of a training process, and its growth over many epochs."""

import statistics
from collections.abc import Sequence

from processes import run_child
from startup import TRAINERS
from tables import Report, number

_EPOCHS = 3
_GROWTH_EPOCHS = 200


def memory_section(
    report: Report,
    names: Sequence[str],
    *,
    rounds: int,
    with_keras: bool,
    quick: bool,
) -> None:
    """Adds the section."""
    report.section("Peak resident memory of a process")
    options = ["--quick"] if quick else []
    who = [w for w in TRAINERS if with_keras or w != "keras"]
    for name in names:
        found = {
            w: [
                run_child(w, name, "--epochs", str(_EPOCHS), *options)
                for _ in range(rounds)
            ]
            for w in who
        }
        peaks = {w: statistics.median(r["peak"] for r in f) for w, f in found.items()}
        before = {
            w: statistics.median(r["before"] for r in f) for w, f in found.items()
        }
        device = {w: f[-1]["peak on device"] for w, f in found.items()}
        report.say(f"**{name}**, {_EPOCHS} epochs\n")
        rows = [
            (
                TRAINERS[w],
                number(peak, 4),
                number(peak / peaks["flaxfit"]),
                number(before[w], 4),
                number(peak - before[w]),
                number(device[w]),
            )
            for w, peak in peaks.items()
        ]
        header = (
            "trained by",
            "MB",
            "its / flaxfit's",
            "imported, data loaded: MB",
            "training adds MB",
            "on the device MB",
        )
        report.table(header, rows)
        report.say()


def growth_section(report: Report, names: Sequence[str], *, quick: bool) -> None:
    """Adds the section."""
    report.section("Resident memory over the epochs of one `fit`")
    epochs = 20 if quick else _GROWTH_EPOCHS
    options = ["--quick"] if quick else []
    rows = []
    for name in names:
        found = run_child("growth", name, "--epochs", str(epochs), *options)
        resident = found["resident"]
        middle, end = resident[epochs // 2 - 1], resident[-1]
        rows.append(
            (
                name,
                number(resident[0], 4),
                number(middle, 4),
                number(end, 4),
                f"{100 * (end - middle) / middle:+.2f} %",
            )
        )
    header = (
        "workload",
        "MB after epoch 1",
        f"after {epochs // 2}",
        f"after {epochs}",
        f"growth over the last {epochs - epochs // 2}",
    )
    report.table(header, rows)
