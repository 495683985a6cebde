"""A wrapped model's own `fit`, `compile` and metrics do in the wrapper what they do without it."""

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateModel
from tests.oracle import (
    EFFECTIVE,
    KERAS,
    assert_trains_as_large_batch,
    dense_model,
    difference,
    in_way,
    mirrored,
    regression_data,
    state_of,
)


@keras.saving.register_keras_serializable("tests")
class Tenth(keras.Model):
    """Takes a tenth of its inputs, wherever it is given data, and has defaults of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(1)
        self.batch_norm = keras.layers.Dense(5)  # by a name that the wrapper has too
        self.alpha = 1.0
        self.times_compiled = 0

    def call(self, inputs, scale=1.0):
        return self.dense(self.batch_norm(inputs)) * self.alpha * scale

    def prepare(self, x):
        return x / 10

    def compile(self, optimizer="auto", loss="auto", *, sampler="top", **kwargs):
        optimizer = keras.optimizers.SGD(0.05, momentum=0.9) if optimizer == "auto" else optimizer
        super().compile(optimizer=optimizer, loss="mse" if loss == "auto" else loss, **kwargs)
        self.sampler = sampler
        self.times_compiled += 1

    def fit(self, x=None, y=None, batch_size=None, sample_weight=None, **kwargs):
        x = self.prepare(x)
        return super().fit(x=x, y=y, batch_size=batch_size, sample_weight=sample_weight, **kwargs)

    def evaluate(self, x=None, y=None, **kwargs):
        if not kwargs.get("_use_cached_eval_dataset"):
            x = self.prepare(x)
        return super().evaluate(x=x, y=y, **kwargs)

    def predict(self, x, **kwargs):
        return super().predict(self.prepare(x), **kwargs)

    def train_on_batch(self, x, y=None, **kwargs):
        return super().train_on_batch(self.prepare(x), y, **kwargs)

    def test_on_batch(self, x, y=None, **kwargs):
        return super().test_on_batch(self.prepare(x), y, **kwargs)

    def predict_on_batch(self, x):
        return super().predict_on_batch(self.prepare(x))

    def get_metrics_result(self):
        return {**super().get_metrics_result(), "twice": 2 * self.metrics[0].result()}

    def fit_twice(self, *args, **kwargs):
        self.fit(*args, **kwargs)
        rate = float(self.optimizer.learning_rate)
        return rate, self.stop_training, self.fit(*args, **kwargs).history["loss"]


def tenth():
    keras.utils.set_random_seed(1)
    model = Tenth()
    model(np.zeros((1, 5)))
    return model


def large_inputs(examples=24):
    x, y, weights = regression_data(examples)
    return 10 * x, y, weights


def compiled(mode, model=None, **compile_with):
    """A model in `mode`, or plain, compiled with its own defaults, and the batch size of `fit`."""
    model = tenth() if model is None else model
    model, _, batch_size = in_way(mode, model)
    model.compile(**compile_with)
    return model, batch_size


def test_what_a_model_does_in_its_own_fit_and_compile_is_done(graph_or_jit):
    x, y, weights = large_inputs()
    model = assert_trains_as_large_batch(
        tenth,
        x,
        y,
        compile_with=lambda: graph_or_jit,
        sample_weight=weights,
        validation_data=(x, y),
    )
    assert isinstance(model.optimizer, keras.optimizers.SGD) and model.loss == "mse"
    assert model.sampler == model.model.sampler == "top"


def test_a_model_without_that_fit_is_another(monkeypatch):
    x, y, _ = large_inputs()
    losses = {}
    for name in ("divides", "does not"):
        model, batch_size = compiled("micro_batch_size")
        losses[name] = model.fit(x, y, batch_size=batch_size, verbose=0).history["loss"][0]
        monkeypatch.setattr(Tenth, "prepare", lambda self, x: x)
    assert losses["does not"] > 2 * losses["divides"]


def test_all_that_takes_data_goes_through_the_models_own(mode):
    x, y, _ = large_inputs(EFFECTIVE)
    plain, _ = compiled("plain")
    model, batch_size = compiled(mode)
    plain.train_on_batch(x, y)
    for i in range(0, EFFECTIVE, batch_size):
        model.train_on_batch(x[i : i + batch_size], y[i : i + batch_size])
    assert difference(model.get_weights(), plain.get_weights()) < 1e-6
    calls = {
        "predict": lambda m: m.predict(x, verbose=0),
        "predict_on_batch": lambda m: m.predict_on_batch(x),
        "test_on_batch": lambda m: m.test_on_batch(x, y),
        "evaluate": lambda m: m.evaluate(x, y, verbose=0),
    }
    for name, call in calls.items():
        np.testing.assert_allclose(call(model), call(plain), 1e-5, 1e-5, err_msg=name)
    assert np.abs(model.predict(x, verbose=0) - model(x)).max() > 0.1


def test_a_helper_of_the_model_trains_the_wrapper(mode):
    x, y, _ = large_inputs()
    rate, stop, losses = {}, {}, {}
    for way in ("plain", mode):
        model, batch_size = compiled(way)
        rate[way], stop[way], losses[way] = model.fit_twice(
            x, y, batch_size=batch_size, shuffle=False, verbose=0
        )
    assert (
        rate[mode] == rate["plain"] == pytest.approx(0.05) and stop[mode] is stop["plain"] is False
    )
    np.testing.assert_allclose(losses[mode], losses["plain"], 1e-5)
    # It is the wrapper that was compiled, and the model in it was left alone.
    assert not model.model.compiled and model.model.times_compiled == 1


def test_the_model_in_the_wrapper_can_still_be_trained_plainly():
    x, y, _ = large_inputs()
    plain, batch_size = compiled("plain")
    wrapped = tenth()
    GradientAccumulateModel(model=wrapped, micro_batch_size=4).compile("adam")
    wrapped.compile()
    for model in (plain, wrapped):
        model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0)
    assert difference(wrapped.get_weights(), plain.get_weights()) == 0


def test_the_model_decides_before_the_wrapper_and_both_before_keras():
    calls = []

    class Own(keras.Sequential):
        def fit(self, *args, **kwargs):
            calls.append("model")
            return super().fit(*args, **kwargs)

    class Wrapper(GradientAccumulateModel):
        def fit(self, *args, **kwargs):
            calls.append("wrapper")
            return super().fit(*args, **kwargs)

    model = Wrapper(model=Own([keras.Input((5,)), keras.layers.Dense(1)]), accum_steps=3)
    model.compile("sgd", "mse")
    x, y, _ = regression_data(8)
    model.fit(x, y, batch_size=4, verbose=0)
    assert calls == ["model", "wrapper"]
    # A partial cycle is flushed at the epoch's end, as by a wrapper's `fit`.
    assert int(model.optimizer.iterations) == 1


class Loop(keras.Sequential):
    """Trains in a loop of its own, or by Keras's step."""

    by_step = False

    def fit(self, x, y):
        data = (tf.constant(x), tf.constant(y))
        if self.by_step:
            return self.train_step(data)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self(data[0]) - data[1]))
        self.optimizer.apply_gradients(
            zip(tape.gradient(loss, self.trainable_weights), self.trainable_weights, strict=True)
        )


