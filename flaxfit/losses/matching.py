"""Matches losses to outputs, as requested or by the rules of "auto".

Reads nestings, shapes and dtypes only; nothing is traced here.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from flaxfit._core.errors import DetectionError, UsageError, did_you_mean
from flaxfit._core.tree_specs import describe, holds_integers, is_array
from flaxfit._core.types import PyTree
from flaxfit.losses.catalog import loss_names
from flaxfit.losses.loss import Loss
from flaxfit.losses.shape_advice import Advice, advise

OutputPath: TypeAlias = tuple[str | int, ...]
"""Where an output is in the model's nesting: `()`, `("name",)`, `(0,)`."""

LossArgument: TypeAlias = (
    str | Callable[..., Any] | Loss | Mapping[Any, Any] | Sequence[Any] | None
)
"""The argument `loss`: one loss, or a dict or list of them, one per output."""


def pick(tree: PyTree, path: OutputPath) -> PyTree:
    """Returns the output at `path`."""
    for key in path:
        tree = children(tree)[key]
    return tree


def pick_targets(targets: PyTree, path: OutputPath) -> PyTree:
    """Returns the targets of the output at `path`; one array serves all outputs.

    Raises:
      ValueError: the targets are nested, but have no entry at `path`.
    """
    below = targets
    for key in path:
        entries = children(below)
        if not entries:
            break
        if key not in entries:
            raise _missing_targets(path, targets)
        below = entries[key]
    return below


def children(tree: PyTree) -> dict[str | int, PyTree]:
    """Returns the entries of a nesting by key; `{}` for an array.

    The keys are those of a dict, the names of the fields of a NamedTuple or of a
    dataclass that jax knows, or the positions in a tuple or list.
    """
    if isinstance(tree, Mapping):
        return dict(tree)
    if isinstance(tree, tuple | list) and not hasattr(tree, "_fields"):
        return dict(enumerate(tree))
    nodes, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: node is not tree
    )
    named = jax.tree_util.GetAttrKey
    return {
        path[0].name: node
        for path, node in nodes
        if path and isinstance(path[0], named)
    }


def is_named(tree: PyTree) -> bool:
    """Returns whether the entries of a nesting have names, as a dict's do."""
    positional = isinstance(tree, tuple | list) and not hasattr(tree, "_fields")
    return isinstance(tree, Mapping) or (not positional and bool(children(tree)))


def main_output(outputs: PyTree, targets: PyTree) -> OutputPath | None:
    """Returns the path of the one output that a single array of targets belongs to.

    It is `outputs` itself, its only entry, or its entry `"logits"`; None if there is no
    such output.
    """
    if is_array(outputs):
        return ()
    entries = children(outputs)
    if not is_array(targets):
        return None
    key = "logits" if "logits" in entries else next(iter(entries), None)
    if key is None or (len(entries) > 1 and key != "logits"):
        return None
    below = main_output(entries[key], targets)
    return None if below is None else (key, *below)


def where(path: OutputPath) -> str:
    """Returns `""` or `" of output 'a'"`, for messages."""
    return f" of output {'/'.join(map(str, path))!r}" if path else ""


def pair_losses(
    spec: LossArgument, outputs: PyTree, targets: PyTree, path: OutputPath = ()
) -> Iterator[tuple[OutputPath, Loss]]:
    """Yields the path and the loss of every output below `path` that has a loss.

    `spec`, and the shapes and dtypes `outputs` and `targets`, are those below `path`.

    Raises:
      DetectionError: no rule of "auto" fits.
      ValueError: names, keys or lengths do not fit the outputs.
    """
    if spec is None:
        return
    if isinstance(spec, Mapping | list | tuple):
        entries, wanted = children(outputs), children(spec)
        _check_keys(spec, outputs, path)
        for key in [key for key in entries if wanted.get(key) is not None]:
            below = _targets_below(outputs, targets, key, path)
            yield from pair_losses(wanted[key], entries[key], below, (*path, key))
    elif isinstance(spec, str) and spec == "auto":
        yield from _auto(outputs, targets, path)
    else:
        one: Any = spec
        loss = one if isinstance(one, Loss) else Loss(one)
        yield from _spread(loss, outputs, targets, path)


def _spread(
    loss: Loss, outputs: PyTree, targets: PyTree, path: OutputPath
) -> Iterator[tuple[OutputPath, Loss]]:
    if targets is None and loss.kind != "custom":
        raise UsageError(*_no_targets(loss.name))
    main = main_output(outputs, targets)
    if loss.kind == "custom":
        # A custom function may need all outputs at once, as for a VAE.
        yield path, loss
    elif main is not None:
        yield (*path, *main), loss
    else:
        for key, below in children(outputs).items():
            chosen = _targets_below(outputs, targets, key, path)
            yield from _spread(loss, below, chosen, (*path, key))


