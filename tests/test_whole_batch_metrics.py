"""Metrics that reduce by themselves are the large batch's, with `micro_batch_size`."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateModel
from gradient_accumulator_tf.cycle.additive_metrics import adds_up
from gradient_accumulator_tf.cycle.batches import Batch
from gradient_accumulator_tf.models.step_metrics import StepMetrics
from tests.oracle import (
    EFFECTIVE,
    EXECUTIONS,
    MICRO,
    dense_model,
    difference,
    each_in_turn,
    in_way,
    mirrored,
    regression_data,
)

ops = keras.ops


def f1(y_true, y_pred):
    true, found = ops.cast(y_true > 0, y_pred.dtype), ops.cast(y_pred > 0, y_pred.dtype)
    return 2.0 * ops.sum(true * found) / (ops.sum(true) + ops.sum(found))


def own_mean(y_true, y_pred):
    return ops.mean(ops.abs(y_true - y_pred))


def largest(y_true, y_pred):
    # One row, which is not a row for each example even where there is one.
    return ops.max(ops.abs(y_true - y_pred), axis=0)


class MeanOfBatches(keras.metrics.Metric):
    """A metric whose state does not add up: each batch counts alike."""

    def __init__(self, name="mean_of_batches"):
        super().__init__(name=name)
        self.total = self.add_variable((), "zeros", name="total")
        self.batches = self.add_variable((), "zeros", name="batches")

    def update_state(self, y_true, y_pred, sample_weight=None):
        values = ops.squeeze(ops.abs(y_true - y_pred), -1)
        weights = ops.ones_like(values) if sample_weight is None else sample_weight
        self.total.assign_add(ops.sum(values * weights) / ops.sum(weights))
        self.batches.assign_add(1)

    def result(self):
        return self.total / self.batches


METRICS = {
    "scalar function": lambda: {"metrics": [f1, own_mean]},
    "row of the batch": lambda: {"metrics": [largest]},
    "metric": lambda: {"metrics": [MeanOfBatches()], "weighted_metrics": [MeanOfBatches("own")]},
    "loss": lambda: {"metrics": [keras.losses.MeanSquaredError()]},
    "correlation": lambda: {"metrics": [keras.metrics.PearsonCorrelation(axis=0), "mae"]},
}


def logs_of(model, batch_size, compile_with, execution=None, examples=30):
    """The logs of a training that moves no weight, and of a validation."""
    x, y, weights = regression_data(examples, dtype="float64")
    model.compile("sgd", "mse", **compile_with, **(execution or {}))
    model.optimizer.learning_rate.assign(0.0)
    fit = {"validation_data": (x, y, weights), "shuffle": False, "verbose": 0}
    history = model.fit(x, y, batch_size, 1, sample_weight=weights, **fit).history
    return {name: values[0] for name, values in history.items()}


@pytest.mark.parametrize(
    ("name", "how"),
    [*each_in_turn(list(METRICS), EXECUTIONS), ("scalar function", "jit")],
)
def test_logs_are_the_large_batchs(name, how, float64):
    if name == "correlation" and not hasattr(keras.metrics, "PearsonCorrelation"):
        pytest.skip("needs a newer Keras")
    expected = logs_of(dense_model(), EFFECTIVE, METRICS[name]())
    model, _, batch_size = in_way("micro_batch_size", dense_model())
    logs = logs_of(model, batch_size, METRICS[name](), EXECUTIONS[how])
    assert list(logs) == list(expected)
    assert list(logs.values()) == pytest.approx(list(expected.values()), rel=1e-12)
    # Micro-batches one by one give others, or this test could not fail.
    others = logs_of(dense_model(), MICRO, METRICS[name]())
    assert difference(others.values(), expected.values()) > 1e-3


def cross_entropy(y_true, y_pred):
    return ops.mean(keras.losses.categorical_crossentropy(y_true, y_pred))


@pytest.mark.parametrize("how", EXECUTIONS)
def test_losses_that_compute_from_logits_do_so(how, float64):
    def make_model():
        start = keras.initializers.RandomNormal(stddev=30.0, seed=1)
        dense = keras.layers.Dense(3, "softmax", kernel_initializer=start)
        return keras.Sequential([keras.Input((5,)), dense])

    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(10, 5)), np.eye(3)[rng.integers(0, 3, 10)]
    results = []
    for model in (make_model(), in_way("micro_batch_size", make_model())[0]):
        model.compile(loss="mse", metrics=[cross_entropy], **EXECUTIONS[how])
        results.append(model.test_on_batch(x, y))
    np.testing.assert_allclose(results[1], results[0], 1e-12)
    probabilities = model.predict(x, verbose=0)
    assert abs(float(cross_entropy(y, probabilities)) - results[0][1]) > 0.1


def test_several_outputs_of_which_one_is_kept(float64):
    def make_model():
        keras.utils.set_random_seed(3)
        inputs = keras.Input((5,))
        names = ("a", "b", "c")
        return keras.Model(inputs, {n: keras.layers.Dense(1, name=n)(inputs) for n in names})

    x, y, weights = regression_data(10, dtype="float64")
    targets, logs, kept = {"c": y, "a": -y, "b": y**2}, [], []
    for model in (make_model(), in_way("micro_batch_size", make_model())[0]):
        model.compile(
            "sgd",
            "mse",
            metrics={"b": ["mae", f1]},
            weighted_metrics={"c": ["mse"], "b": [MeanOfBatches()]},
        )
        logs.append(model.train_on_batch(x, targets, weights, return_dict=True))
    assert logs[1] == pytest.approx(logs[0], rel=1e-12)
    assert logs[0].keys() == logs[1].keys()

    data = tf.nest.map_structure(tf.constant, (x, targets, weights))
    metrics = StepMetrics(model, Batch.of(data), MICRO)
    y_pred = model(data[0])
    kept, _ = metrics.update(
        tf.nest.map_structure(lambda t: t[:MICRO], data),
        {name: t[:MICRO] for name, t in y_pred.items()},
    )
    assert len(kept) == 1
    np.testing.assert_allclose(kept[0], y_pred["b"][:MICRO])


def test_of_metrics_that_add_up_nothing_is_kept():
    model, _, _ = in_way("micro_batch_size", dense_model())
    model.compile("sgd", "mse", metrics=["mae", keras.metrics.AUC()], weighted_metrics=["mse"])
    x, y, weights = regression_data(10)
    model.train_on_batch(x, y > 0, weights)
    data = tf.nest.map_structure(tf.constant, (x, y, weights))
    step = StepMetrics(model, Batch.of(data), MICRO)
    kept, _ = step.update(data, model(x))
    assert kept == []


def classification(examples):
    rng = np.random.default_rng(5)
    classes = rng.integers(0, 3, examples)
    found = rng.dirichlet(np.ones(3), examples).astype("float32")
    return classes, np.eye(3, dtype="float32")[classes], found


# Arguments of Keras's own metrics, where there are any, and the data that they take.
ARGUMENTS = {
    "BinaryIoU": ({}, "one class"),
    "IoU": ({"num_classes": 3, "target_class_ids": [0, 2]}, "labels"),
    "MeanIoU": ({"num_classes": 3}, "labels"),
    "OneHotIoU": ({"num_classes": 3, "target_class_ids": [1]}, "one hot"),
    "OneHotMeanIoU": ({"num_classes": 3}, "one hot"),
    "PrecisionAtRecall": ({"recall": 0.5}, "binary"),
    "RecallAtPrecision": ({"precision": 0.5}, "binary"),
    "SensitivityAtSpecificity": ({"specificity": 0.5}, "binary"),
    "SpecificityAtSensitivity": ({"sensitivity": 0.5}, "binary"),
    "SparseCategoricalAccuracy": ({}, "sparse"),
    "SparseCategoricalCrossentropy": ({}, "sparse"),
    "SparseTopKCategoricalAccuracy": ({"k": 2}, "sparse"),
    "TopKCategoricalAccuracy": ({"k": 2}, "one hot"),
    "Accuracy": ({}, "labels"),
    "AUC": ({"num_thresholds": 20}, "binary"),
    "BinaryAccuracy": ({}, "binary"),
    "BinaryCrossentropy": ({}, "binary"),
    "Precision": ({}, "binary"),
    "Recall": ({}, "binary"),
}
BASES = ("Metric", "Mean", "Sum", "MeanMetricWrapper")  # no metrics of targets and predictions
KERAS_METRICS = sorted(
    name
    for name, value in vars(keras.metrics).items()
    if inspect.isclass(value) and issubclass(value, keras.metrics.Metric) and name not in BASES
)


def data_for(kind, examples):
    classes, one_hot, found = classification(examples)
    return {
        "binary": (one_hot, found),
        "one hot": (one_hot, found),
        "one class": (one_hot[:, 0], found[:, 0]),
        "sparse": (classes, found),
        "labels": (classes, found.argmax(-1)),
    }[kind]


@pytest.mark.filterwarnings("ignore:You are passing weight as `float`")  # confusion matrices
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", KERAS_METRICS)
def test_keras_metrics_that_are_streamed_add_up(name, weighted):
    arguments, kind = ARGUMENTS.get(name, ({}, "one hot"))
    whole, pieces = (getattr(keras.metrics, name)(**arguments) for _ in range(2))
    y_true, y_pred = map(tf.constant, data_for(kind, 29))
    weights = tf.constant(regression_data(29)[2]) if weighted else None
    assert adds_up(whole, y_true, y_pred, weights)
    whole.update_state(y_true, y_pred, weights)
    for start in range(0, 29, 4):
        part = slice(start, start + 4)
        of_weights = None if weights is None else weights[part]
        pieces.update_state(y_true[part], y_pred[part], of_weights)
    np.testing.assert_allclose(pieces.result(), whole.result(), 1e-5)


def a_value_each(y_true, y_pred):
    return ops.mean(ops.abs(y_true - y_pred), axis=-1)


def in_pairs(y_true, y_pred):
    return ops.mean(ops.abs(ops.reshape(y_true - y_pred, (-1, 2, 3))), axis=(1, 2))


def without_a_graph(y_true, y_pred):
    return np.abs(np.asarray(y_true) - np.asarray(y_pred)).mean(axis=-1)


def named(function, additive):
    def named(y_true, y_pred):
        return function(y_true, y_pred)

    named.additive = additive
    return named


def marked(metric, additive):
    metric.additive = additive
    return metric


wrapper = keras.metrics.MeanMetricWrapper


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (wrapper(a_value_each), True),
        (wrapper(keras.losses.mean_squared_error), True),
        (wrapper(keras.losses.MeanSquaredError(reduction=None)), True),
        (wrapper(keras.losses.MeanSquaredError()), False),
        (wrapper(f1), False),
        (wrapper(largest), False),  # (3,) for 3 examples of 3 features
        (wrapper(in_pairs), False),
        (wrapper(without_a_graph), False),
        (wrapper(named(f1, True)), True),
        (wrapper(named(a_value_each, False)), False),
        (keras.metrics.MeanAbsoluteError(), True),
        (marked(keras.metrics.MeanAbsoluteError(), False), False),
        (MeanOfBatches(), False),
        (marked(MeanOfBatches(), True), True),
    ],
)
def test_what_adds_up(metric, expected):
    y_true, y_pred = tf.ones((3, 3)), tf.zeros((3, 3))
    assert adds_up(metric, y_true, y_pred, None) is expected


def test_one_weight_for_all_counts_a_batch_as_one_example():
    metric, values = keras.metrics.MeanAbsoluteError(), tf.ones((3, 3))
    assert adds_up(metric, values, values, tf.ones((3,)))
    assert not adds_up(metric, values, values, tf.ones(()))


@pytest.mark.parametrize("additive", [False, True])
def test_compute_metrics_of_a_subclass_sees_the_effective_batch(additive):
    class Own(GradientAccumulateModel):
        def __init__(self):
            super().__init__(micro_batch_size=MICRO)
            self.dense = keras.layers.Dense(1)
            self.of_batch = keras.metrics.Mean(name="of_batch")

        def call(self, x):
            return self.dense(x)

        def compute_metrics(self, x, y, y_pred, sample_weight=None):
            self.of_batch.update_state(ops.max(y_pred))
            return super().compute_metrics(x, y, y_pred, sample_weight)

        compute_metrics.additive = additive

    x, y, _ = regression_data(10)
    model = Own()
    model.compile("sgd", "mse", metrics=[f1])
    model.evaluate(x, y, EFFECTIVE, 0)  # builds it
    y_pred = keras.ops.convert_to_numpy(model(x))
    parts = [y_pred[i : i + MICRO].max() for i in range(0, 10, MICRO)]
    expected = np.mean(parts) if additive else y_pred.max()
    for step in (model.test_on_batch, model.train_on_batch):
        logs = step(x, y, return_dict=True)
        assert logs["of_batch"] == pytest.approx(float(expected), rel=1e-6)
        assert logs["f1"] == pytest.approx(float(f1(y, y_pred)), rel=1e-6)


def test_with_exact_batch_norm(float64):
    def make_model():
        keras.utils.set_random_seed(2)
        layers = keras.layers
        return keras.Sequential(
            [keras.Input((5,)), layers.Dense(4), layers.BatchNormalization(), layers.Dense(1)]
        )

    compile_with = {"metrics": [f1, "mae"], "weighted_metrics": [MeanOfBatches()]}
    expected = logs_of(make_model(), EFFECTIVE, compile_with)
    model = GradientAccumulateModel(model=make_model(), micro_batch_size=MICRO, batch_norm="exact")
    compile_with["weighted_metrics"] = [MeanOfBatches()]
    logs = logs_of(model, EFFECTIVE, compile_with)
    assert logs == pytest.approx(expected, rel=1e-9)


def test_on_two_replicas_as_plain_keras(float64):
    # Each replica updates with its own share, and the states add up.
    logs = []
    for wrap in (lambda m: m, lambda m: in_way("micro_batch_size", m)[0]):
        with mirrored().scope():
            model = wrap(dense_model())
            model.compile("sgd", "mse", metrics=[f1, MeanOfBatches(), "mae"])
        x, y, _ = regression_data(24, dtype="float64")
        model.optimizer.learning_rate.assign(0.0)
        history = model.fit(x, y, EFFECTIVE, 1, 0, shuffle=False).history
        logs.append({name: values[0] for name, values in history.items()})
    plain, ours = logs
    assert ours == pytest.approx(plain, rel=1e-12)


def test_outputs_that_cannot_be_gathered_are_refused():
    inputs = keras.Input((5,))
    outputs = [keras.layers.Dense(1)(inputs), keras.ops.sum(inputs, axis=0, keepdims=True)]
    model, _, _ = in_way("micro_batch_size", keras.Model(inputs, outputs))
    model.compile("sgd", ["mse", None], metrics=[None, [f1]])
    x, y, _ = regression_data(10)
    with pytest.raises(ValueError, match=r"'f1' sees.*one row for each example.*additive"):
        model.train_on_batch(x, [y, y[:1]])
