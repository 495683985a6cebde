"""Both wrappers on two logical devices: the large batch of one device, one sum per update."""

import functools
import json
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateModel, GradientAccumulateOptimizer
from tests.oracle import (
    ACROSS_STEPS,
    KERAS,
    WAYS,
    dense_model,
    difference,
    mirrored,
    regression_data,
    state_of,
)

# The batch size of `fit`, for effective batches of 32.
SIZE = {"optimizer": 8, "accum_steps": 8, "micro_batch_size": 32}


@pytest.fixture(params=["mirrored", "one_device"])
def strategy(request):
    return mirrored() if request.param == "mirrored" else tf.distribute.OneDeviceStrategy("CPU:1")


def _compiled(way, make_optimizer, loss, strategy, model=dense_model, **kwargs):
    with strategy.scope():
        net, optimizer = model(), make_optimizer()
        if way == "optimizer":
            optimizer = GradientAccumulateOptimizer(optimizer, 4)
        elif way == "accum_steps":
            net = GradientAccumulateModel(model=net, accum_steps=4)
        else:
            net = GradientAccumulateModel(model=net, micro_batch_size=3)
        net.compile(optimizer, loss, **kwargs)
    return net


def _plain(make_optimizer, loss, data, epochs=2, model=dense_model, **kwargs):
    net = model()
    net.compile(make_optimizer(), loss, **kwargs)
    history = net.fit(**data, batch_size=32, epochs=epochs, shuffle=False, verbose=0)
    return net, history.history


OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.02),
    "clipnorm": lambda: keras.optimizers.SGD(0.1, clipnorm=0.05),
    "global_clipnorm": lambda: keras.optimizers.SGD(0.1, global_clipnorm=0.05),
}


@functools.cache
def _large(name):
    x, y, _ = regression_data(96)
    model, _ = _plain(OPTIMIZERS[name], "mse", {"x": x, "y": y})
    return model.get_weights(), state_of(model.optimizer.variables)


# Every other optimizer is in the contract of replicas, and a strategy of one device in
# test_one_device.py.
@pytest.mark.parametrize(
    "name, eager, strategy",
    [
        pytest.param("adam", False, "mirrored", marks=pytest.mark.fast),
        ("clipnorm", True, "mirrored"),
        ("global_clipnorm", False, "one_device"),
    ],
    indirect=["strategy"],
)
def test_equals_the_large_batch_of_one_device(way, name, eager, strategy):
    x, y, _ = regression_data(96)
    large = _large(name)
    model = _compiled(way, OPTIMIZERS[name], "mse", strategy, run_eagerly=eager)
    model.fit(x, y, batch_size=SIZE[way], epochs=2, shuffle=False, verbose=0)
    weights, state = large
    assert difference(model.get_weights(), weights) < 1e-6
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    assert difference(state_of(optimizer.variables), state) < 1e-6


@pytest.mark.parametrize(
    "reduction, strategy",
    [
        ("sum_over_batch_size", "mirrored"),
        ("mean_with_sample_weight", "mirrored"),
        ("sum", "mirrored"),
        ("mean_with_sample_weight", "one_device"),
    ],
    indirect=["strategy"],
)
def test_uneven_replicas_give_the_large_batchs_mean(mode, reduction, strategy):
    # The last effective batch has 11 examples: 6 and 5, and the last micro-batch 2 and 1.
    if mode == "micro_batch_size" and strategy.num_replicas_in_sync > 1 and KERAS < (3, 10):
        pytest.skip("metrics of Keras before 3.10 synchronise replicas, which a loop may not")
    loss = lambda: keras.losses.MeanSquaredError(reduction=reduction)  # noqa: E731
    sgd = lambda: keras.optimizers.SGD(0.01, momentum=0.9)  # noqa: E731
    regularized = lambda: dense_model(kernel_regularizer="l2")  # noqa: E731
    data = dict(zip(("x", "y", "sample_weight"), regression_data(75), strict=True))
    large, history = _plain(sgd, loss(), data, model=regularized, metrics=["mae"])
    model = _compiled(mode, sgd, loss(), strategy, model=regularized, metrics=["mae"])
    logs = model.fit(**data, batch_size=SIZE[mode], epochs=2, shuffle=False, verbose=0).history
    assert difference(model.get_weights(), large.get_weights()) < 1e-6
    if mode == "micro_batch_size":
        for name, values in history.items():
            np.testing.assert_allclose(logs[name], values, rtol=2e-6)


