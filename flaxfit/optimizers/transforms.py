"""Optax transformations around an optimizer, and readers of their state.

Knows nothing of names or arguments. All transformations themselves are optax's.
"""

import fnmatch
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from flaxfit._core.arrays import strongly_typed
from flaxfit._core.errors import UsageError
from flaxfit._core.tree_specs import path_text
from flaxfit._core.types import Array, PyTree

_RATE = "learning_rate"

Tx: TypeAlias = optax.GradientTransformationExtraArgs


def with_extra_args(tx: Any) -> Tx:
    """Returns `tx` so that `update` accepts value, grad, value_fn and grad_fn."""
    if isinstance(tx, optax.MultiSteps):
        inner = optax.GradientTransformationExtraArgs(tx.init, tx.update)
    else:
        inner = optax.with_extra_args_support(tx)
    parameters = inspect.signature(inner.update).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        value_fn = extra.get("value_fn")
        if value_fn is not None and "obj_fn" not in extra:
            # A line search refuses extra arguments that `value_fn` does not take;
            # sophia expects `value_fn` under the name `obj_fn`.
            def lenient(params: PyTree, grad_fn: Any = None, obj_fn: Any = None) -> Any:
                del grad_fn, obj_fn
                return value_fn(params)

            extra = {**extra, "value_fn": lenient, "obj_fn": value_fn}
        if not takes_all:
            extra = {name: extra[name] for name in extra.keys() & parameters.keys()}
        return inner.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def with_injected_rate(rebuild: Callable[[Any], Tx], rate: Any) -> Tx:
    """Returns the optimizer with its learning rate as a hyperparameter in the state."""

    def inject(params: PyTree) -> Tx:
        # With a complex parameter, optax would make the rate complex, and so the
        # updates of real parameters too.
        highest = jnp.zeros((), jnp.result_type(*_dtypes(params), float))
        return optax.inject_hyperparams(rebuild, hyperparam_dtype=highest.real.dtype)(
            learning_rate=rate
        )

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        tx = inject(updates if params is None else params)
        return tx.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(
        lambda params: inject(params).init(params), update
    )


def accumulate(tx: Tx, every: int) -> Tx:
    """Returns `tx` applied to the mean gradient of `every` batches."""
    steps = optax.MultiSteps(tx, every)

    def init(params: PyTree) -> PyTree:
        if any(jnp.issubdtype(d, jnp.complexfloating) for d in _dtypes(params)):
            raise UsageError(
                "accumulate_steps cannot be used with complex parameters: "
                "optax.MultiSteps keeps only the real part of their gradients",
                "Use larger batches instead",
            )
        return steps.init(params)

    return optax.GradientTransformationExtraArgs(init, steps.update)


def freeze_matching(tx: Tx, patterns: tuple[str, ...]) -> Tx:
    """Returns `tx` applied only to parameters that match none of `patterns`."""
    inner = optax.partition(
        {"train": tx, "freeze": optax.set_to_zero()},
        functools.partial(_freeze_labels, patterns=patterns),
        mask_compatible_extra_args=True,
    )

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        # The optimizer sees only the trained parameters, but the functions need all.
        value_fn, grad_fn = extra.get("value_fn"), extra.get("grad_fn")
        if value_fn is not None:
            extra["value_fn"] = lambda part: value_fn(_merge(part, params))
        if grad_fn is not None:
            extra["grad_fn"] = lambda part, *args: _mask_like(
                part, grad_fn(_merge(part, params), *args)
            )
        return inner.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _freeze_labels(params: PyTree, patterns: tuple[str, ...]) -> PyTree:
    """Returns `"freeze"` or `"train"` for every parameter."""

    def matches(path: str, pattern: str) -> bool:
        pattern = pattern.rstrip("/")
        return any(
            fnmatch.fnmatchcase(text, pattern + below)
            for text in (path, f"/{path}")
            for below in ("", "/*")
        )

    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = [path_text(path) for path, _ in leaves]
    there_are = f"There are: {', '.join(paths)}"
    for pattern in patterns:
        if not any(matches(path, pattern) for path in paths):
            raise UsageError(f"freeze={pattern!r} matches no parameter", there_are)
    frozen = [any(matches(path, pattern) for pattern in patterns) for path in paths]
    if all(frozen):
        raise UsageError(f"freeze={patterns!r} leaves no parameter to train", there_are)
    labels = ("freeze" if cold else "train" for cold in frozen)
    return jax.tree_util.tree_unflatten(treedef, labels)


def keep_dtypes(tx: Tx) -> Tx:
    """Returns `tx` with a state that can be donated, and carried through a loop."""

    def init(params: PyTree) -> PyTree:
        # Some optimizers store the initial parameters, one array twice, or a constant
        # of their module. A step donates the state, so each leaf needs its own buffer.
        return jax.tree.map(
            lambda leaf: jnp.copy(strongly_typed(leaf)), tx.init(params)
        )

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        updates, new_state = tx.update(updates, state, params, **extra)
        # For parameters of mixed dtypes, some optimizers change dtypes of the state.
        return updates, jax.tree.map(
            lambda new, old: strongly_typed(new, jnp.asarray(old).dtype),
            new_state,
            state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _dtypes(tree: PyTree) -> list[Any]:
    return [jnp.result_type(leaf) for leaf in jax.tree.leaves(tree)]


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _merge(part: PyTree, whole: PyTree) -> PyTree:
    """Returns `part` with its masked leaves taken from `whole`."""
    return jax.tree.map(
        lambda p, w: w if _is_masked(p) else p, part, whole, is_leaf=_is_masked
    )


def _mask_like(part: PyTree, whole: PyTree) -> PyTree:
    """Returns `whole` with the leaves masked that are masked in `part`."""
    return jax.tree.map(
        lambda p, w: p if _is_masked(p) else w, part, whole, is_leaf=_is_masked
    )


def _holds_rate(node: Any) -> bool:
    kinds = (
        optax.InjectHyperparamsState,
        optax.schedules.InjectStatefulHyperparamsState,
    )
    return isinstance(node, kinds) and _RATE in node.hyperparams


def with_rates_of(opt_state: PyTree, other: PyTree) -> PyTree:
    """Returns `opt_state` with the learning rates of `other`, of the same structure."""

    def replace(node: Any, source: Any) -> Any:
        if not _holds_rate(node):
            return node
        return node._replace(
            hyperparams=jax.tree.map(_where, source.hyperparams, node.hyperparams)
        )

    return jax.tree.map(replace, opt_state, other, is_leaf=_holds_rate)


def _where(new: Array, old: Array) -> Array:
    return jax.device_put(new, old.sharding) if old.committed else new


def read_learning_rate(opt_state: PyTree) -> Array | None:
    """Returns the first injected learning rate, if any."""
    for node in jax.tree.leaves(opt_state, is_leaf=_holds_rate):
        if _holds_rate(node):
            return node.hyperparams[_RATE]
    return None


def evaluation_params(opt_state: PyTree, params: PyTree) -> PyTree:
    """Returns the averaged parameters for `schedule_free`, otherwise `params`."""

    def is_schedule_free(node: Any) -> bool:
        return isinstance(node, optax.contrib.ScheduleFreeState)

    for node in jax.tree.leaves(opt_state, is_leaf=is_schedule_free):
        if is_schedule_free(node):
            part = _mask_like(node.z, params)
            averaged = optax.contrib.schedule_free_eval_params(node, part)
            params = jax.tree.map(
                lambda new, old: new.astype(old.dtype), _merge(averaged, params), params
            )
    return params
