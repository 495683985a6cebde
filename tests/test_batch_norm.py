"""AccumBatchNorm: one update of the moving statistics per cycle, with all that the cycle saw."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import (
    AccumBatchNorm,
    GradientAccumulateModel,
)
from gradient_accumulator_tf.batch_norm.moments import pooled_moments
from tests.oracle import difference, in_way, mirrored, regression_data


def _moving(layer):
    return [layer.moving_mean.numpy(), layer.moving_variance.numpy()]


def _recorded_by_keras(x, mask=None, layer=None, **kwargs):
    """Moving statistics after Keras's layer saw `x` in one batch."""
    layer = layer or keras.layers.BatchNormalization(**kwargs)
    layer(x, training=True, mask=mask)
    return _moving(layer)


@pytest.mark.fast
def test_by_hand():
    # {0, 0} and {10, 10}: the variances are 0 and 0, but the four numbers vary by 25.
    layer = AccumBatchNorm(accum_steps=2, momentum=0.0)
    layer(np.zeros((2, 1), "float32"), training=True)
    assert [v.item() for v in _moving(layer)] == [0.0, 1.0]  # as initialised
    layer(np.full((2, 1), 10.0, "float32"), training=True)
    assert [v.item() for v in _moving(layer)] == [5.0, 25.0]
    # Micro-batches of one example: each variance is 0.
    for value in (1.0, 3.0):
        layer(np.full((1, 1), value, "float32"), training=True)
    assert [v.item() for v in _moving(layer)] == [2.0, 1.0]


@pytest.mark.fast
def test_pooled_moments_of_large_means_and_small_variances():
    rng = np.random.default_rng(0)
    parts = [rng.normal(100.0, 0.1, size=(n, 3)) for n in (1, 4, 7)]
    shift = np.zeros(3)
    count = sum(len(p) for p in parts)
    first = sum(len(p) * (p.mean(0) - shift) for p in parts)
    second = sum(len(p) * (p.var(0) + (p.mean(0) - shift) ** 2) for p in parts)
    mean, variance = pooled_moments(count, first, second, shift)
    union = np.concatenate(parts)
    np.testing.assert_allclose(mean, union.mean(0), rtol=1e-12)
    np.testing.assert_allclose(variance, union.var(0), rtol=1e-8)


SHAPES = {
    "dense": (24, 3),
    "sequence": (24, 5, 3),
    "image": (24, 4, 5, 3),
    "volume": (24, 2, 3, 2, 3),
}


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_records_what_keras_records_of_the_large_batch(shape, axis):
    x = np.random.default_rng(0).normal(3.0, 2.0, size=(2, *shape)).astype("float32")
    layer = AccumBatchNorm(accum_steps=3, momentum=0.7, axis=axis)
    keras_layer = keras.layers.BatchNormalization(momentum=0.7, axis=axis)
    for large in x:
        expected = _recorded_by_keras(large, layer=keras_layer)
        for part in np.split(large, [4, 15]):  # unequal: 4, 11 and 9
            layer(part, training=True)
        assert difference(_moving(layer), expected) < 1e-6
    assert difference(_moving(layer), [np.zeros(x.shape[1:][axis]), np.ones(x.shape[1:][axis])]) > 1


@pytest.mark.usefixtures("float64")
def test_in_float64():
    x = np.random.default_rng(0).normal(100.0, 0.1, size=(3, 12, 4))
    layer = AccumBatchNorm(accum_steps=4, momentum=0.5)
    keras_layer = keras.layers.BatchNormalization(momentum=0.5)
    for large in x:
        expected = _recorded_by_keras(large, layer=keras_layer)
        for part in np.split(large, 4):
            layer(part, training=True)
        np.testing.assert_allclose(_moving(layer)[0], expected[0], rtol=1e-13)
        np.testing.assert_allclose(_moving(layer)[1], expected[1], rtol=1e-9)


