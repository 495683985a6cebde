"""GradientAccumulateModel in sixteen bits and in sixty-four."""

import keras
import numpy as np
import pytest

from gradient_accumulator_tf import GradientAccumulateOptimizer
from tests.oracle import (
    EFFECTIVE,
    MICRO,
    assert_trains_as_large_batch,
    dense_model,
    difference,
    in_way,
    regression_data,
    state_of,
    updates_of,
)

SIXTEEN_BITS = ["mixed_float16", "mixed_bfloat16", "bfloat16"]


@pytest.fixture
def policy(request):
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy("float32")


sixteen_bits = pytest.mark.parametrize("policy", SIXTEEN_BITS, indirect=True)
float16 = pytest.mark.parametrize("policy", ["mixed_float16"], indirect=True)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.Adam(0.01, clipnorm=0.5),
        lambda: keras.optimizers.SGD(0.05, momentum=0.9, weight_decay=0.01),
    ],
    ids=["adam", "sgd"],
)
def test_float64_is_exact(optimizer, float64):
    x, y, weights = regression_data(29, dtype="float64")
    model = assert_trains_as_large_batch(
        dense_model,
        x,
        y,
        sample_weight=weights,
        compile_with=lambda: {"optimizer": optimizer(), "loss": "mae", "metrics": ["mse"]},
        tolerance=1e-12,
        epochs=3,
    )
    assert all(v.dtype == "float64" for v in model.weights)


def linear(way="plain", **sizes):
    """y = w x without a loss of precision: all sums of the test's gradients are exact."""
    inputs = keras.Input((3,))
    outputs = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")(inputs)
    model, optimizer, batch_size = in_way(
        way, keras.Model(inputs, outputs), keras.optimizers.SGD(1.0), **sizes
    )
    model.compile(optimizer, loss=lambda y, y_pred: y * y_pred)
    return model, batch_size


@sixteen_bits
def test_what_sixteen_bits_hold_equals_the_large_batch_bit_for_bit(mode, policy):
    rng = np.random.default_rng(1)
    x = rng.integers(-2, 3, (16, 3)).astype("float32")
    y = rng.integers(-2, 3, (16, 1)).astype("float32")
    (plain, _), (model, batch_size) = linear(), linear(mode, steps=4)
    plain.fit(x, y, batch_size=16, verbose=0)
    model.fit(x, y, batch_size=batch_size, verbose=0)
    expected = -(x * y).mean(axis=0)[:, np.newaxis]
    assert difference(state_of(plain.weights), [expected]) == 0.0
    assert difference(state_of(model.weights), [expected]) == 0.0
    assert model.weights[0].dtype == plain.weights[0].dtype


@sixteen_bits
def test_small_gradients_are_not_lost_in_the_sum(mode, policy):
    # Summed in bfloat16, 1.0 + 63 x 0.003 stays 1.0.
    x = np.full((64, 3), 0.003, "float32")
    x[0] = 1.0
    model, batch_size = linear(mode, steps=64, micro=1)
    model.fit(x, np.ones((64, 1)), batch_size, verbose=0, shuffle=False)
    expected = -(1.0 + 63 * 0.003) / 64
    np.testing.assert_allclose(state_of(model.weights)[0], expected, rtol=0.01)


def scaled_momentum_and_mse(**kwargs):
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    if keras.config.dtype_policy().name == "mixed_float16":
        # The default scale overflows in the first steps, in micro-batches and large ones apart.
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=256.0)
    return {"optimizer": optimizer, "loss": "mse", **kwargs}


@pytest.mark.parametrize(
    ("policy", "execution"),
    [
        ("mixed_float16", "graph"),
        ("mixed_float16", "jit"),
        ("mixed_bfloat16", "eager"),
    ],
    indirect=["policy", "execution"],
)
def test_mixed_precision_trains_as_the_large_batch_to_its_rounding(policy, execution):
    x, y, weights = regression_data(26)
    assert_trains_as_large_batch(
        dense_model,
        x,
        y,
        sample_weight=weights,
        compile_with=lambda: scaled_momentum_and_mse(**execution),
        # Half of the last place of a float16, or of a bfloat16, that is near 1; a few of them.
        tolerance=2e-3 if policy == "mixed_float16" else 2e-2,
    )


