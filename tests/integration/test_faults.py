"""Files and trainings survive: each fault a few times.

`pytest tests/faults -m slow` tries them as often as it takes.
"""

import pytest
import registry
import training
from harness import Server
from helpers.asserts import assert_survived

pytestmark = pytest.mark.process


def by_name(faults):
    return pytest.mark.parametrize("fault", faults, ids=[each.name for each in faults])


@pytest.fixture(scope="module")
def server():
    """A clean process: pytest's own has a jax backend and cannot be forked."""
    with Server() as server:
        yield server


@pytest.fixture(scope="module")
def training_server(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    with Server(("training",), {training.CACHE: cache}) as server:
        yield server


@by_name(registry.FAULTS)
def test_nothing_is_lost(fault, server, tmp_path):
    assert_survived(server.run(fault.campaign, fault.short, 0, tmp_path))


@by_name(training.FAULTS)
def test_a_training_survives(fault, training_server, tmp_path):
    assert_survived(training_server.run(fault.campaign, fault.short, 0, tmp_path))


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
