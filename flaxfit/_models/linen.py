"""Adapts Flax linen modules; detection uses abstract traces only."""

import contextlib
import inspect
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import flax.core
import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxfit._core.errors import DetectionError
from flaxfit._core.types import CallSpec, Inputs, Model, PyTree
from flaxfit._models.base import Adapted, Detected, Overrides, stream_rngs
from flaxfit._models.linen_flag import (
    TrainFlag,
    call_arguments,
    find_train_flag,
    in_mode,
    no_flag_error,
    parameters_of,
)
from flaxfit._models.linen_summary import layer_table

# Written by convention, never state: a `sow` that reduces keeps its shape.
NEVER_CARRIED = frozenset({"losses", "metrics", "intermediates", "perturbations"})
_MAX_TRACES = 32
_ONE_AT_A_TIME = threading.RLock()  # flax's Scope is the same in all threads


@dataclass
class Probe:
    """What the abstract traces have learnt so far; local to one detection."""

    rngs: set[str] = field(default_factory=set)
    eval_rngs: set[str] = field(default_factory=set)
    axis_names: list[str] = field(default_factory=list)
    moded_layers: set[str] = field(default_factory=set)
    vocabularies: dict[str, int] = field(default_factory=dict)


def call_spec(module: nn.Module, overrides: Overrides) -> CallSpec:
    """Returns the inputs `module.__call__` takes, without its train flag."""
    parameters = parameters_of(module)
    flags = {name for name, _ in find_train_flag(module, overrides).arguments}
    kinds = inspect.Parameter
    inputs = {
        name: p
        for name, p in parameters.items()
        if name not in flags and p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
    }
    return CallSpec(
        positional=tuple(n for n, p in inputs.items() if p.kind != kinds.KEYWORD_ONLY),
        keyword_only=tuple(
            n for n, p in inputs.items() if p.kind == kinds.KEYWORD_ONLY
        ),
        required=tuple(n for n, p in inputs.items() if p.default is kinds.empty),
        var_positional=any(p.kind == kinds.VAR_POSITIONAL for p in parameters.values()),
        var_keyword=any(p.kind == kinds.VAR_KEYWORD for p in parameters.values()),
    )