def test_a_fit_that_trains_by_itself_is_told_that_it_sees_whole_batches(recwarn):
    x, y, _ = regression_data(8)
    net = Loop([keras.Input((5,)), keras.layers.Dense(1)])
    model = GradientAccumulateModel(model=net, micro_batch_size=4)
    model.compile("sgd", "mse")
    net.by_step = True
    model.fit(x, y)
    assert not recwarn
    net.by_step = False
    with pytest.warns(UserWarning, match=r"Loop.fit, which called none.*micro_batch_size=4"):
        model.fit(x, y)
    model.fit(x, y)  # it has been said
    across = GradientAccumulateModel(model=net, accum_steps=2)
    across.compile("sgd", "mse")
    across.fit(x, y)
    assert int(across.optimizer.micro_step) == 1 and not recwarn


def test_classes_of_all_kinds_have_twins():
    announced = []

    class Announced(keras.Model):
        def __init_subclass__(cls, *, key, **kwargs):
            super().__init_subclass__(**kwargs)
            announced.append(key)

    class Own(Announced, key="own"):
        def fit(self, *args, **kwargs):
            return super().fit(*args, **kwargs)

        def another(self):
            return type(self)(self.inputs, self.outputs)

    inputs = keras.Input((5,))
    own = Own(inputs, keras.layers.Dense(1)(inputs))
    model = GradientAccumulateModel(model=own, accum_steps=2)
    assert announced == ["own"]
    assert isinstance(model.fit.__self__, Own) and model.fit.__self__ is not own
    assert model.fit.__self__.__class__ is type(model.another()) is Own


