"""What docs/exact_mean.md says: denominators, what the user may say of them, and the logs."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateModel, GradientAccumulateOptimizer
from gradient_accumulator_tf.cycle.loss_recorder import denominator
from gradient_accumulator_tf.models.micro_step import Effective, run_micro_step
from tests.oracle import (
    EXECUTIONS,
    KERAS,
    MODES,
    dense_model,
    difference,
    each_in_turn,
    in_way,
    mirrored,
    regression_data,
)

REDUCTIONS = ["sum_over_batch_size", "mean", "mean_with_sample_weight"]


@pytest.mark.parametrize(
    "weight_shape, masked",
    [
        *((shape, False) for shape in (None, (4,), (4, 1), (4, 3))),
        *((shape, True) for shape in (None, (4, 1), (4, 3))),
    ],
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_denominator_is_what_keras_divides_by(reduction, weight_shape, masked):
    rng = np.random.default_rng(0)
    y_true, y_pred = (rng.normal(size=(4, 3, 2)).astype("float32") for _ in range(2))
    weight = None if weight_shape is None else rng.uniform(size=weight_shape).astype("float32")
    if weight_shape == (4,):
        y_true, y_pred = y_true[:, 0], y_pred[:, 0]
    mask = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]], bool) if masked else None
    y_pred = tf.constant(y_pred)
    if masked:
        y_pred._keras_mask = tf.constant(mask)
    loss = keras.losses.MeanSquaredError(reduction=reduction)
    values = ((np.asarray(y_pred) - y_true) ** 2).mean(-1)
    counts = np.ones_like(values) if mask is None else mask.astype("float32")
    numerator = (values * counts * (1.0 if weight is None else weight)).sum()
    divisor = denominator(loss, tf.constant(values), y_true, y_pred, weight)
    assert float(divisor) > 0
    assert float(loss(y_true, y_pred, weight)) == pytest.approx(numerator / float(divisor), 1e-5)
    if reduction != "mean_with_sample_weight":
        assert float(divisor) == counts.sum()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_denominator_of_nothing_is_zero(reduction):
    y_pred = tf.zeros((2, 3, 1))
    y_pred._keras_mask = tf.zeros((2, 3), tf.bool)
    loss = keras.losses.MeanSquaredError(reduction=reduction)
    assert float(denominator(loss, tf.zeros((2, 3)), tf.ones((2, 3, 1)), y_pred, None)) == 0.0


class TokenMean(GradientAccumulateModel):
    """Its loss is a mean over tokens that Keras knows nothing of."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        valid = keras.ops.cast(x != 0, y_pred.dtype)
        return keras.ops.sum((y_pred[..., 0] - y) ** 2 * valid) / keras.ops.sum(valid)


class WeightedTokenMean(TokenMean):
    def micro_batch_weight(self, x, y, sample_weight):
        return keras.ops.sum(keras.ops.cast(x != 0, "float32"))


def _train_tokens(cls, mode, execution, steps=4, micro=5):
    rng = np.random.default_rng(0)
    x = rng.integers(1, 11, size=(40, 6))
    x[np.arange(6) >= np.linspace(1, 6, 40).astype(int)[:, np.newaxis]] = 0
    y = rng.normal(size=(40, 6)).astype("float32")
    keras.utils.set_random_seed(1)
    net = keras.Sequential([keras.Input((6,)), keras.layers.Embedding(11, 4)])
    net.add(keras.layers.Dense(1))
    model, _, size = in_way(mode, net, steps=steps, micro=micro, cls=cls)
    model.compile(keras.optimizers.SGD(0.3, momentum=0.9), **execution)
    logs = model.fit(x, y, batch_size=size, epochs=3, shuffle=False, verbose=0)
    return model.get_weights(), logs.history["loss"]


