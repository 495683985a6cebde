"""Losses that no compiled loss measures: `add_loss`, regularisers, one's own `compute_loss`."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateModel, GradientCheckpoint
from tests.oracle import (
    EFFECTIVE,
    KERAS,
    MICRO,
    assert_trains_as_large_batch,
    dense_model,
    difference,
    in_way,
    mirrored,
    regression_data,
    state_of,
)

EXAMPLES = 29
WITHIN = ["micro_batch_size"]
TOLERANCE = 1e-12

pytestmark = pytest.mark.usefixtures("float64")


def data():
    return regression_data(EXAMPLES, dtype="float64")[:2]


class Adds(keras.layers.Layer):
    """Adds a loss of its input, reduced as `kind` says."""

    def __init__(self, kind, **kwargs):
        super().__init__(**kwargs)
        self.kind = kind

    def call(self, x):
        squares = 0.03 * keras.ops.square(x - 1.0)
        self.add_loss(
            {
                "elements": squares,
                "examples": keras.ops.sum(squares, axis=-1),
                "column": keras.ops.sum(squares, axis=-1, keepdims=True),
                "sum_of_shape_1": keras.ops.reshape(keras.ops.sum(squares), (1,)),
                "float32": keras.ops.cast(squares, "float32"),
                "mean": keras.ops.mean(squares),
                "sum": keras.ops.sum(squares),
                "list": [keras.ops.mean(squares), squares, keras.ops.sum(squares, axis=-1)],
            }[self.kind]
        )
        return x

    def compute_output_shape(self, input_shape):
        return input_shape


class Absolute(keras.regularizers.Regularizer):
    """A regulariser that leaves its values unreduced, as Keras accepts it."""

    def __call__(self, weights):
        return 0.05 * keras.ops.abs(weights)


def adding_model(kind, regularizer=None, wrap=None):
    keras.utils.set_random_seed(1)
    layer = Adds(kind)
    inputs = keras.Input((5,))
    hidden = keras.layers.Dense(4, "tanh", kernel_regularizer=regularizer)(inputs)
    hidden = (layer if wrap is None else wrap(layer))(hidden)
    return keras.Model(inputs, keras.layers.Dense(1)(hidden))


def sgd_and(loss, **kwargs):
    return {"optimizer": keras.optimizers.SGD(0.05, momentum=0.9), "loss": loss, **kwargs}


class Endpoint(keras.layers.Layer):
    """Adds the loss of predictions and targets, as the last layer of many scripts does."""

    def call(self, x, y):
        self.add_loss(0.1 * tf.square(x - y))
        return x


def endpoint_model():
    keras.utils.set_random_seed(1)
    inputs = keras.Input((3,))
    hidden = keras.layers.Dense(3)(inputs)
    return keras.Model(inputs, Endpoint()(hidden, inputs))


def test_a_loss_per_element_is_summed(execution):
    x = np.random.default_rng(0).normal(size=(EXAMPLES, 3))
    assert_trains_as_large_batch(
        endpoint_model,
        x,
        compile_with=lambda: sgd_and(None, **execution),
        tolerance=TOLERANCE,
        same_logs=WITHIN,
    )


KINDS = ["elements", "examples", "column", "sum_of_shape_1", "mean", "list"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_rank_says_whether_a_loss_is_summed(kind):
    # Beside a regulariser, which counts once, and a loss with a denominator of its own.
    x, y, weights = regression_data(EXAMPLES, dtype="float64")
    loss = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
    assert_trains_as_large_batch(
        lambda: adding_model(kind, regularizer=Absolute()),
        x,
        y,
        sample_weight=weights,
        compile_with=lambda: sgd_and(loss),
        tolerance=TOLERANCE,
        same_logs=WITHIN,
    )


def test_a_scalar_that_is_a_sum_cannot_be_known_from_a_mean():
    with pytest.raises(AssertionError, match="weights differ"):
        assert_trains_as_large_batch(
            lambda: adding_model("sum"), *data(), compile_with=lambda: sgd_and("mse")
        )


def nested(layer):
    inputs = keras.Input((4,))
    return keras.Model(inputs, layer(keras.layers.Dense(4)(inputs)))


def called_twice(layer):
    return lambda x: layer(keras.layers.Dense(4)(layer(x)))


@pytest.mark.parametrize("wrap", [nested, called_twice, GradientCheckpoint])
def test_losses_are_summed_wherever_they_are_added(wrap):
    assert_trains_as_large_batch(
        lambda: adding_model("list", wrap=wrap),
        *data(),
        compile_with=lambda: sgd_and("mse"),
        tolerance=TOLERANCE,
        same_logs=WITHIN,
    )


def net(normalized=False):
    keras.utils.set_random_seed(1)
    norm = [keras.layers.BatchNormalization()] if normalized else []
    layers = [keras.Input((5,)), keras.layers.Dense(4), *norm, keras.layers.Dense(1)]
    return keras.Sequential(layers)


class Summing:
    """Its `compute_loss` adds a mean, and a sum over the examples."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        self.add_loss(0.02 * keras.ops.square(y - y_pred))
        loss = super().compute_loss(x, y, y_pred, sample_weight)
        return loss + 0.1 * keras.ops.mean(y_pred**4)


