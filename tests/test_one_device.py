"""One replica, a strategy all the same: the large batch of no strategy, in every way to train."""

import functools
import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateModel, GradientAccumulateOptimizer
from tests.oracle import (
    EFFECTIVE,
    MICRO,
    WAYS,
    dense_model,
    difference,
    in_way,
    regression_data,
    state_of,
    updates_of,
)

STRATEGIES = {
    "mirrored": lambda: tf.distribute.MirroredStrategy(["CPU:0"]),
    "multi_worker": tf.distribute.MultiWorkerMirroredStrategy,  # without a cluster
    "one_device": lambda: tf.distribute.OneDeviceStrategy("CPU:0"),
}


def everything_per_update():
    """An optimizer with all that Keras does once per update, and does in merge calls."""
    return keras.optimizers.AdamW(
        0.02,
        weight_decay=0.1,
        global_clipnorm=0.05,
        use_ema=True,
        ema_momentum=0.8,
        ema_overwrite_frequency=2,
    )


def momentum():
    return keras.optimizers.SGD(0.1, momentum=0.9)


def compiled(way, strategy, optimizer, model=dense_model, arguments=None, **kwargs):
    """A model made under a strategy that accumulates in a way, and the batch size for `fit`."""
    with strategy.scope():
        net, optimizer, batch_size = in_way(way, model(), optimizer(), **(arguments or {}))
        net.compile(optimizer, "mse", **kwargs)
    return net, batch_size


def trained(way, strategy, optimizer, data, epochs=1, initial_scale=None, **kwargs):
    """A model trained on effective batches; "plain" is the large batch."""
    model, batch_size = compiled(way, strategy, optimizer, **kwargs)
    if initial_scale is not None:
        model.optimizer.initial_scale = initial_scale
    model.fit(*data, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0)
    return model


def inner(optimizer):
    return getattr(optimizer, "inner_optimizer", optimizer)


@functools.cache
def large_batch():
    model = trained("plain", tf.distribute.get_strategy(), everything_per_update, _data(), 2)
    return model.get_weights(), state_of(model.optimizer.variables)


def _data(dtype="float64"):
    return regression_data(2 * EFFECTIVE, dtype=dtype)[:2]


# The wrappers of the optimizer and of the model across steps are one where a strategy is asked.
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "way, execution",
    [
        *(pytest.param(way, "graph", marks=pytest.mark.fast) for way in WAYS),
        *(("optimizer", execution) for execution in ("eager", "jit", "steps_per_execution")),
        *(("micro_batch_size", execution) for execution in ("eager", "jit")),
    ],
    indirect=["execution"],
)
def test_equals_the_large_batch_in_every_execution(way, execution):
    weights, state = large_batch()
    strategy = STRATEGIES["mirrored"]()
    model = trained(way, strategy, everything_per_update, _data(), 2, **execution)
    assert model.distribute_strategy is strategy and strategy.num_replicas_in_sync == 1
    assert difference(weights, dense_model().get_weights()) > 1e-2
    assert difference(model.get_weights(), weights) < 1e-12
    assert difference(state_of(inner(model.optimizer).variables), state) < 1e-12


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "name, way",
    [*(("multi_worker", way) for way in WAYS), ("one_device", "micro_batch_size")],
)
def test_equals_the_large_batch_under_every_strategy(name, way):
    model = trained(way, STRATEGIES[name](), everything_per_update, _data(), 2)
    assert difference(model.get_weights(), large_batch()[0]) < 1e-12


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "policy, way", [*(("drop_micro_batch", way) for way in WAYS), ("drop_cycle", "optimizer")]
)
def test_what_is_not_finite_is_dropped(policy, way):
    x, y = _data()
    large, _ = compiled("plain", tf.distribute.get_strategy(), momentum)
    first, second = np.arange(EFFECTIVE), np.arange(EFFECTIVE, 2 * EFFECTIVE)
    if policy == "drop_micro_batch":
        kept = np.delete(first, np.s_[MICRO : 2 * MICRO])
        large.train_on_batch(x[kept], y[kept])
    large.train_on_batch(x[second], y[second])

    y = y.copy()
    y[MICRO] = np.nan
    model = trained(
        way, STRATEGIES["mirrored"](), momentum, (x, y), arguments={"non_finite": policy}
    )
    assert difference(model.get_weights(), large.get_weights()) < 1e-12
    counter = model if way != "optimizer" else model.optimizer
    assert int(counter.dropped_cycles.numpy()) == (policy == "drop_cycle")
    assert int(counter.dropped_micro_steps.numpy()) == (policy == "drop_micro_batch")


def test_an_overflow_drops_the_update_and_halves_the_scale_once(way):
    x, y = _data("float32")
    y[MICRO] = 1e9
    keras.config.set_dtype_policy("mixed_float16")
    try:
        large, model = (
            trained(*arguments, momentum, (x, y), initial_scale=256.0)
            for arguments in (
                ("plain", tf.distribute.get_strategy()),
                (way, STRATEGIES["mirrored"]()),
            )
        )
    finally:
        keras.config.set_dtype_policy("float32")
    assert updates_of(model.optimizer) == updates_of(large.optimizer) == 1
    assert float(model.optimizer.dynamic_scale.numpy()) == 128.0
    assert float(large.optimizer.dynamic_scale.numpy()) == 128.0
    assert difference(model.get_weights(), large.get_weights()) < 1e-3
    assert difference(large.get_weights(), dense_model().get_weights()) > 1e-2


