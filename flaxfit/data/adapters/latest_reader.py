"""Tells who began last to read a dataset or loader that serves one reader at a time.

Two adapters may read the same object, which is not theirs to write on.
"""

from typing import Any
from weakref import WeakKeyDictionary

LATEST: WeakKeyDictionary[Any, object] = WeakKeyDictionary()
"""What is read -> a token of the reader that began last, which holds no reference."""
