"""Maps a model to its family; the only place that checks its type."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax

from flaxfit._core.errors import UsageTypeError
from flaxfit._core.types import CallSpec, Inputs, Model
from flaxfit._models import linen
from flaxfit._models.base import Adapted, Detected, ModelFamily, Overrides


def model_family(model: Any) -> ModelFamily:
    """Returns the functions that adapt a linen module or a `Model`.

    Raises:
      TypeError: anything else, e.g. a class instead of an instance.
    """
    if isinstance(model, nn.Module):
        return ModelFamily(partial(linen.call_spec, model), partial(linen.adapt, model))
    if isinstance(model, Model):
        return ModelFamily(lambda unused: CallSpec(), partial(_adapt_functions, model))
    if isinstance(model, type):
        raise UsageTypeError(
            f"Trainer got the class {model.__name__}, not a module",
            write=f"Trainer({model.__name__}(...))",
        )
    if any(base.__module__.startswith("flax.nnx") for base in type(model).__mro__):
        raise UsageTypeError(
            f"{type(model).__name__} is a flax.nnx module, but this version trains "
            "flax.linen modules",
            write="Trainer(flaxfit.Model(init, apply)) with two pure functions",
        )
    raise UsageTypeError(
        f"Trainer got a {type(model).__name__}; it takes a flax.linen module or "
        "flaxfit.Model(init, apply)",
        write="e.g. Trainer(nn.Dense(10))",
    )


def _adapt_functions(model: Model, inputs: Inputs, overrides: Overrides) -> Adapted:
    key = jax.random.key(0)
    _, collections = jax.eval_shape(model.init, key, inputs)
    asked = ("dropout",) if isinstance(overrides.rngs, str) else tuple(overrides.rngs)
    detected = Detected(
        name="Model",
        carried=tuple(sorted(collections)),
        rngs=asked,
        eval_rngs=asked,
        train_flag="train=",
        reasons={
            "rngs": "as given by rngs=, dropout by default",
            "train flag": "an argument of Model.apply",
        },
    )
    return Adapted(model, detected, lambda unused: "Model(init, apply)")
