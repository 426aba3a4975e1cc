"""Specs of trees, their text, and how two trees differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxfit._core.tree_specs import (
    LeafSpec,
    add_row,
    describe,
    diff,
    difference_lines,
    listed,
    specs_of,
)


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        (np.zeros((32, 4), np.float32), "float32[32,4]"),
        (jnp.zeros((), jnp.bfloat16), "bfloat16[]"),
        (jax.random.key(0), "key<fry>[]"),
        ({"a": np.zeros(2, np.int64), "b": None}, "{a: int64[2], b: None}"),
        ((np.zeros(1, bool), "text"), "(bool[1], str)"),
    ],
)
def test_a_tree_as_text(tree, text):
    assert describe(tree) == text


def test_specs_have_paths_and_the_dtypes_of_jax():
    tree = {"a": {"w": np.zeros((2, 3))}, "b": [1, jax.random.key(0)]}
    specs = specs_of(tree)
    assert listed(specs) == "a/w: float32[2,3], b/0: int32[], b/1: key<fry>[]"
    assert [spec.is_inexact for spec in specs.values()] == [True, False, False]
    assert listed(specs_of((np.zeros(3, np.int32),))) == "int32[3]"
    assert listed({}) == "none"


def test_differences_name_both_sides():
    wanted = specs_of({"a": jnp.zeros(2), "b": jnp.zeros(3), "c": jnp.zeros(1)})
    given = specs_of({"a": jnp.zeros(2), "b": jnp.zeros(4), "d": jnp.zeros(1)})
    assert diff(wanted, wanted) == []
    assert difference_lines(diff(wanted, given), "{path}: {wanted} | {given}") == [
        "b: float32[3] | float32[4]",
        "c: float32[1] | missing",
        "d: missing | float32[1]",
    ]


def test_twenty_differences_are_enough():
    one = {str(i): LeafSpec((i,), "int32") for i in range(23)}
    lines = difference_lines(diff(one, {}), "{path}")
    assert lines[19:] == ["19", "... and 3 more"]


def test_a_row_is_added_to_what_has_the_batch_as_its_first_axis():
    grown = add_row({"x": np.zeros((8, 3)), "table": np.zeros((4, 8))}, 8)
    assert describe(grown["x"]) == "float32[9,3]"
    assert describe(grown["table"]) == "float32[4,8]"
