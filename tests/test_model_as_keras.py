"""GradientAccumulateModel is handled as a Keras model is, by users and by other tools."""

import functools
import inspect
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateModel, GradientAccumulateOptimizer
from tests.oracle import (
    EFFECTIVE,
    KERAS,
    MODES,
    WAYS,
    dense_model,
    difference,
    in_way,
    mirrored,
    regression_data,
)


def functional():
    inputs = keras.Input((5,))
    return keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Dense(4)(inputs)))


def test_the_model_may_come_first():
    model, inputs = dense_model(), keras.Input((5,))
    assert GradientAccumulateModel(model, micro_batch_size=2).model is model
    ends = GradientAccumulateModel(inputs, keras.layers.Dense(1)(inputs), accum_steps=2)
    assert ends.input_shape == (None, 5) and ends.output_shape == (None, 1)
    named = GradientAccumulateModel(inputs, outputs=keras.layers.Dense(1)(inputs), accum_steps=2)
    assert len(named.trainable_variables) == 2
    nested = {"a": keras.Input((5,), name="a")}
    outputs = keras.layers.Dense(1)(nested["a"])
    assert len(GradientAccumulateModel(nested, outputs, accum_steps=2).model.inputs) == 1


@pytest.mark.parametrize("name", ["fit", "compile"])
def test_arguments_are_those_of_keras(name):
    own, keras_own = (
        [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()]
        for method in (getattr(GradientAccumulateModel, name), getattr(keras.Model, name))
    )
    assert own == keras_own


def test_a_tool_that_patches_fit_finds_its_arguments(mode, monkeypatch):
    # As MLflow's autolog does it, among others.
    original, seen = keras.Model.fit, []

    class Log(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(logs["loss"])

    @functools.wraps(original)
    def patched(self, *args, **kwargs):
        if len(args) >= 6:
            args = [*args[:5], [*list(args[5]), Log()], *args[6:]]
        else:
            kwargs["callbacks"] = [*list(kwargs.get("callbacks") or []), Log()]
        assert len(kwargs["x"] if "x" in kwargs else args[0]) == EFFECTIVE
        return original(self, *args, **kwargs)

    monkeypatch.setattr(keras.Model, "fit", patched)
    model, _, batch_size = in_way(mode, dense_model())
    model.compile("sgd", "mse")
    x, y, _ = regression_data(EFFECTIVE)
    history = model.fit(x, y, batch_size, 2, verbose=0)
    assert seen == history.history["loss"]


def test_all_arguments_of_fit_arrive():
    x, y, weight = regression_data(EFFECTIVE)
    model, _, batch_size = in_way("micro_batch_size", dense_model())
    model.compile("sgd", "mse", None, ["mae"], None, True)
    assert model.run_eagerly
    fit = {"sample_weight": weight, "validation_split": 0.5, "validation_batch_size": 3}
    history = model.fit(x, y, batch_size, 3, 0, None, initial_epoch=1, validation_freq=2, **fit)
    assert history.epoch == [1, 2]
    assert len(history.history["val_mae"]) == 1
    assert history.params["steps"] == 1


def printed(model):
    lines = []
    model.summary(print_fn=lambda line, **_: lines.append(line))
    return "\n".join(lines)


@pytest.mark.parametrize("way", ["plain", *WAYS])
def test_summary_counts_the_optimizer(way):
    model, optimizer, batch_size = in_way(way, functional(), keras.optimizers.Adam(0.05))
    assert "Optimizer params" not in printed(model)
    model.compile(optimizer, "mse")
    x, y, _ = regression_data(EFFECTIVE)
    model.fit(x, y, batch_size=batch_size, verbose=0)
    parameters = sum(np.prod(v.shape, dtype=int) for v in model.optimizer.variables)
    assert parameters >= 2 * model.count_params()
    assert f"Optimizer params: {parameters}" in printed(model)
    if way in MODES:
        assert not model.model.compiled and not hasattr(model.model, "optimizer")


def test_summary_leaves_a_compiled_model_as_it_was():
    plain = functional()
    plain.compile("adam", "mse")
    optimizer = plain.optimizer
    model, *_ = in_way("accum_steps", plain)
    printed(model)
    assert plain.compiled and plain.optimizer is optimizer
    assert not model.compiled


def numbers():
    return keras.Sequential([keras.Input((5,), dtype="int32"), keras.layers.Embedding(6, 2)])


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1)

    def call(self, inputs):
        return self.dense(inputs)


def sequential_to_be_built():
    return keras.Sequential([keras.layers.Dense(1)])


