"""The protocol of a source of batches."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from flaxfit._core.types import Batch
from flaxfit.data.datasets.stream import DatasetInfo


class BatchSource(Protocol):
    """Batches of fixed shape on the host, pass after pass.

    Attributes:
      info: metadata of the dataset.
      batch_size: rows of a batch, padding included.
      pad: whether a short batch is filled up with real rows at weight 0; if not, it
        stays short.
      reuses_buffers: whether a batch is only valid until the next one is requested.
    """

    info: DatasetInfo
    batch_size: int
    pad: bool
    reuses_buffers: bool

    @property
    def kind(self) -> str:
        """The kind of data in words: `"arrays"`, `"torch DataLoader"`."""

    @property
    def shapes(self) -> int:
        """The number of shapes that batches may have beyond the batch axis."""

    @property
    def one_shot(self) -> bool:
        """Whether the source can be read only once."""

    @property
    def seeks(self) -> bool:
        """Whether `batches` can start at any batch without reading earlier ones."""

    @property
    def num_batches(self) -> int | None:
        """Batches in one pass, None if unknown before reading."""

    @property
    def num_examples(self) -> int | None:
        """Examples in one pass without padding, None if unknown before reading."""

    @property
    def bookmark(self) -> Mapping[str, Any] | None:
        """The latest saved position of an iterator; see `StreamSource.bookmark`."""

    @property
    def example(self) -> Batch:
        """The first batch, read in advance; the first pass still yields it."""

    def check(self, check_values: Callable[[Batch], None]) -> None:
        """Checks the values before the first pass; of a stream also during each pass.

        Args:
          check_values: raises DataError if a batch has invalid values.
        """

    def batches(
        self, pass_index: int, start: int = 0, bookmark: Mapping[str, Any] | None = None
    ) -> Iterator[Batch]:
        """Yields the batches of one pass, from batch number `start` on.

        `pass_index` determines the order; a bookmark of that pass avoids reading all
        batches before `start`.

        If the source reuses buffers, a batch may be the loader's memory: copy it before
        the next batch is requested, or it may change while a step reads it.
        """
