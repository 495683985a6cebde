"""GradientAccumulateModel trains as the plain model does on the true large batch."""

import keras
import numpy as np
import pytest

from gradient_accumulator_tf import GradientAccumulateModel
from tests.oracle import (
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


def one_weight(**mode):
    """y = w x, with w = 1."""
    inputs = keras.Input((1,))
    outputs = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")(inputs)
    model = GradientAccumulateModel(inputs=inputs, outputs=outputs, **mode)
    model.compile(keras.optimizers.SGD(0.5), loss="mse")
    return model


def column(*values):
    return np.array(values, "float32")[:, np.newaxis]


@pytest.mark.fast
def test_three_updates_across_steps_are_as_by_hand():
    # The loss is (w x)^2, its gradient 2 w x^2; an update takes half the mean gradient off w.
    model = one_weight(accum_steps=2)
    states = []
    for x in (column(1.0), column(1.0), column(0.0), column(1.0), column(0.5, 0.5), column(1.0)):
        model.train_on_batch(x, 0 * x)
        optimizer = model.optimizer
        states.append(
            (float(model.weights[0][0, 0]), int(optimizer.iterations), int(optimizer.micro_step))
        )
    assert states == [
        (1.0, 0, 1),
        (0.0, 1, 0),  # 1 - (2 + 2) / 2 / 2
        (0.0, 1, 1),
        (0.0, 2, 0),
        (0.0, 2, 1),
        (0.0, 3, 0),
    ]
    model.weights[0].assign([[1.0]])
    model.train_on_batch(column(0.5, 0.5), column(0.0, 0.0))
    model.train_on_batch(column(1.0), column(0.0))
    assert float(model.weights[0][0, 0]) == pytest.approx(0.5)  # 1 - (2 * 0.5 + 1 * 2) / 3 / 2


@pytest.mark.fast
def test_three_updates_within_steps_are_as_by_hand():
    model = one_weight(micro_batch_size=2)
    weights = []
    for x in (column(0.5, 0.5, 1.0), column(0.0, 1.0), column(1.0)):
        model.train_on_batch(x, 0 * x)
        weights.append(float(model.weights[0][0, 0]))
    assert weights == pytest.approx([0.5, 0.25, 0.0])  # minus half of (3, 1, 0.5) / (3, 2, 1)
    assert int(model.optimizer.iterations) == 3


def test_weights_and_logs_equal_the_large_batch(execution):
    # 26 examples: the last effective batch is smaller than a micro-batch.
    x, y, weights = regression_data(26)
    assert_trains_as_large_batch(
        dense_model,
        x,
        y,
        sample_weight=weights,
        compile_with=lambda: {
            "optimizer": keras.optimizers.SGD(0.05, momentum=0.9),
            "loss": "mse",
            "metrics": ["mae"],
            "weighted_metrics": [keras.metrics.RootMeanSquaredError()],
            **execution,
        },
    )


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.Adam(0.01, weight_decay=0.01, clipnorm=0.5),
        lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True, use_ema=True),
    ],
    ids=["adam", "sgd"],
)
def test_any_optimizer_sees_the_large_batch(optimizer):
    # 29 examples: the last effective batch is one micro-batch and one example more.
    x, y, _ = regression_data(29)
    assert_trains_as_large_batch(
        dense_model, x, y, compile_with=lambda: {"optimizer": optimizer(), "loss": "mse"}, epochs=3
    )


def test_any_last_batch_is_trained_as_in_the_large_batch():
    plain, batches = dense_model(), {}
    initial = plain.get_weights()
    for mode in MODES:
        model, _, batch_size = in_way(mode, dense_model())
        batches[mode] = model, batch_size
    for model, _ in [(plain, None), *batches.values()]:
        model.compile(**momentum_and_mse())
    for examples in (29, 1, 3, 4, 5, 12, 13, 24, 28, 31):
        x, y, _ = regression_data(examples, seed=examples)
        plain.set_weights(initial)
        loss = plain.fit(x, y, EFFECTIVE, 2, 0, shuffle=False).history["loss"]
        for mode, (model, batch_size) in batches.items():
            model.set_weights(initial)
            history = model.fit(x, y, batch_size, 2, 0, shuffle=False).history
            case = f"{examples} examples, {mode}"
            assert history["loss"] == pytest.approx(loss, rel=2e-6), case
            assert difference(state_of(model.weights), state_of(plain.weights)) < 2e-6, case
            assert int(model.optimizer.iterations) == int(plain.optimizer.iterations), case


