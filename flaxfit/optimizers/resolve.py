"""Resolves a name, a function or an optax object into one transformation.

All options are optax's code. This module makes the learning rate readable, and the
state of every optimizer fit for one compiled loop.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import optax.contrib

from flaxfit._core.errors import UsageError, UsageTypeError, did_you_mean
from flaxfit._core.types import Array, PyTree
from flaxfit._core.validation import integer, number
from flaxfit.optimizers import transforms

UNKNOWN_TOTAL_STEPS = (
    "learning_rate is a function of total_steps, and the number of steps is not known "
    "before the data ends. Pass steps_per_epoch= to fit, or a schedule of the step "
    "count."
)
_DEFAULT_RATE = 1e-3
_RATE = "learning_rate"
# Without a rate, optax's adadelta ascends; 1 is the paper's rate (arXiv:1212.5701).
_OWN_RATES = MappingProxyType({"adadelta": 1.0})


class Optimizer(NamedTuple):
    """An optimizer, ready for a step.

    Attributes:
      name: its name in the display.
      tx: takes `update(grads, opt_state, params, value=..., grad=..., value_fn=...,
        grad_fn=...)` whether or not the optimizer needs them. The state keeps its
        dtypes and weak types.
      learning_rate: `opt_state -> scalar`, the rate last used, or None if the state
        holds none. If it holds several, the first one.
      evaluation_params: `(opt_state, params) -> params` to evaluate with; they differ
        from `params` only for `optax.contrib.schedule_free`.
    """

    name: str
    tx: transforms.Tx
    learning_rate: Callable[[PyTree], Array | None]
    evaluation_params: Callable[[PyTree, PyTree], PyTree]


def resolve_optimizer(
    optimizer: Any,
    learning_rate: Any,
    total_steps: int | None,
    *,
    weight_decay: float | None = None,
    clip_norm: float | None = None,
    accumulate_steps: int | None = None,
    freeze: str | Sequence[str] | None = None,
) -> Optimizer:
    """Finds and builds an optimizer; see `Trainer` for the arguments.

    Args:
      optimizer: a name, in any case; a function, or a `functools.partial` of one; or a
        finished `optax.GradientTransformation`.
      learning_rate: a function of `total_steps` is recognized by the parameter's name.
      total_steps: the length of the training in steps (batches), if it is known.
      weight_decay: passed to the optimizer under that name.
      clip_norm: as in `optax.clip_by_global_norm`.
      accumulate_steps: as in `optax.MultiSteps`. Schedules then count updates, and
        `total_steps` is divided by it.
      freeze: `"encoder"` or `"encoder/**"` for the whole encoder, `"*/bias"` for every
        bias; `*` matches slashes too.

    Raises:
      ValueError: an unknown name, an option out of range or one that the optimizer
        does not have. `tx.init` raises it for a pattern that matches nothing.
      TypeError: an argument of the wrong type.
    """
    every = integer(
        "accumulate_steps", 1 if accumulate_steps is None else accumulate_steps
    )
    updates = None if total_steps is None else max(1, total_steps // every)
    if isinstance(optimizer, (optax.GradientTransformation, optax.MultiSteps)):
        _refuse_options(learning_rate=learning_rate, weight_decay=weight_decay)
        name, tx = "optax transformation", transforms.with_extra_args(optimizer)
    else:
        name, factory = _as_factory(optimizer)
        tx = _build(name, factory, learning_rate, updates, weight_decay)
    if clip_norm is not None:
        norm = number("clip_norm", clip_norm, zero=False)
        tx = optax.chain(optax.clip_by_global_norm(norm), tx)
    if every > 1:
        tx = transforms.accumulate(tx, every)
    if freeze is not None:
        patterns = (freeze,) if isinstance(freeze, str) else tuple(freeze)
        tx = transforms.freeze_matching(tx, patterns)
    return Optimizer(
        name,
        transforms.keep_dtypes(tx),
        transforms.read_learning_rate,
        transforms.evaluation_params,
    )


def needs_total_steps(learning_rate: Any) -> bool:
    """Returns whether `learning_rate` is a function of `total_steps`."""
    return callable(learning_rate) and "total_steps" in _parameters(learning_rate)


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Returns the parameters by name; empty if there is no signature."""
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return {}


def _refuse_options(**options: Any) -> None:
    """Raises for options of a factory that were given with a finished optimizer."""
    given = [f"{name}=..." for name, value in options.items() if value is not None]
    if given:
        raise UsageError(
            f"{' and '.join(given)} cannot be put into a finished optax transformation",
            "Give the function instead",
            f"optimizer=optax.adamw, {', '.join(given)}",
        )


def _as_rate(rate: Any, updates: int | None) -> Any:
    """Returns a float or a schedule that can be traced."""
    if needs_total_steps(rate):
        if updates is None:
            raise UsageError(UNKNOWN_TOTAL_STEPS)
        rate = rate(total_steps=updates)
    if isinstance(rate, optax.schedules.StatefulSchedule):
        return rate
    if not callable(rate):
        return number(_RATE, rate, zero=False)
    try:
        value = jax.eval_shape(rate, np.int32(0))
        fits = value.shape == () and value.dtype.kind in "iufV"
    except Exception as err:
        raise UsageError(
            "learning_rate is a function, but not a schedule `count -> rate` that jax "
            f"can trace ({type(err).__name__}: {err})",
            "A condition on the count needs jnp.where, not `if`",
            "optax.cosine_decay_schedule(1e-3, 1000), or lambda total_steps: "
            "optax.cosine_decay_schedule(1e-3, total_steps)",
        ) from err
    if not fits:
        raise UsageError(
            f"learning_rate is a schedule that returns {value}", "Expected one number"
        )
    # optax does not convert the integers of a schedule to floats.
    return lambda count: rate(count) * 1.0


