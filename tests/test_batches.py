"""A batch: which of its tensors are cut into micro-batches, and which belong to every example."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateModel
from gradient_accumulator_tf.cycle.batches import Batch
from tests.oracle import (
    EFFECTIVE,
    KERAS,
    MICRO,
    dense_model,
    difference,
    in_way,
    mirrored,
    momentum_and_mse,
    regression_data,
    state_of,
)
from tests.test_model_errors import raises

ROWS = 20  # of a bank
# Arguments of `compile`, and whether the batch's size is static.
TRACES = {
    "static": ({}, True),
    "dynamic": ({"steps_per_execution": 2}, False),
    "eager": ({"run_eagerly": True}, True),
    "xla": ({"jit_compile": True}, False),
}


@pytest.fixture(params=list(TRACES))
def traced(request):
    """Name, arguments of `compile`, and whether the batch's size is static."""
    return request.param, *TRACES[request.param]


class Banked(keras.Model):
    """Outputs of examples, times the mean over what belongs to all; `x` is a list or a dict."""

    def __init__(self, places=(0, 1)):
        super().__init__()
        keras.utils.set_random_seed(2)
        self.dense, self.places = keras.layers.Dense(1), places

    def call(self, inputs):
        rows, bank = (inputs[place] for place in self.places)
        return self.dense(rows) * tf.reduce_mean(self.dense(bank), 0)


def data(examples=EFFECTIVE, seed=0):
    """Inputs (examples, 5), targets (examples, 1), and a bank of another size."""
    x, y, _ = regression_data(examples, seed=seed)
    return x, y, regression_data(ROWS, seed=9)[0]


def one_batch(batch, static):
    """A dataset that repeats a batch, with its size static or not."""
    batches = tf.data.Dataset.from_tensors(batch)
    if not static:
        # Keeps nothing known of a first dimension.
        spec = tf.nest.map_structure(
            lambda t: tf.TensorSpec([None, *t.shape[1:]] if t.shape.rank else [], t.dtype),
            batches.element_spec,
        )
        batches = tf.data.Dataset.from_generator(lambda: iter([batch]), output_signature=spec)
    return batches.repeat()


def trained(model, batch, static=True, **compile_with):
    """The model's weights, and its logs, after two updates."""
    model.compile(**{**momentum_and_mse(), **compile_with})
    history = model.fit(one_batch(batch, static), steps_per_epoch=2, verbose=0).history
    return [*state_of(model.weights), np.array([v for (v,) in history.values()])]


def wrapped(model, micro_batch_size=MICRO, **kwargs):
    return GradientAccumulateModel(model=model, micro_batch_size=micro_batch_size, **kwargs)


def test_shared_inputs_reach_every_micro_batch_whole(traced):
    _, execution, static = traced
    x, y, bank = data()
    # The first tensor does not tell the batch's size.
    batch = ((bank, x), y)
    expected = trained(Banked((1, 0)), batch, static, **execution)
    model = wrapped(Banked((1, 0)), shared_inputs=[0])
    assert difference(trained(model, batch, static, **execution), expected) < 2e-6


def test_paths_lead_to_nested_inputs_and_to_all_below():
    x, y, bank = data()

    class Nested(Banked):
        def call(self, inputs):
            return super().call((inputs["a"], inputs["graph"][1])) + inputs["graph"][0]

    batch = ({"graph": (np.float32(0.5), bank), "a": x}, y)
    expected = trained(Nested(), batch)
    for declared in ([("graph", 1)], "graph"):
        assert (
            difference(trained(wrapped(Nested(), shared_inputs=declared), batch), expected) < 2e-6
        )