class SummingAccumulateModel(Summing, GradientAccumulateModel):
    pass


class SummingModel(Summing, keras.Model):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def call(self, x, training=None):
        return self.model(x, training=training)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(
    "arguments, size",
    [
        ({"accum_steps": EFFECTIVE // MICRO}, MICRO),
        ({"micro_batch_size": MICRO}, EFFECTIVE),
        ({"micro_batch_size": MICRO, "batch_norm": "exact"}, EFFECTIVE),
    ],
    ids=["accum_steps", "micro_batch_size", "exact"],
)
def test_compute_loss_can_add_what_is_summed(arguments, size, eager):
    x, y = data()
    normalized = "batch_norm" in arguments
    plain = SummingModel(net(normalized))
    model = SummingAccumulateModel(model=net(normalized), **arguments)
    logs = []
    for trained, batch_size in ((plain, EFFECTIVE), (model, size)):
        trained.compile(**sgd_and("mse", run_eagerly=eager))
        logs.append(trained.fit(x, y, batch_size, 2, verbose=0, shuffle=False).history["loss"])
    assert difference(state_of(model.weights), state_of(plain.weights)) < TOLERANCE
    if size == EFFECTIVE:
        np.testing.assert_allclose(*logs, rtol=TOLERANCE)


class CTC(keras.layers.Layer):
    """Adds the CTC loss of texts of unequal lengths, as the captcha example of keras.io does."""

    def call(self, labels, outputs):
        lengths = keras.ops.sum(keras.ops.cast(labels > 0, "int32"), axis=-1)
        steps = keras.ops.full_like(lengths, outputs.shape[1])
        loss = keras.ops.ctc_loss(labels, outputs, lengths, steps)
        self.add_loss(keras.ops.cast(loss, "float64")[:, np.newaxis])
        return outputs


def test_a_ctc_endpoint_layer_is_summed():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 5, (EXAMPLES, 1))
    labels = np.where(np.arange(4) < lengths, rng.integers(1, 6, (EXAMPLES, 4)), 0)
    images = rng.normal(size=(EXAMPLES, 9, 3))

    def make_model():
        keras.utils.set_random_seed(1)
        image = keras.Input((9, 3), name="image")
        label = keras.Input((4,), dtype="int32", name="label")
        # TensorFlow's CTC loss is float32.
        outputs = keras.layers.Dense(6, dtype="float32")(image)
        return keras.Model({"image": image, "label": label}, CTC()(label, outputs))

    assert_trains_as_large_batch(
        make_model,
        {"image": images, "label": labels},
        compile_with=lambda: {"optimizer": keras.optimizers.SGD(0.002, momentum=0.9)},
        tolerance=2e-6,
        same_logs=WITHIN,
    )


@pytest.mark.parametrize("kind", ["examples", "mean"])
def test_replicas_count_as_in_plain_keras_on_the_same_replicas(mode, kind):
    """Keras divides what `add_loss` was given by the number of replicas, a sum as well."""
    if mode == "micro_batch_size" and KERAS < (3, 10):
        pytest.skip("metrics of Keras before 3.10 synchronise replicas, which a loop may not")
    x, y, _ = regression_data(2 * EFFECTIVE, dtype="float64")
    strategy = mirrored()
    trained, logs = [], []
    for way in ("plain", mode):
        with strategy.scope():
            model = adding_model(kind, regularizer=Absolute())
            model, _, size = in_way(way, model, steps=2, micro=EFFECTIVE // 2, replicas=2)
            model.compile(**sgd_and("mse"))
        logs.append(model.fit(x, y, size, 2, verbose=0, shuffle=False).history["loss"])
        trained.append(state_of(model.weights))
    assert difference(*trained) < TOLERANCE
    if mode == "micro_batch_size":
        np.testing.assert_allclose(*logs, rtol=TOLERANCE)


@pytest.mark.parametrize("half", [False, True])
def test_a_scaled_loss_is_summed(half):
    if half:  # Keras itself adds no float16 loss to a float32 one.
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("mixed_float16")

    def scaled_sgd():
        sgd = keras.optimizers.SGD(0.05)
        return keras.optimizers.LossScaleOptimizer(sgd, initial_scale=2.0**8)

    assert_trains_as_large_batch(
        lambda: adding_model("float32" if half else "examples"),
        *data(),
        compile_with=lambda: {"optimizer": scaled_sgd(), "loss": "mse"},
        tolerance=2e-3 if half else TOLERANCE,
        same_logs=WITHIN,
    )


@pytest.mark.parametrize(
    "own, execution",
    [(False, {"jit_compile": True}), (True, {"run_eagerly": True})],
    ids=["l2-jit", "unreduced-eager"],
)
def test_activity_regularisers_count_as_the_version_of_keras_divides_them(own, execution):
    """Keras 3.14 and newer divide them by the examples, older ones add them up."""

    def make_model():
        keras.utils.set_random_seed(1)
        inputs = keras.Input((5,))
        regularizer = (lambda v: 0.02 * keras.ops.abs(v)) if own else keras.regularizers.L2(0.02)
        hidden = keras.layers.Dense(8, "tanh", activity_regularizer=regularizer)(inputs)
        outputs = [
            keras.layers.Dense(1, name=name, activity_regularizer=regularizer)(hidden)
            for name in ("a", "b")
        ]
        return keras.Model(inputs, outputs)

    x, y = data()
    model = assert_trains_as_large_batch(
        make_model,
        x,
        [y, -y],
        compile_with=lambda: {
            "optimizer": keras.optimizers.Adam(0.01),
            "loss": ["mse", "mse"],
            **execution,
        },
        tolerance=TOLERANCE,
        same_logs=WITHIN,
    )
    regularizer = model.layers[1].activity_regularizer
    assert callable(regularizer) if own else isinstance(regularizer, keras.regularizers.L2)


class OfAnotherShape(keras.layers.Layer):
    def call(self, x):
        self.add_loss(keras.ops.mean(keras.ops.square(x), axis=0))  # one for each feature
        return x


@pytest.mark.parametrize("eager", [False, True])
def test_a_shape_without_the_examples_is_told(mode, eager):
    model = keras.Sequential([keras.Input((5,)), OfAnotherShape(), keras.layers.Dense(1)])
    model, _, size = in_way(mode, model)
    model.compile("sgd", "mse", run_eagerly=eager)
    x, y, _ = regression_data(EFFECTIVE, dtype="float64")
    with pytest.warns(UserWarning, match=r"Received: shape \(5,\) for a micro-batch of 4 examples"):
        model.fit(x, y, size, verbose=0)


def test_an_unknown_rank_is_refused():
    class Unknown(keras.layers.Layer):
        def call(self, x):
            self.add_loss(tf.numpy_function(lambda v: v, [x], x.dtype))
            return x

    model, _, size = in_way("accum_steps", keras.Sequential([Unknown(), dense_model()]))
    model.compile("sgd", "mse")
    x, y, _ = regression_data(EFFECTIVE, dtype="float64")
    with pytest.raises(ValueError, match=r"must have a known rank.*tf\.ensure_shape"):
        model.train_on_batch(x[:size], y[:size])


def returning(loss=None, weight=None):
    class Returning(GradientAccumulateModel):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return keras.ops.mean(y_pred) if loss is None else loss(y_pred)

        def micro_batch_weight(self, x, y, sample_weight):
            return None if weight is None else weight(y)

    return Returning


LOSSES = {
    "string": (lambda y: "mse", TypeError, r"scalar tensor of floats. Received: 'mse' \(of type"),
    "list": (lambda y: [y], TypeError, r"of type list\). Compute it with"),
    "integer": (lambda y: tf.shape(y)[0], TypeError, "scalar tensor of floats. Received: .*int32"),
    "vector": (lambda y: y[:, 0], ValueError, r"tensor of shape \(4,\).*keras.ops.mean\(loss\)"),
}
WEIGHTS = {
    "string": (lambda y: "4", TypeError, "finite scalar >= 0, or None.* Received: '4'"),
    "complex": (lambda y: 4j, TypeError, r"Received: 4j \(of type complex\)"),
    "vector": (lambda y: y[:, 0], ValueError, r"of shape \(4,\). Return what .* divided by"),
    "negative": (lambda y: -1.0, ValueError, "Received: -1.0"),
    "nan": (lambda y: np.float32("nan"), ValueError, r"Received: .*nan"),
}


@pytest.mark.parametrize(
    "argument, value, error, message",
    [("loss", *case) for case in LOSSES.values()]
    + [("weight", *case) for case in WEIGHTS.values()],
    ids=[f"loss_{name}" for name in LOSSES] + [f"weight_{name}" for name in WEIGHTS],
)
def test_what_is_no_loss_or_weight_is_refused(mode, argument, value, error, message):
    cls = returning(**{argument: value})
    model, _, batch_size = in_way(mode, dense_model(), cls=cls)
    model.compile("sgd")
    x, y, _ = regression_data(EFFECTIVE, dtype="float64")
    with pytest.raises(error, match=message):
        model.fit(x, y, batch_size, verbose=0)


@pytest.mark.parametrize("value", [4, 4.0, np.float32(4), None])
def test_numbers_are_weights(value):
    model = returning(weight=lambda y: value)(model=dense_model(), accum_steps=2)
    model.compile("sgd")
    x, y, _ = regression_data(EFFECTIVE, dtype="float64")
    assert np.isfinite(model.fit(x, y, 4, verbose=0).history["loss"][0])
