"""Every fault: what it is, where its campaign is, and how many trials it takes.

Training faults add themselves here: one line each.
"""

from typing import NamedTuple


class Fault(NamedTuple):
    """One row of the scoreboard.

    Attributes:
      name: F1 to F20, with a letter where a fault has several campaigns.
      what: for people.
      campaign: `module:function`, called as `(trials, seed, folder) -> Outcome`.
      short: its `trials` in every run of the tests.
      long: its `trials` in `pytest -m slow` and `run.py --long`; some campaigns have a
        fixed number whatever is asked for.
      rival: the function of `rivals` that does the same to others, or "".
      rival_trials: how many each of them gets.
    """

    name: str
    what: str
    campaign: str
    short: int
    long: int
    rival: str = ""
    rival_trials: int = 0


FAULTS = (
    Fault("F1", "kill -9 at any time in a loop of saves",
          "campaigns_crash:f1_kill", 18, 400, "killed", 10),
    Fault("F2", "kill -9 at each system call of a save",
          "campaigns_crash:f2_kill_at_each_call", 40, 10_000, "killed_at_calls", 12),
    Fault("F3", "power loss after each file operation",
          "campaigns_crash:f3_power_loss", 60, 2_000),
    Fault("F4", "full, failing, read-only or deleted disk",
          "campaigns_disk:f4_broken_disks", 30, 400, "out_of_room", 8),
    Fault("F5", "flipped bits, cut ends, zeroed pages",
          "campaigns_damage:f5_damage", 210, 1400, "damaged", 70),
    Fault("F13", "another model or optimizer than the file's",
          "campaigns_drift:f13_drift", 0, 0),
    Fault("F14", "a state that cannot be written as it is",
          "campaigns_drift:f14_strange_states", 0, 0),
    Fault("F15", "files of older and later versions",
          "campaigns_drift:f15_golden", 0, 0),
    Fault("F16", "two at once; killed before deleting",
          "campaigns_crash:f16_two_at_once", 30, 150),
    Fault("F17", "hostile files, mutations",
          "campaigns_damage:f17_hostile", 2_000, 100_000),
    Fault("F19", "training goes on while a snapshot is written",
          "campaigns_async:f19_donated", 20, 200),
)  # fmt: skip
