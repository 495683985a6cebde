"""`evaluate`, `predict` and validation in micro-batches: the plain model's numbers."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateModel
from tests.oracle import (
    EFFECTIVE,
    EXECUTIONS,
    MICRO,
    dense_model,
    difference,
    each_in_turn,
    in_way,
    mirrored,
    momentum_and_mse,
    regression_data,
)

EXAMPLES = 30  # two effective batches and a partial one, whose last micro-batch is smaller


def tokens():
    """Integer tokens (examples, 6) with padding, targets and weights of each token."""
    rng = np.random.default_rng(3)
    x = rng.integers(1, 9, (EXAMPLES, 6))
    x[np.arange(6) >= rng.integers(1, 7, EXAMPLES)[:, np.newaxis]] = 0
    return x, rng.normal(size=(EXAMPLES, 6, 1)), rng.uniform(0.2, 2.0, (EXAMPLES, 6))


def masked_model():
    inputs = keras.Input((6,), dtype="int32")
    hidden = keras.layers.Embedding(9, 4, mask_zero=True)(inputs)
    return keras.Model(inputs, keras.layers.Dense(1)(hidden))


class AddsLosses(keras.layers.Layer):
    """Adds a scalar, which is a mean, and a loss for each example, which is a sum."""

    def call(self, x):
        self.add_loss(keras.ops.mean(x**2))
        self.add_loss(keras.ops.sum(keras.ops.abs(x), axis=-1))
        return x


def adding_model():
    inputs = keras.Input((5,))
    hidden = keras.layers.Dense(
        4, "tanh", kernel_regularizer="l2", activity_regularizer=keras.regularizers.L1(0.1)
    )(inputs)
    hidden = keras.layers.Dropout(0.5)(AddsLosses()(hidden))  # which does nothing here
    return keras.Model(inputs, keras.layers.Dense(1)(hidden))


def two_outputs():
    inputs = keras.Input((5,))
    hidden = keras.layers.Dense(8, "tanh")(inputs)
    kind = keras.layers.Dense(3, "softmax", name="kind")(hidden)
    value = keras.layers.Dense(1, name="value")(hidden)
    return keras.Model(inputs, {"kind": kind, "value": value})


def f1(y_true, y_pred):
    true, found = y_true > 0, y_pred > 0
    hits = keras.ops.sum(keras.ops.cast(keras.ops.logical_and(true, found), y_pred.dtype))
    both = keras.ops.sum(keras.ops.cast(true, y_pred.dtype) + keras.ops.cast(found, y_pred.dtype))
    return 2.0 * hits / both


def mean_error(y_true, y_pred):
    return keras.ops.mean(keras.ops.abs(y_true - y_pred), axis=-1)


mean_error.additive = False  # so that the outputs are kept, and their mask


def of_regression(model, **compile_with):
    x, y, weights = regression_data(EXAMPLES, dtype="float64")
    return model, (x, y, weights), {"loss": "mse", **compile_with}


def of_two_outputs():
    x, y, weights = regression_data(EXAMPLES, dtype="float64")
    targets = {"kind": np.digitize(y[:, 0], [-1.0, 1.0]), "value": y}
    compile_with = {
        "loss": {
            "kind": keras.losses.SparseCategoricalCrossentropy(reduction="mean_with_sample_weight"),
            "value": keras.losses.MeanAbsoluteError(reduction="sum"),
        },
        "loss_weights": {"kind": 2.0, "value": 0.3},
        "metrics": {"kind": ["accuracy"], "value": [f1]},
        "weighted_metrics": {"value": ["mse"]},
    }
    data = x, targets, {"kind": weights, "value": weights**2}
    return two_outputs, data, compile_with


# The model, (x, y, sample_weight) and arguments of `compile`.
CASES = {
    "plain": lambda: of_regression(dense_model, metrics=["mae", f1]),
    "mask": lambda: (
        masked_model,
        tokens(),
        {"loss": "mse", "metrics": ["mae", mean_error], "weighted_metrics": ["mse", mean_error]},
    ),
    "added losses": lambda: of_regression(adding_model),
    "two outputs": of_two_outputs,
}


def evaluated(model, data, compile_with, batch_size=EFFECTIVE):
    x, y, weights = data
    keras.utils.set_random_seed(7)
    model.compile(**compile_with)
    return model.evaluate(x, y, batch_size, 0, sample_weight=weights, return_dict=True)


def wrapped(model):
    return in_way("micro_batch_size", model)[0]


@pytest.mark.parametrize(
    ("name", "how"), each_in_turn(list(CASES), EXECUTIONS, core=("mask",), fast=("mask",))
)
def test_evaluate_gives_the_plain_models_logs(name, how, float64):
    make_model, data, compile_with = CASES[name]()
    model = make_model()
    expected = evaluated(model, data, compile_with)
    logs = evaluated(wrapped(model), data, {**compile_with, **EXECUTIONS[how]})
    assert list(logs) == list(expected)
    assert list(logs.values()) == pytest.approx(list(expected.values()), rel=1e-12, abs=1e-12)
    # Batches of a micro-batch give others, or this test could not fail.
    others = evaluated(model, data, compile_with, MICRO)
    assert difference(others.values(), expected.values()) > 1e-3


def correlation(y_true, y_pred):
    """A loss that compares examples: one minus their correlation, and a hinge over pairs."""
    true, found = y_true - keras.ops.mean(y_true), y_pred - keras.ops.mean(y_pred)
    scale = keras.ops.sqrt(keras.ops.sum(true**2) * keras.ops.sum(found**2))
    pairs = keras.ops.relu(1.0 - found * keras.ops.transpose(found))
    return 1.0 - keras.ops.sum(true * found) / scale + keras.ops.mean(pairs)


def in_batch_accuracy(y_true, y_pred):
    nearest = keras.ops.argmin(keras.ops.abs(y_pred - keras.ops.transpose(y_true)), axis=1)
    own = keras.ops.arange(keras.ops.shape(y_true)[0], dtype=nearest.dtype)
    return keras.ops.cast(nearest == own, "float32")


@pytest.mark.parametrize("how", EXECUTIONS)
def test_a_loss_that_compares_examples(how, float64):
    make_model, data, _ = of_regression(adding_model)
    compile_with = {"loss": correlation, "metrics": [in_batch_accuracy, f1, "mae"]}
    model = make_model()
    x, y, _ = data
    data = x, y, None
    expected = evaluated(model, data, compile_with)
    ours = GradientAccumulateModel(model=model, micro_batch_size=MICRO, coupled_loss=True)
    logs = evaluated(ours, data, {**compile_with, **EXECUTIONS[how]})
    assert list(logs) == list(expected)
    assert list(logs.values()) == pytest.approx(list(expected.values()), rel=1e-12)
    with pytest.warns(UserWarning, match="coupled_loss=True"):
        others = evaluated(wrapped(model), data, compile_with)
    assert abs(others["loss"] - expected["loss"]) > 1e-3


@pytest.mark.parametrize("coupled_loss", [True, "all_replicas"])
def test_a_loss_that_compares_examples_on_two_replicas(coupled_loss, float64):
    make_model, (x, y, _), _ = of_regression(dense_model)
    # The plain model's loss is of a replica as well, or that of one device.
    on_one, on_two = mirrored(1), mirrored()
    with (on_one if coupled_loss == "all_replicas" else on_two).scope():
        model = make_model()
        model.compile(loss=correlation)
    with on_two.scope():
        ours = GradientAccumulateModel(
            model=make_model(), micro_batch_size=MICRO, coupled_loss=coupled_loss
        )
        ours.compile(loss=correlation)
    expected = model.evaluate(x, y, EXAMPLES, 0)
    assert ours.evaluate(x, y, EXAMPLES, 0) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("how", ["graph", "eager"])
def test_validation_within_fit_is_the_plain_models(how, float64):
    x, y, weights = tokens()
    histories = []
    for wrap in (lambda model: model, wrapped):
        keras.utils.set_random_seed(5)
        model = wrap(masked_model())
        model.compile(keras.optimizers.SGD(0.1), "mse", metrics=[mean_error], **EXECUTIONS[how])
        fit = {"validation_data": (x, y, weights), "shuffle": False, "verbose": 0}
        histories.append(model.fit(x, y, EFFECTIVE, 2, **fit).history)
    expected, history = histories
    assert list(history) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(history[name], values, 1e-12, 1e-12, err_msg=name)


def test_test_on_batch_gives_the_plain_models_logs(float64):
    make_model, (x, y, weights), compile_with = CASES["mask"]()
    model = make_model()
    ours = wrapped(model)
    for m in (model, ours):
        m.compile(**compile_with)
    for examples in (EFFECTIVE, 2 * EFFECTIVE + 1, MICRO - 1):
        data = x[:examples], y[:examples], weights[:examples]
        np.testing.assert_allclose(ours.test_on_batch(*data), model.test_on_batch(*data), 1e-12)


def nested_outputs():
    inputs = {"a": keras.Input((5,), name="a"), "b": keras.Input((2,), name="b")}
    hidden = keras.layers.Dropout(0.5)(keras.layers.Dense(4)(inputs["a"]))
    rows = keras.layers.Reshape((2, 2))(hidden)
    largest = keras.ops.argmax(hidden, axis=-1)  # integers of rank 1
    return keras.Model(inputs, {"z": [hidden, rows], "a": (largest,), "input": inputs["b"]})


@pytest.mark.parametrize("how", EXECUTIONS)
@pytest.mark.parametrize("examples", [EXAMPLES, EFFECTIVE, MICRO - 1])
def test_predict_returns_the_plain_models_outputs(how, examples):
    rng = np.random.default_rng(2)
    x = {
        "a": rng.normal(size=(examples, 5)).astype("float32"),
        "b": np.arange(2.0 * examples, dtype="float32").reshape(-1, 2),
    }
    model = nested_outputs()
    ours = wrapped(model)
    ours.compile(**EXECUTIONS[how])
    expected = model.predict(x, EFFECTIVE, 0)
    for outputs in (ours.predict(x, EFFECTIVE, 0), ours.predict_on_batch(x)):
        keras.tree.assert_same_structure(outputs, expected)
        for mine, plain in zip(
            keras.tree.flatten(outputs), keras.tree.flatten(expected), strict=True
        ):
            assert mine.dtype == plain.dtype
            np.testing.assert_allclose(mine, plain, 1e-6, 1e-6)


class Seen(keras.layers.Layer):
    """The identity; notes how many examples each call gets."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def call(self, x):
        tf.py_function(lambda rows: self.sizes.append(int(rows)), [tf.shape(x)[0]], [])
        return x


