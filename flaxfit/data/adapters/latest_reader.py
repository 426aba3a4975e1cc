"""Tells who began last to read a dataset or loader that serves one reader at a time.

Two adapters may read the same object, which is not theirs to write on.
"""

from typing import Any
from weakref import WeakKeyDictionary

_LATEST: WeakKeyDictionary[Any, object] = WeakKeyDictionary()


def begin_reading(shared: Any) -> object:
    """Returns a token of a reader that begins now."""
    token = object()
    _LATEST[shared] = token
    return token


def is_latest(shared: Any, token: object) -> bool:
    """Whether no other reader has begun since `begin_reading` returned this token."""
    return _LATEST.get(shared) is token


def was_read(shared: Any) -> bool:
    """Whether a reader has begun before."""
    return shared in _LATEST