def test_a_cycle_does_not_go_on_in_the_next_epoch():
    # Four micro-batches, three to a cycle: 12 examples, then 4.
    x, y, _ = regression_data(16)
    model = assert_trains_as_large_batch(dense_model, x, y, ways=["accum_steps"], epochs=3)
    assert int(model.optimizer.iterations) == 6
    assert int(model.optimizer.micro_step) == 0


class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden = keras.layers.Dense(8, "tanh", kernel_initializer=glorot(1))
        self.out = keras.layers.Dense(1, kernel_initializer=glorot(2))

    def call(self, inputs, training=False):
        return self.out(self.hidden(inputs))


class OwnCall(GradientAccumulateModel):
    def __init__(self, **mode):
        super().__init__(**mode)
        self.inner = Subclassed()

    def call(self, inputs):
        return self.inner(inputs)


def glorot(seed):
    return keras.initializers.GlorotUniform(seed)


def unbuilt_sequential():
    return keras.Sequential(
        [
            keras.layers.Dense(8, "tanh", kernel_initializer=glorot(1)),
            keras.layers.Dense(1, kernel_initializer=glorot(2)),
        ]
    )


def functional():
    inputs = keras.Input((5,))
    hidden = keras.layers.Dense(8, "tanh", kernel_initializer=glorot(1))(inputs)
    return keras.Model(inputs, keras.layers.Dense(1, kernel_initializer=glorot(2))(hidden))


def nested():
    keras.utils.set_random_seed(5)
    inputs = keras.Input((5,))
    hidden = dense_model()(inputs)
    return keras.Model(inputs, keras.Sequential([keras.layers.Dense(1)])(hidden) + hidden)


def built_subclassed():
    model = Subclassed()
    model(np.zeros((1, 5), "float32"))
    return model


@pytest.mark.parametrize(
    "make_model",
    [unbuilt_sequential, Subclassed, built_subclassed, nested],
)
def test_any_keras_model_can_be_wrapped(make_model):
    x, y, _ = regression_data(29)
    model = assert_trains_as_large_batch(make_model, x, y)
    assert model.predict(x, verbose=0).shape == (29, 1)


@pytest.mark.parametrize("kind", ["inputs and outputs", "subclass"])
def test_it_can_be_built_as_any_keras_model_is(kind):
    x, y, _ = regression_data(29)
    plain = functional()
    plain.compile(**momentum_and_mse())
    plain.fit(x, y, EFFECTIVE, 2, 0, shuffle=False)
    for mode in MODES:
        ends = functional()
        model, _, batch_size = in_way(mode, inputs=ends.inputs[0], outputs=ends.outputs[0])
        if kind == "subclass":
            model = OwnCall(accum_steps=model.accum_steps, micro_batch_size=model.micro_batch_size)
        model.compile(**momentum_and_mse())
        model.fit(x, y, batch_size, 2, 0, shuffle=False)
        assert difference(state_of(model.weights), state_of(plain.weights)) < 2e-6, mode


def test_nothing_moves_between_updates():
    x, y, _ = regression_data(MICRO)
    model, *_ = in_way("accum_steps", dense_model())
    optimizer = keras.optimizers.Adam(0.05, weight_decay=0.1, use_ema=True)
    model.compile(optimizer, loss="mse")
    model.train_on_batch(x, y)
    variables = model.trainable_variables + optimizer.variables
    for _ in range(2):  # cycles of three
        before = state_of(variables)
        model.train_on_batch(x, y)
        assert difference(state_of(variables), before) == 0.0
        model.train_on_batch(x, y)
        assert difference(state_of(model.trainable_variables), before[:4]) > 1e-3
        before = state_of(variables)
        model.train_on_batch(x, y)
        assert difference(state_of(variables), before) == 0.0


