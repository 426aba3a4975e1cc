"""The benchmarks run, and compare those who do the same work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
RIVALS = ("flaxfit `fit`", "(a) ", "(b) ", "(b') ", "(e) ", "(d) the floor")


def run(*arguments, script="run.py"):
    # On one device, as a user runs it.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, FOLDER / script, *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )


def test_the_speed_table_has_every_rival(tmp_path):
    written = tmp_path / "table.md"
    arguments = "--quick --only tiny --section speed --no-keras --output".split()
    done = run(*arguments, str(written))
    assert done.returncode == 0, done.stderr
    assert written.read_text() == done.stdout
    assert "- machine: " in done.stdout
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in done.stdout.splitlines()
        if line.startswith("| ")
    ]
    assert len(rows) == 2 + len(RIVALS)  # the header and its rule
    for row, rival in zip(rows[2:], RIVALS, strict=True):
        assert row[0].startswith(rival)
        assert float(row[1].replace(",", "")) > 0
    # All began from equal parameters and took the batches in the same order.
    assert len({row[4] for row in rows[2:-1]}) == 1


@pytest.mark.parametrize("option", ["--only", "--section"])
def test_a_wrong_name_is_told_what_there_is(option):
    done = run(option, "nothing")
    assert done.returncode == 2
    assert "nothing: choose from" in done.stderr


def test_the_tables_of_data(tmp_path):
    pytest.importorskip("grain")
    written = tmp_path / "table.md"
    done = run("--quick", "--output", str(written), script="data.py")
    assert done.returncode == 0, done.stderr
    assert written.read_text() == done.stdout
    firsts = [
        line.split("|")[1].strip() for line in done.stdout.splitlines() if "|" in line
    ]
    assert sum("batches of" in first for first in firsts) == 4
    assert sum("processes" in first for first in firsts) == 3
    assert sum("Grain" in first for first in firsts) == 3
    assert "TFDS by name" in firsts
