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


def number(name: str, value: Any, *, zero: bool = True, signed: bool = False) -> float:
    """Returns a finite number: at least 0, above 0 unless `zero`, any if `signed`."""
    least = "" if signed else " of at least 0"
    expected = f"a finite number{least}" if zero else "a positive number"
    found = _as_float(value)
    if (
        found is None
        or not math.isfinite(found)
        or (found < 0 and not signed)
        or (found == 0 and not zero)
    ):
        raise _error(name, value, expected, "", found is None)
    return found


def _as_float(value: Any) -> float | None:
    """Returns a number, also one of NumPy or jax, as a float; None for all else."""
    if isinstance(value, bool | np.bool_ | str | bytes) or np.ndim(value):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
    except OverflowError:
        return math.inf


def fraction(
    name: str, value: Any, *, within: str = "[0, 1]", write: str = ""
) -> float:
    """Returns a number between 0 and 1.

    Args:
      within: the interval: `"[0, 1]"`, `"(0, 1)"`, `"[0, 1)"` or `"(0, 1]"`.
      write: the line to write instead.
    """
    found = _as_float(value)
    above = operator.ge if within[0] == "[" else operator.gt
    below = operator.le if within[-1] == "]" else operator.lt
    if found is None or not (above(found, 0) and below(found, 1)):
        raise _error(name, value, f"a number in {within}", write, found is None)
    return found


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
    if isinstance(value, Iterable) and not isinstance(value, str):
        return tuple(value)
    if not isinstance(value, str) or value != "auto":
        write = f"{name}=[{value!r}]" if isinstance(value, str) else f'{name}="auto"'
        of_type = not isinstance(value, str)
        raise _error(name, value, 'a list of names or "auto"', write, of_type)
    return value


def interval(name: str, value: Any) -> tuple[int | None, float | None]:
    """Returns an interval in steps, and in seconds; at least one of them is None.

    Args:
      value: a number of steps; a string of a number and `s`, `m` or `h`; or None.
    """
    if value is None:
        return None, None
    if isinstance(value, int | np.integer) and is_integer(value) and value > 0:
        return int(value), None
    match = _TIME.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or float(match[1]) == 0:
        expected = 'a positive number of steps, or a time such as "30s", "5m" or "1h"'
        raise _error(name, value, expected, f'{name}=1000 or {name}="5m"')
    return None, float(match[1]) * dict(_SECONDS)[match[2]]


def _error(
    name: str, value: Any, expected: str, write: str = "", of_type: bool = False
) -> UsageError:
    kind = UsageTypeError if of_type else UsageError
    return kind(f"Got {name}={value!r}", f"Expected {expected}", write)
