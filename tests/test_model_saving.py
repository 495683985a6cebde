"""A saved GradientAccumulateModel goes on as if it had not been stopped."""

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateModel, GradientAccumulateOptimizer
from tests.oracle import (
    EFFECTIVE,
    MICRO,
    dense_model,
    difference,
    in_way,
    regression_data,
    state_of,
)


def functional():
    keras.utils.set_random_seed(1)
    inputs = keras.Input((5,))
    hidden = keras.layers.Dense(6, "tanh", name="hidden")(inputs)
    return keras.Model(inputs, keras.layers.Dense(1, name="out")(hidden))


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras.Model):
    def __init__(self, units=6, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.hidden = keras.layers.Dense(units, "tanh")
        self.out = keras.layers.Dense(1)

    def call(self, inputs):
        return self.out(self.hidden(inputs))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable(package="tests")
class OwnCall(GradientAccumulateModel):
    def __init__(self, accum_steps=None, micro_batch_size=None, **kwargs):
        super().__init__(accum_steps=accum_steps, micro_batch_size=micro_batch_size, **kwargs)
        self.hidden = keras.layers.Dense(6, "tanh")
        self.out = keras.layers.Dense(1)

    def call(self, inputs):
        return self.out(self.hidden(inputs))

    def get_config(self):
        return {
            **super().get_config(),
            "accum_steps": self.accum_steps,
            "micro_batch_size": self.micro_batch_size,
        }


def subclassed():
    keras.utils.set_random_seed(1)
    model = Subclassed()
    model(np.zeros((1, 5), "float32"))
    return model


def functional_with_an_attribute():
    """Keras looks for what it saves in attributes too, in the order of their names."""
    model = functional()
    model.a_layer = model.get_layer("out")
    return model


KINDS = [functional, dense_model, subclassed]
MODELS = [*KINDS, OwnCall]


def make(kind, mode, compiled=True):
    """An accumulating model of a kind, and the batch size for its fit."""
    keras.utils.set_random_seed(1)
    if kind is OwnCall:
        example, _, batch_size = in_way(mode, functional())
        model = OwnCall(example.accum_steps, example.micro_batch_size)
        model(np.zeros((1, 5), "float32"))
    else:
        model, _, batch_size = in_way(mode, kind())
    if compiled:
        compile_and_build(model)
    return model, batch_size


def compile_and_build(model):
    model.compile(keras.optimizers.Adam(0.05), loss="mse")
    # Keras does not load the state of an optimizer that has no variables yet.
    model.optimizer.build(model.trainable_variables)


def train(model, batch_size, start, stop):
    """Trains on micro-batches or effective batches number `start` to `stop` of one data set."""
    x, y, _ = regression_data(EFFECTIVE * 4)
    for i in range(start, stop):
        rows = slice(i * batch_size, (i + 1) * batch_size)
        model.train_on_batch(x[rows], y[rows])


def save_and_load_file(model, kind, mode, path):
    path = str(path / "model.keras")
    model.save(path)
    return keras.saving.load_model(path)


def save_and_load_weights(model, kind, mode, path):
    path = str(path / "model.weights.h5")
    model.save_weights(path)
    loaded, _ = make(kind, mode)
    loaded.set_weights([w + 1 for w in loaded.get_weights()])
    loaded.load_weights(path)
    return loaded


def save_and_load_checkpoint(model, kind, mode, path):
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    written = checkpoint.save(str(path / "checkpoint"))
    loaded, _ = make(kind, mode)
    checkpoint = tf.train.Checkpoint(model=loaded, optimizer=loaded.optimizer)
    checkpoint.restore(written).assert_existing_objects_matched()
    return loaded


@pytest.mark.parametrize(
    ("save_and_load", "kind", "mode"),
    [
        *((save_and_load_file, kind, "accum_steps") for kind in MODELS),
        (save_and_load_weights, dense_model, "accum_steps"),
        (save_and_load_weights, OwnCall, "accum_steps"),
        (save_and_load_checkpoint, functional, "accum_steps"),
        (save_and_load_checkpoint, subclassed, "accum_steps"),
        (save_and_load_file, functional, "micro_batch_size"),
        (save_and_load_weights, OwnCall, "micro_batch_size"),
        (save_and_load_checkpoint, OwnCall, "micro_batch_size"),
    ],
)
def test_training_goes_on_in_mid_cycle_as_if_not_stopped(save_and_load, kind, mode, tmp_path):
    model, batch_size = make(kind, mode)
    train(model, batch_size, 0, 2)
    if mode == "accum_steps":
        assert int(model.optimizer.micro_step) == 2
    loaded = save_and_load(model, kind, mode, tmp_path)
    assert loaded is not model
    assert type(loaded) is type(model)
    assert (loaded.accum_steps, loaded.micro_batch_size) == (
        model.accum_steps,
        model.micro_batch_size,
    )
    x, _, _ = regression_data(7)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    for m in (model, loaded):
        train(m, batch_size, 2, 4)
    assert int(loaded.optimizer.iterations) == int(model.optimizer.iterations) > 0
    assert difference(state_of(loaded.weights), state_of(model.weights)) == 0.0
    assert (
        difference(state_of(loaded.optimizer.variables), state_of(model.optimizer.variables)) == 0
    )


def masked():
    """A model whose losses have two denominators: tokens, and examples for the regulariser."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((5,), dtype="int32")
    hidden = keras.layers.Embedding(6, 4, mask_zero=True)(inputs)
    regularizer = keras.regularizers.L2(0.1)
    return keras.Model(inputs, keras.layers.Dense(1, kernel_regularizer=regularizer)(hidden))


def train_masked(model, start, stop):
    rng = np.random.default_rng(3)
    x, y = rng.integers(0, 6, (24, 5)), rng.normal(size=(24, 5, 1))
    for i in range(start, stop):
        model.train_on_batch(x[MICRO * i : MICRO * (i + 1)], y[MICRO * i : MICRO * (i + 1)])


@pytest.mark.parametrize(
    "save_and_load", [save_and_load_file, save_and_load_weights, save_and_load_checkpoint]
)
def test_sums_of_several_denominators_are_saved_in_mid_cycle(save_and_load, tmp_path):
    model, _ = make(masked, "accum_steps")
    train_masked(model, 0, 2)
    loaded = save_and_load(model, masked, "accum_steps", tmp_path)
    for m in (model, loaded):
        train_masked(m, 2, 6)
    assert int(loaded.optimizer.iterations) == 2
    assert difference(state_of(loaded.weights), state_of(model.weights)) == 0.0


@pytest.mark.fast
def test_the_loss_scale_is_saved_beside_sums_of_several_denominators(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model, loaded = make(masked, "accum_steps")[0], make(masked, "accum_steps")[0]
        train_masked(model, 0, 2)
        model.optimizer.dynamic_scale.assign(128.0)
        model.save_weights(tmp_path / "model.weights.h5")
        loaded.load_weights(tmp_path / "model.weights.h5")
        assert int(loaded.optimizer.inner_optimizer.micro_step) == 2
        assert float(loaded.optimizer.dynamic_scale) == 128.0
    finally:
        keras.config.set_dtype_policy("float32")


def names_in(path):
    names = []
    with h5py.File(path) as file:
        file.visit(names.append)
    return names


@pytest.mark.parametrize("kind", [*KINDS, functional_with_an_attribute])
def test_weight_files_are_the_plain_models_in_both_directions(kind, tmp_path):
    plain, (model, _) = kind(), make(kind, "accum_steps", compiled=False)
    model.set_weights([w + 1 for w in model.get_weights()])
    path = str(tmp_path / "plain.weights.h5")
    plain.save_weights(path)
    model.load_weights(path)
    assert difference(model.get_weights(), plain.get_weights()) == 0.0
    model.set_weights([w * 2 for w in model.get_weights()])
    path = str(tmp_path / "accumulating.weights.h5")
    model.save_weights(path)
    plain.load_weights(path)
    assert difference(plain.get_weights(), model.get_weights()) == 0.0
    assert difference(plain.get_weights(), kind().get_weights()) > 0.1
    assert len(names_in(path)) > 4
    assert names_in(path) == names_in(tmp_path / "plain.weights.h5")


@pytest.mark.parametrize(
    "kind, mode",
    [*((kind, "accum_steps") for kind in KINDS), (functional, "micro_batch_size")],
)
def test_weight_files_hold_the_optimizers_state_for_both(kind, mode, tmp_path):
    # Two effective batches in the plain model, one in the accumulating, the last in the plain.
    reference, plain, again = kind(), kind(), kind()
    model, batch_size = make(kind, mode)
    for m in (reference, plain, again):
        compile_and_build(m)
    train(reference, EFFECTIVE, 0, 4)
    train(plain, EFFECTIVE, 0, 2)
    plain.save_weights(str(tmp_path / "plain.weights.h5"))
    model.load_weights(str(tmp_path / "plain.weights.h5"))
    turns = EFFECTIVE // batch_size
    train(model, batch_size, 2 * turns, 3 * turns)
    model.save_weights(str(tmp_path / "accumulating.weights.h5"))
    again.load_weights(str(tmp_path / "accumulating.weights.h5"))
    train(again, EFFECTIVE, 3, 4)
    assert int(again.optimizer.iterations) == 4
    assert difference(again.get_weights(), reference.get_weights()) < 2e-6


@pytest.mark.parametrize("kind", MODELS)
def test_an_exported_model_predicts_the_same(kind, tmp_path):
    model, batch_size = make(kind, "accum_steps")
    train(model, batch_size, 0, 3)
    x, _, _ = regression_data(7)
    expected = model.predict(x, verbose=0)
    model.export(str(tmp_path / "exported"), verbose=False)
    exported = tf.saved_model.load(str(tmp_path / "exported"))
    np.testing.assert_allclose(exported.serve(x), expected, atol=1e-6)


@pytest.mark.fast
def test_config_and_json_make_the_same_model(mode):
    model, _ = make(functional, mode)
    for made in (
        GradientAccumulateModel.from_config(model.get_config()),
        keras.models.model_from_json(model.to_json()),
        keras.models.clone_model(model),
    ):
        assert type(made) is GradientAccumulateModel
        assert made.name == model.name
        assert getattr(made, mode) == getattr(model, mode)
        made.set_weights(model.get_weights())
        x, _, _ = regression_data(3)
        np.testing.assert_array_equal(made(x), model(x))


@pytest.mark.fast
def test_a_compiled_file_keeps_the_optimizer_wrapped_once(tmp_path):
    model, _ = make(functional, "accum_steps")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is GradientAccumulateOptimizer
    assert type(loaded.optimizer.inner_optimizer) is keras.optimizers.Adam
    assert loaded.optimizer.accum_steps == EFFECTIVE // MICRO


@pytest.mark.fast
def test_the_wrapper_shows_the_model_in_it():
    plain = functional()
    model = GradientAccumulateModel(model=plain, accum_steps=2)
    assert [layer.name for layer in model.layers] == [layer.name for layer in plain.layers]
    assert model.get_layer("hidden") is plain.get_layer("hidden")
    assert model.count_params() == plain.count_params()
    assert model.input_shape == plain.input_shape
    assert model.output_shape == plain.output_shape
    printed = []
    model.summary(print_fn=lambda line, **_: printed.append(line))
    assert "hidden" in "".join(printed)
    with pytest.raises(AttributeError, match="no_such_attribute"):
        _ = model.no_such_attribute
