import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sklearn.metrics

from flaxfit.losses.loss import Loss
from flaxfit.losses.objective import resolve_objective
from flaxfit.metrics.accumulators import ClassRatio, RocCurve
from flaxfit.metrics.resolve import metric_direction, resolve_metrics

INTEGER = "softmax_cross_entropy_with_integer_labels"


def resolve(metrics, loss, outputs, targets):
    rows = jax.tree.leaves(outputs if targets is None else targets)[0].shape[0]
    objective = resolve_objective(loss, None, outputs, targets, rows)
    return resolve_metrics(metrics, objective, outputs, targets, rows)


def run(metrics, loss, outputs, targets, weights=None, batches=1):
    """Returns name -> value over the data, cut into batches of equal size."""
    if weights is None:
        weights = np.ones(len(jax.tree.leaves(targets)[0]), np.float32)
    data = jax.tree.map(jnp.asarray, (outputs, targets, weights))
    fns = resolve(metrics, loss, outputs, targets)
    step = jax.jit(lambda *data: {name: fn(*data) for name, fn in fns.items()})
    parts = jax.tree.map(lambda x: jnp.split(x, batches), data)
    cut = jax.tree.transpose(
        jax.tree.structure(data), jax.tree.structure([0] * batches), parts
    )
    logs = [step(*part) for part in cut]
    values = {}
    for name in fns:
        merged = logs[0][name]
        for log in logs[1:]:
            merged = merged.merge(log[name])
        values[name] = float(merged.compute())
    return values


def labels_data(classes=4, rows=60, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, classes)).astype("float32")
    y = rng.integers(0, classes, rows).astype("int32")
    weights = rng.integers(0, 3, rows).astype("float32")
    return logits, y, weights


def binary_data(rows=60, seed=0, scale=1.0, shift=0.0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, rows)
    scores = scale * (rng.normal(size=rows) + y) + shift
    weights = rng.integers(0, 3, rows).astype("float32")
    return scores.astype("float32")[:, None], y[:, None].astype("int32"), weights


def test_accuracy_and_top_k_equal_sklearn():
    logits, y, w = labels_data()
    got = run(["accuracy", "top_2_accuracy"], INTEGER, logits, y, w, batches=3)
    best = logits.argmax(-1)
    expected = sklearn.metrics.accuracy_score(y, best, sample_weight=w)
    assert got["accuracy"] == pytest.approx(expected, abs=1e-6)
    expected = sklearn.metrics.top_k_accuracy_score(y, logits, k=2, sample_weight=w)
    assert got["top_2_accuracy"] == pytest.approx(expected, abs=1e-6)


def test_one_hot_targets_read_like_labels():
    logits, y, w = labels_data()
    hot = np.eye(4, dtype="float32")[y]
    names = ["accuracy", "top_3_accuracy", "f1", "perplexity"]
    a = run(names, INTEGER, logits, y, w)
    b = run(names, "softmax_cross_entropy", logits, hot, w)
    assert a == pytest.approx(b, rel=1e-6)


def test_macro_precision_recall_f1_equal_sklearn():
    logits, y, w = labels_data()
    y[y == 3] = 2
    w[:5] = 0.0
    got = run(["precision", "recall", "f1"], INTEGER, logits, y, w, batches=4)
    kept, best = w > 0, logits.argmax(-1)
    expected = sklearn.metrics.precision_recall_fscore_support(
        y[kept], best[kept], average="macro", sample_weight=w[kept], zero_division=0
    )
    assert list(got.values()) == pytest.approx(expected[:3], abs=1e-6)


def test_a_class_never_seen_is_left_out():
    logits = np.eye(5, dtype="float32")[[0, 1, 1]]
    y = np.asarray([0, 1, 0], "int32")
    got = run(["precision"], INTEGER, logits, y)["precision"]
    assert got == pytest.approx((1 + 0.5) / 2)


@pytest.mark.parametrize(
    ("loss", "threshold", "positive"),
    [("bce", 0.0, (0, 1)), ("mse", 0.5, (0, 1)), ("hinge", 0.0, (-1, 1))],
)
def test_binary_metrics_at_the_threshold_of_the_loss(loss, threshold, positive):
    scores, y, w = binary_data()
    targets = np.where(y == 1, positive[1], positive[0]).astype("int32")
    names = ["binary_accuracy", "precision", "recall", "f1_score", "auc"]
    got = run(names, loss, scores, targets, w, batches=2)
    decided, y = (scores > threshold)[:, 0], y[:, 0]
    ratios = sklearn.metrics.precision_recall_fscore_support(
        y, decided, average="binary", sample_weight=w, zero_division=0
    )
    expected = [
        sklearn.metrics.accuracy_score(y, decided, sample_weight=w),
        *ratios[:3],
        sklearn.metrics.roc_auc_score(y, scores[:, 0], sample_weight=w),
    ]
    assert list(got.values()) == pytest.approx(expected, abs=1e-4)
    assert list(got) == names