def test_flush_updates_with_what_there_is_and_only_once():
    x, y, _ = regression_data(5)
    model, *_ = in_way("accum_steps", dense_model())
    plain = dense_model()
    for m in (model, plain):
        m.compile(**momentum_and_mse())
    for _ in range(2):
        plain.train_on_batch(x, y)
        model.train_on_batch(x[:MICRO], y[:MICRO])
        model.train_on_batch(x[MICRO:], y[MICRO:])
        model.flush()
        model.flush()
    assert difference(state_of(model.weights), state_of(plain.weights)) < 2e-6
    assert int(model.optimizer.iterations) == 2


def test_flush_does_nothing_within_a_step_or_before_compile():
    model, *_ = in_way("micro_batch_size", dense_model())
    model.flush()
    model.compile(**momentum_and_mse())
    x, y, _ = regression_data(5)
    model.train_on_batch(x, y)
    before = state_of(model.weights)
    model.flush()
    assert difference(state_of(model.weights), before) == 0.0


@pytest.mark.filterwarnings("ignore:Nothing accumulates:UserWarning")
def test_one_micro_batch_to_an_update_is_plain_training_bit_for_bit(mode):
    x, y, _ = regression_data(29)
    results = []
    for model in (dense_model(), in_way(mode, dense_model(), steps=1, micro=EFFECTIVE)[0]):
        model.compile(keras.optimizers.Adam(0.01), loss="mse")
        history = model.fit(x, y, EFFECTIVE, 2, 0, shuffle=False).history
        results.append((state_of(model.weights), history))
    assert difference(results[0][0], results[1][0]) == 0.0
    assert results[0][1] == results[1][1]


def test_learning_rate_schedules_count_updates():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1, 3], [0.1, 0.01, 0.001])
    x, y, _ = regression_data(29)
    model = assert_trains_as_large_batch(
        dense_model,
        x,
        y,
        compile_with=lambda: {"optimizer": keras.optimizers.SGD(schedule), "loss": "mse"},
    )
    assert float(model.optimizer.learning_rate) == pytest.approx(0.001)


@pytest.mark.parametrize(
    "mode, make_layer",
    [
        ("accum_steps", lambda: keras.layers.Dropout(0.5, seed=3)),
        ("micro_batch_size", keras.layers.BatchNormalization),
    ],
    ids=["dropout", "batch_norm"],
)
def test_layers_that_break_the_equivalence_do_break_it(mode, make_layer):
    def make_model():
        model = dense_model()
        return keras.Sequential([model.layers[0], make_layer(), model.layers[1]])

    x, y, _ = regression_data(24)
    with pytest.raises(AssertionError, match="weights differ"):
        assert_trains_as_large_batch(make_model, x, y, ways=[mode])


def test_every_micro_batch_in_a_step_draws_its_own_dropout():
    inputs = keras.Input((64,))
    dropped = keras.layers.Dropout(0.5, seed=3)(inputs)
    outputs = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")(dropped)
    model = GradientAccumulateModel(inputs=inputs, outputs=outputs, micro_batch_size=1)
    model.compile(keras.optimizers.SGD(1.0), loss=lambda y, y_pred: -y * y_pred)
    model.train_on_batch(np.ones((3, 64), "float32"), np.ones((3, 1), "float32"))
    # Each weight is what 0 to 3 of the micro-batches kept, of 2 each.
    kept = np.round(model.get_weights()[0] * 3 / 2).astype(int)
    assert set(kept[:, 0]) == {0, 1, 2, 3}


def test_frozen_layers_stay_as_they_are():
    def make_model():
        model = dense_model()
        model.layers[0].trainable = False
        return model

    x, y, _ = regression_data(29)
    model = assert_trains_as_large_batch(make_model, x, y)
    assert difference(state_of(model.layers[0].weights), state_of(dense_model().weights[:2])) == 0.0
