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
    """Single examples of any kind, to be loaded, shuffled and batched.

    Args:
      items: the data that examples are made from: anything with `len(items)` and
        `items[0]`, arrays, a table, a dataset of single examples that `fit` takes, or
        an iterable, or function that returns one, which yields them in sequence.
      load: item -> example, to decode or augment: `(x, y)`, `(x, y, weight)` or a dict
        of arrays and numbers. If it has a parameter `rng`, it receives a
        `numpy.random.Generator` that depends only on seed, pass and item.
      threads: the number of loading threads, for code that releases the GIL: Pillow,
        zlib, NumPy.
      processes: the number of loading processes, instead of threads, for code that
        computes in Python. Each receives a copy of `items` and `load`, which may be
        defined in a script without `if __name__ == "__main__"`. They need
        `pip install loky`.
      collate: list of examples -> batch, instead of stacking their arrays.
      class_names: the names of the classes 0, 1, …
      pad_to: the length that examples are padded to along their first axis, or several
        in ascending order, `[32, 64, 128]`: an example is padded to the shortest that
        fits, batched with examples padded alike, and the steps are compiled once per
        length. All parts of an example that have an axis must have the same length;
        else name the parts to pad, `{"tokens": [32, 64], "tags": [32, 64]}` by the keys
        of a dict or `{0: 64}` by the position in a tuple. Padding of targets has weight
        0 in loss and metrics; for padding of inputs see `mask`.
      pad_value: the value to pad with, for all parts or by part.
      truncate: whether to cut off examples at the longest length of `pad_to`, instead
        of raising an error.
      mask: for examples that are dicts, the key under which the model receives
        `bool[batch, length]`, False for padding; `{key: part}` if parts differ in
        length.
      lengths: `int[len(items)]`, the approximate lengths of the examples, by part if
        they differ. Examples are batched by them; one that turns out longer is padded
        further. The number of batches is then known before anything is loaded, and a
        pass can be resumed in the middle. A list without `load` is measured.

    Raises:
      DataError: an example is known to be too long.
      TypeError: `load` or `collate` is not a function.
      ValueError: a number out of range, both threads and processes, or arguments that
        cannot be combined.

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
        """Returns the number of items, if they have a length."""
        return len(self.items)

    @property
    def padding(self) -> Padding | None:
        """How examples are padded, or None."""
        return as_padding(self.pad_to, self.pad_value, self.truncate, self.mask)

    def applied_to(self, items: ExampleSet) -> ExampleSet:
        """Returns the items with these arguments applied."""
        info, padding = items.info, self.padding
        if self.class_names:
            info = replace(info, class_names=tuple(self.class_names))
        if padding is not None and padding.masks:
            # Inputs named by the dataset do not include the mask.
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
        """Returns the bucket of every example, None if unknown."""
        if self.lengths is not None:
            if not items.by_index:
                raise ValueError(
                    f"lengths=... needs items with random access, not a {items.kind}: "
                    "leave it out."
                )
            return padding.buckets_of(self.lengths, items.length)
        if not isinstance(self.items, list) or items.loading.loads:
            return None
        measured = (padding.bucket_of(*pair) for pair in enumerate(self.items))
        return np.fromiter(measured, np.int64, len(self.items))
