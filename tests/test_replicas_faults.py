"""On replicas: what is not finite, what synchronises in a step, and what cannot work."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateModel, GradientAccumulateOptimizer, _keras
from tests.oracle import (
    ACROSS_STEPS,
    dense_model,
    difference,
    in_way,
    mirrored,
    regression_data,
    state_of,
    updates_of,
)

LARGE, MICRO = 16, 4


@pytest.fixture
def mixed_float16():
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy("float32")


def _train_on_replicas(way, strategy, x, y, make_optimizer, model=dense_model):
    """A model trained on effective batches of `LARGE`, and its batch size in `fit`."""
    with strategy.scope():
        net, optimizer, batch = in_way(
            way, model(), make_optimizer(), steps=LARGE // MICRO, micro=MICRO, replicas=2
        )
        net.compile(optimizer, "mse")
        net.optimizer.initial_scale = 256.0  # of a LossScaleOptimizer, if there is one
    net.fit(x, y, batch_size=batch, shuffle=False, verbose=0)
    return net


@pytest.mark.usefixtures("mixed_float16")
@pytest.mark.parametrize("overflowing", [[2], [3, 4, 14]])
def test_an_overflow_on_any_replica_drops_the_update_and_halves_the_scale_once(way, overflowing):
    # Of each four examples of a micro-batch, the last two are replica 1's.
    x, y, _ = regression_data(3 * LARGE)
    y[overflowing] = 1e9
    large = dense_model()
    large.compile(keras.optimizers.SGD(0.05), "mse")
    large.optimizer.initial_scale = 256.0
    large.fit(x, y, batch_size=LARGE, shuffle=False, verbose=0)

    model = _train_on_replicas(way, mirrored(), x, y, lambda: keras.optimizers.SGD(0.05))
    assert updates_of(model.optimizer) == updates_of(large.optimizer)
    assert float(model.optimizer.dynamic_scale.numpy()) == float(large.optimizer.dynamic_scale)
    assert int(model.optimizer.step_counter.numpy()) == int(large.optimizer.step_counter)
    assert difference(model.get_weights(), large.get_weights()) < 1e-3
    assert difference(model.get_weights(), dense_model().get_weights()) > 1e-2


def test_a_nan_on_one_replica_reaches_all_or_none(way):
    x, y, _ = regression_data(LARGE)
    y[7] = np.nan
    model = _train_on_replicas(way, mirrored(), x, y, lambda: keras.optimizers.SGD(0.1))
    for variable in model.trainable_variables:
        for value in variable.value.values:
            assert np.all(np.isnan(value.numpy()))


@pytest.mark.fast
def test_nothing_is_applied_before_the_cycle_has_ended_on_all_replicas():
    x, y, _ = regression_data(LARGE - MICRO)
    y[7] = np.nan
    strategy = mirrored()
    with strategy.scope():
        model = dense_model()
        model.compile(GradientAccumulateOptimizer("sgd", LARGE // MICRO), "mse")
        model.optimizer.build(model.trainable_variables)
    for start in range(0, len(x), MICRO):
        model.train_on_batch(x[start : start + MICRO], y[start : start + MICRO])
    model.optimizer.reset()
    model.optimizer.flush()
    assert difference(model.get_weights(), dense_model().get_weights()) == 0.0


def _normalised_model(synchronized):
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(8),
            keras.layers.BatchNormalization(momentum=0.5, synchronized=synchronized),
            keras.layers.Dense(1),
        ]
    )


@pytest.mark.parametrize("way", ACROSS_STEPS)
def test_synchronised_batch_normalisation_sees_the_micro_batch_of_all_replicas(way):
    x, y, _ = regression_data(2 * LARGE)
    weights = [
        _train_on_replicas(
            way,
            strategy,
            x,
            y,
            lambda: keras.optimizers.SGD(0.1),
            lambda synchronized=synchronized: _normalised_model(synchronized),
        ).get_weights()
        for strategy, synchronized in (
            (tf.distribute.get_strategy(), False),
            (mirrored(), True),
            (mirrored(), False),
        )
    ]
    assert difference(weights[1], weights[0]) < 1e-6
    assert difference(weights[2], weights[0]) > 1e-3


def test_layers_that_synchronise_are_refused_in_the_loop():
    def nested():
        return keras.Sequential([keras.Input((5,)), _normalised_model(synchronized=True)])

    with mirrored().scope():
        model = GradientAccumulateModel(model=nested(), micro_batch_size=2)
        with pytest.raises(ValueError) as error:
            model.compile("sgd", "mse")
    for part in ("BatchNormalization(synchronized=True)", "on 2 replicas", "accum_steps"):
        assert part in str(error.value)
    # On one replica there is nothing to synchronise.
    model = GradientAccumulateModel(model=nested(), micro_batch_size=2)
    model.compile("sgd", "mse")
    x, y, _ = regression_data(4)
    model.train_on_batch(x, y)


def test_layers_that_synchronise_are_refused_also_if_they_come_with_the_data():
    class Late(GradientAccumulateModel):
        def build(self, shape):
            self.net = _normalised_model(synchronized=True)

        def call(self, x):
            return self.net(x)

    with mirrored().scope():
        model = Late(micro_batch_size=2)
        model.compile("sgd", "mse")
    x, y, _ = regression_data(4)
    with pytest.raises(ValueError, match="no layer may synchronise"):
        model.fit(x, y, verbose=0)


@pytest.mark.fast
@pytest.mark.parametrize(
    "make",
    [
        lambda: GradientAccumulateOptimizer("sgd", 2),
        lambda: GradientAccumulateModel(model=dense_model(), micro_batch_size=2),
    ],
    ids=["optimizer", "model"],
)
def test_strategies_without_variables_of_each_replica_are_refused(make):
    strategy = tf.distribute.experimental.CentralStorageStrategy(compute_devices=["CPU:0", "CPU:1"])
    with strategy.scope(), pytest.raises(ValueError) as error:
        make()
    assert "Received: CentralStorageStrategy" in str(error.value)
    assert "MultiWorkerMirroredStrategy" in str(error.value)


def test_parameter_servers_are_told_from_other_strategies():
    # They cannot be made without a cluster that runs.
    for cls in (
        tf.distribute.ParameterServerStrategy,
        tf.distribute.experimental.ParameterServerStrategy,
        tf.compat.v1.distribute.experimental.ParameterServerStrategy,
    ):
        assert _keras.is_parameter_server(object.__new__(cls))
    assert not _keras.is_parameter_server(mirrored())
    assert not _keras.is_parameter_server(tf.distribute.get_strategy())


@pytest.mark.fast
def test_an_optimizer_made_outside_the_scope_is_refused(way):
    optimizer = keras.optimizers.Adam()
    x, y, _ = regression_data(LARGE)
    with pytest.raises(ValueError) as error:
        _train_on_replicas(way, mirrored(), x, y, lambda: optimizer)
    assert "Adam made under _DefaultDistributionStrategy" in str(error.value)
    assert "to train under MirroredStrategy" in str(error.value)


@pytest.mark.parametrize("replicas", [1, 4])
def test_a_checkpoint_in_mid_cycle_resumes_on_another_number_of_replicas(replicas, tmp_path):
    x, y, _ = regression_data(2 * LARGE)
    large = dense_model()
    large.compile(keras.optimizers.Adam(0.02), "mse")
    large.fit(x, y, batch_size=LARGE, shuffle=False, verbose=0)

    def train(strategy, first, last, restore=None):
        with strategy.scope():
            model = dense_model(seed=5 if restore else 1)
            model.compile(GradientAccumulateOptimizer(keras.optimizers.Adam(0.02), 4), "mse")
            model.optimizer.build(model.trainable_variables)
        checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        if restore:
            checkpoint.restore(restore).assert_consumed()
        model.make_train_function()
        for start in range(first, last, MICRO):
            batch = (x[start : start + MICRO], y[start : start + MICRO])
            dataset = tf.data.Dataset.from_tensors(batch)
            model.train_function(iter(strategy.experimental_distribute_dataset(dataset)))
        return model, checkpoint.save(tmp_path / f"to_{last}")

    # Five micro-steps: one update, and the first micro-batch of the next cycle.
    model, path = train(mirrored(2), 0, 20)
    assert int(model.optimizer.micro_step.numpy()) == 1
    strategy = mirrored(replicas) if replicas > 1 else tf.distribute.get_strategy()
    resumed, _ = train(strategy, 20, 2 * LARGE, path)
    assert difference(resumed.get_weights(), large.get_weights()) < 1e-6
    state = state_of(resumed.optimizer.inner_optimizer.variables)
    assert difference(state, state_of(large.optimizer.variables)) < 1e-6
