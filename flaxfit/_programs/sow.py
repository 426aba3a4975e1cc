"""Averages sown values: `losses` are added to the loss, `metrics` to the logs."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flaxfit._core.types import Array, Average, PyTree


class Sown(NamedTuple):
    """One value that a module sowed.

    Attributes:
      path: the names of its modules, then its own, e.g. `"block_0/balance"`.
      value: the array.
      per_example: whether its first axis is the batch.
    """

    path: str
    value: Array
    per_example: bool


def read_sown(
    sown: Mapping[str, PyTree],
    collection: str,
    rows: int,
    grown: Callable[[], Mapping[str, PyTree]],
) -> list[Sown]:
    """Returns the values of one sown collection, in the order of their paths.

    `grown` returns the shapes of `sown` for a batch with one more row than `rows`. They
    distinguish the batch axis from a stack of as many layers.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(sown.get(collection, {}))
    shapes: list[Any] = [None] * len(leaves)
    if any(jnp.shape(leaf)[:1] == (rows,) for _, leaf in leaves):
        shapes = jax.tree.leaves(grown().get(collection, {}))
    return [
        Sown(
            "/".join(str(k.key) for k in path if hasattr(k, "key")),
            jnp.asarray(leaf),
            shape is not None and shape.shape[:1] == (rows + 1,),
        )
        for (path, leaf), shape in zip(leaves, shapes, strict=True)
    ]


def mean_of_losses(sown: list[Sown], weights: Array) -> Average | None:
    """Returns the mean of all sown losses together, None if there are none.

    A value per example is averaged over the examples; any other is used unchanged. The
    numbers of one value (e.g. one for each layer of a stack) are summed.
    """
    means = [_mean(one, weights, jnp.sum) for one in sown]
    if not means:
        return None
    return means[0].replace(total=sum(mean.total for mean in means))


def means_of_metrics(
    sown: list[Sown], weights: Array, taken: Mapping[str, Any]
) -> dict[str, Average]:
    """Returns log name -> mean. The log name is the value's own name.

    If the name is taken, ambiguous or reserved by History, the log name is the path; if
    the path is taken too, it is `"metrics/<path>"`.
    """
    by_path: dict[str, Average] = {}
    for one in sown:
        mean = _mean(one, weights, jnp.mean)
        by_path[one.path] = (
            by_path[one.path].merge(mean) if one.path in by_path else mean
        )
    short = [path.rsplit("/", 1)[-1] for path in by_path]
    logs = {}
    for name, (path, mean) in zip(short, by_path.items(), strict=True):
        names = [name] if short.count(name) == 1 else []
        free = (n for n in [*names, path] if n not in taken and not _is_reserved(n))
        logs[next(free, f"metrics/{path}")] = mean
    return logs


def _is_reserved(name: str) -> bool:
    return name in ("loss", "learning_rate") or name.startswith("val_")


def _mean(one: Sown, weights: Array, reduce: Callable[[Array], Array]) -> Average:
    rows = weights.reshape(weights.shape[0], -1).mean(axis=1)
    if one.per_example:
        return Average.of(jax.vmap(reduce)(one.value), rows)
    count = jnp.sum(rows)
    total = reduce(one.value).astype(jnp.float32) * count
    return Average.sums(total, count)
