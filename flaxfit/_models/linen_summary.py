"""Tabulates a linen module's layers with their outputs and parameters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from flaxfit._core.tree_specs import describe
from flaxfit._core.types import Inputs, PyTree

_MAX_OUTPUTS = 1  # the number of arrays shown for a nested output
_NUMBERS_FROM = 3  # the first column that holds numbers


class _Layer(NamedTuple):
    kind: str
    outputs: str


def layer_table(init: Callable[[Inputs], Mapping[str, PyTree]], inputs: Inputs) -> str:
    """Returns a table of the layers, found by an abstract trace.

    Args:
      init: makes the variables, `{"params": ..., ...}`; each collection is a column.
      inputs: the inputs of the call; shapes are enough.
    """
    layers: dict[tuple[str, ...], _Layer] = {}

    def record(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        name, module = context.method_name, context.module
        shown = name == "__call__" or not name.startswith(("_", "setup"))
        if shown:  # an outer layer comes before its inner layers
            layers.setdefault(module.path, _Layer(type(module).__name__, ""))
        outputs = next_fun(*args, **kwargs)
        if shown:
            layers[module.path] = _Layer(type(module).__name__, _shapes(outputs))
        return outputs

    def traced(inputs: Inputs) -> Mapping[str, PyTree]:
        with nn.intercept_methods(record):
            return init(inputs)

    variables = jax.eval_shape(traced, inputs)
    layers.setdefault((), _Layer("", ""))
    names = sorted(variables, key=lambda n: (n != "params", n))
    sizes = {name: _sizes(variables[name], layers) for name in names}
    rows = [["layer", "type", "output", *names]]
    for path, layer in layers.items():
        held = [sizes[name].get(path, 0) for name in names]
        leaf = not any(p[: len(path)] == path for p in layers if p != path)
        if leaf or any(held):
            counts = [f"{size:,}" if size else "" for size in held]
            rows.append(["/".join(path) or "-", *layer, *counts])
    total = [f"{sum(sizes[name].values()):,}" for name in names]
    return _aligned([*rows, ["total", "", layers[()].outputs, *total]])


def _sizes(tree: PyTree, layers: Mapping[tuple[str, ...], _Layer]) -> dict[Any, int]:
    """Returns how many numbers each layer holds, not counting its inner layers."""
    sizes: dict[Any, int] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = tuple(str(k.key) for k in keys if isinstance(k, jax.tree_util.DictKey))
        while path not in layers:
            path = path[:-1]
        sizes[path] = sizes.get(path, 0) + leaf.size
    return sizes


def _shapes(outputs: PyTree) -> str:
    leaves = [x for x in jax.tree.leaves(outputs) if hasattr(x, "shape")]
    texts = [describe(x) for x in leaves]
    more = ", …" if len(texts) > _MAX_OUTPUTS else ""
    return ", ".join(texts[:_MAX_OUTPUTS]) + more


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            text.ljust(width) if i < _NUMBERS_FROM else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])
