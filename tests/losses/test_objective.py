"""The total loss over a model's outputs: which terms there are, and their means."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import ShapeDtypeStruct

from flaxfit import DataError, DetectionError, Loss
from flaxfit.losses.objective import (
    Objective,
    Term,
    check_targets,
    check_weights,
    path_name,
    resolve_objective,
)

ROWS = 4
LOGITS = ShapeDtypeStruct((ROWS, 3), jnp.float32)
LABELS = ShapeDtypeStruct((ROWS,), jnp.int32)
VALUES = ShapeDtypeStruct((ROWS, 1), jnp.float32)
CROSS_ENTROPY = "softmax_cross_entropy_with_integer_labels"


def resolve(loss="auto", outputs=LOGITS, targets=LABELS, loss_weights=None):
    return resolve_objective(loss, loss_weights, outputs, targets, ROWS)


# ---------------------------------------------------------------------- which terms


@pytest.mark.parametrize(
    ("outputs", "targets", "name"),
    [
        (LOGITS, LABELS, CROSS_ENTROPY),
        (
            VALUES,
            ShapeDtypeStruct((ROWS, 1), jnp.int32),
            "sigmoid_binary_cross_entropy",
        ),
        (VALUES, VALUES, "squared_error"),
    ],
)
def test_auto_follows_the_targets(outputs, targets, name):
    objective = resolve(outputs=outputs, targets=targets)
    assert (objective.name, objective.single) == (name, True)
    assert objective.log_names == () and not objective.scalar_loss


def test_auto_refuses_what_no_rule_fits():
    with pytest.raises(DetectionError):
        resolve(outputs=LOGITS, targets=VALUES)


def test_a_loss_per_output_is_named_and_scaled():
    objective = resolve(
        {"a": CROSS_ENTROPY, "b": "mse"},
        {"a": LOGITS, "b": VALUES},
        {"a": LABELS, "b": VALUES},
        {"b": np.float32(0.5)},
    )
    assert objective.name == f"a: {CROSS_ENTROPY} + 0.5 b: squared_error"
    assert objective.log_names == ("a_loss", "b_loss")
    assert objective.scales == {"a": 1.0, "b": 0.5}
    assert objective.loss_at(("b",)).name == "squared_error"
    assert objective.loss_at(("c",)) is None
    assert objective.loss_around(("a", "inner")).name == CROSS_ENTROPY


def test_none_leaves_sown_losses_alone():
    objective = resolve(None)
    assert objective.terms == () and objective.name == "none"


def test_a_scalar_function_is_known_as_one():
    def mean(outputs, targets):
        return jnp.mean(outputs) + 0 * jnp.sum(targets)

    assert resolve(mean).scalar_loss


@pytest.mark.parametrize(
    ("loss", "loss_weights", "error", "match"),
    [
        ({"a": None, "b": None}, None, ValueError, "no loss for any output"),
        ({"a": CROSS_ENTROPY, "c": "mse"}, None, ValueError, "c"),
        ({"a": CROSS_ENTROPY, "b": "mse"}, 0.5, ValueError, "one number"),
        ({"a": CROSS_ENTROPY, "b": "mse"}, [1.0], ValueError, "1 loss_weights for 2"),
        ({"a": CROSS_ENTROPY, "b": "mse"}, {"c": 1.0}, ValueError, "c"),
        ({"a": CROSS_ENTROPY, "b": "mse"}, {"b": "half"}, TypeError, "half"),
    ],
)
def test_what_cannot_be_paired_is_an_error(loss, loss_weights, error, match):
    outputs, targets = {"a": LOGITS, "b": VALUES}, {"a": LABELS, "b": VALUES}
    with pytest.raises(error, match=match):
        resolve(loss, outputs, targets, loss_weights)


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (lambda outputs, targets: outputs.sum(axis=0), "one value per example"),
        (
            lambda outputs, targets: outputs[:, 0][None] - targets[:, None],
            "every target",
        ),
        (lambda outputs, targets: targets, "real numbers"),
    ],
)
def test_a_function_of_the_wrong_shape_is_an_error(loss, match):
    with pytest.raises(ValueError, match=match):
        resolve(loss)


@pytest.mark.parametrize("name", ["val_a", "a"])
def test_names_that_the_logs_have_already_are_an_error(name):
    outputs = {name: VALUES, ("a_loss" if name == "a" else "b"): VALUES}
    if name == "a":
        outputs = {"a": {"b": VALUES}, "a_b": VALUES}
    with pytest.raises(ValueError, match="would be logged as"):
        resolve("mse", outputs, outputs)


# -------------------------------------------------------------------- what they give


def test_means_are_weighted_and_unscaled():
    rng = np.random.default_rng(0)
    outputs = {"a": rng.normal(size=(ROWS, 3)), "b": rng.normal(size=(ROWS, 2))}
    targets = {"a": np.array([0, 2, 1, 1]), "b": rng.normal(size=(ROWS, 2))}
    weights = np.array([1.0, 0.0, 2.0, 0.5], np.float32)
    terms = (
        Term(("a",), Loss(CROSS_ENTROPY), 1.0),
        Term(("b",), Loss("squared_error"), 3.0),
    )
    means = Objective(terms).term_averages(
        {n: jnp.asarray(v) for n, v in outputs.items()},
        {n: jnp.asarray(v) for n, v in targets.items()},
        jnp.asarray(weights),
    )
    logits = outputs["a"]
    log_sums = np.log(np.exp(logits).sum(axis=1))
    a = log_sums - logits[np.arange(ROWS), targets["a"]]
    b = ((outputs["b"] - targets["b"]) ** 2).mean(axis=1)
    for name, losses in (("a", a), ("b", b)):
        expected = weights @ losses / weights.sum()
        assert float(means[name].compute()) == pytest.approx(expected, rel=1e-5)


def test_ignored_labels_have_no_weight():
    loss = Loss(CROSS_ENTROPY, ignore_label=-100)
    objective = Objective((Term((), loss, 1.0),))
    labels = jnp.array([0, -100, 1, -100])
    logits = jnp.zeros((ROWS, 3)).at[1].set(jnp.nan)
    mean = objective.term_averages(logits, labels, jnp.ones(ROWS))[""]
    assert float(mean.compute()) == pytest.approx(np.log(3), rel=1e-6)
    assert float(mean.count) == 2
    weights = objective.objective_weights((), labels, jnp.ones(ROWS))
    np.testing.assert_array_equal(weights, [1, 0, 1, 0])


def test_one_array_of_targets_serves_all_outputs():
    terms = tuple(Term((name,), Loss("mse"), 1.0) for name in "ab")
    outputs = {"a": jnp.zeros((ROWS, 1)), "b": jnp.ones((ROWS, 1))}
    means = Objective(terms).term_averages(outputs, jnp.ones((ROWS, 1)), jnp.ones(ROWS))
    assert {n: float(m.compute()) for n, m in means.items()} == {"a": 1.0, "b": 0.0}


def test_a_scalar_loss_counts_rows():
    term = Term((), Loss(lambda outputs, targets: jnp.mean(outputs)), 1.0, True)
    mean = Objective((term,)).term_averages(
        jnp.full((ROWS, 2), 3.0), jnp.zeros(ROWS), jnp.ones(ROWS)
    )[""]
    assert (float(mean.compute()), float(mean.count)) == (3.0, ROWS)


def test_weights_with_an_axis_too_many_are_an_error():
    check_weights((4, 3), (4,), "the loss mse")
    with pytest.raises(ValueError, match=r"\[4, 3\].*the loss mse.*\[4\]"):
        check_weights((4,), (4, 3), "the loss mse")
    objective = Objective((Term((), Loss(CROSS_ENTROPY), 1.0),))
    with pytest.raises(ValueError, match=r"\[4, 3\] do not fit the loss"):
        objective.term_averages(
            jnp.zeros((ROWS, 3)), jnp.zeros(ROWS, jnp.int32), jnp.ones((ROWS, 3))
        )


def test_labels_out_of_range_and_nan_are_found():
    objective = resolve()
    check_targets(objective, LOGITS, np.array([0, 1, 2, 2]))
    with pytest.raises(DataError, match="hold 3 at row 1"):
        check_targets(objective, LOGITS, np.array([0, 3, 2, 2]))
    objective = resolve(outputs=VALUES, targets=VALUES)
    values = np.array([[0.0], [1.0], [np.nan], [2.0]], np.float32)
    with pytest.raises(DataError, match="row 2"):
        check_targets(objective, VALUES, values)


def test_path_name():
    assert [path_name(p) for p in ((), ("a",), ("a", 0))] == ["", "a", "a_0"]
