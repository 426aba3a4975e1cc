"""`Examples`: what a user says about single examples before they become batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flaxfit._counts import as_count
from flaxfit.data.example_set import Chain, ExampleSet


@dataclass(frozen=True, eq=False)
class Examples:
    """Single examples of any kind, to be loaded, shuffled and put into batches.

    Args:
      items: what the examples are made of: anything with `len(items)` and `items[0]`,
        arrays, a dataset that `fit` takes (a name, of torch, of Hugging Face), or an
        iterable or function for examples that come one after the other.
      load: item -> example, to decode or to augment: `(x, y)`, `(x, y, weight)` or a
        dict, of arrays and numbers. With a parameter `rng` it is given a
        `numpy.random.Generator` that depends on nothing but seed, epoch and item.
      threads: how many threads load at once. For decoders, which let others work
        meanwhile: Pillow, zlib, NumPy.
      processes: how many processes load instead, for Python that computes. `items`
        and `load` are pickled; it needs Grain, `pip install "flaxfit[data]"`.
      collate: list of examples -> batch, in place of stacking their arrays.
      class_names: the names of the classes 0, 1, …

    Raises:
      TypeError: `load` or `collate` is no function.
      ValueError: a number that cannot be, or both threads and processes.

    Example:
      >>> import numpy as np
      >>> from flaxfit.data import Examples
      >>> def load(path, rng):
      ...     return np.full(3, len(path)) + rng.integers(2), len(path) % 2
      >>> dataset = Examples(["a.png", "bc.png"], load, threads=2)
      >>> len(dataset)
      2
    """

    items: Any
    load: Callable[..., Any] | None = None
    threads: int = 0
    processes: int = 0
    collate: Callable[[Sequence[Any]], Any] | None = None
    class_names: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Checks the arguments."""
        for name in ("threads", "processes"):
            as_count(name, getattr(self, name), least=0)
        for name in ("load", "collate"):
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise TypeError(
                    f"{name}={function!r}: expected a function, {name}=my_{name}."
                )
        if self.threads and self.processes:
            raise ValueError(
                f"threads={self.threads} and processes={self.processes}: give one of "
                "them."
            )

    def __len__(self) -> int:
        """Returns the number of items, if they tell."""
        return len(self.items)

    def applied_to(self, items: ExampleSet) -> ExampleSet:
        """Returns the items with what these arguments ask for."""
        changes: dict[str, Any] = {
            "threads": self.threads or items.threads,
            "processes": self.processes or items.processes,
        }
        if self.load is not None:
            changes["load"] = (
                self.load if items.load is None else Chain(items.load, self.load)
            )
        if self.collate is not None:
            changes["collate"] = self.collate
        if self.class_names:
            names = tuple(self.class_names)
            changes["facts"] = replace(items.facts, class_names=names)
        return replace(items, **changes)
