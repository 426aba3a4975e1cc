import dataclasses
import functools
import math
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxfit._core.errors import DataError, DetectionError
from flaxfit.losses.loss import Loss
from flaxfit.losses.objective import Objective, check_targets, resolve_objective

INTEGER = "softmax_cross_entropy_with_integer_labels"


class PairTuple(NamedTuple):
    logits: Any
    value: Any


class PairStruct(flax.struct.PyTreeNode):
    logits: Any
    value: Any
    temperature: float = flax.struct.field(pytree_node=False, default=1.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class PairDataclass:
    logits: Any
    value: Any


def shaped(shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, np.dtype(dtype))


def resolve(loss, outputs, targets, loss_weights=None):
    rows = jax.tree.leaves(outputs if targets is None else targets)[0].shape[0]
    return resolve_objective(loss, loss_weights, outputs, targets, rows)


def ones(rows):
    return jnp.ones(rows, jnp.float32)


@pytest.mark.parametrize(
    ("name", "outputs", "targets"),
    [
        ("absolute_error", (4, 3), "float32"),
        ("binary_dice_loss", (4, 3), "float32"),
        ("cosine_distance", (4, 3), "float32"),
        ("dice_loss", (4, 3), "float32"),
        ("generalized_kl_divergence", (4, 3), "float32"),
        ("hinge_loss", (4, 3), "float32"),
        ("huber_loss", (4, 3), "float32"),
        ("kl_divergence", (4, 3), "float32"),
        ("kl_divergence_with_log_targets", (4, 3), "float32"),
        ("l2_loss", (4, 3), "float32"),
        ("log_cosh", (4, 3), "float32"),
        ("multiclass_hinge_loss", (4, 3), "int32"),
        ("multiclass_perceptron_loss", (4, 3), "int32"),
        ("multiclass_sparsemax_loss", (4, 3), "int32"),
        ("perceptron_loss", (4, 3), "float32"),
        ("poly_loss_cross_entropy", (4, 3), "float32"),
        ("safe_softmax_cross_entropy", (4, 3), "float32"),
        ("sigmoid_binary_cross_entropy", (4, 3), "float32"),
        ("sigmoid_focal_loss", (4, 3), "float32"),
        ("softmax_cross_entropy", (4, 3), "float32"),
        (INTEGER, (4, 3), "int32"),
        ("sparsemax_loss", (4, 3), "float32"),
        ("squared_error", (4, 3), "float32"),
    ],
)
def test_named_losses_are_optax_s(name, outputs, targets):
    rng = np.random.default_rng(0)
    o = jnp.asarray(rng.normal(size=outputs), jnp.float32)
    t = rng.integers(0, 2, outputs[:1] if targets == "int32" else outputs)
    t = jnp.asarray(t, targets)
    objective = resolve(name, o, t)
    expected = (
        jnp.abs(o - t)
        if name == "absolute_error"
        else getattr(optax.losses, name)(o, t)
    )
    mean = objective.term_averages(o, t, ones(4))[""].compute()
    np.testing.assert_allclose(mean, expected.mean(), rtol=1e-6)
    assert objective.name == name


def test_every_loss_of_optax_has_a_name_or_is_refused():
    known = 0
    for name in vars(optax.losses):
        if name.startswith("_") or not callable(getattr(optax.losses, name)):
            continue
        try:
            Loss(name)
            known += 1
        except ValueError as err:
            assert "does not return one value per example" in str(err)
            refused = ("ctc", "make_", "ntxent", "smooth", "triplet", "multiclass_gen")
            assert name.startswith(refused)
    assert known >= 24


def test_ranking_softmax_is_per_element():
    o = jnp.arange(12, dtype=jnp.float32).reshape(4, 3)
    t = jnp.ones((4, 3), jnp.float32)
    mean = resolve("ranking_softmax_loss", o, t).term_averages(o, t, ones(4))[""]
    np.testing.assert_allclose(
        mean.compute(), optax.losses.ranking_softmax_loss(o, t), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("mse", "squared_error"),
        ("MSE", "squared_error"),
        ("mean_squared_error", "squared_error"),
        ("mae", "absolute_error"),
        ("bce", "sigmoid_binary_cross_entropy"),
        ("categorical_crossentropy", "softmax_cross_entropy"),
        ("sparse_categorical_crossentropy", INTEGER),
        ("huber", "huber_loss"),
        ("kld", "kl_divergence"),
        ("hinge", "hinge_loss"),
        ("cosine_similarity", "cosine_distance"),
    ],
)
def test_keras_names(alias, name):
    assert Loss(alias).name == name


