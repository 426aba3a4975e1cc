"""The named losses and the targets that each expects."""

import functools
import inspect
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
import optax

from flaxfit._core.errors import did_you_mean
from flaxfit._core.types import Array, PyTree

LossFn: TypeAlias = Callable[[PyTree, PyTree], Array]
"""`(outputs, targets) -> float[batch, ...]`, optax's convention."""

Kind: TypeAlias = Literal[
    "integer", "distribution", "binary", "margin", "regression", "vector", "custom"
]
"""What a loss takes outputs and targets for.

`integer`: a score per class and the class's number. `distribution`: a score and
a probability per class. `binary`: a logit and 0 or 1. `margin`: a score and -1 or
1. `regression`: a number and a number. `vector`: a vector and a vector.
"""


_TARGETS = frozenset({"label", "labels", "target", "targets", "true", "y", "y_true"})
_OUTPUTS = frozenset(
    {
        *("logit", "logits", "output", "outputs", "pred", "preds", "prediction"),
        *("predictions", "y_hat", "y_pred"),
    }
)


class _Entry(NamedTuple):
    fn: LossFn
    kind: Kind


def squared_error(outputs: Array, targets: Array) -> Array:
    """Returns `|outputs - targets|²` for every element, real for complex ones."""
    if jnp.iscomplexobj(outputs) or jnp.iscomplexobj(targets):
        difference = outputs - targets
        return jnp.square(difference.real) + jnp.square(difference.imag)
    return optax.losses.squared_error(outputs, targets)


def absolute_error(outputs: Array, targets: Array) -> Array:
    """Returns `|outputs - targets|` for every element."""
    return jnp.abs(outputs - targets)


LOSSES = MappingProxyType(
    {
        "absolute_error": _Entry(absolute_error, "regression"),
        "binary_dice_loss": _Entry(optax.losses.binary_dice_loss, "binary"),
        "cosine_distance": _Entry(optax.losses.cosine_distance, "vector"),
        "dice_loss": _Entry(optax.losses.dice_loss, "distribution"),
        "generalized_kl_divergence": _Entry(
            optax.losses.generalized_kl_divergence, "distribution"
        ),
        "hinge_loss": _Entry(optax.losses.hinge_loss, "margin"),
        "huber_loss": _Entry(optax.losses.huber_loss, "regression"),
        "kl_divergence": _Entry(optax.losses.kl_divergence, "distribution"),
        "kl_divergence_with_log_targets": _Entry(
            optax.losses.kl_divergence_with_log_targets, "distribution"
        ),
        "l2_loss": _Entry(optax.losses.l2_loss, "regression"),
        "log_cosh": _Entry(optax.losses.log_cosh, "regression"),
        "multiclass_hinge_loss": _Entry(optax.losses.multiclass_hinge_loss, "integer"),
        "multiclass_perceptron_loss": _Entry(
            optax.losses.multiclass_perceptron_loss, "integer"
        ),
        "multiclass_sparsemax_loss": _Entry(
            optax.losses.multiclass_sparsemax_loss, "integer"
        ),
        "perceptron_loss": _Entry(optax.losses.perceptron_loss, "margin"),
        "poly_loss_cross_entropy": _Entry(
            optax.losses.poly_loss_cross_entropy, "distribution"
        ),
        "ranking_softmax_loss": _Entry(
            functools.partial(optax.losses.ranking_softmax_loss, reduce_fn=None),
            "regression",
        ),
        "safe_softmax_cross_entropy": _Entry(
            optax.losses.safe_softmax_cross_entropy, "distribution"
        ),
        "sigmoid_binary_cross_entropy": _Entry(
            optax.losses.sigmoid_binary_cross_entropy, "binary"
        ),
        "sigmoid_focal_loss": _Entry(optax.losses.sigmoid_focal_loss, "binary"),
        "softmax_cross_entropy": _Entry(
            optax.losses.softmax_cross_entropy, "distribution"
        ),
        "softmax_cross_entropy_with_integer_labels": _Entry(
            optax.losses.softmax_cross_entropy_with_integer_labels, "integer"
        ),
        "sparsemax_loss": _Entry(optax.losses.sparsemax_loss, "binary"),
        "squared_error": _Entry(squared_error, "regression"),
    }
)

