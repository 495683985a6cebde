"""What a micro-batch's `weight` may be, and what an update with none of it is."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateOptimizer
from tests.oracle import difference, regression_data


def _optimizer(accum_steps, momentum=0.0, **kwargs):
    optimizer = keras.optimizers.SGD(1.0, momentum=momentum)
    return GradientAccumulateOptimizer(optimizer, accum_steps, **kwargs)


def _apply(optimizer, variable, gradient, weight=None):
    optimizer.apply([tf.constant(gradient, variable.dtype)], [variable], weight=weight)


@pytest.mark.fast
@pytest.mark.parametrize("accum_steps", [1, 2])
@pytest.mark.parametrize("zero", [0, tf.constant(0.0), np.int64(0), False])
def test_a_cycle_of_weight_zero_is_an_update_with_gradients_of_zero(accum_steps, zero):
    variable = keras.Variable(0.0)
    optimizer = _optimizer(accum_steps, momentum=0.5)
    for weight in (2, zero):
        for _ in range(accum_steps):
            _apply(optimizer, variable, 2.0, weight)
    assert float(variable) == -2 - 1  # momentum goes on
    assert int(optimizer.iterations) == 2


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_so_it_is_for_the_large_batch(accum_steps, graph_or_jit):
    # `sample_weight` of zeros: Keras's mean over nothing is a loss of 0.
    x, y, _ = regression_data(8)

    class Weighted(keras.Model):
        def train_step(self, data):
            x, y, sample_weight = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x), sample_weight)
            gradients = tape.gradient(loss, self.trainable_variables)
            weight = tf.reduce_sum(sample_weight)
            self.optimizer.apply(gradients, self.trainable_variables, weight=weight)
            return {"loss": loss}

    def train(cls, optimizer, batch_size):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((5,))
        model = cls(inputs, keras.layers.Dense(1)(inputs))
        loss = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
        model.compile(optimizer, loss, **graph_or_jit)
        for sample_weight in (np.ones(8), np.zeros(8)):
            fit = {"batch_size": batch_size, "shuffle": False, "verbose": 0}
            model.fit(x, y, sample_weight=sample_weight, **fit)
        return model

    plain = train(keras.Model, keras.optimizers.SGD(0.1, momentum=0.9), 8)
    inner = keras.optimizers.SGD(0.1, momentum=0.9)
    model = train(Weighted, GradientAccumulateOptimizer(inner, accum_steps), 8 // accum_steps)
    assert difference(model.get_weights(), plain.get_weights()) < 1e-6
    assert int(model.optimizer.iterations) == 2


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("accum_steps", [1, 3])
def test_what_weighs_nothing_adds_nothing_whatever_it_is(accum_steps, jit_compile):
    # The mean over no tokens is 0 / 0.
    variable = keras.Variable(0.0)
    optimizer = _optimizer(accum_steps)
    optimizer.build([variable])
    step = tf.function(
        lambda g, w: optimizer.apply([g], [variable], weight=w), jit_compile=jit_compile
    )
    for gradient, weight in ((2.0, 3.0), (np.nan, 0.0), (6.0, 1.0)):
        step(tf.constant(gradient, tf.float32), tf.constant(weight, tf.float32))
    assert float(variable) == {1: -8.0, 3: -3.0}[accum_steps]


def test_with_one_micro_batch_a_weight_changes_no_bit():
    gradients = np.random.default_rng(0).normal(size=100).astype("float32")
    results = []
    for weight in (None, 7, tf.constant(0.3)):
        variable = keras.Variable(np.zeros(100, "float32"))
        _apply(_optimizer(1), variable, gradients, weight)
        results.append(variable.numpy())
    assert difference([results[0]] * 2, results[1:]) == 0.0


@pytest.mark.parametrize("weight", [1e-20, 1e20, 3])
def test_the_largest_and_the_smallest_weight(weight):
    variable = keras.Variable(0.0)
    optimizer = _optimizer(2)
    for gradient in (3.0, 6.0):
        _apply(optimizer, variable, gradient, weight)
    assert float(variable) == pytest.approx(-4.5)


BAD = [
    ("a", TypeError, r"must be a real scalar, 0 or from 1e-20 to 1e\+20. Received: weight='a'"),
    (1j, TypeError, r"Received: weight=1j \(of dtype complex128\)"),
    (tf.constant("a"), TypeError, "of dtype string"),
    (None, None, None),
    ([1.0, 2.0], ValueError, r"of shape \(2,\)\). Pass their sum, tf.reduce_sum"),
    (tf.ones(1), ValueError, r"of shape \(1,\)"),
    (float("nan"), ValueError, "0 or from .* Received: weight=nan"),
    (float("inf"), ValueError, "Received: weight=inf"),
    (tf.constant(np.nan), ValueError, "Received: weight=nan"),
    (tf.constant(-2), ValueError, "must not be negative. Received: weight=-2.0. .*or 0 for one"),
    (1e38, ValueError, r"Received: weight=1e\+38\. Pass what its loss was divided by"),
    (1e-40, ValueError, "Received: weight=1e-40"),
    (2**70, ValueError, r"Received: weight=1.18059\d*e\+21"),
    (object(), TypeError, "of type object"),
]


@pytest.mark.parametrize("accum_steps", [1, 2])
@pytest.mark.parametrize("weight, error, message", BAD, ids=[repr(b[0])[:20] for b in BAD])
def test_bad_weights(weight, error, message, accum_steps):
    variable = keras.Variable(0.0)
    if error is None:
        _apply(_optimizer(accum_steps), variable, 1.0, weight)
        return
    with pytest.raises(error, match=message):
        _apply(_optimizer(accum_steps), variable, 1.0, weight)
    assert float(variable) == 0.0


@pytest.mark.fast
@pytest.mark.parametrize("accum_steps", [1, 2])
@pytest.mark.parametrize("weight", [-1.0, np.nan, 1e30])
def test_bad_weights_that_only_the_graph_knows(weight, accum_steps):
    variable = keras.Variable(0.0)
    optimizer = _optimizer(accum_steps)
    optimizer.build([variable])

    def step(weight):
        optimizer.apply([tf.constant(1.0)], [variable], weight=weight)

    with pytest.raises(tf.errors.InvalidArgumentError, match=r"0 or from 1e-20 to .* Received"):
        tf.function(step)(tf.constant(weight, tf.float32))
    # XLA cannot raise.
    compiled = tf.function(step, jit_compile=True)
    for _ in range(accum_steps):
        compiled(tf.constant(weight, tf.float32))
    assert np.isnan(float(variable))


@pytest.mark.parametrize("accum_steps", [1, 2, 49])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_integer_variables_take_the_mean(accum_steps, jit_compile):
    variable = keras.Variable(0, dtype="int32", trainable=True)
    optimizer = _optimizer(accum_steps)
    optimizer.build([variable])
    step = tf.function(
        lambda g, w: optimizer.apply([g], [variable], weight=w), jit_compile=jit_compile
    )
    for i in range(accum_steps):
        step(tf.constant(3 if i % 2 else 1), tf.constant(0.5))
    # 1 and 3; and of 49 the mean is 1.98, which is 2.
    assert int(variable) == {1: -1, 2: -2, 49: -2}[accum_steps]


@pytest.mark.fast
def test_integer_variables_take_the_sum():
    for accum_steps in (1, 2):
        variable = keras.Variable(0, dtype="int32", trainable=True)
        optimizer = _optimizer(accum_steps, reduction="sum")
        for _ in range(accum_steps):
            _apply(optimizer, variable, 6, weight=0.5)
        assert int(variable) == -3 * accum_steps
