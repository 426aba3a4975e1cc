"""The files survive: each fault a few times, and with `-m slow` as often as it takes.

`run.py` prints the same as a table.
"""

import pytest
from harness import Server
from registry import FAULTS

pytestmark = pytest.mark.process
_NAMES = [fault.name for fault in FAULTS]


@pytest.fixture(scope="module")
def server():
    """A clean process: pytest's own has a jax backend and cannot be forked."""
    with Server() as server:
        yield server


def assert_survived(outcome):
    if outcome.skipped:
        pytest.skip(outcome.skipped)
    assert outcome.trials > 0
    lost = outcome.trials - outcome.survived
    assert not lost, "\n".join([f"{lost} of {outcome.trials}:", *outcome.details[:20]])


@pytest.mark.parametrize("fault", FAULTS, ids=_NAMES)
def test_nothing_is_lost(fault, server, tmp_path):
    assert_survived(server.run(fault.campaign, fault.short, 0, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=_NAMES)
def test_nothing_is_lost_in_the_long_run(fault, server, tmp_path):
    outcome = server.run(fault.campaign, fault.long, 1, tmp_path, timeout=7200)
    assert_survived(outcome)


def test_files_are_written_and_read_without_a_backend(server, tmp_path):
    campaign = "campaigns_crash:saves_without_a_backend"
    assert_survived(server.run(campaign, 1, 0, tmp_path))


@pytest.mark.parametrize(
    ("control", "trials"),
    [
        ("killed_in_place", 30),
        ("killed_at_each_call_in_place", 50),
        ("power_lost_unsynced", 10),
    ],
)
def test_the_campaigns_find_careless_writers_out(control, trials, server, tmp_path):
    outcome = server.run(f"controls:{control}", trials, 0, tmp_path)
    if outcome.skipped:
        pytest.skip(outcome.skipped)
    assert 0 < outcome.survived < outcome.trials


def test_a_rename_is_enough_for_a_kill(server, tmp_path):
    assert_survived(server.run("controls:killed_unsynced", 50, 0, tmp_path))