def test_a_tensor_of_another_size_is_refused_by_name(traced):
    name, execution, static = traced
    x, y, bank = data()
    for batch, leaf, size in (
        (((x, bank), y), "x[1]", ROWS),
        (({"a": x, "bank": bank[:3]}, y), 'x["bank"]', 3),
        (((x, x), y[:8]), "y", 8),
        (((x, x), y, np.ones(ROWS, "float32")), "sample_weight", ROWS),
    ):
        first, places = (
            ("x[0]", (0, 1)) if isinstance(batch[0], tuple) else ('x["a"]', ("a", "bank"))
        )
        model = wrapped(Banked(places))
        model(batch[0])
        before = state_of(model.weights)
        words = ["one row for each example", f"{leaf} of shape", str(size), str(EFFECTIVE)]
        if name == "dynamic":
            words = [word.replace('"', '\\"') for word in words]  # as TensorFlow writes them
        if name == "xla":
            # Which leaves assertions out; its error shows the name of an operation.
            words = [f"{leaf} must have one row or as many as {first}"]
            words = ["".join(c if c.isalnum() else "_" for c in words[0])]
        with raises(ValueError if static else tf.errors.InvalidArgumentError, *words):
            trained(model, batch, static, **execution)
        assert difference(state_of(model.weights), before) == 0


@pytest.mark.parametrize("part", ["x", "y", "sample_weight"])
def test_a_tensor_of_one_row_belongs_to_every_example(part, traced):
    _, execution, static = traced
    x, y, bank = data()
    batch = {
        "x": ((x, bank[:1]), y),
        "y": ((x, bank[:1]), y[:1]),
        "sample_weight": ((x, bank[:1]), y, np.full(1, 3.0, "float32")),
    }[part]
    # Keras divides by the one weight, so the loss is a sum over the examples.
    reductions = ["sum_over_batch_size"]
    reductions += ["mean_with_sample_weight"] if part == "sample_weight" else []
    for reduction in reductions:
        results = []
        for model in (Banked(), wrapped(Banked(), 5)):
            loss = keras.losses.MeanSquaredError(reduction=reduction)
            sgd = keras.optimizers.SGD(0.01)
            results.append(
                trained(
                    model,
                    batch,
                    static,
                    loss=loss,
                    optimizer=sgd,
                    weighted_metrics=["mae"],
                    **execution,
                )
            )
        assert difference(*results) < 1e-5


def test_replicas_say_nothing_more_where_no_weights_are_for_all():
    ones = tf.ones((EFFECTIVE, 1))
    for weights, is_told in ((None, False), (ones[:, 0], False), (tf.ones(()), True)):
        batch = Batch.of((ones, ones, weights))
        assert (batch.times_weighed(MICRO) is not None) == is_told


def test_a_weight_of_one_row_under_a_mask_and_a_weight_for_each_example():
    # Neighbours of the above: what Keras divides by is in proportion to the examples.
    x, y, weights = regression_data(EFFECTIVE)
    x = np.where(x[..., np.newaxis] > 0.3, x[..., np.newaxis], 0.0)

    def make_model():
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Masking(), keras.layers.Dense(1)]
        return keras.Sequential([keras.Input((5, 1)), *layers])

    targets = np.repeat(y[:, np.newaxis], 5, 1)
    for weight in (np.full((1, 1), 3.0, "float32"), weights[:, np.newaxis]):
        results = []
        for model in (make_model(), wrapped(make_model())):
            loss = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
            results.append(trained(model, (x, targets, weight), loss=loss))
        assert difference(*results) < 2e-6


def test_a_model_that_has_one_row_for_a_batch_is_refused(traced):
    class Bag(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, inputs):
            return tf.reduce_mean(self.dense(inputs), 0, keepdims=True)

    name, execution, static = traced
    x, y, _ = data()
    words = ["one row of outputs for each example", "(1, 1)", "accum_steps"]
    if name == "xla":
        words = ["y_must_have_one_row_for_each_example"]
    with raises(ValueError if static else tf.errors.InvalidArgumentError, *words):
        trained(wrapped(Bag()), (x, y[:1]), static, **execution)