@pytest.mark.fast
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("eager", [False, True], ids=["graph", "eager"])
def test_a_loop_of_ones_own_with_weights_and_a_partial_cycle(eager):
    x, y = _data()
    large, _ = compiled("plain", tf.distribute.get_strategy(), everything_per_update)
    for examples in (slice(15), slice(15, None)):  # 5 + 5 + 5, then 5 + 4
        large.train_on_batch(x[examples], y[examples])

    strategy = STRATEGIES["mirrored"]()
    with strategy.scope():
        model = dense_model()
        optimizer = GradientAccumulateOptimizer(everything_per_update(), 3)
        optimizer.build(model.trainable_variables)

    def micro_step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables, weight=tf.shape(x)[0])

    def run(*batch):
        strategy.run(micro_step, args=batch)

    run = run if eager else tf.function(run)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(5)
    for batch in strategy.experimental_distribute_dataset(dataset):
        run(*batch)
    optimizer.flush()
    assert int(optimizer.iterations.numpy()) == 2
    assert difference(model.get_weights(), large.get_weights()) < 1e-12


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "copy, way",
    [("checkpoint", "optimizer"), ("checkpoint", "accum_steps"), ("keras_file", "accum_steps")],
)
def test_resumes_in_mid_cycle(copy, way, tmp_path):
    x, y = _data()
    strategy = STRATEGIES["mirrored"]()

    def train(model, start, end):
        for first in range(start, end, MICRO):
            model.train_on_batch(x[first : first + MICRO], y[first : first + MICRO])

    model, _ = compiled(way, strategy, everything_per_update)
    train(model, 0, EFFECTIVE + MICRO)  # an update, and the first micro-batch of the next cycle
    assert int(model.optimizer.micro_step.numpy()) == 1
    if copy == "checkpoint":
        path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(tmp_path / "c")
        resumed, _ = compiled(
            way, strategy, everything_per_update, model=lambda: dense_model(seed=5)
        )
        with strategy.scope():
            resumed.optimizer.build(resumed.trainable_variables)
        checkpoint = tf.train.Checkpoint(model=resumed, optimizer=resumed.optimizer)
        checkpoint.restore(path).assert_consumed()
    else:
        model.save(tmp_path / "model.keras")
        with strategy.scope():
            resumed = keras.models.load_model(tmp_path / "model.keras")
    for m in (model, resumed):
        train(m, EFFECTIVE + MICRO, 2 * EFFECTIVE)
    large, _ = compiled("plain", tf.distribute.get_strategy(), everything_per_update)
    for start in (0, EFFECTIVE):
        large.train_on_batch(x[start : start + EFFECTIVE], y[start : start + EFFECTIVE])
    assert difference(resumed.get_weights(), model.get_weights()) == 0.0
    state = state_of(inner(resumed.optimizer).variables)
    assert difference(state, state_of(large.optimizer.variables)) < 1e-12
    assert difference(resumed.get_weights(), large.get_weights()) < 1e-12


def normalised_model(synchronized=False):
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(8),
            keras.layers.BatchNormalization(synchronized=synchronized),
            keras.layers.Dense(1),
        ]
    )


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "name, examples", [("mirrored", 2 * EFFECTIVE - 2), ("multi_worker", 2 * EFFECTIVE)]
)
def test_layers_that_synchronise_have_nothing_to_wait_for(name, examples):
    # In the loop over micro-batches, where several replicas may not.
    data = [a[:examples] for a in _data()]
    models = [
        trained(
            "micro_batch_size",
            strategy,
            momentum,
            data,
            model=lambda synchronized=synchronized: normalised_model(synchronized),
            metrics=["mae"],
        )
        for strategy, synchronized in (
            (tf.distribute.get_strategy(), False),
            (STRATEGIES[name](), True),
        )
    ]
    assert difference(*(m.get_weights() for m in models)) < 1e-12


@pytest.mark.usefixtures("float64")
def test_exact_batch_normalisation():
    strategy = STRATEGIES["mirrored"]()
    with strategy.scope():
        exact = GradientAccumulateModel(
            model=normalised_model(), micro_batch_size=5, batch_norm="exact"
        )
        exact.compile(momentum(), "mse")
    large = trained(
        "plain", tf.distribute.get_strategy(), momentum, _data(), model=normalised_model
    )
    exact.fit(*_data(), batch_size=EFFECTIVE, shuffle=False, verbose=0)
    assert difference(exact.get_weights(), large.get_weights()) < 1e-12


def test_a_process_with_one_device_trains_and_runs_the_pages_snippets():
    # Here there are several logical devices, of which `MirroredStrategy()` would take all.
    job = [sys.executable, "-m", "tests.one_device_job"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(job, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 1
    assert found["replicas_in_snippets"] == [1, 1]
    assert set(found["differences"]) == set(WAYS)
    assert max(found["differences"].values()) < 1e-6
