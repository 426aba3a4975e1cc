"""The named losses: a table with all facts about each loss."""

import functools
import math
from collections.abc import Callable
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
import optax
from optax import losses

from flaxfit._core.errors import UsageError, UsageTypeError, did_you_mean
from flaxfit._core.keras_hints import check_argument_order
from flaxfit._core.types import Array, PyTree

LossFn: TypeAlias = Callable[[PyTree, PyTree], Array]
"""`(outputs, targets) -> float[batch, ...]`, optax's convention."""

Kind: TypeAlias = Literal[
    "integer", "distribution", "binary", "margin", "regression", "vector", "custom"
]
"""What outputs and targets mean to a loss.

`integer`: a score per class; the number of the class. `distribution`: a score per
class; a probability per class. `binary`: a logit; 0 or 1. `margin`: a score; -1 or 1.
`regression`: a number each. `vector`: a vector each. `custom`: unknown.
"""


class LossSpec(NamedTuple):
    """All facts about a loss.

    Attributes:
      fn: `(outputs, targets) -> float[batch, ...]`.
      kind: what its outputs and targets mean.
      takes_logits: whether it applies a softmax or sigmoid itself.
      smoothable: whether `label_smoothing` makes sense.
      chance: number of classes -> the loss of a model that guesses, if known.
    """

    fn: LossFn
    kind: Kind
    takes_logits: bool = False
    smoothable: bool = False
    chance: Callable[[int], float] | None = None

    @property
    def takes_one_hot(self) -> bool:
        """Whether targets are one-hot rows, or probabilities that add up to 1."""
        return self.kind == "distribution" and self.takes_logits


def squared_error(outputs: Array, targets: Array) -> Array:
    """Returns `|outputs - targets|²` for every element, also of complex arrays."""
    if jnp.iscomplexobj(outputs) or jnp.iscomplexobj(targets):
        difference = outputs - targets
        return jnp.square(difference.real) + jnp.square(difference.imag)
    return optax.losses.squared_error(outputs, targets)


def absolute_error(outputs: Array, targets: Array) -> Array:
    """Returns `|outputs - targets|` for every element."""
    return jnp.abs(outputs - targets)


def _log_2(classes: int) -> float:
    del classes
    return math.log(2)


LOSSES = MappingProxyType(
    {
        "absolute_error": LossSpec(absolute_error, "regression"),
        "binary_dice_loss": LossSpec(losses.binary_dice_loss, "binary"),
        "cosine_distance": LossSpec(losses.cosine_distance, "vector"),
        "dice_loss": LossSpec(losses.dice_loss, "distribution"),
        "generalized_kl_divergence": LossSpec(
            losses.generalized_kl_divergence, "distribution"
        ),
        "hinge_loss": LossSpec(losses.hinge_loss, "margin"),
        "huber_loss": LossSpec(losses.huber_loss, "regression"),
        "kl_divergence": LossSpec(losses.kl_divergence, "distribution"),
        "kl_divergence_with_log_targets": LossSpec(
            losses.kl_divergence_with_log_targets, "distribution"
        ),
        "l2_loss": LossSpec(losses.l2_loss, "regression"),
        "log_cosh": LossSpec(losses.log_cosh, "regression"),
        "multiclass_hinge_loss": LossSpec(losses.multiclass_hinge_loss, "integer"),
        "multiclass_perceptron_loss": LossSpec(
            losses.multiclass_perceptron_loss, "integer"
        ),
        "multiclass_sparsemax_loss": LossSpec(
            losses.multiclass_sparsemax_loss, "integer"
        ),
        "perceptron_loss": LossSpec(losses.perceptron_loss, "margin"),
        "poly_loss_cross_entropy": LossSpec(
            losses.poly_loss_cross_entropy, "distribution", takes_logits=True
        ),
        "ranking_softmax_loss": LossSpec(
            functools.partial(losses.ranking_softmax_loss, reduce_fn=None), "regression"
        ),
        "safe_softmax_cross_entropy": LossSpec(
            losses.safe_softmax_cross_entropy,
            "distribution",
            takes_logits=True,
            chance=math.log,
        ),
        "sigmoid_binary_cross_entropy": LossSpec(
            losses.sigmoid_binary_cross_entropy,
            "binary",
            takes_logits=True,
            smoothable=True,
            chance=_log_2,
        ),
        "sigmoid_focal_loss": LossSpec(
            losses.sigmoid_focal_loss, "binary", takes_logits=True
        ),
        "softmax_cross_entropy": LossSpec(
            losses.softmax_cross_entropy,
            "distribution",
            takes_logits=True,
            smoothable=True,
            chance=math.log,
        ),
        "softmax_cross_entropy_with_integer_labels": LossSpec(
            losses.softmax_cross_entropy_with_integer_labels,
            "integer",
            takes_logits=True,
            smoothable=True,
            chance=math.log,
        ),
        "sparsemax_loss": LossSpec(losses.sparsemax_loss, "binary"),
        "squared_error": LossSpec(squared_error, "regression"),
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
    """Returns all names of losses, aliases last."""
    return (*LOSSES, *ALIASES)


def look_up(fn: LossFn | str) -> tuple[str | None, LossSpec]:
    """Returns the name of a loss (None for a custom function) and its facts."""
    if isinstance(fn, str):
        name = ALIASES.get(fn.lower(), fn.lower())
        if name not in LOSSES:
            raise _unknown_name(fn)
        return name, LOSSES[name]
    if isinstance(fn, type):
        raise UsageTypeError(
            f"loss is the class {fn.__name__}",
            write=f"{fn.__name__}(...), a name, or a function (outputs, targets)",
        )
    if not callable(fn):
        raise UsageTypeError(
            f"A loss is a name or a function (outputs, targets) -> float[batch], not "
            f"{type(fn).__name__}",
            write="Loss('squared_error')",
        )
    known = _known_name(fn)
    if known is not None:
        return known, LOSSES[known]._replace(fn=fn)
    check_argument_order(fn, "loss", "loss=lambda outputs, targets: {call}")
    return None, LossSpec(fn, "custom")


def _known_name(fn: LossFn) -> str | None:
    """Returns the name of a function in the table, or of a `partial` of one."""
    for name, spec in LOSSES.items():
        if fn is spec.fn:
            return name
    if fn is optax.losses.squared_error:
        return "squared_error"
    if isinstance(fn, functools.partial) and not fn.args:
        return _known_name(fn.func)
    return None


def _unknown_name(name: str) -> UsageError:
    if callable(getattr(optax.losses, name, None)):
        return UsageError(
            f"optax.losses.{name} does not return one value per example for (outputs, "
            "targets), so it cannot be given by name",
            "Pass a function that calls it",
            "Trainer(model, loss=lambda outputs, targets: ...)",
        )
    near = did_you_mean(name, loss_names())
    return UsageError(
        f"There is no loss {name!r}.{near}",
        f"Names: {', '.join(LOSSES)}; as in Keras: {', '.join(ALIASES)}",
        "one of them, or a function (outputs, targets) -> float[batch]",
    )
