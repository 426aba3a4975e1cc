"""Argument checks for whole numbers."""

from typing import Any

import numpy as np


def as_count(argument: str, value: Any, *, least: int = 1) -> int:
    """Returns `value` as an int.

    Raises:
      ValueError: not a whole number, or below `least`.
    """
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least:
        raise ValueError(f"{argument}={value!r}: write a whole number >= {least}.")
    return int(value)


def as_optional_count(argument: str, value: Any) -> int | None:
    """Returns `value` as an int of at least 1, or None.

    Raises:
      ValueError: anything else.
    """
    return None if value is None else as_count(argument, value)
