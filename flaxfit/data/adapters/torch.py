"""Adapters for torch datasets and DataLoaders. Imports torch only for torch objects.

A loader makes its own batches. While it is read here, its random draws and those of its
items depend on seed and pass only, so that a run can be repeated and resumed.
"""

import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any

from flaxfit._core.errors import DataError, UsageTypeError, caller
from flaxfit._core.lazy_types import comes_from
from flaxfit.data.adapters.latest_reader import LATEST
from flaxfit.data.datasets.example_dataset import ExampleSet, take_items
from flaxfit.data.datasets.iterables import length_of
from flaxfit.data.datasets.shuffling import seeded
from flaxfit.data.datasets.stream import DatasetInfo, Open, Stream
from flaxfit.data.host.arrays import as_array, call_text
from flaxfit.data.host.collate import looks_single
from flaxfit.data.host.torch_tensors import is_tensor

# Only one loader at a time exchanges the states of generators. Reentrant, for a
# dataset that itself reads another loader.
_EXCHANGE = threading.RLock()
_BYTES = "torch.uint8"


def matches(x: Any) -> bool:
    """Whether `x` is a DataLoader or Dataset of torch."""
    return comes_from(x, "torch", "DataLoader", "Dataset")


def adapt(x: Any) -> Any:
    """Returns a loader as batches, a dataset as examples, a TensorDataset as arrays.

    Raises:
      UsageTypeError: a dataset without a length.
    """
    if comes_from(x, "torch", "DataLoader"):
        return _from_loader(x)
    tensors = _tensors(x)
    if tensors is not None:
        return tensors
    length = length_of(x)
    if _streams(x):
        iterate = partial(_iterate, x)
        return ExampleSet(
            "torch IterableDataset", length, iterate=iterate, drawing=_Drawing
        )
    if length is None:
        raise UsageTypeError(
            f"the torch Dataset given to {caller()}, a {type(x).__name__}, has no "
            "length",
            "Add def __len__(self), or make it an IterableDataset.",
        )
    return ExampleSet(
        "torch Dataset",
        length,
        partial(take_items, x),
        drawing=_Drawing,
        info=_info(x, length),
    )


def _streams(dataset: Any) -> bool:
    return comes_from(dataset, "torch", "IterableDataset")


def _tensors(dataset: Any) -> tuple[Any, ...] | None:
    """Returns the arrays of a `TensorDataset` or a `Subset` of one; None for others."""
    data = import_module("torch.utils.data")
    # The items of a subclass may differ from the tensors.
    if type(dataset) is data.TensorDataset:
        return tuple(map(as_array, dataset.tensors))
    if type(dataset) is not data.Subset:
        return None
    whole = _tensors(dataset.dataset)
    return whole and tuple(array[list(dataset.indices)] for array in whole)


def _iterate(dataset: Any, pass_index: int) -> Iterator[Any]:
    _set_epoch([dataset], pass_index)
    return iter(dataset)


def _info(dataset: Any, length: int) -> DatasetInfo:
    with _Drawing((0,)):
        try:
            first = dataset[0] if length else ()
        except Exception as error:
            error.add_note("while reading item 0")
            raise
    parts = list(first.values()) if isinstance(first, dict) else first
    items = parts if isinstance(parts, tuple | list) else (parts,)
    pictures = any(comes_from(item, "PIL", "Image") for item in items)
    return DatasetInfo(class_names=_class_names(dataset), pictures=pictures)


def _class_names(dataset: Any) -> tuple[str, ...]:
    """Returns the `classes` of a torchvision dataset, or of a subset of one."""
    while not hasattr(dataset, "classes") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    names = getattr(dataset, "classes", ())
    listed = isinstance(names, tuple | list)
    return tuple(names) if listed and all(isinstance(n, str) for n in names) else ()