def test_more_rows_of_outputs_than_examples_need_targets_for_each_example():
    class TwoViews(keras.Model):
        def __init__(self):
            super().__init__()
            keras.utils.set_random_seed(1)
            self.dense = keras.layers.Dense(1)

        def call(self, inputs):
            return tf.concat([self.dense(inputs), self.dense(-inputs)], 0)

    def both(y_true, y_pred):
        return tf.reshape(y_pred, (2, -1, 1)) - y_true

    x, y, _ = data()
    with raises(ValueError, "y of shape (24, 1)", "12 examples", "reshape it to (examples, rows"):
        trained(wrapped(TwoViews()), (x, np.concatenate([y, y])))
    for loss, targets in ((lambda t, p: tf.square(both(t, p)), y), ("mse", y[:1])):
        expected = trained(TwoViews(), (x, targets), loss=loss)
        assert difference(trained(wrapped(TwoViews()), (x, targets), loss=loss), expected) < 2e-6


def test_a_batch_without_examples_is_a_step_as_by_keras(traced):
    _, execution, static = traced
    results = []
    for model in (dense_model(), wrapped(dense_model())):
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.1)
        model.compile(optimizer, "mse", **execution)
        # An update goes before, whose momentum the step without examples takes on.
        for examples in (EFFECTIVE, 0):
            batch = one_batch(data(examples)[:2], static)
            history = model.fit(batch, steps_per_epoch=2, verbose=0).history
        results.append([*state_of(model.weights), int(model.optimizer.iterations)])
        assert history["loss"] == [0]
    assert difference(*results) < 2e-6


def test_across_steps_a_batch_without_examples_counts_for_nothing():
    x, y, _ = data()
    model = GradientAccumulateModel(model=dense_model(), accum_steps=2)
    plain = dense_model()
    for m, batches in ((plain, [(x, y)]), (model, [(x, y), (x[:0], y[:0])])):
        m.compile(**momentum_and_mse())
        for batch in batches:
            m.train_on_batch(*batch)
    assert difference(state_of(model.weights), state_of(plain.weights)) < 2e-6


def test_a_regulariser_counts_in_a_batch_without_examples():
    # Keras takes such a batch of unknown size only.
    models = [dense_model(kernel_regularizer="l2") for _ in range(3)]
    before = state_of(models.pop().weights)
    expected = trained(models[0], data(0)[:2], static=False)
    assert difference(expected[:-1], before) > 1e-3
    assert difference(trained(wrapped(models[1]), data(0)[:2], static=False), expected) < 2e-6


@pytest.mark.parametrize("kind", ["ragged", "sparse"])
def test_shared_inputs_may_be_ragged_or_sparse(kind):
    x, y, bank = data()

    class Sums(Banked):
        def call(self, inputs):
            rows, bank = inputs
            if isinstance(bank, tf.RaggedTensor):
                bank = bank.to_tensor(shape=(None, 5))
            if isinstance(bank, tf.SparseTensor):
                bank = tf.sparse.to_dense(bank)
            return super().call((rows, tf.reshape(bank, (-1, 5))))

    bank = np.where(bank > 0, bank, 0)
    if kind == "ragged":
        bank = tf.RaggedTensor.from_tensor(bank, lengths=[i % 5 for i in range(ROWS)])
    else:
        bank = tf.sparse.from_dense(bank)
    batch = tf.data.Dataset.from_tensor_slices((x, y)).batch(EFFECTIVE)
    batch = batch.map(lambda x, y: ((x, bank), y)).repeat()
    results = []
    for model in (Sums(), wrapped(Sums(), shared_inputs=[1])):
        model.compile(**momentum_and_mse())
        model.fit(batch, steps_per_epoch=2, verbose=0)
        results.append(state_of(model.weights))
    assert difference(*results) < 2e-6
    with raises((ValueError, tf.errors.InvalidArgumentError), "x[1] of shape", str(ROWS)):
        model = wrapped(Sums())
        model.compile(**momentum_and_mse())
        model.fit(batch, steps_per_epoch=1, verbose=0)