@pytest.mark.parametrize("make", [functional, numbers, Subclassed, sequential_to_be_built])
def test_a_saved_model_has_the_plain_models_signature(make, mode, tmp_path):
    plain = make()
    model, *_ = in_way(mode, plain)
    x = np.random.default_rng(0).integers(0, 6, (4, 5)).astype("int32")
    x = x if make is numbers else x.astype("float32")
    expected = model.predict(x, verbose=0)
    signatures = []
    for name, m in (("plain", plain), ("model", model)):
        tf.saved_model.save(m, str(tmp_path / name))
        loaded = tf.saved_model.load(str(tmp_path / name))
        signatures.append(loaded.signatures["serving_default"])
    (keyword,) = signatures[0].structured_input_signature[1]
    assert len({str(s.structured_input_signature) for s in signatures}) == 1
    (served,) = signatures[1](**{keyword: tf.constant(x)}).values()
    np.testing.assert_allclose(served, expected, atol=1e-6)


def test_inputs_of_several_dtypes_are_in_the_signature(tmp_path):
    inputs = {"a": keras.Input((2,), name="a"), "b": keras.Input((2,), name="b", dtype="int32")}
    hidden = keras.layers.Flatten()(keras.layers.Embedding(5, 1)(inputs["b"]))
    plain = keras.Model(inputs, keras.layers.Concatenate()([inputs["a"], hidden]))
    model, *_ = in_way("accum_steps", plain)
    tf.saved_model.save(model, str(tmp_path))
    signature = tf.saved_model.load(str(tmp_path)).signatures["serving_default"]
    specs = signature.structured_input_signature[1].values()
    assert sorted(spec.dtype.name for spec in specs) == ["float32", "int32"]


@pytest.mark.skipif(
    tuple(map(int, tf.__version__.split(".")[:2])) < (2, 20),
    reason="the converter of older TensorFlow crashes on plain Keras models too",
)
@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.parametrize("make", [functional, numbers, Subclassed])
def test_tflite_converts_it(make):
    model, *_ = in_way("micro_batch_size", make())
    x = np.random.default_rng(0).integers(0, 6, (4, 5)).astype("int32")
    x = x if make is numbers else x.astype("float32")
    expected = model.predict(x, verbose=0)
    converted = tf.lite.TFLiteConverter.from_keras_model(model).convert()
    interpreter = tf.lite.Interpreter(model_content=converted)
    (taken,), (given,) = interpreter.get_input_details(), interpreter.get_output_details()
    assert taken["dtype"] == x.dtype
    interpreter.resize_tensor_input(taken["index"], x.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(taken["index"], x)
    interpreter.invoke()
    np.testing.assert_allclose(interpreter.get_tensor(given["index"]), expected, atol=1e-5)


class CountsRows(keras.layers.Layer):
    """Sums the square of the rows that each call sees: 144 for 12 at once."""

    def __init__(self):
        super().__init__()
        self.squares = self.add_weight(name="squares", initializer="zeros", trainable=False)

    def call(self, inputs, training=None):
        if training:
            self.squares.assign_add(float(inputs.shape[0]) ** 2)
        return inputs


def counting(micro_batch_size, **compiled):
    inputs = keras.Input(batch_shape=(None, 5))
    counts = CountsRows()
    model = keras.Model(inputs, keras.layers.Dense(1)(counts(inputs)))
    model = GradientAccumulateModel(model, micro_batch_size=micro_batch_size)
    model.compile("sgd", "mse", **compiled)
    return model, counts.squares


def test_micro_batch_size_set_between_fits_holds(execution):
    execution = {**execution, "steps_per_execution": 1}
    model, squares = counting(4, **execution)
    x, y, _ = regression_data(EFFECTIVE)
    seen = []
    for size in (4, 6, 2):
        squares.assign(0.0)
        model.micro_batch_size = size
        model.fit(x, y, EFFECTIVE, verbose=0)
        seen.append(float(squares))
    assert seen == [3 * 16, 2 * 36, 6 * 4]


def test_micro_batch_size_set_within_a_fit_holds_from_the_next_batch_on():
    model, squares = counting(4)
    seen = []

    class Set(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(float(squares))
            self.model.micro_batch_size = 6

    x, y, _ = regression_data(EFFECTIVE * 2)
    model.fit(x, y, EFFECTIVE, verbose=0, callbacks=[Set()])
    assert seen == [48, 48 + 72]


def test_a_change_of_what_is_trainable_is_refused_after_micro_batch_size_was_set():
    model, _ = counting(4)
    x, y, _ = regression_data(EFFECTIVE)
    model.fit(x, y, EFFECTIVE, verbose=0)
    model.layers[-1].trainable = False
    model.micro_batch_size = 6
    with pytest.raises(ValueError, match="without a new `compile`"):
        model.fit(x, y, EFFECTIVE, verbose=0)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_the_largest_micro_batch_size_takes_a_batch_of_unknown_size_whole(jit_compile):
    x, y, _ = regression_data(EFFECTIVE)
    spec = (tf.TensorSpec((None, 5)), tf.TensorSpec((None, 1)))
    data = tf.data.Dataset.from_generator(lambda: iter([(x, y)]), output_signature=spec)
    results = []
    for wrap in (lambda m: m, lambda m: GradientAccumulateModel(m, micro_batch_size=2**31 - 1)):
        model = wrap(dense_model())
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit_compile)
        model.fit(data, steps_per_epoch=1, verbose=0)
        results.append(model.get_weights())
    assert difference(*results) < 1e-6
    assert difference(results[0], dense_model().get_weights()) > 1e-3


@pytest.mark.parametrize("file", ["model.keras", "model.h5"])
def test_a_file_says_what_to_import_where_keras_does_not(file, tmp_path):
    model, *_ = in_way("accum_steps", functional())
    model.compile("sgd", keras.losses.MeanSquaredError())
    model.save(tmp_path / file)
    code = f"import keras; print(keras.models.load_model({str(tmp_path / file)!r}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if file == "model.keras" and KERAS < (3, 11) and run.returncode == 0:
        assert "GradientAccumulateModel" in run.stdout  # older Keras imports by itself
        return
    assert run.returncode == 1
    assert "GradientAccumulateModel" in run.stderr
    if file == "model.keras":
        assert "'module': 'gradient_accumulator_tf.models.accumulate'" in run.stderr


class Gan(GradientAccumulateModel):
    """Two nets, two optimizers, one of which it was not made for."""

    def __init__(self, accum_steps):
        super().__init__(accum_steps=accum_steps)
        self.generator = keras.layers.Dense(1)
        self.discriminator = keras.layers.Dense(1)

    def call(self, inputs):
        return self.discriminator(inputs) + self.generator(inputs)

    def compile(self, d_optimizer, g_optimizer, **kwargs):
        super().compile(**kwargs)
        self.d_optimizer, self.others = d_optimizer, {"g": g_optimizer}

    def train_step(self, data):
        x, y = data
        for net, optimizer in (
            (self.discriminator, self.d_optimizer),
            (self.generator, self.others["g"]),
        ):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(net(x) - y))
            optimizer.apply(tape.gradient(loss, net.trainable_variables), net.trainable_variables)
        return {"loss": loss}


