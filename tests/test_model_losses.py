"""Every micro-batch counts for what Keras divided its loss by."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateModel
from tests.oracle import (
    EFFECTIVE,
    MICRO,
    MODES,
    assert_trains_as_large_batch,
    dense_model,
    difference,
    in_way,
    regression_data,
    state_of,
)

EXAMPLES, TIME = 29, 6
WITHIN = ["micro_batch_size"]

TOLERANCE = 1e-12


@pytest.fixture(autouse=True)
def _exact(float64):
    # Older Keras adds its epsilon to the number of the tokens that a mask leaves.
    previous = keras.config.epsilon()
    keras.config.set_epsilon(1e-30)
    yield
    keras.config.set_epsilon(previous)


def tokens():
    """Sequences of 0 to 6 tokens, padded with 0; the second micro-batch is all padding."""
    rng = np.random.default_rng(2)
    lengths = rng.integers(0, TIME + 1, EXAMPLES)
    lengths[MICRO : 2 * MICRO] = 0
    values = rng.integers(1, 9, (EXAMPLES, TIME))
    return np.where(np.arange(TIME) < lengths[:, np.newaxis], values, 0)


def targets(units=1):
    return np.random.default_rng(3).normal(size=(EXAMPLES, TIME, units))


def token_model(mask=True, regularizer=None):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((TIME,), dtype="int32")
    hidden = keras.layers.Embedding(9, 4, mask_zero=mask)(inputs)
    hidden = keras.layers.Dense(5, "tanh")(hidden)
    return keras.Model(inputs, keras.layers.Dense(1, kernel_regularizer=regularizer)(hidden))


def mse(reduction):
    # The sum of a batch's losses is as much larger as the batch: so must the steps be smaller.
    rate = 0.001 if reduction == "sum" else 0.05
    return {
        "optimizer": keras.optimizers.SGD(rate, momentum=0.9),
        "loss": keras.losses.MeanSquaredError(reduction=reduction),
    }


@pytest.mark.parametrize(
    "reduction, weights, mask",
    [
        ("sum_over_batch_size", None, True),
        ("sum_over_batch_size", "timesteps", True),
        ("mean_with_sample_weight", None, True),
        ("mean_with_sample_weight", "examples", True),
        ("mean_with_sample_weight", "timesteps", True),
        ("mean_with_sample_weight", "timesteps", False),
        ("sum", "timesteps", True),
    ],
)
def test_reductions_weights_and_masks_count_as_in_the_large_batch(reduction, weights, mask):
    rng = np.random.default_rng(4)
    shape = {None: (), "examples": (EXAMPLES, 1), "timesteps": (EXAMPLES, TIME)}[weights]
    assert_trains_as_large_batch(
        lambda: token_model(mask),
        tokens(),
        targets(),
        sample_weight=None if weights is None else rng.uniform(0.1, 3.0, shape),
        compile_with=lambda: mse(reduction),
        tolerance=TOLERANCE,
        same_logs=WITHIN,
    )


@pytest.mark.parametrize("execution", [{"run_eagerly": True}, {"jit_compile": True}], ids=str)
def test_weighted_timesteps_under_a_mask_count_in_any_execution(execution):
    assert_trains_as_large_batch(
        token_model,
        tokens(),
        targets(),
        sample_weight=np.random.default_rng(4).uniform(0.1, 3.0, (EXAMPLES, TIME)),
        compile_with=lambda: mse("mean_with_sample_weight") | execution,
        tolerance=TOLERANCE,
        same_logs=WITHIN,
    )


@pytest.mark.parametrize("reduction", ["mean", "mean_with_sample_weight", "sum"])
def test_examples_without_weight_do_not_count(reduction):
    # A micro-batch without weight, and then an effective batch.
    x, y, weights = regression_data(EXAMPLES, dtype="float64")
    weights[:MICRO] = 0.0
    weights[EFFECTIVE : 2 * EFFECTIVE] = 0.0
    model = assert_trains_as_large_batch(
        dense_model,
        x,
        y,
        sample_weight=weights,
        compile_with=lambda: mse(reduction),
        tolerance=TOLERANCE,
        same_logs=WITHIN,
    )
    assert np.all(np.isfinite(model.weights[0]))


def test_a_masking_layer_and_a_recurrent_one_count_as_in_the_large_batch():
    def make_model():
        keras.utils.set_random_seed(1)
        inputs = keras.Input((TIME, 2))
        hidden = keras.layers.Masking()(inputs)
        hidden = keras.layers.SimpleRNN(4, return_sequences=True)(hidden)
        return keras.Model(inputs, keras.layers.Dense(1)(hidden))

    x = targets(2) * (tokens() > 0)[..., np.newaxis]
    assert_trains_as_large_batch(
        make_model,
        x,
        targets(),
        compile_with=lambda: mse("sum_over_batch_size"),
        tolerance=TOLERANCE,
        same_logs=WITHIN,
    )


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight"])
def test_batches_of_other_lengths_count_for_their_elements(reduction):
    """Across steps nothing is known of the other micro-batches, not even how long they are."""
    rng = np.random.default_rng(5)
    lengths = (3, 6, 1)
    batches = [(rng.normal(size=(4, n, 2)), rng.normal(size=(4, n, 1))) for n in lengths]
    # The same elements in one batch, and a mask in place of the lengths.
    x, y, weights = np.zeros((12, 6, 2)), np.zeros((12, 6, 1)), np.zeros((12, 6))
    for i, (batch_x, batch_y) in enumerate(batches):
        rows = slice(4 * i, 4 * i + 4)
        x[rows, : lengths[i]], y[rows, : lengths[i]] = batch_x, batch_y
        weights[rows, : lengths[i]] = 1.0

    def make_model():
        keras.utils.set_random_seed(1)
        inputs = keras.Input((None, 2))
        hidden = keras.layers.Dense(4, "tanh")(inputs)
        return keras.Model(inputs, keras.layers.Dense(1)(hidden))

    plain = make_model()
    plain.compile(**mse("mean_with_sample_weight"))
    plain.train_on_batch(x, y, weights)
    signature = (tf.TensorSpec((None, None, 2), x.dtype), tf.TensorSpec((None, None, 1), x.dtype))
    data = tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=signature)
    model, *_ = in_way("accum_steps", make_model())
    model.compile(**mse(reduction))
    model.fit(data.apply(tf.data.experimental.assert_cardinality(3)), verbose=0)
    assert difference(state_of(model.weights), state_of(plain.weights)) < TOLERANCE


@pytest.mark.fast
def test_outputs_may_have_different_denominators():
    def make_model():
        model = token_model()
        pooled = keras.ops.mean(model.layers[-2].output, axis=1)
        outputs = {
            "tokens": keras.layers.Dense(1, name="tokens")(model.layers[-2].output),
            "sums": keras.layers.Dense(2, name="sums")(pooled),
            "means": keras.layers.Dense(1, name="means")(pooled),
        }
        return keras.Model(model.inputs[0], outputs)

    rng = np.random.default_rng(6)
    assert_trains_as_large_batch(
        make_model,
        tokens(),
        {
            "tokens": targets(),
            "sums": targets(2)[:, 0],
            "means": targets()[:, 1],
        },
        sample_weight={
            name: rng.uniform(0.1, 3.0, (EXAMPLES, 1)) for name in ("tokens", "sums", "means")
        },
        compile_with=lambda: {
            "optimizer": keras.optimizers.SGD(0.02, momentum=0.9),
            "loss": {
                "tokens": "mse",
                "sums": keras.losses.MeanAbsoluteError(reduction="sum"),
                "means": keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"),
            },
            "loss_weights": {"tokens": 2.0, "sums": 0.05, "means": 0.7},
        },
        tolerance=TOLERANCE,
        same_logs=(),
    )


def regularised(**kwargs):
    return dense_model(kernel_regularizer=keras.regularizers.L2(0.1), **kwargs)


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight", "sum"])
def test_regularisers_count_once(reduction):
    x, y, weights = regression_data(EXAMPLES, dtype="float64")
    assert_trains_as_large_batch(
        regularised,
        x,
        y,
        sample_weight=weights,
        compile_with=lambda: mse(reduction),
        tolerance=TOLERANCE,
        same_logs=WITHIN,
    )


@pytest.mark.fast
def test_regularisers_count_once_beside_masks():
    assert_trains_as_large_batch(
        lambda: token_model(regularizer=keras.regularizers.L2(0.1)),
        tokens(),
        targets(),
        compile_with=lambda: mse("sum_over_batch_size"),
        tolerance=TOLERANCE,
        same_logs=WITHIN,
    )


@pytest.mark.fast
def test_losses_that_layers_add_count_for_the_examples():
    class Spread(keras.layers.Layer):
        def call(self, x):
            self.add_loss(0.3 * keras.ops.mean(keras.ops.sum(x**2, axis=-1)))
            return x

    def make_model():
        model = dense_model()
        return keras.Sequential([model.layers[0], Spread(), model.layers[1]])

    x, y, weights = regression_data(EXAMPLES, dtype="float64")
    assert_trains_as_large_batch(
        make_model,
        x,
        y,
        sample_weight=weights,
        compile_with=lambda: mse("mean_with_sample_weight"),
        tolerance=TOLERANCE,
        same_logs=WITHIN,
    )


class Quartic(keras.losses.Loss):
    def call(self, y_true, y_pred):
        return keras.ops.mean((y_true - y_pred) ** 4, axis=-1)


@pytest.mark.filterwarnings("ignore:The loss .* reduces to one number:UserWarning")  # a mean
@pytest.mark.parametrize(
    "make_loss",
    [
        lambda: lambda y, y_pred: keras.ops.abs(y - y_pred),
        lambda: lambda y, y_pred: keras.ops.mean((y - y_pred) ** 2),
        Quartic,
    ],
    ids=["elements", "scalar", "class"],
)
def test_losses_of_ones_own_count_as_in_the_large_batch(make_loss):
    x, y, _ = regression_data(EXAMPLES, dtype="float64")
    assert_trains_as_large_batch(
        dense_model,
        x,
        y / 4,
        compile_with=lambda: {"optimizer": keras.optimizers.SGD(0.05), "loss": make_loss()},
        tolerance=TOLERANCE,
    )


@pytest.mark.fast
@pytest.mark.parametrize("takes_training", [False, True])
def test_compute_loss_may_be_overridden(takes_training):
    def penalised(self, loss, y_pred):
        return loss + 0.1 * keras.ops.mean(y_pred**4)

    def make(base):
        class Own(base):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.inner = dense_model()

            def call(self, inputs):
                return self.inner(inputs)

            if takes_training:

                def compute_loss(self, x, y, y_pred, sample_weight, training=True):
                    loss = super().compute_loss(x, y, y_pred, sample_weight, training)
                    return penalised(self, loss, y_pred)

            else:

                def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
                    loss = super().compute_loss(x, y, y_pred, sample_weight)
                    return penalised(self, loss, y_pred)

        return Own

    x, y, weights = regression_data(EXAMPLES, dtype="float64")
    plain = make(keras.Model)()
    models = [
        (plain, EFFECTIVE),
        (make(GradientAccumulateModel)(accum_steps=EFFECTIVE // MICRO), MICRO),
        (make(GradientAccumulateModel)(micro_batch_size=MICRO), EFFECTIVE),
    ]
    for model, batch_size in models:
        model.compile(**mse("mean_with_sample_weight"))
        model.fit(x, y, batch_size, 2, 0, sample_weight=weights, shuffle=False)
        assert difference(state_of(model.weights), state_of(plain.weights)) < TOLERANCE
    without = dense_model()
    without.compile(**mse("mean_with_sample_weight"))
    without.fit(x, y, EFFECTIVE, 2, 0, sample_weight=weights, shuffle=False)
    assert difference(state_of(without.weights), state_of(plain.weights)) > 1e-3


@pytest.mark.fast
def test_a_loss_that_is_not_reduced_is_refused(mode):
    model, _, batch_size = in_way(mode, dense_model())
    loss = keras.losses.MeanSquaredError(reduction=None, name="per_example")
    model.compile("sgd", loss=loss)
    x, y, _ = regression_data(EFFECTIVE)
    with pytest.raises(ValueError, match="'per_example' with reduction=None"):
        model.fit(x, y, batch_size, verbose=0)


def test_a_variable_that_no_loss_reaches_is_left_alone():
    def make_model():
        model = dense_model()
        return keras.Model(
            model.inputs[0], [model.outputs[0], keras.layers.Dense(1)(model.inputs[0])]
        )

    x, y, _ = regression_data(EXAMPLES, dtype="float64")
    model = make_model()
    for mode in MODES:
        model, _, batch_size = in_way(mode, make_model())
        model.compile(keras.optimizers.AdamW(0.01, weight_decay=0.5), loss=["mse", None])
        before = state_of(model.trainable_variables)
        with pytest.warns(UserWarning, match="Gradients do not exist"):
            model.fit(x, [y, y], batch_size, verbose=0)
        moved = [
            difference([now], [then])
            for now, then in zip(state_of(model.trainable_variables), before, strict=True)
        ]
        assert [m > 0 for m in moved] == [True] * 4 + [False] * 2