@pytest.mark.parametrize("static", [False, True])
def test_shared_inputs_go_through_batch_norm_exactly(static, float64):
    def make_model():
        keras.utils.set_random_seed(4)
        rows, bank = keras.Input((5,)), keras.Input((5,))
        hidden = keras.layers.BatchNormalization()(keras.layers.Dense(4, "tanh")(rows))
        second = keras.layers.BatchNormalization()(keras.layers.Dense(4, "tanh")(bank))
        mean = keras.layers.Lambda(lambda t: tf.reduce_mean(t**2, 0, keepdims=True))(second)
        return keras.Model([bank, rows], keras.layers.Dense(1)(hidden * mean))

    x, y, bank = (a.astype("float64") for a in data())
    batch = ((bank, x), y)
    expected = trained(make_model(), batch, static)
    model = wrapped(make_model(), 5, batch_norm="exact", shared_inputs=[0])
    assert difference(trained(model, batch, static), expected) < 1e-11


@pytest.mark.skipif(KERAS < (3, 10), reason="Keras 3.8's fit takes no such dataset")
def test_each_replica_has_its_own_copy_of_shared_inputs():
    x, y, bank = data(2 * EFFECTIVE)

    def batches(context):
        del context  # one pipeline feeds both replicas, one after the other
        rows = tf.data.Dataset.from_tensor_slices((x, y)).batch(EFFECTIVE, drop_remainder=True)
        return rows.map(lambda x, y: ((x, bank), y)).repeat()

    expected = trained(Banked(), ((x, bank), y))[:-1]
    strategy = mirrored(2)
    with strategy.scope():
        model = wrapped(Banked(), shared_inputs=[1])
        model.compile(**momentum_and_mse())
    model.fit(strategy.distribute_datasets_from_function(batches), steps_per_epoch=2, verbose=0)
    assert difference(state_of(model.weights), expected) < 2e-6


@pytest.mark.filterwarnings("ignore:The loss .* reduces to one number:UserWarning")  # a mean
def test_across_steps_shared_inputs_only_tell_what_counts_the_examples():
    x, y, bank = data()
    model = GradientAccumulateModel(model=Banked((1, 0)), accum_steps=2, shared_inputs=[0])
    # Cycles of 8 and 4 examples, which regularisers and a loss of one's own would count by rows.
    model.compile(keras.optimizers.SGD(0.1), loss=lambda t, p: tf.reduce_mean((t - p) ** 2))
    for part in (slice(0, 8), slice(8, None)):
        model.train_on_batch((bank, x[part]), y[part])
    plain = Banked((1, 0))
    plain.compile(keras.optimizers.SGD(0.1), "mse")
    plain.train_on_batch((bank, x), y)
    assert difference(state_of(model.weights), state_of(plain.weights)) < 2e-6


def test_shared_inputs_are_checked_and_saved():
    model = wrapped(dense_model(), shared_inputs=[1, "bank", ("graph", np.int64(0)), ("a",)])
    assert model.shared_inputs == (1, "bank", ("graph", 0), "a")
    copy = GradientAccumulateModel.from_config(model.get_config())
    assert copy.shared_inputs == model.shared_inputs
    assert wrapped(dense_model()).get_config()["shared_inputs"] is None
    for value, word, remedy in (
        (1.5, "float", "Pass a list of these"),
        ([True], "bool", "Pass an integer for a list or tuple, and a string for a dict"),
        ([("a", None)], "NoneType", "Pass an integer"),
    ):
        with raises(TypeError, "positions or keys", f"shared_inputs={value!r}", word, remedy):
            wrapped(dense_model(), shared_inputs=value)
    for value, remedy in (([-1], "Count positions from 0"), ([()], "Leave the empty one out")):
        with raises(ValueError, "positions or keys", f"shared_inputs={value!r}", remedy):
            wrapped(dense_model(), shared_inputs=value)


def test_a_shared_input_that_a_batch_has_not_is_refused(mode):
    x, y, bank = data()
    for inputs, entry, names in (
        ((x, bank), "bank", "x[0], x[1]"),
        ({"a": {"b": x}, "bank": bank}, ("a", "c"), 'x["a"]["b"], x["bank"]'),
        (x, 0, "with x."),
    )[: 3 if mode == "micro_batch_size" else 1]:
        model, *_ = in_way(mode, Banked(), shared_inputs=[entry])
        model.compile(**momentum_and_mse())
        with raises(ValueError, "`shared_inputs` must name", f"shared_inputs=[{entry!r}]", names):
            model.train_on_batch(inputs, y)


