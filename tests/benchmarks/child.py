"""A fresh process that trains a little, and says when and with how much memory.

    python child.py flaxfit mlp --epochs 1

It imports what its trainer needs and nothing else: no rival's packages.
"""

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

WHO = ("flaxfit", "loop", "keras")


def describe() -> dict[str, Any]:
    """Returns what the report says of the machine."""
    import jax

    device = jax.devices()[0]
    return {
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "devices": jax.device_count(),
    }


def make_trainer(who: str, workload: Any) -> Any:
    """Returns the one who trains, from variables of its own."""
    if who == "flaxfit":
        from flaxfit_rival import FlaxfitFit

        return FlaxfitFit(workload, own_init=True)
    if who == "keras":
        from keras_rival import KerasFit

        return KerasFit(workload)
    from rivals import resident_loop

    return resident_loop(workload)


def import_packages(who: str) -> None:
    """Imports what a user of `who` has at the top of the file."""
    import flax.linen
    import optax

    if who == "flaxfit":
        import flaxfit

        del flaxfit
    elif who == "keras":
        from keras_rival import import_keras

        import_keras()
    del flax, optax


def train(who: str, name: str, *, quick: bool, epochs: int) -> dict[str, Any]:
    """Trains; returns moments as seconds since 1970, and megabytes."""
    import_packages(who)
    from workloads import make_workload

    workload = make_workload(name, quick)
    ready, before = time.time(), peak_megabytes()
    loss = None
    if epochs:
        loss, _ = make_trainer(who, workload).train(epochs)
    return {
        "ready": ready,
        "end": time.time(),
        "before": before,
        "peak": peak_megabytes(),
        "peak on device": peak_device_megabytes(),
        "loss": loss,
    }


def grow(name: str, *, quick: bool, epochs: int) -> dict[str, Any]:
    """Trains with flaxfit; returns the resident megabytes after every epoch."""
    from flaxfit_rival import FlaxfitFit
    from workloads import make_workload

    from flaxfit import LambdaCallback

    resident: list[float] = []
    watch = LambdaCallback(
        on_epoch_end=lambda loop: resident.append(resident_megabytes())
    )
    FlaxfitFit(make_workload(name, quick), callbacks=[watch]).train(epochs)
    return {"resident": resident}


def peak_megabytes() -> float:
    """Returns the most memory this process ever held."""
    status = Path("/proc/self/status")
    if status.exists():
        # Linux hands ru_maxrss on to a child: it may be that of the parent.
        (line,) = (v for v in status.read_text().splitlines() if "VmHWM" in v)
        return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def peak_device_megabytes() -> float | None:
    """Returns the most memory in use on the device, None where that is not told."""
    import jax

    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return None if peak is None else peak / 2**20


def resident_megabytes() -> float:
    """Returns the memory this process holds, or the most where that is not told."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return peak_megabytes()
    pages = int(statm.read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    """Does what the command line says and prints one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=[*WHO, "growth", "describe"])
    parser.add_argument("workload", nargs="?")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    options = {"quick": given.quick, "epochs": given.epochs}
    if given.what == "describe":
        result = describe()
    elif given.what == "growth":
        result = grow(given.workload, **options)
    else:
        result = train(given.what, given.workload, **options)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
