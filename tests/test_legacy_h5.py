"""Legacy HDF5 files (`model.save("m.h5")`): saved and loaded as Keras does, in mid-cycle too."""

import keras
import numpy as np
import pytest

from gradient_accumulator_tf import GradientAccumulateModel, GradientAccumulateOptimizer
from tests.oracle import (
    EFFECTIVE,
    MICRO,
    dense_model,
    difference,
    in_way,
    regression_data,
)

STEPS = EFFECTIVE // MICRO


def functional():
    keras.utils.set_random_seed(1)
    inputs = keras.Input((5,))
    hidden = keras.layers.Dense(6, "tanh", name="hidden")(inputs)
    return keras.Model(inputs, keras.layers.Dense(1, name="out")(hidden))


def masked():
    """Two denominators: tokens, and examples for the regulariser."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((5,))
    hidden = keras.layers.Masking(0.0)(keras.layers.Reshape((5, 1))(inputs))
    regularizer = keras.regularizers.L2(0.1)
    return keras.Model(inputs, keras.layers.Dense(1, kernel_regularizer=regularizer)(hidden))


def made(way, make, **kwargs):
    """A compiled model; the loss as an object, as Keras loads no name from such files."""
    model, optimizer, _ = in_way(way, make(), keras.optimizers.Adam(0.05), **kwargs)
    model.compile(optimizer, keras.losses.MeanSquaredError())
    return model


def train(model, start, stop, size=MICRO):
    x, y, _ = regression_data(EFFECTIVE * 2)
    x[:, 3:][::2] = 0.0  # what `masked` leaves out
    y = y if model.output_shape == (None, 1) else np.repeat(y[:, None], 5, 1)
    for i in range(start, stop):
        model.train_on_batch(x[i * size : (i + 1) * size], y[i * size : (i + 1) * size])


def loaded_from(model, folder):
    model.save(folder / "model.h5")
    return keras.models.load_model(folder / "model.h5")


@pytest.mark.parametrize(
    "way, make, saved_after",
    [
        ("optimizer", functional, STEPS + 2),
        ("optimizer", dense_model, STEPS),  # between two cycles
        ("accum_steps", functional, STEPS),
        ("accum_steps", dense_model, STEPS + 2),
    ],
)
def test_training_goes_on_as_if_not_stopped(way, make, saved_after, tmp_path):
    model = made(way, make)
    train(model, 0, saved_after)
    loaded = loaded_from(model, tmp_path)
    assert type(loaded) is type(model) and loaded is not model
    assert type(loaded.optimizer) is GradientAccumulateOptimizer
    assert difference(loaded.get_weights(), model.get_weights()) == 0.0
    for m in (model, loaded):
        train(m, saved_after, 2 * STEPS)
    assert int(loaded.optimizer.iterations) == 2
    assert difference(loaded.get_weights(), model.get_weights()) == 0.0
    large = made("plain", make)
    train(large, 0, 2, EFFECTIVE)
    assert difference(loaded.get_weights(), large.get_weights()) < 2e-6


@pytest.mark.parametrize("make", [functional, masked])
def test_an_open_cycle_is_in_the_file_if_no_further_one_is_to_come(make, tmp_path):
    model = made("accum_steps", make)
    train(model, 0, STEPS - 1)
    model.accum_steps = 1
    loaded = loaded_from(model, tmp_path)
    for m in (model, loaded):
        train(m, STEPS - 1, STEPS)
    assert int(loaded.optimizer.iterations) == 1
    assert difference(loaded.get_weights(), model.get_weights()) == 0.0


@pytest.mark.fast
def test_the_sums_of_further_denominators_are_in_the_file(tmp_path):
    model = made("accum_steps", masked)
    train(model, 0, 2)
    loaded = loaded_from(model, tmp_path)
    for m in (model, loaded):
        train(m, 2, 3)
    assert int(loaded.optimizer.iterations) == 1
    assert difference(loaded.get_weights(), model.get_weights()) == 0.0
    assert len(loaded.optimizer.variables) == len(model.optimizer.variables)


@pytest.mark.fast
def test_what_was_dropped_is_in_the_file(tmp_path):
    model = made("optimizer", functional, non_finite="drop_micro_batch")
    x, y, _ = regression_data(MICRO)
    model.train_on_batch(x, np.full_like(y, np.nan))
    train(model, 1, STEPS + 1)
    loaded = loaded_from(model, tmp_path)
    for m in (model, loaded):
        train(m, STEPS + 1, 2 * STEPS)
    assert int(loaded.optimizer.dropped_micro_steps) == 1
    assert difference(loaded.get_weights(), model.get_weights()) == 0.0


def test_within_a_step_it_is_as_by_the_plain_model(tmp_path):
    # Keras loads no state of a plain optimizer, and asks for a new `compile`.
    model = made("micro_batch_size", functional)
    train(model, 0, 1, EFFECTIVE)
    loaded = loaded_from(model, tmp_path)
    assert type(loaded) is GradientAccumulateModel
    assert loaded.micro_batch_size == MICRO
    assert difference(loaded.get_weights(), model.get_weights()) == 0.0
    for m in (model, loaded):
        m.compile(keras.optimizers.Adam(0.05), "mse")
        train(m, 1, 2, EFFECTIVE)
    assert difference(loaded.get_weights(), model.get_weights()) == 0.0


def test_model_checkpoint(way, tmp_path):
    model = made(way, functional)
    x, y, _ = regression_data(EFFECTIVE)
    callback = keras.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}.h5"))
    model.fit(x, y, batch_size=5, epochs=2, callbacks=[callback], verbose=0)
    loaded = keras.models.load_model(tmp_path / "2.h5", compile=False)
    assert type(loaded) is type(model)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


def test_under_mixed_precision_the_weights_load_as_by_plain_keras(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = made("accum_steps", dense_model)
        train(model, 0, 2)
        loaded = loaded_from(model, tmp_path)
        assert difference(loaded.get_weights(), model.get_weights()) == 0.0
    finally:
        keras.config.set_dtype_policy("float32")


def test_weights_set_before_build_wait_for_it():
    variable = keras.Variable([1.0, 2.0])
    one, other = (GradientAccumulateOptimizer(keras.optimizers.SGD(0.5), 2) for _ in range(2))
    one.apply([np.array([2.0, 4.0], "float32")], [variable])
    other.build([])
    assert not other.built
    other.set_weights([v.numpy() for v in one.variables])
    other.apply([np.array([0.0, 0.0], "float32")], [variable])
    np.testing.assert_allclose(variable.numpy(), [0.5, 1.0])
    with pytest.raises(ValueError, match="`weights` must have one array"):
        other.set_weights([0.0])
