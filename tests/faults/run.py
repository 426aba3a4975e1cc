"""The scoreboard: every fault, how often it was tried, how often nothing was lost.

    python tests/faults/run.py [--long] [--only F1,F5] [--no-rivals] [--seed N]

Others get the same trials where there is such a thing, but fewer: see `rivals`.
"""

import argparse
import importlib.util
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import rivals  # noqa: E402
from harness import ChildError, Outcome, Server  # noqa: E402
from registry import FAULTS, Fault  # noqa: E402
from training import FAULTS as TRAINING_FAULTS  # noqa: E402

_MOST_DETAILS = 5


def main() -> int:
    """Prints the table; returns 0 where nothing of flaxfit was lost."""
    arguments = _parse()
    only = set(filter(None, arguments.only.split(",")))
    known = sorted(
        (*FAULTS, *TRAINING_FAULTS), key=lambda f: int(f.name[1:].rstrip("b"))
    )
    faults = [f for f in known if not only or f.name in only]
    names = [] if arguments.no_rivals else list(rivals.installed())
    _print_row(["fault", "what", "trials", "survived", *names])
    trials = survived = 0
    lost: list[str] = []
    rival_server = _rival_server(names)
    with Server() as server, rival_server:
        for fault in faults:
            count = fault.long if arguments.long else fault.short
            start = time.monotonic()
            outcome = _run(server, fault.campaign, count, arguments.seed)
            seconds = time.monotonic() - start
            cells = [_rival_cell(rival_server, fault, n) for n in names]
            kept = outcome.skipped or f"{outcome.survived}"
            _print_row([fault.name, fault.what, f"{outcome.trials}", kept, *cells])
            print(f"  {seconds:.1f} s", file=sys.stderr)
            trials, survived = trials + outcome.trials, survived + outcome.survived
            lost += [f"{fault.name} {text}" for text in outcome.details[:_MOST_DETAILS]]
    print(*lost, sep="\n", end="\n" if lost else "")
    end = "nothing lost" if trials == survived else f"{trials - survived} LOST"
    print("\n* so many of them silently: a wrong state was returned without an error")
    print(f"{survived:,} of {trials:,} trials survived, {end}")
    return int(trials != survived)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--long", action="store_true", help="as often as it takes")
    parser.add_argument("--only", default="", help="faults, such as F1,F5")
    parser.add_argument("--no-rivals", action="store_true", help="flaxfit alone")
    parser.add_argument("--seed", type=int, default=0, help="of every chance")
    return parser.parse_args()


def _rival_server(names: list[str]) -> Server:
    modules = [m for m in rivals.MODULES if importlib.util.find_spec(m.split(".")[0])]
    preload = tuple(modules) if names else ()
    return Server(preload, {"KERAS_BACKEND": "jax"})


def _run(server: Server, campaign: str, trials: int, seed: int) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="flaxfit-faults-") as folder:
        try:
            return server.run(campaign, trials, seed, Path(folder), timeout=36_000)
        except ChildError as err:
            return Outcome(1, 0, (f"the campaign itself: {err}",))


def _rival_cell(server: Server, fault: Fault, name: str) -> str:
    """Returns `"3/10"`, or a dash where there is no such thing to try."""
    if not fault.rival:
        return "-"
    outcome = _run(server, f"rivals:{fault.rival}:{name}", fault.rival_trials, 0)
    for text in outcome.details[:_MOST_DETAILS]:
        print(f"  {name}: {text[-300:]}", file=sys.stderr)
    silent = sum("another's" in text for text in outcome.details)
    note = f" {silent}*" if silent else ""
    return outcome.skipped or f"{outcome.survived}/{outcome.trials}{note}"


def _print_row(cells: list[str]) -> None:
    widths = (5, 48, 7, 8)
    padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=False)]
    print(" ".join([*padded, *(cell.rjust(12) for cell in cells[4:])]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
