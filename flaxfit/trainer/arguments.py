"""Argument checks of the trainer alone."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.core

from flaxfit._core.types import PyTree
from flaxfit._core.validation import integer


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
    # FrozenDicts inside would have everything recompiled once a state is restored.
    return dict(flax.core.unfreeze(dict(variables)))


def as_epoch_filter(frequency: int | Iterable[int]) -> Callable[[int], bool]:
    """Returns whether to validate after an epoch (from 0).

    Args:
      frequency: a number of epochs between validations, or the epochs from 1.

    Raises:
      ValueError: not a whole number of at least 1, or a list of them.
    """
    if isinstance(frequency, Iterable) and not isinstance(frequency, str):
        after = frozenset(integer("validation_freq", epoch) for epoch in frequency)
        return lambda epoch: epoch + 1 in after
    every = integer("validation_freq", frequency)
    return lambda epoch: (epoch + 1) % every == 0
