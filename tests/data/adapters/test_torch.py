"""torch's loaders and datasets: the same as arrays, and the same in every run."""

import pickle
import sys
import warnings
from itertools import chain

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import pytest
from helpers.models import Linear

torch = pytest.importorskip("torch")

from helpers.sources import as_inputs_source, as_source  # noqa: E402
from torch.utils import data  # noqa: E402

from flaxfit import Callback, Trainer  # noqa: E402
from flaxfit._core.errors import DataError  # noqa: E402
from flaxfit._core.types import CallSpec  # noqa: E402
from flaxfit.data import Batches, Examples  # noqa: E402
from flaxfit.data.adapters.torch import adapt, matches  # noqa: E402
from flaxfit.data.binding.binding import Binding  # noqa: E402
from flaxfit.data.host.arrays import as_host  # noqa: E402
from flaxfit.data.host.collate import collate  # noqa: E402

BINDING = Binding(CallSpec(("x",), (), ("x",)))
ROWS = 10
X = np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32)
Y = np.arange(ROWS) % 3
NUMBERS = np.arange(ROWS, dtype=np.int64)


class Rows(data.Dataset):
    """Examples by index: `(x, number)`."""

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        return X[index], index


class Together(Rows):
    """Several at once."""

    def __getitems__(self, indices):
        assert isinstance(indices, list)
        return [(X[index], index) for index in indices]


class InOrder(data.IterableDataset):
    """Examples one after the other."""

    def __iter__(self):
        return zip(X, NUMBERS, strict=True)


def tensors(y=NUMBERS):
    return data.TensorDataset(torch.from_numpy(X), torch.from_numpy(y))


def source_of(x, **arguments):
    return as_source(x, binding=BINDING, **arguments)


def rows(source, index=0):
    """The targets of a pass, batch by batch, without fill."""
    return [
        batch.targets[batch.weights > 0].tolist() for batch in source.batches(index)
    ]


def fit(x, y=None, **arguments):
    trainer = Trainer(Linear(), seed=1)
    arguments = {"epochs": 2, "verbose": 0, "shuffle": False} | arguments
    history = trainer.fit(x, y, **arguments)
    return history, jax.tree.map(np.asarray, trainer.state.params)


def assert_equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours[1], theirs[1])
    assert ours[0].history == theirs[0].history


# ------------------------------------------------------------------------- loaders


def test_a_loader_trains_as_arrays_do():
    loader = data.DataLoader(tensors(Y), batch_size=4)
    source = source_of(loader)
    assert (source.kind, source.num_batches, source.num_examples) == (
        "torch DataLoader",
        3,
        ROWS,
    )
    assert (source.one_shot, source.seeks) == (False, False)
    assert_equal(fit(loader), fit(X, Y, batch_size=4))


def test_a_loader_of_dicts_with_text_that_is_not_used():
    items = [{"x": X[i], "label": Y[i], "name": f"row {i}"} for i in range(ROWS)]
    loader = data.DataLoader(items, batch_size=4)
    source = source_of(loader)
    assert source.info.unused == ("name",)
    assert_equal(fit(loader), fit(X, Y, batch_size=4))


def test_predict_and_evaluate():
    loader = data.DataLoader(tensors(Y), batch_size=4)
    trainer = Trainer(Linear())
    trainer.fit(loader, verbose=0)
    np.testing.assert_array_equal(
        trainer.predict(loader, verbose=0), trainer.predict(X, verbose=0, batch_size=4)
    )
    assert trainer.evaluate(loader, verbose=0) == pytest.approx(
        trainer.evaluate(X, Y, verbose=0)
    )


def test_a_pass_is_opened_once_and_the_first_batch_is_read_once():
    opened = []

    class Noting(Rows):
        def __getitem__(self, index):
            opened.append(index)
            return super().__getitem__(index)

    source = source_of(data.DataLoader(Noting(), batch_size=4))
    assert opened == [0, 1, 2, 3]
    assert rows(source) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert opened == list(range(ROWS))


