"""`Examples`: options for single examples before they are batched."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flaxfit._core.types import HostArray
from flaxfit._core.validation import integer
from flaxfit.data.datasets.example_dataset import Bucketing, ExampleSet, Loading
from flaxfit.data.host.padding import Padding
from flaxfit.data.host.padding_arguments import as_padding


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
      processes: how many processes load instead, for Python that computes. Each is
        sent a copy of `items` and `load`, which may be defined anywhere and need no
        `if __name__ == "__main__"`. They need `pip install loky`.
      collate: list of examples -> batch, in place of stacking their arrays.
      class_names: the names of the classes 0, 1, …
      pad_to: the length to which examples of different length are padded along their
        first axis, or ascending lengths, `[32, 64, 128]`: an example is padded to the
        shortest that holds it, together with others of its kind, and the steps are
        compiled once for each of them. Every part of an example that has an axis
        needs the same length; else name those to be padded,
        `{"tokens": [32, 64], "tags": [32, 64]}` by the keys of a dict or `{0: 64}` by
        the position in a tuple. Where targets are padded, what is padding weighs 0 in
        loss and metrics; what the model makes of it is its own affair, see `mask`.
      pad_value: what is padded with, for all or by part.
      truncate: whether to cut off what is longer than the longest of `pad_to`, which
        else is an error.
      mask: the key under which the model is given `bool[batch, length]`, False for
        padding, with examples that are dicts; `{key: part}` where parts differ in
        length.
      lengths: `int[len(items)]`, about how long the examples will be, by part where
        they differ: they go into batches by it, and one that turns out longer is padded
        further. Then the batches of a pass are known before anything is loaded: how
        many, and where to continue in the middle of one. A list without `load` is
        measured.

    Raises:
      DataError: an example is known to be too long.
      TypeError: `load` or `collate` is no function.
      ValueError: a number that cannot be, both threads and processes, or arguments that
        do not go together.

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
    pad_to: Any = None
    pad_value: Any = 0
    truncate: bool = False
    mask: str | Mapping[str, Any] | None = None
    lengths: Any = None

    def __post_init__(self) -> None:
        """Checks the arguments."""
        for name in ("threads", "processes"):
            integer(name, getattr(self, name), least=0)
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
        if self.padding is None and self.lengths is not None:
            raise ValueError(
                "lengths=... without pad_to: write the lengths to pad to, "
                "pad_to=[32, 64, 128]."
            )
        if self.padding is not None and self.collate is not None:
            raise ValueError(
                "pad_to and collate both make batches of examples: leave one of them "
                "out."
            )

    def __len__(self) -> int:
        """Returns the number of items, if they tell."""
        return len(self.items)

    @property
    def padding(self) -> Padding | None:
        """How examples are padded, or None."""
        return as_padding(self.pad_to, self.pad_value, self.truncate, self.mask)

    def applied_to(self, items: ExampleSet) -> ExampleSet:
        """Returns the items with what these arguments ask for."""
        info, padding = items.info, self.padding
        if self.class_names:
            info = replace(info, class_names=tuple(self.class_names))
        if padding is not None and padding.masks:
            # Inputs that are named beforehand would leave the mask out.
            keys = (*info.keys, *padding.masks)
            info = replace(info, keys=keys, inputs=None)
        before = items.loading
        loading = Loading(
            before.loads if self.load is None else (*before.loads, self.load),
            self.threads or before.threads,
            self.processes or before.processes,
            self.collate or before.collate,
        )
        changed = replace(items, loading=loading, info=info)
        if padding is None:
            return changed
        bucketing = Bucketing(padding, self._buckets(changed, padding))
        return replace(changed, bucketing=bucketing)

    def _buckets(self, items: ExampleSet, padding: Padding) -> HostArray | None:
        """Returns the bucket of every example, where they are known."""
        if self.lengths is not None:
            if not items.by_index:
                raise ValueError(
                    f"lengths=... of a {items.kind}, whose items have no index: leave "
                    "it out."
                )
            return padding.buckets_of(self.lengths, items.length)
        if not isinstance(self.items, list) or items.loading.loads:
            return None
        measured = (padding.bucket_of(*pair) for pair in enumerate(self.items))
        return np.fromiter(measured, np.int64, len(self.items))