def test_the_precision_is_the_wrapped_models(mode):
    # Its layers compute in float64 while everything else is float32.
    inputs = keras.Input((3,), dtype="float64")
    plain = keras.Model(inputs, keras.layers.Dense(1, dtype="float64")(inputs))
    model, *_ = in_way(mode, plain)
    x = np.random.default_rng(0).normal(size=(5, 3))
    assert difference([model(x)], [plain(x)]) == 0.0
    half = keras.Sequential([keras.layers.Dense(1)])
    half.dtype_policy = "mixed_bfloat16"
    model, *_ = in_way(mode, half)
    assert model.dtype_policy.name == "mixed_bfloat16"


@float16
def test_the_loss_scale_is_around_the_accumulation(mode, policy):
    x, y, _ = regression_data(4)
    for optimizer in (
        "sgd",
        keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(), initial_scale=256.0),
    ):
        model, *_ = in_way(mode, dense_model())
        model.compile(optimizer, loss="mse")
        outer = model.optimizer
        assert type(outer) is keras.optimizers.LossScaleOptimizer
        assert outer.initial_scale == (2.0**15 if optimizer == "sgd" else 256.0)
        inner = outer.inner_optimizer
        if mode == "accum_steps":
            assert type(inner) is GradientAccumulateOptimizer
            inner = inner.inner_optimizer
        assert type(inner) is keras.optimizers.SGD
        model.train_on_batch(x, y)
        model.flush()
        assert updates_of(outer) == 1


@float16
@pytest.mark.parametrize("overflowing", [[5], [0, 5, 11]])
def test_an_overflow_drops_its_effective_batch_and_no_more(mode, overflowing, policy):
    # The scale moves once, whether one micro-batch of the cycle overflows or each of them.
    x, y, _ = regression_data(36)
    y[overflowing] = 1e9
    plain = dense_model()
    plain.compile("sgd", loss="mse")
    model, _, batch_size = in_way(mode, dense_model())
    model.compile("sgd", loss="mse")
    scales = []
    for start in range(0, 36, EFFECTIVE):
        effective = x[start : start + EFFECTIVE], y[start : start + EFFECTIVE]
        plain.train_on_batch(*effective)
        for i in range(0, EFFECTIVE, batch_size):
            model.train_on_batch(*(part[i : i + batch_size] for part in effective))
        assert float(model.optimizer.dynamic_scale) == float(plain.optimizer.dynamic_scale)
        assert int(model.optimizer.step_counter) == int(plain.optimizer.step_counter)
        assert updates_of(model.optimizer) == updates_of(plain.optimizer)
        scales.append(float(model.optimizer.dynamic_scale))
    assert scales == [2.0**14] * 3 and updates_of(plain.optimizer) == 2
    assert difference(model.get_weights(), plain.get_weights()) < 1e-4


@float16
def test_the_scale_grows_by_updates(policy):
    x, y, _ = regression_data(36)
    model, _, batch_size = in_way("accum_steps", dense_model())
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(), 256.0, 3)
    model.compile(optimizer, loss="mse")
    scales = []
    for start in range(0, 36, batch_size):
        model.train_on_batch(x[start : start + batch_size], y[start : start + batch_size])
        scales.append(float(model.optimizer.dynamic_scale))
    assert scales == [256.0] * 8 + [512.0]


@float16
def test_losses_of_several_denominators_go_through_the_loss_scale(mode, policy):
    rng = np.random.default_rng(3)
    x, y = rng.integers(0, 6, (24, 5)), rng.normal(size=(24, 5, 1))
    x[MICRO : 2 * MICRO] = 0
    x[:, 0] = 1

    def make_model():
        keras.utils.set_random_seed(1)
        inputs = keras.Input((5,), dtype="int32")
        hidden = keras.layers.Embedding(6, 4, mask_zero=True)(inputs)
        regularizer = keras.regularizers.L2(0.1)
        return keras.Model(inputs, keras.layers.Dense(1, kernel_regularizer=regularizer)(hidden))

    assert_trains_as_large_batch(
        make_model,
        x,
        y,
        compile_with=scaled_momentum_and_mse,
        ways=[mode],
        tolerance=1e-3,
        same_logs=["micro_batch_size"],
    )