def test_accuracy_of_a_sigmoid_loss_uses_logits():
    scores = np.asarray([[0.3], [-0.3], [0.7]], "float32")
    y = np.asarray([[1], [0], [0]])
    assert run("acc", "auto", scores, y)["acc"] == pytest.approx(2 / 3)
    high = Loss("bce", threshold=0.5)
    assert run("acc", high, scores, y)["acc"] == pytest.approx(1 / 3)


def on_probabilities(outputs, targets):
    clipped = jnp.clip(outputs, 1e-6, 1 - 1e-6)
    return -targets * jnp.log(clipped) - (1 - targets) * jnp.log1p(-clipped)


@pytest.mark.parametrize("metric", ["accuracy", "binary_accuracy", "precision", "f1"])
def test_nobody_guesses_the_threshold_of_a_function(metric):
    scores, y, w = binary_data()
    chances = np.asarray(jax.nn.sigmoid(scores))
    match = r"Write loss=Loss\(on_probabilities, threshold=0.0\) if .* threshold=0.5 if"
    with pytest.raises(ValueError, match=match):
        resolve(metric, on_probabilities, chances, y)
    told = Loss(on_probabilities, threshold=0.5)
    got = run(metric, told, chances, y, w)[metric]
    assert got == run(metric, "bce", scores, y, w)[metric]
    # The area under the curve needs no threshold.
    got = run("auc", on_probabilities, chances, y, w)["auc"]
    assert got == pytest.approx(run("auc", "bce", scores, y, w)["auc"], abs=1e-3)


def test_the_threshold_of_a_function_of_all_outputs():
    scores, y, _ = binary_data()
    outputs = {"p": np.asarray(jax.nn.sigmoid(scores)), "h": scores}

    def whole(outputs, targets):
        return on_probabilities(outputs["p"], targets)[:, 0]

    with pytest.raises(ValueError, match=r"Write loss=Loss\(whole, threshold=0.0\)"):
        resolve({"p": "accuracy"}, whole, outputs, y)
    got = run({"p": "accuracy"}, Loss(whole, threshold=0.5), outputs, y)
    assert got["p_accuracy"] == pytest.approx(((scores > 0) == y).mean(), rel=1e-6)


def test_a_ratio_of_nothing_is_zero():
    got = run("precision", "bce", np.full((3, 1), -1.0, "float32"), np.ones((3, 1)))
    assert got["precision"] == 0.0


@pytest.mark.parametrize(
    ("scale", "shift"), [(1, 0), (20, 0), (1e-2, 0), (1, 100), (0.1, 1), (50, -300)]
)
def test_auc_equals_sklearn_on_any_scale(scale, shift):
    scores, y, _ = binary_data(2000, scale=scale, shift=shift)
    roc = RocCurve.of(jnp.asarray(scores), jnp.asarray(y == 1), jnp.ones(y.shape))
    expected = sklearn.metrics.roc_auc_score(y[:, 0], scores[:, 0])
    assert float(roc.compute()) == pytest.approx(expected, abs=1e-3)


def test_auc_of_two_softmax_outputs_and_of_nan():
    logits, y, w = labels_data(classes=2)
    expected = sklearn.metrics.roc_auc_score(
        y, logits[:, 1] - logits[:, 0], sample_weight=w
    )
    assert run("auc", INTEGER, logits, y, w)["auc"] == pytest.approx(expected, abs=1e-3)
    hot = np.eye(2, dtype="float32")[y]
    got = run("auc", "softmax_cross_entropy", logits, hot, w)["auc"]
    assert got == pytest.approx(expected, abs=1e-3)
    logits[7] = np.nan
    w[7] = 1.0
    assert np.isnan(run("auc", INTEGER, logits, y, w)["auc"])
    w[7] = 0.0
    assert not np.isnan(run("auc", INTEGER, logits, y, w)["auc"])