def test_mse_is_not_halved_and_l2_is():
    o, t = jnp.full((2, 1), 3.0), jnp.zeros((2, 1))
    assert Loss("mse").values(o, t).tolist() == [[9.0], [9.0]]
    assert Loss("l2_loss").values(o, t).tolist() == [[4.5], [4.5]]


def test_a_function_of_optax_is_known_by_identity():
    loss = Loss(optax.softmax_cross_entropy_with_integer_labels)
    assert loss.integer_targets and loss.name == INTEGER
    assert Loss(functools.partial(optax.losses.huber_loss, delta=2.0)).threshold == 0.5
    assert Loss(functools.partial(max, key=len)).name == "max"
    assert Loss(optax.losses.squared_error).name == "squared_error"


def test_properties():
    integer, binary = Loss(INTEGER), Loss("bce")
    assert (integer.num_classes((8, 10)), binary.num_classes((8, 1))) == (10, None)
    assert integer.chance_loss((8, 10)) == pytest.approx(math.log(10))
    assert binary.chance_loss((8, 1)) == pytest.approx(math.log(2))
    assert Loss("mse").chance_loss((8, 1)) is None
    thresholds = [Loss(n).threshold for n in (INTEGER, "bce", "hinge", "mse")]
    assert thresholds == [None, 0.0, 0.0, 0.5]
    assert Loss(lambda o, t: o).threshold is None
    assert Loss("mse", threshold=None).threshold is None
    assert Loss(lambda o, t: o, name="mine").name == "mine"
    assert dataclasses.replace(integer, ignore_label=-1) == Loss(
        INTEGER, ignore_label=-1
    )
    assert hash(Loss("mse")) == hash(Loss("mse"))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Loss("squared_eror"), ValueError, "Did you mean 'squared_error'"),
        (lambda: Loss("ctc_loss"), ValueError, "Pass a function that calls it"),
        (lambda: Loss(3), TypeError, r"not int\. Write Loss"),
        (lambda: Loss("mse", label_smoothing=0.1), ValueError, "not for squared_error"),
        (lambda: Loss(INTEGER, label_smoothing=1.0), ValueError, r"=1.0.*\[0, 1\)"),
        (lambda: Loss(INTEGER, ignore_label=0.5), TypeError, "ignore_label=-100"),
    ],
)
def test_wrong_losses(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_label_smoothing():
    rng = np.random.default_rng(1)
    o = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    labels = jnp.asarray([0, 1, 2, 1])
    hot = jax.nn.one_hot(labels, 3)
    expected = optax.softmax_cross_entropy(o, hot * 0.9 + 0.1 / 3)
    smooth = Loss(INTEGER, label_smoothing=0.1).values(o, labels)
    np.testing.assert_allclose(smooth, expected, rtol=1e-6)
    smooth = Loss("softmax_cross_entropy", label_smoothing=0.1).values(o, hot)
    np.testing.assert_allclose(smooth, expected, rtol=1e-6)
    expected = optax.sigmoid_binary_cross_entropy(o, hot * 0.9 + 0.05)
    np.testing.assert_allclose(
        Loss("bce", label_smoothing=0.1).values(o, hot), expected, rtol=1e-6
    )


def test_ignored_labels_count_nothing_and_give_no_nan_gradient():
    loss = Loss(INTEGER, ignore_label=-100)
    o = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)), jnp.float32)
    t = jnp.asarray([[1, -100, 4], [-100, 0, -100]])
    objective = resolve(loss, o, t)

    def mean(o):
        average = objective.term_averages(o, t, jnp.asarray([1.0, 2.0]))[""]
        return average.total / average.count

    value, gradient = jax.value_and_grad(mean)(o)
    kept = np.asarray([[0, 0, 1], [0, 2, 2]]).T
    log = jax.nn.log_softmax(o)
    each = [-log[0, 0, 1], -log[0, 2, 4], -log[1, 1, 0]]
    np.testing.assert_allclose(value, np.dot([1, 1, 2], each) / 4, rtol=1e-6)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient[0, 1]).max() == 0 and len(kept) == 3
    spread = objective.objective_weights((), t, jnp.asarray([1.0, 2.0]))
    assert spread.tolist() == [[1, 0, 1], [0, 2, 0]]


