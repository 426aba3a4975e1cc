"""Argument checks: the converted value, or what was given, expected and to write."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from flaxfit._core import validation
from flaxfit._core.errors import UsageError, UsageTypeError


@pytest.mark.parametrize(
    ("check", "value", "expected"),
    [
        (validation.integer, np.int64(3), 3),
        (validation.integer, jnp.int32(3), 3),
        (validation.optional_integer, None, None),
        (validation.optional_integer, 2, 2),
        (validation.integer_or_auto, "auto", None),
        (validation.integer_or_auto, 2, 2),
        (validation.number, 0, 0.0),
        (validation.number, np.float32(0.5), 0.5),
        (validation.number, jnp.array(2), 2.0),
        (validation.fraction, 1, 1.0),
        (validation.fraction, jnp.float32(0.5), 0.5),
        (validation.fraction, np.float32(0.5), 0.5),
        (validation.boolean, np.True_, True),
        (validation.switch, "auto", "auto"),
        (validation.switch, np.False_, False),
        (validation.names, "auto", "auto"),
        (validation.names, ["a", "b"], ("a", "b")),
        (validation.interval, None, (None, None)),
        (validation.interval, np.int64(7), (7, None)),
        (validation.interval, " 1.5m ", (None, 90.0)),
        (validation.interval, "2h", (None, 7200.0)),
    ],
)
def test_values_come_back_converted(check, value, expected):
    found = check("argument", value)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("check", "value", "error", "text"),
    [
        (validation.integer, 0, UsageError, "a whole number of at least 1. Write n=1."),
        (validation.integer, True, UsageTypeError, "a whole number"),
        (validation.integer, np.True_, UsageTypeError, "a whole number"),
        (validation.integer, 1.5, UsageTypeError, "a whole number"),
        (validation.integer, np.arange(3), UsageTypeError, "a whole number"),
        (validation.optional_integer, "2", UsageTypeError, "a whole number"),
        (validation.integer_or_auto, 0, UsageError, 'Write n=1 or n="auto".'),
        (validation.number, -1, UsageError, "a finite number of at least 0"),
        (validation.number, float("nan"), UsageError, "a finite number"),
        (validation.number, "1", UsageTypeError, "a finite number"),
        (validation.number, None, UsageTypeError, "a finite number"),
        (validation.number, b"1", UsageTypeError, "a finite number"),
        (validation.number, 10**400, UsageError, "a finite number"),
        (validation.number, np.ones(1), UsageTypeError, "a finite number"),
        (validation.fraction, 1.1, UsageError, "a number in [0, 1]"),
        (validation.fraction, True, UsageTypeError, "a number in [0, 1]"),
        (validation.boolean, 1, UsageTypeError, "True or False"),
        (validation.switch, "yes", UsageTypeError, 'True, False or "auto"'),
        (validation.names, "dropout", UsageError, "Write n=['dropout']."),
        (validation.names, 5, UsageTypeError, 'Write n="auto".'),
        (validation.interval, np.ones(2), UsageError, "a positive number of steps"),
        (validation.interval, 0, UsageError, 'Write n=1000 or n="5m".'),
        (validation.interval, "5 days", UsageError, '"30s", "5m" or "1h"'),
    ],
)
def test_errors_say_what_was_given_and_expected(check, value, error, text):
    with pytest.raises(error, match=re.escape(text)) as raised:
        check("n", value)
    assert type(raised.value) is error and raised.value.given == f"Got n={value!r}"


def test_limits():
    assert validation.integer("label", -100, least=None) == -100
    assert validation.integer("seed", 0, least=0) == 0
    assert validation.fraction("split", 0.5, within="(0, 1)") == 0.5
    for value in (0, 1):
        with pytest.raises(UsageError, match=r"in \(0, 1\)\. Write split=0.1"):
            validation.fraction("split", value, within="(0, 1)", write="split=0.1")
    assert validation.number("baseline", -0.5, signed=True) == -0.5
    with pytest.raises(UsageError, match="a positive number"):
        validation.number("rate", 0, zero=False)


def test_a_choice_suggests_the_nearest():
    assert validation.choice("mode", "min", ("min", "max")) == "min"
    with pytest.raises(
        UsageError, match=r"one of 'stop', 'skip'\. Did you mean 'stop'\?"
    ):
        validation.choice("nonfinite", "stopp", ("stop", "skip"))
