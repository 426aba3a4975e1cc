"""Adapts Flax linen modules; detection uses abstract traces only."""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import flax.core
import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxfit._core.errors import DetectionError
from flaxfit._core.tree_specs import form_of, path_text
from flaxfit._core.types import CallSpec, Inputs, Model, PyTree
from flaxfit._models.base import Adapted, Detected, Overrides, stream_rngs
from flaxfit._models.linen_flag import (
    TrainFlag,
    find_train_flag,
    in_mode,
    no_flag_error,
    parameters_of,
)
from flaxfit._models.linen_summary import layer_table

# These are never state by convention, though a `sow` that reduces keeps its shape too.
NEVER_CARRIED = frozenset({"losses", "metrics", "intermediates", "perturbations"})
_MAX_TRACES = 32


@dataclass
class Findings:
    """The findings of the abstract traces so far, named as in `Detected`.

    `moded_layers` holds the types of layers that need a train flag.
    """

    rngs: set[str] = field(default_factory=set)
    eval_rngs: set[str] = field(default_factory=set)
    axis_names: list[str] = field(default_factory=list)
    moded_layers: set[str] = field(default_factory=set)
    vocabularies: dict[str, int] = field(default_factory=dict)


def call_spec(module: nn.Module, overrides: Overrides) -> CallSpec:
    """Returns the inputs that `module.__call__` takes, without its train flags."""
    parameters = parameters_of(module)
    flags = {name for name, _ in find_train_flag(module, overrides).arguments}
    kinds = inspect.Parameter
    found = {p.kind for p in parameters.values()}
    variadic = (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
    inputs = [
        p for p in parameters.values() if p.name not in flags and p.kind not in variadic
    ]
    return CallSpec(
        positional=tuple(p.name for p in inputs if p.kind is not kinds.KEYWORD_ONLY),
        keyword_only=tuple(p.name for p in inputs if p.kind is kinds.KEYWORD_ONLY),
        required=tuple(p.name for p in inputs if p.default is kinds.empty),
        var_positional=kinds.VAR_POSITIONAL in found,
        var_keyword=kinds.VAR_KEYWORD in found,
    )


def adapt(module: nn.Module, inputs: Inputs, overrides: Overrides) -> Adapted:
    """Returns the module as pure functions, with everything detected.

    `inputs` is one batch, as the module is called with it; shapes are enough.

    Raises:
      DetectionError: BatchNorm or Dropout without a train flag, or a flag or
        collection in `overrides` that the module does not have.
    """
    flag = find_train_flag(module, overrides)
    found = Findings()
    if not isinstance(overrides.rngs, str):
        found.rngs.update(overrides.rngs)
    initial, after_train = _trace_until_known(module, inputs, flag, found)
    if flag.name == "none" and overrides.train_flag == "auto" and found.moded_layers:
        raise no_flag_error(module, found.moded_layers)
    carried = _carried(initial, after_train, overrides)
    written = set(initial) | set(after_train)
    sown = tuple(sorted(written - set(carried) - {"params"}))
    rngs = tuple(sorted(found.rngs))
    model = _make_model(module, flag, carried, rngs, tuple(found.axis_names))
    detected = Detected(
        name=type(module).__name__,
        carried=carried,
        sown=sown,
        rngs=rngs,
        eval_rngs=tuple(sorted(found.eval_rngs)),
        train_flag=flag.name,
        axis_names=tuple(found.axis_names),
        vocabularies=found.vocabularies,
        reasons=_reasons(found, carried, sown),
    )

    def variables(inputs: Inputs) -> dict[str, PyTree]:
        params, collections = model.init(jax.random.key(0), inputs)
        return {"params": params, **collections}

    return Adapted(model, detected, lambda example: layer_table(variables, example))


def _make_model(
    module: nn.Module,
    flag: TrainFlag,
    carried: tuple[str, ...],
    rngs: tuple[str, ...],
    axis_names: tuple[str, ...],
) -> Model:
    def init(rng: jax.Array, inputs: Inputs) -> tuple[PyTree, dict[str, PyTree]]:
        streams = {**stream_rngs(rng, rngs), "params": rng}
        variables = _bind_axes(lambda: _init(module, flag, inputs, streams), axis_names)
        return variables.get("params", {}), {n: variables[n] for n in carried}

    def apply(
        params: PyTree,
        collections: dict[str, PyTree],
        inputs: Inputs,
        *,
        train: bool,
        rngs: Mapping[str, jax.Array],
    ) -> tuple[PyTree, dict[str, PyTree], dict[str, PyTree]]:
        variables = {"params": params, **collections}
        outputs, updated = _bind_axes(
            lambda: _apply(module, flag, variables, inputs, train, rngs), axis_names
        )
        sown = {n: v for n, v in updated.items() if n not in carried}
        return outputs, {n: updated[n] for n in carried}, sown

    return Model(init, apply)


def _bind_axes(function: Callable[[], Any], axis_names: tuple[str, ...]) -> Any:
    # Modules written for pmap name a mapped axis. An axis of size 1 changes no
    # result: under jit, statistics are global already.
    for name in axis_names:
        mapped = jax.vmap(
            lambda unused, inner=function: inner(), axis_name=name, out_axes=None
        )
        function = partial(mapped, jnp.zeros(1))
    return function()


def _init(
    module: nn.Module, flag: TrainFlag, inputs: Inputs, rngs: Mapping[str, Any]
) -> dict[str, PyTree]:
    with in_mode(module, inputs, flag, True) as (target, args, named):
        return dict(flax.core.unfreeze(target.init(dict(rngs), *args, **named)))


def _apply(
    module: nn.Module,
    flag: TrainFlag,
    variables: Mapping[str, PyTree],
    inputs: Inputs,
    train: bool,
    rngs: Mapping[str, Any],
) -> tuple[PyTree, dict[str, PyTree]]:
    with in_mode(module, inputs, flag, train) as (target, args, named):
        # Collections are mutable in evaluation too: BatchNorm under `nn.scan` needs
        # it, and a module may count its calls. The eval step drops the updates.
        outputs, updated = target.apply(
            variables,
            *args,
            **named,
            rngs=dict(rngs),
            mutable=flax.core.DenyList("params"),
        )
        return outputs, dict(flax.core.unfreeze(updated))


def _trace_until_known(
    module: nn.Module, inputs: Inputs, flag: TrainFlag, found: Findings
) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """Traces init, train and eval abstractly until a trace finds nothing new.

    An error names a stream or an axis to supply in the next trace.
    """

    def trace(inputs: Inputs) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
        key, axes = jax.random.key(0), tuple(found.axis_names)

        def call(train: bool, drawn: set[str], asked: set[str]) -> dict[str, PyTree]:
            streams = dict.fromkeys(drawn, key)
            with nn.intercept_methods(_note_streams(drawn, asked)):
                _, updated = _bind_axes(
                    lambda: _apply(module, flag, variables, inputs, train, streams),
                    axes,
                )
            return updated

        with nn.intercept_methods(_note_layers(found, inputs)):
            # Only init gets a "params" stream: in a call, Flax would use it for any
            # missing stream, e.g. give all rows of an `nn.vmap` the same mask.
            streams = dict.fromkeys((*found.rngs, "params"), key)
            initial = _bind_axes(lambda: _init(module, flag, inputs, streams), axes)
            variables = {n: v for n, v in initial.items() if n not in NEVER_CARRIED}
            after_train = call(True, found.rngs, asked=found.rngs)
            # In evaluation, a stream that the model only asks for is not supplied: the
            # model may be using it to detect training.
            call(False, found.eval_rngs, asked=set())
        return initial, after_train

    for _ in range(_MAX_TRACES):
        known = (set(found.rngs), set(found.eval_rngs))
        try:
            # A new function each time, as jax caches traces by function.
            traced = jax.eval_shape(lambda x: trace(x), inputs)
        except NameError as error:
            names = found.axis_names
            names.append(_new_name(r"unbound axis name:? (\w+)", error, names))
        except flax.errors.InvalidRngError as error:
            # A missing stream was already noted, unless a function inside a lifted
            # transform draws from it. If the transform drops a stream that was
            # supplied, that is an error of the model.
            if known == (found.rngs, found.eval_rngs):
                both = found.rngs & found.eval_rngs
                name = _new_name(r'PRNG for "(.+)"', error, both)
                (found.eval_rngs if name in found.rngs else found.rngs).add(name)
        except ValueError as error:
            unset = "must be passed to the constructor or at call time" in str(error)
            if unset and flag.name == "none":
                raise no_flag_error(module, found.moded_layers) from error
            raise
        else:
            # With the new streams supplied, the model may draw from further ones.
            if known == (found.rngs, found.eval_rngs):
                return traced
    raise DetectionError(  # pragma: no cover - more streams than anyone names
        f"{type(module).__name__} asks for more than {_MAX_TRACES} RNG streams and "
        "axis names",
        write="Trainer(model, rngs=[...]) with the names of the streams",
    )


def _note_streams(drawn: set[str], asked: set[str]) -> Callable[..., Any]:
    """Notes the streams that a call draws from (`make_rng`) or asks for (`has_rng`).

    It misses both in a function inside a lifted transform, until that function has
    called a method of the module it is given.
    """

    def note(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module

        def make_rng(name: str = "params") -> Any:
            drawn.add(name)
            return type(module).make_rng(module, name)

        def has_rng(name: str) -> bool:
            asked.add(name)
            return bool(type(module).has_rng(module, name))

        # Flax calls a copy of the user's module, made for this one call.
        vars(module).update(make_rng=make_rng, has_rng=has_rng)
        return next_fun(*args, **kwargs)

    return note


def _new_name(pattern: str, error: Exception, known: Any) -> str:
    match = re.search(pattern, str(error))
    if match is None or match[1] in known:
        raise error
    return match[1]


def _note_layers(found: Findings, inputs: Inputs) -> Callable[..., Any]:
    """Notes layers that need a train flag, and `nn.Embed`s called on an input itself.

    `nn.Embed` silently returns NaN for a token beyond its table, and a row from the end
    for a negative token. If the table's size is known, the data can be checked.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(inputs)

    def note(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        rate = module.rate if isinstance(module, nn.Dropout) else 0
        if hasattr(module, "deterministic"):  # attention layers
            rate = rate or getattr(module, "dropout_rate", 0)
        if rate or isinstance(module, nn.BatchNorm):
            found.moded_layers.add(type(module).__name__)
        if isinstance(module, nn.Embed) and context.method_name == "__call__":
            tokens = args[0] if args else kwargs.get("inputs")
            for path, leaf in leaves:
                if leaf is tokens:
                    name = path_text(path)
                    rows = found.vocabularies.get(name, module.num_embeddings)
                    found.vocabularies[name] = min(rows, module.num_embeddings)
        return next_fun(*args, **kwargs)

    return note


def _carried(
    initial: dict[str, PyTree], after: dict[str, PyTree], overrides: Overrides
) -> tuple[str, ...]:
    made = set(initial) - {"params"}
    if not isinstance(overrides.collections, str):
        asked = tuple(overrides.collections)
        if missing := sorted(set(asked) - made):
            raise DetectionError(
                f"collections={list(asked)}: the model's init makes no "
                f"{', '.join(map(repr, missing))}; it makes {sorted(made)}"
            )
        return tuple(sorted(asked))
    return tuple(
        sorted(
            name
            for name in made - NEVER_CARRIED
            if name in after and form_of(initial[name]) == form_of(after[name])
        )
    )


def _reasons(
    found: Findings, carried: tuple[str, ...], sown: tuple[str, ...]
) -> dict[str, str]:
    layers = ", ".join(sorted(found.moded_layers))
    return {
        "collections": "init makes them, and a call returns them in the same form"
        if carried
        else "besides params, init makes nothing that a call returns in the same form",
        "sown": "a call writes them: losses are added to the loss, metrics logged"
        if sown
        else "a call writes no other collection",
        "rngs": "a call in training uses them"
        if found.rngs
        else "no call uses a random stream",
        "train flag": f"layers that need one: {layers}"
        if layers
        else "no BatchNorm or Dropout found",
    }