def _from_loader(loader: Any) -> Stream:
    _warn_of_fork(loader)

    def open_with(seed: Sequence[int]) -> Open:
        kind = _StatefulBatches if hasattr(loader, "load_state_dict") else _Batches
        return lambda pass_index, start: kind(loader, seed, pass_index)

    # Each worker may end with a short batch, which len() of the loader does not count.
    unknown = _streams(loader.dataset) and loader.num_workers > 1
    return Stream(
        "torch DataLoader",
        open_with((0,)),
        num_batches=None if unknown else length_of(loader),
        num_examples=_num_examples(loader),
        info=DatasetInfo(
            class_names=_class_names(loader.dataset),
            shuffles=loader.batch_size is not None
            and comes_from(loader.sampler, "torch", "RandomSampler"),
        ),
        seeded=open_with,
    )


def _num_examples(loader: Any) -> int | None:
    """Returns the number of examples in a pass, None if unknown before reading."""
    # A custom collate_fn may leave examples out.
    default = import_module("torch.utils.data").default_collate
    if (
        _streams(loader.dataset)
        or loader.batch_size is None
        or loader.collate_fn is not default
    ):
        return None
    total = length_of(loader.sampler)
    if total is None or not loader.drop_last:
        return total
    return total // int(loader.batch_size) * int(loader.batch_size)


def _warn_of_fork(loader: Any) -> None:
    if not loader.num_workers:
        return
    import multiprocessing

    context = loader.multiprocessing_context
    method = (
        # Without `allow_none`, this call would set the method for the whole process.
        multiprocessing.get_start_method(allow_none=True)
        or multiprocessing.get_all_start_methods()[0]
        if context is None
        else context.get_start_method()
    )
    if method == "fork":
        workers = f"num_workers={loader.num_workers}"
        warnings.warn(
            f"the DataLoader(..., {workers}) given to {caller()} starts its workers by "
            "fork, and they can hang: a thread of jax may hold a lock. Write "
            f"DataLoader(..., {workers}, "
            'multiprocessing_context="forkserver", persistent_workers=True), and in a '
            'script call fit below if __name__ == "__main__":.',
            UserWarning,
            stacklevel=2,
        )


class _Batches(Iterator[Any]):
    """The batches of one pass of a loader, with draws that depend on seed and pass.

    Generators of the loader and its samplers are seeded like torch's default one; see
    `_Drawing`.
    """

    def __init__(self, loader: Any, seed: Sequence[int], pass_index: int) -> None:
        self._loader = loader
        self._pass = pass_index
        self._iterator: Any = None
        self._restored: Any = None
        self._token: object = None
        own = _generators(loader)
        here = (*seed, pass_index)
        # Without a generator from the user, torchdata draws a random seed.
        made_up = loader.generator is None and _is_of_torchdata(loader.sampler)
        firsts = (0 if made_up else each.initial_seed() for each in own)
        seeds = {g: (n % 2**64, *here) for g, n in zip(own, firsts, strict=True)}
        self._drawing = _Drawing(here, seeds)
        # Once workers have started, items draw in the workers.
        self._later = own if loader.num_workers else self._drawing.generators

    def __next__(self) -> Any:
        with self._drawing:
            if self._iterator is not None:
                self._refuse_two_readers()
                return next(self._iterator)
            self._iterator = self._start()
            if self._restored is not None:
                import_module("torch").default_generator.set_state(self._restored)
            raw = next(self._iterator)
        self._drawing.generators = self._later
        if self._loader.batch_sampler is None and looks_single(raw):
            raise DataError(
                f"the DataLoader(..., batch_size=None) given to {caller()} yields "
                "single examples",
                write="DataLoader(dataset, batch_size=32), or pass the dataset: "
                f"{call_text('dataset')}",
            )
        return raw

    def _start(self) -> Any:
        loader = self._loader
        _set_epoch([loader.dataset, *_samplers(loader)], self._pass)
        if loader.persistent_workers:
            if loader in LATEST:
                # New workers draw their seed from this generator. Persistent workers do
                # not, so draw here: the order of the pass must be as in a new process.
                torch = import_module("torch")
                torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
            LATEST[loader] = self._token = object()
        return iter(loader)

    def _refuse_two_readers(self) -> None:
        # Readers of a persistent loader share one iterator; each reader restarts it.
        persistent = self._loader.persistent_workers
        if persistent and LATEST.get(self._loader) is not self._token:
            raise DataError(
                f"{caller()} and another call read the same DataLoader(..., "
                "persistent_workers=True) at once, but its workers can serve only one",
                "Use a separate DataLoader for validation.",
            )


