"""Losses and layers that exchange values between replicas, each of which then waits for another."""

import functools

import keras
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateModel
from tests.oracle import difference, mirrored, regression_data

STEPS, BATCH = 3, 8  # micro-batches in a cycle, and their examples on both replicas


def mean_over_replicas(value):
    context = tf.distribute.get_replica_context()
    if context is None:  # where Keras builds a model for training
        return value
    return context.all_reduce(tf.distribute.ReduceOp.MEAN, value)


def centred(y_true, y_pred):
    """A loss by the distance from the predictions' mean over the replicas' examples."""
    mean = mean_over_replicas(tf.reduce_mean(y_pred))
    return tf.reduce_mean(tf.square(y_true - y_pred + mean), -1)


def centred_in_parts(y_true, y_pred):
    """The same of the large batch, whose parts are the micro-batches."""
    parts = tf.reshape(y_pred, (-1, BATCH))
    mean = tf.repeat(tf.reduce_mean(parts, -1), BATCH)[:, tf.newaxis]
    return tf.reduce_mean(tf.square(y_true - y_pred + mean), -1)


def two_outputs():
    keras.utils.set_random_seed(1)
    inputs = keras.Input((5,))
    hidden = keras.layers.Dense(4, "tanh")(inputs)
    return keras.Model(inputs, [keras.layers.Dense(1, name=name)(hidden) for name in ("a", "b")])


def trained(make_model, loss, y, strategy=None, **mode):
    """The history, and the model, trained on large batches or accumulated in `mode`."""
    x = regression_data(2 * STEPS * BATCH)[0]
    with (strategy or tf.distribute.get_strategy()).scope():
        model = make_model()
        eager = mode.pop("run_eagerly", False)
        if mode:
            model = GradientAccumulateModel(model=model, **mode)
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss, run_eagerly=eager)
    size = BATCH if "accum_steps" in mode else STEPS * BATCH
    return model.fit(x, y, batch_size=size, epochs=2, shuffle=False, verbose=0).history, model


@pytest.mark.parametrize("run_eagerly", [pytest.param(False, marks=pytest.mark.fast), True])
def test_a_loss_may_exchange_values_between_replicas(run_eagerly):
    y = [regression_data(2 * STEPS * BATCH, seed=seed)[1] for seed in (2, 3)]
    expected, large = trained(two_outputs, [centred_in_parts, "mae"], y)
    history, model = trained(
        two_outputs, [centred, "mae"], y, mirrored(), accum_steps=STEPS, run_eagerly=run_eagerly
    )
    assert difference(model.get_weights(), large.get_weights()) < 1e-6
    assert difference(history.values(), expected.values()) < 1e-6
    _, other = trained(two_outputs, ["mse", "mae"], y)
    assert difference(other.get_weights(), large.get_weights()) > 1e-3


class Waits(keras.layers.Layer):
    """Returns its inputs, after it has waited for the other replicas."""

    def call(self, x):
        return x + 0.0 * mean_over_replicas(x)


class AddsLoss(keras.layers.Layer):
    def call(self, x):
        self.add_loss(tf.reduce_mean(tf.square(x)))
        return x


def adding_a_loss(layer):
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(4), AddsLoss(), layer, keras.layers.Dense(1)]
    return keras.Sequential([keras.Input((5,)), *layers])


def test_each_replica_has_the_losses_that_were_added_on_it():
    y = regression_data(2 * STEPS * BATCH)[1]
    expected, large = trained(lambda: adding_a_loss(keras.layers.Identity()), "mse", y)
    history, model = trained(
        lambda: adding_a_loss(Waits()), "mse", y, mirrored(), accum_steps=STEPS
    )
    # When Keras alone has the same weights, `added_losses_of_each_replica` can go.
    _, alone = trained(lambda: adding_a_loss(Waits()), "mse", y, mirrored())
    assert difference(alone.get_weights(), large.get_weights()) > 1e-3
    assert difference(model.get_weights(), large.get_weights()) < 1e-6
    assert difference(history.values(), expected.values()) < 1e-6


def waiting(y_true, y_pred):
    return tf.reduce_mean(tf.square(y_true - y_pred) + 0.0 * mean_over_replicas(y_pred), -1)


def test_each_replica_has_its_added_losses_with_the_loss_of_the_effective_batch():
    y = regression_data(2 * STEPS * BATCH)[1]
    make_model = functools.partial(adding_a_loss, keras.layers.Identity())
    expected, large = trained(make_model, "mse", y)
    history, model = trained(
        make_model, waiting, y, mirrored(), micro_batch_size=BATCH // 2, coupled_loss=True
    )
    assert difference(model.get_weights(), large.get_weights()) < 1e-6
    assert difference(history.values(), expected.values()) < 1e-6
