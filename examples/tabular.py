"""A table of pandas: tumors classified by 30 measurements, and reports by class name.

    python examples/tabular.py

The data, 569 rows, comes with scikit-learn: nothing is downloaded. Training takes a
few seconds.
"""

import flax.linen as nn
import pandas as pd
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import classification_report
from sklearn.model_selection import train_test_split

from flaxfit import Trainer


class MLP(nn.Module):
    """One hidden layer with Dropout, and a logit for each of the two classes."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.relu(nn.Dense(32)(x))
        x = nn.Dropout(rate=0.2, deterministic=not train)(x)
        return nn.Dense(2)(x)


def load_data():
    """Returns a table to train on and one to test on, with a column `diagnosis`."""
    data = load_breast_cancer(as_frame=True)
    table = data.data
    # A category brings the names of its classes with it; text would be refused.
    table["diagnosis"] = pd.Categorical.from_codes(data.target, data.target_names)
    train, test = train_test_split(
        table, test_size=0.25, stratify=table["diagnosis"], random_state=0
    )
    # Mean 0 and deviation 1 in the training data; the test data tells nothing.
    measured = list(data.feature_names)
    mean, deviation = train[measured].mean(), train[measured].std()
    return [
        part.assign(**((part[measured] - mean) / deviation)) for part in (train, test)
    ]


def main(seed: int = 0, epochs: int = 20):
    """Trains, tests, reports; returns the test result."""
    train, test = load_data()

    # The target is a column; all others become one matrix, in the table's order. Had
    # it been called "label" or "target", nothing would have to be said.
    trainer = Trainer(MLP(), targets="diagnosis", metrics=["accuracy"], seed=seed)
    trainer.fit(train, epochs=epochs, validation_split=0.1, verbose=2)

    result = trainer.evaluate(test, verbose=0)
    print(
        f"\ntest loss {result['loss']:.4f} · test accuracy {result['accuracy']:.2%}\n"
    )

    # Columns go by their names: a table in another order, without the target or with
    # more columns gives the same predictions.
    backwards = test[test.columns[::-1]]
    guesses = trainer.predict(backwards, verbose=0).argmax(axis=-1)
    print(
        classification_report(
            test["diagnosis"].cat.codes, guesses, target_names=trainer.class_names
        )
    )
    return result


if __name__ == "__main__":
    main()