class _Drawing:
    """A context in which torch's default generator, and others, have own states.

    Each entry continues from the states of the last exit; outside the context, the
    generators have the user's states.

    Args:
      seed: the seed of the default generator.
      others: generator -> its seed.
    """

    def __init__(
        self, seed: Sequence[int], others: Mapping[Any, Sequence[int]] | None = None
    ) -> None:
        torch = import_module("torch")
        seeds = {torch.default_generator: seed} | dict(others or {})
        self.states = {each: _state(torch, *n) for each, n in seeds.items()}
        self.generators = list(self.states)
        self._before: list[Any] = []

    def __enter__(self) -> None:
        _EXCHANGE.acquire()
        self._before = [generator.get_state() for generator in self.generators]
        for generator in self.generators:
            generator.set_state(self.states[generator])

    def __exit__(self, *unused: object) -> None:
        for generator, before in zip(self.generators, self._before, strict=True):
            self.states[generator] = generator.get_state()
            generator.set_state(before)
        _EXCHANGE.release()


class _StatefulBatches(_Batches):
    """Batches of a loader that can save its position, as torchdata's can."""

    def get_state(self) -> Any:
        """Returns the states of the loader and of torch's default generator."""
        drawn = self._drawing.states[import_module("torch").default_generator]
        return _as_plain({"loader": self._loader.state_dict(), "drawn": drawn})

    def set_state(self, state: Any) -> None:
        """Sets the loader to a state, from which it continues."""
        state = _from_plain(state)
        self._loader.load_state_dict(state["loader"])
        # Samplers without a state must first draw the order of the pass again.
        if not self._loader.num_workers and _samples_from_state(self._loader):
            self._restored = state["drawn"]


def _generators(loader: Any) -> list[Any]:
    """Returns the generators that the user passed to a loader and its samplers."""
    holders = (loader, *_samplers(loader))
    found = (getattr(holder, "generator", None) for holder in holders)
    return list(dict.fromkeys(g for g in found if comes_from(g, "torch", "Generator")))


def _samplers(loader: Any) -> tuple[Any, ...]:
    inner = getattr(loader.batch_sampler, "sampler", None)
    return loader.sampler, loader.batch_sampler, inner


def _is_of_torchdata(sampler: Any) -> bool:
    return comes_from(sampler, "torchdata", "RandomSampler")


def _samples_from_state(loader: Any) -> bool:
    """Whether the loader's state has the order of a pass, or the order is fixed."""
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    return (
        hasattr(sampler, "state_dict")
        or comes_from(sampler, "torch", "SequentialSampler")
        or _is_of_torchdata(sampler)
    )


def _state(torch: Any, *seed: int) -> Any:
    number = int(seeded(*seed).integers(2**63))
    return torch.Generator().manual_seed(number).get_state()


def _set_epoch(parts: Sequence[Any], pass_index: int) -> None:
    for part in {id(part): part for part in parts}.values():
        if callable(getattr(part, "set_epoch", None)):
            part.set_epoch(pass_index)


def _as_plain(state: Any) -> Any:
    """Returns a state in which the states of generators are bytes."""
    if isinstance(state, dict):
        return {key: _as_plain(value) for key, value in state.items()}
    if isinstance(state, list):
        return list(map(_as_plain, state))
    if is_tensor(state) and state.ndim == 1:
        array = as_array(state)
        return {_BYTES: array.tobytes()} if array.dtype == "uint8" else state
    return state


def _from_plain(state: Any) -> Any:
    if isinstance(state, dict):
        if set(state) == {_BYTES}:
            torch = import_module("torch")
            return torch.frombuffer(bytearray(state[_BYTES]), dtype=torch.uint8)
        return {key: _from_plain(value) for key, value in state.items()}
    return list(map(_from_plain, state)) if isinstance(state, list) else state