def test_evaluate_and_predict_see_micro_batches():
    seen = Seen()
    model = wrapped(keras.Sequential([keras.Input((5,)), seen, keras.layers.Dense(1)]))
    model.compile(**momentum_and_mse())
    x, y, _ = regression_data(10)
    model.evaluate(x, y, EFFECTIVE, 0)
    model.predict(x, EFFECTIVE, 0)
    assert seen.sizes == 2 * [4, 4, 2]
    model.micro_batch_size = 5
    seen.sizes.clear()
    model.evaluate(x, y, EFFECTIVE, 0)
    model.predict(x, EFFECTIVE, 0)
    assert seen.sizes == 2 * [5, 5]


def test_across_steps_a_batch_is_evaluated_in_one_piece():
    seen = Seen()
    model = keras.Sequential([keras.Input((5,)), seen, keras.layers.Dense(1)])
    model = in_way("accum_steps", model)[0]
    model.compile(**momentum_and_mse())
    x, y, _ = regression_data(10)
    model.evaluate(x, y, EFFECTIVE, 0)
    model.predict(x, EFFECTIVE, 0)
    assert seen.sizes == [10, 10]


@pytest.mark.parametrize(
    ("replicas", "how"), [(1, "graph"), (2, "graph"), (2, "eager"), (2, "steps_per_execution")]
)
def test_under_mirrored_strategy_it_is_the_large_batch_on_one_device(replicas, how, float64):
    make_model, data, compile_with = CASES["mask"]()
    model = make_model()
    expected = evaluated(model, data, compile_with, EXAMPLES)
    outputs = model.predict(data[0], EXAMPLES, 0)
    with mirrored(replicas).scope():
        ours = wrapped(make_model())
        ours.set_weights(model.get_weights())
        ours.compile(**compile_with, **EXECUTIONS[how])
    x, y, weights = data
    logs = ours.evaluate(x, y, EXAMPLES, 0, sample_weight=weights, return_dict=True)
    assert list(logs.values()) == pytest.approx(list(expected.values()), rel=1e-12)
    np.testing.assert_allclose(ours.predict(x, EXAMPLES, 0), outputs, 1e-12)


