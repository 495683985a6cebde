"""What `_keras` replaces within a block is put back, and still needed."""

import keras
import pytest
import tensorflow as tf

from gradient_accumulator_tf import _installation, _keras
from tests.oracle import KERAS, mirrored, regression_data


@pytest.mark.fast
def test_replaced_losses_are_called_and_put_back():
    inputs = keras.Input((5,))
    model = keras.Model(inputs, [keras.layers.Dense(1)(inputs), keras.layers.Dense(1)(inputs)])
    model.compile("sgd", ["mse", "mae"])
    x, y, _ = regression_data(4)
    data = tf.constant(x), (tf.constant(y), tf.constant(y)), None
    _keras.build_for_training(model, data)
    before = model._compile_loss._flat_losses
    metrics = _keras.per_output_loss_metrics(model)
    assert len(metrics) == 2

    values = iter([1.0, 2.0])

    def replace(loss):
        value = next(values)
        return lambda y_true, y_pred, sample_weight=None: tf.constant(value)

    with _keras.replaced_losses(model, replace) as number:
        total = _keras.compute_loss(model, data[0], data[1], model(data[0]), None)
    assert (number, float(total)) == (2, 3.0)
    assert model._compile_loss._flat_losses is before
    assert _keras.per_output_loss_metrics(model) == metrics
    assert all(float(m.total) == 0.0 for m in metrics)


@pytest.mark.fast
def test_replaced_added_losses_are_those_of_add_loss_that_have_a_rank():
    class Adds(keras.layers.Layer):
        def call(self, x):
            self.add_loss([tf.reduce_mean(x), tf.reduce_sum(x, 1)])
            return x

    class Absolute(keras.regularizers.Regularizer):
        def __call__(self, weights):
            return tf.abs(weights)

    layers = [Adds(), keras.layers.Dense(1, kernel_regularizer=Absolute())]
    model = keras.Sequential([keras.Input((5,)), *layers])
    model.compile("sgd")
    y_pred = model(tf.ones((4, 5)))
    seen = []

    def replace(loss, value):
        seen.append((loss.shape, float(value)))
        return 0.0 * value

    everything = float(model.compute_loss(y_pred=y_pred))
    with _keras.replaced_added_losses(model, replace):
        rest = float(model.compute_loss(y_pred=y_pred))
    assert seen == [((4,), 20.0)]
    assert everything == pytest.approx(rest + 20.0)
    assert float(model.compute_loss(y_pred=y_pred)) == everything
    _keras.clear_added_losses(model)
    assert len(model.losses) == 1  # the regulariser


@pytest.mark.fast
def test_activity_regularizers_by_rank():
    """Where no supported Keras adds them up, what is before 3.14 can go."""
    layer = keras.layers.Dense(1, activity_regularizer=lambda v: 2.0 * v, kernel_initializer="ones")
    layer(tf.ones((4, 3)))
    assert float(tf.reduce_sum(layer.losses[0])) == (6.0 if KERAS >= (3, 14) else 24.0)
    with _keras.activity_regularizers_by_rank(layer):
        with _keras.activity_regularizers_by_rank(layer):  # by another replica
            layer(tf.ones((4, 3)))
        layer(tf.ones((4, 3)))
    assert layer.losses[0].shape == (() if KERAS >= (3, 14) else (1,))
    assert float(tf.reduce_sum(layer.losses[0])) == (6.0 if KERAS >= (3, 14) else 24.0)
    assert type(layer.activity_regularizer).__name__ == "function"
    assert _installation.OLDEST_KERAS < (3, 14)


def test_keras_alone_clips_each_replica_before_it_sums():
    # When it clips the sum, `replicas_agree` can leave the sum to it.
    strategy = mirrored()
    with strategy.scope():
        alone, agreeing = (keras.optimizers.SGD(1.0, clipnorm=1.0) for _ in range(2))
        one, two = keras.Variable(0.0), keras.Variable(0.0)
        alone.build([one])
        agreeing.build([two])
    attributes = set(vars(agreeing))

    def on_replica():
        alone.apply([tf.constant(5.0)], [one])
        with _keras.replicas_agree(agreeing):
            agreeing.apply([tf.constant(10.0)], [two])

    strategy.run(on_replica)
    assert (float(one.numpy()), float(two.numpy())) == (-2.0, -1.0)
    assert {int(v) for v in strategy.experimental_local_results(agreeing.iterations.value)} == {1}
    assert set(vars(agreeing)) == attributes


@pytest.mark.fast
def test_replaced_updates_are_called_and_put_back():
    metric, seen = keras.metrics.MeanAbsoluteError(), []

    def replace(metric, update_state):
        def update(y_true, y_pred, sample_weight=None):
            seen.append(metric)
            update_state(2.0 * y_true, y_pred, sample_weight)

        return update

    with _keras.replaced_updates([metric, metric], replace):
        metric.update_state(tf.ones((1, 1)), tf.zeros((1, 1)))
    metric.update_state(tf.ones((1, 1)), tf.zeros((1, 1)))
    assert (seen, float(metric.total)) == ([metric], 3.0)
    assert "update_state" not in vars(metric)


@pytest.mark.fast
def test_compiled_without_parts_for_a_while():
    x, y, _ = regression_data(4)
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("adam", "mse", metrics=["mae"])
    optimizer = model.optimizer
    data = tf.constant(x), None, None
    with _keras.compiled_without(model, "optimizer", "_compile_loss", "_compile_metrics"):
        _keras.build_for_training(model, data)
    assert model.built and model.optimizer is optimizer and not optimizer.built
    # Without it, Keras builds all.
    _keras.build_for_training(model, (tf.constant(x), tf.constant(y), None))
    assert optimizer.built
