"""One table of advice for outputs and targets whose shapes do not fit a loss."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp

from flaxfit._core.tree_specs import holds_integers
from flaxfit.losses.catalog import Kind

Rule: TypeAlias = Literal["labels", "auto", "equal"]
"""`labels`: for class numbers. `auto`: no loss was found. `equal`: equal shapes."""

_ELEMENTWISE: frozenset[Kind] = frozenset({"binary", "margin", "regression"})


class Advice(NamedTuple):
    """What was expected and the line to write, as in `UsageError`."""

    expected: str
    write: str = ""


class _Pair(NamedTuple):
    """The shapes; whether targets are integers, or complex while outputs are real."""

    outputs: tuple[int, ...]
    targets: tuple[int, ...]
    integers: bool
    too_complex: bool


_TABLE: tuple[tuple[Rule, Callable[[_Pair], bool], str, str], ...] = (
    (
        "labels",
        lambda p: len(p.outputs) < 2 or p.outputs[-1] == 1,
        "With one output there are no classes to choose from",
        "loss='sigmoid_binary_cross_entropy', or give the model more outputs",
    ),
    (
        "labels",
        lambda p: p.targets == (*p.outputs[:-1], 1),
        "The labels have one axis too many",
        "{squeezed}",
    ),
    (
        "labels",
        lambda p: p.targets == p.outputs,
        "The labels look one-hot",
        "loss='softmax_cross_entropy', or y.argmax(-1) for integer labels",
    ),
    (
        "labels",
        lambda p: p.targets != p.outputs[:-1],
        "Integer labels of shape {rows} are expected",
        "",
    ),
    (
        "labels",
        lambda p: not p.integers,
        "Labels must be integers",
        "y.astype('int32')",
    ),
    (
        "auto",
        lambda p: p.targets == p.outputs[:-1],
        "",
        "y.astype('int32') if they are labels of classes",
    ),
    (
        "auto",
        lambda p: p.targets == p.outputs,
        "The targets may be one-hot or several labels per example",
        "loss='softmax_cross_entropy' for one-hot labels, or "
        "'sigmoid_binary_cross_entropy' for several labels",
    ),
    (
        "equal",
        lambda p: p.too_complex and p.targets == p.outputs,
        "Complex targets need complex outputs",
        "y.real or np.abs(y)",
    ),
    (
        "equal",
        lambda p: p.integers and p.targets == p.outputs[:-1] and p.outputs[-1:] != (1,),
        "The targets are one integer label per example",
        "loss='softmax_cross_entropy_with_integer_labels'",
    ),
    (
        "equal",
        lambda p: p.outputs == (*p.targets, 1),
        "",
        "{expanded}, or let the model return outputs.squeeze(-1)",
    ),
    ("equal", lambda p: p.targets == (*p.outputs, 1), "", "{squeezed}"),
    (
        "equal",
        lambda p: p.targets != p.outputs,
        "They are compared {how} and must have equal shapes",
        "",
    ),
)


def advise(kind: Kind | Literal["auto"], outputs: Any, targets: Any) -> Advice | None:
    """Returns advice if one output and its targets do not fit a loss, None otherwise.

    Only shapes and dtypes count. `kind` is `"auto"` if no loss was found.
    """
    rule = {"integer": "labels", "auto": "auto"}.get(kind, "equal")
    pair = _Pair(
        tuple(outputs.shape),
        tuple(targets.shape),
        holds_integers(targets),
        jnp.issubdtype(targets.dtype, jnp.complexfloating)
        and not jnp.issubdtype(outputs.dtype, jnp.complexfloating),
    )
    for row, fits, *advice in _TABLE:
        if row == rule and fits(pair):
            words = {
                "squeezed": "y[:, 0]" if len(pair.targets) == 2 else "y.squeeze(-1)",
                "expanded": "y[:, None]" if len(pair.targets) == 1 else "y[..., None]",
                "rows": list(pair.outputs[:-1]),
                "how": "element by element"
                if kind in _ELEMENTWISE
                else "vector by vector",
            }
            return Advice(*(part.format(**words) for part in advice))
    return None
