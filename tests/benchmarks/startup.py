"""Time to the end of the first epoch in a fresh process, and of the imports alone."""

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from processes import run_child, run_code
from race import race
from tables import Report, number, ratio, spread

TRAINERS = {
    "flaxfit": "flaxfit `fit`",
    "loop": "(b) best loop",
    "keras": "(c) Keras `fit`",
}
_COLD, _WARM = "cold", "warm cache"
_IMPORTS = {
    "flaxfit": "import flaxfit",
    "jax, flax.linen, optax": "import jax, flax.linen, optax",
    "jax, flax, optax": "import jax, flax, optax",
    "(an empty process)": "pass",
}


def startup_section(
    report: Report,
    names: Sequence[str],
    *,
    rounds: int,
    with_keras: bool,
    quick: bool,
) -> None:
    """Adds the section."""
    report.section("Time to the end of the first epoch, in a fresh process")
    report.say(
        "From data: begins when the packages are imported and the data is loaded, "
        "initialization and compilation included. Whole process: begins when it is "
        "started.\n"
    )
    who = [w for w in TRAINERS if with_keras or w != "keras"]
    for name in names:
        with TemporaryDirectory() as folder:
            found = _measure(name, who, Path(folder), rounds=rounds, quick=quick)
        _add_table(report, name, found)


def _measure(
    name: str, who: Sequence[str], folder: Path, *, rounds: int, quick: bool
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Returns what each trainer's processes said, cold and warm."""
    options = ["--quick"] if quick else []
    caches = {w: _cache_variables(w, folder / w) for w in who}
    for w in who:
        run_child(w, name, *options, **caches[w])  # fills the caches
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(rounds):
        for kind in (_COLD, _WARM):
            for w in who:
                environment = caches[w] if kind == _WARM else {}
                result = run_child(w, name, *options, **environment)
                found.setdefault((w, kind), []).append(result)
    return found


def _cache_variables(who: str, folder: Path) -> dict[str, str]:
    """Returns what switches the persistent compilation cache on."""
    folder.mkdir()
    if who == "flaxfit":
        return {"FLAXFIT_COMPILATION_CACHE": str(folder)}
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def _add_table(
    report: Report, name: str, found: dict[tuple[str, str], list[dict[str, Any]]]
) -> None:
    report.say(f"**{name}**, {len(found['flaxfit', _COLD])} rounds\n")
    header = (
        "trained by",
        "from data, s",
        "its time / flaxfit's",
        "whole process, s",
        "its time / flaxfit's",
        "its warm / cold, from data",
    )
    seconds = {
        key: (
            [r["end"] - r["ready"] for r in results],
            [r["end"] - r["started"] for r in results],
        )
        for key, results in found.items()
    }
    rows = []
    for (who, kind), (inner, outer) in seconds.items():
        own_inner, own_outer = seconds["flaxfit", kind]
        share = ratio(inner, seconds[who, _COLD][0])
        rows.append(
            (
                f"{TRAINERS[who]}, {kind}",
                number(statistics.median(inner)),
                number(ratio(inner, own_inner)),
                number(statistics.median(outer)),
                number(ratio(outer, own_outer)),
                number(share if kind == _WARM else None),
            )
        )
    report.table(header, rows)
    report.say()


def import_section(report: Report, *, rounds: int) -> None:
    """Adds the section."""
    report.section("Imports, in a fresh process")
    runners = {name: partial(run_code, code) for name, code in _IMPORTS.items()}
    race(runners, 1)  # writes the bytecode, fills the system's file cache
    seconds = race(runners, rounds)
    own = seconds["flaxfit"]
    rows = [
        (
            f"`{_IMPORTS[name]}`",
            number(1e3 * statistics.median(times)),
            "-" if _IMPORTS[name] == "pass" else number(ratio(own, times)),
            "-" if _IMPORTS[name] == "pass" else spread(own, times),
        )
        for name, times in seconds.items()
    ]
    header = ("process", "ms", "flaxfit's time / its", "range over rounds")
    report.table(header, rows)