def test_an_ignored_label_outside_the_dtype_ignores_nothing():
    t = jnp.asarray([3, 255], jnp.uint8)
    assert Loss(INTEGER, ignore_label=-1).weights(t, ones(2)).tolist() == [1, 1]
    assert Loss(INTEGER, ignore_label=255).weights(t, ones(2)).tolist() == [1, 0]


def test_small_floats_are_raised_and_labels_cast():
    o = jnp.ones((2, 3), jnp.bfloat16)
    assert Loss("mse").values(o, jnp.ones((2, 3), jnp.bfloat16)).dtype == jnp.float32
    assert Loss("bce").values(o, jnp.ones((2, 3), bool)).dtype == jnp.float32
    assert Loss(INTEGER).values(o, jnp.asarray([True, False])).shape == (2,)


@pytest.mark.parametrize(
    ("outputs", "targets", "name"),
    [
        (shaped((8, 10)), shaped((8,), "int64"), INTEGER),
        (shaped((8, 5, 10)), shaped((8, 5), "uint8"), INTEGER),
        (shaped((8, 2)), shaped((8,), "bool"), INTEGER),
        (shaped((8, 1)), shaped((8, 1), "int32"), "sigmoid_binary_cross_entropy"),
        (shaped((8,)), shaped((8,), "bool"), "sigmoid_binary_cross_entropy"),
        (shaped((8, 3)), shaped((8, 3), "float64"), "squared_error"),
        (shaped((8, 3), "complex64"), shaped((8, 3), "complex64"), "squared_error"),
        (
            {"logits": shaped((8, 3)), "h": shaped((8, 7))},
            shaped((8,), "int32"),
            INTEGER,
        ),
        ({"y": shaped((8, 3))}, shaped((8, 3)), "squared_error"),
    ],
)
def test_auto(outputs, targets, name):
    objective = resolve("auto", outputs, targets)
    assert objective.single and objective.name == name
    assert objective.log_names == () and objective.scales == {"": 1.0}


def test_auto_takes_nested_outputs_term_by_term():
    outputs = {"a": shaped((8, 3)), "b": shaped((8, 1))}
    targets = {"a": shaped((8,), "int32"), "b": shaped((8, 1))}
    objective = resolve("auto", outputs, targets)
    assert objective.name == f"a: {INTEGER} + b: squared_error"
    pair = resolve("auto", (outputs["a"], outputs["b"]), (targets["a"], targets["b"]))
    assert [term.path for term in pair.terms] == [(0,), (1,)]
    assert pair.log_names == ("0_loss", "1_loss")


def test_complex_squared_error_is_real():
    o = jnp.asarray([[1 + 2j]], jnp.complex64)
    values = Loss("mse").values(o, jnp.zeros((1, 1), jnp.complex64))
    assert values.dtype == jnp.float32 and values.tolist() == [[5.0]]


