"""The rows of the losses agree with themselves."""

import math

import pytest

from flaxfit.losses.catalog import ALIASES, LOSSES, look_up


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_is_found_by_name_and_by_function(name):
    spec = LOSSES[name]
    assert look_up(name.upper()) == look_up(spec.fn) == (name, spec)
    assert spec.takes_logits or not (spec.smoothable or spec.chance)


def test_facts_of_cross_entropies():
    one_hot = {name for name, spec in LOSSES.items() if spec.takes_one_hot}
    assert one_hot == {
        "poly_loss_cross_entropy",
        "safe_softmax_cross_entropy",
        "softmax_cross_entropy",
    }
    chances = {name: spec.chance(3) for name, spec in LOSSES.items() if spec.chance}
    binary = chances.pop("sigmoid_binary_cross_entropy")
    assert binary == math.log(2) and set(chances.values()) == {math.log(3)}
    assert set(ALIASES.values()) <= set(LOSSES)
