"""What the programs of a trainer leave behind."""

import gc
import weakref

import jax
from helpers.data import labeled
from helpers.models import Net

from flaxfit import Trainer


def test_programs_are_collected_with_their_trainer():
    x, y = labeled(32)
    client = jax.local_devices()[0].client

    def train():
        trainer = Trainer(Net(), metrics=["accuracy"])
        trainer.fit(x, y, validation_data=(x, y), epochs=2, batch_size=8, verbose=0)
        trainer.predict(x)
        programs = trainer._programs.resolved.programs
        return weakref.ref(trainer), weakref.ref(programs.train)

    trainer, program = train()
    gc.collect()
    assert trainer() is None and program() is None
    executables = len(client.live_executables())
    train()
    gc.collect()
    # What jax keeps of the functions that both trainers share is there once.
    assert len(client.live_executables()) == executables
