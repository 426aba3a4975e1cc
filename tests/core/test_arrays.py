"""Axes, types and buffers of arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxfit._core.arrays import append_axes, copy_array, empty_array, strongly_typed


@pytest.mark.parametrize("make", [np.ones, jnp.ones])
def test_axes_are_appended(make):
    weights = append_axes(make(4), 3)
    assert weights.shape == (4, 1, 1)
    assert append_axes(weights, 2).shape == (4, 1, 1)


def test_weak_types_go_and_keys_stay():
    assert not strongly_typed(1.0).weak_type
    assert strongly_typed(jnp.asarray(2), jnp.float32).dtype == jnp.float32
    key = jax.random.key(0)
    assert strongly_typed(key, key.dtype) is key


def test_a_copy_has_its_own_buffer_and_the_devices_asked_for():
    device = jax.devices()[-1]
    array = jnp.arange(3.0)
    copied = copy_array(array)
    array.delete()
    np.testing.assert_array_equal(copied, [0, 1, 2])
    assert not copied.committed
    placed = copy_array(copied, jax.device_put(jnp.zeros(3), device))
    assert placed.devices() == {device} and placed.committed
    assert not copy_array(copied, jax.ShapeDtypeStruct((3,), jnp.float32)).committed


def test_empty_arrays_are_aligned():
    array = empty_array((3, 5), np.int16)
    assert array.shape == (3, 5) and array.dtype == np.int16
    assert array.ctypes.data % 64 == 0