@pytest.mark.usefixtures("float64")
def test_a_mean_far_from_zero_costs_no_digits_of_the_variance_once_it_is_known():
    # Of 1e8 and 1e-6 the sum of squares alone would keep one digit or two.
    x = np.random.default_rng(0).normal(1e4, 1e-3, size=(2, 12, 4))
    layer = AccumBatchNorm(accum_steps=4, momentum=0.0)
    for large in x:
        for part in np.split(large, 4):
            layer(part, training=True)
    np.testing.assert_allclose(_moving(layer)[1], x[1].var(0), rtol=1e-6)


def test_masked_elements_do_not_count():
    rng = np.random.default_rng(0)
    x = rng.normal(2.0, 3.0, size=(12, 5, 3)).astype("float32")
    mask = rng.random((12, 5)) < 0.6
    layer = AccumBatchNorm(accum_steps=3)
    for part, m in zip(np.split(x, [2, 7]), np.split(mask, [2, 7]), strict=True):
        layer(part, training=True, mask=m)
    assert difference(_moving(layer), _recorded_by_keras(x, mask)) < 1e-6
    assert difference(_moving(layer), _recorded_by_keras(x)) > 1e-3


def test_normalises_by_the_micro_batch():
    x = np.random.default_rng(0).normal(3.0, 2.0, size=(4, 6)).astype("float32")
    ours, plain = AccumBatchNorm(accum_steps=3), keras.layers.BatchNormalization()
    for training in (True, False):
        assert difference([ours(x, training=training)], [plain(x, training=training)]) == (
            0.0 if training else pytest.approx(difference([ours(x)], [plain(x)]))
        )


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize(
    "policy", ["float32", "float64", "float16", "mixed_float16", "mixed_bfloat16"]
)
def test_outputs_and_gradients_are_kerass_bit_for_bit(policy, axis, masked):
    if masked and axis == 1:
        pytest.skip("Keras's masks lack the last axis")
    x = np.random.default_rng(0).normal(3.0, 2.0, size=(4, 6, 5))
    mask = tf.constant(np.arange(24).reshape(4, 6) % 3 > 0) if masked else None
    results = []
    for make in (AccumBatchNorm, keras.layers.BatchNormalization):
        layer = make(
            axis=axis, dtype=policy, **({"accum_steps": 3} if make is AccumBatchNorm else {})
        )
        inputs = tf.constant(x, layer.compute_dtype)
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = layer(inputs, training=True, mask=mask)
            loss = tf.reduce_sum(outputs**3)
        gradients = tape.gradient(loss, [inputs, *layer.trainable_variables])
        results.append([tf.cast(t, tf.float64).numpy() for t in (outputs, *gradients)])
        assert outputs.dtype == layer.compute_dtype
    assert difference(*results) == 0.0


def test_a_mask_of_another_rank_is_refused():
    with pytest.raises(ValueError, match="`mask` must have one dimension less"):
        AccumBatchNorm(accum_steps=2)(tf.ones((4, 6, 5)), training=True, mask=tf.ones((4,), bool))


def test_one_step_is_kerass_layer_bit_for_bit():
    x = np.random.default_rng(0).normal(3.0, 2.0, size=(5, 4, 6)).astype("float32")
    ours, plain = AccumBatchNorm(accum_steps=1), keras.layers.BatchNormalization()
    for part in x:
        assert difference([ours(part, training=True)], [plain(part, training=True)]) == 0.0
        assert difference(_moving(ours), _moving(plain)) == 0.0


@pytest.mark.fast
def test_frozen_and_inference_use_and_keep_the_moving_statistics():
    x = np.full((4, 2), 5.0, "float32")
    layer = AccumBatchNorm(accum_steps=2)
    for _ in range(4):
        layer(x, training=False)
    layer.trainable = False
    for _ in range(4):
        np.testing.assert_allclose(layer(x, training=True), x / np.sqrt(1.001), rtol=1e-6)
    assert [v.tolist() for v in _moving(layer)] == [[0.0, 0.0], [1.0, 1.0]]
    assert int(layer._pool.micro_step) == 0


