"""Sums are added to in place; an update needs memory for one variable at a time."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateOptimizer
from gradient_accumulator_tf.cycle.gradients import add_gradient
from gradient_accumulator_tf.optimizers.update_order import one_by_one
from tests.oracle import (
    ACROSS_STEPS,
    dense_model,
    difference,
    in_way,
    regression_data,
    state_of,
)

VARIABLES, SIZE = 16, 2**18  # of a MiB each


def _peak(function):
    """Bytes that TensorFlow's allocator held at the most, above what it held before.

    It may take nearly twice the memory that a tensor needs.
    """
    try:
        tf.config.experimental.reset_memory_stats("CPU:0")
    except ValueError:
        pytest.skip("TensorFlow counts no memory on this CPU (it does with oneDNN)")
    before = tf.config.experimental.get_memory_info("CPU:0")["current"]
    function()
    return tf.config.experimental.get_memory_info("CPU:0")["peak"] - before


@pytest.mark.parametrize("how", ["graph", "eager"])
@pytest.mark.parametrize("make", [keras.optimizers.Adam, keras.optimizers.SGD])
def test_an_update_holds_no_second_copy_of_the_gradients(make, how):
    variables = [tf.Variable(tf.zeros(SIZE)) for _ in range(VARIABLES)]
    optimizer = GradientAccumulateOptimizer(make(), 3)
    optimizer.build(variables)

    def micro_step(value):
        # Of an argument, as constants would be kept by the graph.
        optimizer.apply([tf.fill([SIZE], value + i) for i in range(VARIABLES)])

    def flush():
        optimizer.flush()

    if how == "graph":
        micro_step, flush = tf.function(micro_step), tf.function(flush)
    for _ in range(3):
        micro_step(tf.constant(1.0))
    for _ in range(2):
        micro_step(tf.constant(1.0))
        peak = _peak(flush)
    # Adam needs a few values for each variable; all at once they would be VARIABLES copies.
    assert peak < 6 * 4 * SIZE
    assert int(optimizer.iterations.numpy()) == 3


def test_a_sum_that_rows_are_scattered_into_is_copied_at_the_update_only():
    # TensorFlow copies such a variable in each read, so nothing is gained by a mean in its place.
    variable = tf.Variable(tf.zeros((SIZE, 4)))
    optimizer = GradientAccumulateOptimizer("sgd", 3)
    optimizer.build([variable])

    @tf.function
    def micro_step(value):
        rows = tf.IndexedSlices(tf.fill([2, 4], value), tf.constant([7, 9]), tf.constant([SIZE, 4]))
        optimizer.apply([rows])

    flush = tf.function(lambda: optimizer.flush())
    for _ in range(2):
        begins = _peak(lambda: micro_step(tf.constant(1.0)))
        peak = _peak(flush)
    assert begins < 0.1 * 4 * 4 * SIZE
    assert peak < 2 * 4 * 4 * SIZE
    np.testing.assert_allclose(variable[7], -0.02)


@pytest.mark.parametrize("how", ["add_gradient", "tf.tensor_scatter_nd_add"])
def test_a_loop_scatters_rows_into_its_sum_in_place(how):
    # When TensorFlow's public function needs no more, the raw operation can go.
    def add(total, rows):
        if how == "add_gradient":
            return add_gradient(total, rows)
        return tf.tensor_scatter_nd_add(total, rows.indices[:, tf.newaxis], rows.values)

    @tf.function
    def loop(turns, value):
        rows = tf.IndexedSlices(tf.fill([3, 4], value), tf.constant([7, 7, 9]))
        start = (0, tf.fill([SIZE, 4], 0 * value))
        _, total = tf.while_loop(
            lambda turn, _: turn < turns, lambda turn, total: (turn + 1, add(total, rows)), start
        )
        return tf.gather(total, [7, 8, 9])

    total = loop(tf.constant(3), tf.constant(1.0))
    np.testing.assert_array_equal(total[:, 0], [6.0, 0.0, 3.0])
    peak = _peak(lambda: loop(tf.constant(3), tf.constant(1.0)))
    assert (peak < 2 * 4 * 4 * SIZE) == (how == "add_gradient"), peak / SIZE / 16


@pytest.mark.parametrize("how", ["alone", "one_by_one"])
def test_what_the_order_is_for(how):
    # When "alone" needs no more, Keras's optimizers need no order.
    variables = [tf.Variable(tf.zeros(SIZE)) for _ in range(VARIABLES)]
    optimizer = keras.optimizers.Adam()
    optimizer.build(variables)
    gradients = [tf.ones(SIZE) for _ in range(VARIABLES)]

    @tf.function
    def update():
        if how == "alone":
            optimizer.apply(gradients)
        else:
            with one_by_one(optimizer):
                optimizer.apply(gradients)

    update()
    peak = _peak(update)
    assert (peak > VARIABLES * 2 * SIZE) == (how == "alone"), peak / SIZE / 4


@pytest.mark.fast
def test_the_optimizer_is_left_as_it_was():
    inner = keras.optimizers.SGD()
    multi = keras.optimizers.SGD()
    before = [dict(vars(o)) for o in (inner, multi)]

    @tf.function
    def enter():
        with pytest.raises(KeyError), one_by_one(inner):
            assert isinstance(vars(inner)["update_step"], functools.partial)
            raise KeyError

    enter()
    assert [vars(o).keys() for o in (inner, multi)] == [b.keys() for b in before]


@pytest.mark.parametrize("way", ACROSS_STEPS)
def test_accumulators_are_made_once(way, graph_or_jit):
    model, optimizer, _ = in_way(way, dense_model(), keras.optimizers.SGD(0.05, momentum=0.9))
    model.compile(optimizer, "mse", **graph_or_jit)
    model.optimizer.build(model.trainable_variables)
    made = model.optimizer._accumulator.state
    x, y, _ = regression_data(48)
    for _ in range(2):
        model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    now = model.optimizer._accumulator.state
    assert list(now) == list(made)
    assert all(now[name] is made[name] for name in made)
    assert int(model.optimizer.iterations.numpy()) >= 16


def test_a_mean_is_the_same_in_place_and_over_replicas_sums():
    # In place on one replica: what is reset does not come back.
    model = dense_model()
    model.compile(GradientAccumulateOptimizer("sgd", 2), "mse")
    x, y, _ = regression_data(16)
    for _ in range(2):
        for rows in (slice(0, 4), slice(4, 8)):
            model.train_on_batch(x[rows], y[rows])
    plain = dense_model()
    plain.compile("sgd", "mse")
    for _ in range(2):
        plain.train_on_batch(x[:8], y[:8])
    assert difference(state_of(model.weights), state_of(plain.weights)) < 1e-6
    assert np.all(np.isfinite(model.get_weights()[0]))
