"""The thread that writes checkpoints."""

import gc
import time
import weakref

from flaxfit._runs.saver import BackgroundWriter


class State:
    """Stands for the copy of a state on the host."""

    def write(self):
        pass


def test_a_written_state_is_not_kept_until_the_next_file():
    writer, state = BackgroundWriter(), State()
    kept = weakref.ref(state)
    writer.submit(state.write, "Saving 'run'")
    del state
    writer.flush()
    end = time.perf_counter() + 10
    while kept() is not None and time.perf_counter() < end:
        time.sleep(0.01)  # the thread may still be between the two jobs
        gc.collect()
    assert kept() is None
    writer.close()
