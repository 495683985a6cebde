"""`just_updated`, the tensor that a `train_step` conditions on, and what else tells of a cycle."""

import keras
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateModel, GradientAccumulateOptimizer
from tests.oracle import (
    EFFECTIVE,
    MICRO,
    dense_model,
    difference,
    mirrored,
    regression_data,
    updates_of,
)

STEPS = EFFECTIVE // MICRO


def _averaging(base):
    """A class of models whose `train_step` keeps a moving average of the weights, per update."""

    class Averaging(base):
        def keep_averages(self):
            self.averages = [
                tf.Variable(
                    tf.convert_to_tensor(v),
                    trainable=False,
                    aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
                )
                for v in self.trainable_variables
            ]

        def train_step(self, data):
            logs = super().train_step(data)
            for average, variable in zip(self.averages, self.trainable_variables, strict=True):
                moved = 0.5 * average + 0.5 * tf.convert_to_tensor(variable)
                average.assign(tf.where(self.updated(), moved, average))
            return logs

        def updated(self):
            return tf.constant(True)

    return Averaging


def _plain_model(optimizer, **kwargs):
    """A functional model of that class, compiled."""
    net = dense_model()
    model = _averaging(keras.Model)(net.inputs[0], net.outputs)
    model.keep_averages()
    model.compile(optimizer, "mse", **kwargs)
    return model


def _averages(model, batch_size, epochs=2):
    x, y, _ = regression_data(4 * EFFECTIVE)
    model.fit(x, y, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0)
    return [v.numpy() for v in model.averages]


def _sgd():
    return keras.optimizers.SGD(0.05, momentum=0.9)


@pytest.fixture
def expected():
    return _averages(_plain_model(_sgd()), EFFECTIVE)


def test_averages_of_the_weights_move_once_per_update(execution, expected):
    model = _plain_model(GradientAccumulateOptimizer(_sgd(), STEPS), **execution)
    model.updated = lambda: model.optimizer.just_updated
    assert difference(_averages(model, MICRO), expected) < 1e-6


def test_averages_that_do_not_ask_move_in_each_micro_step(expected):
    model = _plain_model(GradientAccumulateOptimizer(_sgd(), STEPS))
    assert difference(_averages(model, MICRO), expected) > 1e-3


def test_without_accumulation_every_step_is_an_update(expected):
    model = _plain_model(GradientAccumulateOptimizer(_sgd(), 1))
    model.updated = lambda: model.optimizer.just_updated
    assert difference(_averages(model, EFFECTIVE), expected) < 1e-6


def test_through_a_loss_scale(expected):
    optimizer = GradientAccumulateOptimizer(_sgd(), STEPS)
    model = _plain_model(keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0))
    model.updated = lambda: model.optimizer.just_updated
    assert difference(_averages(model, MICRO), expected) < 1e-6


@pytest.mark.parametrize("replicas", [1, 2])
def test_on_replicas(replicas, expected):
    with mirrored(replicas).scope():
        model = _plain_model(GradientAccumulateOptimizer(_sgd(), STEPS))
    model.updated = lambda: model.optimizer.just_updated
    assert difference(_averages(model, MICRO), expected) < 1e-6


@pytest.mark.parametrize("jit_compile", [False, True])
def test_in_a_train_step_around_the_models_own(jit_compile, expected):
    net = dense_model()
    model = _averaging(GradientAccumulateModel)(net.inputs[0], net.outputs, accum_steps=STEPS)
    model.updated = lambda: model.just_updated
    model.keep_averages()
    model.compile(_sgd(), "mse", jit_compile=jit_compile)
    assert difference(_averages(model, MICRO), expected) < 1e-6


def test_with_a_micro_batch_size_every_batch_is_an_update():
    model = GradientAccumulateModel(model=dense_model(), micro_batch_size=MICRO)
    model.compile(_sgd(), "mse")
    assert model.just_updated.dtype == tf.bool and bool(model.just_updated)


@pytest.mark.fast
@pytest.mark.parametrize("accum_steps, answers", [(2, [0, 1, 0]), (1, [1, 1, 1])])
def test_the_answers_by_hand(accum_steps, answers):
    variable = keras.Variable(0.0)
    optimizer = GradientAccumulateOptimizer("sgd", accum_steps)
    assert not optimizer.just_updated
    seen = []
    for _ in answers:
        optimizer.apply([tf.constant(1.0)], [variable])
        assert optimizer.just_updated.shape == ()
        assert optimizer.ended_in_update == bool(optimizer.just_updated)
        seen.append(int(optimizer.just_updated))
    assert seen == answers
    optimizer.flush()
    assert optimizer.just_updated


def test_what_was_reset_ended_in_no_update():
    optimizer, variable = GradientAccumulateOptimizer("sgd", 2), keras.Variable(0.0)
    for _ in range(3):
        optimizer.apply([tf.constant(1.0)], [variable])
    optimizer.reset()
    assert not optimizer.just_updated and not optimizer.ended_in_update


@pytest.mark.fast
def test_an_update_that_is_dropped_ends_its_cycle():
    variable = keras.Variable(0.0)
    optimizer = GradientAccumulateOptimizer("sgd", 2, non_finite="drop_cycle")
    for gradient in (1.0, float("nan")):
        assert not optimizer.just_updated
        optimizer.apply([tf.constant(gradient)], [variable])
    assert optimizer.just_updated and int(optimizer.iterations) == 0


def test_the_bool_is_refused_in_a_graph():
    optimizer = GradientAccumulateOptimizer("sgd", 2)
    with pytest.raises(RuntimeError, match="Read `just_updated`, the same as a tensor"):
        tf.function(lambda: optimizer.ended_in_update)()


def test_a_loss_scale_passes_on_what_tells_of_a_cycle():
    variable = keras.Variable(0.0)
    inner = GradientAccumulateOptimizer("sgd", 2, non_finite="drop_cycle")
    optimizer = keras.optimizers.LossScaleOptimizer(inner)
    optimizer.apply([tf.constant(1.0)], [variable])
    assert (int(optimizer.micro_step), int(optimizer.steps_in_cycle)) == (1, 2)
    assert not optimizer.just_updated and not optimizer.ended_in_update
    assert int(optimizer.dropped_micro_steps) == int(optimizer.dropped_cycles) == 0
    assert (optimizer.reduction, optimizer.non_finite) == ("mean", "drop_cycle")
    optimizer.flush()
    assert int(optimizer.micro_step) == 0 and optimizer.ended_in_update
    optimizer.apply([tf.constant(1.0)], [variable])
    optimizer.reset()
    assert int(optimizer.micro_step) == 0 and updates_of(optimizer) == 1


def test_a_loss_scale_around_another_optimizer_has_no_cycle():
    other = keras.optimizers.LossScaleOptimizer(_sgd())
    for name in ("micro_step", "just_updated", "flush", "dropped_cycles"):
        assert not hasattr(other, name)
    with pytest.raises(AttributeError, match=r"LossScaleOptimizer around SGD\. Wrap SGD"):
        other.flush()
