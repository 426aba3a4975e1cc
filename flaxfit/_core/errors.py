"""Error types that a caller may catch, and the "did you mean" hint."""

import difflib
from collections.abc import Iterable


class DataError(ValueError):
    """Data that cannot be trained on: empty, ragged, out of range or used up."""


class CheckpointError(ValueError):
    """A file that cannot be read back, or that does not fit the model."""


class CheckpointCorruptError(CheckpointError):
    """A checkpoint that was damaged since it was written.

    Attributes:
      path: the file.
      leaf: the path of the first damaged leaf, e.g. `"params/Dense_0/kernel"`; None
        where the damage lies elsewhere or cannot be told.
    """

    def __init__(self, message: str, *, path: str, leaf: str | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.leaf = leaf


class DetectionError(ValueError):
    """Something about the model that cannot be found out and must be said."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns `" Did you mean 'adam' or 'adamw'?"`, or `""` if nothing is near."""
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
    if not near:
        return ""
    return f" Did you mean {' or '.join(repr(n) for n in near)}?"
