"""BatchNorm in Flax: the training code you write by hand, and the lines instead.

    python examples/batch_norm.py

Part 1 is what Flax's guide on batch normalization has you write
(https://flax-linen.readthedocs.io/en/latest/guides/training_techniques/batch_norm.html):
a state class with `batch_stats`, a call that may change them, a loss that hands them
out, and an evaluation that must not. Part 2 is flaxfit. Both start from the same
variables, see the same batches in the same order, and end with the same numbers,
which part 3 proves.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state

from flaxfit import Trainer

EPOCHS = 3
BATCH_SIZE = 32


class MLP(nn.Module):
    """The guide's model, for three classes."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(features=4)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.relu(x)
        x = nn.Dense(features=3)(x)
        return x


def make_data(examples: int = 512):
    """Returns points in five dimensions, and which of three directions is nearest."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(examples, 5)).astype("float32")
    return x, np.argmax(x @ rng.normal(size=(5, 3)), axis=-1).astype("int32")


# Plain momentum and not Adam: the bias in front of a BatchNorm has a gradient of
# zero, as the mean is subtracted right after it. What is left of it is rounding noise
# near 1e-9, and Adam, which divides a gradient by its size, makes full steps of that.
# Two programs may round differently, so with Adam they may differ there; neither is
# wrong, as that bias changes no output.
optimizer = optax.sgd(0.1, momentum=0.9)


# ------------------------------------------------------------------ 1. by hand


class TrainState(train_state.TrainState):
    """Flax's state has no place for statistics, so it gets one."""

    batch_stats: Any


def create_train_state(model, variables):
    """Takes the variables apart, for the state to hold them."""
    return TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=optimizer,
    )


@jax.jit
def train_step(state, batch):
    """One update of the parameters, and of the statistics beside them."""

    def loss_fn(params):
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            batch["x"],
            train=True,
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return losses.mean(), (logits, updates)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (logits, updates)), grads = grad_fn(state.params)
    state = state.apply_gradients(grads=grads)
    state = state.replace(batch_stats=updates["batch_stats"])
    accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == batch["y"])
    return state, {"loss": loss, "accuracy": accuracy}


@jax.jit
def eval_step(state, batch):
    """The loss and accuracy with the running statistics."""
    logits = state.apply_fn(
        {"params": state.params, "batch_stats": state.batch_stats},
        batch["x"],
        train=False,
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == batch["y"])
    return {"loss": losses.mean(), "accuracy": accuracy}


def batches(x, y):
    """Yields the data in order; its length must divide by the batch size."""
    for start in range(0, len(x), BATCH_SIZE):
        rows = slice(start, start + BATCH_SIZE)
        yield {"x": x[rows], "y": y[rows]}


def mean_of(steps):
    """Returns the mean of each value over equally large batches."""
    return {
        name: float(np.mean([logs[name] for logs in steps]))
        for name in ("loss", "accuracy")
    }


def train_by_hand(model, variables, x, y):
    """Returns the variables after training, and the values of each epoch."""
    state = create_train_state(model, variables)
    history = []
    for _ in range(EPOCHS):
        steps = []
        for batch in batches(x, y):
            state, logs = train_step(state, batch)
            steps.append(logs)
        history.append(mean_of(steps))
    result = mean_of([eval_step(state, batch) for batch in batches(x, y)])
    trained = {"params": state.params, "batch_stats": state.batch_stats}
    return trained, history, result


# ---------------------------------------------------------------- 2. with flaxfit


def train_with_flaxfit(model, variables, x, y):
    """The same in three lines, for whatever collections a module has."""
    trainer = Trainer(
        model, optimizer=optimizer, metrics=["accuracy"], variables=variables
    )
    history = trainer.fit(x, y, epochs=EPOCHS, batch_size=BATCH_SIZE, shuffle=False)
    return trainer.variables, history.history, trainer.evaluate(x, y)


# ------------------------------------------------------------------- 3. the proof


def main():
    """Trains both ways, checks that all numbers agree, returns the differences."""
    model = MLP()
    x, y = make_data()
    variables = model.init(jax.random.key(0), x[:1], train=False)

    by_hand, epochs_by_hand, result_by_hand = train_by_hand(model, variables, x, y)
    fitted, history, result = train_with_flaxfit(model, variables, x, y)

    pairs = {}
    for epoch, values in enumerate(epochs_by_hand):
        for name, value in values.items():
            pairs[f"epoch {epoch + 1} {name}"] = value, history[name][epoch]
    for name, value in result_by_hand.items():
        pairs[f"evaluation {name}"] = value, result[name]
    leaves, _ = jax.tree_util.tree_flatten_with_path(by_hand)
    for (path, ours), theirs in zip(leaves, jax.tree.leaves(fitted), strict=True):
        pairs[jax.tree_util.keystr(path, simple=True, separator="/")] = ours, theirs

    print(f"\n{'':32}  {'by hand':>9}  {'flaxfit':>9}  {'largest difference':>18}")
    differences = {}
    for name, (ours, theirs) in pairs.items():
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-6, err_msg=name)
        differences[name] = float(np.max(np.abs(np.subtract(theirs, ours))))
        first = np.ravel(ours)[0], np.ravel(theirs)[0]
        print(f"{name:32}  {first[0]:9.6f}  {first[1]:9.6f}  {differences[name]:18.1e}")
    print("\nAll numbers agree to 1e-6. (Of arrays the first element is shown.)")
    return differences


if __name__ == "__main__":
    main()