def test_a_shuffled_loader_is_the_same_in_every_run_and_as_good_as_untouched():
    def passes(seed, **options):
        loader = data.DataLoader(tensors(), batch_size=4, shuffle=True, **options)
        source = source_of(loader, seed=seed)
        return [rows(source, index) for index in (0, 1, 0, 2, 1)]

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second, again, third, again_second = passes((0, 0))
    assert torch.equal(torch.get_rng_state(), state)
    for order in (first, second, third):
        assert sorted(chain(*order)) == list(range(ROWS))
    assert (first, second) == (again, again_second)
    assert len({str(order) for order in (first, second, third)}) == 3
    torch.rand(1)
    assert passes((0, 0))[0] == first
    assert passes((0, 1))[0] != first
    # A generator decides as well, and is left as it was.
    generator = torch.Generator().manual_seed(3)
    ours = passes((0, 0), generator=generator)
    assert ours == passes((0, 0), generator=torch.Generator().manual_seed(3))
    assert ours != passes((0, 0), generator=torch.Generator().manual_seed(4))
    assert torch.equal(
        generator.get_state(), torch.Generator().manual_seed(3).get_state()
    )


@pytest.mark.parametrize(
    "sampler",
    [
        lambda g: data.RandomSampler(Rows(), replacement=True, generator=g),
        lambda g: data.SubsetRandomSampler(range(ROWS), generator=g),
        lambda g: data.WeightedRandomSampler(torch.ones(ROWS), ROWS, generator=g),
    ],
)
@pytest.mark.parametrize("given", [False, True])
def test_samplers(sampler, given):
    def order():
        generator = torch.Generator() if given else None
        loader = data.DataLoader(Rows(), batch_size=4, sampler=sampler(generator))
        source = source_of(loader)
        torch.rand(1)
        return rows(source), rows(source, 1)

    first, second = order()
    assert (first, second) == order()
    assert first != second


def test_items_that_draw_are_drawn_by_seed_and_pass():
    class Noisy(Rows):
        def __getitem__(self, index):
            return X[index] + torch.rand(3).numpy(), index

    def values(index):
        source = source_of(data.DataLoader(Noisy(), batch_size=4, shuffle=True))
        torch.rand(1)
        return np.concatenate([batch.inputs[0] for batch in source.batches(index)])

    np.testing.assert_array_equal(values(1), values(1))
    assert not np.array_equal(values(0), values(1))


def test_resumed_in_the_middle_of_a_shuffled_pass(tmp_path):
    class Crash(Callback):
        def on_train_batch_end(self, loop):
            if loop.step == 5:
                raise RuntimeError("power cut")

    def train(folder, callbacks=()):
        torch.rand(1)  # whatever happened before in the process
        loader = data.DataLoader(tensors(Y), batch_size=4, shuffle=True)
        return fit(loader, run_dir=folder, epochs=3, save_every=2, callbacks=callbacks)

    whole = train(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path / "cut", [Crash()])
    resumed = train(tmp_path / "cut")
    jax.tree.map(np.testing.assert_array_equal, whole[1], resumed[1])
    assert whole[0].history == resumed[0].history


def test_set_epoch_is_called_with_the_pass():
    called = []

    class Sampler(data.SequentialSampler):
        def set_epoch(self, epoch):
            called.append(epoch)

    class Stream(InOrder):
        def set_epoch(self, epoch):
            called.append(f"dataset {epoch}")

    source = source_of(data.DataLoader(Rows(), batch_size=4, sampler=Sampler(Rows())))
    rows(source), rows(source, 1)
    batches = data.BatchSampler(Sampler(Rows()), 4, drop_last=False)
    rows(source_of(data.DataLoader(Rows(), batch_sampler=batches)), 2)
    rows(source_of(data.DataLoader(Stream(), batch_size=4)), 3)
    rows(source_of(Stream(), batch_size=4), 4)
    assert called == [0, 1, 0, 2, "dataset 0", "dataset 3", "dataset 0", "dataset 4"]


