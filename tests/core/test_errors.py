"""The parts of an error, and the name of the call that it speaks of."""

import pickle

import pytest

from flaxfit._core.errors import (
    CheckpointCorruptError,
    DataError,
    UsageError,
    UsageTypeError,
    caller,
    calling,
)


def test_a_usage_error_says_what_was_given_expected_and_what_to_write():
    error = UsageError("epochs=0", "a whole number >= 1", "epochs=1")
    assert str(error) == "epochs=0. a whole number >= 1. Write epochs=1."
    assert (error.given, error.write) == ("epochs=0", "epochs=1")
    assert str(DataError("No examples.")) == "No examples."
    with pytest.raises(TypeError, match="a str"):
        raise UsageTypeError("a str")


def test_errors_outlive_a_pickle():
    error = pickle.loads(pickle.dumps(UsageTypeError("a", "b", "c")))
    assert isinstance(error, TypeError) and str(error) == "a. b. Write c."
    corrupt = CheckpointCorruptError("Damaged.", path="a.msgpack", leaf="params/w")
    copied = pickle.loads(pickle.dumps(corrupt))
    assert str(copied) == "Damaged."
    assert (copied.path, copied.leaf) == ("a.msgpack", "params/w")


def test_the_innermost_call_is_named():
    assert caller() == "fit"
    with calling("evaluate"):
        with pytest.raises(ZeroDivisionError), calling("validation_data"):
            assert caller() == "validation_data"
            _ = 1 / 0
        assert caller() == "evaluate"
    assert caller() == "fit"
