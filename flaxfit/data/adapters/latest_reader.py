"""Remembers the latest reader of each dataset or loader that allows one at a time.

Kept here, as several readers may share an object, and it is the user's.
"""

from typing import Any
from weakref import WeakKeyDictionary

LATEST: WeakKeyDictionary[Any, object] = WeakKeyDictionary()
"""Dataset or loader -> a token of its latest reader, without a reference to it."""