@pytest.mark.parametrize("start", ["forkserver", "spawn"])
def test_workers_yield_the_same_batches_and_end(start):
    def loader(**workers):
        return data.DataLoader(tensors(), batch_size=4, shuffle=True, **workers)

    here = source_of(loader())
    expected = [rows(here, index) for index in (0, 1, 0)]
    stay = start == "forkserver"
    workers = loader(
        num_workers=1, multiprocessing_context=start, persistent_workers=stay
    )
    source = source_of(workers)
    found = [rows(source, index) for index in ((0, 1, 0) if stay else (0,))]
    assert found == expected[: len(found)]
    processes = workers._iterator._workers if stay else []
    if stay:
        assert not [name for name in vars(workers._iterator) if "flaxfit" in name]
        refuses_two_readers(workers)
    del source, workers
    for process in processes:
        process.join(10)
        assert not process.is_alive()


def refuses_two_readers(loader):
    source = source_of(loader)
    other = source_of(loader, name="validation_data")
    next(other.batches(1))
    text = "fit and another call read the same .* at once.*Use a separate DataLoader"
    with pytest.raises(DataError, match=text):
        rows(source)


def test_workers_that_are_forked_are_warned_of_before_they_start():
    loader = data.DataLoader(Rows(), num_workers=2, multiprocessing_context="fork")
    text = r"given to fit starts its workers by fork, .* multiprocessing_context=\"fork"
    with pytest.warns(UserWarning, match=text) as caught:
        adapt(loader)
    assert len(caught) == 1
    adapt(
        data.DataLoader(Rows(), num_workers=2, multiprocessing_context="spawn"),
    )


@pytest.mark.skipif(
    sys.platform != "linux" or sys.version_info >= (3, 14), reason="fork by default"
)
def test_the_default_start_method_is_asked_for_and_not_decided():
    import multiprocessing

    before = multiprocessing.get_start_method(allow_none=True)
    with pytest.warns(UserWarning, match="by fork"):
        adapt(data.DataLoader(Rows(), num_workers=2))
    assert multiprocessing.get_start_method(allow_none=True) == before


def test_what_is_known_of_lengths():
    def known(loader):
        stream = adapt(loader)
        return stream.num_batches, stream.num_examples

    assert known(data.DataLoader(Rows(), batch_size=4, drop_last=True)) == (2, 8)
    batches = [[0, 1], [2, 3], [4]]
    assert known(data.DataLoader(Rows(), batch_sampler=batches)) == (3, None)
    keep = data.DataLoader(Rows(), batch_size=4, collate_fn=lambda rows: rows[:1])
    assert known(keep) == (3, None)
    assert known(data.DataLoader(InOrder(), batch_size=4)) == (None, None)
    InOrder.__len__ = lambda self: ROWS
    try:
        spawned = {"num_workers": 2, "multiprocessing_context": "spawn"}
        assert known(data.DataLoader(InOrder(), batch_size=4)) == (3, None)
        assert known(data.DataLoader(InOrder(), batch_size=4, **spawned)) == (
            None,
            None,
        )
    finally:
        del InOrder.__len__


def test_a_loader_that_makes_no_batches():
    text = r"yields single examples. Write DataLoader\(dataset, batch_size=32\), .*fit"
    with pytest.raises(DataError, match=text):
        source_of(data.DataLoader(Rows(), batch_size=None))
    batches = [(X[:4], NUMBERS[:4]), (X[4:8], NUMBERS[4:8])]
    source = source_of(data.DataLoader(batches, batch_size=None))
    assert rows(source) == rows(source, 1) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_what_a_loader_is_not_given():
    loader = data.DataLoader(Rows(), batch_size=4)
    with pytest.raises(ValueError, match=r"batch_size=8 is given, .*fit\(dataset\)"):
        source_of(loader, batch_size=8)
    with pytest.raises(ValueError, match="y is given together with a torch DataLoader"):
        source_of(loader, y=Y)
    with pytest.raises(TypeError, match=r"Examples\(\.\.\.\) of a torch DataLoader"):
        source_of(Examples(loader))
    with pytest.raises(
        ValueError, match=r"not a dataset \(torch DataLoader\): write validation_data="
    ):
        Trainer(Linear()).fit(loader, validation_split=0.2)


