"""Errors for Keras habits that would fail here, or silently do something else."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from flaxfit._core.errors import UsageError, UsageTypeError

_TARGETS = frozenset({"label", "labels", "target", "targets", "true", "y", "y_true"})
_OUTPUTS = frozenset(
    {
        *("logit", "logits", "output", "outputs", "pred", "preds", "prediction"),
        *("predictions", "y_hat", "y_pred"),
    }
)


def refuse_list(return_dict: Any) -> None:
    """Checks Keras's `return_dict`.

    Raises:
      UsageError: it is not True.
    """
    if return_dict is not True:
        raise UsageError(
            f"Got return_dict={return_dict!r}",
            "Values are always returned by name",
            'values = trainer.evaluate(x, y); values["loss"]',
        )


def compile_without_data(arguments: Iterable[str]) -> UsageTypeError:
    """Returns the error for Keras's `compile`, which configures a model."""
    given = ", ".join(f"{name}=..." for name in arguments)
    return UsageTypeError(
        f"compile({given}) has nothing to configure here",
        "trainer.compile(x, y) compiles ahead for that data",
        "Trainer(model, loss=..., optimizer=..., metrics=...), then fit",
    )


def check_argument_order(fn: Callable[..., Any], kind: str, write: str) -> None:
    """Checks that a function does not take `(targets, outputs)`, as in Keras.

    Args:
      fn: the user's function.
      kind: `"loss"` or `"metric"`.
      write: the line to write instead, with `{name}` and `{call}` to be filled in.

    Raises:
      UsageTypeError: the names of its arguments are in that order.
    """
    first, second = _first_two_arguments(fn)
    # (y, t) and (y, _) have the outputs first.
    swapped = first.lower() in _TARGETS and not (
        second.lower() in (*_TARGETS, "t") or second.startswith("_")
    )
    if swapped or (second.lower() in _OUTPUTS and first.lower() not in _OUTPUTS):
        name = function_name(fn)
        called = "f" if name == "<lambda>" else name
        raise UsageTypeError(
            f"The {kind} {name} takes ({first}, {second}), as in Keras",
            "It is called with (outputs, targets), as in optax",
            write.format(name=called, call=f"{called}(targets, outputs)")
            + "; if that is its order already, rename its arguments",
        )


def function_name(fn: Callable[..., Any]) -> str:
    """Returns the name of a function, also of a `functools.partial`."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return str(getattr(fn, "__name__", type(fn).__name__))


def _first_two_arguments(fn: Callable[..., Any]) -> tuple[str, str]:
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # A builtin may have no signature.
        return "", ""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in kinds]
    return (names[0], names[1]) if len(names) > 1 else ("", "")
