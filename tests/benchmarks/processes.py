"""Fresh processes: starts them, waits, reads what they print."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CHILD = Path(__file__).with_name("child.py")


def run_child(*arguments: str, **environment: str) -> dict[str, Any]:
    """Returns what `child.py` found, and when it was `started`.

    Raises:
      RuntimeError: it failed; with what it wrote to stderr.
    """
    started = time.time()
    done = _run([str(_CHILD), *arguments], environment)
    return {"started": started, **json.loads(done.splitlines()[-1])}


def run_code(code: str) -> None:
    """Runs Python code in a process of its own."""
    _run(["-c", code], {})


def _run(arguments: list[str], environment: Mapping[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        command = " ".join(arguments)
        raise RuntimeError(f"{command} failed:\n{done.stderr[-3000:]}")
    return done.stdout