def test_steps_of_a_subclass_go_on_to_work():
    calls = []

    class Own(GradientAccumulateModel):
        def __init__(self):
            super().__init__(micro_batch_size=MICRO)
            self.dense = keras.layers.Dense(1)

        def call(self, x):
            return self.dense(x)

        def test_step(self, data):
            calls.append("test")
            return {"twice": 2.0 * super().test_step(data)["loss"]}

        def predict_step(self, data):
            calls.append("predict")
            return -super().predict_step(data)

    model = Own()
    model.compile(loss="mse")
    x, y, _ = regression_data(10)
    outputs = model.predict(x, EFFECTIVE, 0)  # builds the model
    np.testing.assert_allclose(outputs, -model(x), 1e-6)
    logs = model.evaluate(x, y, EFFECTIVE, 0, return_dict=True)
    assert calls == ["predict", "test"]
    assert logs["twice"] == pytest.approx(2.0 * np.mean((outputs + y) ** 2), rel=1e-6)


def test_evaluating_makes_no_slots_of_the_optimizer():
    model = wrapped(dense_model())
    model.compile("adam", "mse")
    x, y, _ = regression_data(10)
    model.evaluate(x, y, EFFECTIVE, 0)
    model.predict(x, EFFECTIVE, 0)
    assert not model.optimizer.built


