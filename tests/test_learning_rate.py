"""`scale_learning_rate`: the rules, and a schedule that follows another one."""

import keras
import numpy as np
import pytest

from gradient_accumulator_tf import GradientAccumulateOptimizer, scale_learning_rate
from tests.oracle import dense_model, difference, regression_data

ADAM = keras.optimizers.Adam


@pytest.mark.fast
@pytest.mark.parametrize(
    "rule, batch_size, accum_steps, expected",
    [
        ("linear", 256, 1, 0.1),
        ("linear", 128, 8, 0.4),
        ("linear", 64, 1, 0.025),
        ("sqrt", 256, 4, 0.2),
        ("sqrt", 64, 1, 0.05),
    ],
)
def test_numbers_checked_by_hand(rule, batch_size, accum_steps, expected):
    rate = scale_learning_rate(
        0.1, batch_size=batch_size, accum_steps=accum_steps, base_batch_size=256, rule=rule
    )
    assert type(rate) is float
    assert rate == pytest.approx(expected, rel=1e-12)


def test_the_rate_of_an_optimizer_is_read():
    optimizer = keras.optimizers.SGD(0.5)
    assert scale_learning_rate(optimizer.learning_rate, batch_size=8, base_batch_size=4) == 1.0
    assert float(optimizer.learning_rate) == 0.5


def test_a_schedule_stays_one_and_is_multiplied():
    decay = keras.optimizers.schedules.ExponentialDecay(0.1, decay_steps=10, decay_rate=0.5)
    scaled = scale_learning_rate(decay, batch_size=32, accum_steps=4, base_batch_size=32)
    for step in (0, 10, 25):
        assert float(scaled(step)) == pytest.approx(4 * float(decay(step)), rel=1e-6)


@pytest.mark.fast
@pytest.mark.parametrize("rule, expected", [("linear", [1, 1, 4, 4]), ("sqrt", [1, 1, 2, 2])])
def test_the_rate_follows_the_steps(rule, expected):
    scaled = scale_learning_rate(
        1.0, batch_size=8, accum_steps={0: 1, 2: 4}, base_batch_size=8, rule=rule
    )
    assert [float(scaled(step)) for step in range(4)] == expected


def test_in_training_it_is_what_the_large_batch_would_be_given(execution):
    x, y, _ = regression_data(48)
    steps = {0: 1, 2: 5}
    scaled = scale_learning_rate(
        0.02, batch_size=4, accum_steps=steps, base_batch_size=4, rule="sqrt"
    )
    model = dense_model()
    model.compile(GradientAccumulateOptimizer(ADAM(scaled), steps), "mse", **execution)
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    large, start = dense_model(), 0
    large.compile(ADAM(0.02), "mse")
    for size in (4, 4, 20, 20):
        large.optimizer.learning_rate = 0.02 * (size / 4) ** 0.5
        large.train_on_batch(x[start : start + size], y[start : start + size])
        start += size
    assert difference(model.get_weights(), large.get_weights()) < 1e-6


@pytest.mark.parametrize("accum_steps", [4, {0: 1, 7: 2}], ids=str)
def test_it_is_saved_with_the_optimizer(accum_steps):
    decay = keras.optimizers.schedules.CosineDecay(0.1, decay_steps=10)
    scaled = scale_learning_rate(
        decay, batch_size=2, accum_steps=accum_steps, base_batch_size=3, rule="sqrt"
    )
    optimizer = keras.optimizers.SGD(scaled)
    clone = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(scaled))
    assert again.get_config() == scaled.get_config()
    assert clone.get_config() == optimizer.get_config()
    assert float(again(8)) == float(scaled(8)) != float(scaled(0))


@pytest.mark.fast
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"rule": "cubic"}, ValueError, 'must be "linear" or "sqrt". Received: rule=.cubic'),
        ({"learning_rate": "0.1"}, TypeError, "Received: '0.1'. Pass for example 0.1"),
        ({"learning_rate": None}, TypeError, "Received: None"),
        ({"learning_rate": ADAM()}, TypeError, "a scalar variable, or a LearningRateSchedule"),
        ({"learning_rate": -0.1}, ValueError, "Received: -0.1"),
        ({"learning_rate": np.nan}, ValueError, "Received: nan"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"base_batch_size": 2.5}, TypeError, "base_batch_size=2.5"),
        ({"accum_steps": {1: 2}}, ValueError, "begin with update 0"),
    ],
    ids=str,
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        scale_learning_rate(
            **{"learning_rate": 0.1, "batch_size": 8, "base_batch_size": 4, **change}
        )
