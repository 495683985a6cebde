"""Variables that are frozen and thawed between fits, with a new `compile` and without one."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateModel, GradientAccumulateOptimizer
from tests.oracle import (
    EFFECTIVE,
    EXECUTIONS,
    MICRO,
    WAYS,
    dense_model,
    difference,
    in_way,
    mirrored,
    regression_data,
    state_of,
    updates_of,
)


def _adam():
    optimizer = keras.optimizers.AdamW(0.05, weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


def _fit(model, batch_size, seed):
    x, y, _ = regression_data(2 * EFFECTIVE, seed=seed)
    model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0)


def _freeze(model, frozen):
    model.layers[0].trainable = not frozen


def _make(way, optimizer, frozen, **compile_with):
    """A model that accumulates in a way, compiled, and its batch size."""
    model = dense_model()
    _freeze(model, frozen)
    model, optimizer, batch_size = in_way(way, model, optimizer)
    model.compile(optimizer, "mse", **compile_with)
    return model, batch_size


def _large(first_frozen):
    """A plain model, trained before and after the change by one optimizer made for all variables.

    Its slots of a frozen variable stay as they were made.
    """
    optimizer = _adam()
    model, batch_size = _make("plain", optimizer, first_frozen)
    optimizer.build(model.layers[0].variables + model.layers[1].variables)
    _fit(model, batch_size, seed=1)
    _freeze(model, not first_frozen)
    model.compile(optimizer, "mse")
    _fit(model, batch_size, seed=2)
    return model


@pytest.mark.parametrize(
    "way, execution",
    [*((way, "graph") for way in WAYS), ("accum_steps", "eager")],
    indirect=["execution"],
)
def test_frozen_and_compiled_again_the_optimizer_goes_on(way, execution):
    large = _large(first_frozen=False)
    model, batch_size = _make(way, _adam(), False, **execution)
    _fit(model, batch_size, seed=1)
    before = model.get_weights()[:2]
    _freeze(model, True)
    model.compile(model.optimizer, "mse", **execution)
    _fit(model, batch_size, seed=2)
    assert updates_of(model.optimizer) == 4
    assert difference(model.get_weights(), large.get_weights()) < 1e-6
    assert difference(model.get_weights()[:2], before) == 0.0


@pytest.mark.parametrize(
    "way, execution",
    [
        *(("accum_steps", execution) for execution in EXECUTIONS),
        ("optimizer", "graph"),
    ],
    indirect=["execution"],
)
def test_thawed_and_compiled_again_the_optimizer_goes_on(way, execution):
    large = _large(first_frozen=True)
    model, batch_size = _make(way, _adam(), True, **execution)
    _fit(model, batch_size, seed=1)
    _freeze(model, False)
    if way == "optimizer":
        model.optimizer.rebuild(model.trainable_variables)
    model.compile(model.optimizer, "mse", **execution)
    _fit(model, batch_size, seed=2)
    assert updates_of(model.optimizer) == 4
    assert difference(model.get_weights(), large.get_weights()) < 1e-6
    states = [state_of(o.variables) for o in (model.optimizer.inner_optimizer, large.optimizer)]
    assert difference(*states) < 1e-6
    fresh, batch_size = _make(way, _adam(), True, **execution)
    _fit(fresh, batch_size, seed=1)
    _freeze(fresh, False)
    optimizer = _adam()
    if way == "optimizer":
        optimizer = GradientAccumulateOptimizer(optimizer, 3)
    fresh.compile(optimizer, "mse", **execution)
    _fit(fresh, batch_size, seed=2)
    assert difference(fresh.get_weights(), large.get_weights()) > 1e-3


def test_thawed_under_a_loss_scale_and_on_replicas():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        with mirrored().scope():
            model, batch_size = _make("accum_steps", keras.optimizers.SGD(0.05), True)
            model.optimizer.initial_scale = 256.0
            _fit(model, batch_size, seed=1)
            _freeze(model, False)
            model.compile(model.optimizer, "mse")
        _fit(model, batch_size, seed=2)
    finally:
        keras.config.set_dtype_policy("float32")
    assert updates_of(model.optimizer) == 4
    large, _ = _make("plain", keras.optimizers.SGD(0.05), True)
    _fit(large, EFFECTIVE, seed=1)
    _freeze(large, False)
    large.compile(keras.optimizers.SGD(0.05), "mse")
    _fit(large, EFFECTIVE, seed=2)
    assert difference(model.get_weights(), large.get_weights()) < 2e-3


def test_an_open_cycle_is_kept_for_the_variables_that_stay():
    a, b, c = (keras.Variable(0.0, name=name) for name in "abc")
    optimizer = GradientAccumulateOptimizer(
        keras.optimizers.SGD(1.0), 2, non_finite="drop_micro_batch"
    )
    optimizer.accum_steps = 3
    optimizer.build([a, b])
    optimizer.apply([tf.constant(np.nan), tf.constant(1.0)], [a, b])
    optimizer.apply([tf.constant(3.0), tf.constant(6.0)], [a, b], weight=1.0)
    optimizer.rebuild([c, b])
    optimizer.apply([tf.constant(8.0), tf.constant(2.0)], [c, b], weight=3.0)
    # One of three was dropped; c had nothing in the second.
    assert [float(v) for v in (a, b, c)] == [0.0, -(6 + 3 * 2) / 4, -(3 * 8) / 4]
    assert int(optimizer.iterations) == 1
    assert int(optimizer.dropped_micro_steps) == 1
    assert optimizer.accum_steps == 3


def test_what_is_frozen_in_mid_cycle_does_not_move():
    a, b = keras.Variable(0.0), keras.Variable(0.0)
    for graph in (False, True):
        optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0, weight_decay=0.1), 2)
        optimizer.build([a, b])
        a.assign(1.0)
        optimizer.apply([tf.constant(1.0), tf.constant(1.0)], [a, b])
        a.trainable = False
        step = lambda g, optimizer=optimizer: optimizer.apply([g], [b])  # noqa: E731
        (tf.function(step) if graph else step)(tf.constant(3.0))
        a.trainable = True
        assert (float(a), int(optimizer.iterations)) == (1.0, 1)
    assert float(b) == pytest.approx(-2 - 2 + 0.2)


@pytest.mark.parametrize("graph", [False, True])
def test_what_is_given_a_gradient_is_trained_as_by_keras(graph):
    a, b = keras.Variable(0.0, trainable=False), tf.Variable(0.0, trainable=False)
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), 2)
    step = lambda g: optimizer.apply([g, 2 * g], [a, b])  # noqa: E731
    optimizer.build([a, b])
    step = tf.function(step) if graph else step
    for gradient in (1.0, 3.0, 5.0):
        step(tf.constant(gradient))
    assert (float(a), float(b)) == (-2.0, -4.0)
    optimizer.flush()
    assert (float(a), float(b)) == (-7.0, -14.0)


@pytest.mark.parametrize("frozen, how", [(False, "fit"), (True, "train_on_batch")])
def test_without_a_new_compile_it_is_an_error(mode, frozen, how):
    model, batch_size = _make(mode, keras.optimizers.SGD(), frozen)
    _fit(model, batch_size, seed=1)
    _fit(model, batch_size, seed=1)
    _freeze(model, not frozen)
    x, y, _ = regression_data(batch_size)
    with pytest.raises(ValueError) as error:
        model.fit(x, y, verbose=0) if how == "fit" else model.train_on_batch(x, y)
    for part in ("kernel with trainable=", f"{frozen}, which was {not frozen}", "model.compile("):
        assert part in str(error.value)
    _freeze(model, frozen)
    _fit(model, batch_size, seed=1)


def test_before_the_first_fit_there_is_nothing_to_keep():
    model, batch_size = _make("accum_steps", keras.optimizers.SGD(), False)
    _freeze(model, True)
    before = model.get_weights()
    _fit(model, batch_size, seed=1)
    assert difference(model.get_weights()[:2], before[:2]) == 0.0


def test_another_optimizer_cannot_take_the_place_of_one_in_mid_cycle():
    model, batch_size = _make("accum_steps", keras.optimizers.SGD(0.1), False)
    x, y, _ = regression_data(batch_size)
    model.train_on_batch(x, y)
    with pytest.raises(ValueError, match=r"holds 1 of 3 micro-batches. Call model.flush\(\)"):
        model.compile("sgd", "mse")
    model.compile(model.optimizer, "mse")  # the same one holds them still
    assert int(model.optimizer.micro_step) == 1
    model.flush()
    model.compile("sgd", "mse")
    model.train_on_batch(x, y)
    model.optimizer.reset()
    model.compile("sgd", "mse")


def test_an_inner_optimizer_that_cannot_be_copied():
    class Own(keras.optimizers.SGD):
        def __init__(self, rate):
            super().__init__(learning_rate=rate)

    model = dense_model()
    optimizer = GradientAccumulateOptimizer(Own(0.1), 2)
    optimizer.rebuild(model.trainable_variables)  # not built: build will do it
    optimizer.build(model.trainable_variables[:2])
    optimizer.rebuild(model.trainable_variables[:1])  # nothing new
    assert len(optimizer._trainable_variables) == 2
    with pytest.raises(ValueError, match=r"Received: Own, which failed .*Compile with a new"):
        optimizer.rebuild(model.trainable_variables)
    optimizer.apply([tf.ones(v.shape) for v in model.trainable_variables[:2]])


def test_saved_after_thawing_it_loads_into_a_model_built_at_once(tmp_path):
    model, batch_size = _make("accum_steps", keras.optimizers.Adam(0.05), True)
    _fit(model, batch_size, seed=1)
    _freeze(model, False)
    model.compile(model.optimizer, "mse")
    x, y, _ = regression_data(2 * EFFECTIVE, seed=2)
    model.train_on_batch(x[:MICRO], y[:MICRO])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(loaded, GradientAccumulateModel)
    for trained in (model, loaded):
        trained.train_on_batch(x[MICRO : 2 * MICRO], y[MICRO : 2 * MICRO])
        trained.train_on_batch(x[2 * MICRO : 3 * MICRO], y[2 * MICRO : 3 * MICRO])
    assert updates_of(loaded.optimizer) == 3
    assert difference(loaded.get_weights(), model.get_weights()) == 0.0