def test_regression_metrics_equal_sklearn():
    rng = np.random.default_rng(0)
    o, t = rng.normal(size=(2, 12, 3)).astype("float32")
    w = rng.integers(0, 3, 12).astype("float32")
    got = run(["mae", "mse", "rmse"], "mse", o, t, w, batches=3)
    mae = sklearn.metrics.mean_absolute_error(t, o, sample_weight=w)
    mse = sklearn.metrics.mean_squared_error(t, o, sample_weight=w)
    assert got == pytest.approx({"mae": mae, "mse": mse, "rmse": mse**0.5}, rel=1e-5)


def test_perplexity_is_per_token_and_without_smoothing():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 6, 5)).astype("float32")
    y = rng.integers(0, 5, (4, 6)).astype("int32")
    y[0, 2:] = y[3] = -100
    loss = Loss(INTEGER, ignore_label=-100, label_smoothing=0.2)
    got = run(["perplexity", "accuracy"], loss, logits, y, batches=2)
    kept = y >= 0
    expected = np.exp(
        sklearn.metrics.log_loss(y[kept], jax.nn.softmax(logits[kept]), labels=range(5))
    )
    assert got["perplexity"] == pytest.approx(expected, rel=1e-5)
    correct = (logits.argmax(-1) == y)[kept].mean()
    assert got["accuracy"] == pytest.approx(correct, rel=1e-6)


def test_ignored_labels_do_not_reach_classes():
    logits, y, _ = labels_data()
    y[:20] = -1
    got = run(["f1"], Loss(INTEGER, ignore_label=-1), logits, y)
    expected = sklearn.metrics.f1_score(y[20:], logits[20:].argmax(-1), average="macro")
    assert got["f1"] == pytest.approx(expected, abs=1e-6)


def test_functions_and_their_names():
    def off_by(outputs, targets):
        return jnp.abs(outputs - targets)

    o, t = np.full((4, 2), 3, "float32"), np.ones((4, 2), "float32")
    w = np.asarray([1, 1, 0, 0], "float32")
    o[2:] = np.nan
    got = run([off_by, {"top": lambda o, t: o.max(-1) > 2}], "mse", o, t, w)
    assert got == {"off_by": 2.0, "top": 1.0}
    assert run([optax.losses.l2_loss], "mse", o, t, w) == {"l2_loss": 2.0}


def test_a_function_with_keras_s_order_is_refused():
    def gap(y_true, y_pred):
        return y_true - y_pred

    o = np.ones((4, 2), "float32")
    match = (
        r"The metric gap takes \(y_true, y_pred\).*Write "
        r"metrics=\{'gap': lambda outputs, targets: gap\(targets, outputs\)\}"
    )
    with pytest.raises(TypeError, match=match):
        resolve([gap], "mse", o, o)
    assert run({"gap": lambda o, t: gap(t, o)}, "mse", o, 3 * o) == {"gap": 2.0}


def test_the_batch_of_outputs_with_another_first_axis():
    def error(outputs, targets):
        return jnp.abs(outputs - targets[None, :]).mean(0)

    o, t = np.ones((3, 8), "float32"), np.zeros(8, "float32")
    assert run([error], error, o, t) == {"error": 1.0}


class Heads(flax.struct.PyTreeNode):
    logits: jax.Array
    value: jax.Array


@jax.tree_util.register_pytree_node_class
class Opaque:
    def __init__(self, *arrays):
        self.arrays = arrays

    def tree_flatten(self):
        return self.arrays, None

    @classmethod
    def tree_unflatten(cls, _, arrays):
        return cls(*arrays)


def test_outputs_of_a_class_go_by_their_fields_names():
    o = Heads(np.eye(3, dtype="float32"), np.ones((3, 2), "float32"))
    y = np.asarray([0, 1, 1])

    def whole(outputs, targets):
        return optax.softmax_cross_entropy_with_integer_labels(outputs.logits, targets)

    for loss in ("auto", whole, None):
        assert run("accuracy", loss, o, y)["accuracy"] == pytest.approx(2 / 3)
    targets = {"logits": y, "value": np.zeros((3, 2), "float32")}
    got = run({"logits": "acc", "value": ["mae"]}, "auto", o, targets)
    assert got == pytest.approx({"logits_acc": 2 / 3, "value_mae": 1.0})
    with pytest.raises(
        ValueError, match=r"the model returns Opaque\. Write a function"
    ):
        resolve("accuracy", lambda o, t: t * 1.0, Opaque(o.logits, o.value), y)
    with pytest.raises(ValueError, match=r"no targets of output 'logits'.*Nest"):
        resolve({"logits": "acc"}, lambda o, t: o.value[:, 0], o, (y, y))


