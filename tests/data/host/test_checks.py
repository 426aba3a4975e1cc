"""Refusals of arrays, with their text."""

import collections

import ml_dtypes
import numpy as np
import pytest

from flaxfit._core.errors import DataError
from flaxfit._core.types import Batch
from flaxfit.data.host.arrays import as_host, fill, narrow
from flaxfit.data.host.checks import check_lengths, check_values, check_weights

X = np.ones((4, 3), np.float32)
Y = np.arange(4)
W = np.ones(4, np.float32)


def test_rows_are_counted():
    assert check_lengths(Batch((X,), Y, None)) == 4
    assert check_lengths({"a": X.astype(ml_dtypes.bfloat16)}) == 4


@pytest.mark.parametrize(
    ("nest", "message"),
    [
        (Batch(({"image": X},), Y[:3], None), "length: x/image: 4, y: 3. "),
        (Batch((X, X[:2]), None, None), "x/0: 4, x/1: 2"),
        (Batch({"a": X}, Y, W[:1]), "x/a: 4, y: 4, weights: 1"),
        (Batch((X[:0],), Y[:0], None), r"no examples: x has shape \(0, 3\)"),
        (Batch((), None, None), "no inputs: x holds no array"),
        (Batch((None,), Y, None), "no inputs: x holds no array"),
        (Batch((np.array(iter([])),), Y, None), "x is a list_iterator, not an array"),
        (Batch((X,), np.float32(1), None), r"y is a single value .*np.stack"),
        (Batch((np.array(["a", "b"]),), None, None), "x has dtype <U1.*return_inv"),
        (Batch((X.astype(object),), None, None), r"x has dtype object, .*'float32'"),
        (Batch((X.astype("M8[s]"),), None, None), "dtype datetime64.*'float32'"),
        (
            Batch((X.astype(np.longdouble),), None, None),
            "x has dtype float.*to a dtype of jax",
        ),
        (np.float32(1), "x is a single value"),
    ],
)
def test_check_lengths_refuses(nest, message):
    with pytest.raises(DataError, match=message):
        check_lengths(nest)


def _with(array, value, *place):
    array = array.copy()
    array[place] = value
    return array


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (Batch((_with(X, np.nan, 2, 1),), Y, W), "x holds nan at row 2"),
        (Batch({"a": _with(X, np.inf, 1, 0)}, Y, W), "x/a holds inf at row 1"),
        (Batch((X,), _with(X, np.nan, 3, 0), W), "y holds nan at row 3.*weight 0"),
        (Batch((X,), Y, _with(W, np.nan, 1)), "weights hold nan at row 1"),
        (Batch((X,), Y, _with(W, -1, 2)), "weights hold -1.0 at row 2"),
        (Batch((X,), Y, 0 * W), "all zero"),
    ],
)
def test_wrong_values_are_refused(batch, message):
    with pytest.raises(DataError, match=message):
        check_weights(batch.weights)
        check_values(batch)


def test_targets_of_weight_zero_may_be_nan():
    check_values(Batch((X,), _with(X, np.nan, 3, 0), _with(W, 0, 3)))


def test_narrow_gives_the_dtypes_of_jax():
    nest = {"f": np.array([1.5]), "i": np.array([7]), "u": np.ones(1, np.uint8)}
    narrowed = narrow(nest)
    assert [str(narrowed[k].dtype) for k in "fiu"] == ["float32", "int32", "uint8"]
    assert (narrowed["f"], narrowed["i"]) == (1.5, 7)
    assert narrow(np.array([1.0], ">f4")).dtype == np.dtype(np.float32)
    assert narrow(np.array([258], ">i8"))[0] == 258
    assert narrow(X) is X


@pytest.mark.parametrize(
    ("values", "held"), [(2**32 + 5, "4294967301"), (-(2**31) - 1, "-2147483649")]
)
def test_narrow_refuses_what_would_be_cut_off(values, held):
    with pytest.raises(DataError, match=f"y is int64 and holds {held}, .* int32"):
        narrow(Batch((X,), np.array([0, values, 0, 0]), None))


def test_narrow_refuses_large_unsigned():
    with pytest.raises(DataError, match=r"holds 18446744073709551615.*uint32"):
        narrow(np.array([2**64 - 1], np.uint64))


def test_fill_wraps_around_at_weight_zero():
    batch = Batch((X * Y[:, None].astype(np.float32),), Y, W)
    filled = fill(batch, 10)
    np.testing.assert_array_equal(filled.targets, [0, 1, 2, 3, 0, 1, 2, 3, 0, 1])
    np.testing.assert_array_equal(filled.inputs[0][:, 0], filled.targets)
    np.testing.assert_array_equal(filled.weights, [1] * 4 + [0] * 6)
    assert fill(batch, 4) is batch
    np.testing.assert_array_equal(batch.weights, W)


def test_as_host_asks_array_likes_and_joins_numbers():
    class Tensor:
        def __array__(self, dtype=None, copy=None):
            return np.arange(3)

    host = as_host(({"a": [[1, 2], [3, 4]], "b": [0.5]}, Tensor(), None))
    assert host[0]["a"].shape == (2, 2)
    assert host[0]["b"].dtype == np.float64
    np.testing.assert_array_equal(host[1], [0, 1, 2])
    assert host[2] is None


def test_as_host_reads_mappings_that_are_no_pytrees():
    host = as_host([collections.UserDict(a=[1, 2])])
    np.testing.assert_array_equal(host[0]["a"], [1, 2])


def test_errors_of_an_array_like_pass_through():
    class Broken:
        def __array__(self, dtype=None, copy=None):
            raise ValueError("on another device")

    with pytest.raises(ValueError, match="on another device"):
        as_host(Broken())


def test_as_host_refuses_ragged_lists():
    with pytest.raises(DataError, match=r"2 rows that differ in length.*Pad"):
        as_host([[1, 2], [3]])
