"""Habits from Keras get an error with the line to write."""

import pytest

from flaxfit._core.errors import UsageError, UsageTypeError
from flaxfit._core.keras_hints import (
    check_argument_order,
    compile_without_data,
    refuse_list,
)


def test_return_dict():
    refuse_list(True)
    with pytest.raises(UsageError, match=r"return_dict=False.*values\[\"loss\"\]"):
        refuse_list(False)


def test_compile_names_what_was_given():
    error = compile_without_data({"optimizer": "adam"})
    assert isinstance(error, TypeError) and "compile(optimizer=...)" in error.given


def test_the_order_of_arguments():
    def gap(y_true, y_pred):
        return y_true - y_pred

    check_argument_order(lambda outputs, targets: outputs, "loss", "{call}")
    check_argument_order(print, "loss", "{call}")
    with pytest.raises(UsageTypeError, match=r"metric gap .*Write gap: gap\(targets"):
        check_argument_order(gap, "metric", "{name}: {call}")
