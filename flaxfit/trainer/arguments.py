"""Argument checks for names, fractions and lists of callbacks."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.core
import numpy as np

from flaxfit._core.counts import as_count
from flaxfit._core.errors import did_you_mean
from flaxfit._core.types import PyTree
from flaxfit.callbacks.base import Callback


def as_steps_per_call(value: Any) -> int | None:
    """Returns a number of steps, None for `"auto"`.

    Raises:
      ValueError: anything else.
    """
    if isinstance(value, str) and value == "auto":
        return None
    try:
        return as_count("steps_per_call", value)
    except ValueError as error:
        raise ValueError(f'{error} Or "auto", to go by the clock.') from None


def as_share(argument: str, value: Any) -> float:
    """Returns a share between 0 and 1.

    Raises:
      ValueError: anything else.
    """
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:
        raise ValueError(
            f"{argument}={value!r}: write a share of the free device memory between 0, "
            f"for none, and 1: {argument}=0.5."
        )
    return float(value)


def refuse_list(return_dict: Any) -> None:
    """Checks Keras's `return_dict`.

    Raises:
      ValueError: a list is asked for.
    """
    if return_dict is not True:
        raise ValueError(
            f"return_dict={return_dict!r}: values come by name, always. Write "
            'values = trainer.evaluate(x, y); values["loss"].'
        )


def as_names(argument: str, names: str | Iterable[str]) -> str | tuple[str, ...]:
    """Returns `"auto"` or a tuple of names.

    Raises:
      ValueError: one name without a list around it.
    """
    if isinstance(names, str):
        if names == "auto":
            return names
        raise ValueError(f"{argument}={names!r}: write a list, {argument}=[{names!r}].")
    return tuple(names)


def as_variables(variables: Any) -> dict[str, PyTree]:
    """Returns the variables to start from as a dict of collections.

    Raises:
      TypeError: not a mapping.
    """
    if variables is None:
        return {}
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"variables is a {type(variables).__name__}; it takes collections by name, "
            f"as module.init returns them: variables={{'params': params}}."
        )
    # FrozenDicts inside would compile everything anew once a state is restored.
    return dict(flax.core.unfreeze(dict(variables)))


def as_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Returns one of `choices`.

    Raises:
      ValueError: it is none of them.
    """
    if not isinstance(value, str) or value not in choices:
        known = ", ".join(repr(choice) for choice in choices)
        hint = did_you_mean(str(value), choices)
        raise ValueError(f"{name}={value!r}: write one of {known}.{hint}")
    return value


def as_switch(name: str, value: Any) -> bool | str:
    """Returns True, False or `"auto"`.

    Raises:
      ValueError: it is none of them.
    """
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if value != "auto":
        raise ValueError(f'{name}={value!r}: write True, False or "auto".')
    return "auto"


def as_epoch_filter(frequency: int | Iterable[int]) -> Callable[[int], bool]:
    """Returns whether to validate after an epoch (from 0).

    Args:
      frequency: every so many epochs, or the epochs, counted from 1.

    Raises:
      ValueError: not a whole number of at least 1, or a list of them.
    """
    if isinstance(frequency, Iterable) and not isinstance(frequency, str):
        after = frozenset(as_count("validation_freq", epoch) for epoch in frequency)
        return lambda epoch: epoch + 1 in after
    every = as_count("validation_freq", frequency)
    return lambda epoch: (epoch + 1) % every == 0


def as_callbacks(callbacks: Any) -> list[Callback]:
    """Returns a list of callbacks from one, several or None.

    Raises:
      TypeError: a class, or something that is no `Callback`.
    """
    given = [callbacks] if isinstance(callbacks, Callback) else callbacks or []
    for callback in given if isinstance(given, Iterable) else [given]:
        if isinstance(callback, type):
            raise TypeError(
                f"callbacks holds the class {callback.__name__}: write "
                f"{callback.__name__}()."
            )
        if not isinstance(callback, Callback):
            raise TypeError(
                f"callbacks holds a {type(callback).__name__}: write a subclass of "
                f"flaxfit.Callback, or LambdaCallback(on_epoch_end=function)."
            )
        _check_hooks(callback)
    return list(given)


def _check_hooks(callback: Callback) -> None:
    """Refuses hooks nobody would call, and those written for Keras's arguments."""
    hooks = [name for name in vars(Callback) if name.startswith("on_")]
    kind = type(callback).__name__
    for name in dir(callback):
        if not name.startswith("on_") or not callable(getattr(callback, name)):
            continue
        if name not in hooks:
            raise TypeError(
                f"{kind}.{name} is no hook and would never be called."
                f"{did_you_mean(name, hooks)} The hooks are {', '.join(hooks)}."
            )
        if not _takes_loop(getattr(callback, name)):
            raise TypeError(
                f"{kind}.{name} must take one argument, the LoopState: write "
                f"def {name}(self, loop), and loop.epoch, loop.batch, loop.logs in it."
            )


def _takes_loop(hook: Callable[..., Any]) -> bool:
    try:
        signature = inspect.signature(hook)
    except ValueError:  # A builtin, such as print.
        return True
    try:
        signature.bind(None)
    except TypeError:
        return False
    # Keras's (epoch, logs=None) would be given the LoopState as `epoch`.
    return "logs" not in signature.parameters