# Attributes and calls


def test_an_attribute_that_the_model_has_is_set_on_it(mode):
    model, _ = compiled(mode)
    x = np.ones((2, 5), "float32")
    before = model(x).numpy()
    model.alpha = 3.0
    assert model.model.alpha == model.alpha == 3.0
    np.testing.assert_allclose(model(x), 3 * before, 1e-6)
    model.beta = 1.0  # which it does not have
    assert model.beta == 1.0 and not hasattr(model.model, "beta")
    # What both have is the wrapper's, and the model's own stays what it was.
    assert model.batch_norm == "micro_batch" and isinstance(model.model.batch_norm, keras.Layer)
    model.stop_training = True
    assert not hasattr(model.model, "stop_training")


def test_further_arguments_reach_the_models_call(mode):
    model, _ = compiled(mode)
    x = np.ones((2, 5), "float32")
    for scaled in (model(x, scale=2), model(x, tf.constant(2.0)), model(x, scale=2, training=True)):
        np.testing.assert_allclose(scaled, 2 * model(x), 1e-6)
    np.testing.assert_allclose(scaled, model.model(x, scale=2), 1e-6)
    with pytest.raises(TypeError, match="scales"):
        model(x, scales=2)
    # As a plain model it is built by a symbolic call, with these arguments.
    symbolic, *_ = in_way(mode, Tenth())
    assert symbolic(keras.Input((5,)), scale=2).shape == (None, 1) and symbolic.built
    assert len(symbolic.model.weights) == 4


# Files


def test_a_model_with_its_own_compile_is_saved_whole(mode, tmp_path):
    x, y, _ = large_inputs()
    model, batch_size = compiled(mode, optimizer=keras.optimizers.Adam(0.125))
    model.fit(x, y, batch_size=batch_size, verbose=0)
    model.save_weights(tmp_path / "model.weights.h5")
    plain = tenth()
    plain.load_weights(tmp_path / "model.weights.h5")
    assert difference(plain.get_weights(), model.get_weights()) == 0
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    # Its own `compile` had its say before the file was written.
    assert loaded.model.times_compiled == 0
    assert float(loaded.optimizer.learning_rate) == 0.125
    for m in (model, loaded):
        m.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0)
    assert difference(state_of(loaded.variables), state_of(model.variables)) == 0
    variables = (state_of(m.optimizer.variables) for m in (loaded, model))
    assert difference(*variables) == 0


def test_a_helper_of_the_model_saves_the_model(tmp_path):
    class Saves(Tenth):
        def save_to(self, folder):
            self.save_weights(folder / "own.weights.h5")
            return keras.saving.serialize_keras_object(self)

    keras.utils.set_random_seed(1)
    net = Saves()
    net(np.zeros((1, 5)))
    model = GradientAccumulateModel(model=net, micro_batch_size=4)
    assert model.save_to(tmp_path) == keras.saving.serialize_keras_object(net)
    plain = tenth()
    model.set_weights([w + 1 for w in model.get_weights()])
    plain.load_weights(tmp_path / "own.weights.h5")
    assert difference(model.get_weights(), [w + 1 for w in plain.get_weights()]) == 0


# Metrics that are attributes of the model