def test_errors_pass_through_with_their_place():
    class Broken(Rows):
        def __getitem__(self, index):
            if index == 5:
                raise OSError("disk gone")
            return super().__getitem__(index)

    with pytest.raises(OSError, match="disk gone") as caught:
        rows(source_of(data.DataLoader(Broken(), batch_size=4)))
    assert caught.value.__notes__ == ["while reading batch 1 of pass 0"]
    with pytest.raises(OSError, match="disk gone") as caught:
        rows(source_of(Broken(), batch_size=4))
    assert "while reading item 5" in caught.value.__notes__
    with pytest.raises(DataError, match="no batches: the torch DataLoader"):
        source_of(data.DataLoader([], batch_size=4))


# ---------------------------------------------- loaders that tell where they stand


class Stateful(data.DataLoader):
    """Does what torchdata's `StatefulDataLoader` does, for an order it draws itself."""

    started, order, number = None, None, 0
    read = 0

    def __iter__(self):
        if self.started is None:
            self.order, self.number = torch.randperm(ROWS), 0
        else:
            state, self.started = self.started, None
            generator = torch.Generator()
            generator.set_state(state["rng"][0])
            self.order, self.number = torch.tensor(state["order"]), state["number"]
        while self.number < 5:
            self.number += 1
            Stateful.read += 1
            chosen = self.order[2 * self.number - 2 : 2 * self.number]
            yield torch.from_numpy(X)[chosen], chosen

    def state_dict(self):
        state = torch.Generator().get_state()
        return {"rng": [state], "order": self.order.tolist(), "number": self.number}

    def load_state_dict(self, state):
        self.started = state


def test_a_loader_with_a_state_is_entered_in_the_middle(monkeypatch):
    monkeypatch.setattr("flaxfit.data.sources.position._SECONDS_BETWEEN_MARKS", 0.0)
    source = source_of(Stateful(Rows()))
    batches = source.batches(1)
    read = [next(batches).targets.tolist() for _ in range(2)]
    bookmark = pickle.loads(pickle.dumps(source.bookmark))
    assert (bookmark["pass"], bookmark["number"]) == (1, 2)
    assert isinstance(bookmark["state"]["loader"]["rng"][0]["torch.uint8"], bytes)
    rest = [batch.targets.tolist() for batch in batches]
    assert sorted(chain(*read, *rest)) == list(range(ROWS))
    again = source_of(Stateful(Rows()), seed=(9,))
    before = Stateful.read
    found = [b.targets.tolist() for b in again.batches(1, 2, bookmark)]
    assert found == rest
    assert Stateful.read - before == 3
    assert len(rows(again, 2)) == 5