@pytest.mark.parametrize("how", ["graph", "eager"])
def test_outputs_that_are_not_rows_are_computed_at_once(how):
    inputs = keras.Input((5,))
    total = keras.ops.sum(inputs, axis=0, keepdims=True)
    model = keras.Model(inputs, [inputs, total])
    ours = wrapped(model)
    ours.compile(**EXECUTIONS[how])
    x, _, _ = regression_data(10)
    for mine, plain in zip(
        ours.predict(x, EFFECTIVE, 0), model.predict(x, EFFECTIVE, 0), strict=True
    ):
        np.testing.assert_allclose(mine, plain, 1e-6)


@pytest.mark.parametrize("how", ["graph", "eager"])
def test_ragged_inputs_and_outputs(how):
    x = tf.RaggedTensor.from_row_lengths(np.arange(20, dtype="float32"), [3, 0, 4, 2, 5, 1, 2, 3])

    class Doubles(keras.Model):
        def call(self, x):
            return {"ragged": 2.0 * x, "sum": tf.reduce_sum(x, axis=1)}

    class Sums(keras.Model):
        def call(self, x):
            return tf.reduce_sum(x, axis=1)

    def dense(outputs):
        ragged = isinstance(outputs, tf.RaggedTensor)
        return np.asarray(outputs.to_tensor() if ragged else outputs)

    data = tf.data.Dataset.from_tensors(x)
    for model in (Doubles(), Sums()):
        ours = GradientAccumulateModel(model=model, micro_batch_size=3)
        ours.compile(**EXECUTIONS[how])
        outputs, expected = (tf.nest.flatten(m.predict(data, verbose=0)) for m in (ours, model))
        for mine, plain in zip(outputs, expected, strict=True):
            np.testing.assert_array_equal(dense(mine), dense(plain))


@pytest.mark.parametrize("how", EXECUTIONS)
def test_dimensions_known_only_at_run_time(how):
    inputs = keras.Input((None, 3))
    model = keras.Model(inputs, keras.layers.Dense(2)(inputs))
    ours = wrapped(model)
    x = np.random.default_rng(1).normal(size=(10, 6, 3)).astype("float32")
    y = x[..., :2]
    model.compile(loss="mse", metrics=[f1])
    ours.compile(loss="mse", metrics=[f1], **EXECUTIONS[how])
    parts = [(x, y), (x[:7, :5], y[:7, :5]), (x[:2], y[:2])]
    data = tf.data.Dataset.from_generator(
        lambda: iter(parts),
        output_signature=(tf.TensorSpec([None, None, 3]), tf.TensorSpec([None, None, 2])),
    ).apply(tf.data.experimental.assert_cardinality(3))
    if how == "jit":
        with pytest.raises(ValueError, match=r"'f1' sees.*With XLA.*jit_compile=False"):
            ours.evaluate(data, verbose=0)
    else:
        logs, expected = (m.evaluate(data, verbose=0) for m in (ours, model))
        np.testing.assert_allclose(logs, expected, 1e-6)
    for data in (x, tf.data.Dataset.from_tensors(x)):
        outputs, expected = (m.predict(data, verbose=0) for m in (ours, model))
        np.testing.assert_allclose(outputs, expected, 1e-5, 1e-6)


@pytest.mark.parametrize("how", EXECUTIONS)
def test_a_batch_without_examples(how):
    x, _, _ = regression_data(10)
    ours = wrapped(dense_model())
    ours.compile(**EXECUTIONS[how])
    assert ours.predict_on_batch(x[:0]).shape == (0, 1)