@pytest.mark.parametrize(
    ("loss", "outputs", "targets", "match"),
    [
        ("auto", (8, 10), ((8, 1), "int32"), r"Write y\[:, 0\]"),
        ("auto", (8, 1), ((8,), "int32"), r"Write y\[:, None\]"),
        ("auto", (8, 1), ((8,), "float32"), r"outputs.squeeze\(-1\)"),
        ("auto", (8,), ((8, 1), "float32"), r"Write y\[:, 0\]"),
        ("auto", (8, 4, 1), ((8, 4), "float32"), r"y\[\.\.\., None\]"),
        ("auto", (8, 10), ((8,), "float32"), r"y.astype\('int32'\)"),
        ("auto", (8, 3), ((8, 3), "int32"), "one-hot.*sigmoid_binary_cross_entropy"),
        ("auto", (8, 3), ((8, 4), "float32"), "finds no loss"),
        (INTEGER, (8, 10), ((8,), "float32"), r"y.astype\('int32'\)"),
        (INTEGER, (8, 10), ((8, 10), "float32"), "softmax_cross_entropy"),
        (INTEGER, (8, 1), ((8,), "int32"), "sigmoid_binary_cross_entropy"),
        (INTEGER, (8, 4, 9), ((8, 5), "int32"), r"shape \[8, 4\] are expected"),
        ("bce", (8, 1), ((8,), "float32"), r"y\[:, None\]"),
        ("softmax_cross_entropy", (8, 3), ((8,), "int32"), INTEGER),
        ("mse", (8, 3), ((8, 4), "float32"), "element by element"),
        ("mse", (8, 3), ((8, 3), "complex64"), "Write y.real"),
        ("cosine_distance", (8, 3), ((8, 4), "float32"), "vector by vector"),
    ],
)
def test_shapes_that_do_not_fit(loss, outputs, targets, match):
    with pytest.raises(ValueError, match=match):
        resolve(loss, shaped(outputs), shaped(*targets))


def test_auto_refuses():
    pair = {"a": shaped((8, 3)), "b": shaped((8, 3))}
    with pytest.raises(DetectionError, match=r"no targets.*loss=None"):
        resolve("auto", shaped((8, 3)), None)
    with pytest.raises(ValueError, match="no targets for loss='squared_error'"):
        resolve("mse", shaped((8, 3)), None)
    with pytest.raises(DetectionError, match=r"loss={'a': 'auto', 'b': None}"):
        resolve("auto", pair, shaped((8, 3)))
    with pytest.raises(DetectionError, match=r"loss=\['auto', None\]"):
        resolve("auto", tuple(pair.values()), shaped((8, 3)))
    with pytest.raises(DetectionError, match="finds no loss"):
        resolve("auto", shaped((8, 3)), pair)


def test_several_losses_with_weights():
    outputs = {k: jnp.full((4, 2), i + 1.0) for i, k in enumerate("abc")}
    targets = {k: jnp.zeros((4, 2)) for k in "abc"}
    objective = resolve(
        {"a": "mse", "b": None, "c": Loss("mae")}, outputs, targets, {"c": 0.5}
    )
    assert objective.name == "a: squared_error + 0.5 c: absolute_error"
    assert objective.log_names == ("a_loss", "c_loss")
    assert objective.scales == {"a": 1.0, "c": 0.5}
    means = objective.term_averages(outputs, targets, ones(4))
    assert {k: float(v.compute()) for k, v in means.items()} == {"a": 1.0, "c": 3.0}
    listed = resolve(
        ["mse", "mae"], (outputs["a"], outputs["b"]), (targets["a"],) * 2, [1, 3]
    )
    assert listed.scales == {"0": 1.0, "1": 3.0}


def test_one_target_serves_several_outputs():
    outputs = (jnp.ones((4, 2)), jnp.zeros((4, 2)))
    objective = resolve("mse", outputs, jnp.zeros((4, 2)))
    means = objective.term_averages(outputs, jnp.zeros((4, 2)), ones(4))
    assert [float(m.compute()) for m in means.values()] == [1.0, 0.0]


