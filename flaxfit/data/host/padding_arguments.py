"""Checks and parses the padding arguments."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flaxfit._core.errors import UsageError
from flaxfit._core.validation import boolean, is_integer
from flaxfit.data.host.padding import EVERY_PART, Padding, written


def as_padding(
    pad_to: Any, pad_value: Any = 0, truncate: Any = False, mask: Any = None
) -> Padding | None:
    """Returns the padding that arguments of `Examples` or `Batches` describe, or None.

    Raises:
      TypeError: an argument of the wrong type.
      ValueError: invalid lengths, or an argument that needs `pad_to`.
    """
    truncate = boolean("truncate", truncate)
    if pad_to is None:
        for name, given in (("truncate", truncate or None), ("mask", mask)):
            if given is not None:
                raise ValueError(
                    f"{name}={given!r} has no effect without padding: write "
                    f"pad_to=[32, 64, 128], {name}={given!r}."
                )
        return None
    named = pad_to if isinstance(pad_to, Mapping) else {EVERY_PART: pad_to}
    lengths = {part: _as_lengths(given) for part, given in named.items()}
    several = {len(ends) for ends in lengths.values() if len(ends) > 1}
    if not lengths or len(several) > 1:
        raise ValueError(
            f"pad_to={pad_to!r}: all parts of an example share one bucket, so give "
            "each part a list with the same number of lengths, or a single length."
        )
    buckets = several.pop() if several else 1
    lengths = {
        part: ends * buckets if len(ends) == 1 else ends
        for part, ends in lengths.items()
    }
    by_part = isinstance(pad_value, Mapping)
    return Padding(
        lengths,
        values=dict(pad_value) if by_part else {},
        value=0 if by_part else pad_value,
        truncate=truncate,
        masks=_as_masks(mask, lengths),
    )


def _as_lengths(given: Any) -> tuple[int, ...]:
    several = isinstance(given, Sequence | np.ndarray) and not isinstance(given, str)
    ends = tuple(given) if several else (given,)
    if all(map(is_integer, ends)) and ends and 1 <= ends[0]:
        if list(ends) == sorted(set(ends)):
            return tuple(map(int, ends))
    raise UsageError(
        f"Got pad_to={given!r}",
        "Expected a length of at least 1, or several in ascending order",
        "pad_to=128 or pad_to=[32, 64, 128]",
    )


def _as_masks(mask: Any, lengths: Mapping[Any, Any]) -> dict[str, Any]:
    if mask is None or isinstance(mask, str):
        return {} if mask is None else {mask: None}
    if not isinstance(mask, Mapping) or not all(isinstance(key, str) for key in mask):
        raise TypeError(
            f"mask={mask!r}: expected the key under which the model receives the mask, "
            'mask="attention_mask".'
        )
    for key, part in mask.items():
        if part not in lengths:
            raise ValueError(
                f"mask={dict(mask)!r}: {part!r} is not padded. Write "
                f"mask={{{key!r}: part}} with a part of pad_to={written(lengths)}."
            )
    return dict(mask)
