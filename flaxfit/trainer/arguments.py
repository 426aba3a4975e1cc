"""Checks the arguments of `Trainer`."""

from collections.abc import Mapping
from typing import Any

import flax.core

from flaxfit._core.types import PyTree
from flaxfit._core.validation import choice, integer, names, switch
from flaxfit._models.base import Overrides
from flaxfit._programs.resolve import Settings
from flaxfit._programs.steps import make_train_step

_OPTIMIZER_OPTIONS = ("weight_decay", "clip_norm", "accumulate_steps", "freeze")


def checked_settings(given: Mapping[str, Any]) -> Settings:
    """Returns the settings from the arguments of `Trainer` by name.

    Raises:
      ValueError: a value is wrong.
    """
    policies = ("stop", "skip", "rollback", "ignore")
    return Settings(
        loss=given["loss"],
        loss_weights=given["loss_weights"],
        optimizer=given["optimizer"],
        learning_rate=given["learning_rate"],
        metrics=given["metrics"],
        overrides=Overrides(
            given["train_flag"],
            names("collections", given["collections"]),
            names("rngs", given["rngs"]),
        ),
        optimizer_options={name: given[name] for name in _OPTIMIZER_OPTIONS},
        variables=_as_variables(given["variables"]),
        seed=integer("seed", given["seed"], least=0),
        make_train_step=given["make_train_step"] or make_train_step,
        nonfinite=choice("nonfinite", given["nonfinite"], policies),
        scale_images=switch("scale_images", given["scale_images"]),
    )


def _as_variables(variables: Any) -> dict[str, PyTree]:
    """Returns the variables to start from as a dict of collections."""
    if variables is None:
        return {}
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"variables is a {type(variables).__name__}; give collections by name, as "
            f"module.init returns them: variables={{'params': params}}."
        )
    # Inner FrozenDicts would make all programs compile again after a restore.
    return dict(flax.core.unfreeze(dict(variables)))
