"""Names, factories and transformations, against optax itself."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from flaxfit.optimizers.resolve import _known, needs_total_steps, resolve_optimizer

NAMES = sorted(set(_known()) - {"dpsgd"})


def make_params(dtype=jnp.float32, other=jnp.float32):
    return {
        "encoder": {"kernel": jnp.ones((4, 3), dtype), "bias": jnp.ones(3, other)},
        "head": {"bias": jnp.full(3, 2, other)},
    }


def loss_of(params):
    leaves = jax.tree.leaves(params)
    return sum(jnp.sum(jnp.abs(x - 0.3) ** 2).astype(jnp.float32) for x in leaves)


def avals(tree):
    return jax.tree.map(lambda x: (x.dtype, x.aval), tree)


def one_step(tx, params, opt_state):
    value, grads = jax.value_and_grad(loss_of)(params)
    grads = jax.tree.map(jnp.conj, grads)
    updates, opt_state = tx.update(
        grads,
        opt_state,
        params,
        value=value,
        grad=grads,
        value_fn=loss_of,
        grad_fn=lambda params, i=0: jax.grad(loss_of)(params),
    )
    return optax.apply_updates(params, updates), opt_state


def train(tx, params, steps=2):
    """Runs compiled, donated steps; proves that one compilation does for all."""
    opt_state = tx.init(params)
    first = avals(opt_state)
    params = jax.tree.map(jnp.copy, params)
    step = jax.jit(functools.partial(one_step, tx), donate_argnums=(0, 1))
    for _ in range(steps):
        params, opt_state = step(params, opt_state)
    assert avals(opt_state) == first
    assert step._cache_size() == 1
    return params, opt_state


def plain(tx, params, steps=2):
    """The same steps by optax alone."""
    tx = optax.with_extra_args_support(tx)
    opt_state = tx.init(params)
    for _ in range(steps):
        grads = jax.grad(loss_of)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    return params, opt_state


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_trains_under_jit_with_a_donated_state(name):
    with warnings.catch_warnings():
        if name == "optimistic_adam":
            warnings.simplefilter("ignore", DeprecationWarning)
        optimizer = resolve_optimizer(name, None, None)
        params, opt_state = train(optimizer.tx, make_params())
    assert optimizer.name == name
    assert loss_of(params) < loss_of(make_params())
    rate = optimizer.learning_rate(opt_state)
    if name in ("adafactor", "lbfgs", "polyak_sgd"):
        assert rate is None
    else:
        assert rate.shape == () and rate.dtype == jnp.float32


def test_the_names_are_optimizers_only():
    assert {"adam", "adamw", "lbfgs", "muon", "nadam", "prodigy", "sgd"} < set(NAMES)
    assert not {"chain", "scale_by_adam", "scale_by_rprop", "sam"} & set(NAMES)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("adam", optax.adam(1e-3)), ("RMSprop", optax.rmsprop(1e-3))],
)
def test_a_name_equals_the_plain_optax_optimizer(name, expected):
    params, _ = train(resolve_optimizer(name, None, None).tx, make_params())
    assert_close(params, plain(expected, make_params())[0])


@pytest.mark.parametrize(
    "factory",
    [
        functools.partial(optax.adamw, weight_decay=0.1),
        lambda learning_rate: optax.adamw(learning_rate, weight_decay=0.1),
        lambda learning_rate, **rest: optax.adamw(
            learning_rate, weight_decay=0.1, **rest
        ),
    ],
)
def test_a_factory_gets_the_learning_rate(factory):
    optimizer = resolve_optimizer(factory, 0.01, None)
    params, opt_state = plain(optimizer.tx, make_params())
    assert_close(params, plain(optax.adamw(0.01, weight_decay=0.1), make_params())[0])
    assert optimizer.learning_rate(opt_state) == jnp.float32(0.01)


@pytest.mark.parametrize(
    "factory",
    [
        functools.partial(optax.sgd, learning_rate=0.2),
        functools.partial(optax.sgd, 0.2),
    ],
)
def test_the_learning_rate_of_a_partial_is_seen(factory):
    optimizer = resolve_optimizer(factory, None, None)
    assert optimizer.name == "sgd"
    assert optimizer.learning_rate(optimizer.tx.init(make_params())) == jnp.float32(0.2)


def test_a_factory_without_a_learning_rate():
    optimizer = resolve_optimizer(lambda: optax.sgd(0.5), None, None)
    params, opt_state = plain(optimizer.tx, make_params())
    assert_close(params, plain(optax.sgd(0.5), make_params())[0])
    assert optimizer.learning_rate(opt_state) is None


@pytest.mark.parametrize(
    "make", [optax.adam, functools.partial(optax.MultiSteps, every_k_schedule=2)]
)
def test_a_finished_transformation_is_used_as_it_is(make):
    given = make(1e-2) if make is optax.adam else make(optax.adam(1e-2))
    optimizer = resolve_optimizer(given, None, None)
    params, opt_state = plain(optimizer.tx, make_params())
    tx = optax.GradientTransformationExtraArgs(given.init, given.update)
    assert_close(params, plain(tx, make_params())[0])
    assert optimizer.learning_rate(opt_state) is None
    assert optimizer.name == "optax transformation"


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau()),
        optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05), opaque_mode=True),
        optax.contrib.mechanize(optax.sgd(0.1)),
        optax.chain(optax.sgd(0.1), optax.scale_by_backtracking_linesearch(5)),
        optax.named_chain(
            ("noise", optax.add_noise(0.01, 0.5, key=1)), ("s", optax.sgd(0.1))
        ),
    ],
)
def test_transformations_that_need_the_value_or_functions(tx):
    params, _ = train(resolve_optimizer(tx, None, None).tx, make_params())
    assert loss_of(params) < loss_of(make_params())


def test_a_schedule_is_followed_and_read():
    schedule = optax.linear_schedule(0.1, 0.0, 4)
    optimizer = resolve_optimizer("sgd", schedule, None)
    params, opt_state = train(optimizer.tx, make_params(), steps=3)
    assert_close(params, plain(optax.sgd(schedule), make_params(), 3)[0])
    # The rate of the last of three updates, at count 2.
    np.testing.assert_allclose(optimizer.learning_rate(opt_state), 0.05, rtol=1e-6)


@pytest.mark.parametrize("rate", [lambda count: 1, lambda count: 2 - count])
def test_a_schedule_of_integers_is_a_float_rate(rate):
    optimizer = resolve_optimizer("sgd", rate, None)
    _, opt_state = train(optimizer.tx, make_params(), steps=2)
    assert optimizer.learning_rate(opt_state) == 1.0


def test_a_stateful_schedule_is_given_to_optax_as_it_is():
    class Halved(optax.schedules.StatefulSchedule):
        def init(self):
            return jnp.float32(1.0)

        def update(self, state, **extra):
            return state / 2

        def __call__(self, state, **extra):
            return state

    optimizer = resolve_optimizer("sgd", Halved(), None)
    _, opt_state = train(optimizer.tx, make_params(), steps=3)
    assert optimizer.learning_rate(opt_state) == 0.25


def test_a_partial_of_another_shape_is_only_called():
    chain = functools.partial(optax.chain, optax.clip(0.1), optax.sgd(0.5))
    params, _ = plain(resolve_optimizer(chain, None, None).tx, make_params())
    expected = optax.chain(optax.clip(0.1), optax.sgd(0.5))
    assert_close(params, plain(expected, make_params())[0])


def test_a_function_of_total_steps_gets_the_number_of_updates():
    seen = []

    def rate(total_steps):
        seen.append(total_steps)
        return optax.linear_schedule(1.0, 0.0, total_steps)

    assert needs_total_steps(rate)
    resolve_optimizer("sgd", rate, 100)
    resolve_optimizer("sgd", rate, 100, accumulate_steps=8)
    resolve_optimizer("sgd", lambda total_steps: 1 / total_steps, 4)
    assert seen == [100, 12]


@pytest.mark.parametrize("rate", [None, 0.1, optax.constant_schedule(0.1)])
def test_other_rates_need_no_total_steps(rate):
    assert not needs_total_steps(rate)


def test_the_learning_rate_in_the_state_can_be_changed():
    optimizer = resolve_optimizer("sgd", 0.1, None)
    params = make_params()
    opt_state = optimizer.tx.init(params)
    opt_state = opt_state._replace(hyperparams={"learning_rate": jnp.float32(0.0)})
    after, opt_state = one_step(optimizer.tx, params, opt_state)
    assert_close(after, params)
    assert optimizer.learning_rate(opt_state) == 0.0


def test_the_learning_rate_of_an_injected_transformation_is_read_abstractly():
    tx = optax.chain(
        optax.clip(1.0), optax.inject_hyperparams(optax.adam)(learning_rate=0.3)
    )
    optimizer = resolve_optimizer(optax.masked(tx, True), None, None)
    state = jax.eval_shape(optimizer.tx.init, make_params())
    rate = jax.eval_shape(optimizer.learning_rate, state)
    assert rate.shape == () and rate.dtype == jnp.float32


@pytest.mark.parametrize(
    ("name", "dtypes"),
    [
        ("adamw", ("complex64", "float32")),
        ("lars", ("complex64", "float32")),
        ("lars", ("bfloat16", "float32")),
        ("momo", ("bfloat16", "float32")),
    ],
)
def test_mixed_dtypes_keep_their_dtypes(name, dtypes):
    params, opt_state = train(
        resolve_optimizer(name, 0.01, None).tx, make_params(*dtypes)
    )
    assert params["encoder"]["kernel"].dtype == dtypes[0]
    assert params["head"]["bias"].dtype == dtypes[1]
    assert opt_state.hyperparams["learning_rate"].dtype == jnp.float32


# Options


def test_clip_norm_and_weight_decay_are_those_of_optax():
    optimizer = resolve_optimizer("adamw", 0.01, None, weight_decay=0.5, clip_norm=0.1)
    params, opt_state = plain(optimizer.tx, make_params())
    expected = optax.chain(
        optax.clip_by_global_norm(0.1), optax.adamw(0.01, weight_decay=0.5)
    )
    assert_close(params, plain(expected, make_params())[0])
    assert optimizer.learning_rate(opt_state) == jnp.float32(0.01)


def test_accumulate_steps_updates_every_second_batch():
    optimizer = resolve_optimizer(
        "sgd", optax.linear_schedule(0.1, 0.0, 2), None, accumulate_steps=2
    )
    once, opt_state = train(optimizer.tx, make_params(), steps=2)
    assert optimizer.learning_rate(opt_state) == jnp.float32(0.1)
    assert_close(once, plain(optax.sgd(0.1), make_params(), steps=1)[0])


def test_freeze_trains_the_rest_as_optax_would():
    optimizer = resolve_optimizer("adam", 0.1, None, freeze=["encoder/**"])
    params, opt_state = train(optimizer.tx, make_params())
    head = plain(optax.adam(0.1), make_params()["head"])[0]
    assert_close(params["head"], head)
    jax.tree.map(
        np.testing.assert_array_equal, params["encoder"], make_params()["encoder"]
    )
    assert optimizer.learning_rate(opt_state) == jnp.float32(0.1)
    # No moments are kept for what is frozen.
    assert not any(leaf.shape == (4, 3) for leaf in jax.tree.leaves(opt_state))


@pytest.mark.parametrize(
    ("freeze", "trained"),
    [
        ("encoder", {"head/bias"}),
        ("encoder/", {"head/bias"}),
        ("encoder/kernel", {"encoder/bias", "head/bias"}),
        ("*/bias", {"encoder/kernel"}),
        ("**/bias", {"encoder/kernel"}),
        (("head", "encoder/b*"), {"encoder/kernel"}),
        ((), {"encoder/kernel", "encoder/bias", "head/bias"}),
    ],
)
def test_freeze_patterns(freeze, trained):
    optimizer = resolve_optimizer("sgd", 0.1, None, freeze=freeze)
    before = make_params()
    after, _ = one_step(optimizer.tx, before, optimizer.tx.init(before))
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), after, before)
    paths = jax.tree_util.tree_leaves_with_path(changed)
    assert trained == {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, moved in paths
        if moved
    }


@pytest.mark.parametrize("name", ["lbfgs", "sophia", "noisy_sgd", "schedule_free_sgd"])
def test_all_options_together(name):
    optimizer = resolve_optimizer(
        name, None, None, freeze="encoder", accumulate_steps=2, clip_norm=1.0
    )
    params, opt_state = train(optimizer.tx, make_params(), steps=4)
    before = make_params()
    np.testing.assert_array_equal(
        params["encoder"]["kernel"], before["encoder"]["kernel"]
    )
    assert loss_of(params) < loss_of(before)
    shown = optimizer.evaluation_params(opt_state, params)
    np.testing.assert_array_equal(
        shown["encoder"]["kernel"], before["encoder"]["kernel"]
    )


def test_freeze_reaches_a_function_that_returns_gradients():
    sam = optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05), opaque_mode=True)
    optimizer = resolve_optimizer(sam, None, None, freeze="encoder")
    params, _ = train(optimizer.tx, make_params(), steps=1)
    assert loss_of(params) < loss_of(make_params())


@pytest.mark.parametrize("options", [{}, {"clip_norm": 9.0, "accumulate_steps": 1}])
def test_schedule_free_is_evaluated_at_its_average(options):
    optimizer = resolve_optimizer("schedule_free_sgd", 0.1, None, **options)
    params, opt_state = train(optimizer.tx, make_params(), steps=3)
    expected, state = plain(optax.contrib.schedule_free_sgd(0.1), make_params(), 3)
    assert_close(
        optimizer.evaluation_params(opt_state, params),
        optax.contrib.schedule_free_eval_params(state, expected),
    )


def test_other_optimizers_are_evaluated_as_they_are():
    optimizer = resolve_optimizer("adam", None, None)
    params = make_params()
    assert optimizer.evaluation_params(optimizer.tx.init(params), params) is params


# Errors


@pytest.mark.parametrize(
    ("optimizer", "text"),
    [
        ("adm", "no optimizer 'adm' in optax.*Did you mean 'adam'"),
        ("Ftrl", "no optimizer 'Ftrl'.*Known: .*adam"),
        ("chain", "not an optimizer.*optimizer=optax.chain"),
        ("reduce_on_plateau", "not an optimizer.*finished transformation"),
        ("dpsgd", r"functools.partial\(dpsgd, l2_norm_clip=..., noise_mul"),
    ],
)
def test_a_wrong_name_says_what_to_write(optimizer, text):
    with pytest.raises(ValueError, match=text):
        resolve_optimizer(optimizer, None, None)


@pytest.mark.parametrize(
    ("optimizer", "text"),
    [
        (3, "optimizer is a int. Expected a name.*'adam'"),
        (optax.MultiSteps, "optimizer is a type. Expected a name"),
        (lambda learning_rate: 3, "returned a int. Expected an optax"),
    ],
)
def test_something_else_is_no_optimizer(optimizer, text):
    with pytest.raises(TypeError, match=text):
        resolve_optimizer(optimizer, None, None)


@pytest.mark.parametrize(
    ("rate", "kind", "text"),
    [
        (0, ValueError, "learning_rate=0. Expected a positive number"),
        (-0.1, ValueError, "learning_rate=-0.1. Expected a positive"),
        (float("nan"), ValueError, "learning_rate=nan. Expected a positive"),
        (True, TypeError, "learning_rate=True. Expected a positive number"),
        ("0.1", TypeError, "learning_rate='0.1'. Expected a positive"),
        (1j, TypeError, "=1j. Expected a positive number"),
        (np.ones(2), TypeError, r"=array\(.* Expected a positive number"),
        (optax.cosine_decay_schedule, ValueError, "not a schedule.*count -> rate"),
        (lambda count: 0.1 if count < 9 else 0.01, ValueError, "needs jnp.where"),
        (lambda count: jnp.ones(2), ValueError, "Expected one number"),
        (lambda total_steps: 0.1, ValueError, "Pass steps_per_epoch= to fit"),
    ],
)
def test_a_wrong_learning_rate(rate, kind, text):
    with pytest.raises(kind, match=text):
        resolve_optimizer("adam", rate, None)


@pytest.mark.parametrize(
    ("optimizer", "options", "text"),
    [
        (optax.adam(0.1), {"learning_rate": 0.1}, "optimizer=optax.adamw, learning_r"),
        (optax.adam(0.1), {"weight_decay": 0.1}, "weight_decay=... cannot be put"),
        ("polyak_sgd", {"learning_rate": 0.1}, "polyak_sgd takes no learning_rate"),
        (
            functools.partial(optax.sgd, 0.1),
            {"learning_rate": 0.1},
            "given twice.*optimizer=sgd, learning_rate=",
        ),
        ("adam", {"weight_decay": 0.1}, "no weight_decay.*optimizer='adamw'"),
        (
            "adamw",
            {"weight_decay": -1.0},
            "weight_decay=-1.0. Expected a finite number of at",
        ),
        ("adam", {"clip_norm": 0.0}, "clip_norm=0.0. Expected a positive number"),
        ("adam", {"accumulate_steps": 0}, "accumulate_steps=0. .* at least 1"),
    ],
)
def test_a_wrong_option(optimizer, options, text):
    options = {"learning_rate": None, "total_steps": None, **options}
    with pytest.raises(ValueError, match=text):
        resolve_optimizer(optimizer, **options)


@pytest.mark.parametrize("steps", [True, 2.0])
def test_accumulate_steps_is_an_integer(steps):
    with pytest.raises(TypeError, match=r"accumulate_steps=.*a whole number"):
        resolve_optimizer("adam", None, None, accumulate_steps=steps)


@pytest.mark.parametrize(
    ("freeze", "text"),
    [
        ("encodr", "'encodr' matches no parameter. There are: encoder/bias, enc"),
        ("**", "leaves no parameter to train"),
    ],
)
def test_freeze_must_match_some_parameters_and_leave_some(freeze, text):
    optimizer = resolve_optimizer("adam", None, None, freeze=freeze)
    with pytest.raises(ValueError, match=text):
        optimizer.tx.init(make_params())


def test_complex_gradients_are_not_accumulated():
    optimizer = resolve_optimizer("sgd", None, None, accumulate_steps=2)
    with pytest.raises(ValueError, match="only the real part"):
        optimizer.tx.init(make_params(jnp.complex64))