def test_a_replica_without_examples(strategy):
    x, y, _ = regression_data(33)
    large, _ = _plain(OPTIMIZERS["adam"], "mse", {"x": x, "y": y})
    model = _compiled("micro_batch_size", OPTIMIZERS["adam"], "mse", strategy)
    model.fit(x, y, batch_size=32, epochs=2, shuffle=False, verbose=0)
    assert difference(model.get_weights(), large.get_weights()) < 1e-6


def _masked_model():
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((7,)),
            keras.layers.Embedding(11, 4, mask_zero=True),
            keras.layers.SimpleRNN(5, return_sequences=True),
            keras.layers.Dense(1),
        ]
    )


def test_masked_tokens_are_counted_over_replicas(mode):
    # Not Adam, which squares the plain embedding's sparse gradients before it sums them.
    sgd = lambda: keras.optimizers.SGD(0.5, momentum=0.9)  # noqa: E731
    rng = np.random.default_rng(0)
    x = rng.integers(1, 11, size=(64, 7))
    x[np.arange(7) >= rng.integers(1, 8, size=(64, 1))] = 0
    y = rng.normal(size=(64, 7, 1)).astype("float32")
    large, _ = _plain(sgd, "mse", {"x": x, "y": y}, model=_masked_model)
    model = _compiled(mode, sgd, "mse", mirrored(), model=_masked_model)
    model.fit(x, y, batch_size=SIZE[mode], epochs=2, shuffle=False, verbose=0)
    assert difference(model.get_weights(), large.get_weights()) < 2e-6


@pytest.mark.fast
def test_custom_loop_with_weights(strategy):
    x, y, _ = regression_data(96)
    large, _ = _plain(OPTIMIZERS["adam"], "mse", {"x": x, "y": y}, epochs=1)
    with strategy.scope():
        model = dense_model()
        optimizer = GradientAccumulateOptimizer(OPTIMIZERS["adam"](), 4)
        optimizer.build(model.trainable_variables)
    replicas = strategy.num_replicas_in_sync

    def micro_step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2) / replicas
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables, weight=tf.shape(x)[0])

    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    run = tf.function(lambda x, y: strategy.run(micro_step, args=(x, y)))
    for batch in strategy.experimental_distribute_dataset(dataset):
        run(*batch)
    assert int(optimizer.iterations.numpy()) == 3
    assert difference(model.get_weights(), large.get_weights()) < 1e-6


@pytest.mark.fast
def test_flush_outside_the_scope(strategy):
    x, y, _ = regression_data(24)
    large = dense_model()
    large.compile(OPTIMIZERS["adam"](), "mse")
    large.train_on_batch(x, y)
    model = _compiled("optimizer", OPTIMIZERS["adam"], "mse", strategy)
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)  # three of four: flushed at the end
    assert int(model.optimizer.iterations.numpy()) == 1
    assert difference(model.get_weights(), large.get_weights()) < 1e-6


@pytest.mark.parametrize("copy", ["checkpoint", "keras_file"])
def test_mid_cycle_state_is_the_sum_over_replicas(copy, strategy, tmp_path):
    x, y, _ = regression_data(32)
    large = dense_model()
    large.compile(OPTIMIZERS["adam"](), "mse")
    large.train_on_batch(x, y)

    model = _compiled("optimizer", OPTIMIZERS["adam"], "mse", strategy)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    steps = iter(strategy.experimental_distribute_dataset(dataset))
    model.make_train_function()
    for _ in range(2):
        model.train_function(steps)
    assert int(model.optimizer.micro_step.numpy()) == 2
    if copy == "checkpoint":
        path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(tmp_path / "c")
        resumed = dense_model(seed=5)
        resumed.compile(GradientAccumulateOptimizer(OPTIMIZERS["adam"](), 4), "mse")
        resumed.optimizer.build(resumed.trainable_variables)
        tf.train.Checkpoint(model=resumed, optimizer=resumed.optimizer).restore(path)
    else:
        model.save(tmp_path / "model.keras")
        resumed = keras.models.load_model(tmp_path / "model.keras")
    for start in (16, 24):
        resumed.train_on_batch(x[start : start + 8], y[start : start + 8])
    assert difference(resumed.get_weights(), large.get_weights()) < 1e-6