@pytest.mark.fast
def test_config_weights_and_files_are_kerass():
    arguments = {
        "axis": 1,
        "momentum": 0.8,
        "epsilon": 1e-2,
        "center": False,
        "gamma_regularizer": "l2",
        "gamma_constraint": "non_neg",
    }
    layer = AccumBatchNorm(accum_steps=3, **arguments)
    clone = keras.layers.deserialize(keras.layers.serialize(layer))
    assert clone.get_config() == layer.get_config()
    assert clone.accum_steps == 3 and clone.momentum == 0.8
    plain = keras.layers.BatchNormalization(**arguments)
    layer.build((None, 4)), plain.build((None, 4))
    assert [w.name for w in layer.weights] == [w.name for w in plain.weights]
    assert len(layer.losses) == 1


def _net(batch_norm):
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(6), batch_norm, keras.layers.Dense(1)]
    )


def _batch_norm(model):
    return next(v for v in model.layers if isinstance(v, keras.layers.BatchNormalization))


def _large_batch_recorded(batches, momentum):
    """What Keras records of the first layer's activations, whose weights do not move."""
    plain = _net(keras.layers.BatchNormalization(momentum=momentum))
    for x in batches:
        plain(x, training=True)
    return _moving(_batch_norm(plain))


def test_follows_the_cycle_of_what_trains_it(way, execution):
    # Learning rate 0 keeps the activations those of the large batch. 27 examples: a last effective
    # batch of three.
    if way == "optimizer":
        examples, own = 24, 3
    else:
        examples, own = 27, 7
    x, y, _ = regression_data(examples)
    model = _net(AccumBatchNorm(accum_steps=own, momentum=0.6))
    model, optimizer, batch_size = in_way(way, model, keras.optimizers.SGD(0.0))
    model.compile(optimizer, "mse", **execution)
    model.fit(x, y, batch_size=batch_size, epochs=2, shuffle=False, verbose=0)
    large = [x[:12], x[12:24], x[24:]][: 2 if way == "optimizer" else 3] * 2
    expected = _large_batch_recorded(large, 0.6)
    assert difference(_moving(_batch_norm(model)), expected) < 1e-6


def test_a_model_of_one_step_ends_each_cycle():
    x, y, _ = regression_data(12)
    model = GradientAccumulateModel(model=_net(AccumBatchNorm(accum_steps=7)), accum_steps=1)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    expected = _large_batch_recorded(np.split(x, 3), 0.99)
    assert difference(_moving(_batch_norm(model)), expected) < 1e-6


def test_a_frozen_layer_keeps_its_statistics_in_a_model_that_trains(mode):
    x, y, _ = regression_data(12)
    net = _net(AccumBatchNorm())
    _batch_norm(net).trainable = False
    model, _, batch_size = in_way(mode, net)
    model.compile("sgd", "mse")
    model.fit(x, y, batch_size=batch_size, verbose=0)
    moving = _moving(_batch_norm(model))
    assert difference(moving, [np.zeros(6), np.ones(6)]) == 0.0
    assert int(model.optimizer.iterations) == 1


def test_the_optimizers_reset_drops_the_cycles_statistics():
    x, y, _ = regression_data(16)
    model = GradientAccumulateModel(model=_net(AccumBatchNorm(momentum=0.6)), accum_steps=3)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.train_on_batch(x[:4], y[:4])
    model.optimizer.reset()
    for start in (4, 8, 12):
        model.train_on_batch(x[start : start + 4], y[start : start + 4])
    expected = _large_batch_recorded([x[4:]], 0.6)
    assert difference(_moving(_batch_norm(model)), expected) < 1e-6


