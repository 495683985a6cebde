"""Variables are created without tracing what trains them twice."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateModel, GradientAccumulateOptimizer
from gradient_accumulator_tf.replicated.variables import outside_of_tracing


def _traces(scope):
    """How often a function is traced that creates a variable in `scope`; and what it returns."""
    made, traces = [], []

    @tf.function
    def count():
        traces.append(None)
        if not made:
            with scope():
                made.append(tf.Variable(41.0))
        return made[0].assign_add(1.0)

    return count, traces


def test_a_function_is_traced_once():
    count, traces = _traces(outside_of_tracing)
    assert [float(count()) for _ in range(2)] == [42.0, 43.0]
    assert len(traces) == 1


def test_tensorflow_traces_twice_by_itself():
    # When this fails, `tf.init_scope` is enough.
    count, traces = _traces(tf.init_scope)
    assert float(count()) == 42.0
    assert len(traces) == 2


def test_a_creator_around_it_is_asked():
    names = []

    def creator(next_creator, **kwargs):
        names.append(kwargs["name"])
        return next_creator(**kwargs)

    with tf.variable_creator_scope(creator), outside_of_tracing():
        tf.Variable(0.0, name="mine")
    assert names == ["mine"]


class _Counting(keras.layers.Layer):
    """Counts in Python how often it is traced in training."""

    calls = 0

    def call(self, x, training=None):
        self.calls += bool(training)
        return x


def _model(counting):
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((3,)), counting, keras.layers.Dense(2)])


@pytest.mark.fast
@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda model: (model, GradientAccumulateOptimizer("adam", 2)), id="optimizer"),
        pytest.param(
            lambda model: (GradientAccumulateModel(model=model, accum_steps=2), "adam"),
            id="across steps",
        ),
        pytest.param(
            lambda model: (GradientAccumulateModel(model=model, micro_batch_size=2), "adam"),
            id="within a step",
        ),
    ],
)
def test_a_training_step_is_traced_once(wrap):
    counting = _Counting()
    model, optimizer = wrap(_model(counting))
    # Those of a plain model are Keras's to build, which costs it another trace.
    metrics = ["mae"] if isinstance(model, GradientAccumulateModel) else None
    model.compile(optimizer, loss="mse", metrics=metrics)
    model.fit(np.ones((8, 3)), np.ones((8, 2)), batch_size=4, verbose=0)
    assert counting.calls == 1
    assert int(model.optimizer.iterations.numpy()) in (1, 2)


def test_keras_traces_its_training_step_twice():
    counting = _Counting()
    model = _model(counting)
    model.compile("adam", loss="mse")
    model.fit(np.ones((8, 3)), np.ones((8, 2)), batch_size=4, verbose=0)
    assert counting.calls == 2
