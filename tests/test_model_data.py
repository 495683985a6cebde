"""GradientAccumulateModel takes what a plain model's fit takes."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateModel, GradientAccumulateOptimizer
from tests.oracle import (
    ACROSS_STEPS,
    EFFECTIVE,
    MICRO,
    MODES,
    assert_trains_as_large_batch,
    dense_model,
    difference,
    in_way,
    momentum_and_mse,
    regression_data,
    state_of,
)

EXAMPLES = 29

# Keras says so at the end of each epoch whose length it did not know.
unknown_length = pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")


class Batches(keras.utils.PyDataset):
    def __init__(self, arrays, batch_size):
        super().__init__()
        self.arrays, self.batch_size = arrays, batch_size

    def __len__(self):
        return -(-len(self.arrays[0]) // self.batch_size)

    def __getitem__(self, index):
        start = index * self.batch_size
        return tuple(a[start : start + self.batch_size] for a in self.arrays)


def generator(arrays, batch_size):
    batches = Batches(arrays, batch_size)
    for i in range(len(batches)):
        yield batches[i]


def dataset(arrays, batch_size):
    return tf.data.Dataset.from_tensor_slices(arrays).batch(batch_size)


def filtered(arrays, batch_size):
    # Its length is unknown: every epoch ends with a call that finds no data.
    kept = tf.data.Dataset.from_tensor_slices(arrays).filter(lambda *_: True)
    return kept.batch(batch_size)


def static_shapes(arrays, batch_size):
    """Batches of one static size; what is left is dropped."""
    return tf.data.Dataset.from_tensor_slices(arrays).batch(batch_size, drop_remainder=True)


def from_generator(arrays, batch_size):
    signature = tuple(tf.TensorSpec((None, *a.shape[1:]), a.dtype) for a in arrays)
    return tf.data.Dataset.from_generator(
        lambda: generator(arrays, batch_size), output_signature=signature
    )


@pytest.fixture(scope="module")
def large_batch():
    """The plain model after two epochs, with weights on the examples, and its history."""
    keras.utils.set_random_seed(0)
    *arrays, weights = regression_data(EXAMPLES)
    model = dense_model()
    model.compile(**momentum_and_mse(), weighted_metrics=["mae"])
    history = model.fit(*arrays, EFFECTIVE, 2, 0, sample_weight=weights, shuffle=False).history
    return state_of(model.weights), history


def compiled(mode, **kwargs):
    model, _, batch_size = in_way(mode, dense_model())
    model.compile(**momentum_and_mse(), weighted_metrics=["mae"], **kwargs)
    return model, batch_size


def assert_as(large_batch, model, history):
    weights, expected = large_batch
    assert difference(state_of(model.weights), weights) < 2e-6
    # Three updates an epoch; a phantom one, or a phantom micro-step, would be counted.
    assert int(model.optimizer.iterations) == 6
    assert int(getattr(model.optimizer, "micro_step", 0)) == 0
    for name, values in expected.items():
        assert history[name] == pytest.approx(values, rel=2e-6), name


@unknown_length
@pytest.mark.parametrize("kind", [Batches, dataset, filtered, from_generator])
def test_data_of_any_kind_trains_as_arrays_do(large_batch, mode, kind):
    model, batch_size = compiled(mode)
    data = kind(regression_data(EXAMPLES), batch_size)
    history = model.fit(data, epochs=2, verbose=0, shuffle=False).history
    assert_as(large_batch, model, history)


@unknown_length
@pytest.mark.parametrize(
    "execution", [{}, {"run_eagerly": True}, {"steps_per_execution": 2}], ids=str
)
def test_unknown_cardinality_makes_no_phantom_step_in_any_execution(mode, execution):
    # Whole cycles: a phantom micro-step would be left for the flush to make an update of.
    arrays = regression_data(2 * EFFECTIVE)
    results = []
    for kind in (dataset, filtered):
        model, batch_size = compiled(mode, **execution)
        model.fit(kind(arrays, batch_size), epochs=2, verbose=0)
        assert int(model.optimizer.iterations) == 4
        results.append(state_of(model.weights))
    assert difference(*results) == 0.0


@unknown_length
@pytest.mark.parametrize("way", ACROSS_STEPS)
@pytest.mark.parametrize("execution", ["graph", "steps_per_execution"], indirect=True)
def test_unknown_cardinality_makes_no_phantom_update_where_nothing_accumulates(way, execution):
    # Plain Keras makes one an epoch in a graph, which decays and overwrites weights.
    results = []
    for kind in (dataset, from_generator):
        model = dense_model()
        optimizer = keras.optimizers.AdamW(
            0.05, weight_decay=0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=3
        )
        if way == "optimizer":
            optimizer = GradientAccumulateOptimizer(optimizer, accum_steps=1)
        else:
            model = GradientAccumulateModel(model=model, accum_steps=1)
        model.compile(optimizer, "mse", **execution)
        model.fit(kind(regression_data(8)[:2], 4), epochs=4, verbose=0, shuffle=False)
        assert int(model.optimizer.iterations) == 8
        results.append(state_of([*model.weights, *optimizer.variables]))
    assert difference(*results) == 0.0


def test_a_python_generator_trains_as_arrays_do(large_batch, mode):
    model, batch_size = compiled(mode)
    arrays = regression_data(EXAMPLES)
    steps = len(Batches(arrays, batch_size))

    def endless():
        while True:
            yield from generator(arrays, batch_size)

    history = model.fit(endless(), epochs=2, steps_per_epoch=steps, verbose=0).history
    assert_as(large_batch, model, history)


def test_training_may_go_on_in_another_fit(large_batch, mode):
    model, batch_size = compiled(mode)
    *arrays, weights = regression_data(EXAMPLES)
    history = {}
    for epoch in range(2):
        logs = model.fit(
            *arrays,
            batch_size,
            sample_weight=weights,
            initial_epoch=epoch,
            epochs=epoch + 1,
            shuffle=False,
            verbose=0,
        ).history
        history = {name: history.get(name, []) + values for name, values in logs.items()}
    assert_as(large_batch, model, history)


def test_static_shapes_train_as_unknown_ones():
    results = []
    for mode in MODES:
        for kind in (static_shapes, dataset):
            model, batch_size = compiled(mode)
            model.fit(kind(regression_data(24), batch_size), epochs=2, verbose=0)
            results.append(state_of(model.weights))
    assert max(difference(r, results[0]) for r in results) < 2e-6


def test_an_effective_batch_that_is_no_multiple_of_the_micro_batch_may_be_static():
    # Effective batches of 13 in micro-batches of 4, 4, 4 and 1, all of known sizes.
    arrays = regression_data(26)
    plain = dense_model()
    model, *_ = in_way("micro_batch_size", dense_model())
    for m in (plain, model):
        m.compile(**momentum_and_mse())
        m.fit(static_shapes(arrays, 13), epochs=2, verbose=0)
    assert difference(state_of(model.weights), state_of(plain.weights)) < 2e-6


def test_class_weights_count_as_in_the_large_batch():
    x, y, _ = regression_data(EXAMPLES)

    def make_model():
        model = dense_model()
        return keras.Sequential([*model.layers, keras.layers.Dense(3, "softmax")])

    assert_trains_as_large_batch(
        make_model,
        x,
        np.digitize(y[:, 0], [-1.0, 1.0]),
        class_weight={0: 0.2, 1: 1.0, 2: 5.0},
        compile_with=lambda: {
            "optimizer": keras.optimizers.SGD(0.1, momentum=0.9),
            "loss": "sparse_categorical_crossentropy",
            "metrics": ["accuracy"],
            "weighted_metrics": ["accuracy"],
        },
    )


@pytest.mark.parametrize(
    "validation",
    [
        {"validation_split": 0.3},
        {"validation_data": regression_data(7, seed=9), "validation_batch_size": 5},
        {"validation_data": regression_data(7, seed=9), "validation_freq": 2},
    ],
    ids=["split", "data", "freq"],
)
def test_validation_sees_the_weights_after_the_epochs_last_update(validation):
    # 14 or 20 examples train: both modes end each epoch with a partial cycle.
    x, y, _ = regression_data(20)
    model = assert_trains_as_large_batch(dense_model, x, y, epochs=3, **validation)
    assert "val_loss" in model.history.history


def test_several_inputs_and_outputs_may_be_nested():
    def make_model():
        keras.utils.set_random_seed(3)
        a, b = keras.Input((2,), name="a"), [keras.Input((2,)), keras.Input((1,))]
        joined = keras.layers.Concatenate()([a, *b])
        hidden = keras.layers.Dense(6, "tanh")(joined)
        big = keras.layers.Dense(1, name="big")(hidden)
        small = keras.layers.Dense(2, name="small")(hidden)
        return keras.Model({"a": a, "b": b}, {"big": big, "small": small})

    # Whole micro-batches: Keras averages the loss of an output over steps, whatever their sizes.
    x, y, weights = regression_data(24)
    inputs = {"a": x[:, :2], "b": [x[:, 2:4], x[:, 4:]]}
    targets = {"big": y, "small": x[:, 1:3] ** 2}
    assert_trains_as_large_batch(
        make_model,
        inputs,
        targets,
        sample_weight={"big": weights, "small": weights[::-1].copy()},
        compile_with=lambda: {
            "optimizer": keras.optimizers.SGD(0.02, momentum=0.9),
            "loss": {"big": "mse", "small": "mae"},
            "loss_weights": {"big": 0.3, "small": 2.0},
            "metrics": {"big": ["mae"]},
            "weighted_metrics": {"small": ["mse"]},
        },
    )


def test_outputs_without_a_loss_are_left_alone():
    def make_model():
        model = dense_model()
        return keras.Model(model.inputs[0], [model.outputs[0], model.layers[0].output])

    x, y, _ = regression_data(EXAMPLES)
    assert_trains_as_large_batch(
        make_model,
        x,
        [y, np.zeros((EXAMPLES, 8), "float32")],
        compile_with=lambda: {"optimizer": "sgd", "loss": ["mse", None]},
    )


def test_batches_without_targets_train_on_the_losses_of_the_model():
    class Distance(keras.layers.Layer):
        def call(self, x):
            self.add_loss(keras.ops.mean(x**2))
            return x

    def make_model():
        return keras.Sequential([*dense_model().layers, Distance()])

    x, _, _ = regression_data(EXAMPLES)
    assert_trains_as_large_batch(
        make_model, x, compile_with=lambda: {"optimizer": keras.optimizers.SGD(0.1)}
    )


def test_batch_methods_and_evaluation_are_the_plain_models(mode):
    x, y, weights = regression_data(EXAMPLES)
    plain = dense_model()
    plain.compile(**momentum_and_mse(), weighted_metrics=["mae"])
    model, batch_size = compiled(mode)
    batch = x[:batch_size], y[:batch_size], weights[:batch_size]
    logs = model.train_on_batch(*batch, return_dict=True)
    assert list(logs) == ["loss", "mae"]
    np.testing.assert_allclose(list(logs.values()), plain.train_on_batch(*batch), 2e-6)
    model.flush()
    for name, arguments in {
        "test_on_batch": (x, y, weights),
        "evaluate": (x, y, 8, 0, weights),
    }.items():
        for m in (plain, model):
            m.reset_metrics()
        result, expected = getattr(model, name)(*arguments), getattr(plain, name)(*arguments)
        np.testing.assert_allclose(result, expected, 2e-6, err_msg=name)
    for name in ("predict", "predict_on_batch", "__call__"):
        values = getattr(model, name)(x)
        np.testing.assert_allclose(values, getattr(plain, name)(x), atol=2e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["ragged", "sparse"])
def test_inputs_may_be_ragged_or_sparse(kind):
    x, y, _ = regression_data(EFFECTIVE + MICRO + 1)

    class Total(keras.Model):
        def __init__(self):
            super().__init__()
            self.scale = self.add_weight(shape=(5, 1), initializer="ones")

        def call(self, inputs):
            if isinstance(inputs, tf.RaggedTensor):
                inputs = inputs.to_tensor(shape=(None, 5))
            if isinstance(inputs, tf.SparseTensor):
                return tf.sparse.sparse_dense_matmul(inputs, self.scale)
            return inputs @ self.scale

    if kind == "ragged":
        inputs = tf.RaggedTensor.from_tensor(x, lengths=[i % 5 for i in range(len(x))])
    else:
        inputs = tf.sparse.from_dense(np.where(x > 0, x, 0))
    data = tf.data.Dataset.from_tensor_slices((inputs, y))
    results = []
    for batch_size, model in (
        (EFFECTIVE, Total()),
        *(in_way(mode, Total())[::-2] for mode in MODES),
    ):
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), loss="mse")
        model.fit(data.batch(batch_size), epochs=2, verbose=0)
        results.append(state_of(model.weights))
    assert difference(results[0], [np.ones((5, 1))]) > 1e-2
    assert max(difference(r, results[0]) for r in results) < 2e-6