def test_several_outputs():
    outputs = {"a": np.eye(3, dtype="float32"), "b": np.ones((3, 2), "float32")}
    targets = {"a": np.asarray([0, 1, 1]), "b": np.zeros((3, 2), "float32")}
    got = run({"a": ["accuracy", "f1"], "b": "mae"}, "auto", outputs, targets)
    assert list(got) == ["a_accuracy", "a_f1", "b_mae"]
    assert got["a_accuracy"] == pytest.approx(2 / 3) and got["b_mae"] == 1.0
    both = {"a": "mse", "b": "mse"}
    outputs["a"], targets["a"] = outputs["b"] * 2, targets["b"]
    got = run(["mae", {"gap": lambda o, t: o["a"] - o["b"]}], both, outputs, targets)
    assert got == {"a_mae": 2.0, "b_mae": 1.0, "gap": 1.0}
    got = run({"error": "mae"}, both, outputs, targets)
    assert list(got) == ["a_error", "b_error"]
    got = run({"b": optax.losses.squared_error}, both, outputs, targets)
    assert got == {"b_squared_error": 1.0}
    with pytest.raises(ValueError, match="'a_loss' is taken in the logs"):
        resolve({"a_loss": lambda o, t: o["a"]}, both, outputs, targets)


def test_an_output_named_logits_is_found():
    outputs = {"logits": np.eye(3, dtype="float32"), "h": np.ones((3, 2), "float32")}
    y = np.arange(3)
    assert run("accuracy", "auto", outputs, y) == {"accuracy": 1.0}

    def whole(outputs, targets):
        return optax.softmax_cross_entropy_with_integer_labels(
            outputs["logits"], targets
        )

    assert run("accuracy", whole, outputs, y) == {"accuracy": 1.0}
    assert run("accuracy", None, outputs, y) == {"accuracy": 1.0}


@pytest.mark.parametrize(
    ("metrics", "loss", "match"),
    [
        ("acuracy", "auto", "Did you mean 'accuracy'"),
        ("top_9_accuracy", "auto", "at least 9 classes"),
        ("mae", "auto", "it needs equal shapes"),
        ("auc", "auto", "is for two classes"),
        ("binary_accuracy", "auto", "equal shapes"),
        (lambda o, t: o, "auto", r"metrics=\{'my_name'"),
        ({"mine": lambda o, t: o.mean()}, "auto", r"float32\[\].*no mean over axis 0"),
        ({"mine": lambda o, t: o[:2]}, "auto", "for a batch of 6"),
        ({"mine": lambda o, t: o * 1j}, "auto", "one real value per example"),
        (["accuracy", "accuracy"], "auto", "'accuracy' is taken"),
        ({"loss": "accuracy"}, "auto", "'loss' is taken"),
        ({"val_acc": "accuracy"}, "auto", "'val_acc' is taken"),
        ("perplexity", lambda o, t: o[:, 0], "exponential of a softmax"),
    ],
)
def test_wrong_metrics(metrics, loss, match):
    outputs, targets = np.ones((6, 4), "float32"), np.ones(6, "int32")
    with pytest.raises(ValueError, match=match):
        resolve(metrics, loss, outputs, targets)


def test_wrong_metrics_for_the_loss():
    o, t = np.ones((6, 4), "float32"), np.ones((6, 4), "float32")
    with pytest.raises(ValueError, match=r"Write metrics=\['mae'\]"):
        resolve("accuracy", "mse", o, t)
    with pytest.raises(ValueError, match="needs a threshold"):
        resolve("binary_accuracy", "softmax_cross_entropy", o, t)
    with pytest.raises(ValueError, match="one-hot or several labels"):
        resolve("accuracy", lambda o, t: o, o, t)
    with pytest.raises(TypeError, match=r"not int\. Write metrics="):
        resolve(3, "mse", o, t)
    with pytest.raises(ValueError, match="needs targets"):
        resolve("accuracy", lambda o, t: o, o, None)
    pair = {"a": o, "b": o}
    with pytest.raises(ValueError, match=r"Write metrics=\{'a': 'mae'\}"):
        resolve("mae", lambda o, t: o["a"], pair, t)
    with pytest.raises(ValueError, match=r"and \['bb'\], which are not"):
        resolve({"a": "mae", "bb": "mae"}, "mse", pair, t)


