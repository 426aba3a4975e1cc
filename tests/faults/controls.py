"""The campaigns on writers without care: each must find them out."""

from pathlib import Path

from campaigns_crash import kill_at_each_call, kill_at_random, lose_power
from content import IN_PLACE, UNSYNCED
from harness import Outcome, Tally


def killed_in_place(trials: int, seed: int, folder: Path) -> Outcome:
    """F1 where the old file is overwritten."""
    tally = Tally()
    kill_at_random(tally, IN_PLACE, trials, seed, folder / "run")
    return tally.outcome()


def killed_at_each_call_in_place(trials: int, seed: int, folder: Path) -> Outcome:
    """F2 where the old file is overwritten."""
    tally = Tally()
    kill_at_each_call(tally, IN_PLACE, 1, trials, seed, folder / "run")
    return tally.outcome()


def power_lost_unsynced(trials: int, seed: int, folder: Path) -> Outcome:
    """F3 where the file is renamed, but nothing is synced."""
    tally = Tally()
    lose_power(tally, UNSYNCED, trials, seed, folder / "run")
    return tally.outcome()


def killed_unsynced(trials: int, seed: int, folder: Path) -> Outcome:
    """F2 where the file is renamed, but nothing is synced: a kill loses nothing."""
    tally = Tally()
    kill_at_each_call(tally, UNSYNCED, 1, trials, seed, folder / "run")
    return tally.outcome()
