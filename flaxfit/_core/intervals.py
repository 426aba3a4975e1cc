"""Parses intervals given in steps or in time."""

import re
from typing import Any

_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*([smh])")
_SECONDS = (("s", 1.0), ("m", 60.0), ("h", 3600.0))


def as_interval(name: str, value: Any) -> tuple[int | None, float | None]:
    """Returns an interval in steps, and in seconds; one of them is None, or both.

    Args:
      name: the argument, for messages.
      value: a number of steps; a string of a number and `s`, `m` or `h`; or None.

    Raises:
      ValueError: something else.
    """
    if value is None:
        return None, None
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value, None
    match = _TIME.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or float(match[1]) == 0:
        raise ValueError(
            f"{name}={value!r}: write a number of steps, {name}=1000, or a time, "
            f'{name}="5m" ("30s", "1h").'
        )
    return None, float(match[1]) * dict(_SECONDS)[match[2]]
