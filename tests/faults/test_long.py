"""Each fault as often as it takes: `pytest tests/faults -m slow`, an hour or more.

The short form is part of the suite, in `tests/integration/test_faults.py`; `run.py`
prints what rivals lose as a table.
"""

import pytest
import registry
import training
from harness import Server
from helpers.asserts import assert_survived

pytestmark = [pytest.mark.process, pytest.mark.slow]


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """A process without a backend, which can be forked, and one that trains."""
    cache = str(tmp_path_factory.mktemp("cache"))
    with Server() as files, Server(("training",), {training.CACHE: cache}) as trainings:
        yield {registry.FAULTS: files, training.FAULTS: trainings}


@pytest.mark.parametrize(
    ("faults", "fault"),
    [
        pytest.param(faults, fault, id=fault.name)
        for faults in (registry.FAULTS, training.FAULTS)
        for fault in faults
    ],
)
def test_nothing_is_lost(faults, fault, servers, tmp_path):
    run = servers[faults].run
    assert_survived(run(fault.campaign, fault.long, 1, tmp_path, timeout=36_000))
