"""A LossScaleOptimizer around an accumulating optimizer, and what Keras does if left alone."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateOptimizer


@pytest.mark.fast
def test_a_loss_scale_optimizer_left_alone_looks_at_each_micro_batch():
    # When it asks its inner optimizer first, `route_loss_scaling` can go.
    variable = keras.Variable(1.0)
    inner = GradientAccumulateOptimizer("sgd", 2)
    scaler = keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0)
    scaler.build([variable])
    left_alone = keras.optimizers.LossScaleOptimizer.apply.__wrapped__
    for gradient in (np.inf, np.inf):
        left_alone(scaler, [tf.constant(gradient)], [variable])
    assert (float(scaler.dynamic_scale), int(inner.micro_step)) == (1.0, 0)
    for gradient in (np.inf, 1.0):
        scaler.apply([tf.constant(gradient)], [variable])
    assert (float(scaler.dynamic_scale), int(inner.micro_step)) == (0.5, 0)
    assert float(variable) == 1.0


def test_a_loss_scale_optimizer_left_alone_loads_nothing_of_another_number():
    # When it loads its own variables by name, `route_loss_scaling` need not see to it.
    scalers = []
    for accum_steps in (1, 2):
        inner = GradientAccumulateOptimizer("sgd", accum_steps)
        scalers.append(keras.optimizers.LossScaleOptimizer(inner, initial_scale=2.0))
        scalers[-1].build([keras.Variable(1.0)])
    one, two = scalers
    two.dynamic_scale.assign(8.0)
    store = {str(i): v.numpy() for i, v in enumerate(two.variables)}
    with pytest.warns(UserWarning, match="Skipping variable loading"):
        keras.optimizers.LossScaleOptimizer.load_own_variables.__wrapped__(one, store)
    assert float(one.dynamic_scale) == 2.0
    one.load_own_variables(store)
    assert float(one.dynamic_scale) == 8.0


def test_other_loss_scale_optimizers_are_left_alone():
    variable = keras.Variable(1.0)
    scaler = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.5), initial_scale=4.0)
    scaler.apply([tf.constant(4.0)], [variable])
    assert float(variable) == 0.5
