"""Kinds of data that others bring: registered, trained on, evaluated, predicted."""

import numpy as np
import pytest
from helpers.models import Linear

from flaxfit import Trainer
from flaxfit.data import Batches, Examples, register_adapter
from flaxfit.data.adapters import registry
from flaxfit.data.open import open_dataset

RNG = np.random.default_rng(0)
X = RNG.normal(size=(20, 3)).astype(np.float32)
Y = RNG.integers(0, 3, 20).astype(np.int32)


class Corpus:
    """Examples with random access, in words of its own."""

    def size(self):
        return len(X)

    def entry(self, number):
        return X[number], Y[number]


class Tap:
    """Batches in sequence, in words of its own."""

    def pour(self):
        for start in range(0, 20, 4):
            yield X[start : start + 4], Y[start : start + 4]


class _Items:
    def __init__(self, corpus):
        self.corpus = corpus

    def __len__(self):
        return self.corpus.size()

    def __getitem__(self, number):
        return self.corpus.entry(number)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", [])
    register_adapter(lambda x: isinstance(x, Corpus), lambda x: Examples(_Items(x)))
    register_adapter(lambda x: isinstance(x, Tap), lambda x: x.pour)


def trained(*data, **arguments):
    trainer = Trainer(Linear(), learning_rate=0.1)
    return trainer, trainer.fit(*data, epochs=2, verbose=0, **arguments)


def test_examples_of_a_registered_kind_are_those_of_arrays(registered):
    trainer, history = trained(Corpus(), batch_size=4)
    by_arrays, expected = trained(X, Y, batch_size=4)
    assert history.history == expected.history
    assert trainer.evaluate(Corpus(), verbose=0) == by_arrays.evaluate(X, Y, verbose=0)
    np.testing.assert_array_equal(
        trainer.predict(Corpus(), verbose=0), by_arrays.predict(X, verbose=0)
    )


def test_batches_of_a_registered_kind_come_in_their_order(registered):
    _, history = trained(Tap(), validation_data=Corpus())
    _, expected = trained(X, Y, batch_size=4, shuffle=False, validation_data=(X, Y))
    for name, values in expected.history.items():
        np.testing.assert_allclose(history.history[name], values, rtol=1e-6)


def test_the_latest_registration_wins(registered):
    register_adapter(lambda x: isinstance(x, Tap), lambda x: (X[:4], Y[:4]))
    trainer, _ = trained(Tap())
    assert trainer.step == 2


class Shelf:
    """A list of batches under another name."""

    def __init__(self, batches):
        self.batches = batches


def test_a_registered_kind_may_hold_the_batches_of_batches(registered):
    register_adapter(lambda x: isinstance(x, Shelf), lambda x: x.batches)
    ragged = [([[1.0, 2.0], [3.0]], Y[:2])]
    padded = [
        open_dataset(Batches(given, pad_to={0: 2}, mask=None)).kind
        for given in (Shelf(ragged), ragged)
    ]
    assert padded[0] == padded[1]


class Store:
    """A kind that looks like an array that is read by slices."""

    shape, dtype = X.shape, X.dtype

    def __getitem__(self, rows):
        raise AssertionError("its adapter was not asked")


def test_registered_kinds_come_before_all_others(registered):
    register_adapter(lambda x: isinstance(x, Store), lambda x: (X, Y))
    register_adapter(lambda x: isinstance(x, str), lambda x: (X, Y))
    by_arrays, expected = trained(X, Y, batch_size=4)
    for given in (Store(), "corpus.npy"):
        trainer, history = trained(given, batch_size=4)
        assert history.history == expected.history
        np.testing.assert_array_equal(trainer.predict(given), by_arrays.predict(X))


def test_wrong_adapters_are_refused_or_named(registered):
    with pytest.raises(TypeError, match=r"Got matches=5.*Expected a function"):
        register_adapter(5, lambda x: x)
    register_adapter(lambda x: isinstance(x, Shelf), lambda x: x)
    with pytest.raises(ValueError, match="registered for Shelf returned its argument"):
        Trainer(Linear()).fit(Shelf([]))
    register_adapter(lambda x: isinstance(x, Shelf), lambda x: Shelf(x.batches))
    with pytest.raises(ValueError, match="or data of the same kind"):
        Trainer(Linear()).fit(Shelf([]))
    register_adapter(lambda x: x.name == 7, lambda x: x)
    with pytest.raises(AttributeError) as caught:
        Trainer(Linear()).fit(Shelf([]))
    assert "while asking a registered adapter" in caught.value.__notes__[0]