class Watched(keras.Model):
    """Counts in `call` what it sees."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1)
        self.seen = keras.metrics.Mean(name="seen")
        self.total = keras.metrics.Sum(name="total")

    def call(self, inputs):
        self.seen.update_state(inputs)
        self.total.update_state(inputs)
        return self.dense(inputs)


class Relisted(Watched):
    """Lists its metrics itself, in its own way."""

    @property
    def metrics(self):
        return [self._own, *super().metrics[:-1]]

    def __init__(self):
        super().__init__()
        self._own = keras.metrics.Mean(name="own")


def watched(cls=Watched):
    keras.utils.set_random_seed(1)
    model = cls()
    model(np.zeros((1, 5)))
    return model


@pytest.mark.parametrize(
    "cls, execution",
    [
        pytest.param(Watched, "graph", marks=pytest.mark.fast),
        (Watched, "jit"),
        (Relisted, "graph"),
    ],
    indirect=["execution"],
)
def test_metrics_of_the_model_are_in_the_logs_and_reset(execution, cls):
    x, y, _ = regression_data(24)
    model = assert_trains_as_large_batch(
        lambda: watched(cls),
        x,
        y,
        compile_with=lambda: {
            "optimizer": keras.optimizers.SGD(0.05),
            "loss": "mse",
            **execution,
        },
        epochs=3,
        validation_data=(x[:8], y[:8]),
    )
    assert ("own" if cls is Relisted else "total") in model.get_metrics_result()
    # A mean over 8 examples of the validation alone, in the last of three epochs.
    np.testing.assert_allclose(model.seen.result(), x[:8].mean(), 1e-5)
    model.reset_metrics()
    assert float(model.seen.count) == 0


def test_partial_micro_batches_count_for_what_they_hold_where_a_metric_adds_up():
    x, y, _ = regression_data(10)
    model, *_ = in_way("micro_batch_size", watched())
    model.compile("sgd", "mse")
    history = model.fit(x, y, batch_size=10, verbose=0).history
    np.testing.assert_allclose(history["total"][0], x.sum(), 1e-5)
    np.testing.assert_allclose(history["seen"][0], x.mean(), 1e-5)


def test_early_stopping_sees_a_metric_of_the_model(mode):
    x, y, _ = regression_data(12)
    model, _, batch_size = in_way(mode, watched())
    model.compile("sgd", "mse")
    stop = keras.callbacks.EarlyStopping(monitor="seen", mode="min", patience=1)
    history = model.fit(x, y, batch_size=batch_size, epochs=5, callbacks=[stop], verbose=0).history
    assert len(history["loss"]) == 2


def test_metrics_of_the_wrapper_stand_beside_those_of_the_model():
    class Wrapper(GradientAccumulateModel):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.mine = keras.metrics.Mean(name="mine")

    for net, names in ((watched(), ["loss", "seen", "total", "mine"]), (dense_model(), None)):
        model = Wrapper(model=net, micro_batch_size=4)
        model.compile("sgd", "mse")
        assert [m.name for m in model.metrics] == (names or ["loss", "mine"])


@pytest.mark.skipif(KERAS < (3, 10), reason="metrics in a loop on replicas need Keras 3.10")
def test_metrics_of_the_model_on_two_replicas(mode):
    x, y, _ = regression_data(24)
    expected = watched()
    expected.compile("sgd", "mse")
    history = expected.fit(x, y, batch_size=24, shuffle=False, verbose=0).history
    with mirrored().scope():
        model, _, batch_size = in_way(mode, watched())
        model.compile("sgd", "mse")
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(2 * batch_size)
    logs = model.fit(data, verbose=0).history
    # Of a sum over replicas Keras itself logs their mean.
    np.testing.assert_allclose(logs["seen"], history["seen"], 1e-5)


def groups_of(path):
    """Names of all that is in a weight file, but for the optimizer."""
    with h5py.File(path) as file:
        names = []
        file.visit(names.append)
    return [name for name in names if not name.startswith("optimizer")]


def test_a_weight_file_has_the_groups_of_the_plain_models(tmp_path):
    plain = watched()
    model = GradientAccumulateModel(plain, micro_batch_size=4)
    for name, m in (("plain", plain), ("model", model)):
        m.save_weights(tmp_path / f"{name}.weights.h5")
    names = [groups_of(tmp_path / f"{name}.weights.h5") for name in ("plain", "model")]
    assert names[0] == names[1] and "dense/vars/0" in names[0]
