"""A character Transformer that learns to write like Python's own documentation.

    python examples/language_model.py

The text comes with Python, `help("topics")`: nothing is downloaded. Its sentences are
of any length; they are padded to one of three lengths, so that there are three compiled
steps and little padding. Training takes about a minute on two CPU cores.
"""

import argparse
import pydoc_data.topics
import re

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax

from flaxfit import Trainer
from flaxfit.data import Examples

CHARACTERS = 128  # those of ASCII
LENGTHS = [32, 64, 128]
END = "\n"  # before the first and after the last character of a sentence


class Block(nn.Module):
    """Every place looks back at those before it, and then thinks for itself."""

    heads: int = 4

    @nn.compact
    def __call__(self, x, mask):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads)(h, mask=mask)
        h = nn.LayerNorm()(x)
        return x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(4 * x.shape[-1])(h)))


class LanguageModel(nn.Module):
    """Characters `int[batch, length]` -> logits of the one that follows each."""

    features: int = 64
    layers: int = 2

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(CHARACTERS, self.features)(tokens)
        # The two characters before tell most of the next one: they are at hand.
        before = [jnp.pad(x, ((0, 0), (n, 0), (0, 0)))[:, :-n] for n in (1, 2)]
        x = nn.Dense(self.features)(jnp.concatenate([x, *before], axis=-1))
        x = x + nn.Embed(LENGTHS[-1], self.features)(jnp.arange(tokens.shape[1]))[None]
        # No mask for the padding: it comes last, and no character attends to it.
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            x = Block()(x, mask)
        return nn.Dense(CHARACTERS)(nn.LayerNorm()(x))


def load_sentences() -> list[str]:
    """Returns the sentences of the documentation, each of them once."""
    text = "\n\n".join(pydoc_data.topics.topics.values())
    text = text.encode("ascii", "ignore").decode()
    sentences = re.split(r"\n\n|(?<=[.:?!])\s", text)
    return list(dict.fromkeys(" ".join(s.split()) for s in sentences if len(s) >= 20))


def encode(text: str) -> np.ndarray:
    """Returns the numbers of characters, `int32[length]`."""
    return np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int32)


def as_example(sentence: str):
    """Returns the characters, and for each of them the one that follows."""
    tokens = encode(END + sentence + END)
    return tokens[:-1], tokens[1:]


def falling_rate(total_steps: int):
    """The learning rate rises from 0.0004 to 0.004, then falls along half a cosine."""
    warm_up = total_steps // 10
    return optax.warmup_cosine_decay_schedule(4e-4, 4e-3, warm_up, total_steps)


def write(trainer: Trainer, start: str, length: int = 100, seed: int = 0) -> str:
    """Returns what the model writes after `start`, character by character."""
    rng = np.random.default_rng(seed)
    text = END + start
    while len(text) <= length and (text == END + start or text[-1] != END):
        tokens = np.zeros((1, LENGTHS[-1]), np.int32)
        tokens[0, : len(text)] = encode(text)
        logits = trainer.predict(tokens)[0, len(text) - 1] / 0.6
        chances = np.exp(logits - logits.max())
        text += chr(rng.choice(CHARACTERS, p=chances / chances.sum()))
    return text.strip()


def main(seed: int = 0, epochs: int = 5):
    """Trains, tests and writes; returns the bits per character and what was written."""
    sentences = load_sentences()
    order = np.random.default_rng(0).permutation(len(sentences))
    examples = [as_example(sentences[index]) for index in order]
    held_out = len(examples) // 10

    # The loss and the accuracy are over real characters: padding weighs 0.
    train, test = (
        Examples(part, pad_to=LENGTHS, truncate=True)
        for part in (examples[held_out:], examples[:held_out])
    )
    trainer = Trainer(
        LanguageModel(), metrics=["accuracy"], learning_rate=falling_rate, seed=seed
    )
    trainer.fit(train, epochs=epochs, batch_size=32, validation_data=test)

    loss = trainer.evaluate(test)["loss"]
    bits = loss / np.log(2)
    print(f"\n{bits:.2f} bits per character, perplexity {np.exp(loss):.2f}")
    written = write(trainer, "The ", seed=seed)
    print(f"it writes: {written}")
    return {"bits": bits, "written": written, "compiles": trainer.compiles}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=5)
    main(**vars(parser.parse_args()))
