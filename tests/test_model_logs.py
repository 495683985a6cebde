"""What GradientAccumulateModel reports, and how often it traces."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateModel
from tests.oracle import (
    EFFECTIVE,
    MICRO,
    assert_trains_as_large_batch,
    dense_model,
    difference,
    in_way,
    momentum_and_mse,
    regression_data,
)


class Recorder(keras.callbacks.Callback):
    """Keeps the logs, the weights and the number of updates that callbacks see."""

    def __init__(self):
        super().__init__()
        self.batches, self.epochs = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.batches.append(dict(logs))

    def on_epoch_end(self, epoch, logs=None):
        updates = int(self.model.optimizer.iterations)
        self.epochs.append((dict(logs), self.model.get_weights(), updates))


def classifier():
    keras.utils.set_random_seed(4)
    inputs = keras.Input((5,))
    hidden = keras.layers.Dense(8, "tanh")(inputs)
    kind = keras.layers.Dense(3, "softmax", name="kind")(hidden)
    value = keras.layers.Dense(1, name="value")(hidden)
    return keras.Model(inputs, {"kind": kind, "value": value})


def compile_classifier(model, **kwargs):
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9),
        loss={"kind": "sparse_categorical_crossentropy", "value": "mae"},
        loss_weights={"kind": 2.0, "value": 0.3},
        metrics={"kind": ["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2)]},
        weighted_metrics={"value": ["mse", keras.metrics.MeanAbsoluteError()]},
        **kwargs,
    )


def classifier_data(examples):
    x, y, weights = regression_data(examples)
    targets = {"kind": np.digitize(y[:, 0], [-1.0, 1.0]), "value": y}
    return x, targets, {"kind": weights, "value": weights**2}


@pytest.mark.fast
def test_within_a_step_every_log_is_the_large_batchs():
    x, y, weights = classifier_data(29)
    recorders = []
    for model in (classifier(), in_way("micro_batch_size", classifier())[0]):
        compile_classifier(model)
        recorders.append(Recorder())
        model.fit(
            x,
            y,
            EFFECTIVE,
            2,
            0,
            callbacks=[recorders[-1]],
            validation_split=0.2,
            sample_weight=weights,
            shuffle=False,
        )
    plain, ours = recorders
    assert len(ours.batches) == len(plain.batches) == 4
    assert len(ours.batches[0]) > 6
    logs = [
        ours.batches + [e[0] for e in ours.epochs],
        plain.batches + [e[0] for e in plain.epochs],
    ]
    for mine, expected in zip(*logs, strict=True):
        assert list(mine) == list(expected)
        assert list(mine.values()) == pytest.approx(list(expected.values()), rel=2e-6)


@pytest.mark.fast
def test_across_steps_an_epochs_logs_are_those_of_its_micro_batches():
    # The plain model that never updates sees the same weights in every micro-batch.
    x, y, weights = classifier_data(EFFECTIVE)
    plain = classifier()
    compile_classifier(plain)
    expected = plain.evaluate(x, y, MICRO, 0, sample_weight=weights, return_dict=True)
    model, _, batch_size = in_way("accum_steps", classifier())
    compile_classifier(model)
    history = model.fit(x, y, batch_size, 1, 0, sample_weight=weights, shuffle=False).history
    assert {name: values[0] for name, values in history.items()} == pytest.approx(
        expected, rel=2e-6
    )


@pytest.mark.fast
@pytest.mark.parametrize("as_list", [False, True], ids=["callback", "callback list"])
def test_callbacks_see_an_epochs_last_update(mode, as_list):
    x, y, _ = regression_data(16)
    plain = dense_model()
    model, _, batch_size = in_way(mode, dense_model())
    seen = []
    for m, batch in ((plain, EFFECTIVE), (model, batch_size)):
        m.compile(**momentum_and_mse())
        recorder = callbacks = Recorder()
        if as_list:
            callbacks = keras.callbacks.CallbackList([recorder], add_history=True, model=m)
        m.fit(x, y, batch, 2, 0, callbacks=callbacks, shuffle=False)
        seen.append(recorder.epochs)
    for (_, expected, plain_updates), (_, weights, updates) in zip(*seen, strict=True):
        assert difference(weights, expected) < 2e-6
        assert updates == plain_updates


class CountedCalls(keras.layers.Layer):
    """The identity; counts how often Python calls it, in traces and eagerly."""

    calls = 0

    def call(self, x):
        CountedCalls.calls += 1
        return x


def counted_model():
    CountedCalls.calls = 0
    return keras.Sequential([*dense_model().layers, CountedCalls()])


@pytest.mark.fast
def test_fit_traces_once_for_all_epochs_and_sizes(mode):
    model, _, batch_size = in_way(mode, counted_model())
    model.compile(**momentum_and_mse())
    x, y, weights = regression_data(29)
    calls = []
    for examples in (29, 24, 2):
        data = x[:examples], y[:examples], batch_size
        model.fit(*data, 2, 0, sample_weight=weights[:examples], shuffle=False)
        calls.append(CountedCalls.calls)
    assert calls[0] == calls[1] == calls[2]


def test_train_on_batch_traces_a_signature_once(mode):
    model, _, batch_size = in_way(mode, counted_model())
    model.compile(**momentum_and_mse())
    x, y, _ = regression_data(batch_size)
    model.train_on_batch(x, y)
    calls = CountedCalls.calls
    for _ in range(7):
        model.train_on_batch(x, y)
    assert CountedCalls.calls == calls


def step_graph(micro_batches):
    """The graph of a training step with this many micro-batches; and calls while tracing it."""
    model, *_ = in_way("micro_batch_size", counted_model())
    model.compile(**momentum_and_mse(), metrics=["mae"])
    x, y, weights = regression_data(MICRO * micro_batches)
    data = tf.constant(x), tf.constant(y), tf.constant(weights)
    model.train_on_batch(*data)  # creates all variables
    before = CountedCalls.calls
    graph = tf.function(model.train_step).get_concrete_function(data).graph
    return graph, CountedCalls.calls - before


def operations(graph):
    """The operations in a graph and in the functions that it calls."""
    definition = graph.as_graph_def()
    nodes = list(definition.node)
    for function in definition.library.function:
        nodes += function.node_def
    return nodes


def test_memory_does_not_grow_with_the_number_of_micro_batches():
    # The activations of one micro-batch are all that a loop that runs one turn at a time keeps.
    graphs = {n: step_graph(n) for n in (2, 3, 50)}
    assert len({calls for _, calls in graphs.values()}) == 1
    nodes = {n: operations(graph) for n, (graph, _) in graphs.items()}
    assert len({len(n) for n in nodes.values()}) == 1
    top = [n for n in graphs[50][0].as_graph_def().node if n.op in ("While", "StatelessWhile")]
    assert len(top) == 1
    assert top[0].attr["parallel_iterations"].i == 1


def test_every_micro_batch_in_a_step_is_seen_once():
    seen = []

    class Seen(keras.layers.Layer):
        def call(self, x):
            tf.py_function(lambda values: seen.append(values.numpy()[:, 0].tolist()), [x], [])
            return x

    inputs = keras.Input((1,))
    outputs = keras.layers.Dense(1)(Seen()(inputs))
    model = GradientAccumulateModel(inputs=inputs, outputs=outputs, micro_batch_size=MICRO)
    model.compile(**momentum_and_mse())
    x = np.arange(10, dtype="float32")[:, np.newaxis]
    model.fit(x, x, batch_size=10, verbose=0, shuffle=False)
    assert seen == [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0], [8.0, 9.0]]


def test_metrics_of_a_subclass_are_reported():
    class WithMetric(GradientAccumulateModel):
        def __init__(self, **mode):
            super().__init__(**mode)
            self.dense = keras.layers.Dense(1, kernel_initializer="ones")
            self.size = keras.metrics.Mean(name="size")

        def call(self, inputs):
            return self.dense(inputs)

        def compute_metrics(self, x, y, y_pred, sample_weight=None):
            self.size.update_state(keras.ops.abs(y_pred))
            return super().compute_metrics(x, y, y_pred, sample_weight)

    x, y, _ = regression_data(EFFECTIVE)
    for mode in ({"accum_steps": 3}, {"micro_batch_size": MICRO}):
        model = WithMetric(**mode)
        model.compile(keras.optimizers.SGD(0.0), loss="mse")
        history = model.fit(x, y, EFFECTIVE, 2, 0, shuffle=False).history
        assert history["size"] == pytest.approx([np.abs(x.sum(1)).mean()] * 2, rel=1e-5)


def test_metrics_that_are_not_means_equal_the_large_batchs():
    x, y, weights = regression_data(29)

    def make_model():
        return keras.Sequential([*dense_model().layers, keras.layers.Activation("sigmoid")])

    assert_trains_as_large_batch(
        make_model,
        x,
        (y > 0).astype("float32"),
        sample_weight=weights,
        compile_with=lambda: {
            "optimizer": keras.optimizers.SGD(0.1, momentum=0.9),
            "loss": "binary_crossentropy",
            "metrics": [
                keras.metrics.AUC(num_thresholds=20, name="auc"),
                keras.metrics.Precision(name="precision"),
            ],
            "weighted_metrics": [keras.metrics.Recall(name="recall")],
        },
    )
