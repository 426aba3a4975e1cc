"""Interleaved timing: A B C, B C A, … so that a slow minute is slow for all.

Whoever runs after a probe of memory finds cold caches: so each is the first in turn.
"""

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
    names = list(runners)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            gc.collect()
            began = time.perf_counter()
            runners[name]()
            seconds[name].append(time.perf_counter() - began)
    return seconds
