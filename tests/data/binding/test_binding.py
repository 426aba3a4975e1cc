"""How raw batches are read by the names of a call."""

import collections

import jax
import jax.numpy as jnp
import pytest
from flax.core import FrozenDict

from flaxfit._core.errors import DataError
from flaxfit._core.types import Batch, CallSpec
from flaxfit.data.binding.binding import Binding

ONE = Binding(CallSpec(("x",), (), ("x",)))
TWO = Binding(CallSpec(("a", "b"), (), ("a", "b")))
OPTIONAL = Binding(CallSpec(("input_ids", "attention_mask"), (), ("input_ids",)))
KEYWORD = Binding(CallSpec((), ("inputs",), ("inputs",)))
ARGS = Binding(CallSpec((), (), (), var_positional=True))
KWARGS = Binding(CallSpec((), (), (), var_keyword=True))


@pytest.mark.parametrize(
    ("binding", "raw", "inputs", "targets", "weights"),
    [
        (ONE, 1, (1,), None, None),
        (ONE, (1,), (1,), None, None),
        (ONE, (1, 2), (1,), 2, None),
        (ONE, [1, 2], (1,), 2, None),
        (ONE, (1, 2, 3), (1,), 2, 3),
        (ONE, (1, None, 3), (1,), None, 3),
        (ONE, ((1, 2), 3), ((1, 2),), 3, None),
        (ONE, ([1, 2], 3), ((1, 2),), 3, None),
        (ONE, ({"p": 1, "q": 2}, 3), ({"p": 1, "q": 2},), 3, None),
        (ONE, ({"x": 1}, 3), (1,), 3, None),
        (TWO, ((1, 2), 3), (1, 2), 3, None),
        (TWO, ([1, 2], 3), (1, 2), 3, None),
        (TWO, ({"a": 1, "b": 2}, 3), {"a": 1, "b": 2}, 3, None),
        (ARGS, ((1, 2, 4), 3), (1, 2, 4), 3, None),
        (OPTIONAL, (1, 3), (1,), 3, None),
        (KEYWORD, (1, 3), {"inputs": 1}, 3, None),
        (ONE, {"image": 1, "label": 2}, (1,), 2, None),
        (ONE, FrozenDict({"image": 1, "label": 2}), (1,), 2, None),
        (ONE, {"x": 1, "y": 2, "idx": 3}, (1,), 2, None),
        (ONE, {"image": 1, "label": 2, "weights": 3}, (1,), 2, 3),
        (ONE, {"image": 1, "target": 2, "sample_weight": 3}, (1,), 2, 3),
        (KEYWORD, {"tokens": 1, "targets": 2}, {"inputs": 1}, 2, None),
        (
            OPTIONAL,
            {"input_ids": 1, "attention_mask": 4, "labels": 2, "idx": 3},
            {"input_ids": 1, "attention_mask": 4},
            2,
            None,
        ),
        (
            OPTIONAL,
            {"tokens": 1, "attention_mask": 4, "labels": 2},
            {"input_ids": 1, "attention_mask": 4},
            2,
            None,
        ),
        (KWARGS, {"p": 1, "q": 2, "y": 3}, {"p": 1, "q": 2}, 3, None),
        (ARGS, {"image": 1, "label": 2}, (1,), 2, None),
    ],
)
def test_split(binding, raw, inputs, targets, weights):
    assert binding.split(raw) == Batch(inputs, targets, weights)


def test_a_required_target_is_input_and_target():
    wmt = Binding(CallSpec(("inputs", "targets"), (), ("inputs", "targets")))
    batch = wmt.split({"inputs": 1, "targets": 2})
    assert batch == Batch({"inputs": 1, "targets": 2}, 2, None)


def test_an_optional_target_of_the_call_is_no_input():
    call = CallSpec(("input_ids", "labels"), (), ("input_ids",))
    batch = Binding(call).split({"input_ids": 1, "labels": 2})
    assert batch == Batch({"input_ids": 1}, 2, None)


def test_weights_that_the_call_takes_are_an_input():
    call = CallSpec(("x", "weights"), (), ("x",))
    batch = Binding(call).split({"x": 1, "weights": 2, "sample_weight": 3, "y": 4})
    assert batch == Batch({"x": 1, "weights": 2}, 4, 3)


def test_named_tuples_are_read_by_name():
    row = collections.namedtuple("Row", ["image", "label"])
    assert ONE.split(row(1, 2)) == Batch((1,), 2, None)


def test_a_named_tuple_as_x_is_one_input():
    graph = collections.namedtuple("Graph", ["nodes", "edges"])(1, 2)
    assert TWO.call.positional == ("a", "b")
    assert ONE.split((graph, 3)) == Batch((graph,), 3, None)


