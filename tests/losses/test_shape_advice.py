"""The table of advice: every row is reached, and what fits gets none."""

import jax
import numpy as np
import pytest

from flaxfit.losses.shape_advice import advise


def shaped(shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, np.dtype(dtype))


@pytest.mark.parametrize(
    ("kind", "outputs", "targets", "expected", "write"),
    [
        (
            "integer",
            (8, 1),
            ((8,), "int32"),
            "no classes to choose from",
            "sigmoid_bin",
        ),
        ("integer", (8, 3), ((8, 1), "int32"), "one axis too many", "y[:, 0]"),
        ("integer", (8, 2, 3), ((8, 2, 1), "int32"), "one axis", "y.squeeze(-1)"),
        ("integer", (8, 3), ((8, 3), "int32"), "one-hot", "softmax_cross_entropy"),
        ("integer", (8, 4, 3), ((8, 5), "int32"), "shape [8, 4] are expected", ""),
        ("integer", (8, 3), ((8,), "float32"), "integers", "y.astype('int32')"),
        ("auto", (8, 3), ((8,), "float32"), "", "y.astype('int32') if"),
        ("auto", (8, 3), ((8, 3), "int32"), "one-hot or several", "sigmoid_binary"),
        ("regression", (8, 3), ((8, 3), "complex64"), "complex outputs", "y.real"),
        ("distribution", (8, 3), ((8,), "int32"), "integer label", "_integer_labels"),
        ("binary", (8, 1), ((8,), "int32"), "", "y[:, None], or"),
        ("binary", (8, 4, 1), ((8, 4), "int32"), "", "y[..., None], or"),
        ("regression", (8,), ((8, 1), "float32"), "", "y[:, 0]"),
        ("regression", (8, 3), ((8, 4), "float32"), "element by element", ""),
        ("vector", (8, 3), ((8, 4), "float32"), "vector by vector", ""),
    ],
)
def test_advice(kind, outputs, targets, expected, write):
    advice = advise(kind, shaped(outputs), shaped(*targets))
    assert expected in advice.expected and write in advice.write
    assert bool(advice.write) == bool(write)


@pytest.mark.parametrize(
    ("kind", "outputs", "targets"),
    [
        ("integer", (8, 3), ((8,), "uint8")),
        ("distribution", (8, 3), ((8, 3), "float32")),
        ("binary", (8, 1), ((8, 1), "bool")),
        ("auto", (8, 3), ((8, 4), "float32")),
    ],
)
def test_no_advice(kind, outputs, targets):
    assert advise(kind, shaped(outputs), shaped(*targets)) is None