def adapt(module: nn.Module, inputs: Inputs, overrides: Overrides) -> Adapted:
    """Returns the module as pure functions, with everything detected.

    Args:
      module: any linen module, unbound.
      inputs: one batch of inputs as it is called with; shapes are enough.
      overrides: what not to detect.

    Raises:
      DetectionError: BatchNorm or Dropout without a train flag.
    """
    flag = find_train_flag(module, overrides)
    probe = Probe()
    if not isinstance(overrides.rngs, str):
        probe.rngs.update(overrides.rngs)
    traced = _trace_until_known(module, inputs, flag, probe)
    if flag.name == "none" and overrides.train_flag == "auto" and probe.moded_layers:
        raise no_flag_error(module, probe.moded_layers)
    initial, after_train = traced
    carried = _carried(initial, after_train, overrides)
    written = set(initial) | set(after_train)
    sown = tuple(sorted(written - set(carried) - {"params"}))
    rngs = tuple(sorted(probe.rngs))
    model = _make_model(module, flag, carried, rngs, tuple(probe.axis_names))
    detected = Detected(
        name=type(module).__name__,
        carried=carried,
        sown=sown,
        rngs=rngs,
        eval_rngs=tuple(sorted(probe.eval_rngs)),
        train_flag=flag.name,
        axis_names=tuple(probe.axis_names),
        vocabularies=probe.vocabularies,
        reasons=_reasons(flag, probe, carried, sown),
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
    # Code from the pmap age names a mapped axis. One of size 1, over which
    # nothing varies, changes no number: under jit the statistics are global.
    for name in axis_names:
        function = _bound(function, name)
    return function()


def _bound(function: Callable[[], Any], name: str) -> Callable[[], Any]:
    return lambda: jax.vmap(lambda unused: function(), axis_name=name, out_axes=None)(
        jnp.zeros(1)
    )


def _init(
    module: nn.Module, flag: TrainFlag, inputs: Inputs, rngs: Mapping[str, Any]
) -> dict[str, PyTree]:
    with in_mode(module, flag, True) as (target, kwargs):
        args, named = call_arguments(target, inputs, kwargs)
        return dict(flax.core.unfreeze(target.init(dict(rngs), *args, **named)))


def _apply(
    module: nn.Module,
    flag: TrainFlag,
    variables: Mapping[str, PyTree],
    inputs: Inputs,
    train: bool,
    rngs: Mapping[str, Any],
) -> tuple[PyTree, dict[str, PyTree]]:
    with in_mode(module, flag, train) as (target, kwargs):
        args, named = call_arguments(target, inputs, kwargs)
        # Mutable in evaluation too: BatchNorm under `nn.scan` needs it, and a
        # module may count its calls. Whoever evaluates drops what comes back.
        outputs, updated = target.apply(
            variables,
            *args,
            **named,
            rngs=dict(rngs),
            mutable=flax.core.DenyList("params"),
        )
        return outputs, dict(flax.core.unfreeze(updated))


def _trace_until_known(
    module: nn.Module, inputs: Inputs, flag: TrainFlag, probe: Probe
) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """Traces init, train and eval abstractly, learning from each refusal."""

    def trace(inputs: Inputs) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
        key = jax.random.key(0)
        # "params" stands in for every stream that is not known yet.
        streams = dict.fromkeys((*probe.rngs, "params"), key)
        eval_streams = dict.fromkeys((*probe.eval_rngs, "params"), key)
        axes = tuple(probe.axis_names)
        initial = _bind_axes(lambda: _init(module, flag, inputs, streams), axes)
        variables = {n: v for n, v in initial.items() if n not in NEVER_CARRIED}
        with (
            nn.intercept_methods(_note_vocabularies(probe, inputs)),
            _noting_streams(drawn=probe.rngs, asked=probe.rngs),
        ):
            _, after_train = _bind_axes(
                lambda: _apply(module, flag, variables, inputs, True, streams), axes
            )
        # In evaluation a stream that is only asked for stays out: it may be there
        # to tell training from evaluation.
        with _noting_streams(drawn=probe.eval_rngs, asked=set()):
            _bind_axes(
                lambda: _apply(module, flag, variables, inputs, False, eval_streams),
                axes,
            )
        return initial, after_train

    for _ in range(_MAX_TRACES):
        known = (set(probe.rngs), set(probe.eval_rngs))
        try:
            with nn.intercept_methods(_note_moded_layers(probe)):
                # A function of its own each time: jax remembers what it has traced.
                traced = jax.eval_shape(lambda x: trace(x), inputs)
        except NameError as error:
            names = probe.axis_names
            names.append(_new_name(r"unbound axis name:? (\w+)", error, names))
        except ValueError as error:
            unset = "must be passed to the constructor or at call time" in str(error)
            if unset and flag.name == "none":
                raise no_flag_error(module, probe.moded_layers) from error
            raise
        else:
            # A stream that is there may open the way to others.
            if known == (probe.rngs, probe.eval_rngs):
                _keep_params_if_drawn(module, flag, inputs, probe, traced[0])
                return traced
    raise DetectionError(  # pragma: no cover - more streams than anyone names
        f"{type(module).__name__} asks for more than {_MAX_TRACES} RNG streams and "
        f"axis names; name the streams: Trainer(model, rngs=[...])."
    )


def _keep_params_if_drawn(
    module: nn.Module,
    flag: TrainFlag,
    inputs: Inputs,
    probe: Probe,
    initial: dict[str, PyTree],
) -> None:
    """Drops the stream "params" where nothing but a lifted transform touched it.

    Supplied without need it would stand in for streams that are not, e.g. give all
    rows of an `nn.vmap` one mask.
    """
    variables = {n: v for n, v in initial.items() if n not in NEVER_CARRIED}
    for train, streams in ((True, probe.rngs), (False, probe.eval_rngs)):
        if "params" not in streams:
            continue
        streams.discard("params")

        def trace(variables: PyTree, inputs: Inputs, train: bool = train) -> Any:
            names = probe.rngs if train else probe.eval_rngs
            rngs = dict.fromkeys(names, jax.random.key(0))
            return _bind_axes(
                lambda: _apply(module, flag, variables, inputs, train, rngs),
                tuple(probe.axis_names),
            )

        try:
            jax.eval_shape(trace, variables, inputs)
        except flax.errors.InvalidRngError as error:
            if 'PRNG for "params"' not in str(error):
                raise
            streams.add("params")


@contextlib.contextmanager
def _noting_streams(drawn: set[str], asked: set[str]) -> Iterator[None]:
    """Notes the streams a call draws from (`make_rng`) or asks for (`has_rng`)."""
    scope, thread = flax.core.Scope, threading.get_ident()
    make, has = scope.make_rng, scope.has_rng
    drawing: list[str] = []

    def make_rng(self: Any, name: str = "params") -> Any:
        if threading.get_ident() != thread:
            return make(self, name)
        drawn.add(name)
        drawing.append(name)  # flax asks for the stream, and for "params" in its place
        try:
            return make(self, name)
        finally:
            drawing.pop()

    def has_rng(self: Any, name: str) -> bool:
        if not drawing and threading.get_ident() == thread:
            asked.add(name)
        return bool(has(self, name))

    with _ONE_AT_A_TIME, mock.patch.multiple(scope, make_rng=make_rng, has_rng=has_rng):
        yield


def _new_name(pattern: str, error: Exception, known: Any) -> str:
    found = re.search(pattern, str(error))
    if found is None or found[1] in known:
        raise error
    return found[1]


def _note_moded_layers(probe: Probe) -> Callable[..., Any]:
    def note(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        drops = isinstance(module, nn.Dropout) and module.rate > 0
        if drops or isinstance(module, nn.BatchNorm):
            probe.moded_layers.add(type(module).__name__)
        elif getattr(module, "dropout_rate", 0) and hasattr(module, "deterministic"):
            probe.moded_layers.add(type(module).__name__)
        return next_fun(*args, **kwargs)

    return note


def _note_vocabularies(probe: Probe, inputs: Inputs) -> Callable[..., Any]:
    """Notes which inputs go into an `nn.Embed` just as they came in.

    A token beyond its table is NaN, one below 0 a row from its end, both silently:
    with the table's size known the data can be checked.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(inputs)

    def note(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if isinstance(module, nn.Embed) and context.method_name == "__call__":
            tokens = args[0] if args else kwargs.get("inputs")
            for path, leaf in leaves:
                if leaf is tokens:
                    name = jax.tree_util.keystr(path, simple=True, separator="/")
                    rows = probe.vocabularies.get(name, module.num_embeddings)
                    probe.vocabularies[name] = min(rows, module.num_embeddings)
        return next_fun(*args, **kwargs)

    return note


def _carried(
    initial: dict[str, PyTree], after: dict[str, PyTree], overrides: Overrides
) -> tuple[str, ...]:
    found = set(initial) - {"params"}
    if not isinstance(overrides.collections, str):
        asked = tuple(overrides.collections)
        if missing := sorted(set(asked) - found):
            raise DetectionError(
                f"collections={list(asked)}: the model's init makes no "
                f"{', '.join(map(repr, missing))}; it makes {sorted(found)}."
            )
        return tuple(sorted(asked))
    return tuple(
        sorted(
            name
            for name in found - NEVER_CARRIED
            if name in after and _same_form(initial[name], after[name])
        )
    )


def _same_form(a: PyTree, b: PyTree) -> bool:
    def form(tree: PyTree) -> Any:
        leaves, structure = jax.tree.flatten(tree)
        return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]

    return bool(form(a) == form(b))


def _reasons(
    flag: TrainFlag, probe: Probe, carried: tuple[str, ...], sown: tuple[str, ...]
) -> dict[str, str]:
    return {
        "collections": "carried: init makes them and a call returns them in the same "
        "form"
        if carried
        else "init makes nothing but params that a call returns in the same form",
        "sown": "written by the call, not read: losses join the loss, metrics are "
        "logged"
        if sown
        else "the call writes no other collection",
        "rngs": "streams that a call in training asked for"
        if probe.rngs
        else "no call asked for a random stream",
        "train flag": f"layers that need one: {', '.join(sorted(probe.moded_layers))}"
        if probe.moded_layers
        else "no BatchNorm or Dropout found",
    }