def named(source, wanted):
    """Makes a function with arguments of these names."""
    return eval(f"lambda {source}: {wanted}")


@pytest.mark.parametrize(
    "arguments",
    ["y_true, y_pred", "labels, x", "target, o", "y, p", "x, logits", "t, y_hat"],
)
def test_a_function_with_keras_s_order_is_refused(arguments):
    first, second = arguments.split(", ")
    match = rf"takes \({first}, {second}\).*lambda outputs, targets: f\(targets, outp"
    with pytest.raises(TypeError, match=match):
        Loss(named(arguments, f"{first} - {second}"))


def test_a_partial_and_an_object_with_keras_s_order_are_refused():
    def mine(y_true, y_pred, scale):
        return scale * (y_true - y_pred)

    class Mine:
        def __call__(self, y_true, y_pred):
            return y_true - y_pred

    with pytest.raises(TypeError, match=r"The loss mine takes.*mine\(targets, outputs"):
        Loss(functools.partial(mine, scale=2.0))
    with pytest.raises(TypeError, match="The loss Mine takes"):
        Loss(Mine())


@pytest.mark.parametrize(
    "arguments",
    ["outputs, targets", "logits, labels", "y_pred, y_true", "y, t", "y, _", "a, b"],
)
def test_a_function_with_optax_s_order_is_taken(arguments):
    loss = Loss(named(arguments, arguments.split(", ")[0]))
    assert loss.kind == "custom" and loss.threshold is None


def test_the_names_of_losses_in_the_logs_are_their_own():
    a = shaped((4, 2))
    for outputs in ({"val": a, "b": a}, {"val_x": a, "b": a}):
        with pytest.raises(
            ValueError, match=r"as 'val.*_loss', a name reserved .*'my_val"
        ):
            resolve("mse", outputs, outputs)
    fine = {"value": a, "b": a}
    assert resolve("mse", fine, fine).log_names == ("value_loss", "b_loss")
    twice = {"a": {"b": a}, "a_b": a}
    with pytest.raises(
        ValueError, match="'a_b_loss', as would the loss of another output"
    ):
        resolve("mse", twice, twice)


def test_the_batch_of_outputs_with_another_first_axis():
    def of_ensemble(outputs, targets):
        return jnp.square(outputs - targets[None, :, None]).mean((0, 2))

    outputs, targets = jnp.full((3, 8, 2), 2.0), jnp.zeros(8)
    objective = resolve(of_ensemble, outputs, targets)
    assert not objective.scalar_loss
    weights = jnp.asarray([1.0] * 4 + [0.0] * 4)
    average = objective.term_averages(outputs, targets, weights)[""]
    assert (average.total, average.count) == (16.0, 4.0)
    with pytest.raises(ValueError, match=r"float32\[3,2\] for a batch of 8"):
        resolve(lambda o, t: o.mean(1), outputs, targets)


@pytest.mark.parametrize("kind", [PairTuple, PairStruct, PairDataclass])
def test_outputs_of_a_class_go_by_their_fields_names(kind):
    o = kind(logits=jnp.ones((4, 3)), value=jnp.ones((4, 2)))
    y = jnp.zeros(4, jnp.int32)
    assert resolve("auto", o, y).terms[0].path == ("logits",)
    assert resolve({"logits": INTEGER}, o, y).terms[0].path == ("logits",)
    targets = {"logits": y, "value": jnp.zeros((4, 2))}
    both = resolve("auto", o, targets, {"value": 0.5})
    assert both.log_names == ("logits_loss", "value_loss")
    means = both.term_averages(o, targets, ones(4))
    assert float(means["value"].compute()) == 1.0
    assert resolve("auto", o, kind(**targets)).log_names == both.log_names
    with pytest.raises(ValueError, match="Did you mean 'logits'"):
        resolve({"logit": INTEGER}, o, y)
    with pytest.raises(DetectionError, match="in a dict of the same names"):
        resolve("auto", o, (y, targets["value"]))


