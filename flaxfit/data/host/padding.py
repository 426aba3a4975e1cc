"""Pads rows of different length to a few lengths and builds their masks.

The lengths to pad to are called buckets; programs are compiled once per bucket. A
padded batch is a `PaddedBatch` until targets are separated from inputs.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np

from flaxfit._core.errors import DataError
from flaxfit._core.tree_specs import describe
from flaxfit._core.types import HostArray, PyTree
from flaxfit.data.host.arrays import as_array, as_host
from flaxfit.data.host.collate import collate, stack
from flaxfit.data.host.fields import parts_of, rebuilt, with_entry

# The key of `Padding.lengths` that stands for all parts.
EVERY_PART = None


@dataclass(frozen=True)
class PaddedBatch:
    """A raw batch that was padded; it is not a pytree.

    Attributes:
      raw: the padded batch.
      real: a mask for every array, nested like `raw`: `bool[rows, length]` for a padded
        array, False for padding, and `bool[rows]` for any other.
    """

    raw: Any
    real: Any


@dataclass(frozen=True)
class Padding:
    """How the parts of examples or batches are padded.

    A part is the key of a dict or the position in a tuple. The padded axis is the first
    axis of an example, and the second axis of a batch.

    Attributes:
      lengths: part -> its length in every bucket. The part None stands for all parts
        that have a padded axis, which must have the same length in all of them.
      values: part -> the value it is padded with.
      value: the value for all other parts.
      truncate: whether parts are cut off at the length of the last bucket.
      masks: key of a mask in a dict batch -> its part, None if the mask is the same for
        all parts.
    """

    lengths: Mapping[Any, tuple[int, ...]]
    values: Mapping[Any, Any] = field(default_factory=dict)
    value: Any = 0
    truncate: bool = False
    masks: Mapping[str, Any] = field(default_factory=dict)

    @property
    def buckets(self) -> int:
        """The number of buckets."""
        return len(next(iter(self.lengths.values())))

    def bucket_of(self, row: int, example: Any) -> int:
        """Returns the smallest bucket for an example; `row` is its number in messages.

        Raises:
          DataError: the example is too long, or it cannot be padded.
        """
        place = f"item {row}"
        counts = self._counts(parts_of(_hosted(example)), 0, place)
        return self._smallest(counts, place)

    def buckets_of(self, lengths: Any, total: int | None) -> HostArray:
        """Returns the bucket of each of `total` examples whose lengths are known.

        `lengths` is `int[total]`, or part -> `int[total]`.

        Raises:
          ValueError: the number of lengths or their parts do not match.
          DataError: an example is too long.
        """
        given = lengths if isinstance(lengths, Mapping) else None
        if given is not None and given.keys() != self.lengths.keys():
            raise ValueError(
                f"lengths={list(given)} for pad_to={written(self.lengths)}: give the "
                "lengths of the same parts, or one array for all."
            )
        buckets = np.zeros(0 if total is None else total, np.int64)
        for part, ends in self.lengths.items():
            known = np.asarray(lengths if given is None else given[part])
            if known.shape != buckets.shape or known.dtype.kind not in "iu":
                raise ValueError(
                    f"lengths is {describe(known)} for {total} items: give one whole "
                    "number for each, lengths=np.array([len(item) for item in items])."
                )
            found = np.searchsorted(ends, known)
            if found.max(initial=0) == len(ends):
                if not self.truncate:
                    row = int(np.argmax(known > ends[-1]))
                    raise self._too_long(part, int(known[row]), f"item {row}")
                found = np.minimum(found, len(ends) - 1)
            buckets = np.maximum(buckets, found)
        return buckets

    def collate(self, examples: Sequence[Any], rows: Sequence[int]) -> PaddedBatch:
        """Returns a batch, padded to the smallest bucket that fits all examples.

        `rows` are their numbers in messages.

        Raises:
          DataError: an example is too long, cannot be padded, or has another nesting.
        """
        hosts = [_hosted(example) for example in examples]
        parts, counts, bucket = [parts_of(host) for host in hosts], [], 0
        for row, part in zip(rows, parts, strict=True):
            counts.append(self._counts(part, 0, f"item {row}"))
            bucket = max(bucket, self._smallest(counts[-1], f"item {row}"))
        kinds = {(type(host), *part) for host, part in zip(hosts, parts, strict=True)}
        if len(kinds) > 1:
            collate(hosts)  # raises, and says how they differ
        for row, count in zip(rows, counts, strict=True):
            if count.keys() != counts[0].keys():
                raise DataError(
                    f"item {row} has an axis to pad in {', '.join(map(repr, count))}, "
                    f"item {rows[0]} in {', '.join(map(repr, counts[0]))}: all "
                    "examples need the same nesting."
                )

        def join(part: Any, values: Sequence[Any]) -> PyTree:
            if part not in counts[0]:
                return collate(values)
            length, value = self._length_and_value(part, bucket)
            return collate(values, partial(_pad_and_stack, length=length, value=value))

        raw = rebuilt(parts, join, hosts[0])
        real = {part: np.array([count[part] for count in counts]) for part in counts[0]}
        return self._with_masks(raw, real, bucket)

    def pad_batch(self, raw: Any) -> PaddedBatch:
        """Returns a batch, padded along its second axis to the smallest bucket.

        Raises:
          DataError: the batch is too long, or it cannot be padded.
        """
        host = as_host(raw)
        parts = parts_of(host)
        counts = self._counts(parts, 1, "a batch")
        bucket = self._smallest(counts, "a batch")

        def pad(part: Any, values: Sequence[Any]) -> PyTree:
            if part not in counts:
                return values[0]
            length, value = self._length_and_value(part, bucket)
            return jax.tree.map(
                partial(_pad_rows, length=length, value=value), values[0]
            )

        padded = rebuilt([parts], pad, host)
        leaves = [leaf for part in counts for leaf in _leaves(parts[part])]
        rows = next(len(leaf) for leaf in leaves if _has_axis(leaf, 1))
        real = {part: np.full(rows, count) for part, count in counts.items()}
        return self._with_masks(padded, real, bucket)

    def in_buckets(
        self, examples: Iterable[tuple[int, Any]], batch_size: int
    ) -> Iterator[PaddedBatch]:
        """Yields batches of examples from one bucket each, as soon as they are full.

        `examples` yields `(row, example)`; the last batch of a bucket may be short.
        """
        waiting: list[list[tuple[Any, int]]] = [[] for _ in range(self.buckets)]
        for row, example in examples:
            same = waiting[self.bucket_of(row, example)]
            same.append((example, row))
            if len(same) == batch_size:
                yield self.collate(*zip(*same, strict=True))
                same.clear()
        for rest in filter(None, waiting):
            yield self.collate(*zip(*rest, strict=True))

    def _with_masks(
        self, raw: Any, counts: Mapping[Any, HostArray], bucket: int
    ) -> PaddedBatch:
        """Returns a padded batch with its masks; `counts` are the original lengths."""
        masks = {
            part: np.arange(self._ends(part)[bucket]) < count[:, None]
            for part, count in counts.items()
        }
        whole = np.ones(len(next(iter(masks.values()))), np.bool_)

        def real(part: Any, values: Sequence[Any]) -> PyTree:
            mask = masks.get(part)
            return jax.tree.map(
                lambda leaf: whole if mask is None or leaf.ndim < 2 else mask, values[0]
            )

        real_rows = rebuilt([parts_of(raw)], real, raw)
        for key, part in self.masks.items():
            mask = _one_mask(key, masks) if part is None else masks[part]
            raw = with_entry(raw, key, mask)
            real_rows = with_entry(real_rows, key, whole)
        return PaddedBatch(raw, real_rows)

    def _counts(
        self, parts: Mapping[Any, Any], axis: int, place: str
    ) -> dict[Any, int]:
        """Returns the length of every part to pad."""
        lengths = {
            part: {leaf.shape[axis] for leaf in _leaves(nest) if _has_axis(leaf, axis)}
            for part, nest in parts.items()
        }
        if EVERY_PART in self.lengths:
            found = {part: one for part, one in lengths.items() if one}
            if len(set().union(*found.values())) != 1:
                raise DataError(_uneven(place, found, self.lengths[EVERY_PART]))
        else:
            found = {part: lengths.get(part, set()) for part in self.lengths}
            for part, one in found.items():
                if len(one) != 1:
                    raise DataError(_unpaddable(place, part, one, list(parts)))
        return {part: min(one) for part, one in found.items()}

    def _smallest(self, counts: Mapping[Any, int], place: str) -> int:
        smallest = 0
        for part, count in counts.items():
            ends = self._ends(part)
            bucket = bisect_left(ends, count)
            if bucket == len(ends):
                if not self.truncate:
                    raise self._too_long(part, count, place)
                bucket -= 1
            smallest = max(smallest, bucket)
        return smallest

    def _ends(self, part: Any) -> tuple[int, ...]:
        return self.lengths.get(part) or self.lengths[EVERY_PART]

    def _length_and_value(self, part: Any, bucket: int) -> tuple[int, Any]:
        return self._ends(part)[bucket], self.values.get(part, self.value)

    def _too_long(self, part: Any, length: int, place: str) -> DataError:
        ends = self._ends(part)
        line = str([*ends, length] if len(set(ends)) > 1 else length)
        what = ""
        if EVERY_PART not in self.lengths:
            what, line = f" in {part!r}", f"{{{part!r}: {line}}}"
        return DataError(
            f"{place} has the length {length}{what}, but the longest bucket of "
            f"pad_to={written(self.lengths)} is {ends[-1]}. Write pad_to={line}, or "
            "truncate=True to cut off longer ones."
        )


def plan_buckets(
    order: HostArray, buckets: HostArray, batch_size: int
) -> list[HostArray]:
    """Returns the rows of every batch of a pass, in the order of `Padding.in_buckets`.

    Args:
      order: the rows of the pass, `int[examples]`.
      buckets: the bucket of every row, `int[examples]`; rows beyond its length, as in
        later passes of Grain, start again at its first.
      batch_size: rows of a batch; the last batch of a bucket may be shorter.
    """
    found: list[tuple[int, HostArray]] = []
    for bucket in np.unique(buckets):
        places = np.flatnonzero(buckets[order % len(buckets)] == bucket)
        for first in range(0, len(places), batch_size):
            chosen = places[first : first + batch_size]
            full = len(chosen) == batch_size
            when = int(chosen[-1]) if full else len(order) + int(bucket)
            found.append((when, order[chosen]))
    return [rows for _, rows in sorted(found, key=lambda batch: batch[0])]


def raw_of(raw: Any) -> Any:
    """Returns a raw batch without its `PaddedBatch`, if it has one."""
    return raw.raw if isinstance(raw, PaddedBatch) else raw


def written(lengths: Mapping[Any, tuple[int, ...]]) -> str:
    """Returns lengths as text, as a user writes them in `pad_to`."""
    texts = {
        part: str(ends[0] if len(set(ends)) == 1 else list(ends))
        for part, ends in lengths.items()
    }
    if EVERY_PART in texts:
        return texts[EVERY_PART]
    return "{" + ", ".join(f"{part!r}: {text}" for part, text in texts.items()) + "}"


def _one_mask(key: str, masks: Mapping[Any, HostArray]) -> HostArray:
    first = next(iter(masks.values()))
    if not all(np.array_equal(first, mask) for mask in masks.values()):
        raise DataError(
            f"mask={key!r}, but {' and '.join(map(repr, masks))} differ in length. "
            f"Name the part of the mask: mask={{{key!r}: {next(iter(masks))!r}}}."
        )
    return first


def _pad_and_stack(values: Sequence[Any], *, length: int, value: Any) -> HostArray:
    """Returns `[len(values), length, ...]` of arrays `[any length, ...]`."""
    arrays = [as_array(each) for each in values]
    if not _has_axis(arrays[0], 0):
        return stack(arrays)
    if len({array.shape[1:] for array in arrays}) > 1:
        shapes = ", ".join(sorted({str(array.shape) for array in arrays}))
        raise DataError(
            f"examples of the shapes {shapes}: only the first axis is padded, and all "
            "other axes must have the same length."
        )
    # An empty list has no dtype of its own.
    dtypes = {array.dtype for array in arrays if array.size} or {arrays[0].dtype}
    shape = (len(arrays), length, *arrays[0].shape[1:])
    padded = _filled(shape, np.result_type(*dtypes), value)
    for row, array in zip(padded, arrays, strict=True):
        row[: len(array)] = array[:length]
    return padded


def _pad_rows(leaf: HostArray, *, length: int, value: Any) -> HostArray:
    """Returns `[rows, length, ...]` of an array `[rows, any length, ...]`."""
    if not _has_axis(leaf, 1):
        return leaf
    padded = _filled((len(leaf), length, *leaf.shape[2:]), leaf.dtype, value)
    padded[:, : leaf.shape[1]] = leaf[:, :length]
    return padded


def _filled(shape: tuple[int, ...], dtype: Any, value: Any) -> HostArray:
    try:
        with np.errstate(invalid="ignore"):
            held = np.asarray(value).astype(dtype)
        if held.ndim or held != value:
            raise ValueError(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"pad_value={value!r}, which {np.dtype(dtype)} cannot hold. Write "
            "pad_value=0, or pad_value={part: value}."
        ) from error
    return np.full(shape, held, dtype)


def _hosted(example: Any) -> Any:
    """Returns an example on the host, at once if its parts are NumPy values."""
    parts = parts_of(example).values()
    here = all(isinstance(part, np.ndarray | np.generic | int) for part in parts)
    return example if here else as_host(example)


def _leaves(nest: PyTree) -> list[Any]:
    return [nest] if isinstance(nest, np.ndarray) else jax.tree.leaves(nest)


def _has_axis(leaf: Any, axis: int) -> bool:
    return np.ndim(leaf) > axis and leaf.dtype.kind not in "OUST"


def _uneven(place: str, found: Mapping[Any, set[int]], ends: tuple[int, ...]) -> str:
    text = written({EVERY_PART: ends})
    if not found:
        return (
            f"{place} has nothing to pad: its parts are single values or text. Leave "
            f"pad_to={text} out."
        )
    listed = ", ".join(
        f"{part!r}: {' and '.join(map(str, sorted(one)))}"
        for part, one in found.items()
    )
    return (
        f"{place} has parts of different length, {listed}, but pad_to={text} applies "
        f"to all of them. Name the parts to pad: pad_to={{{next(iter(found))!r}: "
        f"{text}}}."
    )


def _unpaddable(place: str, part: Any, one: set[int], parts: list[Any]) -> str:
    if part not in parts:
        return (
            f"pad_to names the part {part!r}, but {place} has "
            f"{', '.join(map(repr, parts))}. Name a key of its dict, or a position in "
            "its tuple."
        )
    if not one:
        return f"{part!r} of {place} has no axis to pad: leave it out of pad_to."
    return (
        f"{part!r} of {place} has arrays of the lengths "
        f"{', '.join(map(str, sorted(one)))}: all arrays of a part need one length."
    )