@pytest.mark.parametrize(
    "options", [{}, {"shuffle": True}, {"shuffle": True, "generator": 3}]
)
def test_a_loader_of_torchdata_goes_on_with_the_draws_of_its_items(
    options, monkeypatch
):
    loaders = pytest.importorskip("torchdata.stateful_dataloader")
    monkeypatch.setattr("flaxfit.data.sources.position._SECONDS_BETWEEN_MARKS", 0.0)

    class Drawn(data.Dataset):
        def __len__(self):
            return ROWS

        def __getitem__(self, index):
            return torch.rand(2), index

    def make():
        given = dict(options)
        if "generator" in given:
            given["generator"] = torch.Generator().manual_seed(given["generator"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return loaders.StatefulDataLoader(Drawn(), batch_size=2, **given)

    def values(batches):
        return [(b.inputs[0].tolist(), b.targets.tolist()) for b in batches]

    whole = values(source_of(make()).batches(1))
    source = source_of(make())
    batches = source.batches(1)
    assert values(next(batches) for _ in range(3)) == whole[:3]
    bookmark = pickle.loads(pickle.dumps(source.bookmark))
    assert values(source_of(make()).batches(1, 3, bookmark)) == whole[3:]


class Noisy(data.Dataset):
    """Items that draw, as augmented ones do."""

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        return torch.rand(2), index


class ShuffledStream(data.IterableDataset):
    """Draws its order as it is opened."""

    def __iter__(self):
        order = torch.randperm(ROWS).tolist()
        return iter([Noisy()[index] for index in order])


class NoisyStream(data.IterableDataset):
    def __iter__(self):
        return (Noisy()[index] for index in range(ROWS))


@pytest.mark.parametrize(
    "make",
    [
        Noisy,
        NoisyStream,
        ShuffledStream,
        lambda: Examples(Noisy(), threads=1),
        lambda: Examples(Noisy(), lambda item: (item[0] + torch.rand(2), item[1])),
    ],
)
def test_what_items_draw_depends_on_seed_and_pass(make):
    def values(index, start=0, seed=(3,)):
        source = source_of(make(), batch_size=4, shuffle=True, seed=seed)
        return [batch.inputs[0].tolist() for batch in source.batches(index, start)]

    torch.manual_seed(0)
    before = torch.get_rng_state()
    whole = values(1)
    assert torch.equal(torch.get_rng_state(), before)  # the user's draws are theirs
    torch.rand(1)
    assert values(1) == whole and values(1, 2) == whole[2:]
    assert values(2) != whole != values(1, seed=(4,))


def test_a_stream_that_tells_where_it_stands_goes_on_telling():
    class Reader:
        def __init__(self):
            self.at = 0

        def __iter__(self):
            return self

        def __next__(self):
            if self.at == ROWS:
                raise StopIteration
            self.at += 1
            return torch.from_numpy(X)[self.at - 1], self.at - 1

        def state_dict(self):
            return {"at": self.at}

        def load_state_dict(self, state):
            self.at = state["at"]

    class Stream(data.IterableDataset):
        def __iter__(self):
            return Reader()

    source = source_of(Stream(), batch_size=4)
    whole = [batch.targets.tolist() for batch in source.batches(0)]
    assert source.bookmark["state"]["items"] == {"at": 4}
    again = source_of(Stream(), batch_size=4)
    rest = [b.targets.tolist() for b in again.batches(0, 1, source.bookmark)]
    assert rest == whole[1:]


def test_predictions_in_the_order_of_a_shuffled_loader_are_warned_of():
    loader = data.DataLoader(Rows(), batch_size=4, shuffle=True)
    trainer = Trainer(Linear())
    with pytest.warns(UserWarning, match=r"shuffle=False\), or give.*predict\(dataset"):
        trainer.predict(loader)
    trainer.predict(data.DataLoader(Rows(), batch_size=4))
    source_of(loader)


def test_the_first_item_is_named_when_it_fails():
    class Failing(data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            raise OSError("no such picture")

    for dataset in (Failing(), _Sequence()):
        with pytest.raises(OSError, match="no such picture") as caught:
            source_of(dataset)
        assert "while reading item 0" in caught.value.__notes__


class _Sequence:
    """Anything with a length and items."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise OSError("no such picture")


def test_a_loader_of_rows_of_different_length_is_padded():
    class Ragged(data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return torch.full((3 + index // 2,), index), index

    padded = Batches(data.DataLoader(Ragged(), batch_size=2), pad_to=[4, 8])
    shapes = [
        batch.inputs[0].shape for batch in source_of(padded, seed=(1,)).batches(0)
    ]
    assert shapes == [(2, 4), (2, 4), (2, 8), (2, 8)]


# ------------------------------------------------------------------------ datasets


@pytest.mark.parametrize("dataset", [Rows(), Together()])
def test_a_dataset_is_shuffled_as_arrays_are(dataset):
    ours = source_of(dataset, batch_size=4, shuffle=True, seed=(3,))
    arrays = source_of((X, NUMBERS), batch_size=4, shuffle=True, seed=(3,))
    assert (ours.kind, ours.seeks, ours.num_examples) == ("torch Dataset", True, ROWS)
    for index in range(2):
        for mine, theirs in zip(
            ours.batches(index), arrays.batches(index), strict=True
        ):
            jax.tree.map(np.testing.assert_array_equal, mine, theirs)


def test_a_dataset_trains_as_arrays_do():
    class Labelled(Rows):
        def __getitem__(self, index):
            return torch.from_numpy(X[index]), int(Y[index])

    arguments = {"shuffle": True, "batch_size": 4}
    assert_equal(fit(Labelled(), **arguments), fit(X, Y, **arguments))


def test_tensors_and_parts_of_them_are_arrays():
    assert_equal(fit(tensors(Y), batch_size=4), fit(X, Y, batch_size=4))
    part = data.Subset(data.Subset(tensors(), [9, 1, 2, 3]), [0, 2])
    source = source_of(part, batch_size=2)
    assert (source.kind, rows(source)) == ("arrays", [[9, 2]])
    np.testing.assert_array_equal(source.example.inputs[0], X[[9, 2]])

    class Doubled(data.TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return 2 * x, y

    source = source_of(Doubled(*tensors().tensors), batch_size=ROWS)
    np.testing.assert_array_equal(next(source.batches(0)).inputs[0], 2 * X)


def test_a_stream_of_examples_is_put_into_batches():
    source = source_of(InOrder(), batch_size=4)
    assert (source.kind, source.num_batches) == ("torch IterableDataset", None)
    assert rows(source) == rows(source, 1) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert source_of(InOrder()).batch_size == ROWS  # 32, of which there are 10


def test_a_function_for_each_item():
    examples = Examples(Rows(), lambda item: (item[0] * 2, item[1]))
    batch = next(source_of(examples, batch_size=4).batches(0))
    np.testing.assert_array_equal(batch.inputs[0], 2 * X[:4])


def test_a_dataset_without_length():
    class Endless(data.Dataset):
        def __getitem__(self, index):
            return X[0], index

    with pytest.raises(TypeError, match=r"an? Endless, has no length. Add def __len__"):
        source_of(Endless())


def test_pictures_and_class_names_of_torchvision():
    from PIL import Image

    class Pictures(data.Dataset):
        classes = ("cat", "dog")

        def __len__(self):
            return 4

        def __getitem__(self, index):
            return Image.fromarray(np.full((5, 6), index, np.uint8)), index % 2

    for dataset in (Pictures(), data.Subset(Pictures(), [0, 1])):
        source = source_of(dataset)
        assert source.info.class_names == ("cat", "dog")
        assert source.info.pictures
        assert source.example.inputs[0].dtype == np.uint8
        assert source.example.inputs[0].shape[1:] == (5, 6)
    assert not source_of(Rows()).info.pictures


# ------------------------------------------------------------------------- tensors


def test_tensors_share_their_memory():
    tensor = torch.arange(6.0).reshape(2, 3)
    assert np.shares_memory(as_host(tensor), tensor.numpy())
    grown = torch.nn.Parameter(tensor)
    assert np.shares_memory(as_host(grown), tensor.numpy())


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, ml_dtypes.bfloat16),
        (torch.float8_e4m3fn, ml_dtypes.float8_e4m3fn),
        (torch.float64, np.float64),
        (torch.uint8, np.uint8),
        (torch.bool, np.bool_),
    ],
)
def test_dtypes_of_tensors(dtype, expected):
    array = as_host(torch.tensor([[0, 1], [2, 3]]).to(dtype))
    assert array.dtype == expected
    values = array.astype(np.float32).tolist()
    assert values == ([[0, 1], [1, 1]] if dtype == torch.bool else [[0, 1], [2, 3]])
    assert as_host(torch.tensor(2).to(dtype)).shape == ()


def test_tensors_of_bfloat16_are_trained_on():
    half = torch.from_numpy(X).bfloat16()
    loader = data.DataLoader(data.TensorDataset(half, torch.from_numpy(Y)), 4)
    source = source_of(loader)
    assert source.example.inputs[0].dtype == ml_dtypes.bfloat16
    assert_equal(fit(loader), fit(np.asarray(as_host(half)), Y, batch_size=4))


def test_tensors_that_are_no_arrays():
    with pytest.raises(DataError, match=r"sparse_coo is sparse, .*x\.to_dense\(\)"):
        as_host(torch.eye(3).to_sparse())
    with pytest.warns(UserWarning, match="prototype"):
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    with pytest.raises(DataError, match=r"different length .*to_padded_tensor"):
        as_host(nested)
    with pytest.raises(DataError, match=r"different length .*to_padded_tensor"):
        collate([(nested, 1), (nested, 2)])


def test_predict_on_a_dataset():
    source = as_inputs_source(Rows(), binding=BINDING, batch_size=4)
    found = np.concatenate(
        [batch.inputs[0][batch.weights > 0] for batch in source.batches(0)]
    )
    np.testing.assert_array_equal(found, X)


def test_others_are_not_recognized():
    for other in (torch.ones(3), nn.Dense(3), [1], iter(())):
        assert not matches(other)
