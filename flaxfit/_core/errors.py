"""Error types that a caller may catch, the caller's name, and "did you mean" hints."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_caller: ContextVar[str] = ContextVar("caller", default="fit")


@contextmanager
def calling(name: str) -> Iterator[None]:
    """Sets the name of the method or argument for the messages raised inside."""
    token = _caller.set(name)
    try:
        yield
    finally:
        _caller.reset(token)


def caller() -> str:
    """Returns the innermost name given to `calling`. Only for messages."""
    return _caller.get()


class UsageError(ValueError):
    """A call that cannot work, in three parts.

    Args:
      given: what was given, as a sentence; its period may be left out.
      expected: what was expected, as a sentence; empty if `given` says it.
      write: the code to write instead; empty if no single line is right.
    """

    def __init__(self, given: str, expected: str = "", write: str = "") -> None:
        super().__init__(given, expected, write)
        self.given, self.expected, self.write = given, expected, write

    def __str__(self) -> str:
        parts = (self.given, self.expected, self.write and f"Write {self.write}")
        return " ".join(p if p.endswith((".", "?")) else f"{p}." for p in parts if p)


class UsageTypeError(UsageError, TypeError):
    """A `UsageError` about an object of the wrong type."""


class DataError(UsageError):
    """Data that cannot be trained on: empty, ragged, out of range or used up."""


class CheckpointError(UsageError):
    """A file that cannot be read back, or that does not fit the model."""


class CheckpointCorruptError(CheckpointError):
    """A checkpoint that was damaged since it was written.

    Attributes:
      path: the file.
      leaf: the path of the first damaged leaf, e.g. `"params/Dense_0/kernel"`; None
        if the damage is elsewhere or cannot be located.
    """

    def __init__(self, *parts: str, path: str = "", leaf: str | None = None) -> None:
        super().__init__(*parts)
        # Unpickling calls the class with the parts, and sets the attributes afterwards.
        self.path, self.leaf = path, leaf


class DetectionError(UsageError):
    """Something about the model that cannot be detected and must be specified."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns `" Did you mean 'adam' or 'adamw'?"`, or `""` if nothing is similar."""
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
    if not near:
        return ""
    return f" Did you mean {' or '.join(repr(n) for n in near)}?"