# Names and factories


def _is_factory(function: Any) -> bool:
    """Returns whether a function of optax makes an optimizer."""
    if inspect.isclass(function) or not callable(function):
        return False
    first = next(iter(_parameters(function)), "")
    return first in (_RATE, "max_learning_rate")


def _known() -> Iterator[str]:
    """Yields the names of all optimizers in optax and optax.contrib."""
    for module in (optax, optax.contrib):
        for name in dir(module):
            public = not name.startswith(("_", "scale_by_"))
            if public and _is_factory(getattr(module, name)):
                yield name


def _as_factory(optimizer: Any) -> tuple[str, Callable[..., Any]]:
    """Returns the name and the function of an optimizer, given either of them."""
    if not isinstance(optimizer, str):
        if not callable(optimizer) or inspect.isclass(optimizer):
            raise UsageTypeError(
                f"optimizer is a {type(optimizer).__qualname__}",
                "Expected a name, a function of optax or a transformation",
                "'adam', optax.adam or optax.adam(1e-3)",
            )
        function = getattr(optimizer, "func", optimizer)
        name = getattr(function, "__name__", type(function).__name__)
        return name, _by_keyword(optimizer)
    name, known = optimizer.lower(), set(_known())
    # Not getattr, which warns about names that optax has moved to optax.contrib.
    found: Any = vars(optax).get(name) or vars(optax.contrib).get(name)
    if name in known:
        return name, found
    if callable(found):
        raise UsageError(
            f"optimizer={optimizer!r} is a function of optax but not an optimizer",
            "Pass a finished transformation",
            "optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))",
        )
    raise UsageError(
        f"There is no optimizer {optimizer!r} in optax or optax.contrib."
        f"{did_you_mean(name, known)}",
        f"Known: {', '.join(sorted(known))}",
    )


def _by_keyword(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a partial with its positional arguments, e.g. the rate, given by name."""
    if not isinstance(factory, functools.partial) or not factory.args:
        return factory
    names = list(_parameters(factory.func))
    if names[:1] != [_RATE]:
        return factory
    positional = dict(zip(names, factory.args, strict=False))
    return functools.partial(factory.func, **positional, **factory.keywords)


def _build(
    name: str,
    factory: Callable[..., Any],
    rate: Any,
    updates: int | None,
    weight_decay: float | None,
) -> transforms.Tx:
    """Calls `factory` so that the learning rate is stored in the optimizer's state."""
    parameters = _parameters(factory)
    values: dict[str, Any] = {}
    if weight_decay is not None:
        if "weight_decay" not in parameters:
            raise UsageError(f"{name} has no weight_decay", write="optimizer='adamw'")
        values["weight_decay"] = number("weight_decay", weight_decay)
    if "key" in parameters and parameters["key"].default is None:
        # optax warns if noise has no key, and plans to require one.
        values["key"] = jax.random.key(0)
    rate = _choose_rate(name, factory, rate)
    if rate is not None:
        values[_RATE] = _as_rate(rate, updates)
    _check_complete(name, parameters, values)
    tx = transforms.with_extra_args(_called(name, factory, values))
    if rate is None:
        return tx

    def rebuild(learning_rate: Any) -> transforms.Tx:
        return transforms.with_extra_args(factory(**{**values, _RATE: learning_rate}))

    return transforms.with_injected_rate(rebuild, values[_RATE])


def _choose_rate(name: str, factory: Callable[..., Any], rate: Any) -> Any:
    """Returns the given rate, the factory's own, or None if it takes none."""
    parameter = _parameters(factory).get(_RATE)
    if rate is None:
        if parameter is None:
            return None
        if parameter.default is inspect.Parameter.empty:
            return _DEFAULT_RATE
        return _OWN_RATES.get(name, parameter.default)
    if parameter is None:
        raise UsageError(
            f"{name} takes no learning_rate",
            "Leave it out, or give the arguments it does take",
            f"optimizer=functools.partial({name}, ...)",
        )
    if _RATE in getattr(factory, "keywords", {}):
        raise UsageError(
            f"The learning rate is given twice, in optimizer={name} and by "
            "learning_rate=",
            write=f"optimizer={name}, learning_rate=...",
        )
    return rate


def _check_complete(
    name: str, parameters: Mapping[str, inspect.Parameter], values: dict[str, Any]
) -> None:
    """Raises if `factory(**values)` would lack arguments."""
    missing = [
        f"{parameter.name}=..."
        for parameter in parameters.values()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and parameter.name not in values
    ]
    if missing:
        raise UsageError(
            f"{name} needs more arguments",
            write=f"optimizer=functools.partial({name}, {', '.join(missing)})",
        )


def _called(name: str, factory: Callable[..., Any], values: dict[str, Any]) -> Any:
    tx = factory(**values)
    if not isinstance(tx, (optax.GradientTransformation, optax.MultiSteps)):
        raise UsageTypeError(
            f"optimizer={name} returned a {type(tx).__qualname__}",
            "Expected an optax transformation such as optax.adam(1e-3)",
        )
    return tx
