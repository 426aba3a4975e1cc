"""Interleaved timing: A B C, A B C, … so that a slow minute is slow for all."""

import gc
import time
from collections.abc import Callable, Mapping


def race(
    runners: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, list[float]]:
    """Returns the seconds of each runner in each round.

    Args:
      runners: name -> what is timed; it must not return before its work is done.
      rounds: how often all of them run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, run in runners.items():
            gc.collect()
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return seconds
