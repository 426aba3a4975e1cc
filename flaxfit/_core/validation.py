"""Argument checks in one format: each returns the value, converted, or raises.

Every check takes the name of the argument first and the value second. It raises
`UsageError`; for numbers and booleans of the wrong type, `UsageTypeError`.
"""

import math
import operator
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from flaxfit._core.errors import UsageError, UsageTypeError, did_you_mean

_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*([smh])")
_SECONDS = (("s", 1.0), ("m", 60.0), ("h", 3600.0))


def is_integer(value: Any) -> bool:
    """Whether `value` is a whole number; a bool is not one here."""
    return hasattr(value, "__index__") and not isinstance(value, bool | np.bool_)


def integer(name: str, value: Any, *, least: int | None = 1, write: str = "") -> int:
    """Returns a whole number of at least `least`.

    Args:
      least: the smallest number allowed, None for any.
      write: the line to write instead; the smallest number by default.
    """
    try:
        number = operator.index(value) if is_integer(value) else None
    except TypeError:  # An array of several numbers has `__index__` too.
        number = None
    if number is None or (least is not None and number < least):
        expected = "a whole number" + ("" if least is None else f" of at least {least}")
        raise _error(
            name, value, expected, write or f"{name}={least or 0}", number is None
        )
    return number


def optional_integer(name: str, value: Any) -> int | None:
    """Returns a whole number of at least 1, or None."""
    return None if value is None else integer(name, value)


def integer_or_auto(name: str, value: Any) -> int | None:
    """Returns a whole number of at least 1, or None for `"auto"`."""
    if isinstance(value, str) and value == "auto":
        return None
    return integer(name, value, write=f'{name}=1 or {name}="auto"')


def number(name: str, value: Any, *, zero: bool = True) -> float:
    """Returns a finite number of at least 0, or above 0 if `zero` is False."""
    expected = "a finite number of at least 0" if zero else "a positive number"
    try:
        scalar = np.ndim(value) == 0 and not isinstance(value, bool | np.bool_ | str)
        found = float(value) if scalar else None
    except (TypeError, ValueError):
        found = None
    if found is None or not 0 <= found < math.inf or (found == 0 and not zero):
        raise _error(name, value, expected, "", found is None)
    return found


def fraction(
    name: str, value: Any, *, within: str = "[0, 1]", write: str = ""
) -> float:
    """Returns a number between 0 and 1.

    Args:
      within: the interval: `"[0, 1]"`, `"(0, 1)"`, `"[0, 1)"` or `"(0, 1]"`.
      write: the line to write instead.
    """
    real = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    above = operator.ge if within[0] == "[" else operator.gt
    below = operator.le if within[-1] == "]" else operator.lt
    if not real or not (above(value, 0) and below(value, 1)):
        raise _error(name, value, f"a number in {within}", write, not real)
    return float(value)


def boolean(name: str, value: Any, *, expected: str = "True or False") -> bool:
    """Returns True or False."""
    if not isinstance(value, bool | np.bool_):
        raise _error(name, value, expected, "", True)
    return bool(value)


def switch(name: str, value: Any) -> bool | str:
    """Returns True, False or `"auto"`."""
    if isinstance(value, str) and value == "auto":
        return value
    return boolean(name, value, expected='True, False or "auto"')


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Returns one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        expected = f"one of {', '.join(map(repr, choices))}"
        hint = did_you_mean(str(value), choices)
        raise _error(name, value, f"{expected}.{hint}" if hint else expected)
    return value


def names(name: str, value: str | Iterable[str]) -> str | tuple[str, ...]:
    """Returns `"auto"` or a tuple of names."""
    if not isinstance(value, str):
        return tuple(value)
    if value != "auto":
        raise _error(name, value, 'a list of names or "auto"', f"{name}=[{value!r}]")
    return value


def interval(name: str, value: Any) -> tuple[int | None, float | None]:
    """Returns an interval in steps, and in seconds; at least one of them is None.

    Args:
      value: a number of steps; a string of a number and `s`, `m` or `h`; or None.
    """
    if value is None:
        return None, None
    if is_integer(value) and value > 0:
        return int(value), None
    match = _TIME.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or float(match[1]) == 0:
        expected = 'a number of steps, or a time such as "30s", "5m" or "1h"'
        raise _error(name, value, expected, f'{name}=1000 or {name}="5m"')
    return None, float(match[1]) * dict(_SECONDS)[match[2]]


def _error(
    name: str, value: Any, expected: str, write: str = "", of_type: bool = False
) -> UsageError:
    kind = UsageTypeError if of_type else UsageError
    return kind(f"Got {name}={value!r}", f"Expected {expected}", write)
