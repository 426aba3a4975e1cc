"""Training goes on as if nothing had been; `-m slow` breaks it as often as it takes."""

import pytest
from harness import Server
from training import CACHE, FAULTS

pytestmark = pytest.mark.process
_NAMES = [fault.name for fault in FAULTS]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    with Server(("training",), {CACHE: cache}) as server:
        yield server


def assert_survived(outcome):
    if outcome.skipped:
        pytest.skip(outcome.skipped)
    assert outcome.trials > 0
    lost = outcome.trials - outcome.survived
    assert not lost, "\n".join([f"{lost} of {outcome.trials}:", *outcome.details[:20]])


@pytest.mark.parametrize("fault", FAULTS, ids=_NAMES)
def test_a_training_survives(fault, server, tmp_path):
    assert_survived(server.run(fault.campaign, fault.short, 0, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=_NAMES)
def test_a_training_survives_in_the_long_run(fault, server, tmp_path):
    assert_survived(server.run(fault.campaign, fault.long, 1, tmp_path, timeout=36_000))