@pytest.mark.parametrize("way", ["optimizer", "micro_batch_size"])
def test_four_replicas(way):
    x, y, _ = regression_data(96)
    large, _ = _plain(OPTIMIZERS["adam"], "mse", {"x": x, "y": y})
    model = _compiled(way, OPTIMIZERS["adam"], "mse", mirrored(4))
    model.fit(x, y, batch_size=SIZE[way], epochs=2, shuffle=False, verbose=0)
    assert difference(model.get_weights(), large.get_weights()) < 1e-6


# AutoGraph reads the whole of the package's and Keras's steps for a function of the user's.
@pytest.mark.parametrize("mode, eager", [("accum_steps", True), ("micro_batch_size", False)])
def test_the_models_train_step_in_a_custom_loop(mode, eager):
    x, y, _ = regression_data(96)
    large, _ = _plain(OPTIMIZERS["adam"], "mse", {"x": x, "y": y}, epochs=1)
    strategy = mirrored()
    model = _compiled(mode, OPTIMIZERS["adam"], "mse", strategy)

    def run(*batch):
        strategy.run(model.train_step, args=(batch,))

    run = run if eager else tf.function(run)
    dataset = tf.data.Dataset.from_tensor_slices((x, y))
    dataset = dataset.batch(SIZE[mode])
    for batch in strategy.experimental_distribute_dataset(dataset):
        run(*batch)
    assert difference(model.get_weights(), large.get_weights()) < 1e-6


class OwnTrainStep(GradientAccumulateModel):
    """A user's `train_step` in a model that accumulates across steps."""

    def __init__(self):
        super().__init__(accum_steps=4)
        self.net = dense_model()

    def call(self, x):
        return self.net(x)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss}


def test_a_users_train_step_in_the_model_wrapper(strategy):
    x, y, _ = regression_data(80)  # the second cycle of an epoch is half a one
    large, _ = _plain(OPTIMIZERS["global_clipnorm"], "mse", {"x": x[:64], "y": y[:64]}, epochs=1)
    large.fit(x[64:], y[64:], batch_size=16, shuffle=False, verbose=0)
    with strategy.scope():
        model = OwnTrainStep()
        model.compile(OPTIMIZERS["global_clipnorm"](), "mse")
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    assert int(model.optimizer.iterations.numpy()) == 3
    assert difference(model.get_weights(), large.get_weights()) < 1e-6


@pytest.mark.parametrize("way", ACROSS_STEPS)
def test_one_micro_batch_per_update_clips_after_the_sum_and_weighs_uneven_replicas(way):
    x, y, _ = regression_data(39)  # the last batch has 7 examples: 4 and 3
    large, _ = _plain(OPTIMIZERS["clipnorm"], "mse", {"x": x, "y": y}, epochs=1)
    large_even, _ = _plain(OPTIMIZERS["clipnorm"], "mse", {"x": x[:32], "y": y[:32]}, epochs=1)
    strategy = mirrored()
    with strategy.scope():
        model, optimizer = dense_model(), OPTIMIZERS["clipnorm"]()
        if way == "optimizer":
            optimizer = GradientAccumulateOptimizer(optimizer, 1)
        else:
            model = GradientAccumulateModel(model=model, accum_steps=1)
        model.compile(optimizer, "mse")
    examples = 32 if way == "optimizer" else 39
    model.fit(x[:examples], y[:examples], batch_size=32, shuffle=False, verbose=0)
    expected = large_even if way == "optimizer" else large
    assert difference(model.get_weights(), expected.get_weights()) < 1e-6


def test_strategies_that_need_no_merge_call():
    # XLA with GPUs only. Here Keras and TensorFlow are told so on CPUs, in a process of its own,
    # as there replicas talk in collectives, whose keys strategies of one process share.
    job = [sys.executable, "-m", "tests.no_merge_call_job"]
    done = subprocess.run(job, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    differences = json.loads(done.stdout.splitlines()[-1])
    ways = [*WAYS, "function_on_each_replica"]
    assert set(differences) == {f"{way} {replicas}" for way in ways for replicas in (1, 2)}
    assert max(differences.values()) < 1e-6