def test_a_batch_is_taken_as_it_is():
    batch = Batch((1,), 2, 3)
    assert ONE.split(batch) is batch


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ("image", (1,)),
        (["image"], (1,)),
        ({"x": "image"}, {"x": 1}),
        (["x"], {"x": 5}),
        (lambda raw: raw["image"] + 1, (2,)),
        (lambda raw: (raw["image"],), (1,)),
        (lambda raw: {"x": raw["image"]}, {"x": 1}),
        (lambda raw: {"p": raw["image"]}, ({"p": 1},)),
    ],
)
def test_inputs_override(inputs, expected):
    binding = Binding(ONE.call, inputs=inputs)
    raw = {"image": 1, "id": 4, "x": 5, "label": 2}
    assert binding.split(raw) == Batch(expected, 2, None)


def test_inputs_override_keeps_tuples_of_arrays_working():
    binding = Binding(ONE.call, inputs="image")
    assert binding.split((1, 2)) == Batch((1,), 2, None)
    assert binding.split(({"image": 1, "id": 4}, 2)) == Batch((1,), 2, None)
    by_function = Binding(ONE.call, inputs=lambda raw: raw[0] * 10)
    assert by_function.split((1, 2)) == Batch((10,), 2, None)
    assert by_function.bind((3,)) == (30,)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [("id", 4), (["id", "label"], {"id": 4, "label": 2})],
)
def test_targets_override(targets, expected):
    binding = Binding(ONE.call, targets=targets, inputs="image")
    assert binding.split({"image": 1, "id": 4, "label": 2}).targets == expected
    assert binding.split((1, {"id": 4, "label": 2})).targets == expected


def test_split_works_on_tracers_and_shapes():
    seen = jax.eval_shape(lambda raw: ONE.split(raw), {"image": jnp.ones(2), "y": 1})
    assert seen.inputs[0].shape == (2,)
    assert ONE.split(seen) is seen


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ONE.split((1, 2, 3, 4)), r"a tuple of 4 items: .*\(\(a, b\), y\)"),
        (lambda: ONE.split(()), "a tuple of 0 items"),
        (lambda: TWO.split((1, 2)), r"x has 1 part, .* requires a, b\. .*\(a, b,\)"),
        (lambda: TWO.split(((1, 2, 3), 4)), "x has 3 parts, .* takes a, b"),
        (lambda: TWO.bind({"a": 1}), "has the keys a; .* requires a, b"),
        (
            lambda: ONE.split({"image": 1, "idx": 2, "label": 3}),
            r"has the keys image, idx, label; .* takes x .*inputs=\{'x': 'image'\}",
        ),
        (lambda: ONE.split({"label": 3}), r"keys label; .*inputs=\{'x': 'key'\}"),
        (
            lambda: Binding(ONE.call, inputs="imag").split({"image": 1}),
            "inputs='imag', but the batch has the keys image. Did you mean 'image'",
        ),
        (
            lambda: Binding(ONE.call, targets=["lable"]).split({"x": 1, "label": 2}),
            r"targets=\['lable'\], but .* keys x, label. Did you mean 'label'",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(DataError, match=message):
        call()


def test_inputs_must_name_parameters_of_the_call():
    with pytest.raises(ValueError, match=r"parameter 'imagez', .* takes image\. Did"):
        Binding(CallSpec(("image",), (), ("image",)), inputs={"imagez": "x"})


@pytest.mark.parametrize(
    ("binding", "raw", "unused"),
    [
        (ONE, (1, 2), ()),
        (ONE, Batch((1,), 2, None), ()),
        (ONE, {"image": 1, "label": 2}, ()),
        (
            OPTIONAL,
            {"input_ids": 1, "label": 2, "idx": 3, "sample_weight": 4, "id": 5},
            ("idx", "id"),
        ),
        (OPTIONAL, {"tokens": 1, "attention_mask": 4}, ()),
        (KWARGS, {"p": 1, "idx": 2}, ()),
        (Binding(ONE.call, inputs="image"), {"image": 1, "p": 2}, ("p",)),
        (Binding(ONE.call, inputs=lambda raw: raw["image"]), {"image": 1, "p": 2}, ()),
    ],
)
def test_unused(binding, raw, unused):
    assert binding.unused(raw) == unused


@pytest.mark.parametrize(
    ("binding", "x", "message"),
    [
        (
            OPTIONAL,
            {"input_ids": 1, "attention_maks": 4},
            r"x has the keys input_ids, attention_maks, .* takes input_ids, "
            r"attention_mask and has no 'attention_maks'\. Did you mean "
            r"'attention_mask'\? .*inputs=\['input_ids'\]",
        ),
        (ONE, {"x": 1, "z": 2}, r"takes x and has no 'z'\. Rename"),
    ],
)
def test_a_dict_of_inputs_holds_nothing_else(binding, x, message):
    for raw in ((x, 3), (x, 3, 4), (x,)):
        with pytest.raises(DataError, match=message):
            binding.split(raw)
    chosen = Binding(binding.call, inputs=[next(iter(x))])
    assert chosen.split((x, 3)).inputs == {next(iter(x)): 1}