def test_some_input_or_target_must_count_the_examples():
    x, y, bank = data()
    model = wrapped(Banked(), shared_inputs=[0, 1])
    model.compile(**momentum_and_mse())
    model.train_on_batch((x[:1], bank), y)  # the targets do
    model = wrapped(Banked(), shared_inputs=[0, 1])
    model.compile("sgd", loss=None)
    with raises(ValueError, "at least one tensor", "`shared_inputs` does not name"):
        model.train_on_batch((x, bank))


@pytest.mark.parametrize("batch_size", [None, 6])
def test_batches_that_are_not_cut_are_said_once(batch_size):
    x, y, _ = regression_data(32 + MICRO if batch_size is None else 8)
    size = batch_size or 32
    model = wrapped(dense_model(), size)
    model.compile("sgd", "mse")
    received = f"micro_batch_size={size}, and batches of at most {size} examples (batch_size="
    with pytest.warns(UserWarning, match="Nothing accumulates") as warned:
        model.fit(x, y, batch_size=batch_size, epochs=2, verbose=0)
    assert len(warned) == 1 and f"{received}{batch_size}" in str(warned[0].message)
    model.fit(x, y, batch_size=batch_size, verbose=0)


def test_few_examples_are_no_reason_to_warn():
    x, y, _ = regression_data(EFFECTIVE)
    model = wrapped(dense_model())
    model.compile("sgd", "mse")
    model.fit(x[:2], y[:2], batch_size=EFFECTIVE, verbose=0)
    model.fit(x, y, verbose=0)
    model.fit(x[:2], y[:2], verbose=0)  # after batches that were cut


def test_one_larger_batch_accumulates_and_is_no_reason_to_warn():
    x, y, _ = regression_data(EFFECTIVE)
    model = wrapped(dense_model())
    model.compile("sgd", "mse")
    batches = [(x[:2], y[:2]), (x[2:8], y[2:8]), (x[8:], y[8:])]
    model.fit(
        tf.data.Dataset.from_generator(
            lambda: iter(batches),
            output_signature=(tf.TensorSpec((None, 5)), tf.TensorSpec((None, 1))),
        ).apply(tf.data.experimental.assert_cardinality(3)),
        epochs=2,
        verbose=0,
    )
    assert int(model.optimizer.iterations) == 6


def test_the_batch_of_a_replica_counts():
    x, y, _ = regression_data(EFFECTIVE)
    strategy = mirrored(2)
    with strategy.scope():
        model = wrapped(dense_model(), EFFECTIVE // 2)
        model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match="at most 6 examples .batch_size=12"):
        model.fit(x, y, batch_size=EFFECTIVE, verbose=0)


def test_what_is_learned_of_batches_is_not_saved(tmp_path):
    model = wrapped(dense_model())
    model.compile("sgd", "mse")
    names = [
        name for name, _ in tf.train.list_variables(tf.train.Checkpoint(model).save(tmp_path / "c"))
    ]
    assert not any("largest" in name for name in names)


def test_a_gradient_has_its_variables_static_shape(way, graph_or_jit):
    # The product with one feature has a gradient of static shape (None, 3) for (1, 3).
    def make_model():
        keras.utils.set_random_seed(0)
        return keras.Sequential([keras.Input((5, 1)), keras.layers.Dense(3)])

    x, y, _ = regression_data(EFFECTIVE)
    arrays = (x[..., np.newaxis], np.repeat(y[:, np.newaxis], 5, 1) + np.zeros(3, "float32"))
    results = []
    for name in ("plain", way):
        model, optimizer, size = in_way(name, make_model(), keras.optimizers.Adam(0.1))
        model.compile(optimizer, "mse", **graph_or_jit)
        model.fit(tf.data.Dataset.from_tensor_slices(arrays).batch(size), shuffle=False, verbose=0)
        results.append(state_of(model.weights))
    assert difference(*results) < 2e-6
