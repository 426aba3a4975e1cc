"""Library-independent description of a model."""

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

from flaxfit._core.types import Array, CallSpec, Inputs, Model


@dataclass(frozen=True)
class Detected:
    """The properties detected in a model.

    Attributes:
      name: the module's class name.
      carried: the collections that are carried from step to step.
      sown: the collections that a call only writes.
      rngs: the names of the RNG streams that training draws from or asks for.
      eval_rngs: the names of the streams that evaluation draws from.
      train_flag: the train flag, as the first line of `fit` shows it.
      axis_names: the mapped axes that the model names; each gets an axis of size 1.
      vocabularies: path of a token input -> the rows of its embedding table.
      reasons: the name of an item -> why it was detected, for `Trainer.check`.
    """

    name: str
    carried: tuple[str, ...] = ()
    sown: tuple[str, ...] = ()
    rngs: tuple[str, ...] = ()
    eval_rngs: tuple[str, ...] = ()
    train_flag: str = "none"
    axis_names: tuple[str, ...] = ()
    vocabularies: Mapping[str, int] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)


class Adapted(NamedTuple):
    """A model of any library, ready for the steps."""

    model: Model
    detected: Detected
    summary: Callable[[Inputs], str]


@dataclass(frozen=True)
class Overrides:
    """The user's settings; `"auto"` stands for detection. See `Trainer`."""

    train_flag: str | Callable[[Any, bool], Any] | None = "auto"
    collections: str | Iterable[str] = "auto"
    rngs: str | Iterable[str] = "auto"


class ModelFamily(NamedTuple):
    """The two functions that adapt one model.

    Attributes:
      call_spec: returns the inputs of the model's call.
      adapt: returns the model as pure functions.
    """

    call_spec: Callable[[Overrides], CallSpec]
    adapt: Callable[[Inputs, Overrides], Adapted]


def stream_rngs(
    rng: Array, names: Iterable[str], step: Array | int | None = None
) -> dict[str, Array]:
    """Returns a key for every stream: `fold_in(fold_in(rng, crc32(name)), step)`.

    Without `step`, it is the inner key. A stream added later changes no other stream,
    and no key has to be carried from step to step.
    """
    keys = {n: jax.random.fold_in(rng, zlib.crc32(n.encode())) for n in names}
    if step is None:
        return keys
    return {n: jax.random.fold_in(key, step) for n, key in keys.items()}