def trained_gan(make_optimizer, accum_steps=4, size=2):
    keras.utils.set_random_seed(1)
    gan = Gan(accum_steps)
    gan.compile(make_optimizer(), make_optimizer())
    x, y, _ = regression_data(16)
    gan(x), gan.fit(x, y, size, shuffle=False, verbose=0), gan.fit(x, y, size, verbose=0, epochs=0)
    return gan


def test_optimizers_of_a_models_own_that_do_not_accumulate_are_named_once():
    with pytest.warns(UserWarning, match="in no other") as warned:
        gan = trained_gan(lambda: keras.optimizers.SGD(0.1))
    (warning,) = [str(w.message) for w in warned if "accum_steps" in str(w.message)]
    assert "Gan with accum_steps=4" in warning
    assert "d_optimizer (SGD), others['g'] (SGD)" in warning
    assert "self.d_optimizer = GradientAccumulateOptimizer(d_optimizer, accum_steps=4)" in warning
    assert int(gan.d_optimizer.iterations) == 8


@pytest.mark.filterwarnings("error:`accum_steps`")
def test_optimizers_of_a_models_own_that_accumulate_are_flushed_with_it():
    gan = trained_gan(lambda: GradientAccumulateOptimizer(keras.optimizers.SGD(0.1), 3))
    assert int(gan.d_optimizer.iterations) == int(gan.others["g"].iterations) == 3  # 3, 3 and 2
    assert int(gan.d_optimizer.micro_step) == 0
    trained_gan(lambda: keras.optimizers.SGD(0.1), accum_steps=1)  # wants no accumulation


@pytest.mark.filterwarnings("error:`accum_steps`")
def test_a_train_step_of_ones_own_with_the_compiled_optimizer_is_not_warned_of():
    class Kept(GradientAccumulateModel):
        def compile(self, optimizer, **kwargs):
            self.given = optimizer
            super().compile(optimizer, **kwargs)

        def train_step(self, data):
            return super().train_step(data)

    model = Kept(dense_model(), accum_steps=2)
    model.compile(keras.optimizers.SGD(0.1), loss="mse")
    x, y, _ = regression_data(8)
    model.fit(x, y, 2, verbose=0)
    assert int(model.optimizer.iterations) == 2


def test_the_warning_is_given_under_a_strategy_too():
    with mirrored().scope():
        with pytest.warns(UserWarning, match="d_optimizer"):
            trained_gan(lambda: keras.optimizers.SGD(0.1), size=4)


def own_loss(base):
    """A `base` with a loss of its own, which calls none that is compiled."""

    class Own(base):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return tf.reduce_mean(tf.abs(y_pred - y))

    return Own


def test_a_loss_of_ones_own_ignores_the_compiled_one_as_in_keras(mode):
    x, y, _ = regression_data(EFFECTIVE)
    weights, inner = [], dense_model()
    for model, _, batch_size in (
        in_way("plain", own_loss(keras.Model)(inner.inputs[0], inner.outputs[0])),
        in_way(mode, dense_model(), cls=own_loss(GradientAccumulateModel)),
    ):
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit(x, y, batch_size, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    assert difference(*weights) < 1e-6
    assert difference(weights[0], dense_model().get_weights()) > 1e-3
