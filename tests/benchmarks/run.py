"""flaxfit against hand-written loops and Keras: tables of ratios, measured here.

    python tests/benchmarks/run.py
    python tests/benchmarks/run.py --quick --only mlp,tiny --section speed,startup

Everything is measured interleaved (A B C, B C A, …) in one run; a number is the median
over the rounds, a ratio the median of each round's ratio. A rival's time / flaxfit's:
above 1 flaxfit is the faster. Needs scikit-learn; Keras where it is installed.
"""

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Sequence
from typing import Any

from keras_rival import keras_is_there
from processes import run_child
from tables import Report
from workloads import MAKERS, Workload, make_workload

# The sections that start processes come first: once this one has opened an
# accelerator, it holds most of its memory.
SECTIONS = (
    "import",
    "startup",
    "memory",
    "growth",
    "speed",
    "throughput",
    "callbacks",
)
_PACKAGES = ("flaxfit", "jax", "jaxlib", "flax", "optax", "numpy", "keras")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the sections asked for."""
    given = _parse(arguments)
    report = Report(sys.stdout)
    machine = run_child("describe")
    _introduce(report, machine, given)
    for name in SECTIONS:
        if name in given.section:
            _SECTION[name](report, given, _workloads_of(name, given, machine))
            if given.output:
                report.write(given.output)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="only see that it works")
    parser.add_argument(
        "--only", type=_names_of(MAKERS), default=(), help=", ".join(MAKERS)
    )
    parser.add_argument(
        "--section",
        type=_names_of(SECTIONS),
        default=SECTIONS,
        help=", ".join(SECTIONS),
    )
    parser.add_argument("--rounds", type=int, help="of every measurement")
    parser.add_argument("--no-keras", action="store_true", help="leave Keras out")
    parser.add_argument("--output", help="a Markdown file to write, too")
    return parser.parse_args(arguments)


def _names_of(known: Any) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(","))
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(
                f"{', '.join(unknown)}: choose from {', '.join(known)}"
            )
        return names

    return parse


def _introduce(
    report: Report, machine: dict[str, Any], given: argparse.Namespace
) -> None:
    report.say("# flaxfit's benchmarks\n")
    devices = f"{machine['devices']} x {machine['device']}"
    report.say(
        f"- machine: {platform.platform()}, {_cores()} CPU cores; "
        f"JAX on {machine['backend']}: {devices}"
    )
    versions = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    report.say(f"- versions: Python {platform.python_version()}, {versions}")
    report.say(f"- command: python tests/benchmarks/run.py {' '.join(sys.argv[1:])}")
    report.say("- a ratio above 1 in `its time / flaxfit's`: flaxfit is the faster")
    if given.no_keras or not keras_is_there():
        why = "left out" if given.no_keras else "not installed: pip install keras"
        report.say(f"- Keras: {why}")


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _workloads_of(
    section: str, given: argparse.Namespace, machine: dict[str, Any]
) -> list[str]:
    """Returns the names of the workloads a section runs."""
    if given.only:
        return list(given.only)
    chosen = {
        "startup": ["mlp", "digits"],
        "memory": ["mlp"],
        "growth": ["tiny", "mlp"],
        "callbacks": ["tiny", "mlp"],
    }.get(section, ["tiny", "mlp", "digits", "lm"])
    if given.quick and section != "speed":
        return ["tiny"]
    if section == "speed" and machine["backend"] != "cpu":
        chosen.append("resnet")
    return chosen


def _common(given: argparse.Namespace, rounds: int) -> dict[str, Any]:
    """Returns the options that every section of rounds has."""
    return {
        "rounds": given.rounds or (1 if given.quick else rounds),
        "with_keras": keras_is_there() and not given.no_keras,
        "quick": given.quick,
    }


def _made(given: argparse.Namespace, names: Sequence[str]) -> list[Workload]:
    return [make_workload(name, given.quick) for name in names]


def _import(report: Report, given: argparse.Namespace, names: Sequence[str]) -> None:
    from startup import import_section

    import_section(report, rounds=_common(given, 15)["rounds"])


def _startup(report: Report, given: argparse.Namespace, names: Sequence[str]) -> None:
    from startup import startup_section

    startup_section(report, names, **_common(given, 5))


def _memory(report: Report, given: argparse.Namespace, names: Sequence[str]) -> None:
    from memory import memory_section

    memory_section(report, names, **_common(given, 3))


def _growth(report: Report, given: argparse.Namespace, names: Sequence[str]) -> None:
    from memory import growth_section

    growth_section(report, names, quick=given.quick)


def _speed(report: Report, given: argparse.Namespace, names: Sequence[str]) -> None:
    from speed import speed_section

    speed_section(report, _made(given, names), **_common(given, 7))


def _throughput(
    report: Report, given: argparse.Namespace, names: Sequence[str]
) -> None:
    from throughput import throughput_section

    options = _common(given, 7)
    del options["quick"]
    throughput_section(report, _made(given, names), **options)


def _callbacks(report: Report, given: argparse.Namespace, names: Sequence[str]) -> None:
    from hooks import hooks_section

    rounds = _common(given, 7)["rounds"]
    hooks_section(report, _made(given, names), rounds=rounds)


_SECTION = {
    "import": _import,
    "startup": _startup,
    "memory": _memory,
    "growth": _growth,
    "speed": _speed,
    "throughput": _throughput,
    "callbacks": _callbacks,
}


if __name__ == "__main__":
    main()