@pytest.mark.parametrize(
    "two", [np.float32(2), np.int64(2), np.asarray(2.0), jnp.float32(2)]
)
def test_loss_weights_are_numbers_of_any_library(two):
    o, t = shaped((4, 2)), shaped((4, 2))
    assert resolve("mse", o, t, two).scales == {"": 2.0}
    pair = {"a": o, "b": o}
    assert resolve("mse", pair, pair, {"a": two}).scales == {"a": 2.0, "b": 1.0}
    listed = resolve("mse", (o, o), (t, t), np.asarray([1, 2]))
    assert listed.scales == {"0": 1.0, "1": 2.0}
    with pytest.raises(TypeError, match=r"holds '2' for one loss\. Write a number"):
        resolve("mse", pair, pair, {"a": "2"})


@pytest.mark.parametrize(
    ("loss", "weights", "match"),
    [
        ({"a": "mse", "bb": "mse"}, None, "no output 'bb'.*outputs are"),
        ({"aa": "mse"}, None, "Did you mean"),
        (["mse", "mse"], None, "nest the losses like it"),
        ({"a": None}, None, "no loss for any output"),
        ({"a": "mse"}, {"c": 1.0}, "no output 'c' for this loss weight"),
        ("mse", 0.5, "one number for several outputs"),
        ("mse", [1.0], "1 loss_weights for 2 outputs"),
    ],
)
def test_losses_that_do_not_fit_the_outputs(loss, weights, match):
    outputs = {"aaa" if "aa" in str(loss) else "a": shaped((4, 2)), "b": shaped((4, 2))}
    with pytest.raises(ValueError, match=match):
        resolve(loss, outputs, shaped((4, 2)), weights)


def test_losses_and_targets_nested_differently():
    array = shaped((4, 2))
    with pytest.raises(ValueError, match=r"for a single loss\. Write one number"):
        resolve("mse", array, array, {"a": 1.0})
    with pytest.raises(ValueError, match="ignore_label of f needs one array"):
        mine = Loss(lambda o, t: o, ignore_label=0, name="f")
        resolve(mine, array, (array, array))
    with pytest.raises(DetectionError, match="Let the model return an array"):
        resolve("auto", object(), array)
    with pytest.raises(ValueError, match="is one array: give one loss"):
        resolve({"a": "mse"}, array, array)
    with pytest.raises(ValueError, match="1 losses for 2 outputs"):
        resolve(["mse"], (array, array), array)
    with pytest.raises(ValueError, match="no targets of output 'b'"):
        resolve("mse", {"a": array, "b": array}, {"a": array})
    with pytest.raises(ValueError, match="takes one array of targets"):
        resolve("mse", array, (array, array))


def test_none_is_an_objective_without_terms():
    objective = resolve(None, shaped((4, 2)), None)
    assert objective == Objective(()) and not objective.single
    assert objective.name == "none"
    assert objective.term_averages(jnp.ones((4, 2)), None, ones(4)) == {}


def test_a_function_takes_the_whole_outputs():
    def vae(outputs, targets):
        del targets
        return jnp.square(outputs[0] - outputs[1]).sum(-1)

    outputs = (jnp.ones((4, 2)), jnp.zeros((4, 2)))
    objective = resolve(vae, outputs, None)
    assert objective.single and objective.name == "vae" and not objective.scalar_loss
    assert objective.term_averages(outputs, None, ones(4))[""].compute() == 2.0


def test_a_scalar_loss_counts_rows():
    objective = resolve(lambda o, t: jnp.mean(o), shaped((4, 2)), shaped((4, 2)))
    assert objective.scalar_loss and objective.terms[0].scalar_loss
    average = objective.term_averages(jnp.full((3, 2), 2.0), jnp.ones((3, 2)), ones(3))
    assert (average[""].total, average[""].count) == (6.0, 3.0)