def _auto(
    outputs: PyTree, targets: PyTree, path: OutputPath
) -> Iterator[tuple[OutputPath, Loss]]:
    if targets is None:
        raise DetectionError(*_no_targets("auto"))
    main = main_output(outputs, targets)
    if main is not None and is_array(targets):
        yield (*path, *main), _auto_loss(pick(outputs, main), targets, (*path, *main))
    elif _same_keys(outputs, targets):
        for key, below in children(outputs).items():
            yield from _auto(below, pick(targets, (key,)), (*path, key))
    else:
        raise _no_rule(outputs, targets, path)


def _auto_loss(outputs: Any, targets: Any, path: OutputPath) -> Loss:
    shape, labels = tuple(outputs.shape), tuple(targets.shape)
    near = (shape, (*shape, 1), shape[:-1] if shape[-1:] == (1,) else shape)
    if jnp.issubdtype(outputs.dtype, jnp.complexfloating):
        if labels == shape:
            return Loss("squared_error")
    elif holds_integers(targets):
        # Shapes off by an axis of 1 are matched here, and refused by `check_shapes`.
        if (len(shape) == 1 or shape[-1] == 1) and labels in near:
            return Loss("sigmoid_binary_cross_entropy")
        if shape and labels in (shape[:-1], (*shape[:-1], 1)):
            return Loss("softmax_cross_entropy_with_integer_labels")
    elif jnp.issubdtype(targets.dtype, jnp.floating) and labels in near:
        return Loss("squared_error")
    raise _no_rule(outputs, targets, path)


def _no_rule(outputs: PyTree, targets: PyTree, path: OutputPath) -> DetectionError:
    advice: Advice | None = None
    keys = children(outputs)
    if is_named(outputs) and children(targets):
        advice = Advice(
            "Nest the targets like the outputs, in a dict of the same names"
        )
    elif is_array(outputs):
        advice = advise("auto", outputs, targets) if is_array(targets) else None
    elif not keys:
        advice = Advice("Let the model return an array, or a dict or tuple of arrays")
    elif is_named(outputs):
        first, *others = keys
        parts = "".join(f", {key!r}: None" for key in others)
        advice = Advice("", f"loss={{{first!r}: 'auto'{parts}}}")
    else:
        advice = Advice("", f"loss=['auto'{', None' * (len(keys) - 1)}]")
    expected, write = advice or Advice("")
    return DetectionError(
        f"loss='auto' finds no loss{where(path)} for outputs {describe(outputs)} and "
        f"targets {describe(targets)}",
        expected,
        f"{write + ', or ' if write else ''}Trainer(model, loss=...) with a function "
        f"(outputs, targets) -> float[batch], or a name: {', '.join(loss_names())}",
    )


def _no_targets(name: str) -> tuple[str, str, str]:
    return (
        f"There are no targets for loss={name!r}",
        "Only loss=None (for a model that sows its losses) and functions (outputs, "
        "targets) work without targets",
        "fit(x, y), or give a dataset of (x, y)",
    )


def _missing_targets(path: OutputPath, targets: PyTree) -> UsageError:
    return UsageError(
        f"There are no targets{where(path)}: the targets are {describe(targets)}",
        "Nest the targets like the outputs, or give that output the loss None",
    )


def _same_keys(a: PyTree, b: PyTree) -> bool:
    alike = is_named(a) == is_named(b)
    return alike and bool(children(a)) and set(children(a)) == set(children(b))


def _targets_below(
    outputs: PyTree, targets: PyTree, key: str | int, path: OutputPath
) -> Any:
    if targets is None or is_array(targets):
        return targets
    if is_named(outputs) != is_named(targets) or key not in children(targets):
        raise _missing_targets((*path, key), targets)
    return pick(targets, (key,))


def _check_keys(spec: Any, outputs: PyTree, path: OutputPath) -> None:
    entries = children(outputs)
    if is_array(outputs) or is_named(spec) != is_named(outputs):
        form = f"a {type(outputs).__name__} of {list(entries)}: nest the losses like it"
        if is_array(outputs):
            form = "one array: give one loss, loss='auto'"
        raise UsageError(
            f"The losses are a {type(spec).__name__}, but the model's "
            f"output{where(path)} is {form}"
        )
    if is_named(spec):
        check_known(children(spec), entries, "loss")
    elif len(spec) != len(entries):
        raise UsageError(
            f"Got {len(spec)} losses for {len(entries)} outputs{where(path)}",
            "Give one loss per output, None for an output without a loss",
        )


def check_known(given: Iterable[Any], entries: Mapping[Any, Any], of: str) -> None:
    """Checks that every key of a dict of losses or weights names an output.

    Raises:
      UsageError: a key does not; the message has the nearest names.
    """
    for key in given:
        if key not in entries:
            near = did_you_mean(str(key), [str(k) for k in entries])
            raise UsageError(
                f"There is no output {key!r} for this {of}.{near}",
                f"The outputs are {list(entries)}",
            )
