"""Fields of an example or raw batch: dict entries and tuple positions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flaxfit._core.errors import DataError
from flaxfit._core.types import PyTree
from flaxfit.data.host.collate import is_list_of_numbers


def parts_of(host: Any) -> dict[Any, Any]:
    """Returns the parts of an example or raw batch, by key or position."""
    if isinstance(host, Mapping):
        return dict(host)
    if hasattr(host, "_asdict"):
        return dict(host._asdict())
    if isinstance(host, tuple | list) and not is_list_of_numbers(host):
        return dict(enumerate(host))
    return {0: host}


def rebuilt(
    parts: Sequence[Mapping[Any, Any]],
    join: Callable[[Any, Sequence[Any]], PyTree],
    like: Any,
) -> Any:
    """Returns `join(part, values)` for every part, nested like `like`.

    `values` are the values of the part in each of `parts`.
    """
    joined = {part: join(part, [each[part] for each in parts]) for part in parts[0]}
    if isinstance(like, Mapping):
        return joined
    if hasattr(like, "_asdict"):
        return type(like)(**joined)
    if isinstance(like, tuple | list):
        return type(like)(joined.values())
    return joined[0]


def with_entry(nest: Any, key: str, value: Any) -> Any:
    """Adds an entry to a dict, or to the dict at the start of a tuple; returns a copy.

    Raises:
      DataError: there is no dict, or it already has the key.
    """
    if isinstance(nest, tuple | list) and len(nest) and isinstance(nest[0], Mapping):
        return (with_entry(nest[0], key, value), *nest[1:])
    if not isinstance(nest, Mapping):
        raise DataError(
            f"mask={key!r} needs dicts to put the mask into, but the data is a "
            f"{type(nest).__name__}. Let load return dicts: "
            '{"tokens": tokens, "label": label}.'
        )
    if key in nest:
        raise DataError(f"the data has a key {key!r} already: leave mask={key!r} out.")
    return {**nest, key: value}