def test_a_loss_of_ones_own_counts_for_what_micro_batch_weight_says(mode, graph_or_jit):
    large, logs = _train_tokens(TokenMean, "accum_steps", graph_or_jit, steps=1, micro=20)
    weights, own_logs = _train_tokens(WeightedTokenMean, mode, graph_or_jit)
    assert difference(weights, large) < 1e-6
    if mode == "micro_batch_size":
        np.testing.assert_allclose(own_logs, logs, rtol=1e-6)


def test_a_loss_of_ones_own_counts_for_the_examples_where_nothing_is_said():
    large, _ = _train_tokens(TokenMean, "accum_steps", {}, steps=1, micro=20)
    weights, _ = _train_tokens(TokenMean, "micro_batch_size", {})
    assert difference(weights, large) > 1e-3


@pytest.mark.parametrize("weighted", [False, True])
def test_sum_of_a_cycle_equals_the_large_batch_of_a_loss_that_sums(graph_or_jit, weighted):
    x, y, _ = regression_data(48)
    weights = []
    for steps, size in ((1, 16), (4, 4)):
        model = dense_model()
        optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
        if steps > 1 or weighted:
            optimizer = GradientAccumulateOptimizer(optimizer, steps, reduction="sum")
        model.compile(optimizer, keras.losses.MeanSquaredError(reduction="sum"), **graph_or_jit)
        model.fit(x, y, batch_size=size, epochs=2, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    assert difference(*weights) < 1e-6


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_sum_takes_weights_as_factors(accum_steps):
    variable = keras.Variable(0.0)
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), accum_steps, reduction="sum")
    for gradient, weight in ((1.0, 2.0), (5.0, 0.5)):
        optimizer.apply([tf.constant(gradient)], [variable], weight=weight)
    assert float(variable) == -4.5
    assert optimizer.get_config()["reduction"] == "sum"


@pytest.mark.parametrize("value", ["max", None, 1])
def test_reduction_must_be_known(value):
    with pytest.raises(ValueError, match=f'must be "mean" or "sum". Received: reduction={value!r}'):
        GradientAccumulateOptimizer("sgd", 2, reduction=value)


def test_across_steps_the_logged_loss_is_the_mean_over_tokens():
    rng = np.random.default_rng(0)
    x = rng.integers(1, 11, size=(12, 5))
    x[np.arange(5) >= np.linspace(1, 5, 12).astype(int)[:, np.newaxis]] = 0
    y = rng.normal(size=(12, 5, 1)).astype("float32")
    keras.utils.set_random_seed(1)
    net = keras.Sequential([keras.Input((5,)), keras.layers.Embedding(11, 4, mask_zero=True)])
    net.add(keras.layers.Dense(1))
    net.compile(loss="mse")
    expected = net.evaluate(x, y, batch_size=12, verbose=0)
    model = GradientAccumulateModel(model=net, accum_steps=6)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    logs = model.fit(x, y, batch_size=2, shuffle=False, verbose=0).history
    assert logs["loss"][0] == pytest.approx(expected, rel=1e-6)
    naive = np.mean([net.evaluate(x[i : i + 2], y[i : i + 2], verbose=0) for i in range(0, 12, 2)])
    assert abs(naive - expected) > 1e-3


def _segmenter():
    """An image for an image, and a number: outputs of different shapes and denominators."""
    keras.utils.set_random_seed(2)
    inputs = keras.Input((6, 6, 2))
    hidden = keras.layers.Conv2D(3, 3, padding="same", activation="tanh")(inputs)
    image = keras.layers.Conv2D(1, 1, name="image", kernel_regularizer="l2")(hidden)
    number = keras.layers.Dense(1, name="number")(keras.layers.Flatten()(hidden))
    return keras.Model(inputs, {"image": image, "number": number})


