"""Saving and loading: flaxfit, plain Flax and orbax, in time and memory.

Run: `python tests/benchmarks/files.py [--rounds N] [--only NAME]`. Each measurement
is a process of its own; the rounds of all rivals are interleaved.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tables import Report, number, ratio

SIZES = {
    "1 GiB in 100 leaves": (100, 2**28 // 100),
    "one leaf of 1 GiB": (1, 2**28),
    "20,000 leaves of 4 KiB": (20_000, 1024),
}
RIVALS = ("flaxfit", "flax", "orbax")


def main() -> None:
    """Measures, prints a table for each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="a part of a size's name")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(_child(*given.child)))
        return
    report = Report(sys.stdout)
    for name in (size for size in SIZES if given.only in size):
        report.section(name)
        _add_table(report, name, given.rounds)


def _add_table(report: Report, name: str, rounds: int) -> None:
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    with TemporaryDirectory() as folder:
        for _ in range(rounds):
            for rival in RIVALS:
                path = str(Path(folder) / rival)
                for action in ("save", "load"):
                    said = _run(name, rival, action, path)
                    found.setdefault((rival, action), []).append(said)
                shutil.rmtree(path, ignore_errors=True)
    rows = []
    for rival in RIVALS:
        row = [rival]
        for action in ("save", "load"):
            theirs, own = (
                [said["seconds"] for said in found[who, action]]
                for who in (rival, "flaxfit")
            )
            memory = statistics.median(s["MiB"] for s in found[rival, action])
            row += [
                number(statistics.median(theirs)),
                number(ratio(theirs, own)),
                number(memory),
            ]
        rows.append(row)
    columns = ("s", "its / flaxfit's", "peak MiB more")
    header = ["by", *(f"{a} {c}" for a in ("save", "load") for c in columns)]
    report.table(header, rows)


def _run(*arguments: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", *arguments]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def _child(name: str, rival: str, action: str, path: str) -> dict[str, float]:
    """Returns how long it took, and how much the process grew beyond the state."""
    import jax
    import numpy as np

    count, size = SIZES[name]
    rng = np.random.default_rng(0)
    tree = {
        f"layer_{i:05}": jax.device_put(rng.random(size, np.float32))
        for i in range(count)
    }
    jax.block_until_ready(tree)
    template = jax.eval_shape(lambda: tree)
    if action == "load":
        tree = {}
    run = _actions(rival, path, tree, template)[action]
    _reset_peak()
    before = _resident()
    start = time.perf_counter()
    jax.block_until_ready(run())
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "MiB": _peak() - before}


def _actions(
    rival: str, path: str, tree: Any, template: Any
) -> dict[str, Callable[[], Any]]:
    import jax
    import jax.numpy as jnp

    if rival == "flaxfit":
        from flaxfit import checkpoint
        from flaxfit._core.types import TrainState

        def restored() -> Any:
            fields = {"collections": {}, "opt_state": (), "rng": None, "step": None}
            like = TrainState(params=template, **fields)
            return checkpoint.restore(checkpoint.load(path).state, like)[0]

        return {
            "save": lambda: checkpoint.save(path, {"params": tree}, {}),
            "load": restored,
        }
    if rival == "flax":
        from flax import serialization

        def save() -> None:
            with open(path, "wb") as file:
                file.write(serialization.to_bytes(tree))
                file.flush()
                os.fsync(file.fileno())

        def load() -> Any:
            read = serialization.from_bytes(template, Path(path).read_bytes())
            return jax.tree.map(jnp.asarray, read)

        return {"save": save, "load": load}
    import orbax.checkpoint as orbax

    def saved() -> None:
        with orbax.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, tree)

    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        template,
    )
    return {
        "save": saved,
        "load": lambda: orbax.StandardCheckpointer().restore(path, placed),
    }


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    found = next((line for line in lines if line.startswith("VmHWM")), None)
    if found is None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return int(found.split()[1]) / 1024


def _resident() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(n for n in lines if n.startswith("VmRSS")).split()[1]) / 1024


if __name__ == "__main__":
    main()