def test_weights_with_more_axes_than_a_metric():
    logits, y, _ = labels_data()
    fn = resolve("accuracy", INTEGER, logits, y)["accuracy"]
    with pytest.raises(ValueError, match="do not fit the metric 'accuracy'"):
        fn(logits, y, jnp.ones((60, 4)))
    fn = resolve("f1", INTEGER, logits, y)["f1"]
    with pytest.raises(ValueError, match="do not fit the metric 'f1'"):
        fn(logits, y, jnp.ones((60, 4)))


def test_small_batches_add_up_beyond_float32():
    one = ClassRatio.of(
        "recall", *(jnp.full(1, x) for x in (0.1, 1.0, 0.3)), jnp.ones(1, bool)
    )

    def add(i, total):
        del i
        return total.merge(one)

    many = jax.lax.fori_loop(0, 300_000, add, one)
    assert float(many.compute()) == pytest.approx(1 / 3, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("loss", "min"),
        ("val_loss", "min"),
        ("val_head_loss", "min"),
        ("mean_absolute_error", "min"),
        ("val_rmse", "min"),
        ("perplexity", "min"),
        ("val_accuracy", "max"),
        ("a_top_5_accuracy", "max"),
        ("f1", "max"),
        ("val_auc", "max"),
        ("learning_rate", None),
        ("closs", None),
    ],
)
def test_metric_direction(name, direction):
    assert metric_direction(name) == direction


class Share(flax.struct.PyTreeNode):
    """A metric of clu's interface that takes no weights."""

    hits: jax.Array
    rows: int

    @classmethod
    def empty(cls):
        return cls(jnp.zeros((), jnp.int32), 0)

    @classmethod
    def from_model_output(cls, logits, labels):
        return cls(jnp.sum(logits.argmax(-1) == labels), labels.shape[0])

    def merge(self, other):
        return type(self)(self.hits + other.hits, self.rows + other.rows)

    def compute(self):
        return self.hits / self.rows


@pytest.mark.parametrize("fill", [0, 3, 20])
def test_rows_of_weight_0_never_reach_a_metric_without_weights(fill):
    logits, y, _ = labels_data(rows=20)
    w = np.ones(20, np.float32)
    w[20 - fill :] = 0
    metric = resolve([Share], INTEGER, logits, y)["share"]
    counted = jax.jit(metric)(logits, y, w)
    kept = slice(0, 20 - fill)
    assert int(counted.rows) == 20 - fill
    assert int(counted.hits) == (logits.argmax(-1) == y)[kept].sum()
    again = jax.eval_shape(lambda a: a.merge(a), counted)
    assert again == jax.eval_shape(metric, logits, y, w)


class Broken(Share):
    def compute(self):
        raise TypeError("clip() got an unexpected keyword argument 'a_min'.")


class Several(Share):
    def compute(self):
        return jnp.ones(3)


class OnTheHost(Share):
    def compute(self):
        return int(self.hits) / int(self.rows)


def test_compute_is_tried_before_the_first_step():
    logits, y, _ = labels_data()
    with pytest.raises(ValueError, match=r"compute\(\) of the metric 'broken' fails"):
        resolve([Broken], INTEGER, logits, y)
    with pytest.raises(ValueError, match=r"'several' returns.*not one number"):
        resolve([Several], INTEGER, logits, y)
    got = run(["accuracy", OnTheHost], INTEGER, logits, y)
    assert got["on_the_host"] == pytest.approx(got["accuracy"], rel=1e-6)


def test_clu_metrics_and_collections():
    clu = pytest.importorskip("clu.metrics")
    logits, y, w = labels_data()
    w = (w > 0).astype("float32")
    kept = w > 0
    collection = clu.Collection.create(
        accuracy=clu.Accuracy,
        entropy=clu.Average.from_output("loss"),
        mean=clu.Average.from_fun(lambda logits, **_: logits[:, 0]),
    )
    got = run([collection], INTEGER, logits, y, w, batches=2)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)[kept]
    assert got == pytest.approx(
        {
            "accuracy": (logits.argmax(-1) == y)[kept].mean(),
            "entropy": float(losses.mean()),
            "mean": logits[kept, 0].mean(),
        },
        rel=1e-5,
    )
    named = run({"clu": collection}, INTEGER, logits, y, w)
    assert list(named) == ["clu_accuracy", "clu_entropy", "clu_mean"]
    assert list(run([clu.Accuracy], INTEGER, logits, y)) == ["accuracy"]