def test_pools_over_replicas(way):
    x, y, _ = regression_data(25)  # a last effective batch of one example, on one replica
    x = x[:24] if way == "optimizer" else x
    with mirrored().scope():
        model = _net(AccumBatchNorm(accum_steps=3, momentum=0.6))
        model, optimizer, batch_size = in_way(way, model, keras.optimizers.SGD(0.0), replicas=2)
        model.compile(optimizer, "mse")
    model.fit(x, y[: len(x)], batch_size=batch_size, shuffle=False, verbose=0)
    batches = [b for b in (x[:12], x[12:24], x[24:]) if len(b)]
    expected = _large_batch_recorded(batches, 0.6)
    layer = _batch_norm(model)
    assert difference(_moving(layer), expected) < 1e-6
    for variable in (layer.moving_mean, layer.moving_variance):
        first, second = (v.numpy() for v in variable.value.values)
        assert np.array_equal(first, second)


def test_synchronised_it_pools_the_statistics_that_all_replicas_share():
    x, y, _ = regression_data(24)
    with mirrored().scope():
        model = _net(AccumBatchNorm(momentum=0.6, synchronized=True))
        model = GradientAccumulateModel(model=model, accum_steps=3)
        model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    expected = _large_batch_recorded([x[:12], x[12:]], 0.6)
    assert difference(_moving(_batch_norm(model)), expected) < 1e-6


def test_in_mixed_precision():
    x, y, _ = regression_data(24)
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = GradientAccumulateModel(model=_net(AccumBatchNorm(momentum=0.6)), accum_steps=3)
    keras.config.set_dtype_policy("float32")
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    expected = _large_batch_recorded([x[:12], x[12:]], 0.6)
    assert difference(_moving(_batch_norm(model)), expected) < 2e-2
    assert _batch_norm(model).moving_mean.dtype == "float32"


@pytest.mark.parametrize("copy", ["checkpoint", "keras_file"])
def test_mid_cycle_statistics_are_saved(copy, tmp_path):
    x, _, _ = regression_data(12)
    model = _net(AccumBatchNorm(accum_steps=3, momentum=0.6))
    model(x[:4], training=True)
    if copy == "checkpoint":
        path = tf.train.Checkpoint(model=model).save(tmp_path / "c")
        resumed = _net(AccumBatchNorm(accum_steps=3, momentum=0.6))
        tf.train.Checkpoint(model=resumed).restore(path).assert_consumed()
    else:
        model.save(tmp_path / "model.keras")
        resumed = keras.models.load_model(tmp_path / "model.keras")
    for part in (x[4:8], x[8:]):
        resumed(part, training=True)
    expected = _large_batch_recorded([x], 0.6)
    assert difference(_moving(_batch_norm(resumed)), expected) < 1e-6


def test_weights_are_interchangeable_with_kerass():
    x, _, _ = regression_data(12)
    ours, plain = _net(AccumBatchNorm(accum_steps=3)), _net(keras.layers.BatchNormalization())
    for part in np.split(x, 3):
        ours(part, training=True)
    plain.set_weights(ours.get_weights())
    assert difference([plain(x)], [ours(x)]) == 0.0


@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
def test_the_call_that_finds_the_data_at_its_end_does_not_count():
    x, y, _ = regression_data(16)
    model = _net(AccumBatchNorm(accum_steps=3, momentum=0.6))
    model.compile(keras.optimizers.SGD(0.0), "mse")
    data = tf.data.Dataset.from_tensor_slices((x, y)).filter(lambda *_: True).batch(4)
    model.fit(data, epochs=3, verbose=0)
    assert int(_batch_norm(model)._pool.micro_step) == 0  # 12 of 3


@pytest.mark.fast
@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"accum_steps": 0}, ValueError, "accum_steps"),
        ({"accum_steps": 2.0}, TypeError, "accum_steps"),
        ({"renorm": True}, ValueError, "Received: renorm=True"),
    ],
)
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        AccumBatchNorm(**arguments)
