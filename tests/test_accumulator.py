"""The arithmetic of a cycle, against NumPy, for any gradients and weights."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from gradient_accumulator_tf.cycle.accumulator import GradientAccumulator
from gradient_accumulator_tf.cycle.gradients import (
    Contribution,
    accumulation_dtype,
    add_gradient,
    scale_gradient,
    weighted_mean,
)

numbers = st.floats(-100, 100, width=32)
weights = st.floats(0, 64, width=32).filter(lambda w: w == 0 or w > 1e-3)


@pytest.mark.parametrize(
    "dtype, expected",
    [("float16", "float32"), ("bfloat16", "float32"), ("float32",) * 2, ("float64",) * 2],
)
def test_accumulation_dtype(dtype, expected):
    assert accumulation_dtype(dtype) == tf.as_dtype(expected)


def test_slices_stay_slices_until_they_are_scattered():
    slices = tf.IndexedSlices(tf.constant([[1.0], [2.0], [3.0]]), tf.constant([2, 0, 2]))
    scaled = scale_gradient(slices, 2.0, tf.float64)
    assert isinstance(scaled, tf.IndexedSlices)
    assert scaled.values.dtype == tf.float64
    total = add_gradient(tf.ones((3, 1), tf.float64), scaled)
    assert total.numpy().tolist() == [[5.0], [1.0], [9.0]]


@pytest.mark.fast
def test_mean_of_nothing_is_zero():
    assert weighted_mean(tf.constant([3.0, 0.0]), tf.constant(0.0)).numpy().tolist() == [0.0, 0.0]


@pytest.mark.fast
@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(numbers, numbers, weights), min_size=1, max_size=6))
def test_weighted_mean_of_any_micro_batches(micro_batches):
    variables = [tf.Variable(0.0, dtype="float64"), tf.Variable([0.0], dtype="float64")]
    accumulator = GradientAccumulator(variables)
    for a, b, weight in micro_batches:
        accumulator.add(Contribution([tf.constant(a), tf.constant([b])], weight))
    array = np.array(micro_batches, "float64")
    total = array[:, 2].sum()
    expected = array[:, 2] @ array[:, :2] / total if total else np.zeros(2)
    mean = [float(np.squeeze(m)) for m in accumulator.finish([0, 1])[0]]
    np.testing.assert_allclose(mean, expected, rtol=1e-12, atol=1e-12)
    assert int(accumulator.micro_step) == len(micro_batches)
    accumulator.reset()
    assert int(accumulator.micro_step) == 0
    assert [float(np.squeeze(m)) for m in accumulator.finish([0, 1])[0]] == [0.0, 0.0]


@pytest.mark.fast
@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(numbers, weights, numbers, weights, numbers), min_size=1, max_size=5))
def test_each_group_has_its_own_denominator_and_sums_have_none(micro_batches):
    accumulator = GradientAccumulator([tf.Variable(0.0, dtype="float64")])
    for a, weight_a, b, weight_b, c in micro_batches:
        accumulator.add(
            Contribution([tf.constant(a)], weight_a),
            Contribution([tf.constant(b)], weight_b),
            Contribution([tf.constant(c)], None, False),
        )
    a, weight_a, b, weight_b, c = np.array(micro_batches, "float64").T
    expected = c.sum()
    for gradients, w in ((a, weight_a), (b, weight_b)):
        expected += gradients @ w / w.sum() if w.sum() else 0.0
    np.testing.assert_allclose(float(accumulator.finish([0])[0][0]), expected, rtol=1e-9, atol=1e-9)


def test_state_round_trip_restores_every_group():
    variables = [keras.Variable([0.0, 0.0]), keras.Variable(0.0)]
    accumulator, other = GradientAccumulator(variables), GradientAccumulator(variables)
    gradients = [tf.constant([1.0, 2.0]), None]
    accumulator.add(Contribution(gradients, 3.0), Contribution(gradients, None, False))
    other.load({name: v.numpy() for name, v in accumulator.state.items()})
    assert other.state.keys() == accumulator.state.keys()
    for name, value in accumulator.state.items():
        assert other.state[name].numpy().tolist() == value.numpy().tolist()
    other.load({})
    assert all(np.all(v.numpy() == 0) for v in other.state.values())