ALIASES = MappingProxyType(
    {
        "bce": "sigmoid_binary_cross_entropy",
        "binary_crossentropy": "sigmoid_binary_cross_entropy",
        "binary_focal_crossentropy": "sigmoid_focal_loss",
        "categorical_crossentropy": "softmax_cross_entropy",
        # optax's older name.
        "convex_kl_divergence": "generalized_kl_divergence",
        # Keras minimizes the negative similarity: the same gradient.
        "cosine_similarity": "cosine_distance",
        "hinge": "hinge_loss",
        "huber": "huber_loss",
        "kld": "kl_divergence",
        "logcosh": "log_cosh",
        "mae": "absolute_error",
        "mean_absolute_error": "absolute_error",
        "mean_squared_error": "squared_error",
        "mse": "squared_error",
        "sparse_categorical_crossentropy": "softmax_cross_entropy_with_integer_labels",
    }
)


def loss_names() -> tuple[str, ...]:
    """Returns every name a loss can be given by, aliases last."""
    return (*LOSSES, *ALIASES)


def look_up(fn: LossFn | str) -> tuple[str | None, LossFn, Kind]:
    """Returns the name in the table if there is one, the function and its kind."""
    if isinstance(fn, str):
        lowered = fn.lower()
        name = ALIASES.get(lowered, lowered)
        if name not in LOSSES:
            raise ValueError(_unknown_name(fn))
        return name, *LOSSES[name]
    if isinstance(fn, type):
        raise TypeError(
            f"loss is the class {fn.__name__}; write {fn.__name__}(...), a name or a "
            "function (outputs, targets) -> float[batch]."
        )
    if not callable(fn):
        raise TypeError(
            f"A loss is a name or a function (outputs, targets) -> float[batch], "
            f"not {type(fn).__name__}; write Loss('squared_error')."
        )
    known = known_name(fn)
    if known is None:
        check_argument_order(fn, "loss", "loss=lambda outputs, targets: {call}")
    return known, fn, LOSSES[known].kind if known else "custom"


def check_argument_order(fn: Callable[..., Any], what: str, line: str) -> None:
    """Checks that a function does not ask for `(targets, outputs)`, as in Keras.

    Args:
      fn: the user's own function.
      what: `"loss"` or `"metric"`.
      line: what to write instead, with `{name}` and `{call}` to be filled in.

    Raises:
      TypeError: the names of its arguments say so.
    """
    first, second = _first_two_arguments(fn)
    # (y, t) and (y, _) have the outputs first.
    swapped = first.lower() in _TARGETS and not (
        second.lower() in (*_TARGETS, "t") or second.startswith("_")
    )
    if swapped or (second.lower() in _OUTPUTS and first.lower() not in _OUTPUTS):
        name = function_name(fn)
        called = "f" if name == "<lambda>" else name
        line = line.format(name=called, call=f"{called}(targets, outputs)")
        raise TypeError(
            f"The {what} {name} takes ({first}, {second}), as in Keras, but is called "
            f"with (outputs, targets), as in optax; write {line}. If that is its order "
            "already, name its arguments (outputs, targets)."
        )


def function_name(fn: Callable[..., Any]) -> str:
    """Returns the name of a function, also of a `functools.partial`."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return str(getattr(fn, "__name__", type(fn).__name__))


def _first_two_arguments(fn: Callable[..., Any]) -> tuple[str, str]:
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # A builtin may have none.
        return "", ""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in kinds]
    return (names[0], names[1]) if len(names) > 1 else ("", "")


def known_name(fn: LossFn) -> str | None:
    """Returns the table's name of a function, also of a `functools.partial`."""
    for name, entry in LOSSES.items():
        if fn is entry.fn:
            return name
    if fn is optax.losses.squared_error:
        return "squared_error"
    if isinstance(fn, functools.partial) and not fn.args:
        return known_name(fn.func)
    return None


def _unknown_name(name: str) -> str:
    if callable(getattr(optax.losses, name, None)):
        return (
            f"optax.losses.{name} does not give one value per example for "
            "(outputs, targets), so it has no name here. Pass a function that calls "
            "it: Trainer(model, loss=lambda outputs, targets: ...)."
        )
    near = did_you_mean(name, loss_names())
    return (
        f"There is no loss {name!r}.{near} Names: {', '.join(LOSSES)}; as in Keras: "
        f"{', '.join(ALIASES)}. Or pass a function (outputs, targets) -> "
        "float[batch]."
    )