def _train_segmenter(model, batch_size, reductions, **arguments):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(44, 6, 6, 2))
    y = {"image": rng.normal(size=(44, 6, 6, 1)), "number": rng.normal(size=(44, 1))}
    weights = {"image": rng.uniform(size=(44, 6, 6)), "number": rng.uniform(size=44)}
    weights["image"][8:12] = weights["number"][:4] = 0.0  # whole micro-batches do not count
    losses = {
        name: keras.losses.MeanSquaredError(reduction=reduction)
        for name, reduction in zip(("image", "number"), reductions, strict=True)
    }
    model.compile(
        keras.optimizers.Adam(0.02),
        losses,
        loss_weights={"image": 0.7, "number": 0.1},
        **arguments,
    )
    model.fit(
        x, y, batch_size=batch_size, sample_weight=weights, epochs=4, shuffle=False, verbose=0
    )
    return model.get_weights()


PAIRS = [
    ("sum_over_batch_size", "mean_with_sample_weight"),
    ("mean_with_sample_weight", "sum"),
    ("sum", "mean"),
]


@functools.cache
def _large_segmenter(reductions):
    return _train_segmenter(_segmenter(), 16, reductions)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "reductions, execution",
    each_in_turn(PAIRS, EXECUTIONS, core=PAIRS[:1], fast=PAIRS[:1]),
    indirect=["execution"],
)
def test_images_and_numbers_of_different_denominators_are_exact(mode, reductions, execution):
    model, _, size = in_way(mode, _segmenter(), steps=4)
    weights = _train_segmenter(model, size, reductions, **execution)
    assert difference(weights, _large_segmenter(reductions)) < 1e-12


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("reductions, mode", each_in_turn(PAIRS, MODES, core=PAIRS[:1]))
def test_different_denominators_are_exact_on_replicas(mode, reductions):
    if mode == "micro_batch_size" and KERAS < (3, 10):
        pytest.skip("metrics of Keras before 3.10 synchronise replicas, which a loop may not")
    large = _large_segmenter(reductions)
    # Within a step each replica cuts 8 examples into micro-batches of 3, 3 and 2.
    value, size = {"accum_steps": (4, 4), "micro_batch_size": (3, 16)}[mode]
    with mirrored().scope():
        model = GradientAccumulateModel(model=_segmenter(), **{mode: value})
        weights = _train_segmenter(model, size, reductions)
    assert difference(weights, large) < 1e-12


def _two_heads(masked=(), losses=("mean", "mean"), regularizer=None):
    def loss(reduction):
        return keras.losses.MeanSquaredError(reduction=reduction)

    inputs = keras.Input((5,))
    outputs = []
    for name in ("a", "b")[: len(losses)]:
        table = keras.layers.Embedding(
            9, 2, mask_zero=name in masked, embeddings_regularizer=regularizer
        )
        outputs.append(keras.layers.Dense(1, name=name)(table(inputs)))
    model = keras.Model(inputs, outputs)
    return model, [loss(reduction) for reduction in losses]


@pytest.mark.parametrize(
    "arguments, weighted, within, across",
    [
        ({}, False, 1, 1),
        ({"regularizer": "l2"}, False, 1, 1),
        ({"masked": "a", "losses": ["mean"]}, False, 1, 1),
        ({"masked": "a", "losses": ["mean"], "regularizer": "l2"}, False, 2, 2),
        ({"masked": "ab"}, False, 2, 2),
        ({"losses": ["mean_with_sample_weight", "mean"]}, True, 2, 2),
        ({"losses": ["mean", "sum"]}, False, 1, 2),
    ],
)
def test_gradient_buffers_are_as_many_as_the_page_says(arguments, weighted, within, across):
    x = tf.constant([[1, 2, 0, 0, 0], [3, 4, 5, 0, 0]])
    known = Effective(total=tf.constant(4.0, tf.float64), weighed=None)
    for effective, expected in ((known, within), (None, across)):
        net, losses = _two_heads(**arguments)
        mode = {"accum_steps": 2} if effective is None else {"micro_batch_size": 2}
        model = GradientAccumulateModel(model=net, **mode)
        model.compile("sgd", losses)
        y = [tf.ones((2, 5, 1))] * len(losses)
        data = (x, y, [tf.ones((2, 5))] * len(losses) if weighted else None)
        model._symbolic_build(data_batch=data)
        assert len(run_micro_step(model, data, effective).contributions) == expected
