"""A stream that never ends: trained on, and predicted, in the memory of a few batches.

    python examples/stream.py

Each batch is a megabyte of noise with a tone in it, made as it is asked for, as from a
microphone or a socket. A gigabyte of them goes by; the memory that is taken stays the
same. Nothing is downloaded. Training takes less than half a minute on two CPU cores.
"""

import argparse
import resource
import sys
import tempfile
from pathlib import Path

import flax.linen as nn
import numpy as np

from flaxfit import LambdaCallback, Trainer

SAMPLES = 512  # of a recording
BATCH = 512  # recordings
TONES = 10
MEGABYTE = 2**20


class Listener(nn.Module):
    """Two dense layers over the samples of a recording."""

    @nn.compact
    def __call__(self, samples):
        hidden = nn.relu(nn.Dense(128)(samples))
        return nn.Dense(TONES)(nn.relu(nn.Dense(64)(hidden)))


def record(rng, tones):
    """Returns `float32[recordings, SAMPLES]`: noise, and in it the tones, once each."""
    time = np.arange(SAMPLES, dtype=np.float32) / SAMPLES
    waves = 2 * np.pi * (8 + 3 * tones.astype(np.float32))
    phases = rng.uniform(0, 2 * np.pi, (len(tones), 1)).astype(np.float32)
    noise = rng.standard_normal((len(tones), SAMPLES), np.float32)
    return np.sin(waves[:, None] * time + phases) + 3 * noise


def labelled_stream(seed):
    """Yields batches `(recordings, tones)` for ever."""
    rng = np.random.default_rng(seed)
    while True:
        tones = rng.integers(0, TONES, BATCH)
        yield record(rng, tones), tones


def unlabelled_stream(seed, batches, heard):
    """Yields recordings alone, and notes the tones that are in them."""
    rng = np.random.default_rng(seed)
    for _ in range(batches):
        tones = rng.integers(0, TONES, BATCH)
        heard.append(tones)
        yield record(rng, tones)


def peak_megabytes():
    """Returns the most memory that this process has taken so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (MEGABYTE if sys.platform == "darwin" else 1024)


def main(seed: int = 0, epochs: int = 8, steps: int = 100, folder: str | None = None):
    """Trains and predicts; returns the results."""
    peaks = []
    trainer = Trainer(Listener(), metrics=["accuracy"], seed=seed)

    # An iterator without an end has no epochs: `steps_per_epoch` makes some. It is read
    # in a background thread, only a few batches ahead.
    trainer.fit(
        labelled_stream(seed),
        epochs=epochs,
        steps_per_epoch=steps,
        validation_data=labelled_stream(seed + 1),
        validation_steps=10,
        callbacks=LambdaCallback(
            on_epoch_end=lambda loop: peaks.append(peak_megabytes())
        ),
    )
    batch_megabytes = BATCH * SAMPLES * 4 / MEGABYTE
    streamed = epochs * (steps + 10) * batch_megabytes

    # The outputs come batch by batch as well. Only the likeliest tone of each is kept,
    # in a file that is mapped into memory. To keep the outputs themselves, write
    # trainer.predict(stream, out=file).
    heard: list[np.ndarray] = []
    batches = 2 * steps
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(folder or temporary) / "tones.npy"
        file = np.lib.format.open_memmap(path, "w+", np.uint8, (batches * BATCH,))
        row = 0
        stream = unlabelled_stream(seed + 2, batches, heard)
        for outputs in trainer.predict_batches(stream):
            file[row : row + len(outputs)] = outputs.argmax(axis=-1)
            row += len(outputs)
        file.flush()
        del file
        accuracy = float(np.mean(np.load(path) == np.concatenate(heard)))
    streamed += batches * batch_megabytes
    peaks.append(peak_megabytes())

    print(f"\n{row:,} recordings are written into a file, {accuracy:.2%} of them right")
    print(
        f"{streamed:,.0f} MB went by · peak memory {peaks[0]:,.0f} MB after the first "
        f"epoch, {peaks[-1]:,.0f} MB at the end"
    )
    return {
        "accuracy": accuracy,
        "rows": row,
        "streamed_megabytes": streamed,
        "peak_megabytes": peaks,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=8)
    main(**vars(parser.parse_args()))