def test_a_metric_that_grows_is_refused():
    clu = pytest.importorskip("clu.metrics")
    logits, y, _ = labels_data()
    collecting = clu.CollectingMetric.from_outputs(("logits", "labels"))
    with pytest.raises(ValueError, match=r"grows when it is merged.*trainer.predict"):
        resolve({"all": collecting}, INTEGER, logits, y)


class Widening(Share):
    def merge(self, other):
        return type(self)(self.hits + 0.5 * other.hits, self.rows + other.rows)


def test_a_metric_that_changes_its_dtype_is_refused():
    logits, y, _ = labels_data()
    with pytest.raises(ValueError, match="'widening' grows"):
        resolve([Widening], INTEGER, logits, y)


def test_metrics_that_need_one_array_or_no_loss():
    scores, y, _ = binary_data()
    assert resolve(None, "bce", scores, y) == {}
    with pytest.raises(ValueError, match=r"output without a loss has none. Write metr"):
        resolve("binary_accuracy", None, scores, y)
    pair = (scores, scores)
    with pytest.raises(ValueError, match="takes one array of outputs and of targets"):
        resolve("mae", lambda o, t: o[:, 0], scores, pair)


@pytest.fixture
def metrax():
    module = pytest.importorskip("metrax")
    # metrax itself relies on rank promotion.
    with jax.numpy_rank_promotion("allow"):
        yield module


def test_metrax_takes_what_the_loss_says_outputs_mean(metrax):
    logits, y, w = labels_data()
    got = run([metrax.Accuracy, metrax.Perplexity], INTEGER, logits, y, w)
    own = run(["accuracy", "perplexity"], INTEGER, logits, y, w)
    assert got == pytest.approx(own, rel=1e-5)
    scores, y, w = binary_data()
    scores, y = scores[:, 0], y[:, 0]
    metrics = [metrax.Accuracy, metrax.AUCROC]
    got = run(metrics, "bce", scores, y, w)
    own = run(["accuracy", "auc"], "bce", scores, y, w)
    assert list(got.values()) == pytest.approx(list(own.values()), abs=5e-3)
    assert run(metrax.MSE, "mse", scores, y.astype("float32"), w) == pytest.approx(
        run("mse", "mse", scores, y.astype("float32"), w), rel=1e-5
    )


def test_metrax_metrics_of_two_classes(metrax):
    logits, y, w = labels_data(classes=2)
    w = (w > 0).astype("float32")
    got = run([metrax.Precision, metrax.AUCROC], INTEGER, logits, y, w, batches=2)
    kept = w > 0
    expected = sklearn.metrics.precision_score(y[kept], logits[kept].argmax(-1))
    assert got["precision"] == pytest.approx(expected, abs=1e-6)
    chances = jax.nn.softmax(logits)[kept, 1]
    expected = sklearn.metrics.roc_auc_score(y[kept], chances)
    assert got["aucroc"] == pytest.approx(expected, abs=1e-2)
    logits, y, _ = labels_data(classes=3)
    with pytest.raises(ValueError, match="is for two classes, not for 3"):
        resolve([metrax.Precision], INTEGER, logits, y)


def test_metrax_accuracy_of_one_hot_targets(metrax):
    logits, y, _ = labels_data()
    hot = np.eye(4, dtype="float32")[y]
    got = run(metrax.Accuracy, "softmax_cross_entropy", logits, hot)["accuracy"]
    wrong = (logits.argmax(-1) != y).mean()
    assert got == pytest.approx(1 - wrong * 2 / 4, rel=1e-6)


def test_metrax_accuracy_needs_to_know_what_a_decision_is(metrax):
    scores, y, w = binary_data()
    scores, y = scores[:, 0], y[:, 0]
    chances = np.asarray(jax.nn.sigmoid(scores))
    with pytest.raises(ValueError, match="'Accuracy' needs a threshold"):
        resolve([metrax.Accuracy], on_probabilities, chances, y)
    with pytest.raises(ValueError, match="'Accuracy' needs a threshold"):
        resolve([metrax.Accuracy], None, chances, y)
    told = Loss(on_probabilities, threshold=0.5)
    got = run([metrax.Accuracy], told, chances, y, w)["accuracy"]
    assert got == pytest.approx(run("acc", "bce", scores, y, w)["acc"], rel=1e-6)


def test_metrax_metrics_that_need_more_arguments(metrax):
    logits, y, _ = labels_data()
    with pytest.raises(ValueError, match=r"'precision_at_k' needs ks.*class Mine"):
        resolve([metrax.PrecisionAtK], INTEGER, logits, y)
