"""The protocol of a source of batches."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from flaxfit._core.types import Batch
from flaxfit.data.datasets.stream import DatasetInfo


class BatchSource(Protocol):
    """Batches of fixed shape on the host, pass after pass.

    Attributes:
      info: what is known about the dataset.
      batch_size: rows of a batch, fill included.
      pad: whether a short batch is filled up with real rows at weight 0; without,
        it is as short as it comes.
      reuses_buffers: whether batches hold only until the next one is asked for.
    """

    info: DatasetInfo
    batch_size: int
    pad: bool
    reuses_buffers: bool

    @property
    def kind(self) -> str:
        """What it is, in words: `"arrays"`, `"torch DataLoader"`."""

    @property
    def shapes(self) -> int:
        """How many shapes batches may have besides their rows."""

    @property
    def one_shot(self) -> bool:
        """Whether it can be read only once."""

    @property
    def seeks(self) -> bool:
        """Whether `batches` begins anywhere without reading what is before."""

    @property
    def num_batches(self) -> int | None:
        """Batches in one pass, None where only reading tells."""

    @property
    def num_examples(self) -> int | None:
        """Examples in one pass without fill, None where only reading tells."""

    @property
    def bookmark(self) -> Mapping[str, Any] | None:
        """Where an iterator that has a state stood lately; see `StreamSource`."""

    @property
    def example(self) -> Batch:
        """The first batch, read ahead; the first pass still yields it."""

    def check(self, check_values: Callable[[Batch], None]) -> None:
        """Checks the values before the first pass, of a stream also during each pass.

        Args:
          check_values: raises DataError for wrong values of a batch.
        """

    def batches(
        self, pass_index: int, start: int = 0, bookmark: Mapping[str, Any] | None = None
    ) -> Iterator[Batch]:
        """Yields the batches of one pass from number `start` on.

        `pass_index` decides the order; a bookmark of that pass shortens the way.

        Where the source reuses buffers, their memory may be the loader's: what is not
        copied before the next batch is asked for may change under a step.
        """