@pytest.mark.parametrize(
    ("loss", "error", "match"),
    [
        (lambda o, t: o[:2], ValueError, r"float32\[2,3\] for a batch of 8"),
        (lambda o, t: o + 1j, ValueError, "complex64.*real numbers"),
        (lambda o, t: (o, o), ValueError, "Return real numbers"),
        (lambda o, t: o @ o, TypeError, "dot_general"),
        (Loss(lambda o, t: o.mean(-1), ignore_label=0), ValueError, "value per target"),
    ],
)
def test_functions_that_are_no_loss(loss, error, match):
    with pytest.raises(error, match=match) as info:
        resolve(loss, shaped((8, 3)), shaped((8, 3), "int32"))
    if error is TypeError:
        assert "while tracing the loss" in "".join(info.value.__notes__)


def test_weights_with_more_axes_than_the_loss():
    o, t = jnp.ones((4, 3)), jnp.zeros(4, jnp.int32)
    with pytest.raises(ValueError, match=r"Weights of shape \[4, 3\] do not fit"):
        resolve(INTEGER, o, t).term_averages(o, t, jnp.ones((4, 3)))


@pytest.mark.parametrize(
    ("loss", "shape", "targets", "match"),
    [
        (
            INTEGER,
            (4, 10),
            [0, 3, 9, 10],
            "hold 10 at row 3; 10 outputs allow 0..9. Give the model 11",
        ),
        (INTEGER, (4, 3), [1, 2, 3, 1], "hold 3 at row 2.*Write y - 1"),
        (INTEGER, (4, 3), [1, -100, 2, 0], "ignore_label=-100"),
        (INTEGER, (3, 3), [0, 2, 255], "ignore_label=255"),
        (Loss(INTEGER, ignore_label=-1), (3, 3), [0, -1, 7], "hold 7 at row 2"),
        ("auto", (40, 1), np.arange(40)[:, None], "hold 2 at row 2.*loss='mse'"),
        ("auto", (2, 1), [[-7], [900]], "hold -7 at row 0.*loss='mse'"),
        ("bce", (3, 1), [[0], [2], [1]], "hold 2 at row 1.*y == positive"),
        ("bce", (2, 1), [[0], [200]], "Write y / 255"),
        ("bce", (2, 1), [[-1], [1]], r"Write \(y \+ 1\) / 2"),
        ("hinge", (2, 1), [[0], [1]], r"Write 2 \* y - 1"),
        ("mse", (2, 1), [[0.0], [float("nan")]], "NaN at row 1"),
    ],
)
def test_targets_out_of_range(loss, shape, targets, match):
    targets = np.asarray(targets)
    objective = resolve(loss, shaped(shape), targets)
    with pytest.raises(DataError, match=match):
        check_targets(objective, shaped(shape), targets)


def test_targets_in_range():
    for loss, shape, targets in (
        (Loss(INTEGER, ignore_label=-1), (3, 3), [0, -1, 2]),
        ("bce", (2, 1), [[0.25], [1.0]]),
        (Loss("bce", ignore_label=-1), (2, 1), [[-1], [1]]),
        ("hinge", (2, 1), [[-1], [1]]),
        ("mse", (2, 1), [[-7.0], [9.0]]),
        (INTEGER, (0, 3), np.zeros(0, int)),
        (lambda o, t: o, (2, 1), [[np.nan], [9.0]]),
    ):
        targets = np.asarray(targets)
        check_targets(resolve(loss, shaped(shape), targets), shaped(shape), targets)


def test_the_output_is_named_when_targets_are_out_of_range():
    outputs, targets = {"a": shaped((2, 3))}, {"a": np.asarray([0, 5])}
    with pytest.raises(DataError, match="targets of output 'a' hold 5 at row 1"):
        check_targets(resolve("auto", outputs, targets), outputs, targets)
